"""Divergences against autograd's Jacobian, and their estimators against their means and variances."""

import functools

import pytest
import torch
from torch import nn

from genflow.attention import attention
from genflow.errors import UserError
from genflow.flows import divergence as module
from genflow.flows.divergence import Divergence, current_probing, fingerprint, modules_of, probing
from genflow.functional import Rng
from genflow.networks.mmdit import MMDiTConfig
from genflow.networks.ode_nets import ConcatSquash
from tests.noise import normal, shaken

KINDS = ["exact", "hutchinson", "hutchinson_gaussian", "hutch++"]


def jacobian(velocity, x, t):
    """B x D x D, one sample at a time."""
    each = [
        torch.autograd.functional.jacobian(lambda y, i=i: velocity(y[None], t[i : i + 1])[0], x[i])
        for i in range(len(x))
    ]
    return torch.stack([j.reshape(x[0].numel(), -1) for j in each])


class Conv(nn.Module):
    """A velocity of pictures that autograd alone knows how to differentiate."""

    def __init__(self, channels=3):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, channels, 3, padding=1)
        ).double()

    def forward(self, x, t):
        return self.net(x) * (1 + t.view(-1, 1, 1, 1))


@pytest.fixture
def matrix():
    return normal(6, 6, seed=3)  # not symmetric


def estimates(kind, matrix, rows=1, draws=1, seed=0):
    """rows x draws of tr(matrix), by the noise of as many samples."""
    x = torch.zeros(rows, len(matrix), dtype=torch.float64)
    estimator = Divergence(kind, draws)
    probes = estimator.probes(x, Rng(seed), torch.arange(rows))
    return estimator(lambda x, t: x @ matrix.T, x, torch.zeros(rows, dtype=torch.float64), probes).divergence.T


# --------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("chunk", [64, 7])
def test_the_exact_divergence_of_a_convolution_is_the_trace_of_autograds_jacobian(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    net, x, t = Conv(), normal(2, 3, 4, 4), torch.tensor([0.2, 0.7], dtype=torch.float64)
    found = Divergence()(net, x, t)
    full = jacobian(net, x, t)
    torch.testing.assert_close(found.divergence[0], full.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(found.frobenius, full.square().sum((1, 2)))
    torch.testing.assert_close(found.v, net(x, t))


@pytest.mark.parametrize("activation", ["tanh", "softplus"])
@pytest.mark.parametrize("shape, condition_dim", [((5,), 0), ((5,), 3), ((2, 4, 3), 0), ((1, 4, 3), 2)])
def test_pushing_tangents_forward_gives_what_autograd_gives_backwards(shape, condition_dim, activation):
    net = shaken(ConcatSquash(shape, condition_dim, hidden=(7, 6), activation=activation).double(), 0.3)
    x, t = normal(3, *shape), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    condition = normal(3, condition_dim, seed=5) if condition_dim else None
    plain = lambda x, t: net(x, t, condition[: len(x)] if condition is not None and len(x) == 3 else condition)
    tangents = normal(2, 3, *shape, seed=6)
    inputs = [x.requires_grad_(), *net.parameters(), *([] if condition is None else [condition.requires_grad_()])]
    weights = normal(3, *shape, seed=7), normal(2, 3, *shape, seed=8)

    v, pushed = net.pushforward(x, t, tangents, condition)
    ours = torch.autograd.grad((v * weights[0]).sum() + (pushed * weights[1]).sum(), inputs)
    dual = [torch.autograd.functional.jvp(lambda y: plain(y, t), x, u, create_graph=True) for u in tangents]
    torch.testing.assert_close(v, dual[0][0])
    torch.testing.assert_close(pushed, torch.stack([j for _, j in dual]))
    loss = (dual[0][0] * weights[0]).sum() + (torch.stack([j for _, j in dual]) * weights[1]).sum()
    for a, b in zip(ours, torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(3,), (1, 4, 3), (2, 4, 3)])
def test_the_jacobian_of_every_row_is_that_of_vmap(shape):
    net, x, t = shaken(ConcatSquash(shape, hidden=(7, 6)).double(), 0.3), normal(2, *shape), normal(2)
    each = torch.func.vmap(torch.func.jacrev(lambda x, t: net(x[None], t[None])[0]))(x, t)
    torch.testing.assert_close(each.view(2, x[0].numel(), -1), jacobian(net, x, t))


def test_one_time_for_all_rows_is_that_time_for_each():
    net = shaken(ConcatSquash((3,), hidden=(5,)).double(), 0.3)
    x, tangents, one = normal(4, 3), normal(1, 4, 3, seed=1), torch.full((1,), 0.3, dtype=torch.float64)
    for f in (net, lambda x, t: torch.cat(net.pushforward(x, t, tangents)[1:])):
        torch.testing.assert_close(f(x, one), f(x, one.expand(4)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_divergence_flow_to_the_parameters_and_the_points(kind):
    net, x, t = Conv(2), normal(2, 2, 2, 2), torch.zeros(2, dtype=torch.float64)
    estimator = Divergence(kind)
    probes = estimator.probes(x, Rng(0), torch.arange(2))
    value = lambda x: estimator(net, x, t, probes).divergence.sum()
    x.requires_grad_()
    gx, gw = torch.autograd.grad(value(x), (x, net.net[0].weight))
    if kind == "hutch++":  # Q is a constant to gradients: they are unbiased, and not those of the value
        assert gx.abs().sum() > 0 and gw.abs().sum() > 0
        return
    step = 1e-6 * normal(*x.shape, seed=9)
    difference = (value(x + step) - value(x - step)) / 2
    torch.testing.assert_close((gx * step).sum(), difference.detach(), rtol=1e-5, atol=1e-12)


def test_without_gradients_nothing_is_left_of_the_graph():
    net, x, t = Conv(), normal(2, 3, 4, 4), torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        assert not any(each.requires_grad for each in Divergence()(net, x, t))


def test_a_velocity_that_does_not_hear_x_has_no_divergence():
    found = Divergence()(lambda x, t: t.unsqueeze(1).expand_as(x), normal(2, 3), torch.ones(2, dtype=torch.float64))
    assert found.divergence.tolist() == [[0, 0]]


def test_attention_inside_a_differentiated_divergence_needs_nothing_of_the_user():
    weight = normal(4, 4).float().requires_grad_()

    def velocity(x, t):
        q = (x @ weight).unsqueeze(1)
        return attention(q, q, x.unsqueeze(1)).squeeze(1)

    x = normal(2, 5, 4).float()
    for kind in ("exact", "hutchinson"):
        estimator = Divergence(kind)
        found = estimator(velocity, x, torch.zeros(2), estimator.probes(x, Rng(0), torch.arange(2)))
        (grad,) = torch.autograd.grad(found.divergence.sum(), weight)
        assert grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "draws"), [("exact", 1), ("hutchinson", 2), ("hutch++", 1), ("hutch++", 2)])
def test_a_transformer_has_the_same_divergence_without_gradients(kind, draws, dtype):
    config = MMDiTConfig(depth=2, hidden=32, heads=2, in_channels=2, context_dim=8, pooled_dim=6, sample_size=4)
    net = shaken(config.build(), 0.1).to(dtype)
    context, pooled = normal(2, 3, 8, seed=1).to(dtype), normal(2, 6, seed=2).to(dtype)
    x, t, estimator = normal(2, 2, 4, 4).float(), torch.full((2,), 0.5), Divergence(kind, draws=draws)

    def found():
        probes = estimator.probes(x, Rng(0), torch.arange(2))
        return estimator(lambda x, t: net(x.to(dtype), t, context, pooled), x, t, probes).divergence.detach()

    with torch.no_grad():
        got = found()
    torch.testing.assert_close(got, found(), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)


# ---------------------------------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_unbiased(kind, matrix):
    each = estimates(kind, matrix, rows=4000)
    error = each.std(0) / 4000**0.5
    assert (each.mean() - matrix.trace()).abs() < 4 * error + 1e-9


@pytest.mark.parametrize("kind", ["hutchinson", "hutchinson_gaussian"])
def test_the_variance_is_that_of_the_formula(kind, matrix):
    part = (matrix + matrix.T) / 2
    gone = part.diagonal().square().sum() if kind == "hutchinson" else 0
    expected = 2 * (part.square().sum() - gone)
    assert estimates(kind, matrix, rows=20000).var() == pytest.approx(expected.item(), rel=0.06)


def test_hutchpp_is_exact_for_a_matrix_of_low_rank_and_better_for_one_of_falling_values():
    low = normal(30, 2) @ normal(2, 30, seed=1)
    torch.testing.assert_close(estimates("hutch++", low, rows=3, draws=2).mean(1), low.trace().expand(3))
    basis, _ = torch.linalg.qr(normal(30, 30, seed=2))
    falling = basis @ torch.diag(2.0 ** -torch.arange(30, dtype=torch.float64)) @ basis.T
    plain, better = (estimates(k, falling, rows=500, draws=d) for k, d in (("hutchinson", 12), ("hutch++", 4)))
    assert better.mean(1).var() < plain.mean(1).var() / 10  # 12 products each


def test_more_draws_than_dimensions_make_hutchpp_exact(matrix):
    torch.testing.assert_close(estimates("hutch++", matrix, draws=9).mean(1)[0], matrix.trace())


@pytest.mark.parametrize("kind", ["hutchinson", "hutchinson_gaussian", "hutch++"])
def test_the_squared_norm_of_the_jacobian_is_estimated_beside_it(kind, matrix):
    x = torch.zeros(3000, 6, dtype=torch.float64)
    estimator = Divergence(kind, draws=2)
    found = estimator(lambda x, t: x @ matrix.T, x, x[:, 0], estimator.probes(x, Rng(0), torch.arange(3000)))
    assert found.frobenius.mean() == pytest.approx(matrix.square().sum().item(), rel=0.05)


# --------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_noise_of_a_row_hangs_on_its_counter_alone(kind):
    x, index = normal(5, 2, 3, 17), torch.tensor([9, 2**40, 3, 0, 7])
    estimator = Divergence(kind, 2)
    together = estimator.probes(x, Rng(4), index)
    alone = estimator.probes(x[2:3], Rng(4), index[2:3])
    assert torch.equal(together[:, 2:3], alone)
    assert not torch.equal(together, estimator.probes(x, Rng(5), index))
    assert not torch.equal(together[0], together[1])
    assert together.dtype == x.dtype


def test_rademacher_noise_is_of_plus_and_minus_one_and_uncorrelated():
    x = torch.zeros(2000, 130)
    noise = Divergence("hutchinson").probes(x, Rng(0), torch.arange(2000))[0]
    assert noise.abs().eq(1).all()
    covariance = noise.T @ noise / 2000 - torch.eye(130)
    assert covariance.abs().max() < 0.13 and noise.mean(0).abs().max() < 0.1


def test_a_fingerprint_is_of_a_rows_own_numbers():
    x = normal(50, 3, 4).float()
    marks = fingerprint(x)
    assert torch.equal(marks[7:8], fingerprint(x[7:8])) and len(set(marks.tolist())) == 50
    moved = x.clone()
    moved[7] = torch.nextafter(moved[7], torch.tensor(9.0))
    assert (fingerprint(moved) != marks).tolist() == [i == 7 for i in range(50)]


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 1.0, 2.0, 3.0)])
def test_rows_of_few_values_have_fingerprints_of_their_own(values):
    x = torch.cartesian_prod(*[torch.tensor(values)] * (10 if len(values) == 2 else 5))
    assert len(fingerprint(x).unique()) == len(x)


def test_probing_holds_within_and_no_longer():
    with probing(Rng(1), torch.arange(3)) as penalties:
        assert current_probing().penalties is penalties
        with probing(Rng(2), torch.arange(3)):
            assert current_probing().rng == Rng(2)
        assert current_probing().rng == Rng(1)
    assert current_probing() is None


def test_modules_are_found_wherever_a_velocity_holds_them():
    net = nn.Sequential(nn.Dropout())

    class Holder:
        def __init__(self):
            self.inner = net

        def velocity(self, x, t):
            return self.inner(x)

        __call__ = velocity

    for velocity in (net, Holder(), Holder().velocity, functools.partial(Holder().velocity), lambda x, t: net(x)):
        assert any(isinstance(m, nn.Dropout) for _, m in modules_of(velocity))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("hutchinsen",), "hutchinson"),
        (("exact", 3), "leave it at 1"),
        (("hutchinson", 0), "draws = 0"),
        (("hutchinson", True), "draws = True"),
    ],
)
def test_impossible_divergences_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Divergence(*arguments)


def test_counters_that_do_not_fit_the_samples_are_refused():
    with pytest.raises(UserError, match="2 counters for 3 samples"):
        Divergence("hutchinson").probes(torch.zeros(3, 2), Rng(0), torch.arange(2))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"shape": (2, 3)}, "neither"),
        ({"shape": (2,), "hidden": ()}, "hidden"),
        ({"shape": (2,), "activation": "relu"}, "relu"),
    ],
)
def test_impossible_networks_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        ConcatSquash(**arguments)


def test_a_missing_condition_is_refused():
    with pytest.raises(UserError, match="condition is missing"):
        ConcatSquash((2,), 3)(torch.zeros(1, 2), torch.zeros(1))
