"""Exponential multistep solvers of the straight path: DPM-Solver++, UniPC and DEIS. One evaluation per step.

With alpha = 1 - t, sigma = t and lambda = log(alpha / sigma), the flow from s to t is (DPM-Solver++, proposition 4.1)

    x_t = sigma_t / sigma_s x_s + sigma_t int exp(lambda) D dlambda    over lambda from lambda_s to lambda_t,

where D = x - t v is the predicted data. With D constant that is Euler's step; so each method here is Euler's step and a
correction for how D changes, alpha_t sum_j w_j (D_j - D_0), D_0 the newest prediction and D_j those before. DEIS does
the same with the predicted noise: data and noise, alpha and sigma, lambda and -lambda change places.

All run both ways, on times within 0 .. 1. Lambda is infinite at both ends, therefore
- the step that leaves an end is Euler's, and its prediction is not used again, since its weight tends to 0;
- the step that arrives at an end is Euler's;
and so there the methods are of second order at most. The order also falls to the number of predictions at hand: at the
start, and again after an edge of the velocity (`solution.Velocity`), before which nothing counts.

lower_order_final, DPM-Solver's rule for few steps: the last step is Euler's, the one before it of second order at most.
All raise UserError for a time outside 0 .. 1 and for an unknown order or variant. The state is float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Literal

from torch import Tensor

from genflow.errors import UserError, nearest
from genflow.functional import log_snr, noise_from_velocity, velocity_from_x, x_from_velocity
from genflow.registry import sampler_export
from genflow.samplers.adams import Past, check_order, lagrange, plus
from genflow.samplers.solution import Progress, Solution, Solve, Velocity


@sampler_export("dpmpp_2m", family="ode", order=2)
def dpmpp_2m(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    lower_order_final: bool = True,
    progress: Progress | None = None,
    record: bool = False,
) -> Solution:
    """DPM-Solver++(2M), second order (Lu et al. 2022, arXiv 2211.01095, algorithm 2): N evaluations.

    lower_order_final acts where there are fewer than 15 steps.
    """
    solve = Solve(velocity, x, grid, progress, record)
    past = Past(solve, 2)
    for (t, t_next), order in zip(solve, _orders(solve, 2, lower_order_final), strict=True):
        v = solve.v(solve.x, t)
        _take(past, t, x_from_velocity(solve.x, v, t))
        h, ratios = _ratios(past, order, t_next)
        weights = [_half(math.expm1(-h), r) for r in ratios]
        solve.x = _corrected(solve.x + (t_next - t) * v, 1 - t_next, weights, past.values)
    return solve.solution()


@sampler_export("dpmpp_3m", family="ode", order=3)
def dpmpp_3m(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    variant: Literal["exact", "published"] = "exact",
    lower_order_final: bool = True,
    progress: Progress | None = None,
    record: bool = False,
) -> Solution:
    """DPM-Solver++(3M), third order (Lu et al. 2022, arXiv 2211.01095, and their code): N evaluations.

    A parabola in lambda through three predictions; steps with two are those of 2M. variant "exact" integrates it;
    "published" is the authors' code and diffusers, which give its curvature half its weight, and so second order.
    lower_order_final acts where there are fewer than 15 steps.
    """
    _check_variant(variant, "exact", "published")
    solve = Solve(velocity, x, grid, progress, record)
    past = Past(solve, 3)
    for (t, t_next), order in zip(solve, _orders(solve, 3, lower_order_final), strict=True):
        v = solve.v(solve.x, t)
        _take(past, t, x_from_velocity(solve.x, v, t))
        h, ratios = _ratios(past, order, t_next)
        if len(ratios) < 2:
            weights = [_half(math.expm1(-h), r) for r in ratios]
        else:
            weights = _integrals(h, ratios, curvature=1.0 if variant == "exact" else 0.5)
        solve.x = _corrected(solve.x + (t_next - t) * v, 1 - t_next, weights, past.values)
    return solve.solution()


@sampler_export("unipc", family="ode", order=3)
def unipc(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    lower_order_final: bool = True,
    progress: Progress | None = None,
    record: bool = False,
) -> Solution:
    """UniPC in predicted data (Zhao et al. 2023, arXiv 2302.04867): N evaluations.

    The predictor UniP of order 2 or 3; and when the step's end has been evaluated, the corrector UniC, with that same
    evaluation, one order higher: UniPC-2 is of third order, UniPC-3 of fourth but for its first step, which leaves the whole
    third. The last step is predicted only, and the recorded states are the predicted ones. variant: B(h) = -h or
    exp(-h) - 1, on which only steps with one difference depend (UniP-2, UniC-1). lower_order_final acts for any number of
    steps and leaves the whole second; without it the last step has full order.

    The step that leaves t = 1 is corrected as in bh2 always, since bh1 has no limit there; one that leaves t = 0, or
    has an edge of the velocity in it, is not corrected.
    """
    check_order(order, 2, 3)
    _check_variant(variant, "bh1", "bh2")
    solve = Solve(velocity, x, grid, progress, record)
    past = Past(solve, order)
    h, ratios, euler = 0.0, list[float](), solve.x  # of the step before
    for (t, t_next), p in zip(solve, _orders(solve, order, lower_order_final, few=math.inf), strict=True):
        x, v = solve.x, solve.v(solve.x, t)
        data = x_from_velocity(x, v, t)
        if past.times and past.times[0] != 0 and not solve.jumps(past.times[0], t):  # UniC: the step before, again
            weights = _b_weights(variant, h, [*ratios, 1.0])
            x = _corrected(euler, 1 - t, weights, [*islice(past.values, len(weights)), data])
            v = velocity_from_x(x, data, t)
        _take(past, t, data)  # UniP
        h, ratios = _ratios(past, p, t_next)
        euler = x + (t_next - t) * v
        solve.x = _corrected(euler, 1 - t_next, _b_weights(variant, h, ratios), past.values)
    return solve.solution()


@sampler_export("deis", family="ode", order=3)
def deis(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    order: int = 3,
    lower_order_final: bool = True,
    progress: Progress | None = None,
    record: bool = False,
) -> Solution:
    """DEIS of order 1 to 3 (Zhang & Chen 2022, arXiv 2204.13902): N evaluations.

    Its Adams-Bashforth method in the variant "log rho", which diffusers has too: the predicted noise is a polynomial in
    log rho, rho = sigma / alpha, integrated exactly over rho. lower_order_final acts where there are fewer than 15
    steps.
    """
    check_order(order, 1, 2, 3)
    solve = Solve(velocity, x, grid, progress, record)
    past = Past(solve, order)
    for (t, t_next), p in zip(solve, _orders(solve, order, lower_order_final), strict=True):
        v = solve.v(solve.x, t)
        _take(past, t, noise_from_velocity(solve.x, v, t))
        h, ratios = _ratios(past, p, t_next)
        weights = _integrals(-h, ratios) if ratios else []
        solve.x = _corrected(solve.x + (t_next - t) * v, t_next, weights, past.values)
    return solve.solution()


# -------------------------------------------------------------------------------------------------- orders and history


def _orders(solve: Solve, order: int, lower_order_final: bool, few: float = 15) -> list[int]:
    """The order that each step may have. Raises UserError for times outside 0 .. 1."""
    if outside := [t for t in solve.grid if not 0 <= t <= 1]:
        raise UserError(f"the time {outside[0]} is not within 0 .. 1, the times of this sampler; ab2 takes any")
    steps = len(solve.grid) - 1
    lower = lower_order_final and steps < few
    return [1 if t in (0, 1) else min(order, steps - i) if lower else order for i, t in enumerate(solve.grid[1:])]


def _check_variant(variant: str, *variants: str) -> None:
    if variant not in variants:
        raise UserError(f"no variant is named {variant!r}.{nearest(variant, variants)}")


def _take(past: Past, t: float, prediction: Tensor) -> None:
    """Take in a new prediction, and forget one that was made at an end of the path."""
    if past.times and past.times[0] in (0, 1):
        past.clear()
    past.add(t, prediction)


def _ratios(past: Past, order: int, t_next: float) -> tuple[float, list[float]]:
    """The step h in lambda, and where the predictions before the newest stand, in such steps from it."""
    here, *before = (log_snr(t) for t in islice(past.times, order))
    h = log_snr(t_next) - here
    return h, [(there - here) / h for there in before]


# -------------------------------------------------------------------------------------------------------------- weights


def _corrected(x: Tensor, scale: float, weights: list[float], predictions: Sequence[Tensor]) -> Tensor:
    """x + scale sum_j weights[j] (predictions[j + 1] - predictions[0])."""
    return plus(x, [-scale * sum(weights), *(scale * w for w in weights)], predictions) if weights else x


def _half(b: float, ratio: float) -> float:
    """The weight of a single difference: half of -B(h) along the slope, whatever B(h) = -h + O(h^2)."""
    return -b / (2 * ratio)


def _b_weights(variant: str, h: float, ratios: list[float]) -> list[float]:
    """UniPC's weights a B(h): with two differences or more they solve R_p(h) a B(h) = phi_p(h), where B(h) cancels."""
    if len(ratios) > 1:
        return _integrals(h, ratios)
    b = -h if variant == "bh1" and math.isfinite(h) else math.expm1(-h)
    return [_half(b, r) for r in ratios]


def _integrals(h: float, ratios: list[float], curvature: float = 1.0) -> list[float]:
    """exp(-h) int_0^h exp(u) l_j(u / h) du, l_j the polynomial that is 1 at ratios[j] and 0 at the others and at 0."""
    moments = _moments(h, len(ratios))
    if len(ratios) > 1:
        moments[2] *= curvature
    return [sum(c * m for c, m in zip(p, moments, strict=True)) for p in lagrange([0.0, *ratios])[1:]]


def _moments(h: float, n: int) -> list[float]:
    """exp(-h) int_0^h exp(u) (u / h)^i du for i = 0 .. n: by parts, upwards; downwards where that would cancel."""
    moments = [-math.expm1(-h)]
    if abs(h) > 1:
        for i in range(1, n + 1):
            moments.append(1 - i / h * moments[-1])
        return moments
    term = last = h / (n + 1)
    for k in range(n + 2, n + 18):
        term *= -h / k
        last += term
    moments = [last]
    for i in range(n, 0, -1):
        moments.append(h / i * (1 - moments[-1]))
    return moments[::-1]
