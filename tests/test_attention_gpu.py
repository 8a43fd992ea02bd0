"""The attention backends on a CUDA device: pytest -m gpu"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from genflow import registry
from genflow.attention import Call, Mask, attention, attention_report
from genflow.attention.known_bad import KNOWN_BAD
from tests.test_attention_masks import ALL_KINDS, lengths_for, make_mask
from tests.test_attention_numerics import oracle

pytestmark = pytest.mark.gpu
LENGTHS = [(1, 1), (7, 7), (128, 128), (192, 192), (272, 272), (7, 128), (128, 333), (1, 272)]
LITTLE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


def to_cuda(mask: Mask) -> Mask:
    move = lambda x: None if x is None else x.cuda()
    return Mask(mask.causal, move(mask.keys), move(mask.segments), move(mask.tree), move(mask.dense))


def serves(backend: str, call: Call) -> None:
    if reasons := attention_report(call)[backend]:
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("dtype", LITTLE, ids=str)
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("backend", registry.names("attention"))
def test_every_backend_is_as_near_to_float64_as_plain_attention(backend, kind, dtype):
    ran, why = 0, []
    few = backend == "flex"  # it compiles a graph for each shape
    for head_dim in (64,) if few else (16, 64, 72, 128):
        for lq, lk in lengths_for(kind, [(128, 128), (192, 192), (7, 128)] if few else LENGTHS):
            call = Call("cuda", dtype, head_dim, kind, lq, lk, frozenset({"backward"}))
            if reasons := attention_report(call)[backend]:
                why += reasons
                continue
            mask, live = make_mask(kind, 2, 2, lq, lk)
            mask, live = to_cuda(mask), live.cuda()
            make = lambda n, d=head_dim: torch.randn(2, n, 2, d, device="cuda").to(dtype).transpose(1, 2)
            inputs = [make(n).requires_grad_() for n in (lq, lk, lk)]
            exact = outputs_on(lambda *x, m=live: oracle(*x, m), [x.detach().double().requires_grad_() for x in inputs])
            plain = outputs_on(lambda *x, m=mask: attention(*x, m, backend="math"), inputs)
            got = outputs_on(lambda *x, m=mask: attention(*x, m, backend=backend), inputs)
            for name, g, p, e in zip(("o", "dq", "dk", "dv"), got, plain, exact, strict=True):
                little = LITTLE[dtype] * e.abs().max().clamp(min=1)
                error = 4 * little if backend == "math" else (p.double() - e).abs().max()
                assert (g.double() - e).abs().max() <= 2 * error + little, (lq, lk, head_dim, name)
            ran += 1
    if not ran:
        pytest.skip("; ".join(dict.fromkeys(why)))


def outputs_on(function, inputs):
    """`outputs`, with the incoming gradient made on the CPU, alike for every dtype."""
    out = function(*inputs)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, g)]


def test_the_backends_that_torch_brings_are_there():
    call = Call("cuda", torch.bfloat16, 64, "none", 128, 128, frozenset({"backward"}))
    report = attention_report(call)
    for name in ("sdpa", "sdpa_flash", "sdpa_efficient", "math", "tiled", "flex", "varlen"):
        assert not report[name], (name, report[name])


@pytest.mark.parametrize("backend", registry.names("attention"))
def test_causal_attention_does_not_see_the_future(backend):
    serves(backend, Call("cuda", torch.bfloat16, 64, "causal", 200, 200))
    q, k, v = (torch.randn(2, 2, 200, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    before = attention(q, k, v, Mask(causal=True), backend=backend)
    k[:, :, 100:], v[:, :, 100:] = 100, -100
    after = attention(q, k, v, Mask(causal=True), backend=backend)
    assert after[:, :, :100].equal(before[:, :, :100]) and not after[:, :, -1].allclose(before[:, :, -1])


@pytest.mark.parametrize("backend", registry.names("attention"))
def test_packed_is_one_by_one(backend):
    serves(backend, Call("cuda", torch.bfloat16, 64, "causal+segments", 300, 300))
    q, k, v = (torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    segments = torch.tensor([[0] * 100 + [1] * 170 + [2] * 30], device="cuda")
    packed = attention(q, k, v, Mask(causal=True, segments=segments), backend=backend)
    alone = zip(*(x.split([100, 170, 30], dim=2) for x in (q, k, v)), strict=True)
    parts = [attention(*each, Mask(causal=True), backend=backend) for each in alone]
    assert torch.allclose(packed, torch.cat(parts, 2), atol=2e-2)


def hit_here(issue: str) -> None:
    (row,) = (row for row in KNOWN_BAD if row.issue == issue)
    if row.capability not in (None, torch.cuda.get_device_capability()):
        pytest.skip(f"needs a card of compute capability {row.capability}")


def test_cudnn_gives_nan_under_a_mask_still():
    """When this fails, pytorch/pytorch#196678 is mended: give its row `fixed`."""
    hit_here("pytorch/pytorch#196678")
    q, k, v = (torch.randn(1, 1, 704, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q, k = q * 0.1, k * 0.1
    q[..., 0], k[..., 0] = 1, -120 * 8  # every logit near -120
    q.requires_grad_()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.ones(1, 1, 704, 704, dtype=torch.bool, device="cuda")
        )
    (g,) = torch.autograd.grad(out.sum(), q)
    assert g.isnan().any()


def test_the_efficient_kernel_is_wrong_beyond_65536_tokens_still():
    """When this fails, pytorch/pytorch#162588 is mended: give its row `fixed`."""
    hit_here("pytorch/pytorch#162588")
    length = 65537 + 7
    q, k, v = (torch.randn(1, 1, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").tril_()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, :, -64:]
    exact = attention(q[:, :, -64:], k, v, Mask(causal=True), backend="math")
    assert (out - exact).abs().max() > 0.1
