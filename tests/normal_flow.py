"""The exact velocity of normal data, and where it leads, for tests of samplers."""

from __future__ import annotations

import math

from torch import Tensor

MU, S = 0.7, 0.3


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """The exact velocity E[noise - data | z] for data ~ N(MU, S^2)."""
    t = t.view(-1, *[1] * (x.dim() - 1))
    var = (1 - t) ** 2 * S**2 + t**2
    return (t - (1 - t) * S**2) / var * (x - (1 - t) * MU) - MU


def exact(x: Tensor, t_from: float, t_to: float) -> Tensor:
    """The flow of `gaussian`: the standardised state is constant along it."""

    def std(t: float) -> float:
        return math.sqrt((1 - t) ** 2 * S**2 + t**2)

    return (x - (1 - t_from) * MU) / std(t_from) * std(t_to) + (1 - t_to) * MU
