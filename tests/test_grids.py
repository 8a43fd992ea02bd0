"""Time grids against their formulas, scipy and diffusers; and the contract that a solver keeps with grid and velocity."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from genflow.errors import UserError
from genflow.functional import log_snr, shift_time
from genflow.registry import names, resolve
from genflow.samplers import (
    Solve,
    beta,
    cosine,
    double_shifted,
    euler,
    exponential,
    heun,
    karras,
    log_snr_uniform,
    rk4,
    shifted,
    uniform,
)

ALL = names("grid")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("steps", [1, 2, 3, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
def test_every_grid_falls_from_noise_to_data(name, steps, shift):
    if name == "uniform" and shift != 1:
        return
    grid = resolve("grid", name)(steps, shift)
    assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0
    assert all(a > b for a, b in pairwise(grid))


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("uniform", "double_shifted")])
def test_every_grid_is_shifted_once(name):
    make = resolve("grid", name)
    plain = torch.tensor(make(9), dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(make(9, 3.0), dtype=torch.float64), shift_time(plain, 3.0))


def test_karras_is_edm_s_schedule_in_sigma():
    i, n = np.arange(18), 18
    sigmas = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    grid = np.array(karras(n))
    np.testing.assert_allclose(grid[1:-1] / (1 - grid[1:-1]), sigmas[1:], rtol=1e-12)


def test_log_snr_has_equal_steps_in_it():
    inner = log_snr_uniform(12)[1:-1]
    steps = np.diff([log_snr(t) for t in inner])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-10)
    assert inner[-1] == pytest.approx(0.002)


def test_cosine_is_the_trigonometric_schedule_s_times():
    """alpha = cos(a), sigma = sin(a): the same signal-to-noise ratio at t."""
    grid = cosine(8)
    for i, t in enumerate(grid[1:-1], start=1):
        a = math.pi / 2 * (1 - i / 8)
        assert t / (1 - t) == pytest.approx(math.tan(a), rel=1e-12)


@pytest.mark.parametrize("a", [0.3, 0.6, 1.0, 4.0])
def test_beta_holds_the_quantiles_of_scipy(a):
    np.testing.assert_allclose(beta(17, a=a), stats.beta.ppf(np.linspace(1, 0, 18), a, a), atol=1e-13)


def test_exponential_and_beta_times_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_exponential_sigmas=True)
    scheduler.set_timesteps(20)
    np.testing.assert_allclose(exponential(20), scheduler.sigmas.numpy(), atol=1e-6)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
    scheduler.set_timesteps(20)  # diffusers spreads 20 quantiles from 1 to 1/1000, where ours are 21 from 1 to 0
    theirs = (scheduler.sigmas.numpy()[:-1] - 1 / 1000) / (1 - 1 / 1000)
    np.testing.assert_allclose(beta(19), theirs, atol=1e-5)


def test_grids_that_end_at_a_smallest_time_take_another():
    sigmas = [t / (1 - t) for t in karras(6, rho=3.0, sigma_min=0.1, sigma_max=10.0)[1:-1]]
    roots = np.linspace(10 ** (1 / 3), 0.1 ** (1 / 3), 6)
    np.testing.assert_allclose(sigmas, roots[1:] ** 3, rtol=1e-12)
    np.testing.assert_allclose(exponential(5, t_min=0.01), [*np.logspace(0, -2, 5), 0], rtol=1e-12)
    logits = np.linspace(log_snr(0.9), log_snr(0.05), 6)
    np.testing.assert_allclose([log_snr(t) for t in log_snr_uniform(6, t_min=0.05, t_max=0.9)[1:-1]], logits[1:])
    spread = [shift_time(t, 3.0) for t in np.linspace(1, 0.01, 5)]
    np.testing.assert_allclose(double_shifted(5, 3.0, t_min=0.01), [*spread, 0], rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: shifted(100_001), "steps = 100001 is too many; the most is 100000"),
        (lambda: karras(5, math.inf), "shift = inf must be positive"),
        (lambda: log_snr_uniform(5, t_min=0.5, t_max=0.5), "t_min = 0.5, t_max = 0.5"),
        (lambda: log_snr_uniform(5, t_max=1.0), "not 0 < t_min < t_max < 1"),
        (lambda: karras(5, rho=0.0), "rho = 0.0 must be positive"),
        (lambda: karras(5, rho=math.nan), "rho = nan must be positive"),
        (lambda: karras(5, sigma_min=-1.0), "sigma_min = -1.0, sigma_max = 80.0: not 0 <"),
        (lambda: karras(5, sigma_min=80.0, sigma_max=1.0), "not 0 < sigma_min < sigma_max"),
        (lambda: exponential(5, t_min=0.0), "t_min = 0.0 is not between 0 and 1"),
        (lambda: exponential(5, t_min=2.0), "t_min = 2.0 is not between"),
        (lambda: double_shifted(5, t_min=2.0), "t_min = 2.0 is not between"),
        (lambda: beta(10, a=0.01), "a = 0.01 crowds 10 steps until times are equal"),
        (lambda: beta(5, a=0.0), "a = 0.0 must be positive"),
        (lambda: beta(5, a=math.nan), "a = nan must be positive"),
    ],
)
def test_options_of_grids_that_cannot_be_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_as_many_steps_as_are_allowed():
    grid = shifted(100_000)
    assert len(grid) == 100_001 and grid[-2] == 1e-5


def test_the_ends_of_the_grids_are_pinned():
    """Two rules: down to 0 by the formula itself, or to a smallest time and then 0."""
    assert uniform(20)[-2] == 0.05
    assert cosine(20)[-2] == pytest.approx(0.0729, abs=1e-4)
    assert beta(20)[-2] == pytest.approx(0.0117, abs=1e-3)
    assert karras(20)[-2] == pytest.approx(0.002 / 1.002)
    assert exponential(20)[-2] == pytest.approx(0.001)
    assert log_snr_uniform(20)[-2] == pytest.approx(0.002)


# ------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([1.0], "two times or more"),
        ([], "two times or more"),
        ([1.0, 0.5, 0.5, 0.0], r"must fall at every step, but step 2 goes from 0.5 to 0.5"),
        ([0.0, 0.5, 0.4, 1.0], r"must rise at every step, but step 2"),
        ([1.0, math.nan, 0.0], "step 1 goes from 1.0 to nan"),
        (20, r"is numbers, such as uniform\(20\) or .*, not 20"),
        ("shifted", "is numbers, .*, not 'shifted'"),
    ],
)
def test_a_grid_that_goes_nowhere_is_refused(grid, message):
    with pytest.raises(UserError, match=message):
        euler(lambda x, t: x, torch.zeros(1, 1), grid)


def test_a_velocity_of_another_shape_or_kind_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(UserError, match=r"returned \(2, 1\) for a state of \(2, 3\)"):
        euler(lambda x, t: x[:, :1], x, uniform(2))
    with pytest.raises(UserError, match="returned torch.int64; it must be a floating dtype"):
        euler(lambda x, t: x.long(), x, uniform(2))


def test_nan_is_told_with_its_step_and_samples():
    def velocity(x, t):
        v = torch.zeros_like(x)
        if float(t[0]) <= 0.5:
            v[1] = math.nan
        return v

    solution = heun(velocity, torch.zeros(3, 2), uniform(8))
    assert solution.status == ["ok", "not finite (NaN or inf) from step 4 of 8 on", "ok"] and not solution.ok
    with pytest.raises(UserError, match="from step 4 of 8 on; samples 1 of 3"):
        solution.checked()
    many = euler(velocity, torch.zeros(3, 2), uniform(40))
    assert many.status[1] == "not finite (NaN or inf) from step 19 to 21 of 40 on"
    good = euler(lambda x, t: x, torch.zeros(2, 2), uniform(3))
    assert good.ok and good.checked() is good


def test_the_trajectory_is_kept_where_it_is_asked_for():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert euler(lambda x, t: x, x, uniform(3)).trajectory is None
    v = torch.tensor([1.0, -2.0, 2.0])
    kept = rk4(lambda x, t: v.repeat(len(x), 1), x, uniform(3), record=True).trajectory
    assert kept.times == uniform(3) and kept.nfe == [0, 4, 8, 12] and len(kept.states) == 4
    assert torch.equal(kept.states[0], x)
    torch.testing.assert_close(kept.states[-1], x - v)
    torch.testing.assert_close(kept.speed, torch.full((3, 4), math.sqrt(3)))


def test_a_jump_is_seen_between_two_times():
    def velocity(x, t):
        return x

    velocity.edges = (0.3, 0.7)
    solve = Solve(velocity, torch.zeros(1, 1), uniform(10), None, False)
    jumps = [solve.jumps(t, t_next) for t, t_next in pairwise(uniform(10))]
    assert jumps == [False, False, True, True, False, False, True, True, False, False]
