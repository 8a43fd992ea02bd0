"""Adaptive layer norm and the small parts of a transformer block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every norm in SD3


class Modulation(nn.Linear):
    """adaLN-zero (Peebles & Xie 2023, arXiv 2212.09748): n vectors per sample from the conditioning, zero at first."""

    def __init__(self, hidden: int, n: int) -> None:
        super().__init__(hidden, n * hidden)
        self.n = n

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """c: B x hidden, after its SiLU. Returns n tensors of B x 1 x hidden."""
        return super().forward(c)[:, None].chunk(self.n, dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) LN(x) + shift, LN without parameters. x: B x L x hidden; shift, scale: B x 1 x hidden."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y. x, y: B x L x hidden; gate: B x 1 x hidden."""
    return torch.addcmul(x, gate, y)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467), in float32 or wider."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), EPS)


class MLP(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
