"""Networks inside coupling layers: from the kept half and a condition to the parameters of a map of the other half.

Each is called as network(x, condition), condition B x P or None, and built as Network(inputs, outputs, condition_dim, ...),
with channels in place of features for pictures. The last layer starts at zero, so that a coupling starts as the identity.
None has batch statistics or dropout: a density must not depend on batch mates or on chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from genflow.layers.conv import three_convolutions

M = TypeVar("M", nn.Linear, nn.Conv2d)


class MLP(nn.Module):
    """Linear layers with ReLU between them, the condition beside the input. hidden: the widths of the layers inside."""

    def __init__(self, inputs: int, outputs: int, condition_dim: int = 0, *, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = inputs + condition_dim
        for wider in hidden:
            layers += [nn.Linear(width, wider), nn.ReLU()]
            width = wider
        self.layers = nn.Sequential(*layers, zeroed(nn.Linear(width, outputs)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """B x inputs -> B x outputs."""
        return self.layers(x if condition is None else torch.cat([x, condition.to(x.dtype)], 1))


class ConvNet(nn.Module):
    """Convolutions of 3x3, 1x1 and 3x3 (Glow, arXiv 1807.03039, app. B), the condition added after the first."""

    def __init__(self, inputs: int, outputs: int, condition_dim: int = 0, *, hidden: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.condition = nn.Linear(condition_dim, hidden, bias=False) if condition_dim else None
        self.middle = nn.Conv2d(hidden, hidden, 1)
        self.last = zeroed(nn.Conv2d(hidden, outputs, 3, padding=1))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """B x inputs x H x W -> B x outputs x H x W."""
        added = None if self.condition is None or condition is None else self.condition(condition.to(x.dtype))
        return three_convolutions(self.first, self.middle, self.last, x, added)


class ResidualMLP(nn.Module):
    """Residual blocks of two linear layers (Neural Spline Flows, arXiv 1906.04032, app. B), the condition in each."""

    def __init__(self, inputs: int, outputs: int, condition_dim: int = 0, *, hidden: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.blocks = nn.ModuleList(
            ResidualBlock(nn.Linear(hidden, hidden), zeroed(nn.Linear(hidden, hidden)), hidden, condition_dim)
            for _ in range(blocks)
        )
        self.last = zeroed(nn.Linear(hidden, outputs))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """B x inputs -> B x outputs."""
        h = self.first(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.last(h.relu())


class ResidualConvNet(nn.Module):
    """Residual blocks of two 3x3 convolutions (RealNVP, arXiv 1605.08803, sec. 4.1), the condition in each."""

    def __init__(self, inputs: int, outputs: int, condition_dim: int = 0, *, hidden: int = 64, blocks: int = 2) -> None:
        super().__init__()

        def conv(channels: int, out: int) -> nn.Conv2d:
            return nn.Conv2d(channels, out, 3, padding=1)

        self.first = conv(inputs, hidden)
        self.blocks = nn.ModuleList(
            ResidualBlock(conv(hidden, hidden), zeroed(conv(hidden, hidden)), hidden, condition_dim)
            for _ in range(blocks)
        )
        self.last = zeroed(nn.Conv2d(hidden, outputs, 1))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """B x inputs x H x W -> B x outputs x H x W."""
        h = self.first(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.last(h.relu())


class ResidualBlock(nn.Module):
    """h + second(relu(first(relu(h)) + linear(condition))) (He et al. 2016, arXiv 1603.05027, without norms)."""

    def __init__(self, first: nn.Module, second: nn.Module, hidden: int, condition_dim: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.condition = nn.Linear(condition_dim, hidden, bias=False) if condition_dim else None

    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        """B x hidden x ... -> the same."""
        return h + self.second(_add(self.first(h.relu()), self.condition, condition).relu())


def _add(h: Tensor, linear: nn.Linear | None, condition: Tensor | None) -> Tensor:
    """h, B x hidden x ..., plus the same linear map of the condition everywhere."""
    if linear is None or condition is None:
        return h
    added = linear(condition.to(h.dtype))
    return h + added.view(*added.shape, *[1] * (h.dim() - 2))


def zeroed(layer: M) -> M:
    """The layer with weight and bias zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
