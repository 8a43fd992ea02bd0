"""Attention in bf16 on a CPU that multiplies it (AMX, AVX-512 BF16), forward and backward: genflow/native/attention.cpp.

torch's own forward and, far more, its backward leave most of such a processor idle for short sequences, which pictures are.
The weights and their sums are in float32 here, in a head of one thread: no sample hangs on its batch mates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genflow.attention.dispatch import Call, serving
from genflow.attention.masks import Mask
from genflow.native import library as native

LONGEST = 4096  # keys: beyond, a head's weights leave the cache


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether attention without a mask, or a causal one of equal lengths, is to be had here."""
    return q.shape[-1] == v.shape[-1] and _fits(q, q.shape[-1], k.shape[2]) and native.usable(q, k, v)


def joins(products: Sequence[Tensor], heads: int, mask: Mask, default: str) -> bool:
    """Whether the kernel is the one to attend from streams' products, B x L_i x 3 hidden, which kernels can take."""
    first, length = products[0], sum(p.shape[1] for p in products)
    head_dim = first.shape[-1] // (3 * heads)
    if mask.kind not in ("none", "causal") or not _fits(first, head_dim, length):
        return False
    grad = torch.is_grad_enabled() and any(p.requires_grad for p in products)
    needs = frozenset({"backward"} if grad else ())
    call = Call(first.device.type, first.dtype, head_dim, mask.kind, length, length, needs)
    return serving(call, default=default).name == "sdpa"


def _fits(x: Tensor, head_dim: int, length: int) -> bool:
    return (
        x.dtype == torch.bfloat16
        and x.is_cpu
        and 0 < head_dim <= 256
        and 0 < length <= LONGEST
        and native.matrix_units()
    )


class MatrixAttention(torch.autograd.Function):
    """softmax(q k^T scale) v. q: B x heads x Lq x head_dim; k, v: B x heads x Lk x head_dim; causal: Lq = Lk."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
        q, k, v = (_dense_rows(x) for x in (q, k, v))
        ctx.scale, ctx.causal = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale), causal
        out, lse = attention_forward(q, k, v, ctx.scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        # Of many cotangents at once torch calls an operator for each.
        backward = torch.ops.genflow.attention_backward if native.by_formula(grad) else attention_backward
        return *backward(_dense_rows(grad), q, k, v, out, lse, ctx.scale, ctx.causal), None, None


@native.operator
def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    B, H, L, D = q.shape
    out = q.new_empty(B, L, H, D).transpose(1, 2)  # so that heads side by side are a view
    lse = q.new_empty(B, H, L, dtype=torch.float32)
    strides = _strides(q, k, v, out)
    native.call("attention_forward", q.dtype, q, k, v, out, strides, lse, B, H, L, k.shape[2], D, scale, int(causal))
    return out, lse


@native.operator
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, L, D = q.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    strides = _strides(q, k, v, out, grad)
    native.call(
        "attention_backward", q.dtype, q, k, v, out, grad, strides, lse, dq, dk, dv,
        B, H, L, k.shape[2], D, scale, int(causal),
    )  # fmt: skip
    return dq, dk, dv


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of batch, head and row of each."""
    return tuple(stride for t in tensors for stride in t.stride()[:3])
