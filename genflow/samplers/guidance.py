"""Wrappers around a velocity: classifier-free guidance, and the other convention of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.registry import api_export, guidance_export
from genflow.samplers.solution import Velocity, evaluate


@guidance_export("cfg")
def cfg(
    velocity: Callable[..., Tensor],
    cond: tuple[Tensor, ...],
    uncond: tuple[Tensor, ...],
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Guided:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), on all channels: v_c + (scale - 1) (v_c - v_u).

    velocity: called as velocity(x, t, *cond); cond, uncond: tensors of B rows, or of one. Within the interval lo <= t
    <= hi (Kynkaanniemi et al. 2024, arXiv 2404.07724) both branches go as one doubled batch, [cond, uncond]; outside,
    and for scale 1, there is one plain call on cond.

    Raises UserError for a scale that is not finite and an interval that is not 0 <= lo < hi <= 1.
    """
    lo, hi = interval
    if not math.isfinite(scale):
        raise UserError(f"guidance = {scale} is not a finite number; 1.0 is no guidance")
    if not 0 <= lo < hi <= 1:
        near = tuple(sorted(min(max(float(a), 0.0), 1.0) for a in interval))
        near = near if near[0] < near[1] else (0.0, 1.0)
        raise UserError(f"guidance interval = ({lo}, {hi}) is not 0 <= lo < hi <= 1; try {near}")
    return Guided(velocity, cond, uncond, scale, (lo, hi))


@dataclass(frozen=True)
class Guided:
    """The velocity that `cfg` makes.

    A sampler hands over the time as a number (`at`), so that the test of the interval never waits for the device.
    Called with a tensor of times, every row decides for itself, and the batch is always doubled.
    """

    velocity: Callable[..., Tensor]
    cond: tuple[Tensor, ...]
    uncond: tuple[Tensor, ...]
    scale: float
    interval: tuple[float, float]
    _pairs: dict[int, tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    def at(self, x: Tensor, time: float) -> Tensor:
        lo, hi = self.interval
        if self.scale == 1 or not lo <= time <= hi:
            return self.velocity(x, x.new_full((len(x),), time), *_rows(self.cond, len(x)))
        return self._guide(x, x.new_full((2 * len(x),), time), self.scale)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        lo, hi = self.interval
        scale = torch.where((t >= lo) & (t <= hi), self.scale, 1.0).to(x.dtype)
        return self._guide(x, torch.cat([t, t]), scale.view(-1, *[1] * (x.dim() - 1)))

    def _guide(self, x: Tensor, t: Tensor, scale: float | Tensor) -> Tensor:
        n = len(x)
        if n not in self._pairs:  # the same at every step
            pairs = zip(_rows(self.cond, n), _rows(self.uncond, n), strict=True)
            self._pairs[n] = tuple(torch.cat(pair) for pair in pairs)
        v = self.velocity(torch.cat([x, x]), t, *self._pairs[n]).to(x.dtype)
        return torch.lerp(v[n:], v[:n], scale)


def _rows(tensors: tuple[Tensor, ...], n: int) -> tuple[Tensor, ...]:
    return tuple(a.expand(n, *a.shape[1:]) for a in tensors)


@api_export("reversed")
def reversed(velocity: Velocity) -> Reversed:
    """A velocity of the other convention (t = 0 noise, t = 1 data) in ours, and the other way round: -v(x, 1 - t)."""
    return Reversed(velocity)


@dataclass(frozen=True)
class Reversed:
    """The velocity that `reversed` makes."""

    velocity: Velocity

    def at(self, x: Tensor, time: float) -> Tensor:
        return -evaluate(self.velocity, x, 1 - time)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.velocity(x, 1 - t)
