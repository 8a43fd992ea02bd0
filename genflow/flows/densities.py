"""How training times are drawn: densities on (0, 1), 0 = data and 1 = noise (SD3, arXiv 2403.03206, sec. 3.1).

Each is a monotone map of one uniform number, `density(u)`, with its `pdf` and `cdf`, all elementwise on tensors;
float64 in gives float64 out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import torch
from torch import Tensor

from genflow.config import Choice
from genflow.errors import UserError
from genflow.functional import shift_time
from genflow.registry import density_export


class Density(Protocol):
    """What every density offers."""

    def __call__(self, u: Tensor) -> Tensor: ...
    def pdf(self, t: Tensor) -> Tensor: ...
    def cdf(self, t: Tensor) -> Tensor: ...


@density_export("uniform")
@dataclass(frozen=True)
class Uniform:
    """Every time alike: p(t) = 1."""

    def __call__(self, u: Tensor) -> Tensor:
        return u

    def pdf(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def cdf(self, t: Tensor) -> Tensor:
        return t


@density_export("logit_normal")
@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std n), n normal (SD3, eq. 19): mean > 0 towards noise, < 0 towards data."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise UserError(f"std = {self.std} must be positive, such as 1.0")

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def pdf(self, t: Tensor) -> Tensor:
        inside = (t > 0) & (t < 1)
        t = torch.where(inside, t, 0.5)
        n = (torch.logit(t) - self.mean) / self.std
        density = torch.exp(-0.5 * n**2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
        return torch.where(inside, density, 0.0)

    def cdf(self, t: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(t) - self.mean) / self.std)


@density_export("mode")
@dataclass(frozen=True)
class Mode:
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u) (SD3, eq. 20): more in the middle, the ends kept; 0 is uniform."""

    scale: float = 1.29

    def __post_init__(self) -> None:
        top = 2 / (math.pi - 2)
        if not -1 <= self.scale <= top:
            near = -1.0 if self.scale < -1 else math.floor(top * 1e4) / 1e4
            raise UserError(f"scale = {self.scale} is not within -1 .. {top:.4f}; try {near}")

    def __call__(self, u: Tensor) -> Tensor:
        return 1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)

    def pdf(self, t: Tensor) -> Tensor:
        slope = 1 + self.scale - self.scale * math.pi / 2 * torch.sin(math.pi * self._inverse(t))
        return 1 / slope  # of -dt/du

    def cdf(self, t: Tensor) -> Tensor:
        return 1 - self._inverse(t)

    def _inverse(self, t: Tensor) -> Tensor:
        """u of t, by bisection: the map has no closed inverse."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(54):
            middle = (low + high) / 2
            above = self(middle) > t  # t falls as u grows
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low + high) / 2


@density_export("cosmap")
@dataclass(frozen=True)
class CosMap:
    """The log-SNR of the cosine schedule: t = 1 - 1 / (tan(pi u / 2) + 1) (SD3, eq. 21)."""

    def __call__(self, u: Tensor) -> Tensor:
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)

    def pdf(self, t: Tensor) -> Tensor:
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)

    def cdf(self, t: Tensor) -> Tensor:
        return torch.atan2(t, 1 - t) * (2 / math.pi)


@density_export("shifted")
@dataclass(frozen=True)
class Shifted:
    """Another density's times, shifted: t' = shift t / (1 + (shift - 1) t) (SD3, eq. 23)."""

    base: Annotated[Density, Choice("density")] = field(default_factory=LogitNormal)
    shift: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise UserError(f"shift = {self.shift} must be positive; 1.0 leaves the times as they are")

    def __call__(self, u: Tensor) -> Tensor:
        return shift_time(self.base(u), self.shift)

    def pdf(self, t: Tensor) -> Tensor:
        back = 1 / self.shift
        return self.base.pdf(shift_time(t, back)) * back / (1 + (back - 1) * t) ** 2

    def cdf(self, t: Tensor) -> Tensor:
        return self.base.cdf(shift_time(t, 1 / self.shift))


@density_export("mixed")
@dataclass(frozen=True)
class Mixed:
    """Another density with a part of it, `weight`, uniform, so that neither end of time is starved."""

    base: Annotated[Density, Choice("density")] = field(default_factory=LogitNormal)
    weight: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UserError(f"weight = {self.weight} is not within 0 .. 1; try {float(self.weight > 1)}")

    def __call__(self, u: Tensor) -> Tensor:
        """The same u chooses the part and, stretched, the time within it."""
        return torch.where(u < self.weight, u / self.weight, self.base((u - self.weight) / (1 - self.weight)))

    def pdf(self, t: Tensor) -> Tensor:
        return self.weight + (1 - self.weight) * self.base.pdf(t)

    def cdf(self, t: Tensor) -> Tensor:
        return self.weight * t + (1 - self.weight) * self.base.cdf(t)
