"""Three convolutions, 3x3, 1x1 and 3x3, with ReLU between them: on a CPU as matrix products, for its matrix units."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genflow.layers.kernels import again, as_float
from genflow.native.library import by_formula, call, usable

ROWS = 8192  # places that a thread takes at a time, so that what lies between the products stays in its cache


def three_convolutions(first: nn.Conv2d, middle: nn.Conv2d, last: nn.Conv2d, x: Tensor, added: Tensor | None) -> Tensor:
    """last(relu(middle(relu(first(x) + added)))), of 3x3, 1x1 and 3x3 convolutions with padding.

    x: B x C x H x W; added: B x hidden, 1 x hidden, or none. Under autocast it is computed in autocast's dtype.
    """
    added = x.new_zeros(1, first.out_channels) if added is None else added
    weights = [cast(Tensor, w) for layer in (first, middle, last) for w in (layer.weight, layer.bias)]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    single = all(t.dtype == torch.float32 for t in (x, *weights))
    single = single and x.is_cpu and len(added) in (1, len(x))
    if single and usable(x.new_empty(0, dtype=dtype)) and not torch.compiler.is_compiling():
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, added, *weights))
        return ThreeConvolutions.apply(x, added.float(), *weights, dtype, keep)
    return _plain(x, added, *weights)


def _plain(x: Tensor, added: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor) -> Tensor:
    h = F.conv2d(x, w1, b1, padding=1)
    h = F.conv2d((h + added[:, :, None, None].to(h.dtype)).relu(), w2, b2).relu()
    return F.conv2d(h, w3, b3, padding=1)


class ThreeConvolutions(torch.autograd.Function):
    """The columns of x times W1, times W2, times W3, folded. W1: 9 C x hidden and so on, rows in the order (k, c)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, *rest: Any) -> Tensor:
        w1, b1, w2, b2, w3, b3, dtype, keep = rest
        B, C, H, W = x.shape
        hidden, outputs, places = len(b1), len(b3), H * W
        packed1 = w1.to(dtype).permute(2, 3, 1, 0).reshape(9 * C, hidden)
        packed2 = w2.view(hidden, hidden).T.to(dtype)
        packed3 = w3.to(dtype).flip(2, 3).permute(1, 2, 3, 0).reshape(hidden, 9 * outputs)
        bias1, bias2, bias3 = (added + b1).contiguous(), as_float(b2), as_float(b3)
        pixels, step = _pixels(x)
        chunk = _samples_at_once(B, places)
        kept = B if keep else chunk
        columns, h1, h2 = (x.new_empty(kept * places, width, dtype=dtype) for width in (9 * C, hidden, hidden))
        spread = x.new_empty(chunk * places, 9 * outputs, dtype=dtype)
        out = x.new_empty(B, H, W, outputs)
        for start in range(0, B, chunk):
            n = min(chunk, B - start)
            at = slice(start * places, (start + n) * places) if keep else slice(n * places)
            unfold(pixels[start : start + n], step, columns[at])
            torch.mm(columns[at], packed1, out=h1[at])
            each = bias1[start : start + n] if len(bias1) > 1 else bias1
            call("bias_relu", dtype, h1[at], each, hidden if len(bias1) > 1 else 0, n, places, hidden)
            torch.mm(h1[at], packed2, out=h2[at])
            call("bias_relu", dtype, h2[at], bias2, 0, n, places, hidden)
            torch.mm(h2[at], packed3, out=spread[: n * places])
            fold(spread[: n * places], bias3, out[start : start + n])
        ctx.save_for_backward(x, added, *rest[:-2], columns, h1, h2, packed1, packed2, packed3)
        return out.permute(0, 3, 1, 2).to(dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        x, added, w1, b1, w2, b2, w3, b3, columns, h1, h2, packed1, packed2, packed3 = ctx.saved_tensors
        if by_formula(g):
            return *again(_plain, (x, added, w1, b1, w2, b2, w3, b3), (g,)), None, None
        B, C, H, W = x.shape
        hidden, outputs, places = len(b1), len(b3), H * W
        g, step = _pixels(g.float())
        chunk = _samples_at_once(B, places)
        g9, g2, g1, gc = (columns.new_empty(chunk * places, width) for width in (9 * outputs, hidden, hidden, 9 * C))
        d1, d2, d3 = (x.new_zeros(w.shape) for w in (packed1, packed2, packed3))
        dadded, db2, nothing = x.new_empty(B, hidden), x.new_empty(B, hidden), x.new_zeros(C)
        dx = x.new_empty(B, H, W, C) if ctx.needs_input_grad[0] else None
        for start in range(0, B, chunk):
            n = min(chunk, B - start)
            own, at = slice(start, start + n), slice(start * places, (start + n) * places)
            if n < chunk:
                g9, g2, g1, gc = (buffer[: n * places] for buffer in (g9, g2, g1, gc))
            unfold(g[own], step, g9)
            d3 += h2[at].T @ g9
            torch.mm(g9, packed3.T, out=g2)
            call("relu_backward", g2.dtype, g2, h2[at], db2[own], n, places, hidden)
            d2 += h1[at].T @ g2
            torch.mm(g2, packed2.T, out=g1)
            call("relu_backward", g1.dtype, g1, h1[at], dadded[own], n, places, hidden)
            d1 += columns[at].T @ g1
            if dx is not None:
                fold(torch.mm(g1, packed1.T, out=gc), nothing, dx[own])
        db1 = dadded.sum(0)
        return (
            None if dx is None else dx.permute(0, 3, 1, 2),
            db1.unsqueeze(0) if len(added) == 1 else dadded,
            d1.view(3, 3, C, hidden).permute(3, 2, 0, 1),
            db1,
            d2.T.reshape(w2.shape),
            db2.sum(0),
            d3.view(hidden, 3, 3, outputs).permute(3, 0, 1, 2).flip(2, 3),
            g.sum((0, 2, 3)),
            None,
            None,
        )


def _samples_at_once(samples: int, places: int) -> int:
    return min(max(1, samples), max(1, ROWS * torch.get_num_threads() // places))


def _pixels(x: Tensor) -> tuple[Tensor, int]:
    """x with its channels side by side in memory, a copy where they are not, and how far apart its pixels are."""
    _, C, H, W = x.shape
    step = x.stride(3)
    if x.stride() == (H * W * step, 1, W * step, step):
        return x, step
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), C


def unfold(x: Tensor, step: int, columns: Tensor) -> Tensor:
    """Into columns, B H W x 9 C, what lies around every place of x, B x C x H x W float32 as of `_pixels`."""
    B, C, H, W = x.shape
    call("unfold", columns.dtype, x, step, columns, B, H, W, C)
    return columns


def fold(columns: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Into out, B x H x W x C float32, the sum of the columns at the places that they came from, plus bias."""
    call("fold", columns.dtype, columns, bias, out, *out.shape)
    return out
