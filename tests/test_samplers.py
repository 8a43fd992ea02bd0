"""Samplers against exact solutions, scipy, diffusers and the DPM-Solver formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from normal_flow import MU, S, exact, gaussian
from scipy.integrate import solve_ivp

from genflow.errors import UserError
from genflow.functional import log_snr, shift_time, x_from_velocity
from genflow.samplers import double_shifted, euler, heun, reversed, shifted, uniform


@pytest.fixture
def noise():
    return torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def counted(velocity):
    calls = []

    def wrapped(x, t, *cond):
        calls.append((len(x), float(t[0])))
        return velocity(x, t, *cond)

    return wrapped, calls


# -------------------------------------------------------------------------------------------------------------- solvers


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("backwards", [False, True])
def test_order_of_convergence(sampler, order, shift, backwards, noise):
    errors = []
    for steps in (40, 80, 160):
        grid = shifted(steps, shift)[:: -1 if backwards else 1]
        x = sampler(gaussian, noise, grid).x
        assert x.dtype == torch.float64
        errors.append((x - exact(noise, grid[0], grid[-1])).abs().max().item())
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(rates - order) < 0.2), (rates, errors)


def test_agrees_with_scipy(noise):
    def field(t, y):
        x = torch.from_numpy(y).view(5, 2)
        return gaussian(x, torch.full((5,), t, dtype=torch.float64)).flatten().numpy()

    reference = solve_ivp(field, (1.0, 0.0), noise.flatten().numpy(), rtol=1e-10, atol=1e-12).y[:, -1]
    x = heun(gaussian, noise, uniform(400)).x
    np.testing.assert_allclose(x.flatten().numpy(), reference, atol=2e-5)


def test_euler_is_first_order_dpm_solver(noise):
    """DPM-Solver++ order 1: x' = (s'/s) x - a' (exp(-h) - 1) x0, h = lambda' - lambda; s = t, a = 1 - t."""
    grid = shifted(12, 3.0)
    x = noise
    for t, t_next in pairwise(grid[:-1]):
        v = gaussian(x, torch.full((5,), t, dtype=torch.float64))
        x0 = x_from_velocity(x, v, t)
        if t == 1:  # lambda = -inf: exp(-h) = 0
            expected = t_next * x + (1 - t_next) * x0
        else:
            h = log_snr(t_next) - log_snr(t)
            expected = t_next / t * x - (1 - t_next) * math.expm1(-h) * x0
        step = euler(gaussian, x, [t, t_next]).x
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-14)
        # and the k-diffusion form, with lambda = -log t
        torch.testing.assert_close(step, t_next / t * x + (1 - t_next / t) * x0, rtol=0, atol=1e-14)
        x = step


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_heun_is_the_algorithm_box(steps, noise):
    """EDM's algorithm 1 without churn, written with denoised pictures in place of velocities."""

    def denoised(x, t):
        return x_from_velocity(x, gaussian(x, torch.full((5,), t, dtype=torch.float64)), t)

    grid, x = shifted(steps, 1.7), noise
    for t, t_next in pairwise(grid):
        d = (x - denoised(x, t)) / t
        x_next = x + (t_next - t) * d
        if t_next != 0:
            d_next = (x_next - denoised(x_next, t_next)) / t_next
            x_next = x + (t_next - t) * (d + d_next) / 2
        x = x_next
    torch.testing.assert_close(heun(gaussian, noise, grid).x, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluations_are_counted(steps, noise):
    for sampler, grid, expected in (
        (euler, uniform(steps), steps),
        (heun, uniform(steps), 2 * steps - 1),
        (heun, uniform(steps)[::-1], 2 * steps),
    ):
        velocity, calls = counted(gaussian)
        seen = []
        solution = sampler(velocity, noise, grid, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert solution.nfe == len(calls) == expected
        assert seen == [(i, steps) for i in range(1, steps + 1)]
        assert {t for _, t in calls} <= set(grid)


def test_one_step_goes_the_right_way():
    # data = 0: the velocity is +noise, so one step from noise lands on the data exactly.
    noise = torch.randn(4, 3)
    assert euler(lambda x, t: noise, noise, uniform(1)).x.abs().max() == 0
    # and for Gaussian data any step brings the spread nearer to the data's
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    for sampler in (euler, heun):
        one = sampler(gaussian, x, uniform(1)).x
        few = sampler(gaussian, x, uniform(8)).x
        assert abs(one.mean() - MU) < 0.01 and abs(few.mean() - MU) < 0.01
        assert abs(few.std() - S) < 0.1 < abs(x.std() - S)


@pytest.mark.parametrize("sampler", [euler, heun])
def test_state_and_time_are_float32_whatever_the_network(sampler):
    seen = set()

    def velocity(x, t):
        seen.add((x.dtype, t.dtype, tuple(t.shape)))
        return gaussian(x, t).bfloat16()

    x = sampler(velocity, torch.randn(3, 2).bfloat16(), uniform(3)).x
    assert x.dtype == torch.float32
    assert seen == {(torch.float32, torch.float32, (3,))}


def test_gradients_flow_through_a_solve(noise):
    noise.requires_grad_()
    heun(gaussian, noise, uniform(20)).x.sum().backward()
    assert torch.allclose(noise.grad, torch.full_like(noise, S), atol=0.02)


# ---------------------------------------------------------------------------------------------------------------- grids


def test_grids_are_pinned():
    assert uniform(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert shifted(4) == uniform(4) == uniform(np.int64(4))
    for steps, shift in ((1, 3.0), (28, 3.0), (50, 0.4)):
        grid = shifted(steps, shift)
        linspace = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        np.testing.assert_allclose(grid, shift_time(linspace, shift), atol=1e-15)
        assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_double_shift_and_euler_steps_are_those_of_diffusers(shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(20)
    grid = double_shifted(20, shift)
    np.testing.assert_allclose(grid, scheduler.sigmas.numpy(), atol=2e-7)

    # step by step at the scheduler's own times
    x = theirs = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    sigmas = scheduler.sigmas.tolist()
    for i, timestep in enumerate(scheduler.timesteps):
        v = gaussian(theirs, torch.full((3,), sigmas[i]))
        theirs = scheduler.step(v, timestep, theirs, return_dict=False)[0]
        ours = euler(gaussian, x, sigmas[: i + 2]).x
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_single_shift_is_what_diffusers_shifts_once():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10).tolist())
    np.testing.assert_allclose(shifted(10, 3.0), scheduler.sigmas.numpy(), atol=2e-7)
    # the end of the two schedules, as known from the literature
    assert double_shifted(50, 3.0)[-2] == pytest.approx(0.00893, abs=1e-5)
    assert float(shift_time(1 / 1000, 3.0)) == pytest.approx(0.00299, abs=1e-5)


@pytest.mark.parametrize(
    ("make", "near"),
    [
        (lambda: uniform(0), "nearest possible number is 1"),
        (lambda: shifted(-3), "is 1"),
        (lambda: shifted(2.5), "whole number"),
        (lambda: shifted(True), "whole number"),
        (lambda: double_shifted(0), "is 1"),
        (lambda: shifted(5, 0.0), "1.0"),
        (lambda: shifted(5, math.nan), "shift"),
        (lambda: uniform(5, 2.0), "'shifted'"),
    ],
)
def test_impossible_grids_are_refused(make, near):
    with pytest.raises(UserError, match=near):
        make()


# -------------------------------------------------------------------------------------------- the other convention, the room


def test_reversed_adapts_the_other_convention(noise):
    def other(x, t):  # t = 0 noise, t = 1 data; its velocity points to the data
        return -gaussian(x, 1 - t)

    ours, theirs = heun(gaussian, noise, uniform(10)).x, heun(reversed(other), noise, uniform(10)).x
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(reversed(other)(noise, t), gaussian(noise, t))
    back = heun(reversed(gaussian), noise, uniform(100)[::-1]).x  # our velocity, run in their time
    torch.testing.assert_close(back, exact(noise, 1, 0), atol=1e-3, rtol=0)
