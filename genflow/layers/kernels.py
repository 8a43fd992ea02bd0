"""Autograd functions of the fused CPU kernels: what a transformer block does between its matrix products."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genflow.native import library as native
from genflow.native.library import Forgotten, call


def _rows(vector: Tensor) -> tuple[Tensor, int]:
    """B x 1 x H with a contiguous last axis, and its stride over B."""
    vector = vector if vector.stride(-1) == 1 else vector.contiguous()
    return vector, vector.stride(0)


def as_float(parameter: Tensor) -> Tensor:
    return parameter.detach().float().contiguous()


def again(
    plain: Callable[..., Any], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated themselves, through the plain formula: for double backward."""
    outputs = plain(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)


def trains_on_matrix_units(x: Tensor, weight: Tensor) -> bool:
    """Whether a product with a weight whose gradient is wanted is to be a `Product`."""
    return (
        x.dtype == torch.bfloat16
        and weight.requires_grad
        and torch.is_grad_enabled()
        and (weight.dtype == x.dtype or torch.is_autocast_enabled("cpu"))
        and weight.shape[0] % 32 == 0
        and weight.shape[1] % 32 == 0
        and native.usable(x)
        and native.matrix_units()
    )


class Product(torch.autograd.Function):
    """x W^T in bf16; its gradient of W is summed and given in float32, where libraries round it to bf16.

    x: ... x I; W: O x I, of any dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, plain: Callable) -> Tensor:
        x, cast = x.contiguous(), weight.to(x.dtype)
        ctx.save_for_backward(x, weight, cast)
        ctx.plain = plain
        return plain(x, cast)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        x, weight, cast = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *again(lambda x, w: ctx.plain(x, w.to(x.dtype)), (x, weight), (g,)), None
        dx = g @ cast if ctx.needs_input_grad[0] else None
        g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        g = g if g.stride(1) == 1 else g.contiguous()
        dw = torch.zeros(weight.shape) if len(x) == 0 else torch.empty(weight.shape)
        call("weight_gradient", x.dtype, g, g.stride(0), x, x.stride(0), dw, len(x), *weight.shape)
        return dx, dw.to(weight.dtype), None


class ModulatedNorm(torch.autograd.Function):
    """(1 + scale) LN(x) + shift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float, plain: Callable) -> Tensor:
        x = x.contiguous()
        (shift, stride), (scale, scale_stride) = _rows(shift), _rows(scale)
        if stride != scale_stride:
            shift, scale, stride = shift.contiguous(), scale.contiguous(), x.shape[-1]
        B, L, H = x.shape
        y, mean, rstd = (
            torch.empty_like(x),
            x.new_empty(B, L, dtype=torch.float32),
            x.new_empty(B, L, dtype=torch.float32),
        )
        call("norm_forward", x.dtype, x, shift, scale, stride, y, mean, rstd, B, L, H, eps)
        ctx.save_for_backward(x, shift, scale, mean, rstd)
        ctx.plain = plain
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        x, shift, scale, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *again(ctx.plain, (x, shift, scale), (g,)), None, None
        B, L, H = x.shape
        dx, dshift, dscale = torch.empty_like(x), x.new_empty(B, 1, H), x.new_empty(B, 1, H)
        stride = _rows(scale)[1]
        call("norm_backward", x.dtype, g.contiguous(), x, scale, stride, mean, rstd, dx, dshift, dscale, B, L, H)
        return dx, dshift, dscale, None, None


class GatedResidual(torch.autograd.Function):
    """x + gate (y + bias)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor, bias: Tensor, plain: Callable) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        gate, stride = _rows(gate)
        out = torch.empty_like(x)
        call("gate_forward", x.dtype, x, gate, stride, y, as_float(bias), out, *x.shape)
        ctx.save_for_backward(gate, y, bias)
        ctx.plain = plain
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        gate, y, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            more = again(lambda *inputs: ctx.plain(torch.zeros_like(y), *inputs), (gate, y, bias), (g,))
            return g, *more, None
        g = g.contiguous()
        dy, dgate = torch.empty_like(y), torch.empty_like(gate, memory_format=torch.contiguous_format)
        dbias = torch.empty(len(y), len(bias))
        call("gate_backward", y.dtype, g, gate, _rows(gate)[1], y, as_float(bias), dy, dgate, dbias, *y.shape)
        return g, dgate, dy, dbias.sum(0).to(bias.dtype), None


class GELU(torch.autograd.Function):
    """GELU of x + bias, tanh form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, plain: Callable) -> Tensor:
        x = x.contiguous()
        y = x if isinstance(ctx, Forgotten) else torch.empty_like(x)  # a product that nobody else has
        call("gelu_forward", x.dtype, x, as_float(bias), y, x.shape[0] * x.shape[1], x.shape[2])
        ctx.save_for_backward(x, bias)
        ctx.plain = plain
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        x, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *again(ctx.plain, (x, bias), (g,)), None
        dx, dbias = torch.empty_like(x), torch.zeros(len(x), len(bias))
        call("gelu_backward", x.dtype, g.contiguous(), x, as_float(bias), dx, dbias, *x.shape)
        return dx, dbias.sum(0).to(bias.dtype), None


class JointHeads(torch.autograd.Function):
    """The q, k, v of several streams, normed per head, side by side in one sequence: each B x heads x L x D.

    tensors: the n streams, B x L x 3 hidden; then for each its bias, and its q and k norm weights, which are empty where
    there is no norm.
    """

    @staticmethod
    def forward(ctx: Any, heads: int, eps: float, plain: Callable, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = len(tensors) // 4
        streams = [t.contiguous() for t in tensors[:n]]
        weights = [as_float(w) for w in tensors[n:]]
        first = streams[0]
        B, D, J = first.shape[0], first.shape[2] // (3 * heads), sum(s.shape[1] for s in streams)
        q, k, v = (first.new_empty(B, heads, J, D) for _ in range(3))
        scales, at = [], 0
        for i, stream in enumerate(streams):
            bias, wq, wk = weights[3 * i : 3 * i + 3]
            L = stream.shape[1]
            rq, rk = (stream.new_empty(B, L, heads, dtype=torch.float32) for _ in range(2))
            normed = int(wq.numel() > 0)
            call(
                "heads_forward", first.dtype, stream, bias, wq, wk, q, k, v, rq, rk, B, L, heads, D, J, at, eps, normed
            )
            scales += [rq, rk]
            at += L
        ctx.save_for_backward(*streams, *tensors[n:], *scales)
        ctx.heads, ctx.plain, ctx.n = heads, plain, n
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:  # type: ignore[override]
        n, heads, saved = ctx.n, ctx.heads, ctx.saved_tensors
        streams, originals, scales = saved[:n], saved[n : 4 * n], saved[4 * n :]
        if torch.is_grad_enabled():
            return None, None, None, *again(ctx.plain, saved[: 4 * n], grads)
        dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in grads)
        strides = (ctypes.c_long * 9)(*(s for g in (dq, dk, dv) for s in g.stride()[:3]))
        address = ctypes.addressof(strides)
        out_streams, out_weights, at = [], [], 0
        for i, stream in enumerate(streams):
            own = originals[3 * i : 3 * i + 3]
            bias, wq, wk = (as_float(w) for w in own)
            B, L, D = stream.shape[0], stream.shape[1], dq.shape[-1]
            dx = torch.empty_like(stream)
            dbias, dwq, dwk = (torch.zeros(B, w.numel()) for w in own)
            rq, rk = scales[2 * i], scales[2 * i + 1]
            normed = int(wq.numel() > 0)
            call(
                "heads_backward", stream.dtype, dq, dk, dv, address, stream, bias, wq, wk, rq, rk, dx,
                dbias, dwq, dwk, B, L, heads, D, at, normed,
            )  # fmt: skip
            out_streams.append(dx)
            out_weights += [d.sum(0).to(w.dtype) for d, w in zip((dbias, dwq, dwk), own, strict=True)]
            at += L
        return None, None, None, *out_streams, *out_weights
