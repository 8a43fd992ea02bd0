"""Continuous flows against closed forms, autograd's Jacobian, torchdiffeq; and the likelihood of any velocity."""

import math

import pytest
import torch
from normal_flow import MU, S, gaussian
from torch import nn

from genflow.errors import UserError
from genflow.flows.bijections.base import Chain
from genflow.flows.bijections.continuous import CNF
from genflow.flows.divergence import Divergence, probing
from genflow.flows.normalizing import standard_normal
from genflow.flows.stepping import Stepping
from genflow.flows.velocity_likelihood import _clenshaw_curtis, path_integral, velocity_log_prob
from genflow.functional import Rng
from genflow.networks.ode_nets import ConcatSquash
from tests.noise import normal, shaken

KINDS = ["exact", "hutchinson", "hutchinson_gaussian", "hutch++"]
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def flow(shape=(3,), condition_dim=0, hidden=(8, 8), **options):
    net = ConcatSquash(shape, condition_dim, hidden=hidden)
    return shaken(CNF(shape, net, condition_dim=condition_dim, **options).double(), 0.3)


class Linear(nn.Module):
    """v = A x."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x, t):
        return (x.flatten(1) @ self.matrix.T).view_as(x)


def density_of_gaussian(x):
    return (-0.5 * ((x - MU) / S) ** 2 - math.log(S * math.sqrt(2 * math.pi))).flatten(1).sum(1)


# --------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("options", [TIGHT, {"solver": "tsit5", **TIGHT}, {"solver": "rk4", "steps": 60}])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
def test_a_linear_velocity_is_the_matrix_exponential_and_its_ladj_the_trace(shape, grad, options):
    matrix, x = 0.6 * normal(4, 4), normal(5, *shape, seed=1)
    cnf = CNF(shape, Linear(matrix), **options)
    with torch.set_grad_enabled(grad):
        z, ladj = cnf(x)
    expected = (x.flatten(1) @ torch.linalg.matrix_exp(matrix).T).view_as(x)
    torch.testing.assert_close(z.detach(), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ladj.detach(), matrix.trace().expand(5), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(2,), (3, 2, 2)])
def test_the_likelihood_of_a_gaussian_flow_is_its_density(shape):
    x = MU + S * normal(6, *shape)
    found = velocity_log_prob(gaussian, x, divergence="exact", rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.log_prob, density_of_gaussian(x), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.z, (x - MU) / S, rtol=1e-6, atol=1e-6)
    assert (found.error < 1e-5).all() and found.standard_error.eq(0).all()


def test_the_default_tolerances_give_a_likelihood_to_some_1e_4_in_float32():
    x = (MU + S * normal(6, 2)).float()
    found = velocity_log_prob(gaussian, x, divergence="exact")
    assert found.log_prob.dtype == torch.float32 and found.rtol == found.atol == 1e-5
    torch.testing.assert_close(found.log_prob, density_of_gaussian(x), rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_estimators_are_exact_where_the_jacobian_is_a_number(kind):
    """Rademacher draws of a diagonal have no variance; the others' error says what it is."""
    x = MU + S * normal(4, 3)
    found = velocity_log_prob(gaussian, x, divergence=kind, draws=40, rtol=1e-7, atol=1e-7)
    miss = (found.log_prob - density_of_gaussian(x)).abs()
    if kind == "hutchinson_gaussian":
        assert (miss < 4 * found.standard_error).all() and (found.standard_error > 0.01).all()
    else:
        assert (miss < 1e-5).all() and (found.standard_error < 1e-6).all()


def test_the_standard_error_is_that_of_the_mean_of_the_draws():
    x = MU + S * normal(200, 3)
    found = velocity_log_prob(gaussian, x, divergence="hutchinson_gaussian", draws=20, rtol=1e-6, atol=1e-6)
    off = (found.log_prob - density_of_gaussian(x)) / found.standard_error
    assert 0.85 < off.square().mean().sqrt() < 1.25


def test_a_density_integrates_to_one():
    cnf = shaken(flow((2,), rtol=1e-6, atol=1e-6), 0.3)
    side = torch.linspace(-6, 6, 61, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        z, ladj = cnf(grid)
    total = (standard_normal(z) + ladj).exp().sum() * (side[1] - side[0]) ** 2
    assert total.item() == pytest.approx(1, abs=2e-4)
    assert ladj.std() > 0.02  # or it would prove little


# ---------------------------------------------------------------------------------------------------------- a bijection


@pytest.mark.parametrize("shape, condition_dim", [((3,), 0), ((3,), 2), ((2, 3, 2), 0), ((1, 2, 3), 2)])
def test_ladj_is_that_of_autograds_jacobian(shape, condition_dim):
    cnf, x = flow(shape, condition_dim, rtol=1e-7, atol=1e-7), normal(2, *shape)
    condition = normal(2, condition_dim, seed=1) if condition_dim else None
    _, ladj = cnf(x, condition)
    row = None if condition is None else condition[:1]
    full = torch.autograd.functional.jacobian(lambda y: cnf(y[None], row)[0][0], x[0]).reshape(x[0].numel(), -1)
    torch.testing.assert_close(ladj[0], torch.linalg.slogdet(full).logabsdet, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "options", [TIGHT, {"solver": "bosh3", "rtol": 1e-6, "atol": 1e-6}, {"solver": "dopri5", "steps": 12}]
)
def test_encoding_and_decoding_go_round(options, grad):
    cnf, x, condition = flow((3,), 2, **options), normal(4, 3), normal(4, 2, seed=1)
    with torch.set_grad_enabled(grad):
        z, ladj = cnf(x, condition)
        back, ladj_back = cnf.inverse(z, condition)
        torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ladj_back, -ladj, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cnf.decode(z, condition), back, rtol=1e-7, atol=1e-7)
        assert cnf.decode(z, condition).requires_grad == grad
    assert (z - x).abs().max() > 0.05


def test_decoding_asks_for_no_divergence():
    class Counted(Linear):
        calls, graphs = 0, 0

        def forward(self, x, t):
            self.calls += 1
            self.graphs += torch.is_grad_enabled()
            return super().forward(x, t)

    for options in ({}, {"solver": "rk4", "steps": 4}):
        cnf = CNF((3,), velocity := Counted(normal(3, 3)), **options)
        with torch.no_grad():
            cnf.decode(normal(2, 3))
        assert velocity.calls == cnf.nfe > 0 and velocity.graphs == 0


def test_a_new_flow_is_the_identity():
    for shape in ((3,), (1, 4, 4)):
        x = normal(2, *shape).float()
        z, ladj = CNF(shape)(x)
        assert torch.equal(z, x) and ladj.abs().max() == 0 and ladj.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_alone_and_in_a_batch(kind):
    cnf, x, condition = flow((3,), 2, divergence=kind, draws=1), normal(7, 3), normal(7, 2, seed=1)
    x[3] *= 5
    with torch.no_grad():
        together, alone = cnf(x, condition), cnf(x[3:4], condition[3:4])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[3:4], b, rtol=1e-10, atol=1e-10)


def test_rows_that_arrived_leave_the_batch_with_their_conditions():
    class Turning(nn.Module):
        def forward(self, x, t, rate):
            return rate * torch.stack([-x[:, 1], x[:, 0]], 1)

    cnf, x, rate = CNF((2,), Turning(), condition_dim=1), normal(4, 2), normal(4, 1).new_tensor([[1], [30], [0.5], [2]])
    alone = torch.cat([cnf(x[i : i + 1], rate[i : i + 1])[0] for i in range(4)])
    torch.testing.assert_close(cnf(x, rate)[0], alone, rtol=0, atol=1e-10)


def test_the_shared_steps_of_training_give_what_own_steps_give():
    cnf, x = flow((3,), **TIGHT), normal(5, 3)
    with torch.no_grad():
        own = cnf(x)
    for a, b in zip(own, cnf(x), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-7, atol=1e-7)


def test_estimates_of_ladj_are_unbiased_along_a_whole_solve():
    cnf, x = flow((5,), rtol=1e-6, atol=1e-6), normal(1, 5)
    with torch.no_grad():
        exact = cnf(x)[1]
        cnf.divergence = Divergence("hutchinson")
        with probing(Rng(0), torch.arange(800)):
            each = cnf(x.expand(800, 5))[1]
    assert each.std() > 0.01
    assert (each.mean() - exact).abs() < 4 * each.std() / 800**0.5


def test_numbers_are_torchdiffeqs():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    cnf, x = flow((3,), **TIGHT), normal(4, 3)

    def augmented(t, state):
        found = Divergence()(cnf.velocity, state[0], t.expand(len(x)))
        return found.v, found.divergence[0]

    zero = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        z, ladj = torchdiffeq.odeint(augmented, (x, zero), torch.tensor([0.0, 1.0], dtype=torch.float64), **TIGHT)
        ours = cnf(x)
    torch.testing.assert_close(ours[0], z[-1], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ours[1], ladj[-1], rtol=1e-7, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint", "interpolated"])
def test_the_gradient_of_the_likelihood_is_that_of_finite_differences(gradient):
    cnf, x, condition = flow((2,), 2, gradient=gradient, **TIGHT), normal(3, 2), normal(3, 2, seed=1)

    def nll(x, condition):
        z, ladj = cnf(x, condition)
        return -(standard_normal(z) + ladj).sum()

    inputs = [x.requires_grad_(), condition.requires_grad_(), *cnf.parameters()]
    grads = torch.autograd.grad(nll(x, condition), inputs)
    steps = [1e-5 * normal(*p.shape, seed=i + 20) for i, p in enumerate(inputs)]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, step in zip(inputs, steps, strict=True):
                p.add_(sign * step)
        values.append(nll(x, condition).item())
        with torch.no_grad():
            for p, step in zip(inputs, steps, strict=True):
                p.sub_(sign * step)
    expected = sum((g * s).sum() for g, s in zip(grads, steps, strict=True)).item()
    assert (values[0] - values[1]) / 2 == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
def test_the_penalties_of_rnode_are_integrals_of_speed_and_jacobian(kind):
    matrix, x = 0.4 * normal(3, 3), normal(2, 3, seed=1)
    matrix = torch.diag(matrix.diagonal())  # Rademacher draws have no variance
    cnf = CNF((3,), Linear(matrix), divergence=kind, kinetic=0.5, jacobian=0.25, **TIGHT)
    with probing(Rng(0), torch.arange(2)) as penalties:
        Chain([cnf, cnf])(x)
    times = (torch.arange(2000, dtype=torch.float64) + 0.5) / 1000
    states = torch.stack([x @ torch.linalg.matrix_exp(matrix * t) for t in times])
    kinetic = (states @ matrix).square().sum(2).mean(0) * 2
    torch.testing.assert_close(penalties["kinetic"].detach(), 0.5 * kinetic / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(penalties["jacobian"].detach(), (0.25 * 2 * matrix.square().sum() / 3).expand(2))
    (grad,) = torch.autograd.grad(penalties["jacobian"].sum(), cnf.velocity.matrix)
    torch.testing.assert_close(grad.diagonal(), (0.25 * 2 * 2 * 2 * matrix / 3).diagonal())


def test_penalties_are_of_the_path_whichever_way_it_is_gone_and_without_gradients_none():
    cnf, x = flow((3,), kinetic=1.0, jacobian=1.0, **TIGHT), normal(2, 3)
    plain = cnf(x)[1]
    found = []
    for way, start in ((cnf, x), (cnf.inv, cnf(x)[0].detach())):
        with probing(Rng(0), torch.arange(2)) as penalties:
            with torch.no_grad():
                way(start)
            assert penalties == {}
            ladj = way(start)[1]
        torch.testing.assert_close(ladj.abs(), plain.abs(), rtol=1e-4, atol=1e-6)
        assert set(penalties) == {"kinetic", "jacobian"}
        found.append(torch.stack([*penalties.values()]))
    assert (found[0] > 0).all()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_noise_within_probing_hangs_on_the_counters_and_outside_on_seed_and_row():
    x = normal(3, 6)
    ladj = lambda cnf, x=x: cnf(x)[1].detach()
    one, other = flow((6,), divergence="hutchinson"), flow((6,), divergence="hutchinson", seed=1)
    assert torch.equal(ladj(one), ladj(one)) and not torch.equal(ladj(one), ladj(other))
    torch.testing.assert_close(ladj(one)[[2, 0, 1]], ladj(one, x[[2, 0, 1]]))
    drawn = []
    for rng, index in ((Rng(0, 1), [0, 1, 2]), (Rng(0, 1), [0, 1, 2]), (Rng(0, 2), [0, 1, 2]), (Rng(0, 1), [5, 6, 7])):
        with probing(rng, torch.tensor(index)):
            drawn.append(ladj(one))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])


# ------------------------------------------------------------------------------------------------ the path and its integral


@pytest.mark.parametrize("n", [4, 8, 16])
def test_clenshaw_curtis_integrates_polynomials(n):
    nodes = (1 - torch.cos(torch.arange(n + 1, dtype=torch.float64) * math.pi / n)) / 2
    weights, _ = _clenshaw_curtis(n)
    for power in range(n + 1):
        assert (weights * nodes**power).sum().item() == pytest.approx(1 / (power + 1), abs=1e-14)


def test_hard_rows_get_more_nodes_and_easy_ones_leave_the_batch():
    class Peaked:
        """tr(dv/dx) = 1 / (t + width): a harder integral the narrower."""

        def __init__(self, width):
            self.width, self.rows = width, []

        def __call__(self, x, t):
            if torch.is_grad_enabled():
                self.rows.append(len(x))
            return x / (t.unsqueeze(1) + self.width.unsqueeze(1))

        def take(self, rows):
            taken = Peaked(self.width[rows])
            taken.rows = self.rows
            return taken

    width = torch.tensor([1.0, 0.02, 1.0], dtype=torch.float64)
    velocity, x = Peaked(width), 0.1 * normal(3, 1)
    found = velocity_log_prob(velocity, x, divergence="exact", rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.ladj, ((1 + width) / width).log(), rtol=1e-6, atol=1e-5)
    assert velocity.rows[0] == 3 and velocity.rows[-1] == 1
    assert found.divergences == len(velocity.rows)
    alone = velocity_log_prob(Peaked(width[1:2]), x[1:2], divergence="exact", rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.log_prob[1:2], alone.log_prob, rtol=1e-12, atol=1e-12)


def test_rows_without_take_are_the_same_too():
    def peaked(x, t):  # the second row is the harder
        return x / (t + torch.where(x[:, 0] > 0, 1.0, 0.02)).unsqueeze(1)

    x = torch.tensor([[0.1, 0.2], [-0.1, 0.2]], dtype=torch.float64)
    together = velocity_log_prob(peaked, x, divergence="hutchinson_gaussian", draws=2)
    asked = []
    for i in range(2):
        alone = velocity_log_prob(peaked, x[i : i + 1], divergence="hutchinson_gaussian", draws=2)
        torch.testing.assert_close(together.log_prob[i : i + 1], alone.log_prob, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.standard_error[i : i + 1], alone.standard_error, rtol=1e-12, atol=1e-12)
        asked.append(alone.divergences)
    assert asked[0] < asked[1]


def test_one_draw_has_no_standard_error():
    assert velocity_log_prob(gaussian, normal(2, 2)).standard_error.isnan().all()


def test_an_integral_that_does_not_settle_is_told():
    def ragged(x, t):
        return x * (400 * t.unsqueeze(1)).sin().sign()

    with pytest.raises(UserError, match="does not integrate"):
        path_integral(ragged, normal(1, 1), Divergence(), None, Stepping(rtol=1e-3, atol=1e-9, max_steps=100_000))
    with pytest.raises(UserError, match="does not integrate"):  # nor one that is no number
        velocity_log_prob(lambda x, t: (0 * x).sqrt(), normal(1, 1), divergence="exact")


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gradient": "adjiont"}, "adjoint"),
        ({"divergence": "exakt"}, "exact"),
        ({"solver": "ancestral"}, "no gradient"),
        ({"kinetic": -1.0}, "kinetic"),
        ({"jacobian": math.inf}, "jacobian"),
    ],
)
def test_impossible_flows_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CNF((2,), **options)


@pytest.mark.parametrize(
    "x, condition, message", [((2, 3), None, "condition"), ((2, 4), (2, 1), "flow is of"), ((2, 3), (1, 1), "needs")]
)
def test_what_does_not_fit_is_refused(x, condition, message):
    with pytest.raises(UserError, match=message):
        CNF((3,), condition_dim=1)(torch.zeros(x), None if condition is None else torch.zeros(condition))


def test_tolerances_below_the_noise_are_refused_with_the_floor():
    with pytest.raises(UserError, match=r"9\.5e-07"):
        CNF((2,), rtol=1e-8)(torch.zeros(1, 2))
    with pytest.raises(UserError, match=r"1\.0e-02"):
        velocity_log_prob(nn.Linear(2, 2).bfloat16(), torch.zeros(1, 2))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="bfloat16"):
        velocity_log_prob(gaussian, torch.zeros(1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        CNF((2,))(torch.zeros(1, 2))  # its network computes in float32


@pytest.mark.parametrize(
    ("gradient", "kind"), [("checkpoint", "exact"), ("adjoint", "hutchinson"), ("interpolated", "hutch++")]
)
def test_autocast_changes_no_number_of_a_velocity_that_ignores_it(gradient, kind):
    cnf, x = flow(gradient=gradient, divergence=kind).float(), 3 * normal(5, 3).float()

    def found(amp):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            z, ladj = cnf(x)
            with torch.no_grad():
                alone = cnf(x)
            likelihood = velocity_log_prob(cnf.velocity, x, divergence=kind)
        grads = torch.autograd.grad((ladj - z.square().sum(1)).sum(), cnf.parameters())
        return z, ladj, *alone, likelihood.ladj, likelihood.error, *grads

    for amp, plain in zip(found(True), found(False), strict=True):
        assert amp.dtype == torch.float32
        torch.testing.assert_close(amp, plain, rtol=0, atol=0)


class Holding(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), layer)

    def forward(self, x, t):
        return self.inner(x)


@pytest.mark.parametrize(
    "layer, evaluated",
    [(nn.Dropout(), True), (nn.BatchNorm1d(2), True), (nn.BatchNorm1d(2, track_running_stats=False), False)],
)
def test_dropout_and_batch_statistics_are_refused_by_name(layer, evaluated):
    net, x = Holding(layer), torch.zeros(3, 2)
    for call in (lambda: CNF((2,), net)(x), lambda: velocity_log_prob(lambda x, t: net(x, t), x)):
        net.train()
        with pytest.raises(UserError, match=rf"inner\.1 \({type(layer).__name__}\)"):
            call()
        net.eval()
        if evaluated:
            call()


def test_a_likelihood_asked_for_a_gradient_says_where_there_is_one():
    with pytest.raises(UserError, match="CNF"):
        velocity_log_prob(gaussian, torch.zeros(1, 2, requires_grad=True))


def test_a_likelihood_of_equal_steps_is_refused_with_solvers_that_it_takes():
    with pytest.raises(UserError, match="solver 'rk4' takes equal steps.*; take dopri5, tsit5 or bosh3"):
        velocity_log_prob(gaussian, torch.zeros(1, 2), solver="rk4")


def test_a_velocity_that_is_not_finite_is_told_with_its_samples():
    def broken(x, t):
        return torch.where((x[:, :1] > 0) & (t.unsqueeze(1) > 0.5), torch.nan, x)

    with pytest.raises(UserError, match=r"t = 0\.[45]\d*: the velocity is not finite.*samples 1 of 3"):
        velocity_log_prob(broken, torch.tensor([[-1.0], [1.0], [-2.0]]))


def test_an_integral_the_other_way_is_as_near_and_its_error_is_no_less_than_nothing():
    def peaked(x, t):
        return x / (t + 0.02).unsqueeze(1)

    how = (Divergence("exact", 1), None, Stepping(rtol=1e-6, atol=1e-6))
    there, back = (path_integral(peaked, 0.1 * normal(2, 1), *how, *span) for span in ((0.0, 1.0), (1.0, 0.0)))
    torch.testing.assert_close(back[1], -there[1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(back[1], back[1].new_full((1, 2), -math.log(1.02 / 0.02)), rtol=1e-6, atol=1e-5)
    assert (back[2] >= 0).all() and back[4] == there[4]


@pytest.mark.parametrize("verb", ["forward", "inverse", "decode"])
def test_gradients_reach_a_condition_where_nothing_else_asks_for_one(verb):
    cnf, x, condition = flow((2,), 2), normal(3, 2), normal(3, 2, seed=1).requires_grad_()

    def gradient():
        found = getattr(cnf, verb)(x, condition)
        return torch.autograd.grad(found.sum() if verb == "decode" else found[0].sum() + found[1].sum(), condition)[0]

    expected = gradient()
    cnf.requires_grad_(False)
    torch.testing.assert_close(gradient(), expected)
    assert float(expected.abs().min()) > 0
