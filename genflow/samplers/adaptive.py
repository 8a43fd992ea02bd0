"""Adaptive Runge-Kutta solvers with a step size per sample: every row of the batch is a solve of its own.

Embedded pairs with FSAL, a step size controller of the PI kind and dense output, after Hairer, Norsett & Wanner, Solving
Ordinary Differential Equations I, II.4 to II.6 ("II.4" below), and Gustafsson 1991, "Control theoretic techniques for
stepsize selection in explicit Runge-Kutta methods". The state is float32 (float64 where x is), whatever the network
computes in. Gradients flow through the steps; their sizes are constants to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genflow.errors import UserError, check_whole
from genflow.registry import sampler_export
from genflow.samplers.fixed_point import check_seen
from genflow.samplers.solution import (
    Progress,
    Solution,
    StepStatistics,
    Trajectory,
    Velocity,
    answer,
    check_grid,
    edges_of,
    state,
)
from genflow.samplers.tableaus import BOSH3, DOPRI5, TSIT5, Pair

SAFETY = math.log(0.9)  # steps aim at this share of the size that would meet the tolerance
SHRINK, GROW = math.log(0.2), math.log(10)  # the limits of one change of the size
LEAST = math.log(0.01)  # the smallest error that the controller remembers: a first step may be far too small
WASTE = 1 / 8  # the share of finished rows that a batch may carry before it is compacted


@sampler_export("bosh3", family="adaptive", order=3)
def bosh3(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    max_steps: int = 1000,
    compact: bool | None = None,
    progress: Progress | None = None,
    record: bool = False,
) -> Solution:
    """Bogacki & Shampine's pair of orders 3(2), for loose tolerances: 3 evaluations a step, and 2 to begin; as dopri5."""
    return _Solve(BOSH3, velocity, x, grid, rtol, atol, max_steps, compact, progress, record).solution()


@sampler_export("dopri5", family="adaptive", order=5)
def dopri5(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    max_steps: int = 1000,
    compact: bool | None = None,
    progress: Progress | None = None,
    record: bool = False,
) -> Solution:
    """Dormand & Prince's pair of orders 5(4), known as RK45: 6 evaluations a step, taken or not, and 2 to begin.

    velocity: called as velocity(x, t) with another time t for each row. Where it has `edges`, every row's steps end at
    them. grid: two times or more, strictly falling or rising: the solve goes from the first to the last, and `record`
    gives the states at all, interpolated; the inner times do not touch the steps. rtol, atol: of the root mean square over
    a row of error / (atol + rtol |x|), so that no row's answer depends on its batch mates. compact: whether rows that
    arrived leave the batch; True says that velocity is a function of any number of rows, None (the default) leaves it to
    velocity.take. progress: told the per cent of the way, of 100.

    A row stops where it is after max_steps steps, at a step below what the dtype resolves, and where the velocity is not
    finite after however small a step; the others go on, and status says which and why. statistics: the steps of each.

    Raises UserError for a grid, rtol, atol or max_steps that cannot be. rtol must be 8 eps of the state's dtype or more,
    9.5e-7 for float32: an error estimate below that would measure the rounding of the stages.
    """
    return _Solve(DOPRI5, velocity, x, grid, rtol, atol, max_steps, compact, progress, record).solution()


@sampler_export("tsit5", family="adaptive", order=5)
def tsit5(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    max_steps: int = 1000,
    compact: bool | None = None,
    progress: Progress | None = None,
    record: bool = False,
) -> Solution:
    """Tsitouras' pair of orders 5(4): 6 evaluations a step and 2 to begin, often fewer steps; as dopri5."""
    return _Solve(TSIT5, velocity, x, grid, rtol, atol, max_steps, compact, progress, record).solution()


class _Rows(NamedTuple):
    """Rows of the batch on their way."""

    where: Tensor  # B: which rows of the whole batch they are
    x: Tensor  # B x ...: the last accepted state
    v: Tensor  # B x ...: the velocity there
    t: Tensor  # B: its time
    h: Tensor  # B: the step to try next, signed; 0 for a row that never began
    error: Tensor  # B: of the last step tried, in tolerances; inf where it was not finite
    memory: Tensor  # B: what the PI controller knows of the last accepted error
    accepted: Tensor  # B: steps
    attempts: Tensor  # B: steps, accepted or not
    starts: Tensor  # B: one, and one more for every edge passed

    def take(self, rows: Tensor) -> _Rows:
        return _Rows(*(field[rows] for field in self))

    def put(self, part: _Rows) -> _Rows:
        return _Rows(*(whole.index_copy(0, part.where, field) for whole, field in zip(self, part, strict=True)))


class _Record:
    """The states at the times of the grid, interpolated from the steps that pass them."""

    def __init__(self, pair: Pair, x: Tensor, grid: list[float], inner: list[float]) -> None:
        self.pair, self.grid, self.begin = pair, grid, x.clone()
        self.times = x.new_tensor(inner).unsqueeze(1)
        self.states = x.detach().repeat(len(inner), *[1] * x.dim()).view(len(inner), *x.shape)
        self.counts = torch.zeros(len(inner), len(x), dtype=torch.int64, device=x.device)  # of evaluations

    def add(self, rows: _Rows, k: list[Tensor], x: Tensor, t: Tensor, accept: Tensor, evaluations: Tensor) -> None:
        """A step of all rows, to x at t with the stages k: Hermite's cubic, and the rest of the pair's quartic (II.6)."""
        passed = accept & ((self.times - rows.t) * (self.times - t) <= 0)
        times, who = passed.nonzero(as_tuple=True)
        column, h = (-1, *[1] * (x.dim() - 1)), t - rows.t
        theta, where = ((self.times[times, 0] - rows.t[who]) / h[who]).view(column), rows.where[who]
        h, line = h.view(column), x - rows.x
        first, last = torch.addcmul(-line, h, k[0]), torch.addcmul(line, h, k[-1], value=-1)
        bend = torch.addcmul(first[who], theta, (last - first)[who])
        if self.pair.dense:
            factor, mix = _mix(self.pair.dense, k)
            bend.addcmul_(theta * (1 - theta), (h * mix)[who], value=factor)
        self.states[times, where] = torch.addcmul(rows.x[who], theta, torch.addcmul(line[who], 1 - theta, bend))
        self.counts[times, where] = evaluations[who]

    def trajectory(self, x: Tensor, nfe: int) -> Trajectory:
        """Rows that stopped stay where they did. x: the last states."""
        reached = (self.counts > 0).view(*self.counts.shape, *[1] * (x.dim() - 1))
        counts = [max(each, default=0) or nfe for each in self.counts.tolist()]
        states = torch.where(reached, self.states, x).unbind()
        return Trajectory(self.grid, [self.begin, *states, x], [0, *counts, nfe])


class _Solve:
    """One solve: what is the same for all rows and all steps, and the record."""

    def __init__(
        self,
        pair: Pair,
        velocity: Velocity,
        x: Tensor,
        grid: Sequence[float],
        rtol: float,
        atol: float,
        max_steps: int,
        compact: bool | None,
        progress: Progress | None,
        record: bool,
    ) -> None:
        self.pair, self.velocity, self.x, self.grid = pair, velocity, state(x), check_grid(grid)
        _check(self.x.dtype, rtol, atol, max_steps)
        self.max_steps, self.progress = max_steps, progress
        self.compact = hasattr(velocity, "take") if compact is None else compact
        self.steps = 0
        self.alpha, self.beta = 0.7 / pair.order, 0.4 / pair.order  # Gustafsson's: k_I = 0.3 / k, k_P = 0.4 / k
        self.column, self.size = (-1, *[1] * (x.dim() - 1)), math.prod(x.shape[1:])
        # The norm of a row is a root mean square: the root of its size goes into the tolerances.
        self.rtol, self.atol = rtol * self.size**0.5, self.x.new_full((), atol * self.size**0.5)

        self.begin, *inner, self.end = self.x.new_tensor(self.grid, device="cpu").tolist()
        lo, hi = sorted((self.begin, self.end))
        # Stages keep away from an edge by what rounding moves a time: so every one sees the velocity of its own side.
        self.gap = math.copysign(4 * torch.finfo(self.x.dtype).eps * max(-lo, hi), self.end - self.begin)
        # From an edge itself a solve begins beyond it: an error estimate hardly sees its first stage.
        for edge in edges_of(velocity):
            if -1 < (edge - self.begin) / self.gap <= 2:
                self.begin = self.x.new_tensor(edge + self.gap, device="cpu").item()
        edges = (t for t in edges_of(velocity) if lo + 2 * abs(self.gap) < t < hi - 2 * abs(self.gap))
        self.edges = sorted(edges, reverse=self.end < self.begin)
        for edge in self.edges:
            inner = [edge - self.gap if abs(t - edge) <= abs(self.gap) else t for t in inner]
        self.record = _Record(pair, self.x, self.grid, inner) if record else None

    def solution(self) -> Solution:
        zero = self.x.new_zeros(len(self.x))
        none = torch.zeros_like(zero, dtype=torch.int64)
        where = torch.arange(len(self.x), device=self.x.device)
        rows = _Rows(where, self.x, self.x, zero + self.begin, zero, zero, zero, none, none, none)

        start = self.begin
        for edge in self.edges:
            near, far = self.x.new_tensor([edge - self.gap, edge + self.gap], device="cpu").tolist()
            rows = self._cross(rows, start, near)
            here = rows.t == near
            x = torch.where(here.view(self.column), rows.x + (far - near) * rows.v, rows.x)
            rows, start = rows._replace(x=x, t=torch.where(here, far, rows.t)), far
        rows = self._cross(rows, start, self.end)

        evaluations = self._evaluations(rows)
        nfe = int(evaluations.max()) if len(evaluations) else 0
        trajectory = self.record.trajectory(rows.x, nfe) if self.record is not None else None
        statistics = StepStatistics(rows.accepted, rows.attempts - rows.accepted, evaluations)
        return Solution(rows.x, nfe, trajectory, statistics, _stopped=self._reasons(rows))

    def _cross(self, rows: _Rows, start: float, end: float) -> _Rows:
        """All rows that stand at start go to end, between which the velocity is smooth."""
        velocity, here = self.velocity, rows.t == start
        v = answer(velocity, rows.x, rows.t)
        h = self._first_step(rows.x, v, start, end)
        begins = here & (h.abs() > 0)  # not where h is NaN
        whole = rows = rows._replace(
            v=v,
            h=torch.where(begins, h, 0),
            error=torch.where(here & ~begins, math.inf, rows.error),
            memory=torch.full_like(h, SAFETY),
            starts=rows.starts + here,
        )
        clip, goal = torch.minimum if end > start else torch.maximum, self.x.new_full((), end)
        while True:
            # Not there yet, and the dtype resolves an eighth of the step.
            live = clip(torch.add(rows.t, rows.h, alpha=1 / 8), goal) != rows.t
            if self.steps >= self.max_steps:
                live &= rows.attempts < self.max_steps
            left = (goal - rows.t) / rows.h
            t = torch.where(left < 2, left / 2, 1.0).mul_(rows.h).add_(rows.t)  # the last two steps are of one size
            t = torch.where(live, torch.where(left < 1.01, goal, t), rows.t)  # the others stay, with steps of 0
            check_seen(live, "an adaptive solver")
            running = int(torch.count_nonzero(live))  # the only wait for the device
            if running == 0:
                return rows if len(rows.t) == len(whole.t) else whole.put(rows)
            if self.compact and running <= (1 - WASTE) * len(live):
                keep = live.nonzero().squeeze(1)
                whole, rows, t, live = whole.put(rows), rows.take(keep), t[keep], live[keep]
                velocity = self.velocity.take(rows.where) if hasattr(self.velocity, "take") else self.velocity
            rows = self._step(velocity, rows, t, live)
            self.steps += 1
            if self.progress is not None:
                way = float(((rows.t - self.begin) / (self.end - self.begin)).sum()) + len(self.x) - len(rows.t)
                self.progress(int(100 * way / len(self.x)), 100)

    def _step(self, velocity: Velocity, rows: _Rows, t: Tensor, live: Tensor) -> _Rows:
        """Every row tries a step to its t. Those whose error is in tolerance take it; all choose the next one's size."""
        h = t - rows.t
        column, k, x = h.view(self.column), [rows.v], rows.x
        for c, weights in zip(self.pair.c, self.pair.a, strict=True):
            scale, mix = _mix(weights, k)
            x = torch.addcmul(rows.x, column, mix, value=scale)
            k.append(answer(velocity, x, t if c == 1 else torch.add(rows.t, h, alpha=c)))

        with torch.no_grad():
            scale, mix = _mix(self.pair.error, k)
            error = self._norm(mix, torch.maximum(rows.x.abs(), x.abs())).mul_(h).mul_(scale).abs_()
            error.nan_to_num_(nan=math.inf, posinf=math.inf)
            accept = (error <= 1) & live
            # The next step is h SAFETY error^-alpha error_before^beta, in logarithms: memory is what the step before gave
            # to it. A refused one shrinks by error^(-1 / k), and leaves the least memory, so that growth is careful.
            log = error.log()
            steady = torch.add(rows.memory, log, alpha=-self.alpha)
            factor = steady.sub_(log.relu(), alpha=1 / self.pair.order - self.alpha).clamp_(SHRINK, GROW).exp_()
            memory = log.clamp_(min=LEAST).mul_(self.beta).add_(SAFETY)
        if self.record is not None:
            self.record.add(rows, k, x, t, accept, self._evaluations(rows) + len(self.pair.c))
        column = accept.view(self.column)
        return rows._replace(
            x=torch.where(column, x, rows.x),
            v=torch.where(column, k[-1], rows.v),
            t=torch.where(accept, t, rows.t),
            h=h * factor,
            error=torch.where(live, error, rows.error),
            memory=torch.where(accept, memory, SAFETY + self.beta * LEAST),
            accepted=rows.accepted + accept,
            attempts=rows.attempts + live,
        )

    def _first_step(self, x: Tensor, v: Tensor, start: float, end: float) -> Tensor:
        """The size of a first step (II.4, a to f), which costs an evaluation; NaN where that is not finite."""
        with torch.no_grad():
            way, span, size = math.copysign(1, end - start), abs(end - start), x.abs()
            d0, d1 = self._norm(x, size), self._norm(v, size)
            h = (0.01 * d0 / d1.clamp(min=1e-5)).clamp(1e-6 * span, span)
            ahead = answer(self.velocity, torch.addcmul(x, h.view(self.column), v, value=way), start + way * h)
            bend = torch.maximum(d1, self._norm(ahead - v, size) / h)
            h = ((0.01 / bend) ** (1 / self.pair.order)).minimum(100 * h)
            return h.clamp(8 * torch.finfo(x.dtype).eps * abs(start), span) * way

    def _norm(self, a: Tensor, size: Tensor) -> Tensor:
        """The root mean square of each row of a, in tolerances. size: |x|."""
        scaled = a / torch.add(self.atol, size, alpha=self.rtol)
        return torch.linalg.vector_norm(scaled.reshape(len(a), self.size), dim=1)

    def _evaluations(self, rows: _Rows) -> Tensor:
        return 2 * rows.starts + len(self.pair.c) * rows.attempts

    def _reasons(self, rows: _Rows) -> dict[int, str]:
        """Why rows did not arrive."""
        stuck = (rows.t != self.end).nonzero().squeeze(1)
        if not len(stuck):
            return {}
        fields = (field[stuck].tolist() for field in (rows.where, rows.t, rows.error, rows.attempts))
        reasons = {}
        for row, t, error, attempts in zip(*fields, strict=True):
            if attempts >= self.max_steps:
                reasons[row] = f"stopped at t = {t:.4g} after {attempts} steps"
            elif math.isinf(error):
                reasons[row] = f"stopped at t = {t:.4g}: the velocity is not finite beyond"
            else:
                kind = str(self.x.dtype).removeprefix("torch.")
                reasons[row] = f"step size underflow at t = {t:.4g}: no step of {kind} meets the tolerance"
        return reasons


def _mix(weights: Sequence[float], k: Sequence[Tensor]) -> tuple[float, Tensor]:
    """The sum of w_j k_j as a factor, which the caller's next operation takes in, and a tensor."""
    (factor, total), *rest = ((w, each) for w, each in zip(weights, k, strict=True) if w)
    for i, (w, each) in enumerate(rest):
        total = total.add_(each, alpha=w / factor) if i else total.add(each, alpha=w / factor)
    return factor, total


def _check(dtype: torch.dtype, rtol: float, atol: float, max_steps: int) -> None:
    floor = 8 * torch.finfo(dtype).eps
    if not floor <= rtol < 1:
        wider = "; for less give x as float64" if dtype == torch.float32 and rtol > 0 else ""
        raise UserError(f"rtol = {rtol} is not between {floor:.1e}, the noise of {dtype}, and 1{wider}")
    if not 0 < atol < math.inf:
        raise UserError(f"atol = {atol} must be positive, such as 1e-5; it is the tolerance where x is near 0")
    check_whole(max_steps=max_steps)
