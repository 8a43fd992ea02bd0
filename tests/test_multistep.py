"""Multistep samplers against exact solutions, their papers' formulas and diffusers' schedulers."""

import math
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from normal_flow import S, exact, gaussian
from scipy.integrate import quad, solve_ivp

from genflow.errors import UserError
from genflow.functional import log_snr, x_from_velocity
from genflow.samplers import euler, shifted, uniform
from genflow.samplers.adams import ab2, ab3, ab4, ipndm, lagrange
from genflow.samplers.exponential import _integrals, deis, dpmpp_2m, dpmpp_3m, unipc

ADAMS = {"ab2": (ab2, 2), "ab3": (ab3, 3), "ab4": (ab4, 4)}
IPNDM = {f"ipndm {order}": (partial(ipndm, order=order), order) for order in (1, 2, 3, 4)}
# What the last steps do is tested apart: here they have full order.
EXPONENTIAL = {
    "dpmpp_2m": (partial(dpmpp_2m, lower_order_final=False), 2),
    "dpmpp_3m": (partial(dpmpp_3m, lower_order_final=False), 3),
    "dpmpp_3m published": (partial(dpmpp_3m, lower_order_final=False, variant="published"), 2),
    "unipc 2 bh1": (partial(unipc, lower_order_final=False, variant="bh1"), 3),
    "unipc 2 bh2": (partial(unipc, lower_order_final=False), 3),
    "unipc 3 bh1": (partial(unipc, lower_order_final=False, order=3, variant="bh1"), 4),
    "unipc 3 bh2": (partial(unipc, lower_order_final=False, order=3), 4),
    "deis 1": (partial(deis, lower_order_final=False, order=1), 1),
    "deis 2": (partial(deis, lower_order_final=False, order=2), 2),
    "deis 3": (partial(deis, lower_order_final=False), 3),
}
ALL = ADAMS | IPNDM | EXPONENTIAL
DEFAULTS = [ab2, ab3, ab4, ipndm, dpmpp_2m, dpmpp_3m, unipc, deis]
every = pytest.mark.parametrize("name", ALL)

# ------------------------------------------------------------------------------------------------------ analytic flows

MEANS = torch.tensor([[1.0, 0.5], [-0.8, 0.9], [0.2, -1.1]], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.45, 0.35], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def mixture(x, t):
    """The exact velocity for data of three Gaussians in the plane. x: B x 2."""
    t = t.view(-1, 1).to(torch.float64)
    var = (1 - t) ** 2 * STDS**2 + t**2
    away = x[:, None].to(torch.float64) - (1 - t)[..., None] * MEANS
    share = (WEIGHTS.log() - var.log() - away.square().sum(-1) / (2 * var)).softmax(1)
    each = ((t - (1 - t) * STDS**2) / var)[..., None] * away - MEANS
    return (share[..., None] * each).sum(1).to(x.dtype)


def start(*shape, dtype=torch.float64):
    return torch.randn(*(shape or (8, 2)), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@cache
def arrival(t_from, t_to):
    """Where the mixture's flow takes `start`, by another solver."""
    x = start()

    def field(t, y):
        return mixture(torch.from_numpy(y).view_as(x), x.new_full((len(x),), t)).flatten().numpy()

    y = solve_ivp(field, (t_from, t_to), x.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    return torch.from_numpy(y).view_as(x)


def mixture_error(sampler, grid, velocity=mixture, reference=None):
    reference = arrival(grid[0], grid[-1]) if reference is None else reference
    return (sampler(velocity, start(), grid).x - reference).square().mean().sqrt().item()


def gaussian_error(sampler, grid):
    """Over all times: at one alone, the one error of this linear flow may happen to be zero."""
    path = sampler(gaussian, start(), grid, record=True).trajectory
    errors = [x - exact(start(), grid[0], t) for t, x in zip(path.times, path.states)]
    return torch.stack(errors).square().mean().sqrt().item()


def slopes(errors):
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


# ----------------------------------------------------------------------------------------------- order of convergence


def eased(steps, t_from, t_to, log):
    """Equal steps, in log-SNR where log, of which the first is made of 13 doubling ones.

    So the start with fewer predictions, which is of second order, is made with steps too small to be seen.
    """
    into, back = (log_snr, lambda u: 1 / (1 + math.exp(u))) if log else (float, float)
    a, h = into(t_from), (into(t_to) - into(t_from)) / steps
    return [back(a + h * i) for i in [0.0, *(2.0**-j for j in range(12, 0, -1)), *range(1, steps + 1)]]


@pytest.mark.parametrize("error", [gaussian_error, mixture_error])
@pytest.mark.parametrize("ends", [(0.9, 0.1), (0.1, 0.9)])
@pytest.mark.parametrize("name", ADAMS | EXPONENTIAL)
def test_order_of_convergence_away_from_the_ends(name, ends, error):
    """At t = 0 and 1 log-SNR is infinite, and the exponential methods are of second order at most."""
    sampler, order = ALL[name]
    errors = [error(sampler, eased(steps, *ends, log=name in EXPONENTIAL)) for steps in (100, 200, 400)]
    assert np.all(np.abs(slopes(errors) - order) < 0.2), (slopes(errors), errors)


@pytest.mark.parametrize("name", ADAMS | IPNDM)
def test_order_of_convergence_on_equal_steps(name):
    """In a time s with t = 1 - (1 - s)^4, in which the flow sets out slowly: the start is then of fourth order too."""

    def slow(x, s):
        return 4 * (1 - s.view(-1, 1)) ** 3 * mixture(x, 1 - (1 - s) ** 4)

    sampler, order = ALL[name]
    reference = arrival(1.0, 1 - 0.8**4)
    grids = [[1 - 0.8 * i / steps for i in range(steps + 1)] for steps in (160, 320, 640)]
    errors = [mixture_error(sampler, grid, slow, reference) for grid in grids]
    assert np.all(np.abs(slopes(errors) - order) < 0.2), (slopes(errors), errors)


@every
def test_from_noise_to_data_the_order_is_two(name):
    """By the start and, where log-SNR is used, by the ends, with the logarithm of the number of steps as a factor."""
    sampler, order = ALL[name]
    errors = [mixture_error(sampler, uniform(steps)) for steps in (80, 160, 320)]
    assert np.all(slopes(errors) > min(order, 2) - 0.5), (slopes(errors), errors)
    assert order == 1 or errors[0] < mixture_error(euler, uniform(80)) / 5


# ------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("sampler", [partial(ipndm, order=1), partial(deis, order=1)])
@pytest.mark.parametrize("grid", [shifted(9, 3.0), shifted(9, 3.0)[::-1]])
def test_first_order_members_are_euler(sampler, grid):
    torch.testing.assert_close(sampler(mixture, start(), grid).x, euler(mixture, start(), grid).x, rtol=0, atol=1e-14)


@every
@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.2)])
def test_one_step_is_eulers(name, ends):
    torch.testing.assert_close(ALL[name][0](mixture, start(), ends).x, euler(mixture, start(), ends).x)


def test_two_steps_are_enough_for_any_order():
    grid = [1.0, 0.6, 0.0]
    two = ab2(mixture, start(), grid).x
    for sampler in (ab3, ab4):
        assert torch.equal(sampler(mixture, start(), grid).x, two)
    assert torch.equal(ipndm(mixture, start(), grid).x, ipndm(mixture, start(), grid, order=2).x)
    # both steps touch an end
    for sampler in (dpmpp_2m, dpmpp_3m, deis):
        torch.testing.assert_close(sampler(mixture, start(), grid).x, euler(mixture, start(), grid).x)
    assert unipc(mixture, start(), grid).ok


def at(velocity, x, t):
    return velocity(x, x.new_full((len(x),), t))


def test_ab2_is_its_formula_on_uneven_steps():
    grid, x, before = shifted(9, 3.0), start(), None
    expected = x
    for i, (t, t_next) in enumerate(pairwise(grid)):
        v, h = at(mixture, expected, t), t_next - t
        r = h / (t - grid[i - 1]) if i else 0
        expected = expected + h * ((1 + r / 2) * v - r / 2 * (v if before is None else before))
        before = v
    torch.testing.assert_close(ab2(mixture, x, grid).x, expected, rtol=0, atol=1e-13)


def test_adams_bashforth_integrates_the_polynomial_of_its_order():
    """The velocity of a polynomial in time, seen from any number of times, is continued exactly."""
    for nodes in ([0.0], [0.0, -0.7], [0.0, -1.3, -1.9], [0.0, -0.2, -1.5, -4.0]):
        integrals = [sum(c / (i + 1) for i, c in enumerate(p)) for p in lagrange(nodes)]
        for power in range(len(nodes)):
            assert math.isclose(sum(w * a**power for w, a in zip(integrals, nodes)), 1 / (power + 1), abs_tol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_is_its_formula_on_any_grid(order):
    grid, x, seen = shifted(9, 3.0), start(), []
    for t, t_next in pairwise(grid):
        seen = [at(mixture, x, t), *seen][:order]
        match len(seen):
            case 1:
                v = seen[0]
            case 2:
                v = (3 * seen[0] - seen[1]) / 2
            case 3:
                v = (23 * seen[0] - 16 * seen[1] + 5 * seen[2]) / 12
            case 4:
                v = (55 * seen[0] - 59 * seen[1] + 37 * seen[2] - 9 * seen[3]) / 24
        x = x + (t_next - t) * v
    torch.testing.assert_close(ipndm(mixture, start(), grid, order=order).x, x, rtol=0, atol=1e-13)


def test_fixed_and_variable_coefficients_agree_on_equal_steps():
    for sampler, order in ADAMS.values():
        ours = sampler(mixture, start(), uniform(12)).x
        torch.testing.assert_close(ours, ipndm(mixture, start(), uniform(12), order=order).x, rtol=0, atol=1e-12)


def test_dpmpp_2m_is_the_algorithm_box():
    """Algorithm 2 of DPM-Solver++ with the data predicted, Euler's step from and to the infinite ends."""
    grid, x, before, h_before = shifted(20, 2.0), start(), None, None
    for t, t_next in pairwise(grid):
        data = x_from_velocity(x, at(mixture, x, t), t)
        if t == 1 or t_next == 0:
            x = t_next / t * x + (1 - t_next / t) * data
        else:
            h = log_snr(t_next) - log_snr(t)
            r = h_before / h if h_before else math.inf
            d = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * before
            x = t_next / t * x - (1 - t_next) * math.expm1(-h) * d
            h_before = h
        before = data
    torch.testing.assert_close(dpmpp_2m(mixture, start(), grid).x, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("h", [1e-6, 1e-3, 0.3, 0.999, 1.001, 3.0, 12.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_exponential_weights_are_integrals(h, sign):
    h *= sign
    for ratios in ([1.0], [-0.8], [-1.2, -2.9], [-0.5, -1.4, 1.0]):
        nodes = [0.0, *ratios]
        for weight, node in zip(_integrals(h, ratios), ratios, strict=True):
            others = [a for a in nodes if a != node]

            def integrand(y, node=node, others=others):
                return h * math.exp(h * (y - 1)) * math.prod((y - a) / (node - a) for a in others)

            expected, _ = quad(integrand, 0, 1, epsabs=1e-15, epsrel=1e-12)
            assert math.isclose(weight, expected, rel_tol=1e-9, abs_tol=1e-14 * abs(h)), (h, ratios)


@pytest.mark.parametrize("sampler", [dpmpp_2m, partial(deis, order=2), partial(deis, order=3)])
def test_the_ends_are_limits(sampler):
    """The nearer a grid comes to 1, the nearer the sample is to that of the grid with 1 itself: as 1 / log-SNR."""
    grid = uniform(20)
    limit = sampler(mixture, start(), grid).x
    gaps = [(sampler(mixture, start(), [1 - d, *grid[1:]]).x - limit).abs().max() for d in (1e-4, 1e-8, 1e-16)]
    assert gaps[0] > 1.5 * gaps[1] > 1.5**2 * gaps[2] > 0


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_exponential_samplers_go_from_end_to_end_and_back(name):
    sampler, order = ALL[name]
    for steps in (1, 2, 3, 20):
        for grid in (uniform(steps), uniform(steps)[::-1]):
            assert sampler(mixture, start(), grid).ok
    there = sampler(mixture, start(), uniform(150)).x
    back = sampler(mixture, there, uniform(150)[::-1]).x
    assert (back - start()).abs().max() < (0.1 if order == 1 else 0.01)


# ----------------------------------------------------------------------------------------------------------- last steps


@pytest.mark.parametrize(
    ("sampler", "few"), [(dpmpp_2m, 15), (dpmpp_3m, 15), (partial(deis, order=3), 15), (partial(unipc, order=3), 99)]
)
def test_lower_order_final_makes_the_last_step_eulers(sampler, few):
    for steps in (6, 14, 15, 16):
        grid = [0.95 - 0.9 * i / steps for i in range(steps + 1)]  # at 0 the last step is Euler's anyway
        solution = sampler(mixture, start(), grid, record=True)
        full = sampler(mixture, start(), grid, record=True, lower_order_final=False)
        states, unchanged = solution.trajectory.states, full.trajectory.states
        early = 2 if sampler is dpmpp_2m else 3  # a second order is not lowered in the step before
        assert torch.equal(states[-early], unchanged[-early])
        assert torch.equal(states[-1], unchanged[-1]) == (steps >= few)
        if steps < few and not (isinstance(sampler, partial) and sampler.func is unipc):  # UniPC first corrects
            torch.testing.assert_close(states[-1], euler(mixture, states[-2], grid[-2:]).x)


# ------------------------------------------------------------------------------------------------------------ diffusers


def theirs(scheduler, velocity, x, steps=None):
    scheduler.set_begin_index(0)
    for sigma, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps[:steps]):
        x = scheduler.step(at(velocity, x, sigma), timestep, x, return_dict=False)[0]
    return x


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PEERS = {
    "2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}, dpmpp_2m),
    "3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, partial(dpmpp_3m, variant="published")),
    "unipc 2": ("UniPCMultistepScheduler", {"solver_order": 2}, unipc),
    "unipc 3": ("UniPCMultistepScheduler", {"solver_order": 3}, partial(unipc, order=3)),
}


def peer(name, steps, shift, **extra):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(flow_shift=shift, **FLOW, **extra)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 14, 15])
def test_numbers_are_those_of_diffusers(name, steps, shift):
    scheduler, options, ours = PEERS[name]
    scheduler, x = peer(scheduler, steps, shift, **options), start(dtype=torch.float32)
    x_ours = ours(mixture, x, scheduler.sigmas.tolist()).x
    assert (x_ours - theirs(scheduler, mixture, x)).abs().max() <= 1e-5


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("order", [2, 3])
def test_bh1_is_that_of_diffusers(order, steps):
    """Which is NaN there when the last sigma is 0."""
    scheduler = peer("UniPCMultistepScheduler", steps, 1.0, solver_order=order, solver_type="bh1")
    scheduler.sigmas[-1] = scheduler.sigmas[-2] / 3
    x = start(dtype=torch.float32)
    x_ours = unipc(mixture, x, scheduler.sigmas.tolist(), order=order, variant="bh1").x
    assert (x_ours - theirs(scheduler, mixture, x)).abs().max() <= 1e-5


@pytest.mark.parametrize("steps", [2, 5, 14, 15, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_that_of_diffusers(order, steps):
    """In float64: near t = 1 theirs takes differences of large numbers. Their last sigma comes twice: not a step."""
    scheduler = peer("DEISMultistepScheduler", steps, 3.0, solver_order=order)
    scheduler.sigmas = scheduler.sigmas.double()
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
    scheduler.sigmas[-1] /= 3
    ours = deis(mixture, start(), scheduler.sigmas.tolist(), order=order).x
    assert (ours - theirs(scheduler, mixture, start())).abs().max() <= 1e-9


@pytest.mark.parametrize("name", [*PEERS, "deis"])
def test_numbers_are_those_of_diffusers_on_a_random_sd3_transformer(name):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=4,
    )
    name, options, ours = PEERS.get(name, ("DEISMultistepScheduler", {"solver_order": 3}, deis))
    scheduler, dtype, steps = peer(name, 8, 3.0, **options), torch.float32, None
    grid = scheduler.sigmas.tolist()
    if ours is deis:  # as above
        ours, dtype, steps, grid = partial(deis, lower_order_final=False), torch.float64, 6, grid[:7]
        scheduler.sigmas = scheduler.sigmas.double()
    model.to(dtype)
    context, pooled = torch.randn(2, 5, 12, dtype=dtype), torch.randn(2, 8, dtype=dtype)

    @torch.no_grad()
    def velocity(x, t):
        return 3 * model(x, context, pooled, t * 1000, return_dict=False)[0]  # 3: an untrained one hardly moves

    x = start(2, 4, 4, 4, dtype=dtype)
    x_ours = ours(velocity, x, grid).x
    assert (x_ours - x).abs().mean() > 0.3
    assert (x_ours - theirs(scheduler, velocity, x, steps)).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------------------- the contract


class Jumping:
    """A velocity that is another above 0.62 than below."""

    edges = (0.62,)

    def at(self, x, time):
        return at(gaussian if time > 0.62 else mixture, x, time)


@every
def test_nothing_before_an_edge_is_used_after_it(name):
    """The first evaluation behind an edge starts the solve anew: nothing is extrapolated or corrected across."""
    sampler = ALL[name][0]
    for grid in (uniform(20), uniform(20)[::-1], [t + 0.02 for t in uniform(20)][1:]):  # the last with a time at 0.62
        behind = next(i for i, t in enumerate(grid) if (t <= 0.62) == (grid[0] > 0.62))
        whole = sampler(Jumping(), start(), grid, record=True)
        anew = sampler(Jumping(), whole.trajectory.states[behind], grid[behind:])
        torch.testing.assert_close(whole.x, anew.x, rtol=0, atol=1e-14)
        # and without a word of the edge the samples are others
        if ALL[name][1] > 1:
            blind = sampler(lambda x, t: Jumping().at(x, float(t[0])), start(), grid)
            assert (blind.x - whole.x).abs().max() > 1e-4


@every
def test_a_row_does_not_depend_on_its_batch_mates(name):
    x = start(5, 3, 7, dtype=torch.float32)
    together = ALL[name][0](gaussian, x, shifted(9, 3.0)).x
    for i in range(5):
        assert torch.equal(ALL[name][0](gaussian, x[i : i + 1], shifted(9, 3.0)).x, together[i : i + 1])


@every
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_one_evaluation_per_step_and_none_at_the_last_time(name, steps):
    for grid in (uniform(steps), uniform(steps)[::-1]):
        calls, seen = [], []

        def velocity(x, t, calls=calls):
            calls.append(float(t[0]))
            return mixture(x, t)

        report = lambda done, total, seen=seen: seen.append((done, total))
        solution = ALL[name][0](velocity, start(), grid, progress=report, record=True)
        assert solution.nfe == len(calls) == steps and calls == grid[:-1]
        assert seen == [(i, steps) for i in range(1, steps + 1)]
        assert solution.trajectory.times == grid and solution.trajectory.nfe == list(range(steps + 1))


@every
def test_the_state_is_float32_whatever_the_network(name):
    seen = set()

    def velocity(x, t):
        seen.add((x.dtype, t.dtype, tuple(t.shape)))
        return gaussian(x, t).bfloat16()

    assert ALL[name][0](velocity, start(3, 2).bfloat16(), uniform(6)).x.dtype == torch.float32
    assert seen == {(torch.float32, torch.float32, (3,))}


@every
def test_a_step_never_waits_for_the_device(name, monkeypatch):
    x = start(dtype=torch.float32)
    for method in ("item", "tolist", "__bool__", "__float__", "cpu"):
        monkeypatch.setattr(
            torch.Tensor, method, lambda *_, method=method: pytest.fail(f"Tensor.{method} waits for the device")
        )
    ALL[name][0](gaussian, x, uniform(6))


@every
def test_gradients_flow_through_a_solve(name):
    x = start().requires_grad_()
    ALL[name][0](gaussian, x, uniform(40)).x.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, S), rtol=0, atol=0.1 if ALL[name][1] == 1 else 0.02)


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (partial(ipndm, order=5), "1, 2, 3, 4; the nearest is 4"),
        (partial(ipndm, order=True), "True is not one of 1, 2, 3, 4"),
        (partial(deis, order=0), "the nearest is 1"),
        (partial(unipc, order=1), "the nearest is 2"),
        (partial(unipc, variant="bh3"), "'bh3'. Did you mean 'bh"),
        (partial(dpmpp_3m, variant="publish"), "Did you mean 'published'"),
    ],
)
def test_impossible_options_are_refused(call, near):
    with pytest.raises(UserError, match=near):
        call(mixture, start(), uniform(4))


@pytest.mark.parametrize("sampler", [dpmpp_2m, dpmpp_3m, unipc, deis])
def test_times_off_the_path_are_refused_by_the_exponential_samplers(sampler):
    for grid in ([1.2, 0.5, 0.0], [1.0, 0.5, -0.1]):
        with pytest.raises(UserError, match=r"(1\.2|-0\.1) is not within 0 \.\. 1"):
            sampler(mixture, start(), grid)


@pytest.mark.parametrize("sampler", DEFAULTS)
def test_mistakes_are_told_in_one_line(sampler):
    with pytest.raises(UserError, match="fall at every step"):
        sampler(mixture, start(), [1.0, 0.5, 0.5, 0.0])
    with pytest.raises(UserError, match="must be alike"):
        sampler(lambda x, t: x[:, :1], start(), uniform(4))
