"""Adams-Bashforth solvers: the velocities already seen, continued as a polynomial in time. One evaluation per step.

Both ways along any grid. They start with fewer velocities, from Euler's step on, and so again wherever the velocity
jumps (`solution.Velocity`, edges): nothing seen before an edge is used after it. The state is float32 or wider.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from genflow.errors import UserError
from genflow.registry import sampler_export
from genflow.samplers.solution import Progress, Solution, Solve, Velocity


class Past:
    """The latest evaluations that may be combined, at most `order` of them, the newest first."""

    def __init__(self, solve: Solve, order: int) -> None:
        self.solve = solve
        self.times: deque[float] = deque(maxlen=order)
        self.values: deque[Tensor] = deque(maxlen=order)

    def __len__(self) -> int:
        return len(self.times)

    def clear(self) -> None:
        self.times.clear()
        self.values.clear()

    def add(self, t: float, value: Tensor) -> None:
        """Take in a new evaluation, and forget all others where an edge of the velocity lies between."""
        if self.times and self.solve.jumps(self.times[0], t):
            self.clear()
        self.times.appendleft(t)
        self.values.appendleft(value)


def lagrange(nodes: Sequence[float]) -> list[list[float]]:
    """The coefficients, constant first, of the polynomials that are 1 at their own node and 0 at all others."""
    polynomials = []
    for a in nodes:
        p = [1.0]
        for b in nodes:
            if b != a:
                p = [(lower - b * same) / (a - b) for lower, same in zip([0.0, *p], [*p, 0.0], strict=True)]
        polynomials.append(p)
    return polynomials


def plus(x: Tensor, weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """x + sum_j weights[j] values[j], for as many as there are weights."""
    for weight, value in zip(weights, values, strict=False):
        x = x.add(value, alpha=weight)
    return x


def check_order(order: int, *orders: int) -> None:
    """Raises UserError for an order that a method does not have."""
    if isinstance(order, bool) or order not in orders:
        near = min(orders, key=lambda o: abs(o - order)) if isinstance(order, int | float) else orders[-1]
        raise UserError(f"order = {order!r} is not one of {', '.join(map(str, orders))}; the nearest is {near}")


@sampler_export("ab2", family="ode", order=2)
def ab2(
    velocity: Velocity, x: Tensor, grid: Sequence[float], *, progress: Progress | None = None, record: bool = False
) -> Solution:
    """The two-step Adams-Bashforth method of variable steps, second order: N evaluations, none at the last time."""
    return _adams_bashforth(2, velocity, x, grid, progress, record)


@sampler_export("ab3", family="ode", order=3)
def ab3(
    velocity: Velocity, x: Tensor, grid: Sequence[float], *, progress: Progress | None = None, record: bool = False
) -> Solution:
    """The three-step Adams-Bashforth method of variable steps, third order after its start: N evaluations.

    The start, one Euler step and one of ab2, is of second order: make the first two steps short to have the third.
    """
    return _adams_bashforth(3, velocity, x, grid, progress, record)


@sampler_export("ab4", family="ode", order=4)
def ab4(
    velocity: Velocity, x: Tensor, grid: Sequence[float], *, progress: Progress | None = None, record: bool = False
) -> Solution:
    """The four-step Adams-Bashforth method of variable steps, fourth order after its start: N evaluations.

    The start, steps of Euler, ab2 and ab3, is of second order: make the first three steps short to have the fourth.
    """
    return _adams_bashforth(4, velocity, x, grid, progress, record)


def _adams_bashforth(
    order: int, velocity: Velocity, x: Tensor, grid: Sequence[float], progress: Progress | None, record: bool
) -> Solution:
    """x' = x + int_t^t' p, p the polynomial through the last velocities (Hairer, Norsett, Wanner 1993, III.5)."""
    solve = Solve(velocity, x, grid, progress, record)
    past = Past(solve, order)
    for t, t_next in solve:
        past.add(t, solve.v(solve.x, t))
        h = t_next - t
        polynomials = lagrange([(s - t) / h for s in past.times])  # the step is the unit of time
        weights = [h * sum(c / (i + 1) for i, c in enumerate(p)) for p in polynomials]
        solve.x = plus(solve.x, weights, past.values)
    return solve.solution()


CLASSICAL = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}  # of Adams-Bashforth on equal steps, the newest first


@sampler_export("ipndm", family="ode", order=4)
def ipndm(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    order: int = 4,
    progress: Progress | None = None,
    record: bool = False,
) -> Solution:
    """iPNDM: Adams-Bashforth with the coefficients of equal steps, whatever the grid: N evaluations.

    Of order 1 to 4 on equal steps, after a start as in ab4; on a smooth grid of others of second order at most, on an
    uneven one of first. Yet with few steps the fixed coefficients are often the better ones (Zhang & Chen 2022, arXiv
    2204.13902; after PNDM, Liu et al. 2022, arXiv 2202.09778, whose transfer part is Euler's step on the straight path,
    without its Runge-Kutta start). Raises UserError for another order.
    """
    check_order(order, 1, 2, 3, 4)
    solve = Solve(velocity, x, grid, progress, record)
    past = Past(solve, order)
    for t, t_next in solve:
        past.add(t, solve.v(solve.x, t))
        solve.x = plus(solve.x, [(t_next - t) * c for c in CLASSICAL[len(past)]], past.values)
    return solve.solution()
