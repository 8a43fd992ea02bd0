"""The attention call: numbers against a float64 softmax, and a choice of backend that never surprises."""

from __future__ import annotations

import math

import pytest
import torch

from genflow import registry
from genflow.attention import Attention, Call, attention, attention_report
from genflow.attention.dispatch import ORDER, choose
from genflow.errors import UserError

CPU = Call("cpu", torch.float32, 16, False, frozenset({"backward"}))


def serving(call: Call) -> list[str]:
    return [name for name, reasons in attention_report(call).items() if not reasons]


def oracle(q, k, v, key_mask=None, scale=None):
    """Softmax attention in float64, written from the formula."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bhld,bhmd->bhlm", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhlm,bhmd->bhld", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("lq", "lk"), [(1, 7), (17, 17), (65, 33)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", serving(CPU))
def test_every_backend_against_float64(backend, dtype, lq, lk, masked):
    generator = torch.Generator().manual_seed(0)
    make = lambda length: torch.randn(2, length, 3, 40, generator=generator).mul(2).to(dtype).transpose(1, 2)
    q, k, v = (make(n).requires_grad_() for n in (lq, lk, lk))
    mask = None
    if masked:
        mask = torch.rand(2, lk, generator=generator) < 0.6
        mask[:, 0] = True
    out = attention(q, k, v, key_mask=mask, backend=backend)
    g = torch.randn(out.shape, generator=generator).to(dtype)
    grads = torch.autograd.grad(out, (q, k, v), g)
    exact_in = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = oracle(*exact_in, key_mask=mask)
    exact_grads = torch.autograd.grad(exact, exact_in, g.double())
    unit = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    for got, expected in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).abs().max() <= unit * expected.abs().max().clamp(min=1)
    if masked:  # a hidden key is as if it were not there
        assert not grads[1].transpose(1, 2)[~mask].any() and not grads[2].transpose(1, 2)[~mask].any()


@pytest.mark.parametrize("backend", serving(CPU))
def test_large_logits_and_scale(backend):
    q = torch.full((1, 1, 2, 16), 20.0)
    k = torch.stack([torch.full((16,), 20.0), torch.full((16,), -20.0)]).view(1, 1, 2, 16)
    v = torch.eye(2, 16).view(1, 1, 2, 16)
    assert torch.allclose(attention(q, k, v, backend=backend)[0, 0, 0], v[0, 0, 0])
    half = attention(q, k, v, scale=0.0001, backend=backend)
    assert torch.allclose(half.double(), oracle(q, k, v, scale=0.0001), atol=1e-6)


def test_auto_takes_the_fused_kernel_unless_more_is_needed():
    assert choose("auto", CPU).name == "sdpa"
    more = Call("cpu", torch.float32, 16, False, frozenset({"double_backward"}))
    assert choose("auto", more).name == "math"
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    out = attention(x, x, x, needs=frozenset({"double_backward"}))
    (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(g.square().sum(), x)[0].abs().sum() > 0


def test_an_explicit_choice_that_cannot_serve_is_refused_with_all_reasons():
    with pytest.raises(UserError) as caught:
        attention(*(torch.randn(1, 1, 2, 12),) * 3, key_mask=torch.ones(1, 2, dtype=torch.bool), backend="xformers")
    text = str(caught.value)
    for reason in ("runs on cuda, not on cpu", "not float32", "multiples of 8, not 12", "takes no key mask"):
        assert reason in text
    with pytest.raises(UserError, match="sdpa.*has no double backward"):
        attention(*(torch.randn(1, 1, 2, 8),) * 3, backend="sdpa", needs=frozenset({"double_backward"}))
    with pytest.raises(UserError, match="'sdap' is unknown. Did you mean 'sdpa'"):
        attention(*(torch.randn(1, 1, 2, 8),) * 3, backend="sdap")


def test_every_capability_is_looked_at():
    fn = lambda q, k, v, mask, scale: v
    base = {"name": "x", "fn": fn}
    limits = [
        {"available": lambda: "is not installed"},
        {"devices": frozenset({"cuda"})},
        {"dtypes": frozenset({torch.float16})},
        {"max_head_dim": 8},
        {"head_dim_multiple": 32},
        {"offers": frozenset()},
    ]
    assert not Attention(**base).refusals(CPU)
    for limit in limits:
        assert len(Attention(**base, **limit).refusals(CPU)) == 1, limit
    assert len(Attention(**base, masks=False).refusals(Call("cpu", torch.float32, 16, True))) == 1


def test_the_report_names_every_backend():
    assert set(attention_report(CPU)) == set(registry.names("attention")) >= {"sdpa", "math", "xformers"}
    assert set(ORDER) <= set(registry.names("attention"))


def test_a_model_s_choice_is_its_own():
    from genflow.networks.mmdit import MMDiTConfig

    sizes = {"in_channels": 1, "context_dim": 4, "pooled_dim": 4, "sample_size": 2, "depth": 1, "hidden": 32, "heads": 2}
    inputs = torch.randn(1, 1, 4, 4), torch.rand(1), torch.randn(1, 3, 4), torch.randn(1, 4)
    refused = MMDiTConfig(**sizes, attention="xformers").build()
    with pytest.raises(UserError, match="xformers"):
        refused(*inputs)
    MMDiTConfig(**sizes).build()(*inputs)  # another model is not touched
    plain = MMDiTConfig(**sizes, attention="math").build()
    fused = MMDiTConfig(**sizes).build()
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        p.data.normal_(0, 0.2)
        q.data.copy_(p.data)
    assert torch.allclose(plain(*inputs), fused(*inputs), atol=1e-5)
