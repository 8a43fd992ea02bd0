"""Bijections: invertible maps with the log of their volume change, from which normalizing flows are composed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from genflow.errors import UserError
from genflow.functional import wide
from genflow.registry import bijection_export


class Bijection(nn.Module, ABC):
    """An invertible map of samples, data to noise, under an optional condition.

    log p(x) = log p_Z(f(x)) + log |det df/dx| (Rezende & Mohamed 2015, arXiv 1505.05770). The map is computed in float32 or
    wider, whatever autocast says; only networks inside it may compute in less. A registered bijection is built from the
    shape of a sample, Name(shape, ...), shape = (D,) or (C, H, W), and refuses a shape that it cannot serve.

    condition_dim: the width P of the condition that it needs, 0 for none. keep_input: what an invertible checkpoint does
    (bijections/memory.py), keep its input rather than compute it again by an inverse that is slow, or not exact.
    inverse_error: how far from exact, in float64, an inverse that is iterated or integrated may be.
    """

    condition_dim: int = 0
    keep_input: bool = False
    inverse_error: float = 1e-6

    @abstractmethod
    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise. x: B x ...; condition: B x P. Returns z and ladj = log |det dz/dx|, B, float32 or wider."""

    @abstractmethod
    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise to data. Returns x and the ladj of this direction, log |det dx/dz|, B."""

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The x of `inverse`, for maps whose ladj there costs more than it."""
        return self.inverse(z, condition)[0]

    def initialise(self, x: Tensor, condition: Tensor | None = None) -> None:
        """Fit what depends on data, once, before training: x is a batch of what `forward` will see."""

    def initialise_inverse(self, z: Tensor, condition: Tensor | None = None) -> None:
        """`initialise` of the map turned round: z is a batch of what `inverse` will see."""

    @property
    def inv(self) -> Bijection:
        """The same map turned round; its parameters are shared."""
        return Inverse(self)


class Inverse(Bijection):
    """A bijection turned round: forward is its inverse."""

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection
        self.condition_dim, self.keep_input = bijection.condition_dim, bijection.keep_input

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, condition)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(z, condition)

    def initialise(self, x: Tensor, condition: Tensor | None = None) -> None:
        self.bijection.initialise_inverse(x, condition)

    def initialise_inverse(self, z: Tensor, condition: Tensor | None = None) -> None:
        self.bijection.initialise(z, condition)

    @property
    def inv(self) -> Bijection:
        return self.bijection


@bijection_export("chain")
class Chain(Bijection):
    """Bijections one after another, in the order of data to noise."""

    def __init__(self, bijections: Iterable[Bijection]) -> None:
        super().__init__()
        self.bijections = nn.ModuleList(bijections)
        self.condition_dim = max((b.condition_dim for b in self), default=0)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(cast(Iterable[Bijection], self.bijections))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = zero_ladj(x)
        for bijection in self:
            x, ladj = bijection(x, condition)
            total = total + ladj
        return x, total

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = zero_ladj(z)
        for bijection in reversed(list(self)):
            z, ladj = bijection.inverse(z, condition)
            total = total + ladj
        return z, total

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        for bijection in reversed(list(self)):
            z = bijection.decode(z, condition)
        return z

    @torch.no_grad()
    def initialise(self, x: Tensor, condition: Tensor | None = None) -> None:
        for bijection in self:
            bijection.initialise(x, condition)
            x, _ = bijection(x, condition)

    @torch.no_grad()
    def initialise_inverse(self, z: Tensor, condition: Tensor | None = None) -> None:
        for bijection in reversed(list(self)):
            bijection.initialise_inverse(z, condition)
            z = bijection.decode(z, condition)


def zero_ladj(x: Tensor) -> Tensor:
    """No change of volume: B zeros, float32, or float64 beside float64."""
    return torch.zeros(len(x), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def per_sample(log_scale: Tensor) -> Tensor:
    """The sum of each sample's log-scales: B x ... -> B, in float32 or wider."""
    return wide(log_scale).sum(tuple(range(1, log_scale.dim())))  # flattening would copy what is channels last


def check_condition(condition: Tensor | None, dim: int, rows: int) -> None:
    """Raises UserError unless the condition is what a bijection of condition_dim = dim needs for so many samples."""
    if dim == 0:
        return
    if condition is None:
        raise UserError(f"a condition is missing: this bijection needs {rows} x {dim} numbers, one row for each sample")
    if condition.shape != (rows, dim):
        raise UserError(f"the condition is {tuple(condition.shape)}; this bijection needs {rows} x {dim}")
