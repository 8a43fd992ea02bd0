"""Adaptive layer norm and the small parts of a transformer block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genflow.attention import Mask, attention
from genflow.attention.cpu import joins
from genflow.attention.masks import NONE
from genflow.layers import kernels
from genflow.layers.float8 import Float8Product
from genflow.native import library as native

EPS = 1e-6  # of every norm in SD3


class Modulation(nn.Linear):
    """adaLN-zero (Peebles & Xie 2023, arXiv 2212.09748): n vectors per sample from the conditioning, zero at first."""

    def __init__(self, hidden: int, n: int) -> None:
        super().__init__(hidden, n * hidden)
        self.n = n

    def vectors(self, packed: Tensor) -> tuple[Tensor, ...]:
        """What the forward gives of B x hidden (after its SiLU), B x n hidden, as n tensors of B x 1 x hidden."""
        return packed[:, None].chunk(self.n, dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) LN(x) + shift, LN without parameters. x: B x L x hidden; shift, scale: B x 1 x hidden."""
    return norm_beside(x, shift, scale)[0]


def norm_beside(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """modulated_norm, and x itself for the residual around it: the gradients of both become that of x in one pass."""
    if native.usable(x, shift, scale) and _fit(x, shift, scale):
        return native.run(kernels.ModulatedNorm, x.contiguous(), shift, scale, EPS, _modulated_norm)
    return _modulated_norm(x, shift, scale), x


def _fit(x: Tensor, *vectors: Tensor) -> bool:
    """Whether x is B x L x H and the vectors B x 1 x H, as the kernels take them, which do not broadcast."""
    return x.dim() == 3 and all(v.shape == (x.shape[0], 1, x.shape[2]) for v in vectors)


def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


class Linear(nn.Linear):
    """A linear that can leave its bias to the operation after it, where a fused kernel adds it in passing."""

    float8 = False  # whether it trains in 8 bits (training/apply.py)

    def forward(self, x: Tensor, *, bias: bool = True) -> Tensor:
        added = self.bias if bias else None
        if self.float8 and self.training:
            y = Float8Product.apply(x, self.weight)
            return y if added is None else y + added.to(y.dtype)
        if added is not None or not kernels.trains_on_matrix_units(x, self.weight):
            return F.linear(x, self.weight, added)
        return kernels.Product.apply(x.contiguous(), self.weight, F.linear)


def gated_residual(x: Tensor, gate: Tensor, linear: Linear, y: Tensor) -> Tensor:
    """x + gate linear(y). x: B x L x hidden; gate: B x 1 x hidden; y: B x L x the linear's input."""
    fit = _fit(x, gate) and x.shape == (*y.shape[:-1], linear.out_features)
    if fit and linear.bias is not None and native.usable(x, gate, y):
        product = linear(y, bias=False).contiguous()
        return native.run(kernels.GatedResidual, x.contiguous(), gate, product, linear.bias, _gated_residual)
    return torch.addcmul(x, gate, linear(y))


def _gated_residual(x: Tensor, gate: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return torch.addcmul(x, gate, y + bias.to(y.dtype))


def gelu(linear: Linear, x: Tensor) -> Tensor:
    """a Phi(a) of a = linear(x) in its tanh form (Hendrycks & Gimpel 2016, arXiv 1606.08415). x: B x L x the input."""
    if native.usable(x) and x.dim() == 3 and linear.bias is not None:
        product = linear(x, bias=False).contiguous()
        # Which may have kept what the kernel writes over.
        if linear._forward_hooks or nn.modules.module._global_forward_hooks:
            product = product.clone()
        return native.run(kernels.GELU, product, linear.bias, _gelu)
    return F.gelu(linear(x), approximate="tanh")


def _gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


class QKV(nn.Module):
    """q, k and v of one stream from one product, with optional RMS norms of q and k.

    RMS norm: x / rms(x) * weight over each head (Zhang & Sennrich 2019, arXiv 1910.07467), in float32 or wider.
    """

    def __init__(self, hidden: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.linear = Linear(hidden, 3 * hidden)
        self.q_norm = nn.Parameter(torch.ones(hidden // heads)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(hidden // heads)) if qk_norm else None


def joint_attention(
    streams: Sequence[tuple[QKV, Tensor]], mask: Mask | None = None, *, default: str = "auto"
) -> tuple[Tensor, ...]:
    """What each stream hears of all: attention over q, k and v of each, normed, the streams side by side.

    streams: (its QKV, its tokens B x L_i x hidden); mask: over sum(L_i) tokens; default: the attention backend where nobody
    says more. Returns for each stream B x L_i x hidden.
    """
    heads = streams[0][0].heads
    products, weights, fused = _products(streams)
    lengths = [x.shape[1] for _, x in streams]

    def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
        return _apart(attention(*_joint_heads(heads, tensors), mask, default=default), lengths)

    if fused and joins(products, heads, mask or NONE, default):
        causal = mask is not None and mask.causal
        return native.run(kernels.JointAttention, heads, EPS, causal, plain, *products, *weights)
    q, k, v = _joined(heads, products, weights, fused)
    del products
    return _apart(attention(q, k, v, mask, default=default), lengths)


def _apart(heard: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """What all streams hear, B x heads x sum(L_i) x head_dim, as that of each, B x L_i x hidden."""
    return tuple(o.transpose(1, 2).flatten(2) for o in heard.split(lengths, dim=2))


def joint_heads(streams: Sequence[tuple[QKV, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The q, k, v of each stream, normed, cut into heads, and the streams side by side.

    streams: (its QKV, its tokens B x L_i x hidden). Returns q, k, v, each B x heads x sum(L_i) x head_dim.
    """
    return _joined(streams[0][0].heads, *_products(streams))


def _products(streams: Sequence[tuple[QKV, Tensor]]) -> tuple[list[Tensor], list[Tensor], bool]:
    """Each stream's product, B x L_i x 3 hidden; of each the bias still to be added, and the weights of its norms.

    Also whether kernels are to take them; if not, no bias is left to add.
    """
    tokens = [x for _, x in streams]
    fit = all(x.dim() == 3 and x.shape[::2] == tokens[0].shape[::2] for x in tokens)
    fused = fit and all(qkv.linear.bias is not None for qkv, _ in streams) and native.usable(*tokens)
    products = [qkv.linear(x, bias=not fused) for qkv, x in streams]
    none = products[0].new_empty(0)
    weights = [
        none if w is None else w
        for qkv, _ in streams
        for w in (qkv.linear.bias if fused else None, qkv.q_norm, qkv.k_norm)
    ]
    return [p.contiguous() for p in products] if fused else products, weights, fused


def _joined(heads: int, products: list[Tensor], weights: list[Tensor], fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    def plain(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _joint_heads(heads, tensors)

    if fused:
        return native.run(kernels.JointHeads, heads, EPS, plain, *products, *weights)
    return plain(*products, *weights)


def _joint_heads(heads: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    n = len(tensors) // 4
    parts = []
    for x, bias, wq, wk in zip(tensors[:n], tensors[n::3], tensors[n + 1 :: 3], tensors[n + 2 :: 3], strict=True):
        x = x + bias.to(x.dtype) if bias.numel() else x
        q, k, v = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        if wq.numel():
            q, k = (F.rms_norm(a, a.shape[-1:], w.to(a.dtype), EPS) for a, w in ((q, wq), (k, wk)))
        parts.append((q, k, v))
    q, k, v = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    return q, k, v


class MLP(nn.Module):
    """Linear, GELU, Linear; `gated_residual` takes the last one."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden, inner)
        self.fc2 = Linear(inner, hidden)

    def hidden(self, x: Tensor) -> Tensor:
        """x: B x L x hidden -> B x L x inner."""
        return gelu(self.fc1, x)
