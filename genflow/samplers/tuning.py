"""Learned time grids: the few steps, and the solver, that come nearest to a fine solve of the same noise.

Two parts. `plan` places Euler's steps on a fine trajectory by dynamic programming, so that the sum of their own errors
is least (GITS, Chen et al. 2024, arXiv 2405.11326). `fit_grid` then moves the times so that the endpoints of the real
solver come nearest: a least-squares problem in few unknowns, solved by Levenberg-Marquardt with difference quotients,
so that any solver serves and nothing is differentiated through. Either alone stops at worse grids than both.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from genflow.errors import UserError, nearest
from genflow.registry import api_export, names, resolve, tag_of
from genflow.samplers.grids import log_snr_uniform, shifted, uniform
from genflow.samplers.runge_kutta import heun
from genflow.samplers.solution import Velocity, check_grid, evaluate

FINE = 128  # steps of the fine solve, about
SHIFTS = (0.25, 0.5, 2.0, 4.0)  # of the hand-made grid "shifted", beside every grid's own default
PLANNED, PLAN_ROWS, WEIGHTS = 64, 16, (0.9, 1.0, 1.1)  # of a plan: fine steps, rows, weights of the errors before
FINALISTS = 3  # solvers whose grids are fitted: those that did best until then
ITERATIONS, DELTA = 20, 0.01  # of a fit: at most so many, and the difference in the logarithm of a step
ENOUGH = 1e-3  # a fit stops where an iteration takes less than this part off the sum of squares
WIDEST = 8.0  # the logarithms of steps stay so near to their mean


@dataclass(frozen=True)
class Candidate:
    """One solver on one grid. error, held_out: RMSE to the fine endpoints on the fitted rows, and on the others."""

    sampler: str
    name: str  # of the grid
    grid: list[float]
    nfe: int
    error: float
    held_out: float
    learnt: bool


@api_export("Tuning")
@dataclass(frozen=True)
class Tuning:
    """What `tune` found. candidates: all that were tried, the least error on the fitted rows first.

    reference_error: RMSE of the fine endpoints themselves, as `fine_solve` tells; 0 where they were given.
    """

    candidates: list[Candidate]
    reference_error: float

    @property
    def best(self) -> Candidate:
        """The learnt grid with the least error on the fitted rows."""
        return next(c for c in self.candidates if c.learnt)

    @property
    def hand_made(self) -> Candidate:
        """The hand-made grid with the least error on the held-out rows."""
        return min((c for c in self.candidates if not c.learnt), key=lambda c: c.held_out)

    @property
    def wins(self) -> bool:
        """Whether no hand-made grid is better than the best one on the held-out rows."""
        return self.best.held_out <= self.hand_made.held_out


@api_export("tune")
@torch.no_grad()
def tune(
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int,
    samplers: Sequence[str] = (),
    grids: Mapping[str, Sequence[float]] | None = None,
    reference: Tensor | None = None,
    last: float = 0.0,
    first: float = 1.0,
    fitted: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Tuning:
    """The grid of that many steps, and the solver, whose endpoints are nearest to a fine solve's, in mean square.

    noise: B x ..., at least 2 rows: the first `fitted` of them (two thirds) are fitted, the others only tell how well.
    first: the time at which it is the state, where every grid begins; below 1 for a model that samples from less noise.
    samplers: names; by default every ODE solver of one evaluation a step, so that all cost the same. grids: the
    hand-made ones to set out from, by name (`hand_made`). reference: the endpoints to reach, like noise; by default those
    of `fine_solve` with this `last` and `first`. say: is told how it goes, in lines. The same input gives the same grid.

    Raises UserError for steps below 1, too few rows, a solver that is unknown or not for so few fixed steps, grids of other
    numbers of steps or other ends, and a reference of another shape.
    """
    grids = hand_made(steps, last, first) if grids is None else _checked(grids, steps, first)
    solvers = [name for name in samplers if evaluations(name, steps)] or _one_a_step(steps)
    n = len(noise) * 2 // 3 if fitted is None else fitted
    if not 0 < n < len(noise):
        raise UserError(f"{len(noise)} rows of noise, {n} of them to fit a grid to, leave none to check it; give more")
    trust = 0.0
    if reference is not None and reference.shape != noise.shape:
        raise UserError(f"reference is {tuple(reference.shape)}, and noise {tuple(noise.shape)}; they must be alike")
    if reference is None:
        say(f"a fine solve of {len(noise)} rows in about {FINE} steps")
        reference, trust = fine_solve(velocity, noise, last=last, first=first)
    contest = _Contest(velocity, noise, reference, n)
    learnt = plan(contest.few, contest.start, steps, rows=n, last=last, first=first)
    say(f"{len(solvers)} solvers on {len(grids)} hand-made grids and {len(learnt)} planned ones")
    tries = [(name, grid, False) for name, grid in grids.items()]
    tries += [(name, grid, True) for name, grid in learnt.items()]
    found = []
    for solver in solvers:
        own = [contest.judge(solver, *each) for each in tries]
        say(f"{solver}: RMSE {min(map(_error, own)):.3g} on the best of them")
        found += own
    found.sort(key=_error)
    for solver in list(dict.fromkeys(c.sampler for c in found))[:FINALISTS]:
        own = [c for c in found if c.sampler == solver]
        fits = []
        for start in [c for c in own if not c.learnt][:1] + [c for c in own if c.learnt][:1]:
            grid = fit_grid(partial(contest.miss, solver), start.grid)
            fits.append(contest.judge(solver, "tuned", grid, True))
            say(f"{solver}, fitted from {start.name}: RMSE {start.error:.3g} -> {fits[-1].error:.3g}")
        found.append(min(fits, key=_error))
    found.sort(key=lambda c: (c.error, c.name != "tuned"))
    if not math.isfinite(found[0].error):
        raise UserError("no solver reached a finite picture on any grid; is the velocity finite?")
    return Tuning(found, trust)


def _checked(grids: Mapping[str, Sequence[float]], steps: int, first: float) -> dict[str, list[float]]:
    """Grids to set out from, as floats. Raises UserError where there is none, or one that is not of these steps and ends."""
    if not grids:
        raise UserError("grids is empty; name one, or leave it out for the hand-made ones")
    for name, grid in grids.items():
        times = check_grid(grid)
        if (len(times) - 1, times[0], times[-1]) != (steps, first, 0.0):
            has = f"{len(times) - 1} steps from {times[0]} to {times[-1]}"
            raise UserError(f"grid {name!r} has {has}; {steps} steps from {first} to 0.0 are tuned")
    return {name: check_grid(grid) for name, grid in grids.items()}


class _Contest:
    """Endpoints against those to reach. few, start: velocity and noise of the fitted rows, or of all without `take`."""

    def __init__(self, velocity: Velocity, noise: Tensor, reference: Tensor, fitted: int) -> None:
        self.velocity, self.noise, self.reference, self.fitted = velocity, noise, reference, fitted
        take = getattr(velocity, "take", None)
        self.few = velocity if take is None else take(torch.arange(fitted, device=noise.device))
        self.start = noise if take is None else noise[:fitted]

    def judge(self, sampler: str, name: str, grid: Sequence[float], learnt: bool) -> Candidate:
        solution = resolve("sampler", sampler)(self.velocity, self.noise, grid)
        squares = (solution.x - self.reference).unsqueeze(-1).flatten(1).square().mean(1).cpu().double()
        parts = squares[: self.fitted], squares[self.fitted :]
        error, held_out = (rmse if math.isfinite(rmse := part.mean().sqrt().item()) else math.inf for part in parts)
        return Candidate(sampler, name, list(grid), solution.nfe, error, held_out, learnt)

    def miss(self, sampler: str, grid: Sequence[float]) -> Tensor:
        x = resolve("sampler", sampler)(self.few, self.start, grid).x
        return (x[: self.fitted] - self.reference[: self.fitted]).flatten()


@torch.no_grad()
def plan(
    velocity: Velocity, noise: Tensor, steps: int, *, rows: int, last: float = 0.0, first: float = 1.0
) -> dict[str, list[float]]:
    """Grids of so many steps whose Euler steps, each begun on a fine trajectory, end nearest to it; by name.

    The cost of a step is the mean squared distance at its end; the sum before it counts with a weight, one grid for each
    of WEIGHTS: below 1 errors made late cost more, above 1 errors made early. rows: only the first so many count.
    """
    times = fine_times(PLANNED, last, first)
    if steps >= len(times) - 1:
        return {}
    states = heun(velocity, noise, times, record=True).checked().trajectory.states  # type: ignore[union-attr]
    rows = min(rows, PLAN_ROWS)
    path = torch.stack([state[:rows] for state in states])
    costs = torch.full((len(times), len(times)), math.inf, dtype=torch.float64, device="cpu")
    for i, (t, state) in enumerate(zip(times[:-1], states, strict=False)):
        v = evaluate(velocity, state, t)[:rows]
        lengths = torch.tensor(times[i + 1 :], device="cpu").to(v) - t
        ends = path[i] + lengths.view(-1, *[1] * v.dim()) * v
        costs[i, i + 1 :] = (ends - path[i + 1 :]).flatten(1).square().mean(1).cpu().double()
    return {f"planned {weight}": [times[i] for i in _cheapest(costs, steps, weight)] for weight in WEIGHTS}


def _cheapest(costs: Tensor, steps: int, weight: float) -> list[int]:
    """The way from the first node to the last, in so many steps, of least cost: c_1 w^(n-1) + ... + c_n."""
    total, froms = torch.full((len(costs),), math.inf, dtype=torch.float64, device="cpu"), []
    total[0] = 0
    for _ in range(steps):
        total, before = (weight * total.unsqueeze(1) + costs).min(0)
        froms.append(before)
    way = [len(costs) - 1]
    for before in froms[::-1]:
        way.append(int(before[way[-1]]))
    return way[::-1]


def fine_times(steps: int, last: float, first: float = 1.0) -> list[float]:
    """Fine times, about so many: three quarters of them equal in time, a quarter in log-SNR; none between last and 0."""
    if not 0 <= last < first:
        raise UserError(f"last = {last} is not within 0 .. {first}; 0.0 lets the fine solve go all the way")
    times = {*uniform(steps - steps // 4), *log_snr_uniform(steps // 4)}
    return sorted({0.0, last, first, *(t for t in times if last < t < first)}, reverse=True)


@torch.no_grad()
def fit_grid(miss: Callable[[Sequence[float]], Tensor], grid: Sequence[float]) -> list[float]:
    """The interior times of a grid that ends at 0, moved to where the sum of squares of miss(grid) is least nearby.

    miss: a grid to a vector, such as endpoints less the wanted ones. Levenberg-Marquardt (Marquardt 1963) in the
    logarithms of the steps, whose sum is held, so that every trial is a falling grid. Never worse than it began.
    """
    u = (-torch.tensor(list(grid), dtype=torch.float64, device="cpu").diff()).log()
    best, residual, damping = list(grid), miss(grid), 1e-2
    least = _squares(residual)
    for _ in range(ITERATIONS if len(u) > 1 else 0):
        bumps = DELTA * torch.eye(len(u), dtype=torch.float64, device="cpu")
        jacobian = torch.stack([(miss(_grid_of(u + bump, grid[0])) - residual) / DELTA for bump in bumps])
        normal, slope = (product.cpu().double() for product in (jacobian @ jacobian.T, jacobian @ residual))
        if not normal.isfinite().all():
            break
        scale = normal.diagonal().clamp(min=1e-9 * float(normal.diagonal().max()) + 1e-30).diag()
        before = least
        while damping < 1e6:
            trial = u - torch.linalg.solve(normal + damping * scale, slope)
            trial = (trial - trial.mean()).clamp(-WIDEST, WIDEST)
            moved = _grid_of(trial, grid[0])
            missed = miss(moved)
            if (now := _squares(missed)) < least:
                u, best, residual, least, damping = trial, moved, missed, now, damping / 10
                break
            damping *= 4
        if not before - least > ENOUGH * before:
            break
    return best


def _grid_of(u: Tensor, first: float) -> list[float]:
    """The grid from its first time to 0 whose steps have these logarithms, but for what makes their sum right."""
    return [first, *(first * u.softmax(0).flip(0).cumsum(0).flip(0)[1:]).tolist(), 0.0]


def _squares(residual: Tensor) -> float:
    return float(residual.square().sum())


@api_export("fine_solve")
@torch.no_grad()
def fine_solve(
    velocity: Velocity, noise: Tensor, *, steps: int = FINE, last: float = 0.0, first: float = 1.0
) -> tuple[Tensor, float]:
    """The endpoints of noise at the time `first`, by Heun's method in many steps, finer at both ends, and their own RMSE.

    last: the time from which one Euler step goes to 0, that is, where the predicted picture is taken; for a velocity
    which below it does not lead to that picture, such as one of x-prediction below its t_min. The error is estimated by
    every second time alone: a third of the distance to where that leads, the order being two. Raises UserError for NaN.
    """
    times = fine_times(steps, last, first)
    x, coarse = (heun(velocity, noise, grid).checked().x for grid in (times, [*times[:-2:2], *times[-2:]]))
    return x, (x - coarse).square().mean().sqrt().item() / 3


def hand_made(steps: int, last: float = 0.0, first: float = 1.0) -> dict[str, list[float]]:
    """The registered grids of that many steps from `first` on, and "shifted" at some shifts, by name; none twice.

    With a last time as in `fine_solve`, each also of one step less, squeezed into first .. last, and a step to 0.
    """

    def make(n: int) -> dict[str, list[float]]:
        grids = {name: resolve("grid", name)(n) for name in ("uniform", *names("grid"))}
        return grids | {f"shifted {shift}": shifted(n, shift) for shift in SHIFTS}

    grids = {name: [first * t for t in grid] for name, grid in make(steps).items()}
    if last and steps > 1:
        squeezed = {name: [last + (first - last) * t for t in grid[1:]] for name, grid in make(steps - 1).items()}
        grids |= {f"{name}, last {last}": [first, *times, 0.0] for name, times in squeezed.items()}
    named: dict[tuple[float, ...], str] = {}
    for name, grid in grids.items():
        named.setdefault(tuple(grid), name)
    return {name: list(grid) for grid, name in named.items()}


def evaluations(sampler: str, steps: int) -> int:
    """How many evaluations an ODE solver makes on so many fixed steps. Raises UserError for any other sampler."""
    solve = resolve("sampler", sampler)
    if sampler not in (known := fixed_step()):
        raise UserError(f"{sampler} is not an ODE solver of fixed steps.{nearest(sampler, known)}")
    return solve(lambda x, t: torch.zeros_like(x), torch.zeros(1, 1, device="cpu"), uniform(steps)).nfe


def steps_within(sampler: str, nfe: int) -> int | None:
    """The most steps that a fixed-step solver makes in so many evaluations; none where it makes not even the fewest."""

    def cost(steps: int) -> int:
        with suppress(UserError):  # fewer steps than a multistep method needs
            return evaluations(sampler, steps)
        return 0

    steps = bisect_right(range(1, nfe + 1), nfe, key=cost)
    return steps if steps and cost(steps) else None


def fixed_step() -> list[str]:
    """The names of the ODE solvers of fixed steps, each under one name."""
    tags = {name: tag_of(resolve("sampler", name)) for name in names("sampler")}
    return [n for n, tag in tags.items() if tag and tag.names[0] == n and tag.metadata.get("family") == "ode"]


def _one_a_step(steps: int) -> list[str]:
    """The fixed-step solvers that take so few steps at one evaluation each."""
    found = []
    for name in fixed_step():
        with suppress(UserError):  # a multistep method that needs more steps
            found += [name] if evaluations(name, steps) == steps else []
    return found


def _error(candidate: Candidate) -> float:
    return candidate.error
