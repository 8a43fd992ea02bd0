"""Time grids from noise to data: grid(steps, shift) -> steps + 1 falling times, from 1.0 to 0.0, both included."""

from __future__ import annotations

import math
from numbers import Integral

from genflow.errors import UserError
from genflow.functional import shift_time
from genflow.registry import grid_export


def _check(steps: int, shift: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, Integral):
        raise UserError(f"steps = {steps!r} is not a whole number")
    if steps < 1:
        raise UserError(f"steps = {steps} is too few; the nearest possible number is 1")
    if not 0 < shift < math.inf:
        raise UserError(f"shift = {shift} must be positive; 1.0 is no shift")


@grid_export("uniform")
def uniform(steps: int, shift: float = 1.0) -> list[float]:
    """Equal steps. Raises UserError for any shift but 1."""
    if shift != 1:
        raise UserError(f"the uniform grid has no shift, but shift = {shift}; choose the grid 'shifted'")
    return shifted(steps)


@grid_export("shifted")
def shifted(steps: int, shift: float = 1.0) -> list[float]:
    """Equal steps, shifted once: t' = shift t / (1 + (shift - 1) t) (SD3, eq. 23)."""
    _check(steps, shift)
    return [shift_time(i / steps, shift) for i in range(steps, -1, -1)]


@grid_export("double_shifted")
def double_shifted(steps: int, shift: float = 1.0) -> list[float]:
    """diffusers' FlowMatchEulerDiscreteScheduler: from 1 to the *shifted* 1/1000 in steps - 1, shifted again, then 0.

    With shift 3 the last time before 0 is 0.0089, where one shift gives 0.0030. For samples as diffusers draws them.
    """
    _check(steps, shift)
    last = shift_time(1 / 1000, shift)
    times = [1 + (last - 1) * i / max(steps - 1, 1) for i in range(steps)]
    return [shift_time(t, shift) for t in times] + [0.0]
