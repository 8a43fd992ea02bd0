"""The attention backends, each a capability record."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from genflow.attention.dispatch import Attention
from genflow.registry import attention_export


@attention_export("sdpa")
@cache
def sdpa() -> Attention:
    """PyTorch's scaled_dot_product_attention: flash, memory-efficient or cuDNN kernels, as the device has them."""

    def fn(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> Tensor:
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    return Attention("sdpa", fn)


@attention_export("math")
@cache
def plain() -> Attention:
    """Plain matrix products and a softmax in float32 or wider: any device, double backward and forward-mode AD."""

    def fn(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> Tensor:
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        scores = (q * scale) @ k.transpose(-2, -1)
        scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
        return scores.softmax(dim=-1).to(v.dtype) @ v

    return Attention("math", fn, offers=frozenset({"backward", "double_backward", "forward_ad"}))


@attention_export("xformers")
@cache
def xformers() -> Attention:
    """xformers' memory_efficient_attention: CUDA only; pip install genflow[xformers]."""

    @cache
    def available() -> str | None:
        try:
            from xformers.ops import memory_efficient_attention  # noqa: F401
        except Exception as error:  # a wheel built for another torch fails in many ways
            return f"xformers cannot be imported ({type(error).__name__}: {error}); pip install genflow[xformers]"
        return None if torch.cuda.is_available() else "needs a CUDA device"

    def fn(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> Tensor:
        from xformers.ops import memory_efficient_attention

        q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # xformers' layout is B x L x heads x head_dim
        return memory_efficient_attention(q, k, v, scale=scale).transpose(1, 2)

    return Attention(
        "xformers",
        fn,
        available=available,
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        max_head_dim=256,
        head_dim_multiple=8,
        masks=False,
    )
