"""Masked autoregressive bijections: numbers of zuko, exact inverses, IAF, gradients of the inverse, and the MAF model."""

from itertools import product

import pytest
import torch
import zuko
from torch.distributions import AffineTransform
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from genflow.errors import UserError
from genflow.flows.bijections.autoregressive import InverseAutoregressive, MaskedAutoregressive
from genflow.flows.bijections.base import Inverse
from genflow.flows.models.maf import MAFConfig
from genflow.networks.made import MADE
from tests.noise import shaken
from tests.test_made import copy_zuko

KINDS = list(product(("affine", "spline"), (False, True)))


def layer(features=5, condition_dim=0, noise=0.3, dtype=torch.float64, **options):
    made = MaskedAutoregressive((features,), condition_dim=condition_dim, hidden=(20, 20, 20), **options)
    return shaken(made, noise).to(dtype)


def inputs(features=5, condition_dim=0, n=6, dtype=torch.float64):
    return torch.randn(n, features, dtype=dtype), torch.randn(n, condition_dim, dtype=dtype) if condition_dim else None


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("context", [0, 3])
def test_numbers_equal_zukos(reverse, context):
    D, limit = 5, MaskedAutoregressive.limit

    def univariate(shift, u):
        return AffineTransform(shift, (limit * torch.tanh(u / limit)).exp())

    hidden = ((D if context else D - 1) * 4,) * 2
    ours = MaskedAutoregressive((D,), condition_dim=context, hidden=hidden, reverse=reverse).double()
    order = list(range(D))[:: -1 if reverse else 1]
    lazy = zuko.flows.MaskedAutoregressiveTransform(
        D, context, order=order, univariate=univariate, hidden_features=hidden
    ).double()
    copy_zuko(lazy.hyper, ours.network)
    x, c = inputs(D, context)
    z, ladj = ours(x, c)
    theirs, their_ladj = lazy(c).call_and_ladj(x)
    torch.testing.assert_close(z, theirs)
    torch.testing.assert_close(ladj, their_ladj)
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(z, c), lazy(c).inv(theirs))


@pytest.mark.parametrize(("univariate", "reverse"), KINDS)
@pytest.mark.parametrize("condition_dim", [0, 2])
def test_the_inverse_is_exact_and_volumes_are_opposite(univariate, reverse, condition_dim):
    made = layer(condition_dim=condition_dim, univariate=univariate, reverse=reverse)
    x, c = inputs(condition_dim=condition_dim)
    with torch.no_grad():
        z, ladj = made(x, c)
        back, back_ladj = made.inverse(z, c)
    torch.testing.assert_close(back, x, atol=1e-8, rtol=0)
    torch.testing.assert_close(back_ladj, -ladj, atol=1e-8, rtol=0)
    assert ladj.abs().max() > 0.01


@pytest.mark.parametrize("features", [1, 2])
def test_one_or_two_features_are_enough(features):
    made = layer(features, condition_dim=2, univariate="spline")
    x, c = inputs(features, 2)
    with torch.no_grad():
        torch.testing.assert_close(made.decode(made(x, c)[0], c), x)


@pytest.mark.parametrize("reverse", [False, True])
def test_each_number_hangs_on_those_before_it_alone(reverse):
    made = layer(reverse=reverse)
    x, _ = inputs(n=1)
    J = torch.autograd.functional.jacobian(lambda a: made(a)[0][0], x)[:, 0]
    upper = J.tril(-1) if reverse else J.triu(1)
    assert upper.abs().max() == 0 and J.diagonal().min() > 0
    torch.testing.assert_close(made(x)[1][0], J.diagonal().log().sum())


def test_pictures_are_read_number_by_number():
    made = MaskedAutoregressive((2, 3, 3), hidden=(40,)).double()
    shaken(made, 0.2)
    with torch.no_grad():
        x = torch.randn(3, 2, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
        z, _ = made(x)
        assert z.shape == x.shape
        torch.testing.assert_close(made.decode(z), x)
        torch.testing.assert_close(z, made(x.contiguous())[0])
        later = x.clone()
        later[:, 1, 1, 1] += 1
        moved = (made(later)[0] != z).flatten(1).any(0)
        assert not moved[:13].any() and moved[13]


@pytest.mark.parametrize("univariate", ["affine", "spline"])
def test_iaf_is_maf_turned_round(univariate):
    torch.manual_seed(3)
    iaf = InverseAutoregressive((5,), hidden=(20, 20), univariate=univariate, reverse=True).double()
    shaken(iaf, 0.3)
    maf = MaskedAutoregressive((5,), hidden=(20, 20), univariate=univariate, reverse=True).double()
    maf.load_state_dict({name.removeprefix("bijection."): p for name, p in iaf.state_dict().items()})
    x, _ = inputs()
    with torch.no_grad():
        for ours, theirs in ((iaf(x), maf.inverse(x)), (iaf.inverse(x), maf(x))):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert isinstance(iaf.inv, Inverse) and not iaf.keep_input and maf.keep_input


def test_iaf_samples_in_one_pass(monkeypatch):
    monkeypatch.setattr(MADE, "ancestral", lambda *_: pytest.fail("a sequential pass"))
    InverseAutoregressive((5,)).decode(torch.randn(2, 5))


@pytest.mark.parametrize("univariate", ["affine", "spline"])
def test_gradients_of_the_inverse_are_those_of_zukos_sweeps(univariate):
    """Against D full passes with autograd through all of them."""
    made = layer(condition_dim=2, univariate=univariate)
    z, c = inputs(condition_dim=2)
    z.requires_grad_()
    c.requires_grad_()
    params = list(made.parameters())

    def gradients(x, ladj):
        return torch.autograd.grad(x.sin().sum() + ladj.square().sum(), [z, c, *params])

    x = torch.zeros_like(z)
    for _ in range(5):
        x, log = made._unmap(z, made.network(x, c))
    expected = gradients(x, log.sum(1))
    for ours, theirs in zip(gradients(*made.inverse(z, c)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-7)


def test_second_gradients_of_the_inverse_are_refused():
    made = layer()
    z = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    x, _ = made.inverse(z)
    for loss in (x.square().sum(), x.sum()):  # whose gradient to x is a constant
        with pytest.raises(UserError, match="the inverse of an autoregressive layer has first gradients only"):
            torch.autograd.grad(loss, z, create_graph=True, retain_graph=True)


@pytest.mark.parametrize("condition_dim", [0, 2])
@pytest.mark.parametrize("univariate", ["affine", "spline"])
def test_transforms_go_through_the_inverse(univariate, condition_dim):
    made = layer(condition_dim=condition_dim, univariate=univariate)
    z, c = inputs(condition_dim=condition_dim)
    z, c = z[:2], None if c is None else c[:2]
    expected = made.inverse(z, c)

    def first(row, condition):
        x, ladj = made.inverse(row[None], None if condition is None else condition[None])
        return x[0], ladj[0]

    torch.testing.assert_close(vmap(first, (0, None if c is None else 0))(z, c), expected)
    own = None if c is None else c[0]
    for transform in (jacrev, jacfwd):
        slogdet = torch.linalg.slogdet(transform(lambda row: first(row, own)[0])(z[0])).logabsdet
        torch.testing.assert_close(slogdet, expected[1][0], rtol=1e-6, atol=1e-6)
    curvature = hessian(lambda row: first(row, own)[0].sum())(z[0])
    step = 1e-5 * torch.eye(5, dtype=z.dtype)
    ahead, behind = (vmap(grad(lambda row: first(row, own)[0].sum()))(z[0] + by) for by in (step, -step))
    torch.testing.assert_close(curvature, (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-6)


def test_autocast_does_not_touch_the_map():
    made = layer(dtype=torch.float32)
    x, _ = inputs(dtype=torch.float32)
    with torch.no_grad():
        expected = made(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(made(x), expected, rtol=0, atol=0)
            torch.testing.assert_close(made.decode(expected[0]), x, rtol=1e-3, atol=1e-3)


def test_the_ancestral_inverse_multiplies_no_more_than_one_pass():
    """Every weight is used once for each row, where D full passes would use it D times."""
    made = layer(features=16, noise=0.1)
    z = torch.randn(4, 16, dtype=torch.float64)
    counted = []
    addmm = torch.addmm

    def counting(bias, a, b):
        counted.append(a.numel())
        return addmm(bias, a, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "addmm", counting)
        made.decode(z)
    masks = [m for name, m in made.network.named_buffers() if name.endswith("mask")]
    assert sum(counted) == sum(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize(("univariate", "residual"), KINDS)
def test_a_maf_is_a_chain_with_an_exact_inverse(univariate, residual):
    config = MAFConfig(
        layers=3, hidden=(24,) * 3, univariate=univariate, residual=residual, shape=(4,), condition_dim=2
    )
    flow = config.build().double()
    x, c = inputs(4, 2, n=32)
    shaken(flow)
    with torch.no_grad():
        flow.initialise(3 * x + 1, c)
        z, ladj = flow(x, c)
        back, back_ladj = flow.inverse(z, c)
    torch.testing.assert_close(back, x, atol=1e-7, rtol=0)
    torch.testing.assert_close(back_ladj, -ladj, atol=1e-7, rtol=0)
    reach = torch.autograd.functional.jacobian(lambda a: flow(a, c[:1])[0][0], x[:1])[:, 0]
    assert (reach != 0).all()  # the order alternates, so that two layers mix everything


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MaskedAutoregressive((4, 4)), "no sample's"),
        (lambda: MaskedAutoregressive((4,), univariate="splines"), "Did you mean 'spline'"),
        (lambda: MaskedAutoregressive((4,), univariate="spline", bins=1), "bins = 1"),
        (lambda: MaskedAutoregressive((4,), bound=0.0), "bound"),
        (lambda: MAFConfig(layers=0), "layers = 0"),
        (lambda: MAFConfig().build(), "needs the shape"),
        (lambda: layer(condition_dim=2)(torch.zeros(3, 5)), "condition is missing"),
        (lambda: layer(condition_dim=2).decode(torch.zeros(3, 5), torch.zeros(2, 2)), "needs 3 x 2"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden": (7, 9)},
        {"hidden": (8, 8, 8), "residual": True},
        {"reverse": True},
        {"univariate": "spline", "bins": 5},
        {"univariate": "spline", "bound": 1.5},
    ],
    ids=str,
)
def test_iaf_hands_every_option_on(options):
    maf = MaskedAutoregressive((4,), condition_dim=2, **options)
    iaf = InverseAutoregressive((4,), condition_dim=2, **options)
    for p in maf.parameters():
        torch.nn.init.normal_(p, std=0.3)
    iaf.bijection.load_state_dict(maf.state_dict())
    x, condition = inputs(4, 2, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(iaf.inverse(x, condition), maf(x, condition))
