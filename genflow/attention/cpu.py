"""Half-precision attention on a CPU with matrix units (AMX), forward and backward: genflow/native/attention.cpp.

torch's own forward and, far more, its backward leave those units idle for short sequences, which pictures are. The weights
and their sums are in float32 here, in a head of one thread: what a sample comes to does not hang on its batch mates.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genflow.native import library as native

LONGEST = 4096  # keys: beyond, a head's weights leave the cache


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether attention without a mask, or a causal one of equal lengths, is to be had here."""
    return (
        q.dtype == torch.bfloat16
        and q.is_cpu
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] % 32 == 0
        and q.shape[-1] <= 256
        and 0 < k.shape[2] <= LONGEST
        and native.usable(q, k, v)
        and native.matrix_units()
    )


class MatrixAttention(torch.autograd.Function):
    """softmax(q k^T scale) v. q: B x heads x Lq x head_dim; k, v: B x heads x Lk x head_dim; causal: Lq = Lk."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        B, H, L, D = q.shape
        ctx.scale, ctx.causal = 1 / math.sqrt(D) if scale is None else scale, causal
        out = q.new_empty(B, L, H, D).transpose(1, 2)  # so that heads side by side are a view
        lse = q.new_empty(B, H, L, dtype=torch.float32)
        strides = _strides(q, k, v, out)
        native.call(
            "attention_forward", q.dtype, q, k, v, out, ctypes.addressof(strides), lse,
            B, H, L, k.shape[2], D, ctx.scale, int(causal),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        B, H, L, D = q.shape
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        strides = _strides(q, k, v, out, grad)
        native.call(
            "attention_backward", q.dtype, q, k, v, out, grad, ctypes.addressof(strides), lse, dq, dk, dv,
            B, H, L, k.shape[2], D, ctx.scale, int(ctx.causal),
        )  # fmt: skip
        return dq, dk, dv, None, None


def _strides(*tensors: Tensor) -> Any:
    """Of batch, head and row of each."""
    return (ctypes.c_long * (3 * len(tensors)))(*(stride for t in tensors for stride in t.stride()[:3]))
