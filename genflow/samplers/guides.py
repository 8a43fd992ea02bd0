"""Guides: how a velocity that is wanted, v_c, and one to move away from, v_u, become one; all of it sample by sample."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.functional import Time, x_from_velocity
from genflow.registry import api_export, guidance_export


@api_export("Guide")
class Guide(ABC):
    """How a pair of velocities becomes one.

    guide(v_c, v_u, x, t, scale): v_c, v_u, x: B x ...; t: a number, or B times; scale: a number -> B x ..., v_c where
    scale is 1. A pure function, of each row by itself. zero_init: the velocity is zero while t > 1 - zero_init.
    momentum: how much of the differences seen at earlier times is added to this one's, in units of the data prediction.
    """

    zero_init: float = 0.0
    momentum: float = 0.0

    @abstractmethod
    def __call__(self, v_c: Tensor, v_u: Tensor, x: Tensor, t: Time, scale: float) -> Tensor: ...


@guidance_export("cfg")
@dataclass(frozen=True)
class CFG(Guide):
    """Straight on from the other branch: v_u + scale (v_c - v_u) (Ho & Salimans 2022, arXiv 2207.12598)."""

    def __call__(self, v_c: Tensor, v_u: Tensor, x: Tensor, t: Time, scale: float) -> Tensor:
        return torch.lerp(v_u, v_c, scale)


@guidance_export("cfg_zero")
@dataclass(frozen=True)
class CFGZero(Guide):
    """CFG-Zero*: the other branch scaled to fit, and no motion at first (Fan et al. 2025, arXiv 2503.18886).

    s v_u + scale (v_c - s v_u), s = <v_c, v_u> / ||v_u||^2. zero_init is a part of time, the same for every solver; on a
    uniform grid it is that part of the steps, and always one step at least.
    """

    zero_init: float = 0.04

    def __post_init__(self) -> None:
        if not 0 <= self.zero_init < 1:
            raise UserError(f"zero_init = {self.zero_init} is not a part of time, 0 <= zero_init < 1; try 0.04")

    def __call__(self, v_c: Tensor, v_u: Tensor, x: Tensor, t: Time, scale: float) -> Tensor:
        return torch.lerp(_along(v_c, v_u) * v_u, v_c, scale)


@guidance_export("apg")
@dataclass(frozen=True)
class APG(Guide):
    """Adaptive projected guidance, against the glare of large scales (Sadat et al. 2024, arXiv 2410.02416).

    The data prediction becomes x_c + (scale - 1) (d_ort + eta d_par), where d = x_c - x_u, and what momentum adds to it,
    is first shortened to the norm threshold if it is longer (none: never), then split along x_c and across it. Momentum
    is negative in the paper, such as -0.5; eta = 1 without the others is CFG.
    """

    eta: float = 0.0
    threshold: float | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.eta):
            raise UserError(f"eta = {self.eta} is not a finite number; try 0.0")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise UserError(f"threshold = {self.threshold} must be positive, such as 15.0, or none")
        if not -1 < self.momentum < 1:
            raise UserError(f"momentum = {self.momentum} is not between -1 and 1; try -0.5, or 0.0 for none")

    def __call__(self, v_c: Tensor, v_u: Tensor, x: Tensor, t: Time, scale: float) -> Tensor:
        d = v_c - v_u  # (x_u - x_c) / t: all is divided by -t, so that t = 0 is no exception
        if self.threshold is not None:
            norm = _positive(_dot(d, d)).sqrt() * (column(t, d) if isinstance(t, Tensor) else t)
            d = d * (self.threshold / norm).clamp(max=1)
        x_c = x_from_velocity(x, v_c, t)
        return v_c + (scale - 1) * (d - (1 - self.eta) * _along(d, x_c) * x_c)


def column(values: Tensor, x: Tensor) -> Tensor:
    """B values as B x 1 x ... x 1, to broadcast over x."""
    return values.view(-1, *[1] * (x.dim() - 1))


def _flat(x: Tensor) -> Tensor:
    """One row of numbers per sample; also where a sample is one number."""
    return x.unsqueeze(-1).flatten(1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample, B x 1 x ... x 1."""
    return column((_flat(a) * _flat(b)).sum(1), a)


def _along(a: Tensor, b: Tensor) -> Tensor:
    """What number times b is nearest to a, for each sample; 0 where b is 0."""
    return _dot(a, b) / _positive(_dot(b, b))


def _positive(square: Tensor) -> Tensor:
    """So that 0 / 0 is 0, and the square root of 0 has a gradient."""
    return square.clamp(min=torch.finfo(square.dtype).tiny)


def rescaled(v: Tensor, v_c: Tensor, part: float) -> Tensor:
    """v with each sample's standard deviation brought a part, 0 .. 1, of the way to v_c's (`cfg`)."""
    spread, wanted = (_spread(a) for a in (v, v_c))
    ratio = torch.where(spread > 0, wanted / spread, 1.0)
    return v * (1 + part * (ratio - 1))


def _spread(a: Tensor) -> Tensor:
    """The standard deviation of each sample, but for a factor; several times as fast as torch.std."""
    flat = _flat(a)
    return column(torch.linalg.vector_norm(flat - flat.mean(1, keepdim=True), dim=1), a)
