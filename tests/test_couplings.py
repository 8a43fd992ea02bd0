"""Coupling layers and their networks: what is kept, peers' numbers, masks, bounds, precision, bad input."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from zuko.transforms import CouplingTransform, MonotonicAffineTransform

from genflow.errors import UserError
from genflow.flows.bijections.base import Chain
from genflow.flows.bijections.coupling import AdditiveCoupling, AffineCoupling, SplineCoupling
from genflow.flows.bijections.splines import MIN_SLOPE
from genflow.networks.couplers import MLP, ConvNet, ResidualConvNet, ResidualMLP
from tests.noise import shaken

COUPLINGS = [AdditiveCoupling, AffineCoupling, SplineCoupling]
NETWORKS = [MLP, ResidualMLP, ConvNet, ResidualConvNet]


def data(*shape):
    return torch.randn(4, *shape, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------- masks


def kept_places(coupling, shape):
    """Where the map leaves samples as they are."""
    x = data(*shape)
    return (coupling(x)[0] == x).all(0)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("shape", "mask", "kept"),
    [
        ((5,), "halves", lambda place: place[0] < 3),
        ((5,), "alternating", lambda place: place[0] % 2 == 0),
        ((4, 2, 3), "halves", lambda place: place[0] < 2),
        ((3, 2, 3), "alternating", lambda place: place[0] % 2 == 0),
        ((2, 3, 5), "checkerboard", lambda place: (place[1] + place[2]) % 2 == 0),
    ],
)
def test_the_mask_says_what_is_kept(shape, mask, kept, flip):
    coupling = shaken(AffineCoupling(shape, mask=mask, flip=flip)).double()
    place = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    assert torch.equal(kept_places(coupling, shape), kept(place) != flip)


def test_the_default_mask_is_halves_and_a_checkerboard_for_one_channel():
    assert kept_places(shaken(AffineCoupling((4,))).double(), (4,)).tolist() == [True, True, False, False]
    assert kept_places(shaken(AffineCoupling((2, 2, 2))).double(), (2, 2, 2))[:, 0, 0].tolist() == [True, False]
    assert kept_places(shaken(AffineCoupling((1, 2, 2))).double(), (1, 2, 2)).tolist() == [
        [[True, False], [False, True]]
    ]


@pytest.mark.parametrize("make", COUPLINGS)
@pytest.mark.parametrize("mask", ["halves", "alternating", "checkerboard"])
@pytest.mark.parametrize("flip", [False, True])
def test_every_mask_goes_back_with_the_volume_of_its_jacobian(make, mask, flip):
    shape = (3, 3, 2)
    coupling = shaken(make(shape, mask=mask, flip=flip, condition_dim=2)).double()
    x, condition = data(*shape), data(2)
    z, ladj = coupling(x, condition)
    back, back_ladj = coupling.inverse(z, condition)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(back_ladj, -ladj, rtol=0, atol=1e-8)
    jacobian = torch.autograd.functional.jacobian(lambda a: coupling(a, condition[:1])[0], x[:1]).view(18, 18)
    torch.testing.assert_close(ladj[0], torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", COUPLINGS)
@pytest.mark.parametrize("shape", [(5,), (4, 2, 2), (1, 3, 3)])
def test_a_new_coupling_is_the_identity(make, shape):
    x = data(*shape)
    z, ladj = make(shape).double()(x)
    torch.testing.assert_close(z, x, rtol=0, atol=1e-14)
    assert ladj.shape == (4,) and ladj.abs().max() < 1e-12


def test_an_additive_coupling_keeps_volumes():
    coupling = shaken(AdditiveCoupling((4,))).double()
    x = data(4)
    assert not torch.equal(coupling(x)[0], x) and torch.equal(coupling(x)[1], torch.zeros(4, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------- peers


class Told(nn.Module):
    """Our network, its output arranged for a peer."""

    def __init__(self, coupling, arrange):
        super().__init__()
        self.coupling, self.arrange = coupling, arrange

    def forward(self, kept, context=None):
        return self.arrange(self.coupling.network(kept).unflatten(1, (-1, self.coupling.partition.changed)))


def test_affine_numbers_are_zukos():
    coupling = shaken(AffineCoupling((5,))).double()

    def meta(kept):
        shift, u = coupling.network(kept).chunk(2, 1)
        log_scale = 2 * torch.tanh(u / 2)
        return MonotonicAffineTransform(shift, log_scale / (1 - (log_scale / math.log(1e-3)).abs()))

    x = data(5)
    y, ladj = CouplingTransform(meta, torch.tensor([True, True, True, False, False])).call_and_ladj(x)
    torch.testing.assert_close(coupling(x)[0], y)
    torch.testing.assert_close(coupling(x)[1], ladj.sum(1))


def test_affine_numbers_of_pictures_are_normflows():
    normflows = pytest.importorskip("normflows")
    coupling = shaken(AffineCoupling((4, 3, 3), mask="halves", network=partial(ConvNet, hidden=8))).double()

    def arrange(parameters):
        shift, u = parameters.unbind(1)
        return torch.stack([shift, 2 * torch.tanh(u / 2)], 2).flatten(1, 2)

    peer = normflows.flows.AffineCouplingBlock(Told(coupling, arrange), scale_map="exp", split_mode="channel")
    x = data(4, 3, 3)
    y, ladj = peer(x)
    torch.testing.assert_close(coupling(x)[0], y)
    torch.testing.assert_close(coupling(x)[1], ladj)


@pytest.mark.parametrize("transform_kept", [False, True])
def test_spline_numbers_are_nflows(transform_kept):
    pytest.importorskip("nflows")
    from nflows.transforms import PiecewiseRationalQuadraticCDF, PiecewiseRationalQuadraticCouplingTransform

    coupling = shaken(SplineCoupling((5,), transform_kept=transform_kept)).double()
    one = torch.cat([torch.zeros(16), torch.full((7,), math.log(math.expm1(1 - MIN_SLOPE)))]).double()

    def arrange(parameters):
        return (parameters.transpose(1, 2) + one).flatten(1)

    def own(features):
        spline = PiecewiseRationalQuadraticCDF((features,), 8, tails="linear", tail_bound=3.0).double()
        values = (coupling.own[0].T + one).detach()
        for name, value in zip(("widths", "heights", "derivatives"), values.split([8, 8, 7], 1)):
            getattr(spline, f"unnormalized_{name}").data = value
        return spline

    peer = PiecewiseRationalQuadraticCouplingTransform(
        torch.tensor([0, 0, 0, 1, 1]), lambda inputs, outputs: Told(coupling, arrange), num_bins=8, tails="linear",
        tail_bound=3.0, apply_unconditional_transform=transform_kept,
    )  # fmt: skip
    if transform_kept:
        peer.unconditional_transform = own(3)
    x = data(5)
    y, ladj = peer(x)
    torch.testing.assert_close(coupling(x)[0], y)
    torch.testing.assert_close(coupling(x)[1], ladj)
    torch.testing.assert_close(coupling.inverse(x)[0], peer.inverse(x)[0], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- precision and bounds


@pytest.mark.parametrize("make", COUPLINGS)
@pytest.mark.parametrize("shape", [(6,), (1, 4, 4)])
def test_the_map_is_float32_around_a_bf16_network(make, shape):
    coupling = shaken(make(shape), 0.02)
    x = data(*shape).float()
    with torch.autocast("cpu", torch.bfloat16):
        seen = []
        coupling.network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        z, ladj = coupling(x)
        back, back_ladj = coupling.inverse(z)
    assert set(seen) == {torch.bfloat16}
    assert z.dtype == ladj.dtype == torch.float32
    if not isinstance(coupling, SplineCoupling):  # whose kept half is not bit for bit what the network saw
        torch.testing.assert_close(back, x, rtol=0, atol=2e-6)
        torch.testing.assert_close(back_ladj, -ladj, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", COUPLINGS)
def test_half_precision_samples_come_out_in_float32(make):
    z, ladj = make((4,))(torch.randn(3, 4).bfloat16())
    assert z.dtype == ladj.dtype == torch.float32


class Constant(nn.Module):
    def __init__(self, value, inputs, outputs, condition_dim):
        super().__init__()
        self.output = nn.Parameter(torch.full((1, outputs), value))

    def forward(self, x, condition=None):
        return self.output.expand(len(x), -1)


@pytest.mark.parametrize("value", [-1e30, -50.0, 50.0, 1e30])
def test_scales_are_bounded_with_finite_gradients_whatever_the_network_says(value):
    coupling = AffineCoupling((4,), network=partial(Constant, value), limit=1.5)
    x = torch.randn(3, 4, requires_grad=True)
    for way in (coupling, coupling.inverse):
        y, ladj = way(x)
        assert (ladj.abs() <= 3.0).all()
        (y.sum() * 1e-30 + ladj.sum()).backward()
        assert x.grad.isfinite().all() and coupling.network.output.grad.isfinite().all()


@pytest.mark.parametrize("make", COUPLINGS)
def test_without_gradients_nothing_is_kept(make):
    coupling = shaken(make((4,))).double()
    with torch.no_grad():
        z, ladj = coupling(data(4))
    assert z.grad_fn is None and ladj.grad_fn is None


@pytest.mark.parametrize("make", COUPLINGS)
def test_a_coupling_works_under_torch_func(make):
    coupling = shaken(make((4,))).double()
    x = data(4)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda a: coupling(a[None])[0][0]))(x)
    torch.testing.assert_close(torch.linalg.slogdet(jacobians).logabsdet, coupling(x)[1])


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("condition_dim", [0, 2])
def test_networks_start_at_zero_and_see_the_condition(network, condition_dim):
    picture = network in (ConvNet, ResidualConvNet)
    shape = (3, 4, 5) if picture else (3,)
    x, condition = torch.randn(4, *shape), torch.randn(4, condition_dim) if condition_dim else None
    net = network(3, 6, condition_dim)
    y = net(x, condition)
    assert y.shape == (4, 6, *shape[1:]) and y.count_nonzero() == 0
    y.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    net = shaken(net)
    if condition is not None:
        assert not torch.equal(net(x, condition), net(x, condition.flip(0)))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(AffineCoupling, (1,)), "1 feature of .* a coupling needs 2"),
        (partial(AffineCoupling, (1, 4, 4), mask="halves"), "1 channel of .* take a checkerboard"),
        (partial(AffineCoupling, (4,), mask="checkerboard"), "checkerboard does not divide .* take halves"),
        (partial(AffineCoupling, (3, 1, 1), mask="checkerboard"), "checkerboard does not divide"),
        (partial(AffineCoupling, (4,), mask="halfs"), "Did you mean 'halves'"),
        (partial(AffineCoupling, (4, 4)), "is no sample's"),
        (partial(AffineCoupling, ()), "is no sample's"),
        (partial(AffineCoupling, (4,), limit=0.0), "limit = 0.0"),
        (partial(SplineCoupling, (4,), bins=1), "bins = 1"),
        (partial(SplineCoupling, (4,), bound=0.0), "bound = 0.0"),
        (partial(SplineCoupling, (4,), bound=math.inf), "bound = inf"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest_right_thing(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("make", COUPLINGS)
def test_a_missing_or_wrong_condition_is_refused_and_one_not_asked_for_is_ignored(make):
    coupling = make((4,), condition_dim=3)
    for condition in (None, torch.zeros(2, 2), torch.zeros(1, 3)):
        with pytest.raises(UserError, match="condition"):
            coupling(torch.randn(2, 4), condition)
    x = torch.randn(2, 4)
    assert torch.equal(make((4,))(x, torch.randn(2, 3))[0], make((4,))(x)[0])


def test_couplings_make_a_chain_with_other_conditions():
    chain = Chain([AffineCoupling((4,)), SplineCoupling((4,), condition_dim=3, flip=True)])
    assert chain.condition_dim == 3
    x, condition = torch.randn(2, 4), torch.randn(2, 3)
    torch.testing.assert_close(chain.inverse(chain(x, condition)[0], condition)[0], x)
