"""Half-precision attention on a CPU: torch's flash kernel forward, and a backward of whole matrix products.

torch's own backward works in small blocks that leave the matrix units of a processor (AMX) idle, several times slower for
short sequences. Here the weights are made anew in the backward, as FlashAttention does, but for all keys of a sample at
once, a few samples at a time: memory does not grow with the batch. Products are rounded to bf16, as in plain attention.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**20  # weights at a time


@cache
def _fast_products() -> bool:
    """Whether this processor has matrix units for bf16."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether this way is faster: a bf16 gradient wanted on such a processor, the keys of one sample not too many."""
    return (
        q.dtype == torch.bfloat16
        and q.is_cpu
        and q.requires_grad
        and torch.is_grad_enabled()
        and q.shape[1] * q.shape[2] * k.shape[2] <= CHUNK
        and _fast_products()
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.peek_interpreter_stack()  # vmap, jvp and their like
    )


class MatrixBackward(torch.autograd.Function):
    """softmax(q k^T scale) v. q: B x heads x Lq x head_dim; k, v: B x heads x Lk x head_dim; causal: Lq = Lk."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
        ctx.scale, ctx.causal = 1 / math.sqrt(q.shape[-1]) if scale is None else scale, causal
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """P = softmax(s), dV = P^T dO, dS = P (dP - rowsum(P dP)), dP = dO V^T, dQ = scale dS K, dK = scale dS^T Q."""
        q, k, v = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        scaled, grad = q * ctx.scale, grad.contiguous()
        samples = max(CHUNK // (q.shape[1] * q.shape[2] * k.shape[2]), 1)
        dead = torch.full(q.shape[2:3] + k.shape[2:3], -torch.inf, dtype=q.dtype).triu(1) if ctx.causal else None
        for i in (slice(start, start + samples) for start in range(0, len(q), samples)):
            s = scaled[i] @ k[i].transpose(-2, -1)
            p = torch.softmax(s if dead is None else s.add_(dead), -1, dtype=torch.float32)
            dp = (grad[i] @ v[i].transpose(-2, -1)).float()
            ds = torch._softmax_backward_data(dp, p, -1, torch.float32).mul_(ctx.scale).to(q.dtype)
            dv[i] = p.to(q.dtype).transpose(-2, -1) @ grad[i]
            dq[i] = ds @ k[i]
            dk[i] = ds.transpose(-2, -1) @ q[i]
        return dq, dk, dv, None, None
