"""Paths between data and noise on which a flow is trained, as configs of genflow.samplers.Path.

All are affine, x_s = alpha(s) x + sigma(s) eps, with a time s of their own from 0, data, to 1, noise. A network learns on
the path; samplers see its velocity on the straight one, z_t = (1 - t) x + t eps, the same point on another scale
(samplers/paths.py). So every sampler and grid works for every path, and the path of a trained flow can be changed after the
fact: `model_from(flow.guided(condition), path.build(), "eps")` is its model on any other path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.registry import path_export
from genflow.samplers import Path
from genflow.samplers.paths import remembered

LAST = 1e-3  # the distance from t = 1 where a path that comes to rest there is left


class PathConfig(Protocol):
    """What every path offers."""

    def build(self) -> Path: ...


@path_export("linear")
@dataclass(frozen=True)
class LinearPath:
    """x_s = (1 - s) x + (sigma_min + (1 - sigma_min) s) eps: rectified flow for sigma_min = 0, the default.

    sigma_min: the noise left on the data (Lipman et al. 2022, arXiv 2210.02747, eq. 20, time turned).
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise UserError(f"sigma_min = {self.sigma_min} is not within 0 .. 1; try 1e-4, or 0 for none")

    @remembered
    def build(self) -> Path:
        low = self.sigma_min
        return Path(
            alpha=lambda s: 1 - s,
            sigma=lambda s: low + (1 - low) * s,
            s_of_t=lambda t: (t * (1 + low) - low) / (1 - low * (1 - t)),
            rates=lambda s: (-torch.ones_like(s), torch.full_like(s, 1 - low)),
            t_min=low / (1 + low),
        )


@path_export("cosine")
@dataclass(frozen=True)
class CosinePath:
    """x_s = cos(pi s / 2) x + sin(pi s / 2) eps: variance preserving (Albergo & Vanden-Eijnden 2022, arXiv 2209.15571)."""

    def build(self) -> Path:
        return Path.cosine()


@path_export("vp")
@dataclass(frozen=True)
class VPPath:
    """The variance-preserving diffusion of Song et al. 2021 (arXiv 2011.13456), from s_min to 1; beta is linear in s."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    s_min: float = 1e-5

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> Path:
        return Path.vp(self.beta_min, self.beta_max, self.s_min)


@path_export("polynomial")
@dataclass(frozen=True)
class PolynomialPath:
    """x_s = (1 - s)^power x + (1 - (1 - s)^power) eps: straight, but slower towards the noise for a power above 1."""

    power: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.power < math.inf:
            raise UserError(f"power = {self.power} must be 1 or more, and finite; below 1 the speed has no bound")

    @remembered
    def build(self) -> Path:
        n = self.power

        def rates(s: Tensor) -> tuple[Tensor, Tensor]:
            rate = n * (1 - s) ** (n - 1)
            return -rate, rate

        return Path(
            alpha=lambda s: (1 - s) ** n,
            sigma=lambda s: 1 - (1 - s) ** n,
            s_of_t=lambda t: 1 - (1 - t) ** (1 / n),
            rates=rates,
            t_max=1.0 if n == 1 else 1 - LAST,
        )


def rows_like(a: Tensor, x: Tensor) -> Tensor:
    """B numbers in x's dtype, so that they broadcast over x: B x 1 x ... x 1."""
    return a.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
