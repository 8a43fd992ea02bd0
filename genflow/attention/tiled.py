"""FlashAttention in plain torch: exact attention, block by block, whose memory grows with L and not with L squared.

Softmax needs a row's largest score and its sum before it can weigh the first value. The online softmax keeps both as
they stand, together with the output so far, and rescales them when a later block of keys has a larger score:

    m' = max(m, max_j s_j)    l' = e^(m - m') l + sum_j e^(s_j - m')    O' = e^(m - m') O + sum_j e^(s_j - m') v_j

and o = O / l in the end. Of the L x L weights nothing is stored: the backward makes each block anew from q, k and the
row's log-sum-exp, m + ln l. (Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4; the order of the loops and the one
division at the end as in Dao 2023, arXiv 2307.08691, algorithms 1 and 2.)

It explains, and serves as the oracle of the other backends in float64; a fused kernel is many times faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genflow.attention.masks import Mask


def tiled(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, *, block: int = 128) -> Tensor:
    """softmax(q k^T scale + mask) v in blocks of `block` queries by `block` keys.

    q: B x heads x Lq x head_dim; k, v: B x heads x Lk x head_dim, any device and floating dtype; half precision is
    summed in float32. Differentiable once. Returns B x heads x Lq x head_dim.
    """
    return _Tiled.apply(q, k, v, mask, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, block)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, block: int) -> Tensor:
        lq, lk = q.shape[2], k.shape[2]
        wide = _wide(q.dtype)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=wide)
        with torch.autocast(q.device.type, enabled=False):
            for rows in _blocks(lq, block):
                q_i = q[:, :, rows.start : rows.stop].to(wide)
                o = torch.zeros_like(q_i)  # O, l and m of the text above
                total = q_i.new_zeros(*q_i.shape[:3], 1)
                largest = torch.full_like(total, -torch.inf)
                for columns in _seen(mask, rows, lq, lk, block):
                    k_j, v_j = (x[:, :, columns.start : columns.stop].to(wide) for x in (k, v))
                    s = _scores(q_i, k_j, mask, rows, columns, lq, lk, scale)
                    new = torch.maximum(largest, s.amax(dim=-1, keepdim=True))
                    base = new.masked_fill(new == -torch.inf, 0)  # no live key yet: e^(-inf) and not e^(-inf + inf)
                    p = torch.exp(s - base)
                    rescale = torch.exp(largest - base)
                    total = rescale * total + p.sum(dim=-1, keepdim=True)
                    o = rescale * o + p @ v_j
                    largest = new
                # The largest score itself adds e^0 = 1 to the sum: below 1 is only a row without a live key.
                out[:, :, rows.start : rows.stop] = o / total.clamp(min=1)
                lse[:, :, rows.start : rows.stop] = (largest + total.log()).squeeze(-1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale, ctx.block = mask, scale, block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With P = e^(s - lse): dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = scale dS K, dK = scale dS^T Q."""
        q, k, v, out, lse = ctx.saved_tensors
        mask, scale, block = ctx.mask, ctx.scale, ctx.block
        lq, lk = q.shape[2], k.shape[2]
        wide = _wide(q.dtype)
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        lse = lse.masked_fill(lse == -torch.inf, 0)[..., None]  # a row without a live key: its scores are -inf, P is 0
        with torch.autocast(q.device.type, enabled=False):
            for rows in _blocks(lq, block):
                i = slice(rows.start, rows.stop)
                q_i, o_i, do_i = (x[:, :, i].to(wide) for x in (q, out, grad))
                d_i = (do_i * o_i).sum(dim=-1, keepdim=True)
                for columns in _seen(mask, rows, lq, lk, block):
                    j = slice(columns.start, columns.stop)
                    k_j, v_j = k[:, :, j].to(wide), v[:, :, j].to(wide)
                    p = torch.exp(_scores(q_i, k_j, mask, rows, columns, lq, lk, scale) - lse[:, :, i])
                    dv[:, :, j] += p.transpose(-2, -1) @ do_i
                    ds = p * (do_i @ v_j.transpose(-2, -1) - d_i) * scale
                    dq[:, :, i] += ds @ k_j
                    dk[:, :, j] += ds.transpose(-2, -1) @ q_i
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _scores(q: Tensor, k: Tensor, mask: Mask, rows: range, columns: range, lq: int, lk: int, scale: float) -> Tensor:
    """A block of scale q k^T, -inf where the mask hides the key."""
    s = q @ k.transpose(-2, -1) * scale
    live = mask.block(q, rows, columns, lq, lk)
    return s if live is None else s.masked_fill(~live, -torch.inf)


def _blocks(length: int, block: int) -> Iterator[range]:
    return (range(start, min(start + block, length)) for start in range(0, length, block))


def _seen(mask: Mask, rows: range, lq: int, lk: int, block: int) -> Iterator[range]:
    """The blocks of keys that these queries can see; what lies in the future of all of them is left out."""
    return _blocks(min(lk, max(rows[-1] + 1 + lk - lq, 0)) if mask.causal else lk, block)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
