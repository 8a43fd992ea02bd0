"""Linear bijections over channels: the invertible 1x1 convolution, and permutations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genflow.flows.bijections.base import Bijection, zero_ladj
from genflow.flows.bijections.elementwise import channels_and_places
from genflow.functional import double, wide
from genflow.native.library import untransformed
from genflow.registry import bijection_export
from genflow.versions import alike


@bijection_export("conv1x1")
class InvertibleConv1x1(Bijection):
    """z = W x at every place, W = P L (U + diag(sign exp(log_diagonal))) (Glow, arXiv 1807.03039, eq. 10-12).

    P and sign are fixed by the random rotation that W starts as. shape: (D,) or (C, H, W). Raises UserError for another.
    """

    order: Tensor
    sign: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        channels, _ = channels_and_places(shape)
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal, dtype = upper.diagonal(), torch.get_default_dtype()
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.log_diagonal = nn.Parameter(diagonal.abs().log().to(dtype))
        self.register_buffer("order", permutation.argmax(1))  # row i of P M is row order[i] of M
        self.register_buffer("sign", diagonal.sign().to(dtype))
        self._cached: dict[str, tuple[list[Tensor], Tensor]] = {}  # of which weights, and what they gave

    def factors(self) -> tuple[Tensor, Tensor]:
        """L, and U with its diagonal: C x C each, W = (L U)[order], float32 or wider."""
        lower, upper, log_diagonal = wide(self.lower), wide(self.upper), wide(self.log_diagonal)
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return lower.tril(-1) + identity, upper.triu(1) + torch.diag(self.sign * log_diagonal.exp())

    def weight(self) -> Tensor:
        """W, C x C."""
        return self._kept("weight", self._weight)

    def inverse_weight(self) -> Tensor:
        """W^-1, C x C, by two triangular solves in float64."""
        return self._kept("inverse", self._inverse_weight)

    def _weight(self) -> Tensor:
        lower, upper = self.factors()
        return (lower @ upper)[self.order]

    def _inverse_weight(self) -> Tensor:
        lower, upper = (double(factor) for factor in self.factors())
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        solved = torch.linalg.solve_triangular(
            lower, identity[:, self.order.to(lower.device)], upper=False, unitriangular=True
        )
        return torch.linalg.solve_triangular(upper, solved, upper=True).to(wide(self.lower))

    def _kept(self, name: str, compute: Any) -> Tensor:
        """What compute gives, in eval mode without gradients only once for the same weights."""
        with torch.autocast(self.lower.device.type, enabled=False):
            tensors = (self.lower, self.upper, self.log_diagonal, self.sign, self.order)
            plain = untransformed() and not torch.compiler.is_compiling() and not any(t.is_inference() for t in tensors)
            if self.training or torch.is_grad_enabled() or not plain:
                return compute()
            if name not in self._cached or not all(map(alike, self._cached[name][0], tensors)):
                self._cached[name] = ([t.detach().clone() for t in tensors], compute())
            return self._cached[name][1]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return mix(wide(x), self.weight()), self.ladj(x)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return mix(wide(z), self.inverse_weight()), -self.ladj(z)

    def ladj(self, x: Tensor) -> Tensor:
        """H W sum log_diagonal, B."""
        return zero_ladj(x) + math.prod(x.shape[2:]) * wide(self.log_diagonal).sum()


@bijection_export("permutation")
class Permutation(Bijection):
    """Channels in another order, fixed: that of the seed, or reversed. shape: (D,) or (C, H, W).

    Raises UserError for another shape.
    """

    order: Tensor
    back: Tensor

    def __init__(self, shape: Sequence[int], seed: int = 0, reverse: bool = False) -> None:
        super().__init__()
        channels, _ = channels_and_places(shape)
        generator = torch.Generator().manual_seed(seed)
        order = torch.arange(channels).flip(0) if reverse else torch.randperm(channels, generator=generator)
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return wide(x).index_select(1, self.order), zero_ladj(x)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return wide(z).index_select(1, self.back), zero_ladj(z)


def mix(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight x + bias over the channels of B x C x ..., never in less than x's precision; channels last in memory."""
    with torch.autocast(x.device.type, enabled=False):
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return nn.functional.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
