"""What a sampler gets and gives: velocities, and solutions with their cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(x, t): x B x ..., t B in x's dtype and on its device, 0 = data and 1 = noise -> dx/dt, shaped as x.

A velocity may also have a method `at(x, time)` with the time as a plain number, the same for all rows. Samplers call it
where it exists: a wrapper can then decide by the time without waiting for the device.
"""

Progress = Callable[[int, int], None]
"""progress(done, steps), called after every step of a sampler."""


@dataclass(frozen=True)
class Solution:
    """Where a solve arrived. x: as given to the sampler, float32 or wider; nfe: network evaluations per picture.

    Guidance doubles the cost of an evaluation, not nfe.
    """

    x: Tensor
    nfe: int


def evaluate(velocity: Velocity, x: Tensor, time: float) -> Tensor:
    """The velocity at one time for all rows, in the dtype of the state x."""
    at = getattr(velocity, "at", None)
    v = at(x, time) if at is not None else velocity(x, x.new_full((len(x),), time))
    return v.to(x.dtype)


def state(x: Tensor) -> Tensor:
    """x in the sampler's precision: float64 stays, everything else becomes float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
