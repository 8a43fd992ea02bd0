"""Adaptive layer norm and the small parts of a transformer block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genflow.layers import kernels

EPS = 1e-6  # of every norm in SD3


class Modulation(nn.Linear):
    """adaLN-zero (Peebles & Xie 2023, arXiv 2212.09748): n vectors per sample from the conditioning, zero at first."""

    def __init__(self, hidden: int, n: int) -> None:
        super().__init__(hidden, n * hidden)
        self.n = n

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """c: B x hidden, after its SiLU. Returns n tensors of B x 1 x hidden."""
        return super().forward(c)[:, None].chunk(self.n, dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) LN(x) + shift, LN without parameters. x: B x L x hidden; shift, scale: B x 1 x hidden."""
    if kernels.usable(x, shift, scale):
        return kernels.ModulatedNorm.apply(x, shift, scale, EPS, _modulated_norm)
    return _modulated_norm(x, shift, scale)


def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y. x, y: B x L x hidden; gate: B x 1 x hidden."""
    if kernels.usable(x, gate, y):
        return kernels.GatedResidual.apply(x, gate, y, torch.addcmul)
    return torch.addcmul(x, gate, y)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x) in its tanh form (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return kernels.GELU.apply(x, _gelu) if kernels.usable(x) else _gelu(x)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class QKV(nn.Module):
    """q, k and v of one stream from one product, with optional RMS norms of q and k.

    RMS norm: x / rms(x) * weight over each head (Zhang & Sennrich 2019, arXiv 1910.07467), in float32 or wider.
    """

    def __init__(self, hidden: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.linear = nn.Linear(hidden, 3 * hidden)
        self.q_norm = nn.Parameter(torch.ones(hidden // heads)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(hidden // heads)) if qk_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """x: B x L x hidden -> B x L x 3 hidden, before the norms."""
        return self.linear(x)


def joint_heads(streams: Sequence[tuple[QKV, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Norm the q and k of each stream, cut into heads, and lay the streams side by side.

    streams: (its QKV, what that gave: B x L_i x 3 hidden). Returns q, k, v, each B x heads x sum(L_i) x head_dim.
    """
    heads = streams[0][0].heads
    none = streams[0][1].new_empty(0)
    weights = [none if w is None else w for qkv, _ in streams for w in (qkv.q_norm, qkv.k_norm)]
    tensors = [x for _, x in streams]

    def plain(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _joint_heads(heads, tensors)

    if kernels.usable(*tensors):
        return kernels.JointHeads.apply(heads, EPS, plain, *tensors, *weights)
    return plain(*tensors, *weights)


def _joint_heads(heads: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    n = len(tensors) // 3
    parts = []
    for x, wq, wk in zip(tensors[:n], tensors[n::2], tensors[n + 1 :: 2], strict=True):
        q, k, v = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        if wq.numel():
            q, k = (F.rms_norm(a, a.shape[-1:], w.to(a.dtype), EPS) for a, w in ((q, wq), (k, wk)))
        parts.append((q, k, v))
    q, k, v = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    return q, k, v


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))
