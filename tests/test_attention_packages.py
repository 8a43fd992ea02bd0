"""What the CUDA-only packages are handed, shown with stand-ins that do the same attention on the CPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from genflow.attention import Mask, attention, backends
from tests.test_attention_masks import PACKED, lengths_for, make_mask


def dense(q, k, v, *, scale=None, causal=False):
    """B x L x heads x head_dim, the causal mask from the bottom right, as flash-attn has it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v, Mask(causal=causal), scale=scale, backend="math").transpose(1, 2)


def one_by_one(q, k, v, q_starts, k_starts, *, scale=None, causal=False):
    """tokens x heads x head_dim, sequence after sequence."""
    assert q_starts.dtype == k_starts.dtype == torch.int32
    q_ends, k_ends = q_starts.tolist(), k_starts.tolist()
    assert q_ends[-1] == len(q) and k_ends[-1] == len(k) == len(v)
    spans = zip(q_ends, q_ends[1:], k_ends, k_ends[1:])
    return torch.cat(
        [dense(q[None, a:b], k[None, c:d], v[None, c:d], scale=scale, causal=causal)[0] for a, b, c, d in spans]
    )


def flash_package():
    def flash_attn_func(q, k, v, *, softmax_scale=None, causal=False):
        return dense(q, k, v, scale=softmax_scale, causal=causal), "log-sum-exp"

    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
    ):
        assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
        return one_by_one(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=softmax_scale, causal=causal)

    module = ModuleType("flash_attn_interface")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash_package())
    monkeypatch.setattr(backends, "capability", lambda: (9, 0))
    return backends.flash.__wrapped__()


@pytest.fixture
def early_varlen(monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return one_by_one(query, key, value, cu_seq_q, cu_seq_k, causal=is_causal)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    return backends.varlen.__wrapped__()


@pytest.fixture
def varlen(monkeypatch):
    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return one_by_one(q, k, v, cu_seq_q, cu_seq_k, scale=scale, causal=window_size == (-1, 0))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    return backends.varlen.__wrapped__()


@pytest.fixture
def xformers(monkeypatch):
    class Blocks:
        causal = False

        @classmethod
        def from_seqlens(cls, q, k):
            self = cls()
            self.starts = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (q, k)]
            return self

        def make_causal(self):
            self.causal = True
            return self

    class FromBottomRight:
        pass

    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
        if isinstance(attn_bias, Blocks):
            assert len(q) == len(k) == len(v) == 1
            return one_by_one(q[0], k[0], v[0], *attn_bias.starts, scale=scale, causal=attn_bias.causal)[None]
        return dense(q, k, v, scale=scale, causal=attn_bias is not None)

    ops = ModuleType("xformers.ops")
    bias = SimpleNamespace(BlockDiagonalMask=Blocks, LowerTriangularFromBottomRightMask=FromBottomRight)
    ops.memory_efficient_attention, ops.fmha = memory_efficient_attention, SimpleNamespace(attn_bias=bias)
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return backends.xformers.__wrapped__()


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("package", ["flash", "varlen", "early_varlen", "xformers"])
def test_a_package_is_handed_the_attention_that_was_asked_for(package, kind, request):
    record = request.getfixturevalue(package)
    assert record.available() is None and kind in record.masks
    for lq, lk in lengths_for(kind, [(8, 8), (3, 8)]):
        mask, _ = make_mask(kind, 3, 2, lq, lk)
        q, k, v = (torch.randn(3, 2, n, 8, dtype=torch.float64) for n in (lq, lk, lk))
        for scale in (None, 0.3):
            expected = attention(q, k, v, mask, scale=scale, backend="math")
            assert torch.allclose(record.fn(q, k, v, mask, scale), expected, atol=1e-12)


def test_flash_attn_is_asked_for_by_symbol(monkeypatch):
    """flash-attn 4 alone leaves an empty package flash_attn behind."""
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", flash_package())
    monkeypatch.setattr(backends, "capability", lambda: (8, 0))
    reason = backends.flash.__wrapped__().available()
    assert "flash_attn has no flash_attn_func" in reason
    assert "flash_attn.cute does not know a card of compute capability 8.x" in reason
    monkeypatch.setattr(backends, "capability", lambda: (10, 0))
    assert backends.flash.__wrapped__().available() is None
