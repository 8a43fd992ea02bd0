"""Networks with a bounded Lipschitz constant: spectral normalisation of linear layers and convolutions, and LipSwish."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genflow.errors import UserError
from genflow.native.library import untransformed
from genflow.versions import alike, version


class LipSwish(nn.Module):
    """x sigmoid(beta x) / 1.1, of slope within -1 .. 1 for every beta > 0 (Chen et al. 2019, arXiv 1906.02735, 3.3)."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(0.5))  # beta = softplus(raw)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * F.softplus(self.raw)) / 1.1


class Contracted(nn.Module, ABC):
    """A layer whose weight is scaled down, where it must be, to the spectral norm `bound` (Miyato et al. 2018, 1802.05957).

    The norm is that of the layer as an operator, by power iteration of it and its transpose from a stored direction. In
    training, new weights get `warm` iterations that move the direction on; in eval mode `cold` that leave it, so that the
    map is a function of what the state dict holds. Calls with the same weights are the same map.
    """

    warm, cold = 5, 200
    weight: Tensor
    direction: Tensor

    def prepare(self, shape: Sequence[int], bound: float) -> None:
        """shape: of one input, without the batch."""
        self.bound = bound
        direction = torch.randn(1, *shape)
        self.register_buffer("direction", direction / direction.norm())
        self._key: tuple[bool, int] | None = None
        self._found: dict[str, Tensor] = {}
        with torch.no_grad():
            self.direction.copy_(self._iterated(self.cold))

    @abstractmethod
    def apply_weight(self, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer with that weight."""

    @abstractmethod
    def adjoint(self, u: Tensor) -> Tensor:
        """The transpose of the layer, without its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(self.normalised(), x, cast(Tensor, self.bias))

    def normalised(self) -> Tensor:
        """The weight, scaled to the bound where its norm is above; gradients pass through the norm."""
        weight, lasting = self.weight, untransformed()
        if torch.compiler.is_compiling() or weight.is_inference() or not lasting:
            return self._scaled(self._new_direction(lasting))
        key = (self.training, version(weight))
        if key != self._key or not alike(self._found["of"], weight):
            self._found = {"direction": self._new_direction(True), "of": weight.detach().clone()}
            self._key = key
        if torch.is_grad_enabled():
            return self._scaled(self._found["direction"])
        if "weight" not in self._found:
            self._found["weight"] = self._scaled(self._found["direction"])
        return self._found["weight"]

    def _new_direction(self, lasting: bool) -> Tensor:
        """A tensor that any mode can go on with. lasting: in training the stored direction moves on to it."""
        with torch.inference_mode(False), torch.no_grad(), self._unrounded():
            direction = self._iterated(self.warm if self.training else self.cold)
            if self.training and lasting:
                self.direction.copy_(direction)
            return direction

    def _scaled(self, direction: Tensor) -> Tensor:
        with self._unrounded():
            norm = torch.linalg.vector_norm(self.apply_weight(self.weight, direction))  # of gradient u v^T
        return self.weight * (self.bound / norm.clamp(min=self.bound))

    def _unrounded(self) -> torch.autocast:
        return torch.autocast(self.weight.device.type, enabled=False)

    def _iterated(self, times: int) -> Tensor:
        v = self.direction
        for _ in range(times):
            v_new = self.adjoint(self.apply_weight(self.weight, v))
            size = torch.linalg.vector_norm(v_new)
            v = torch.where(size > 0, v_new / size.clamp(min=torch.finfo(size.dtype).tiny), v)
        return v


class ContractedLinear(Contracted, nn.Linear):
    """A linear layer of spectral norm at most bound."""

    def __init__(self, inputs: int, outputs: int, bound: float) -> None:
        nn.Linear.__init__(self, inputs, outputs)
        self.prepare((inputs,), bound)

    def apply_weight(self, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def adjoint(self, u: Tensor) -> Tensor:
        return u @ self.weight


class ContractedConv2d(Contracted, nn.Conv2d):
    """A convolution of stride 1 that keeps the size, of spectral norm at most bound on pictures of height x width."""

    def __init__(self, inputs: int, outputs: int, kernel: int, size: Sequence[int], bound: float) -> None:
        nn.Conv2d.__init__(self, inputs, outputs, kernel, padding=kernel // 2)
        self.prepare((inputs, *size), bound)

    def apply_weight(self, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=self.padding)

    def adjoint(self, u: Tensor) -> Tensor:
        return F.conv_transpose2d(u, self.weight, padding=cast(tuple[int, int], self.padding))


class LipschitzNet(nn.Module):
    """Layers with LipSwish between them, of Lipschitz constant at most `lipschitz` in x.

    Vectors: linear layers; pictures: convolutions of 3x3, 1x1, ..., 3x3. The condition is added after the first. hidden:
    the widths inside. The last layer starts at zero. Raises UserError for no hidden layer and for a constant that is not
    within 0 .. 1.
    """

    def __init__(
        self, shape: Sequence[int], condition_dim: int = 0, *, hidden: Sequence[int] = (64, 64), lipschitz: float = 0.9
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise UserError(f"hidden = {tuple(hidden)} must be one width or more, each of 1 or more, such as (64, 64)")
        if not 0 < lipschitz < 1:
            raise UserError(f"lipschitz = {lipschitz} is not within 0 .. 1, the ends excluded; try 0.9")
        widths = [shape[0], *hidden, shape[0]]
        each = lipschitz ** (1 / (len(widths) - 1))
        ends = (0, len(widths) - 2)
        self.layers = nn.ModuleList(
            ContractedLinear(before, after, each)
            if len(shape) == 1
            else ContractedConv2d(before, after, 3 if i in ends else 1, shape[1:], each)
            for i, (before, after) in enumerate(pairwise(widths))
        )
        self.activations = nn.ModuleList(LipSwish() for _ in hidden)
        self.condition = nn.Linear(condition_dim, hidden[0], bias=False) if condition_dim else None
        for p in self.layers[-1].parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """B x *shape, condition B x P -> B x *shape."""
        h = self.layers[0](x)
        if self.condition is not None and condition is not None:
            added = self.condition(condition)
            h = h + added.view(*added.shape, *[1] * (x.dim() - 2))
        for activation, layer in zip(self.activations, list(self.layers)[1:], strict=True):
            h = layer(activation(h))
        return h
