"""Autograd functions of the fused CPU kernels: what a transformer block does between its matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genflow.native import library as native
from genflow.native.library import Forgotten, by_formula, call, operator


def _rows(vector: Tensor) -> tuple[Tensor, int]:
    """B x 1 x H with a contiguous last axis, and its stride over B."""
    vector = vector if vector.stride(-1) == 1 else vector.contiguous()
    return vector, vector.stride(0)


def as_float(parameter: Tensor) -> Tensor:
    return parameter.detach().float().contiguous()


def again(
    plain: Callable[..., Any], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients through the plain formula, which can be differentiated themselves where that is wanted."""
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = tuple(x.view_as(x) for x in inputs)  # of which none comes of another, as a tied weight's tokens of it
        outputs = plain(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in inputs if x.requires_grad]
    moving = [i for i, y in enumerate(outputs) if y.requires_grad]
    ends, cotangents = [outputs[i] for i in moving], [grads[i] for i in moving]
    found = iter(torch.autograd.grad(ends, wanted, cotangents, create_graph=twice) if wanted else ())
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

    x: ... x I, contiguous; W: O x I, of any dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, plain: Callable) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, weight, cast)
        ctx.plain = plain
        return plain(x, cast)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        x, weight, cast = ctx.saved_tensors
        if by_formula(g):
            return *again(lambda x, w: ctx.plain(x, w.to(x.dtype)), (x, weight), (g,)), None
        dx = g @ cast if ctx.needs_input_grad[0] else None
        g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        g = g if g.stride(1) == 1 else g.contiguous()
        return dx, weight_gradient(g, x).to(weight.dtype), None


@operator
def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g^T x in float32, of rows that are dense. g: N x O; x: N x I, both bf16."""
    shape = g.shape[1], x.shape[1]
    if not x.shape[0]:
        return torch.zeros(shape, dtype=torch.float32)
    dw = torch.empty(shape, dtype=torch.float32)
    call("weight_gradient", x.dtype, g, g.stride(0), x, x.stride(0), dw, x.shape[0], *shape)
    return dw


class ModulatedNorm(torch.autograd.Function):
    """(1 + scale) LN(x) + shift, of a contiguous x; and x, whose gradient as that comes to the norm's in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float, plain: Callable
    ) -> tuple[Tensor, Tensor]:
        y, mean, rstd = norm_forward(x, shift, scale, eps)
        ctx.save_for_backward(x, shift, scale, mean, rstd)
        ctx.plain = plain
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, past: Tensor | None) -> tuple:  # type: ignore[override]
        x, shift, scale, mean, rstd = ctx.saved_tensors
        if g is None:
            return past, None, None, None, None
        if by_formula(g, g if past is None else past):
            dx, *rest = again(ctx.plain, (x, shift, scale), (g,))
            return dx if dx is None or past is None else dx + past, *rest, None, None
        past = None if past is None else past.contiguous()
        return *norm_backward(g.contiguous(), past, x, scale, mean, rstd), None, None


@operator
def norm_forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
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
    return y, mean, rstd


@operator
def norm_backward(
    g: Tensor, past: Tensor | None, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, L, H = x.shape
    scale, stride = _rows(scale)
    dx, dshift, dscale = torch.empty_like(x), x.new_empty(B, 1, H), x.new_empty(B, 1, H)
    call("norm_backward", x.dtype, g, past, x, scale, stride, mean, rstd, dx, dshift, dscale, B, L, H)
    return dx, dshift, dscale


class GatedResidual(torch.autograd.Function):
    """x + gate (y + bias), of contiguous x and y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor, bias: Tensor, plain: Callable) -> Tensor:
        ctx.save_for_backward(gate, y, bias)
        ctx.plain = plain
        return gate_forward(x, gate, y, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        gate, y, bias = ctx.saved_tensors
        if by_formula(g):
            more = again(lambda *inputs: ctx.plain(torch.zeros_like(y), *inputs), (gate, y, bias), (g,))
            return g, *more, None
        g = g.contiguous()
        return g, *gate_backward(g, gate, y, bias), None


@operator
def gate_forward(x: Tensor, gate: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    gate, stride = _rows(gate)
    out = torch.empty_like(x)
    call("gate_forward", x.dtype, x, gate, stride, y, as_float(bias), out, *x.shape)
    return out


@operator
def gate_backward(g: Tensor, gate: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, stride = _rows(gate)
    dy, dgate = torch.empty_like(y), torch.empty_like(gate, memory_format=torch.contiguous_format)
    dbias = torch.empty(y.shape[0], bias.shape[0], dtype=torch.float32)
    call("gate_backward", y.dtype, g, gate, stride, y, as_float(bias), dy, dgate, dbias, *y.shape)
    return dgate, dy, dbias.sum(0).to(bias.dtype)


class GELU(torch.autograd.Function):
    """GELU of x + bias, tanh form, of a contiguous x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, plain: Callable) -> Tensor:
        if isinstance(ctx, Forgotten):
            return _gelu_into(x, x, bias)  # a product that nobody else has
        ctx.save_for_backward(x, bias)
        ctx.plain = plain
        return gelu_forward(x, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        x, bias = ctx.saved_tensors
        if by_formula(g):
            return *again(ctx.plain, (x, bias), (g,)), None
        return *gelu_backward(g.contiguous(), x, bias), None


@operator
def gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    return _gelu_into(torch.empty_like(x), x, bias)


def _gelu_into(y: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    call("gelu_forward", x.dtype, x, as_float(bias), y, x.shape[0] * x.shape[1], x.shape[2])
    return y


@operator
def gelu_backward(g: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dx, dbias = torch.empty_like(x), torch.zeros(x.shape[0], bias.shape[0], dtype=torch.float32)
    call("gelu_backward", x.dtype, g, x, as_float(bias), dx, dbias, *x.shape)
    return dx, dbias.sum(0).to(bias.dtype)


class JointHeads(torch.autograd.Function):
    """The q, k, v of several streams, normed per head, side by side in one sequence: each B x heads x L x D.

    tensors: the n streams, B x L x 3 hidden, contiguous; then for each its bias, and its q and k norm weights, which are
    empty where there is no norm.
    """

    @staticmethod
    def forward(ctx: Any, heads: int, eps: float, plain: Callable, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = len(tensors) // 4
        streams, weights = list(tensors[:n]), list(tensors[n:])
        q, k, v, *scales = heads_forward(streams, weights, heads, eps)
        ctx.save_for_backward(*streams, *weights, *scales)
        ctx.heads, ctx.plain, ctx.n = heads, plain, n
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:  # type: ignore[override]
        n, saved = ctx.n, ctx.saved_tensors
        if by_formula(*grads):
            return None, None, None, *again(ctx.plain, saved[: 4 * n], grads)
        dense = [g if g.stride(-1) == 1 else g.contiguous() for g in grads]
        streams, weights, scales = list(saved[:n]), list(saved[n : 4 * n]), list(saved[4 * n :])
        return None, None, None, *heads_backward(dense, streams, weights, scales, ctx.heads)


@operator
def heads_forward(streams: list[Tensor], weights: list[Tensor], heads: int, eps: float) -> list[Tensor]:
    """q, k, v, and for each stream the reciprocal RMS of its q and of its k."""
    first = streams[0]
    B, D, J = first.shape[0], first.shape[2] // (3 * heads), sum(s.shape[1] for s in streams)
    q, k, v = (first.new_empty(B, heads, J, D) for _ in range(3))
    scales, at = [], 0
    for i, stream in enumerate(streams):
        bias, wq, wk = (as_float(w) for w in weights[3 * i : 3 * i + 3])
        L = stream.shape[1]
        rq, rk = (stream.new_empty(B, L, heads, dtype=torch.float32) for _ in range(2))
        normed = int(wq.numel() > 0)
        call("heads_forward", first.dtype, stream, bias, wq, wk, q, k, v, rq, rk, B, L, heads, D, J, at, eps, normed)
        scales += [rq, rk]
        at += L
    return [q, k, v, *scales]


@operator
def heads_backward(
    grads: list[Tensor], streams: list[Tensor], weights: list[Tensor], scales: list[Tensor], heads: int
) -> list[Tensor]:
    """The gradients of the streams and of their weights from those of q, k and v."""
    strides = tuple(stride for g in grads for stride in g.stride()[:3])
    out_streams, out_weights, at = [], [], 0
    for i, stream in enumerate(streams):
        own = weights[3 * i : 3 * i + 3]
        bias, wq, wk = (as_float(w) for w in own)
        B, L, D = stream.shape[0], stream.shape[1], grads[0].shape[-1]
        dx = torch.empty_like(stream)
        dbias, dwq, dwk = (torch.zeros(B, w.numel(), dtype=torch.float32) for w in own)
        rq, rk = scales[2 * i], scales[2 * i + 1]
        normed = int(wq.numel() > 0)
        call(
            "heads_backward", stream.dtype, *grads, strides, stream, bias, wq, wk, rq, rk, dx,
            dbias, dwq, dwk, B, L, heads, D, at, normed,
        )  # fmt: skip
        out_streams.append(dx)
        out_weights += [d.sum(0).to(w.dtype) for d, w in zip((dbias, dwq, dwk), own, strict=True)]
        at += L
    return [*out_streams, *out_weights]


class JointAttention(torch.autograd.Function):
    """Attention over several streams side by side, in bf16, between their products and what each hears, B x L x hidden.

    scale: 1/sqrt(head_dim); tensors: as those of JointHeads, whose q, k and v are made where attention reads them, and made
    again in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: int, eps: float, causal: bool, plain: Callable, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n = len(tensors) // 4
        *outs, lse = joint_attention_forward(list(tensors[:n]), list(tensors[n:]), heads, eps, causal)
        ctx.save_for_backward(*tensors, *outs, lse)
        ctx.how, ctx.plain = (heads, eps, causal), plain
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n, saved = len(grads), list(ctx.saved_tensors)
        if by_formula(*grads):
            return None, None, None, None, *again(ctx.plain, tuple(saved[: 4 * n]), grads)
        streams, weights, outs, lse = saved[:n], saved[n : 4 * n], saved[4 * n : -1], saved[-1]
        dense = [g.contiguous() for g in grads]
        return None, None, None, None, *joint_attention_backward(dense, streams, weights, outs, lse, *ctx.how)


@operator
def joint_attention_forward(
    streams: list[Tensor], weights: list[Tensor], heads: int, eps: float, causal: bool
) -> list[Tensor]:
    """What each stream hears, and the log-sum-exp of each row's scores, to the base of 2: B x heads x all rows."""
    how, numbers = _joint(streams, weights, heads, eps, causal)
    outs = [s.new_empty(*s.shape[:2], s.shape[2] // 3) for s in streams]
    lse = streams[0].new_empty(streams[0].shape[0], heads, sum(s.shape[1] for s in streams), dtype=torch.float32)
    call("joint_attention_forward", streams[0].dtype, streams, list(map(as_float, weights)), outs, *how, lse, *numbers)
    return [*outs, lse]


@operator
def joint_attention_backward(
    grads: list[Tensor],
    streams: list[Tensor],
    weights: list[Tensor],
    outs: list[Tensor],
    lse: Tensor,
    heads: int,
    eps: float,
    causal: bool,
) -> list[Tensor]:
    """The gradients of the streams and of their weights from those of what each heard."""
    how, numbers = _joint(streams, weights, heads, eps, causal)
    dx, B = [torch.empty_like(s) for s in streams], lse.shape[0]
    dw = [torch.zeros(B, 1 if i % 3 == 0 else heads, w.numel(), dtype=torch.float32) for i, w in enumerate(weights)]
    floats = list(map(as_float, weights))
    call("joint_attention_backward", dx[0].dtype, streams, floats, outs, grads, dx, dw, *how, lse, *numbers)
    return [*dx, *(d.sum((0, 1)).to(w.dtype) for d, w in zip(dw, weights, strict=True))]


def _joint(streams: list[Tensor], weights: list[Tensor], heads: int, eps: float, causal: bool) -> tuple[tuple, tuple]:
    """What both kernels take: lengths and whether there are norms; n, B, heads, head_dim, eps, scale, causal."""
    B, D = streams[0].shape[0], streams[0].shape[2] // (3 * heads)
    lengths, normed = tuple(s.shape[1] for s in streams), tuple(int(w.numel() > 0) for w in weights[1::3])
    return (lengths, normed), (len(streams), B, heads, D, eps, D**-0.5, int(causal))
