"""Gradients through the solve of a continuous flow: dx/dt = v(x, t), with integrals q = int r(x, t) dt along its path.

Three ways, one signature:

    solved = checkpointed(dynamics, x, parameters, Stepping(rtol=1e-5))  # solved.x, solved.q, solved.nfe
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genflow.flows.bijections.jacobian import check_plain, first_only
from genflow.flows.stepping import March, Step, Stepping, accumulate, march
from genflow.native.library import uncompiled
from genflow.registry import api_export
from genflow.versions import version

Dynamics = Callable[[Tensor, float, bool], tuple[Tensor, Tensor | None]]
"""dynamics(x, t, rates) -> v like x, and r, B x K, or None where rates is false; differentiable in x and parameters."""


class Solved(NamedTuple):
    """x: the end; q: B x K, the integrals; nfe: evaluations of the dynamics."""

    x: Tensor
    q: Tensor
    nfe: int


@api_export("checkpointed")
def checkpointed(
    dynamics: Dynamics,
    x: Tensor,
    parameters: Sequence[Tensor] = (),
    stepping: Stepping | None = None,
    *,
    start: float = 0.0,
    end: float = 1.0,
) -> Solved:
    """Discretise, then optimise: the exact gradient of the steps that were taken, their sizes held constant.

    The states of the stages are kept, and nothing of the evaluations: the backward does each again, with its graph, and
    goes through the Runge-Kutta formula by hand (Hager 2000, "Runge-Kutta methods in optimal control"; Zhuang et al. 2020,
    arXiv 2006.02493). Memory: one evaluation's graph, and s states a step. As of all three, first gradients only.

    dynamics: see `Dynamics`; it may close over parameters, which are all tensors but x that gradients are wanted for, such
    as a network's parameters and a condition. Raises UserError as `march` does, for gradients of gradients, and under
    torch.func's transforms.
    """
    return _solve(_Checkpointed, dynamics, x, parameters, stepping, start, end)


@api_export("adjoint")
def adjoint(
    dynamics: Dynamics,
    x: Tensor,
    parameters: Sequence[Tensor] = (),
    stepping: Stepping | None = None,
    *,
    start: float = 0.0,
    end: float = 1.0,
) -> Solved:
    """The continuous adjoint (Chen et al. 2018, arXiv 1806.07366): x and a = dL/dx are solved for, backwards.

    da/dt = -(a dv/dx + dL/dq dr/dx), and the parameters' gradients are integrals, which do not choose the steps (Kidger
    et al. 2021, arXiv 2009.09457). Memory: one evaluation's graph. The gradient has the error of both solves, and the path
    back may leave the path there. Arguments as `checkpointed`.
    """
    return _solve(_Adjoint, dynamics, x, parameters, stepping, start, end)


@api_export("interpolated")
def interpolated(
    dynamics: Dynamics,
    x: Tensor,
    parameters: Sequence[Tensor] = (),
    stepping: Stepping | None = None,
    *,
    start: float = 0.0,
    end: float = 1.0,
) -> Solved:
    """The adjoint a solved backwards on the interpolated path there (Daulbaev et al. 2020, arXiv 2003.05271).

    The path is the pair's own interpolant, or Hermite's cubic. Memory: one evaluation's graph, and four states a step.
    Arguments as `checkpointed`.
    """
    return _solve(_Interpolated, dynamics, x, parameters, stepping, start, end)


GRADIENTS = {"checkpoint": checkpointed, "adjoint": adjoint, "interpolated": interpolated}


@uncompiled
def _solve(
    function: type[_Backward],
    dynamics: Dynamics,
    x: Tensor,
    parameters: Sequence[Tensor],
    stepping: Stepping | None,
    start: float,
    end: float,
) -> Solved:
    check_plain("a solve")
    stepping = stepping or Stepping()
    stepping.check(x.dtype)
    wanted = [p for p in parameters if p.requires_grad]
    x_end, q, nfe = function.apply(dynamics, stepping, start, end, x, *wanted)
    return Solved(x_end, q, nfe)


class _Backward(torch.autograd.Function):
    """What the three have in common: the solve there, and evaluations with their gradients on the way back."""

    @classmethod
    def forward(
        cls, ctx: Any, dynamics: Dynamics, stepping: Stepping, start: float, end: float, x: Tensor, *wanted: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        def field(y: Tensor, t: float, rates: bool) -> tuple[Tensor, Sequence[Tensor]]:
            with ctx.autocast():
                v, r = dynamics(y, t, rates)
            return v, () if r is None else (r,)

        ctx.dynamics, ctx.stepping, ctx.start, ctx.end, ctx.wanted = dynamics, stepping, start, end, wanted
        ctx.autocast = _autocast(x)
        ctx.set_materialize_grads(False)  # where q is not in the loss, nothing of it is computed on the way back
        backward = any(ctx.needs_input_grad)
        x = x.clone() if backward else x  # the first state is kept, and the caller may write into x
        solved = march(field, x, start, end, stepping, cls.keep(stepping) if backward else None)
        if backward:
            ctx.arrived, ctx.versions = solved.y.detach(), [version(p) for p in wanted]
            cls.remember(ctx, solved)
        return solved.y, solved.integrals[0], solved.nfe

    @staticmethod
    def keep(stepping: Stepping) -> Callable[[Step], Any] | None:
        """What the way back needs of a step."""
        return None

    @staticmethod
    def remember(ctx: Any, solved: March) -> None:
        """What it needs of the whole."""

    @staticmethod
    def pull(
        ctx: Any, x: Tensor, t: float, grad_v: Tensor, grad_r: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """v at (x, t), and the gradients of grad_v v + grad_r r to x and to the parameters. grad_r None: v alone."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            with ctx.autocast():
                v, r = ctx.dynamics(x, t, grad_r is not None)
            pairs = [(v, grad_v)] if r is None else [(v, grad_v), (r, grad_r)]
            pairs = [pair for pair in pairs if pair[0].requires_grad]
            inputs = [x, *ctx.wanted]
            if not pairs:
                return v.detach(), torch.zeros_like(x), [torch.zeros_like(p) for p in ctx.wanted]
            outputs, grads = [p[0] for p in pairs], [p[1] for p in pairs]
            dx, *rest = torch.autograd.grad(outputs, inputs, grads, allow_unused=True, materialize_grads=True)
        return v.detach(), dx, rest


class _Checkpointed(_Backward):
    @staticmethod
    def keep(stepping: Stepping) -> Callable[[Step], Any]:
        return lambda step: (step.t, step.h, step.stages)

    @staticmethod
    def remember(ctx: Any, solved: March) -> None:
        ctx.steps = solved.kept

    @staticmethod
    @first_only("a solve")
    def backward(ctx: Any, grad_x: Tensor | None, grad_q: Tensor | None, grad_nfe: None) -> tuple[Tensor | None, ...]:
        """k_i' = h (b_i x' + sum_j>i a_ji x_j'), x_i' = k_i' dv/dx + h b_i q' dr/dx, and x' gains the sum of the x_i'."""
        _check_unchanged(ctx)
        tableau = ctx.stepping.tableau
        grad_x = torch.zeros_like(ctx.arrived) if grad_x is None else grad_x
        total = [torch.zeros_like(p) for p in ctx.wanted]
        count = len(tableau.b)
        # Column i: what the stages after i have of stage i; then what the step has.
        columns = [[*(row[i] for row in tableau.a[i + 1 :]), tableau.b[i]] for i in range(count)]
        weights = [grad_x.new_tensor(column) for column in columns]
        grads = grad_x.new_zeros(count + 1, *grad_x.shape)  # x_i', and x' last
        flat = grads.flatten(1).t()
        grads[-1] = grad_x
        for t, h, stages in reversed(ctx.steps):
            for i in reversed(range(count)):
                slope = (h * torch.mv(flat[:, i + 1 :], weights[i])).view_as(grad_x)
                rate = grad_q * (h * tableau.b[i]) if tableau.b[i] and grad_q is not None else None
                _, dx, found = _Backward.pull(ctx, stages[i], t + tableau.c[i] * h, slope, rate)
                grads[i] = dx
                accumulate(total, found)
            grads[-1] = grads.sum(0)
        return None, None, None, None, grads[-1].clone(), *total


class _Adjoint(_Backward):
    @staticmethod
    @first_only("a solve")
    def backward(ctx: Any, grad_x: Tensor | None, grad_q: Tensor | None, grad_nfe: None) -> tuple[Tensor | None, ...]:
        a, rate, scale = _scaled(ctx, grad_x, grad_q)

        def field(y: Tensor, t: float, rates: bool) -> tuple[Tensor, Sequence[Tensor]]:
            v, dx, found = _Backward.pull(ctx, y[:, 0], t, y[:, 1], rate)
            return torch.stack([v, -dx], 1), [-each for each in found] if rates else ()

        y = torch.stack([ctx.arrived, a], 1)
        solved = march(field, y, ctx.end, ctx.start, ctx.stepping)
        return None, None, None, None, solved.y[:, 1] * scale, *(each * scale for each in solved.integrals)


class _Interpolated(_Backward):
    @staticmethod
    def keep(stepping: Stepping) -> Callable[[Step], Any]:
        dense = stepping.tableau.dense if stepping.steps is None else ()

        def piece(step: Step) -> tuple[float, float, list[Tensor]]:
            x, slopes = step.stages[0], step.slopes
            rest = torch.tensordot(slopes.new_tensor(dense), slopes, 1) * step.h if dense else torch.zeros_like(x)
            return step.t, step.h, [x, step.h * slopes[0], rest]

        return piece

    @staticmethod
    def remember(ctx: Any, solved: March) -> None:
        with ctx.autocast():
            v, _ = ctx.dynamics(solved.y, ctx.end, False)
        solved.nfe += 1
        ctx.path = _Path(solved, v)

    @staticmethod
    @first_only("a solve")
    def backward(ctx: Any, grad_x: Tensor | None, grad_q: Tensor | None, grad_nfe: None) -> tuple[Tensor | None, ...]:
        a, rate, scale = _scaled(ctx, grad_x, grad_q)

        def field(y: Tensor, t: float, rates: bool) -> tuple[Tensor, Sequence[Tensor]]:
            _, dx, found = _Backward.pull(ctx, ctx.path(t), t, y, rate)
            return -dx, [-each for each in found] if rates else ()

        solved = march(field, a, ctx.end, ctx.start, ctx.stepping)
        return None, None, None, None, solved.y * scale, *(each * scale for each in solved.integrals)


class _Path:
    """The states of a solve at any time: of each step Hermite's cubic, and the rest of the pair's quartic."""

    def __init__(self, solved: March, last: Tensor) -> None:
        self.pieces = solved.kept
        self.way = math.copysign(1, self.pieces[0][1])
        self.keys = [self.way * t for t, _, _ in self.pieces]
        self.ends = [*((x, slope / h) for _, h, (x, slope, _) in self.pieces[1:]), (solved.y.detach(), last)]

    def __call__(self, t: float) -> Tensor:
        i = max(bisect_right(self.keys, self.way * t) - 1, 0)
        begin, h, (x, slope, rest) = self.pieces[i]
        end, last = self.ends[i]
        theta, line = (t - begin) / h, end - x
        first, second = slope - line, line - h * last
        bend = first + theta * (second - first) + theta * (1 - theta) * rest
        return x + theta * (line + (1 - theta) * bend)


def _scaled(ctx: Any, grad_x: Tensor | None, grad_q: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients at the end over their size, and the size: so that the tolerance is relative to it."""
    _check_unchanged(ctx)
    grad_x = torch.zeros_like(ctx.arrived) if grad_x is None else grad_x
    size = grad_x.square().mean()
    size = (size if grad_q is None else torch.maximum(size, grad_q.square().mean())).sqrt()
    size = torch.where(size > 0, size, 1.0)
    return grad_x / size, None if grad_q is None else grad_q / size, size


def _check_unchanged(ctx: Any) -> None:
    """As autograd does of what it keeps itself: the backward evaluates the dynamics again."""
    if [version(p) for p in ctx.wanted] != ctx.versions:
        raise RuntimeError("a parameter of a solve was changed between its forward and its backward")


def _autocast(x: Tensor) -> Callable[[], AbstractContextManager]:
    """The autocast of now, for later; without its cache, whose casts made without gradients would lose them."""
    kind = x.device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
