"""Picard iteration against the sequential Euler it stands for."""

import math

import numpy as np
import pytest
import torch

from genflow.errors import UserError
from genflow.samplers import cfg, euler, reversed, shifted, uniform
from genflow.samplers.parallel import picard

MEANS = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def same(a, b):
    """Up to the rounding of a step, which Euler's method takes in one operation."""
    return torch.allclose(a, b, rtol=0, atol=1e-12)


def mixture(x, t):
    """The exact velocity for data ~ a mixture of five narrow Gaussians in 12 dimensions."""
    t = t.view(-1, 1)
    apart = x[:, None] - (1 - t[:, :, None]) * MEANS  # B x 5 x 12
    var = (1 - t) ** 2 * 0.2**2 + t**2
    share = torch.softmax(-apart.square().sum(2) / (2 * var), dim=1)[:, :, None]
    slope = (t - (1 - t) * 0.2**2) / var
    return (share * (slope[:, :, None] * apart - MEANS)).sum(1)


def simple(x, t, c):
    """A velocity of plain arithmetic, which is the same in a batch of any size, under a condition c per row."""
    shape = (-1, *[1] * (x.dim() - 1))
    return (t.view(shape) - 0.3) * x / (0.2 + x * x) - c.view(shape)


class Counted:
    """A velocity with conditions by the row that notes its calls."""

    def __init__(self, c, calls=None):
        self.c, self.calls, self.taken = c, [] if calls is None else calls, []

    def __call__(self, x, t):
        assert len(x) == len(t) == len(self.c)
        self.calls.append([(c, time) for c, time in zip(self.c.tolist(), t.tolist(), strict=True)])
        return simple(x, t, self.c)

    def take(self, rows):
        self.taken.append(rows)
        return Counted(self.c[rows], self.calls)


@pytest.fixture
def noise():
    return torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("window", [1, 2, 7, 24, 100])
@pytest.mark.parametrize("backwards", [False, True])
def test_with_tolerance_zero_it_is_eulers_trajectory(window, backwards, noise):
    grid = shifted(24, 2.0)[:: -1 if backwards else 1]
    velocity = lambda x, t: simple(x, t, x.new_tensor(0.5))
    a = picard(velocity, noise, grid, window=window, tolerance=0.0, record=True)
    b = euler(velocity, noise, grid, record=True)
    assert same(a.x, b.x) and a.trajectory.times == b.trajectory.times
    assert len(a.trajectory.states) == 25 and all(map(same, a.trajectory.states, b.trajectory.states))
    assert a.sweeps <= 24 <= a.nfe and a.ok
    if window == 1:
        assert a.sweeps == a.nfe == 24 and a.trajectory.nfe == b.trajectory.nfe


@pytest.mark.parametrize("steps", [1, 40])
def test_with_tolerance_zero_it_is_eulers_sample_of_a_mixture(steps, noise):
    for window in (5, 40):
        x = picard(mixture, noise, shifted(steps, 3.0), window=window, tolerance=0.0).x
        torch.testing.assert_close(x, euler(mixture, noise, shifted(steps, 3.0)).x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tolerance", "sweeps"), [(1e-2, 30), (1e-3, 36), (1e-4, 45)])
def test_sweeps_are_far_fewer_than_steps_at_an_error_near_the_tolerance(tolerance, sweeps, noise):
    grid = uniform(200)
    solution = picard(mixture, noise, grid, window=24, tolerance=tolerance)
    off = (solution.x - euler(mixture, noise, grid).x).square().mean(1).sqrt().max().item()
    assert solution.sweeps <= sweeps and off <= 2 * tolerance
    assert 200 <= solution.nfe <= 24 * solution.sweeps


def test_the_tolerance_is_of_the_root_mean_square_whatever_the_size_of_a_state(noise):
    velocity = lambda x, t: simple(x, t, x.new_tensor(0.5))
    one, many = (picard(velocity, noise[:, :1].repeat(1, n), uniform(40), window=8) for n in (1, 64))
    assert one.sweeps == many.sweeps and torch.equal(one.x.repeat(1, 64), many.x)


def test_a_constant_velocity_takes_two_sweeps_and_one_for_each_window_more():
    """The first sweep finds the line; after it every guess that comes into the window lies on it."""
    x = torch.randn(3, 4, dtype=torch.float64)
    for window, sweeps in ((30, 2), (15, 3), (10, 4)):
        solution = picard(lambda x, t: torch.ones_like(x), x, uniform(30), window=window, tolerance=1e-9)
        assert solution.sweeps == sweeps
        torch.testing.assert_close(solution.x, x - 1)


def test_sweeps_and_evaluations_are_counted(noise):
    c = torch.arange(6, dtype=torch.float64)
    velocity, seen, grid = Counted(c), [], uniform(20)
    progress = lambda done, steps: seen.append((done, steps))
    solution = picard(velocity, noise, grid, window=6, tolerance=1e-3, progress=progress, record=True)
    spent = [sum(row == i for call in velocity.calls for row, _ in call) for i in range(6)]
    assert solution.sweeps == len(velocity.calls) == len(seen)
    assert solution.nfe == max(spent) == solution.trajectory.nfe[-1] and min(spent) >= 20
    assert solution.trajectory.nfe == sorted(solution.trajectory.nfe) and solution.trajectory.nfe[0] == 0
    done = [step for step, _ in seen]
    assert done == sorted(set(done)) and seen[-1] == (20, 20)
    for call in velocity.calls:
        assert len(set(call)) == len(call) <= 36 and {t for _, t in call} <= set(grid[:-1])


def test_rows_that_have_arrived_leave_the_batch():
    c = torch.tensor([0.0, 5.0], dtype=torch.float64)
    velocity = Counted(c)
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)  # the first row never moves
    picard(velocity, x, uniform(40), window=8, tolerance=1e-6)
    rows = [{row for row, _ in call} for call in velocity.calls]
    assert rows[0] == {0.0, 5.0} and rows[-1] == {5.0} and sum(0.0 in call for call in rows) <= 7
    assert len(velocity.taken) < len(velocity.calls)  # rows are taken anew only when they change


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_a_row_does_not_depend_on_its_batch_mates(tolerance, noise):
    noise[2] *= 3  # a row that needs more sweeps than the others
    c = torch.linspace(-2, 2, 6, dtype=torch.float64)
    options = {"window": 5, "tolerance": tolerance, "record": True}
    whole = picard(Counted(c), noise, uniform(20), **options)
    alone = [picard(Counted(c[i : i + 1]), noise[i : i + 1], uniform(20), **options) for i in range(6)]
    for i, one in enumerate(alone):
        assert torch.equal(one.x[0], whole.x[i])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(one.trajectory.states, whole.trajectory.states, strict=True))
    assert whole.nfe == max(one.nfe for one in alone) and whole.sweeps == max(one.sweeps for one in alone)
    assert tolerance == 0 or len({one.sweeps for one in alone}) > 1


def test_conditions_of_every_row_go_along(noise):
    c, u = torch.linspace(-2, 2, 6, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    taken = Counted(c)
    a = picard(taken, noise, uniform(15), window=6, tolerance=0.0).x
    assert same(a, euler(lambda x, t: simple(x, t, c), noise, uniform(15)).x)
    guided = cfg(simple, (c,), (u,), 3.0)
    b = picard(guided, noise, uniform(15), window=6, tolerance=0.0).x
    torch.testing.assert_close(b, euler(guided, noise, uniform(15)).x, rtol=0, atol=1e-12)
    assert not torch.allclose(a, b)


def test_the_other_convention_of_time_and_pictures_will_do():
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    velocity = lambda x, t: simple(x, t, x.new_tensor(0.5))
    there = reversed(lambda x, t: -velocity(x, 1 - t))
    expected = euler(velocity, x, uniform(9)).x
    torch.testing.assert_close(picard(there, x, uniform(9), window=4, tolerance=0.0).x, expected)


def test_the_state_is_float32_whatever_the_network(noise):
    seen = set()

    def velocity(x, t):
        seen.add((x.dtype, t.dtype))
        return (x * t[:, None]).bfloat16()

    solution = picard(velocity, noise.bfloat16(), uniform(12), window=4)
    assert solution.x.dtype == torch.float32 and seen == {(torch.float32, torch.float32)}
    assert torch.equal(
        picard(velocity, noise.bfloat16(), uniform(12), window=4, tolerance=0.0).x,
        euler(velocity, noise.bfloat16(), uniform(12)).x,
    )


def test_gradients_are_those_of_euler(noise):
    noise.requires_grad_()
    velocity = lambda x, t: simple(x, t, x.new_tensor(0.5))
    grads = [
        torch.autograd.grad(solution.x.square().sum(), noise)[0]
        for solution in (
            picard(velocity, noise, uniform(10), window=4, tolerance=0.0, record=True),
            euler(velocity, noise, uniform(10)),
        )
    ]
    torch.testing.assert_close(*grads)


def test_one_bad_row_stays_alone(noise):
    noise[1] = math.nan
    solution = picard(mixture, noise, uniform(20), window=5, tolerance=1e-3)
    assert [each == "ok" for each in solution.status] == [True, False, True, True, True, True]
    assert solution.sweeps == 20


def test_a_state_that_stayed_after_one_that_moved_is_not_verified():
    """The first sweep moves the first state alone, since the second step takes back what the first one did."""

    def velocity(x, t):
        return torch.where(t == 1, -1.0, torch.where(t == 0.8, 1 - 2 * x[:, 0], 0.0))[:, None]

    x, grid = torch.zeros(1, 1, dtype=torch.float64), [1.0, 0.8, 0.6, 0.4]
    assert same(picard(velocity, x, grid, window=3, tolerance=1e-9).x, euler(velocity, x, grid).x)


@pytest.mark.parametrize("window", [3, 30, 45, 50])
def test_a_guess_out_of_bounds_does_no_harm(window):
    """The first guess is a line that goes below 0, where this velocity is NaN; Euler's path does not."""
    velocity = lambda x, t: 1.8 * x.sqrt()
    x = torch.ones(2, 3, dtype=torch.float64)
    solution = picard(velocity, x, uniform(50), window=window, tolerance=0.0)
    assert same(solution.x, euler(velocity, x, uniform(50)).x) and solution.ok


def test_no_rows_are_no_work():
    solution = picard(mixture, torch.empty(0, 12), uniform(5))
    assert solution.x.shape == (0, 12) and solution.nfe == solution.sweeps == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 0}, "window = 0 is not a whole number of 1 or more"),
        ({"window": -4}, "window = -4 is not a whole number"),
        ({"window": 2.0}, "whole number"),
        ({"window": True}, "whole number"),
        ({"tolerance": -1e-3}, "0 is Euler's method"),
        ({"tolerance": math.inf}, "finite"),
        ({"tolerance": math.nan}, "finite"),
        ({"grid": [1.0, 0.5, 0.5, 0.0]}, "must fall"),
        ({"velocity": lambda x, t: x[:, :3]}, "must be alike"),
    ],
)
def test_bad_input_is_refused(options, says, noise):
    velocity, grid = options.pop("velocity", mixture), options.pop("grid", uniform(4))
    with pytest.raises(UserError, match=says) as error:
        picard(velocity, noise, grid, **options)
    assert "\n" not in str(error.value)


def test_a_window_may_be_numpys(noise):
    a, b = (picard(mixture, noise, uniform(6), window=window).x for window in (np.int64(3), 3))
    assert torch.equal(a, b)
