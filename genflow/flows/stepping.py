"""Explicit Runge-Kutta steps that a whole batch takes together, with integrals along the path; the way there is kept.

For solves that gradients go through: every step is one set of evaluations, at times that are plain numbers. Solves without
gradients, where every sample may have steps of its own, are genflow.samplers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genflow.errors import UserError, nearest
from genflow.registry import names
from genflow.samplers.tableaus import BOSH3, DOPRI5, TSIT5, Pair

Field = Callable[[Tensor, float, bool], tuple[Tensor, Sequence[Tensor]]]
"""field(y, t, rates) -> dy/dt like y, and, where rates is true, the rates of the integrals."""


class Tableau(NamedTuple):
    """s stages at t + c h from the weights a, the step from the weights b; error and dense as in a `Pair`, or empty."""

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...] = ()
    dense: tuple[float, ...] = ()


def _of(pair: Pair) -> Tableau:
    return Tableau(pair.order, (0, *pair.c[:-1]), ((), *pair.a[:-1]), pair.a[-1], pair.error, pair.dense)


TABLEAUS = {
    "euler": Tableau(1, (0,), ((),), (1,)),
    "midpoint": Tableau(2, (0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": Tableau(2, (0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk4": Tableau(4, (0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "bosh3": _of(BOSH3),
    "dopri5": _of(DOPRI5),
    "tsit5": _of(TSIT5),
}


@dataclass(frozen=True)
class Stepping:
    """How a solve steps: a solver of TABLEAUS, to the tolerances, or in so many equal steps.

    rtol, atol: of the root mean square over the batch of error / (atol + rtol |x|). steps: None is as many as that takes,
    at most max_steps.
    """

    solver: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int | None = None
    max_steps: int = 1000

    def __post_init__(self) -> None:
        if self.solver not in TABLEAUS:
            if self.solver in names("sampler"):
                why = "gives no gradient, and no divergence along its path"
                raise UserError(f"sampler {self.solver!r} {why}; choose from {', '.join(TABLEAUS)}")
            raise UserError(f"solver {self.solver!r} is unknown.{nearest(self.solver, TABLEAUS)}")
        for name, value in (("steps", self.steps), ("max_steps", self.max_steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise UserError(f"{name} = {value!r} is not a whole number of 1 or more")
        if self.steps is None and not self.tableau.error:
            raise UserError(f"solver {self.solver!r} has no error estimate: give steps, or take dopri5")
        if not 0 < self.atol < math.inf or not 0 < self.rtol < 1:
            raise UserError(
                f"rtol = {self.rtol} and atol = {self.atol} must be positive, such as 1e-5, and rtol below 1"
            )

    @property
    def tableau(self) -> Tableau:
        return TABLEAUS[self.solver]

    def check(self, dtype: torch.dtype) -> None:
        """Raises UserError for a tolerance that arithmetic in dtype cannot meet."""
        floor = noise_floor(dtype)
        if self.steps is None and self.rtol < floor:
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"rtol = {self.rtol} is below {floor:.1e}, the noise of {kind}; raise it or use more bits")


def noise_floor(dtype: torch.dtype) -> float:
    """The least rtol whose error estimate is not the rounding of the stages: 8 eps, or what a network of 16 bits gives."""
    eps = torch.finfo(dtype).eps
    return 8 * eps if dtype in (torch.float32, torch.float64) else 1.28 * eps


@dataclass(frozen=True)
class Step:
    """A step from y at t to t + h. stages: its s states, the first is y; slopes: dy/dt there, and
    after the step where its error is estimated."""

    t: float
    h: float
    stages: list[Tensor]
    slopes: Tensor


@dataclass
class March:
    """Where a march arrived: y, the integrals, evaluations of the field, and what was kept of the steps."""

    y: Tensor
    integrals: list[Tensor]
    nfe: int = 0
    kept: list[Any] = dataclasses.field(default_factory=list)


def march(
    field: Field, y: Tensor, start: float, end: float, stepping: Stepping, keep: Callable[[Step], Any] | None = None
) -> March:
    """Solve dy/dt = field from start to end, and integrate its rates along the way by the same weights.

    Rates are asked for where a stage has a weight. keep: what to keep of each step. Raises UserError where the field is
    not finite, naming the time and the samples, and where the tolerance cannot be met. No autocast but a field's own.
    """
    with torch.autocast(y.device.type, enabled=False):
        return _March(field, y, start, end, stepping, keep).run()


def accumulate(sums: list[Tensor], parts: Sequence[Tensor], weight: float = 1.0) -> None:
    """sums += weight parts, in place."""
    if sums:
        torch._foreach_add_(sums, list(parts), alpha=weight)


class _March:
    def __init__(
        self, field: Field, y: Tensor, start: float, end: float, stepping: Stepping, keep: Callable[[Step], Any] | None
    ) -> None:
        self.field, self.start, self.end, self.stepping, self.keep = field, start, end, stepping, keep
        self.tableau = stepping.tableau
        weights = [*self.tableau.a, self.tableau.b, self.tableau.error]
        width = len(self.tableau.b) + 1
        table = y.new_tensor([[*row, *[0.0] * (width - len(row))] for row in weights])
        self.rows = [row[: len(w)] for row, w in zip(table.unbind(), weights, strict=True)]
        self.y, self.nfe, self.kept = y, 0, list[Any]()

    def run(self) -> March:
        slope, rates = self._evaluate(self.y, self.start, True)
        self.integrals = [torch.zeros_like(rate) for rate in rates]
        if self.stepping.steps is None:
            self._adaptive(slope, rates)
        else:
            self._fixed(slope, rates, self.stepping.steps)
        return March(self.y, self.integrals, self.nfe, self.kept)

    def _evaluate(self, y: Tensor, t: float, rates: bool) -> tuple[Tensor, Sequence[Tensor]]:
        self.nfe += 1
        return self.field(y, t, rates)

    def _try(self, t: float, h: float, slope: Tensor, rates: Sequence[Tensor]) -> tuple[Tensor, Step, list[Tensor]]:
        """A step from the state: where it leads, how, and what it adds to the integrals."""
        tableau, y = self.tableau, self.y
        slopes = y.new_empty(len(tableau.b) + (self.stepping.steps is None), *y.shape)
        flat, stages = slopes.flatten(1).t(), [y]
        slopes[0] = slope
        added = [h * tableau.b[0] * rate for rate in rates]
        for i in range(1, len(tableau.b)):
            stages.append(self._mix(flat, i, h))
            slopes[i], rates = self._evaluate(stages[i], t + tableau.c[i] * h, tableau.b[i] != 0)
            if tableau.b[i]:
                accumulate(added, rates, h * tableau.b[i])
        return self._mix(flat, len(tableau.b), h), Step(t, h, stages, slopes), added

    def _mix(self, flat: Tensor, row: int, h: float) -> Tensor:
        weights = self.rows[row]
        return torch.addmv(self.y.flatten(), flat[:, : len(weights)], weights, alpha=h).view(self.y.shape)

    def _take(self, y: Tensor, step: Step, added: list[Tensor]) -> None:
        self.y = y
        accumulate(self.integrals, added)
        if self.keep is not None:
            self.kept.append(self.keep(step))

    def _fixed(self, slope: Tensor, rates: Sequence[Tensor], steps: int) -> None:
        times = [self.start + (self.end - self.start) * i / steps for i in range(steps)]
        finite = []
        for t, t_next in pairwise([*times, self.end]):
            y, step, added = self._try(t, t_next - t, slope, rates)
            self._take(y, step, added)
            finite.append(step.slopes.flatten(2).sum(2).isfinite())
            if t_next != self.end:
                slope, rates = self._evaluate(y, t_next, True)
        if not bool(torch.stack(finite).all()):  # the only wait for the device
            first = next(i for i, each in enumerate(finite) if not bool(each.all()))
            self._blame(times[first], (self.end - self.start) / steps, finite[first])

    def _adaptive(self, slope: Tensor, rates: Sequence[Tensor]) -> None:
        order, way = self.tableau.order, math.copysign(1, self.end - self.start)
        self._refuse(slope, self.start)
        t, h = self.start, way * self._first_step(slope)
        for _ in range(self.stepping.max_steps):
            left = math.ceil((self.end - t) / h - 1e-9)  # as many steps of one size as reach the end
            h, last = (self.end - t) / left, left == 1
            y, step, added = self._try(t, h, slope, rates)
            slope_next, rates_next = self._evaluate(y, t + h, not last)
            step.slopes[-1] = slope_next
            error = torch.mv(step.slopes.flatten(1).t(), self.rows[-1])
            ratio = abs(h) * float(self._norm(error.view(y.shape), torch.maximum(self.y.abs(), y.abs())))
            if ratio <= 1:
                self._take(y, step, added)
                if last:
                    return
                slope, rates, t = slope_next, rates_next, t + h
                h *= min(10.0, 0.9 * max(ratio, 1e-9) ** (-1 / order))
            else:
                h *= max(0.2, 0.9 * ratio ** (-1 / order))  # 0.2 for inf, and for NaN, which is never the larger
                if abs(h) < 64 * torch.finfo(y.dtype).eps * abs(self.end - self.start):
                    finite = step.slopes.flatten(2).sum(2).isfinite()
                    if not bool(finite.all()):
                        self._blame(t, step.h, finite)
                    raise UserError(f"step size underflow at t = {t:.4g}: no step meets rtol = {self.stepping.rtol}")
        raise UserError(
            f"the solve stopped at t = {t:.4g} after {self.stepping.max_steps} steps; raise max_steps or rtol"
        )

    def _first_step(self, slope: Tensor) -> float:
        """Hairer, Norsett & Wanner I, II.4, for which one evaluation is made."""
        way, span = math.copysign(1, self.end - self.start), abs(self.end - self.start)
        size = self.y.abs()
        d0, d1 = torch.stack([self._norm(self.y, size), self._norm(slope, size)]).tolist()
        h = min(max(0.01 * d0 / max(d1, 1e-5), 1e-6 * span), span)
        ahead, _ = self._evaluate(torch.add(self.y, slope, alpha=way * h), self.start + way * h, False)
        bend = max(d1, float(self._norm(ahead - slope, size)) / h, 1e-15)
        return min((0.01 / bend) ** (1 / self.tableau.order), 100 * h, span)

    def _norm(self, a: Tensor, size: Tensor) -> Tensor:
        scaled = a / torch.add(size * self.stepping.rtol, self.stepping.atol)
        return torch.linalg.vector_norm(scaled) / math.sqrt(max(scaled.numel(), 1))

    def _refuse(self, slope: Tensor, t: float) -> None:
        finite = slope.unsqueeze(0).flatten(2).sum(2).isfinite()
        if not bool(finite.all()):
            self._blame(t, 0.0, finite)

    def _blame(self, t: float, h: float, finite: Tensor) -> None:
        """Raises UserError naming the first stage that is not finite. finite: stages x rows."""
        stage = int(finite.all(1).logical_not().int().argmax())
        rows = finite[stage].logical_not().nonzero().flatten().tolist()
        which = ", ".join(map(str, rows[:16])) + (" ..." if len(rows) > 16 else "")
        at = t + h * (*self.tableau.c, 1)[stage]
        raise UserError(
            f"the velocity is not finite (NaN or inf) at t = {at:.4g}; samples {which} of {finite.shape[1]}"
        )
