"""Adaptive solvers against exact flows, scipy and torchdiffeq; every row a solve of its own."""

import math

import numpy as np
import pytest
import torch
from normal_flow import S, exact, gaussian
from scipy.integrate import solve_ivp

from genflow.errors import UserError
from genflow.samplers import cfg, reversed
from genflow.samplers.adaptive import bosh3, dopri5, tsit5
from genflow.samplers.tableaus import BOSH3, DOPRI5, TSIT5
from tests.noise import normal

SOLVERS = [bosh3, dopri5, tsit5]
ORDER = {bosh3: 3, dopri5: 5, tsit5: 5}
STAGES = {bosh3: 3, dopri5: 6, tsit5: 6}  # evaluations a step


def turning(x, t):
    """Points that turn about 0 by rates of their own, the third number: easy rows and hard ones. B x 3."""
    return torch.stack([-x[:, 2] * x[:, 1], x[:, 2] * x[:, 0], torch.zeros_like(t)], 1)


def turned(x, t_from, t_to):
    angle = x[:, 2] * (t_to - t_from)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([x[:, 0] * cos - x[:, 1] * sin, x[:, 0] * sin + x[:, 1] * cos, x[:, 2]], 1)


def curvy(x, t):
    """A velocity that mixes the numbers of a row, and nothing across rows."""
    return torch.sin(3 * x) * t.view(-1, 1) + x.roll(1, 1) - 4 * t.view(-1, 1) * x


class Counted:
    def __init__(self, velocity):
        self.velocity, self.rows, self.times = velocity, [], []

    def __call__(self, x, t):
        self.rows.append(len(x))
        self.times += t.tolist()
        return self.velocity(x, t)


@pytest.fixture
def noise():
    return normal(5, 2)


@pytest.fixture
def mixed():
    """Six easy rows and a hard one."""
    x = normal(7, 3)
    x[:, 2] = torch.tensor([1.0, 1.5, 0.5, 60.0, 1.0, 2.0, 0.1])
    return x


# -------------------------------------------------------------------------------------------------------------- tableaus


def conditions(pair):
    """The order conditions: of a weighting b and its end theta, by order (Hairer, Norsett & Wanner I, II.2)."""
    c = np.array([0, *pair.c])
    a = np.zeros((len(c), len(c)))
    for row, weights in enumerate(pair.a, start=1):
        a[row, : len(weights)] = weights
    np.testing.assert_allclose(a.sum(1), c, atol=1e-14)
    trees = [
        (1, [c**0]),
        (2, [c]),
        (3, [c**2, 2 * a @ c]),
        (4, [c**3, 2 * c * (a @ c), 3 * a @ c**2, 6 * a @ a @ c]),
        (5, [c**4, 2 * c**2 * (a @ c), 3 * c * (a @ c**2), 6 * c * (a @ a @ c), 4 * (a @ c) ** 2]),
    ]
    trees[4][1].extend([4 * a @ c**3, 8 * a @ (c * (a @ c)), 12 * a @ a @ c**2, 24 * a @ a @ a @ c])
    return a[-1], lambda b, theta, order: max(
        abs(b @ tree - theta**n / n) for n, group in trees if n <= order for tree in group
    )


@pytest.mark.parametrize("pair", [BOSH3, DOPRI5, TSIT5])
def test_the_pairs_have_their_orders_and_their_interpolants_one_less(pair):
    b, miss = conditions(pair)
    lower = b - np.array(pair.error)
    assert miss(b, 1, pair.order) < 1e-14 and miss(lower, 1, pair.order - 1) < 1e-14
    assert miss(lower, 1, pair.order) > 1e-4  # or the error would be of nothing
    first, last = np.eye(len(b))[[0, -1]]
    for theta in (0.2, 0.5, 0.9):
        slope, end = first - b, b - last
        weights = theta * (b + (1 - theta) * (slope + theta * (end - slope)))
        if pair.dense:
            weights = weights + theta**2 * (1 - theta) ** 2 * np.array(pair.dense)
        assert miss(weights, theta, min(pair.order, 4) if pair.dense else 3) < 1e-14


# -------------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", [[1.0, 0.0], [0.0, 1.0], [0.2, 0.9]])
def test_the_error_follows_the_tolerance_both_ways(solver, grid, noise):
    for tol in (1e-4, 1e-6, 1e-8):
        solution = solver(gaussian, noise, grid, rtol=tol, atol=tol)
        assert solution.ok and solution.x.dtype == torch.float64
        error = (solution.x - exact(noise, grid[0], grid[-1])).abs().max()
        assert tol / 1000 < error < 50 * tol, (tol, error)


@pytest.mark.parametrize("solver", SOLVERS)
def test_order_of_convergence(solver):
    """The error against the steps taken, a straight line of that slope in logarithms."""
    x = torch.tensor([[1.0, 0.5, 6.0]], dtype=torch.float64)
    points = []
    for tol in 10.0 ** -np.arange(5, 11 if solver is not bosh3 else 9):
        solution = solver(turning, x, [0.0, 1.0], rtol=tol, atol=tol, max_steps=10_000)
        points.append((solution.statistics.accepted.item(), (solution.x - turned(x, 0, 1)).abs().max().item()))
    steps, error = np.log(np.array(points)).T
    assert np.polyfit(steps, error, 1)[0] == pytest.approx(-ORDER[solver], abs=0.4)


@pytest.mark.parametrize(("solver", "method"), [(bosh3, "RK23"), (dopri5, "RK45"), (tsit5, "DOP853")])
def test_agrees_with_scipy(solver, method):
    x = normal(3, 4)
    ours = solver(curvy, x, [1.0, 0.0], rtol=1e-8, atol=1e-10, max_steps=5000)
    for row, start in zip(ours.x, x, strict=True):

        def field(t, y):
            return curvy(torch.from_numpy(y).view(1, 4), torch.tensor([t], dtype=torch.float64))[0].numpy()

        theirs = solve_ivp(field, (1.0, 0.0), start.numpy(), method=method, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(row.numpy(), theirs.y[:, -1], rtol=0, atol=3e-7)


@pytest.mark.parametrize(("solver", "method", "near"), [(bosh3, "bosh3", 5e-6), (dopri5, "dopri5", 3e-7)])
def test_agrees_with_torchdiffeq(solver, method, near):
    odeint = pytest.importorskip("torchdiffeq").odeint
    x, grid = normal(3, 4), [1.0, 0.6, 0.0]
    ours = solver(curvy, x, grid, rtol=1e-8, atol=1e-10, max_steps=5000, record=True)
    theirs = odeint(lambda t, x: curvy(x, t.expand(3)), x, x.new_tensor(grid), rtol=1e-8, atol=1e-10, method=method)
    torch.testing.assert_close(torch.stack(ours.trajectory.states), theirs, rtol=0, atol=near)


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_pictures(solver):
    x = normal(2, 3, 8, 8).float()
    solution = solver(gaussian, x, [1.0, 0.0])
    assert solution.x.shape == x.shape and solution.x.dtype == torch.float32
    assert (solution.x - exact(x, 1, 0)).abs().max() < 2e-3
    # the last of the tolerances that are allowed is one that float32 still meets
    fine = solver(gaussian, x, [1.0, 0.0], rtol=1e-6, atol=1e-6)
    assert fine.ok and (fine.x - exact(x, 1, 0)).abs().max() < 2e-5
    assert fine.statistics.rejected.max() <= 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_flow_through_the_steps(solver, noise):
    noise.requires_grad_()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    solution = solver(lambda x, t: scale * gaussian(x, t), noise, [1.0, 0.5, 0.0], rtol=1e-8, atol=1e-8, record=True)
    slope, by_scale = torch.autograd.grad(solution.x.sum(), [noise, scale], retain_graph=True)
    torch.testing.assert_close(slope, torch.full_like(noise, S), rtol=0, atol=1e-6)
    with torch.no_grad():
        up, down = (
            solver(lambda x, t, s=s: s * gaussian(x, t), noise, [1.0, 0.0], rtol=1e-10, atol=1e-10, max_steps=9999).x
            for s in (1 + 1e-4, 1 - 1e-4)
        )
    torch.testing.assert_close(by_scale, (up - down).sum() / 2e-4, rtol=1e-4, atol=1e-4)
    (between,) = torch.autograd.grad(solution.trajectory.states[1].sum(), noise)
    expected = math.sqrt(0.25 * S**2 + 0.25)
    torch.testing.assert_close(between, torch.full_like(noise, expected), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- rows by rows


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("compact", [False, True])
def test_a_row_does_not_depend_on_its_batch_mates(solver, compact, mixed):
    together = solver(turning, mixed, [1.0, 0.3, 0.0], record=True, compact=compact)
    for row in range(len(mixed)):
        alone = solver(turning, mixed[row : row + 1], [1.0, 0.3, 0.0], record=True)
        for a, b in zip(together.trajectory.states, alone.trajectory.states, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=0, atol=1e-12)
        assert together.statistics.evaluations[row] == alone.nfe
    backwards = solver(turning, mixed.flip(0), [1.0, 0.0], compact=compact).x.flip(0)
    torch.testing.assert_close(backwards, together.x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_row_of_equal_numbers_takes_the_steps_of_one(solver):
    """The tolerance is of the root mean square over a row, whatever its size."""
    one = solver(gaussian, torch.full((1, 1), 1.3, dtype=torch.float64), [1.0, 0.0])
    many = solver(gaussian, torch.full((1, 3, 10, 10), 1.3, dtype=torch.float64), [1.0, 0.0])
    assert torch.equal(many.statistics.accepted, one.statistics.accepted) and many.nfe == one.nfe
    torch.testing.assert_close(many.x, one.x.view(1, 1, 1, 1).expand_as(many.x))


def test_a_hard_row_is_as_right_as_the_easy_ones_and_takes_more_steps(mixed):
    solution = dopri5(turning, mixed, [1.0, 0.0], rtol=1e-7, atol=1e-7)
    assert (solution.x - turned(mixed, 1, 0)).abs().amax(1).max() < 1e-5
    evaluations = solution.statistics.evaluations
    assert evaluations.argmax() == 3 and evaluations[3] > 5 * evaluations[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted(solver, mixed):
    velocity = Counted(turning)
    solution = solver(velocity, mixed, [1.0, 0.0], compact=False)
    assert velocity.rows == [7] * solution.nfe
    took = solution.statistics
    assert torch.equal(took.evaluations, 2 + STAGES[solver] * (took.accepted + took.rejected))
    assert solution.nfe == took.evaluations.max()


def test_finished_rows_leave_the_batch(mixed):
    velocity = Counted(turning)
    compact = dopri5(velocity, mixed, [1.0, 0.0], compact=True)
    assert sum(velocity.rows) == compact.statistics.evaluations.sum()  # of seven rows every one that is done leaves
    assert velocity.rows[0] == 7 and velocity.rows[-1] == 1
    full = dopri5(turning, mixed, [1.0, 0.0], compact=False)
    torch.testing.assert_close(compact.x, full.x, rtol=0, atol=1e-12)
    assert torch.equal(compact.statistics.accepted, full.statistics.accepted)


def test_a_velocity_that_can_take_rows_is_asked_to(mixed):
    class Conditional:
        """Turns by a condition that each row has."""

        def __init__(self, rate):
            self.rate, self.rows = rate, rows

        def __call__(self, x, t):
            rows.append(len(x))
            return self.rate.view(-1, 1) * torch.stack([-x[:, 1], x[:, 0]], 1)

        def take(self, index):
            return Conditional(self.rate[index])

    rows = []
    velocity = Conditional(mixed[:, 2])
    solution = dopri5(velocity, mixed[:, :2], [1.0, 0.0], rtol=1e-7, atol=1e-7)
    assert rows[-1] == 1 and sum(rows) == solution.statistics.evaluations.sum()
    torch.testing.assert_close(solution.x, turned(mixed, 1, 0)[:, :2], rtol=0, atol=1e-5)
    rows.clear()
    dopri5(velocity, mixed[:, :2], [1.0, 0.0], compact=False)
    assert set(rows) == {7}


def test_the_device_is_waited_for_once_a_step(mixed, monkeypatch):
    waits = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, name=name, **kwargs):
            waits.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    solution = dopri5(turning, mixed, [1.0, 0.0])
    steps = int((solution.statistics.accepted + solution.statistics.rejected).max())
    waits.pop()
    assert steps > 20 and len(waits) <= steps + 4, waits


# ------------------------------------------------------------------------------------------------------- dense output


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("backwards", [False, True])
def test_states_between_are_as_accurate_as_the_ends(solver, backwards, noise):
    grid = np.linspace(1, 0, 38)[:: -1 if backwards else 1].tolist()
    velocity = Counted(gaussian)
    solution = solver(velocity, noise, grid, rtol=1e-7, atol=1e-7, record=True)
    plain = solver(gaussian, noise, [grid[0], grid[-1]], rtol=1e-7, atol=1e-7)
    assert torch.equal(solution.x, plain.x) and len(velocity.rows) == plain.nfe  # the inner times cost nothing
    trajectory = solution.trajectory
    assert trajectory.times == grid and len(trajectory.states) == 38
    assert torch.equal(trajectory.states[0], noise) and torch.equal(trajectory.states[-1], solution.x)
    for t, x in zip(grid, trajectory.states, strict=True):
        torch.testing.assert_close(x, exact(noise, grid[0], t), rtol=0, atol=2e-6)
    assert trajectory.nfe[0] == 0 and trajectory.nfe[-1] == solution.nfe and sorted(trajectory.nfe) == trajectory.nfe
    assert trajectory.speed.shape == (37, 5)


def test_many_times_may_lie_within_one_step():
    x = torch.ones(2, 1, dtype=torch.float64)
    grid = [1.0, 0.9999, 0.9998, 0.5, 0.4999, 0.0]
    solution = dopri5(lambda x, t: -x, x, grid, rtol=1e-9, atol=1e-9, record=True)
    expected = [math.exp(1 - t) for t in grid]
    np.testing.assert_allclose([float(x[1]) for x in solution.trajectory.states], expected, rtol=1e-7)
    assert solution.trajectory.nfe[:3] == [0, 8, 8]  # two to begin, and the six of the step that passes both


# ------------------------------------------------------------------------------------------------- rows that stop early


def blows_up(x, t):
    """From x at 1 to x / (1 - (1 - t) x): infinite at t = 1 - 1 / x."""
    return -(x**2)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("compact", [False, True])
def test_rows_that_cannot_go_on_say_why_and_the_others_do(solver, compact):
    x = torch.tensor([[0.5], [2.0], [math.nan], [0.1]], dtype=torch.float64)
    solution = solver(blows_up, x, [1.0, 0.8, 0.0], compact=compact, record=True)
    status = solution.status
    assert status[0] == status[3] == "ok" and not solution.ok
    assert "step size underflow at t = 0.5" in status[1] or "step size underflow at t = 0.4999" in status[1]
    assert status[2] == "stopped at t = 1: the velocity is not finite beyond"
    assert solution.x[1].isfinite().all() and solution.x[1] > 1e6
    torch.testing.assert_close(solution.x[[0, 3]], torch.tensor([[1.0], [1 / 9]]).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(solution.trajectory.states[1][1], torch.tensor([2 / 0.6]).double(), rtol=1e-3, atol=0)
    with pytest.raises(UserError, match=r"underflow.*samples 1, 2 of 4"):
        solution.checked()


@pytest.mark.parametrize("solver", SOLVERS)
def test_at_max_steps_the_row_stops_where_it_is(solver, mixed):
    easy = [0, 1, 2, 4, 5, 6]
    plain = solver(turning, mixed[easy], [1.0, 0.0])
    steps = int((plain.statistics.accepted + plain.statistics.rejected).max())
    solution = solver(turning, mixed, [1.0, 0.5, 0.0], max_steps=steps, record=True)
    assert [i for i, each in enumerate(solution.status) if each != "ok"] == [3]
    assert solution.status[3].startswith("stopped at t = 0.") and solution.status[3].endswith(f"after {steps} steps")
    t = float(solution.status[3].split()[4])
    torch.testing.assert_close(solution.x[3], turned(mixed, 1, t)[3], rtol=0, atol=0.05)
    assert torch.equal(solution.trajectory.states[1][3], solution.x[3])  # it never came to 0.5
    torch.testing.assert_close(solution.x[easy], plain.x, rtol=0, atol=1e-12)
    assert solution.nfe == 2 + steps * STAGES[solver]
    none = solver(turning, mixed[3:4], [1.0, 0.5, 0.0], max_steps=3, record=True)
    assert not none.ok and none.trajectory.nfe == [0, none.nfe, none.nfe]


def test_a_step_that_is_not_finite_is_tried_smaller():
    def root(x, t):  # not a number below 0, where too large a step ends
        return torch.sqrt(x) * 30

    x = torch.tensor([[1.0], [4.0]], dtype=torch.float64)
    solution = dopri5(lambda x, t: root(x, t), x, [1.0, 0.96], rtol=1e-6, atol=1e-6)
    assert solution.ok
    torch.testing.assert_close(solution.x, (x.sqrt() - 0.6) ** 2, rtol=0, atol=1e-4)
    wall = dopri5(lambda x, t: torch.where((t.view(-1, 1) < 0.4) & (x > 3), math.nan, -x), x, [1.0, 0.0])
    assert wall.status == ["ok", "stopped at t = 0.4: the velocity is not finite beyond"]
    assert wall.x.isfinite().all() and wall.nfe < 1200


# ---------------------------------------------------------------------------------------------------------------- edges


class Jumping:
    """1 outside lo .. hi, 3 inside, the ends included, as guidance in an interval is; the time is all that matters."""

    def __init__(self, lo, hi, edges):
        self.lo, self.hi, self.times = lo, hi, []
        if edges:
            self.edges = (lo, hi)

    def __call__(self, x, t):
        self.times += t.tolist()
        return torch.where((t >= self.lo) & (t <= self.hi), 3.0, 1.0).to(x.dtype).view(-1, 1) * x


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", [[1.0, 0.75, 0.1, 0.0], [0.0, 0.5, 0.75, 1.0]])
@pytest.mark.parametrize("compact", [False, True])
def test_steps_end_at_the_edges_of_a_velocity(solver, grid, compact):
    x, lo, hi = torch.tensor([[1.0], [-50.0]], dtype=torch.float64), 0.25, 0.75
    solution = solver(Jumping(lo, hi, True), x, grid, record=True, rtol=1e-6, atol=1e-6, compact=compact)
    assert solution.ok and solution.statistics.rejected.max() == 0
    for t, state in zip(grid, solution.trajectory.states, strict=True):
        inside = max(0.0, min(max(grid[0], t), hi) - max(min(grid[0], t), lo))
        growth = math.copysign(abs(t - grid[0]) + 2 * inside, t - grid[0])
        torch.testing.assert_close(state, x * math.exp(growth), rtol=1e-5, atol=0)
    blind = solver(Jumping(lo, hi, False), x, grid, rtol=1e-6, atol=1e-6)
    assert blind.statistics.rejected.min() > 5 and blind.nfe > 1.2 * solution.nfe


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_step_leaves_the_grid_for_an_edge(solver):
    x, velocity = torch.ones(2, 1, dtype=torch.float64), Jumping(0.25, 0.75, True)
    velocity.edges = (1e-17, 0.25, 0.75, math.nextafter(1, 0))
    for grid in ([0.6, 0.4], [0.4, 0.6], [1.0, 0.0]):
        velocity.times.clear()
        solution = solver(velocity, x, grid, rtol=1e-6, atol=1e-6)
        assert solution.ok and min(grid) <= min(velocity.times) and max(velocity.times) <= max(grid)
        growth = 3 * (grid[1] - grid[0]) if grid[0] < 1 else -2
        torch.testing.assert_close(solution.x, x * math.exp(growth), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", [[0.3, 0.0], [0.3, 1.0]])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solve_that_begins_at_an_edge_sees_its_own_side_alone(solver, grid, dtype):
    class Jump:
        edges = (0.3,)

        def __call__(self, x, t):  # at the edge itself, what is on the other side of it
            edge = t.new_tensor(0.3)
            return torch.where((t < edge if grid[1] == 0 else t > edge).view(-1, 1), -x, 100.0)

    solution = solver(Jump(), torch.ones(2, 1, dtype=dtype), grid, rtol=1e-5, atol=1e-5)
    expected = torch.full((2, 1), math.exp(grid[0] - grid[1]), dtype=dtype)
    assert solution.ok
    torch.testing.assert_close(solution.x, expected, rtol=3e-5, atol=0)


@pytest.mark.parametrize("grid", [[1.0, 0.0], [0.0, 1.0]])
def test_no_time_is_lost_at_edges(grid):
    class Steady:
        edges = tuple(i / 64 for i in range(1, 64))

        def __call__(self, x, t):
            return torch.ones_like(x)

    x = dopri5(Steady(), torch.zeros(2, 1), grid).x
    torch.testing.assert_close(x, torch.full((2, 1), grid[1] - grid[0]), rtol=0, atol=1e-5)  # a gap is 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_slow_velocity_is_not_asked_beyond_the_grid(solver):
    velocity = Counted(lambda x, t: -1e-6 * x)
    solution = solver(velocity, torch.ones(2, 1, dtype=torch.float64), [1.0, 0.5])
    assert solution.ok and min(velocity.times) >= 0.5 and max(velocity.times) <= 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_edges_may_be_at_negative_times(solver):
    x = torch.ones(2, 1, dtype=torch.float64)
    solution = solver(Jumping(-0.75, -0.25, True), x, [0.0, -1.0], rtol=1e-6, atol=1e-6)
    assert solution.ok and solution.statistics.rejected.max() == 0
    torch.testing.assert_close(solution.x, x * math.exp(-2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("interval", [(0.25, 0.75), (0.3, 0.7), (0.1, 1.0)])
def test_guidance_in_an_interval_has_edges_whatever_the_rounding(dtype, interval):
    x, c = normal(6, 4).to(dtype), normal(6, 4, seed=1).to(dtype)
    guided = cfg(lambda x, t, c: torch.sin(x + c) + c * t.view(-1, 1), (c,), (0 * c,), 3.0, interval=interval)
    plain = dopri5(guided, x, [1.0, 0.0], rtol=1e-5, atol=1e-5)
    assert plain.statistics.rejected.max() <= 1
    twice = dopri5(reversed(reversed(guided)), x, [1.0, 0.0], rtol=1e-5, atol=1e-5)
    once = dopri5(reversed(guided), x, [0.0, 1.0], rtol=1e-5, atol=1e-5)
    for solution in (twice, once):
        assert solution.nfe == plain.nfe
        torch.testing.assert_close(solution.x, plain.x, rtol=0, atol=1e-5)
    blind = dopri5(lambda x, t: guided(x, t), x, [1.0, 0.0], rtol=1e-6, atol=1e-6)
    assert blind.nfe > 1.5 * plain.nfe
    torch.testing.assert_close(blind.x, plain.x, rtol=0, atol=2e-3)


def test_max_steps_is_of_the_whole_way(mixed):
    class Turning:
        edges = (0.5,)

        def __call__(self, x, t):
            return turning(x, t)

    velocity = Turning()
    steps = dopri5(velocity, mixed, [1.0, 0.0]).statistics.accepted[3].item()
    stopped = dopri5(velocity, mixed, [1.0, 0.0], max_steps=steps - 5)
    assert stopped.status[3].endswith(f"after {steps - 5} steps") and stopped.status.count("ok") == 6
    at = float(stopped.status[3].split()[4])
    assert 0 < at < 0.5
    first = dopri5(velocity, mixed, [1.0, 0.0], max_steps=5)  # it never comes to the edge
    assert 0.5 < float(first.status[3].split()[4]) < 1
    assert first.statistics.evaluations[3] == 2 + 5 * 6  # and begins no second time there


# ------------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("solver", SOLVERS)
def test_state_and_time_are_float32_whatever_the_network(solver):
    seen = set()

    def velocity(x, t):
        seen.add((x.dtype, t.dtype, tuple(t.shape)))
        return gaussian(x, t).bfloat16()

    solution = solver(velocity, torch.randn(3, 2).bfloat16(), [1.0, 0.0], rtol=1e-2, atol=1e-2)
    assert solution.ok and solution.x.dtype == torch.float32
    assert seen == {(torch.float32, torch.float32, (3,))}


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_velocity_at_all_and_no_rows_at_all(solver):
    x = torch.zeros(2, 3)
    still = solver(lambda x, t: torch.zeros_like(x), x, [1.0, 0.0])
    assert still.ok and torch.equal(still.x, x) and still.nfe < 60
    empty = solver(gaussian, torch.zeros(0, 2), [1.0, 0.5, 0.0], record=True)
    assert empty.x.shape == (0, 2) and empty.nfe == 0 and empty.ok and len(empty.trajectory.states) == 3


def test_progress_is_the_per_cent_of_the_way(mixed):
    seen = []
    dopri5(turning, mixed, [1.0, 0.0], compact=True, progress=lambda done, of: seen.append((done, of)))
    done = [each for each, _ in seen]
    assert done == sorted(done) and done[-1] == 100 and {of for _, of in seen} == {100} and len(set(done)) > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rtol": 1e-7}, "rtol = 1e-07 .* 9.5e-07, the noise of torch.float32, .* give x as float64"),
        ({"rtol": 0.0}, "rtol = 0.0"),
        ({"rtol": math.nan}, "rtol = nan"),
        ({"rtol": 1.5}, "rtol = 1.5"),
        ({"rtol": 1.0}, "rtol = 1.0 is not between"),
        ({"rtol": 0.0}, r"and 1$"),
        ({"rtol": 1e-16, "x": torch.ones(2, 3).double()}, r"noise of torch.float64, and 1$"),
        ({"atol": 0.0}, "atol = 0.0 must be positive, such as 1e-5"),
        ({"atol": math.inf}, "atol = inf"),
        ({"max_steps": 0}, "max_steps = 0"),
        ({"max_steps": 2.5}, "max_steps = 2.5"),
        ({"max_steps": True}, "max_steps = True"),
        ({"grid": [1.0]}, "two times or more"),
        ({"grid": [1.0, 0.2, 0.3, 0.0]}, "step 2 goes from 0.2 to 0.3"),
        ({"velocity": lambda x, t: x.sum(1)}, r"returned \(2,\) for a state of \(2, 3\)"),
        ({"velocity": lambda x, t: x.long()}, "returned torch.int64"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    arguments = {"velocity": gaussian, "x": torch.randn(2, 3), "grid": [1.0, 0.0]} | changes
    with pytest.raises(UserError, match=message):
        dopri5(**arguments)
    if "rtol" in changes and changes["rtol"] == 1e-7:
        assert dopri5(**arguments | {"x": torch.randn(2, 3).double()}).ok


def test_the_least_rtol_is_eight_times_what_the_dtype_resolves():
    x = torch.randn(2, 3)
    for kind in (torch.float32, torch.float64):
        floor = 8 * torch.finfo(kind).eps
        assert dopri5(lambda x, t: -x, x.to(kind), [1.0, 0.9], rtol=floor, atol=1e-3).ok
        with pytest.raises(UserError, match="is not between"):
            dopri5(lambda x, t: -x, x.to(kind), [1.0, 0.9], rtol=0.9 * floor, atol=1e-3)


def test_a_trajectory_tells_the_evaluations_of_the_row_that_spent_most(mixed):
    grid = [1.0, 0.5, 0.0]
    together = dopri5(turning, mixed, grid, record=True).trajectory.nfe
    alone = [dopri5(turning, row, grid, record=True).trajectory.nfe for row in mixed.split(1)]
    assert together == [max(each) for each in zip(*alone, strict=True)]
