"""Matrix products of training in 8 bits, on cards that have the arithmetic (Micikevicius et al. 2022, arXiv 2209.05433)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MULTIPLE = 16  # of rows and columns, for the products of CUDA


class Float8Product(torch.autograd.Function):
    """x W^T of x and W in e4m3; the gradient that comes back is taken in e5m2, for its wider range.

    Each tensor is scaled by its own largest magnitude of the moment. x: ... x I; W: O x I, I and O multiples of 16.
    Returns ... x O in bfloat16. What is kept for the backward is in 8 bits too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = _scaled(_rows(x), torch.float8_e4m3fn)
        w8, w_scale = _scaled(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
        return product(x8, w8, x_scale, w_scale, fast=True)[: x.shape[:-1].numel()].view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = _scaled(_rows(g), torch.float8_e5m2)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(g8, w8.t().contiguous(), g_scale, w_scale)
            dx = dx[: ctx.shape[:-1].numel()].view(ctx.shape).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dw = product(g8.t().contiguous(), x8.t().contiguous(), g_scale, x_scale).to(ctx.dtypes[1])
        return dx, dw


def product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, *, fast: bool = False) -> Tensor:
    """a b^T in bfloat16, times both scales. a: M x K, b: N x K, dense rows of 8 bits; fast: sums of fewer bits."""
    one = F.ScalingType.TensorWise
    return F.scaled_mm(a, b.t(), a_scale, one, b_scale, one, output_dtype=torch.bfloat16, use_fast_accum=fast)


def _rows(x: Tensor) -> Tensor:
    """... x I as rows, with rows of zeros up to a multiple of 16, and 16 where there are none."""
    x = x.reshape(-1, x.shape[-1])
    return F.pad(x, (0, 0, 0, max(-len(x) % MULTIPLE, MULTIPLE - len(x))))


def _scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in dtype, and the scale in float32: the largest magnitude becomes the largest number of dtype."""
    scale = (x.abs().amax().float() / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).to(dtype), scale
