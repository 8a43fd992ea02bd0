"""Stochastic samplers: marginals on a mixture of Gaussians, weak orders, noise by the seed."""

import inspect
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from genflow.errors import UserError
from genflow.functional import Rng, x_from_velocity
from genflow.samplers import euler, heun, reversed, shifted, uniform
from genflow.samplers.stochastic import DIFFUSIONS, ancestral, euler_maruyama, restart, stochastic_heun

SDES = [euler_maruyama, stochastic_heun]
ALL = [*SDES, ancestral, restart]
NONE = {"scale": 0.0, "diffusion": "sbdm"}  # which is infinite at t = 1
PLAIN = {euler_maruyama: (euler, NONE), stochastic_heun: (heun, NONE)}
PLAIN |= {ancestral: (euler, {"eta": 0.0}), restart: (heun, {"times": 0})}

MEANS = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.3, -0.8]])
STDS = torch.tensor([0.4, 0.25, 0.15])
SHARES = torch.tensor([0.3, 0.5, 0.2])


def mixture(x, t):
    """The exact velocity for data ~ a mixture of three Gaussians in the plane. x: B x n x 2, n independent points."""
    t = t.view(-1, 1, 1)
    apart = x.unsqueeze(2) - (1 - t.unsqueeze(3)) * MEANS  # B x n x 3 x 2
    var = (1 - t) ** 2 * STDS**2 + t**2
    share = torch.softmax(SHARES.log() - apart.square().sum(3) / (2 * var) - var.log(), dim=2)
    slope = (t - (1 - t) * STDS**2) / var
    return (share.unsqueeze(3) * (slope.unsqueeze(3) * apart - MEANS)).sum(2)


def linear(x, t):
    """The exact velocity for data ~ N(0, 0.3^2): a solve is then linear in the noise."""
    t = t.view(-1, *[1] * (x.dim() - 1))
    return (t - (1 - t) * 0.09) / ((1 - t) ** 2 * 0.09 + t**2) * x


@pytest.fixture
def noise():
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------ marginals

CASES = [(sampler, {"diffusion": name}) for sampler in SDES for name in DIFFUSIONS]
CASES += [(ancestral, {"eta": eta}) for eta in (0.4, 1.0)]
CASES += [(restart, {"interval": (0.1, 0.4), "times": 3, "inner": 8})]
CASES += [(restart, {"interval": (0.5, 1.0), "times": 1, "inner": 20})]


@pytest.mark.parametrize(("sampler", "options"), CASES, ids=lambda case: getattr(case, "__name__", str(case)))
def test_marginals_are_those_of_the_path_and_of_the_data(sampler, options):
    x = torch.randn(4, 1500, 2, generator=torch.Generator().manual_seed(1))
    grid = uniform(160 if sampler is euler_maruyama else 80)
    states = sampler(mixture, x, grid, seeds=[3, 1, 4, 159], record=True, **options).trajectory.states
    for t in (0.5, 0.25, 0.0):
        x = states[grid.index(t)].flatten(0, 1)
        means, stds = (1 - t) * MEANS, ((1 - t) ** 2 * STDS**2 + t**2).sqrt()
        mean = SHARES @ means
        cov = (means - mean).T @ (SHARES[:, None] * (means - mean)) + (SHARES @ stds**2) * torch.eye(2)
        torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.05)
        torch.testing.assert_close(x.T.cov(), cov, rtol=0, atol=0.05)
        for angle in (0.0, 0.8, 1.6, 2.4):
            along = torch.tensor([math.cos(angle), math.sin(angle)])
            each = norm((means @ along).numpy(), stds.numpy())
            cdf = lambda s, each=each: each.cdf(s[:, None]) @ SHARES.numpy()
            assert kstest((x @ along).numpy(), cdf).pvalue > 1e-3, (t, angle)


def test_diffusions_are_those_of_sit_with_time_turned():
    """transport/path.py of SiT, whose time s is 0 at noise; its SDE adds 2 D ds of variance."""
    sit = {
        "constant": lambda s: 1.0,
        "sigma": lambda s: 1 - s,  # sigma_s of the linear path
        "linear": lambda s: 1 - s,
        "sbdm": lambda s: (1 - s) ** 2 / s + (1 - s),  # alpha'/alpha sigma^2 - sigma sigma', alpha = s
        "decreasing": lambda s: 0.25 * (math.cos(math.pi * s) + 1) ** 2,
        "bump": lambda s: math.sin(math.pi * s) ** 2,
    }
    assert sit.keys() == DIFFUSIONS.keys()
    h, one = 1e-4, torch.ones(1, 400)
    for name, d in sit.items():
        for t in (0.2, 0.5, 0.9):
            assert DIFFUSIONS[name](t) == pytest.approx(d(1 - t), rel=1e-12)
            for sampler in SDES:  # what a small step adds to a state
                step = sampler(linear, one, [t, t - h], seeds=[7], diffusion=name, scale=0.5).x
                assert step.std().item() == pytest.approx(math.sqrt(d(1 - t) * h), rel=0.1), (name, t)


def test_ancestral_steps_are_the_sbdm_diffusion_in_the_limit():
    h, one = 1e-4, torch.ones(1, 4000, dtype=torch.float64)
    for t in (0.2, 0.5, 0.9):
        step = ancestral(linear, one, [t, t - h], seeds=[7], eta=0.6).x
        assert step.std().item() == pytest.approx(math.sqrt(2 * 0.6 * t / (1 - t) * h), rel=0.05)


@pytest.mark.parametrize("sampler", SDES)
@pytest.mark.parametrize("diffusion", ["constant", "sbdm"])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_no_diffusion_explodes_where_the_data_are_points(sampler, diffusion, scale):
    """Data = 0 everywhere: the score is -x / t^2, infinitely steep at 0, and sbdm has its pole at 1."""
    x = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    grid = uniform(64)
    solution = sampler(
        lambda x, t: x / t[:, None], x, grid, seeds=[0, 1], diffusion=diffusion, scale=scale, record=True
    )
    for t, z in zip(grid, solution.trajectory.states, strict=True):
        assert z.std().item() == pytest.approx(t, rel=0.5, abs=1e-6)
    assert solution.ok


# --------------------------------------------------------------------------------------------------------------- orders


def spread(monkeypatch, sampler, grid, **options):
    """The exact standard deviation at the end of a linear solve: row j answers to the j-th noise alone, row 0 to x."""
    draws = {}

    def unit(x, seeds, step, stream):
        return torch.zeros_like(x).index_fill(0, torch.tensor(draws.setdefault((step, stream), len(draws) + 1)), 1.0)

    monkeypatch.setattr("genflow.samplers.stochastic.noise_like", unit)
    rows = 2 * len(grid)  # more than there are noises
    x = torch.zeros(rows, 1, dtype=torch.float64)
    x[0] = 1
    x = sampler(linear, x, grid, seeds=[0] * rows, **options).x
    assert len(draws) < rows
    return x.square().sum().sqrt().item()


@pytest.mark.parametrize(
    ("sampler", "options", "order"),
    [
        *((euler_maruyama, {"diffusion": name}, 1) for name in ("sigma", "decreasing", "bump")),
        *((stochastic_heun, {"diffusion": name}, 2) for name in DIFFUSIONS),
        (ancestral, {"eta": 0.5}, 1),
        (restart, {"interval": (0.25, 0.5), "times": 2}, 2),
    ],
    ids=lambda case: getattr(case, "__name__", str(case)),
)
def test_weak_order_of_convergence(monkeypatch, sampler, options, order):
    errors = []
    for steps in (128, 256, 512):
        if sampler is restart:
            options["inner"] = steps // 4
        errors.append(abs(spread(monkeypatch, sampler, uniform(steps), **options) - 0.3))
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(rates - order) < 0.25), (rates, errors)


def test_restart_mends_a_coarse_solve(monkeypatch):
    grid, right = [1.0, 0.7, 0.4, 0.1], math.hypot(0.9 * 0.3, 0.1)
    options = {"interval": (0.1, 0.7), "inner": 99}
    errors = [abs(spread(monkeypatch, restart, grid, times=times, **options) - right) for times in (0, 1, 2)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2], errors


# ----------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("sampler", ALL)
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_without_noise_each_is_its_ode_solver(sampler, end, noise):
    ode, options = PLAIN[sampler]
    grid = [end + (1 - end) * t for t in shifted(9, 2.0)]
    a = sampler(linear, noise, grid, seeds=range(4), record=True, **options)
    b = ode(linear, noise, grid, record=True)
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-15)
    assert a.nfe == b.nfe and a.trajectory.nfe == b.trajectory.nfe


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ancestral_is_comfyuis_formula(eta, noise):
    """x' = a'/a_d (s_d/s x + (1 - s_d/s) x0) + sqrt(s'^2 - s_d^2 a'^2/a_d^2) noise; s = t, a = 1 - t, d for down."""
    grid, x = shifted(7, 3.0), noise
    for k, (t, t_next) in enumerate(pairwise(grid)):
        x0 = x_from_velocity(x, linear(x, torch.full((4,), t, dtype=torch.float64)), t)
        down = t_next * (1 + (t_next / t - 1) * eta)
        x = down / t * x + (1 - down / t) * x0
        if t_next > 0:
            fresh = torch.cat([Rng(seed, k).normal("ancestral", torch.zeros(1), (6,)) for seed in range(4)]).double()
            up = math.sqrt(t_next**2 - down**2 * (1 - t_next) ** 2 / (1 - down) ** 2)
            x = (1 - t_next) / (1 - down) * x + up * fresh
    torch.testing.assert_close(ancestral(linear, noise, grid, seeds=range(4), eta=eta).x, x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("end", [0.0, 0.1])
def test_evaluations_are_counted(end, noise):
    grid = [end + (1 - end) * t for t in uniform(10)]
    twice = 20 - (end == 0)
    for sampler, options, expected in (
        (euler_maruyama, {}, 10),
        (stochastic_heun, {}, twice),
        (ancestral, {}, 10),
        (restart, {"times": 3, "inner": 4}, twice + 24),
        (restart, {"interval": (0.0, 0.3), "times": 3, "inner": 4}, twice + 24 - 3 * (end == 0)),
    ):
        calls, seen = [], []

        def velocity(x, t, calls=calls):
            calls.append(float(t[0]))
            return linear(x, t)

        progress = lambda done, steps, seen=seen: seen.append((done, steps))
        solution = sampler(velocity, noise, grid, seeds=range(4), progress=progress, record=True, **options)
        assert solution.nfe == len(calls) == expected == solution.trajectory.nfe[-1]
        assert seen == [(i, 10) for i in range(1, 11)] and solution.trajectory.times == grid
        assert min(calls) > 0


def test_restart_goes_up_from_the_grids_time_nearest_to_lo(noise):
    times = []

    def velocity(x, t):
        times.append(float(t[0]))
        return linear(x, t)

    restart(velocity, noise, [1.0, 0.6, 0.2, 0.0], seeds=range(4), interval=(0.15, 0.5), times=1, inner=2)
    assert times == pytest.approx([1, 0.6, 0.6, 0.2, 0.5, 0.35, 0.35, 0.2, 0.2])
    times.clear()
    restart(
        velocity, noise, [1.0, 0.5, 0.0], seeds=range(4), interval=(0.3, 0.5), times=1, inner=1
    )  # not from hi to hi
    assert times == pytest.approx([1, 0.5, 0.5, 0.5])


# ---------------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("sampler", ALL)
def test_a_row_is_a_function_of_its_seed_alone(sampler):
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seeds = [11, 2**63 - 1, 0, 11, np.int64(7)]
    whole = sampler(linear, x, uniform(6), seeds=seeds).x
    assert whole.dtype == torch.float32
    for i, seed in enumerate(seeds):
        assert torch.equal(sampler(linear, x[i : i + 1], uniform(6), seeds=[seed]).x[0], whole[i])
    order = [4, 2, 0, 3, 1]
    assert torch.equal(sampler(linear, x[order], uniform(6), seeds=[seeds[i] for i in order]).x, whole[order])
    other = sampler(linear, x, uniform(6), seeds=[12, *seeds[1:]]).x
    assert not torch.equal(other[0], whole[0]) and torch.equal(other[1:], whole[1:])


@pytest.mark.parametrize("sampler", ALL)
def test_every_noise_is_drawn_once(sampler, monkeypatch, noise):
    drawn, normal = [], Rng.normal

    def spy(self, stream, *rest):
        drawn.append((self.seed, self.step, stream))
        return normal(self, stream, *rest)

    monkeypatch.setattr(Rng, "normal", spy)
    sampler(linear, noise, uniform(6), seeds=[5, 6, 7, 8])
    drawn = [draw for draw in drawn if draw[2] != "noise"]
    assert len(drawn) == len(set(drawn)) > 0


def test_signatures_are_alike():
    for sampler in ALL:
        parameters = inspect.signature(sampler).parameters
        assert [*parameters][:4] == ["velocity", "x", "grid", "seeds"]
        assert [*parameters][-2:] == ["progress", "record"]


@pytest.mark.parametrize("sampler", ALL)
@pytest.mark.parametrize(
    ("seeds", "grid", "says"),
    [
        ([1, 2, 3], uniform(4), "3 seeds for 4 pictures"),
        ([1, 2, 3, 4, 5], uniform(4), "5 seeds for 4 pictures"),
        ([1, 2, 3, -4], uniform(4), "nearest valid one is 0"),
        ([1, 2, 3, 4.0], uniform(4), "whole number"),
        ([1, 2, 3, True], uniform(4), "whole number"),
        ([1, 2, 3, 4], uniform(4)[::-1], "grid rises from 0.0 to 1.0; to encode use an ODE sampler"),
        ([1, 2, 3, 4], [1.5, 0.0], r"within 1 \.\. 0"),
        ([1, 2, 3, 4], [1.0, -0.1], r"within 1 \.\. 0"),
    ],
)
def test_wrong_seeds_and_grids_are_refused(sampler, seeds, grid, says, noise):
    with pytest.raises(UserError, match=says) as error:
        sampler(linear, noise, grid, seeds=seeds)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sampler", "options", "says"),
    [
        (euler_maruyama, {"diffusion": "sigmoid"}, "Did you mean 'sigma'"),
        (stochastic_heun, {"diffusion": "vp"}, "Choose from: bump, constant"),
        (euler_maruyama, {"scale": -1.0}, "0 draws no noise"),
        (stochastic_heun, {"scale": math.inf}, "finite"),
        (euler_maruyama, {"scale": math.nan}, "finite"),
        (ancestral, {"eta": 1.1}, r"within 0 \.\. 1"),
        (ancestral, {"eta": math.nan}, r"within 0 \.\. 1"),
        (restart, {"interval": (0.4, 0.1)}, r"try \(0.1, 0.4\)"),
        (restart, {"interval": (-0.1, 0.3)}, "0 <= lo < hi <= 1"),
        (restart, {"interval": (0.1, 1.3)}, "0 <= lo < hi <= 1"),
        (restart, {"interval": (0.001, 0.01), "grid": [1.0, 0.5, 0.1]}, "ends at 0.1"),
        (restart, {"times": -1}, "nearest possible number is 0"),
        (restart, {"inner": 0}, "nearest possible number is 1"),
        (restart, {"inner": 2.5}, "whole number"),
    ],
)
def test_impossible_options_are_refused(sampler, options, says, noise):
    grid = options.pop("grid", uniform(4))
    with pytest.raises(UserError, match=says) as error:
        sampler(linear, noise, grid, seeds=range(4), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sampler", ALL)
def test_half_precision_networks_and_wrapped_velocities_will_do(sampler, noise):
    x = sampler(lambda x, t: linear(x, t).bfloat16(), noise.bfloat16(), uniform(3), seeds=range(4)).x
    assert x.dtype == torch.float32
    there = reversed(lambda x, t: -linear(x, 1 - t))
    a, b = (sampler(velocity, noise, uniform(5), seeds=range(4)).x for velocity in (linear, there))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ALL)
def test_a_step_never_waits_on_the_device(sampler, monkeypatch, noise):
    monkeypatch.setattr(Rng, "normal", lambda self, stream, index, shape: torch.ones(1, *shape))  # the host's own work
    for name in ("item", "tolist", "__bool__", "__float__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} waits"))
    sampler(linear, noise, uniform(6), seeds=range(4))
