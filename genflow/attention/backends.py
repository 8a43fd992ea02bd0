"""The attention backends, each a capability record."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genflow.attention.cpu import MatrixAttention, serves
from genflow.attention.dispatch import Attention, Call
from genflow.attention.known_bad import HALF, capability
from genflow.attention.masks import Mask, Packing, packed
from genflow.attention.tiled import tiled
from genflow.errors import UserError
from genflow.native.library import run
from genflow.registry import attention_export

GRAPHS = 1024  # of what is compiled, one for each shape, kind and mode
CPU, CUDA = frozenset({"cpu"}), frozenset({"cuda"})
PACKED = ("none", "causal", "keys", "segments", "causal+segments", "keys+segments")  # what masks.packed can lower


@attention_export("sdpa")
def sdpa() -> Attention:
    """PyTorch's scaled_dot_product_attention: flash, memory-efficient or cuDNN kernels, as the device has them."""
    return Attention("sdpa", _sdpa)


def _best(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    """genflow's own kernel where a processor multiplies bf16, else torch's."""
    return run(MatrixAttention, q, k, v, scale, causal) if serves(q, k, v) else _torchs(q, k, v, scale, causal)


def _torchs(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, fused: Callable[..., Tensor] = _best
) -> Tensor:
    """fused: what serves no mask and the causal one."""
    if q.is_mps:  # wrong for views that permute (pytorch/pytorch#181133)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    lq, lk = q.shape[2], k.shape[2]
    if mask.kind == "none" or (mask.kind == "causal" and lq == 1):
        return fused(q, k, v, scale, False)
    # torch aligns the first query with the first key, alike only here; its scale hides no key where it is not above 0
    if mask.kind == "causal" and lq == lk and (scale is None or scale > 0):
        return fused(q, k, v, scale, True)
    live = mask.full(q, lq, lk)
    if q.is_cpu or live is None:  # there, rows without a live key come out as zeros
        return F.scaled_dot_product_attention(q, k, v, attn_mask=live, scale=scale)
    live, dead = _revived(live)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=live, scale=scale).masked_fill(dead, 0)


def _revived(live: Tensor) -> tuple[Tensor, Tensor]:
    """(live, with all keys for the queries that had none; which queries these were, broadcast to B x heads x Lq x 1)."""
    dead = ~live.any(dim=-1, keepdim=True)
    return live | dead, dead


def _one_kernel(kernel: SDPBackend, what: str) -> Any:
    """_sdpa with one of torch's kernels. torch keeps that choice for the whole process while the call lasts."""

    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
        try:
            with sdpa_kernel(kernel):
                return _sdpa(q, k, v, mask, scale, fused=_torchs)
        except RuntimeError as error:
            if "No viable backend" in str(error) or "No available kernel" in str(error):
                why = "; ".join(_warned(kernel, q, k, v, mask, scale)) or "torch has no such kernel for these tensors"
                raise UserError(f"attention backend {what!r}: {why}") from error
            raise

    return fn


def _warned(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> list[str]:
    """What torch warns of when a kernel cannot serve a call: the reasons."""
    with warnings.catch_warnings(record=True) as told, suppress(RuntimeError), sdpa_kernel(kernel):
        warnings.simplefilter("always")
        _sdpa(q, k, v, mask, scale, fused=_torchs)
    return [" ".join(str(warning.message).split(" (Triggered")[0].split()) for warning in told]


@attention_export("sdpa_flash")
def sdpa_flash() -> Attention:
    """FlashAttention as torch has it: on a CPU for all masks and dtypes, on CUDA for half precision without a mask."""

    def limits(call: Call) -> Iterable[str]:
        if call.device != "cuda":
            return
        if call.dtype not in HALF:
            yield f"takes bfloat16/float16 on cuda, not {str(call.dtype)[6:]}"
        if call.mask not in ("none", "causal"):
            yield f"takes masks none, causal on cuda, not {call.mask}"
        if call.mask == "causal" and call.lq != call.lk and call.lq != 1:
            yield f"takes a causal mask on cuda for as many queries as keys only, not {call.lq} and {call.lk}"
        if call.head_dim > 256:
            yield f"takes head_dim up to 256 on cuda, not {call.head_dim}"
        yield from _too_old(8)

    fn = _one_kernel(SDPBackend.FLASH_ATTENTION, "sdpa_flash")
    return Attention("sdpa_flash", fn, devices=CPU | CUDA, limits=limits)


@attention_export("sdpa_efficient")
def sdpa_efficient() -> Attention:
    """The memory-efficient kernel of torch: CUDA, all masks, also float32."""

    def limits(call: Call) -> Iterable[str]:
        aligned = 8 if call.dtype in HALF else 4
        if call.device == "cuda" and call.head_dim % aligned:
            yield f"takes head_dim in multiples of {aligned} in {str(call.dtype)[6:]}, not {call.head_dim}"

    fn = _one_kernel(SDPBackend.EFFICIENT_ATTENTION, "sdpa_efficient")
    return Attention("sdpa_efficient", fn, devices=CUDA, dtypes=HALF | {torch.float32}, limits=limits)


@attention_export("sdpa_cudnn")
def sdpa_cudnn() -> Attention:
    """cuDNN's attention as torch has it: CUDA, half precision, all masks; not under deterministic algorithms."""

    def limits(call: Call) -> Iterable[str]:
        if call.device == "cuda":
            if call.lk == 1:
                yield "takes two keys or more, not 1"
            yield from _too_old(8)

    return Attention(
        "sdpa_cudnn",
        _one_kernel(SDPBackend.CUDNN_ATTENTION, "sdpa_cudnn"),
        devices=CUDA,
        dtypes=HALF,
        max_head_dim=128,
        head_dim_multiple=8,
        limits=limits,
    )


@attention_export("math")
def plain() -> Attention:
    """Plain matrix products and a softmax in float32 or wider: any device, double backward and forward-mode AD."""

    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        scores = (q * scale) @ k.transpose(-2, -1)
        scores = scores.float() if scores.dtype in HALF else scores
        live = mask.full(q, q.shape[2], k.shape[2])
        if live is None:
            return scores.softmax(dim=-1).to(v.dtype) @ v
        live, dead = _revived(live)
        return (scores.masked_fill(~live, -torch.inf).softmax(dim=-1).to(v.dtype) @ v).masked_fill(dead, 0)

    return Attention("math", fn, offers=frozenset({"backward", "double_backward", "forward_ad"}))


@attention_export("tiled")
def block_wise() -> Attention:
    """FlashAttention in plain torch, block by block: any device, dtype and mask, memory O(L); to read and to compare."""
    return Attention("tiled", tiled)


@attention_export("flex")
@cache
def flex() -> Attention:
    """torch's flex_attention: all masks, compiled on CUDA at its first call; forward only and not fused elsewhere."""

    @cache
    def kernel() -> Any:
        from torch.nn.attention.flex_attention import flex_attention

        if not torch.cuda.is_available():
            return flex_attention
        # A graph for each shape: one for all shapes has given NaN under masks that differ by sample (pytorch#186775).
        return torch.compile(flex_attention, dynamic=False, **many_graphs())

    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
        if q.device.type != "cuda":  # torch asks whether they could have a gradient, not whether one is wanted
            q, k, v = q.detach(), k.detach(), v.detach()
        return kernel()(q, k, v, block_mask=_block_mask(mask, q, k.shape[2]), scale=scale)

    def limits(call: Call) -> Iterable[str]:
        if call.device != "cuda" and "backward" in call.needs:
            yield f"has no backward on {call.device}"
        if call.device == "cuda" and call.dtype == torch.float64:
            yield "takes bfloat16/float16/float32 on cuda, not float64"
        if call.device == "cuda" and call.head_dim < 16:
            yield f"takes head_dim from 16 on cuda, not {call.head_dim}"

    return Attention("flex", fn, devices=frozenset({"cpu", "cuda", "mps"}), limits=limits)


def _block_mask(mask: Mask, q: Tensor, lk: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if mask.kind == "none":
        return None
    batch, heads, lq, _ = q.shape
    b = None if mask.kind == "causal" else batch
    h = None if mask.dense is None else heads
    make = lambda: create_block_mask(mask.live(lq, lk), b, h, lq, lk, device=str(q.device))
    return mask.kept(("flex", batch, heads, lq, lk, q.device), make)


@attention_export("varlen")
@cache
def varlen() -> Attention:
    """torch's varlen_attn, for packed sequences: CUDA, half precision; padding costs nothing."""

    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if scale is not None:  # the first releases have no such argument
            q = q * (scale * math.sqrt(q.shape[-1]))
        # So is the causal flag: is_causal in the first releases, a window that ends at the query since.
        causal: dict[str, Any] = {}
        if mask.causal:
            causal = {"window_size": (-1, 0)} if _has(varlen_attn, "window_size") else {"is_causal": True}

        def kernel(q: Tensor, k: Tensor, v: Tensor, p: Packing) -> Tensor:
            return _first(varlen_attn(q, k, v, p.q_starts, p.k_starts, max(p.q_lengths), max(p.k_lengths), **causal))

        return packed(q, k, v, mask, kernel)

    return Attention(
        "varlen",
        fn,
        devices=CUDA,
        dtypes=HALF,
        max_head_dim=256,
        head_dim_multiple=8,
        masks=PACKED,
        limits=_not_fewer_keys,
    )


@attention_export("flash")
@cache
def flash() -> Attention:
    """The flash-attn packages, 4, 3 or 2, the newest that is installed and knows the card: CUDA, half precision."""

    @cache
    def package() -> tuple[Any, str]:
        """(module | None, why not). Asked for by symbol: flash-attn 4 alone leaves an empty package flash_attn."""
        major, reasons = capability()[0], []
        for name, cards in (("flash_attn.cute", (9, 10)), ("flash_attn_interface", (9,)), ("flash_attn", (8, 9, 12))):
            try:
                module = importlib.import_module(name)
                if hasattr(module, "flash_attn_func") and hasattr(module, "flash_attn_varlen_func"):
                    if major in cards:
                        return module, ""
                    reasons.append(f"{name} does not know a card of compute capability {major}.x")
                else:
                    reasons.append(f"{name} has no flash_attn_func")
            except Exception as error:  # a wheel built for another torch fails in many ways
                reasons.append(f"{name} cannot be imported ({type(error).__name__})")
        return None, ", ".join(reasons)

    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
        module, _ = package()
        options = {"softmax_scale": scale, "causal": mask.causal}
        if mask.kind in ("none", "causal"):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # its layout is B x L x heads x head_dim
            return _first(module.flash_attn_func(q, k, v, **options)).transpose(1, 2)

        def kernel(q: Tensor, k: Tensor, v: Tensor, p: Packing) -> Tensor:
            return _first(
                module.flash_attn_varlen_func(
                    q,
                    k,
                    v,
                    cu_seqlens_q=p.q_starts,
                    cu_seqlens_k=p.k_starts,
                    max_seqlen_q=max(p.q_lengths),
                    max_seqlen_k=max(p.k_lengths),
                    **options,
                )
            )

        return packed(q, k, v, mask, kernel)

    return Attention("flash", fn, lambda: package()[1] or None, CUDA, HALF, 256, 8, PACKED, limits=_not_fewer_keys)


@attention_export("xformers")
@cache
def xformers() -> Attention:
    """xformers' memory_efficient_attention: CUDA, half precision; pip install xformers."""

    @cache
    def available() -> str | None:
        try:
            from xformers.ops import memory_efficient_attention  # noqa: F401
        except Exception as error:  # a wheel built for another torch fails in many ways
            return f"xformers cannot be imported ({type(error).__name__}: {error}); pip install xformers"
        return None

    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
        from xformers.ops import fmha, memory_efficient_attention

        if mask.kind in ("none", "causal"):
            bias = fmha.attn_bias.LowerTriangularFromBottomRightMask() if mask.causal else None
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # its layout is B x L x heads x head_dim
            return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale).transpose(1, 2)

        def kernel(q: Tensor, k: Tensor, v: Tensor, p: Packing) -> Tensor:
            bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(p.q_lengths, p.k_lengths)
            bias = bias.make_causal() if mask.causal else bias
            return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, scale=scale)[0]

        return packed(q, k, v, mask, kernel)

    return Attention("xformers", fn, available, CUDA, HALF, 256, 8, PACKED, limits=_not_fewer_keys)


def _not_fewer_keys(call: Call) -> Iterable[str]:
    if call.mask == "causal" and call.lq is not None and call.lk is not None and call.lq > call.lk:
        yield f"takes a causal mask for no more queries than keys, not {call.lq} and {call.lk}"
    if call.device == "cuda":
        yield from _too_old(8)


def _too_old(major: int) -> Iterable[str]:
    if capability()[0] < major:
        yield f"needs a card of compute capability {major}.0, not {'.'.join(map(str, capability()))}"


def many_graphs() -> dict[str, Any]:
    """An option of torch.compile, where it has it: beyond torch's usual eight graphs it would go on uncompiled."""
    return {"recompile_limit": GRAPHS} if _has(torch.compile, "recompile_limit") else {}


def _has(function: Any, parameter: str) -> bool:
    import inspect

    return parameter in inspect.signature(function).parameters


def _first(result: Any) -> Tensor:
    """The output, where some releases give (output, log-sum-exp)."""
    return result[0] if isinstance(result, tuple) else result
