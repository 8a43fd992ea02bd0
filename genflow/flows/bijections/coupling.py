"""Coupling layers: one half of a sample is mapped element by element as a network of the other half, kept, says."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genflow.errors import UserError, nearest
from genflow.flows.bijections.base import Bijection, check_condition, per_sample, zero_ladj
from genflow.flows.bijections.splines import rational_quadratic, rational_quadratic_inverse, spline_parameters
from genflow.functional import wide
from genflow.networks.couplers import MLP, ConvNet
from genflow.registry import bijection_export

Mask = Literal["halves", "alternating", "checkerboard"]
Coupler = Callable[[int, int, int], nn.Module]  # (inputs, outputs, condition_dim); see networks/couplers.py


class Coupling(Bijection):
    """A coupling layer (Dinh et al. 2017, arXiv 1605.08803, sec. 3.2): kept' = kept, changed' = g(changed; network(kept)).

    mask: "halves", the first half of the features or channels is kept; "alternating", every other one; "checkerboard",
    every other pixel. None takes halves, or the checkerboard for pictures of one channel. flip: keep what would be
    changed. network: builds the network from (inputs, outputs, condition_dim), in features or channels; None is an MLP for
    vectors and a ConvNet for pictures. Its outputs are n groups, for the n parameters of an element, of the changed width.

    Raises UserError for a shape that the mask cannot divide.
    """

    def __init__(
        self,
        shape: Sequence[int],
        parameters: int,
        *,
        condition_dim: int,
        mask: Mask | None,
        flip: bool,
        network: Coupler | None,
    ) -> None:
        super().__init__()
        self.condition_dim = condition_dim
        self.partition = _partition(tuple(shape), mask, flip)
        build = network or (MLP if len(shape) == 1 else ConvNet)
        self.network = build(self.partition.kept, parameters * self.partition.changed, condition_dim)

    @abstractmethod
    def _map(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor | float]:
        """y and log dy/dx. x: B x c x ...; parameters: B x n x c x ..., in x's dtype."""

    @abstractmethod
    def _unmap(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor | float]:
        """x and log dx/dy."""

    def _keep(self, kept: Tensor) -> tuple[Tensor, Tensor | float]:
        """What becomes of the kept half, and the log-derivative."""
        return kept, 0.0

    def _unkeep(self, kept: Tensor) -> tuple[Tensor, Tensor | float]:
        return kept, 0.0

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed = self._split(x)
        changed, log = self._map(changed, self._theta(kept, condition))
        kept, kept_log = self._keep(kept)
        return self.partition.join(kept, changed), self._ladj(x, kept_log, log)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed = self._split(z)
        kept, kept_log = self._unkeep(kept)
        changed, log = self._unmap(changed, self._theta(kept, condition))
        return self.partition.join(kept, changed), self._ladj(z, kept_log, log)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.partition.split(wide(x))

    def _theta(self, kept: Tensor, condition: Tensor | None) -> Tensor:
        """B x n x c x ..., in the dtype of kept, whatever the network computes in."""
        output = self.ask(self.partition.seen(kept), condition)
        return output.to(kept.dtype).unflatten(1, (-1, self.partition.changed))

    def ask(self, seen: Tensor, condition: Tensor | None) -> Tensor:
        """What the network says, in the dtype of its weights."""
        check_condition(condition, self.condition_dim, len(seen))
        dtype = next((p.dtype for p in self.network.parameters()), seen.dtype)
        return self.network(seen.to(dtype), condition if self.condition_dim else None)

    def _ladj(self, x: Tensor, kept: Tensor | float, changed: Tensor | float) -> Tensor:
        logs = self.partition.logs(kept, changed)
        return sum((per_sample(log) for log in logs), start=zero_ladj(x))


@bijection_export("additive_coupling")
class AdditiveCoupling(Coupling):
    """changed + t (NICE, Dinh et al. 2015, arXiv 1410.8516, sec. 3.2): volumes stay as they are."""

    def __init__(
        self,
        shape: Sequence[int],
        *,
        condition_dim: int = 0,
        mask: Mask | None = None,
        flip: bool = False,
        network: Coupler | None = None,
    ) -> None:
        super().__init__(shape, 1, condition_dim=condition_dim, mask=mask, flip=flip, network=network)

    def _map(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, float]:
        return x + parameters[:, 0], 0.0

    def _unmap(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, float]:
        return y - parameters[:, 0], 0.0


@bijection_export("affine_coupling")
class AffineCoupling(Coupling):
    """changed * exp(s) + t with s = limit tanh(u / limit) (arXiv 1605.08803, eq. 4-5; the bound as in FrEIA).

    The network gives t, then u. limit: the most that s can be, in nats; 2 keeps the scale within 0.14 .. 7.4.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        condition_dim: int = 0,
        mask: Mask | None = None,
        flip: bool = False,
        network: Coupler | None = None,
        limit: float = 2.0,
    ) -> None:
        super().__init__(shape, 2, condition_dim=condition_dim, mask=mask, flip=flip, network=network)
        if not 0 < limit <= 10:
            raise UserError(f"limit = {limit} is not within 0 .. 10 nats; try 2")
        self.limit = limit

    def _map(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._bounded(parameters)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def _unmap(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._bounded(parameters)
        return (y - shift) * (-log_scale).exp(), -log_scale

    def _bounded(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, u = parameters.unbind(1)
        return shift, self.limit * torch.tanh(u / self.limit)


@bijection_export("spline_coupling")
class SplineCoupling(Coupling):
    """Rational-quadratic splines (Neural Spline Flows, arXiv 1906.04032): of the changed half as the network says.

    The kept half goes through splines too, whose parameters are the same for all samples, one for each feature or channel,
    unless transform_kept is false. bins: K; bound: beyond -bound .. bound the map is the identity.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        condition_dim: int = 0,
        mask: Mask | None = None,
        flip: bool = False,
        network: Coupler | None = None,
        bins: int = 8,
        bound: float = 3.0,
        transform_kept: bool = True,
    ) -> None:
        count = spline_parameters(bins)
        super().__init__(shape, count, condition_dim=condition_dim, mask=mask, flip=flip, network=network)
        if not 0 < bound < math.inf:
            raise UserError(f"bound = {bound} must be positive and finite, such as 3")
        self.bound = bound
        ones = [1] * (len(shape) - 1)
        self.own = nn.Parameter(torch.zeros(1, count, self.partition.kept, *ones)) if transform_kept else None

    def _map(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic(x, parameters, bound=self.bound)

    def _unmap(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic_inverse(y, parameters, bound=self.bound)

    def _keep(self, kept: Tensor) -> tuple[Tensor, Tensor | float]:
        return (kept, 0.0) if self.own is None else self._map(kept, self.own)

    def _unkeep(self, kept: Tensor) -> tuple[Tensor, Tensor | float]:
        return (kept, 0.0) if self.own is None else self._unmap(kept, self.own)


class _Halves(nn.Module):
    """Parts of axis 1: its first half and the rest, or its even and odd places."""

    order: Tensor | None

    def __init__(self, width: int, alternating: bool, flip: bool) -> None:
        super().__init__()
        first = (width + 1) // 2
        self.flip = flip
        self.slices = (slice(0, None, 2), slice(1, None, 2)) if alternating else (slice(0, first), slice(first, None))
        self.kept, self.changed = (width - first, first) if flip else (first, width - first)
        place = torch.arange(width)
        order = torch.cat([place[part] for part in self.slices]).argsort() if alternating else None
        self.register_buffer("order", order, persistent=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (x[:, part] for part in self.slices)
        return (second, first) if self.flip else (first, second)

    def seen(self, kept: Tensor) -> Tensor:
        return kept

    def join(self, kept: Tensor, changed: Tensor) -> Tensor:
        joined = torch.cat([changed, kept] if self.flip else [kept, changed], 1)
        return joined if self.order is None else joined.index_select(1, self.order)

    def logs(self, *logs: Tensor | float) -> list[Tensor]:
        return [log for log in logs if isinstance(log, Tensor)]


class _Checkerboard(nn.Module):
    """Every other pixel; each part is a whole picture, of which only its own pixels are seen and joined."""

    mask: Tensor

    def __init__(self, channels: int, height: int, width: int, flip: bool) -> None:
        super().__init__()
        self.kept = self.changed = channels
        odd = (torch.arange(height).unsqueeze(1) + torch.arange(width)) % 2 == 1
        self.register_buffer("mask", odd if flip else ~odd, persistent=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def seen(self, kept: Tensor) -> Tensor:
        return torch.where(self.mask, kept, 0.0)

    def join(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.where(self.mask, kept, changed)

    def logs(self, kept: Tensor | float, changed: Tensor | float) -> list[Tensor]:
        if not isinstance(kept, Tensor) and not isinstance(changed, Tensor):
            return []
        return [torch.where(self.mask, kept, changed)]


def _partition(shape: tuple[int, ...], mask: Mask | None, flip: bool) -> Any:
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise UserError(f"shape {shape} is no sample's; a coupling takes (features,) or (channels, height, width)")
    if mask is None:
        mask = "checkerboard" if len(shape) == 3 and shape[0] == 1 else "halves"
    if mask == "checkerboard":
        if len(shape) == 1 or shape[1] * shape[2] < 2:
            raise UserError(f"a checkerboard does not divide {shape}; take halves")
        return _Checkerboard(shape[0], shape[1], shape[2], flip)
    if mask not in ("halves", "alternating"):
        raise UserError(f"mask {mask!r} is none.{nearest(mask, ('halves', 'alternating', 'checkerboard'))}")
    if shape[0] < 2:
        what, near = ("feature", "a coupling needs 2") if len(shape) == 1 else ("channel", "take a checkerboard")
        raise UserError(f"{shape[0]} {what} of {shape} cannot be divided; {near}")
    return _Halves(shape[0], mask == "alternating", flip)
