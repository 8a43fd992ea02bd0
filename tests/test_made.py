"""MADE: what each output may depend on, for any order; masks as zuko's; ancestral passes."""

import pytest
import torch
import zuko
from hypothesis import given, settings
from hypothesis import strategies as st

from genflow.errors import UserError
from genflow.networks.made import MADE
from tests.noise import shaken


def dependencies(network, features, condition=None):
    """Which inputs each feature's parameters hang on, at several points: D x D bool."""
    found = torch.zeros(features, features, dtype=torch.bool)
    for _ in range(4):
        x = torch.randn(1, features, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda a: network(a, condition)[0], x)[:, :, 0]
        found |= (jacobian != 0).any(0)
    return found


@settings(max_examples=40, deadline=None)
@given(
    order=st.integers(1, 6).flatmap(lambda d: st.permutations(range(d))),
    width=st.integers(8, 24),
    depth=st.integers(1, 3),
    condition_dim=st.sampled_from([0, 2]),
    residual=st.booleans(),
)
def test_parameters_hang_on_no_features_but_those_before(order, width, depth, condition_dim, residual):
    torch.manual_seed(0)
    hidden = (width,) * (2 * depth - 1 if residual else depth)
    D = len(order)
    network = shaken(MADE(D, 3, condition_dim, hidden=hidden, order=order, residual=residual), 0.5).double()
    condition = torch.randn(1, condition_dim, dtype=torch.float64) if condition_dim else None
    places = torch.tensor(order)
    allowed = places.unsqueeze(1) > places
    found = dependencies(network, D, condition)
    assert not (found & ~allowed).any()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_parameters_hang_on_all_features_before(depth, residual):
    torch.manual_seed(0)
    order = [2, 0, 3, 1]
    hidden = (64,) * (2 * depth - 1 if residual else depth)  # so many that no path is dead at every point
    network = shaken(MADE(4, 3, hidden=hidden, order=order, residual=residual), 0.5).double()
    places = torch.tensor(order)
    assert torch.equal(dependencies(network, 4, None), places.unsqueeze(1) > places)


@pytest.mark.parametrize("residual", [False, True])
def test_every_feature_hears_the_condition_through_a_hidden_layer(residual):
    network = shaken(MADE(4, 2, 3, hidden=(32, 32, 32), residual=residual), 0.5).double()
    x, condition = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda c: network(x, c)[0], condition)[:, :, 0]
    assert (jacobian != 0).any(0).all()
    a, b, middle = (network(x, c)[0, :, 0] for c in (condition, -condition, 0 * condition))
    assert (a + b - 2 * middle).abs().max() > 1e-3  # not linear, even for the first feature


def test_narrow_layers_still_reach_the_last_features():
    network = shaken(MADE(30, 1, hidden=(10, 10)), 0.5).double()
    x = torch.randn(1, 30, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(network(x)[0, 0, -1], x)[0][0]
    assert grad[-1] == 0 and grad[:-1].any()
    assert network.first.mask[:, -2].any() and not network.first.mask[:, -1].any()


@pytest.mark.parametrize("order", [None, [3, 1, 0, 2], [3, 2, 1, 0]])
@pytest.mark.parametrize("condition_dim", [0, 2])
@pytest.mark.parametrize("residual", [False, True])
def test_an_ancestral_pass_finds_the_fixed_point_that_full_passes_find(order, condition_dim, residual):
    network = shaken(MADE(4, 2, condition_dim, hidden=(9, 9, 9), order=order, residual=residual), 0.5).double()
    noise = torch.randn(5, 4, dtype=torch.float64)
    condition = torch.randn(5, condition_dim, dtype=torch.float64) if condition_dim else None

    def choose(i, parameters):
        return (noise[:, i] + parameters[:, 0]) * parameters[:, 1].tanh()

    x = network.ancestral(choose, 5, condition)
    parameters = network(x, condition)
    torch.testing.assert_close(x, (noise + parameters[:, 0]) * parameters[:, 1].tanh())


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
@pytest.mark.parametrize("context", [0, 3])
def test_numbers_equal_zukos_masked_network(order, context):
    """Its hidden units hold the same degrees, one after another in turn, where ours are sorted."""
    D, n = 5, 2
    degrees = D if context else D - 1
    hidden = (degrees * 3, degrees * 2)
    peer = zuko.flows.MaskedAutoregressiveTransform(D, context, order=order, hidden_features=hidden).double().hyper
    ours = MADE(D, n, context, hidden=hidden, order=order).double()
    copy_zuko(peer, ours)
    x, c = torch.randn(7, D, dtype=torch.float64), torch.randn(7, context, dtype=torch.float64)
    expected = peer(torch.cat([x, c], 1)).unflatten(1, (D, n)).transpose(1, 2)
    torch.testing.assert_close(ours(x, c if context else None), expected)


@torch.no_grad()
def copy_zuko(peer, ours):
    """The weights of a zuko MaskedMLP into a MADE of widths that are multiples of the number of degrees."""
    D, n = ours.features, ours.parameters_each
    linear = [layer for layer in peer if isinstance(layer, zuko.nn.MaskedLinear)]
    own = [ours.first, *ours.layers]
    lowest = 0 if ours.condition is not None else 1
    columns = torch.arange(D)
    for theirs, layer in zip(linear, own, strict=False):
        unit = torch.arange(theirs.out_features)
        rows = (unit % (D - lowest)).argsort(stable=True)
        weight = (theirs.weight * theirs.mask)[rows]
        if layer is ours.first and ours.condition is not None:
            ours.condition.weight.copy_(weight[:, D:])
        layer.weight.copy_(weight[:, columns])
        assert torch.equal((layer.mask != 0), theirs.mask[rows][:, columns])
        layer.bias.copy_(theirs.bias[rows])
        columns = rows
    rows = torch.arange(D * n).view(D, n).t().flatten()  # theirs: feature by feature
    ours.last.weight.copy_(linear[-1].weight[rows][:, columns])
    ours.last.bias.copy_(linear[-1].bias[rows])


def test_it_starts_at_zero():
    assert MADE(3, 2)(torch.randn(2, 3)).abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": [0, 1, 1]}, "order"),
        ({"order": [0, 1]}, "each of 0 .. 2 once"),
        ({"hidden": ()}, "hidden"),
        ({"hidden": (8, 0)}, "hidden"),
        ({"hidden": (8, 8), "residual": True}, r"try \(8, 8, 8\)"),
        ({"hidden": (8, 9, 8), "residual": True}, "odd number of equal widths"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        MADE(3, 2, **options)
