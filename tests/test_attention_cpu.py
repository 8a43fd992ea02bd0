"""Half-precision attention on a CPU: its backward of whole products against float64 and torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from genflow.attention import Mask, attention, cpu

pytestmark = pytest.mark.skipif(not cpu._fast_products(), reason="this processor has no matrix units for bf16")


def inputs(lq, lk, batch=3, heads=2, dim=32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, length, dim) for length in (lq, lk, lk)]
    return [torch.randn(s, generator=generator).bfloat16().requires_grad_() for s in shapes]


@pytest.mark.parametrize(("lq", "lk"), [(1, 1), (7, 7), (24, 24), (80, 80), (5, 40), (272, 272)])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("chunk", [1, 2**13, 2**20])
def test_gradients_are_those_of_float64(lq, lk, scale, chunk, monkeypatch):
    q, k, v = inputs(lq, lk)
    cotangent = torch.randn(3, lq, 2, 32, generator=torch.Generator().manual_seed(1)).bfloat16().transpose(1, 2)
    out = attention(q, k, v, scale=scale)
    assert type(out.grad_fn).__name__ == "MatrixBackwardBackward"
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, scale=scale))
    monkeypatch.setattr(cpu, "CHUNK", chunk)  # how many samples at a time
    got = torch.autograd.grad(out, (q, k, v), cotangent)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*exact, scale=scale), exact, cotangent.double())
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 2**-6 * b.abs().max().clamp(min=0.1)


def test_a_sample_s_gradient_does_not_depend_on_its_batch_mates(monkeypatch):
    q, k, v = inputs(24, 24, batch=5)
    whole = torch.autograd.grad(attention(q, k, v).float().square().sum(), (q, k, v))
    alone = [x[2:3].detach().requires_grad_() for x in (q, k, v)]
    one = torch.autograd.grad(attention(*alone).float().square().sum(), alone)
    for a, b in zip(whole, one, strict=True):
        torch.testing.assert_close(a[2:3], b, rtol=2**-7, atol=2**-9)


def test_others_take_torch_s_own():
    q, k, _ = inputs(8, 8)
    assert not cpu.serves(q.float(), k.float()) and not cpu.serves(q.detach(), k)
    with torch.no_grad():
        assert not cpu.serves(q, k)
    long = torch.zeros(1, 1, 2**11, 8, dtype=torch.bfloat16, requires_grad=True)
    assert not cpu.serves(long, long)


@pytest.mark.parametrize("length", [2, 49, 196])
def test_gradients_under_a_causal_mask_are_those_of_float64(length, monkeypatch):
    q, k, v = inputs(length, length)
    out = attention(q, k, v, Mask(causal=True))
    assert type(out.grad_fn).__name__ == "MatrixBackwardBackward"
    monkeypatch.setattr(cpu, "CHUNK", 2**13)
    got = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*exact, is_causal=True).square().sum(), exact)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 2**-5 * b.abs().max()
