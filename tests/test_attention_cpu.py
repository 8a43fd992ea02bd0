"""Half-precision attention on a CPU: its backward of whole products against float64 and torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from genflow.attention import Mask, attention, attention_backend, cpu
from genflow.layers.modulation import QKV, joint_attention
from genflow.native import library as native

pytestmark = pytest.mark.skipif(not native.matrix_units(), reason="this processor does not multiply bf16")


def inputs(lq, lk, batch=3, heads=2, dim=32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, heads, dim) for length in (lq, lk, lk)]
    return [torch.randn(s, generator=generator).bfloat16().transpose(1, 2).requires_grad_() for s in shapes]


def gradients(q, k, v, cotangent, **how):
    out = F.scaled_dot_product_attention(q, k, v, **how)
    return out.detach(), torch.autograd.grad(out, (q, k, v), cotangent.to(q.dtype))


def worst(a, b):
    return float((a - b).detach().abs().max())


LENGTHS = [(1, 1), (7, 7), (16, 16), (24, 24), (80, 80), (5, 40), (40, 5), (33, 100), (272, 272), (9, 1100)]


@pytest.mark.parametrize(("lq", "lk"), LENGTHS)
@pytest.mark.parametrize(("scale", "dim"), [(None, 64), (0.3, 32), (0.05, 96), (None, 48), (0.2, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_output_and_gradients_are_as_near_to_float64_as_torch_s_own(lq, lk, scale, dim, causal):
    if causal and lq != lk:
        pytest.skip("causal attention is of equal lengths")
    q, k, v = inputs(lq, lk, dim=dim)
    cotangent = torch.randn(3, lq, 2, dim, generator=torch.Generator().manual_seed(1)).bfloat16().transpose(1, 2)
    out = attention(q, k, v, Mask(causal=causal), scale=scale)
    assert type(out.grad_fn).__name__ == "MatrixAttentionBackward"
    got = torch.autograd.grad(out, (q, k, v), cotangent)
    how = {"scale": scale, "is_causal": causal}
    exact, expected = gradients(*(x.detach().double().requires_grad_() for x in (q, k, v)), cotangent, **how)
    theirs, torch_s = gradients(*(x.detach().requires_grad_() for x in (q, k, v)), cotangent, **how)
    assert worst(out, exact) <= worst(theirs, exact) + 2**-8 * float(exact.abs().max())
    for a, b, t in zip(got, expected, torch_s, strict=True):
        assert worst(a, b) <= worst(t, b) + 2**-7 * float(b.abs().max()) + 1e-6


def test_weights_may_be_of_any_size():
    """Scores far apart, all far below zero, and all the same."""
    q, k, v = (x.detach() for x in inputs(20, 20, batch=1))
    for scaled in (q * 100, q * 0):
        exact = F.scaled_dot_product_attention(scaled.double(), k.double(), v.double())
        assert worst(attention(scaled, k, v), exact) <= 2**-7 * float(exact.abs().max())
    ones = torch.ones(1, 1, 20, 32, dtype=torch.bfloat16)
    low = attention((-100 * ones).requires_grad_(), 100 * ones, v[:, :1])
    assert worst(low, v[:, :1].double().mean(2, keepdim=True)) < 2**-7


@pytest.mark.parametrize("size", [1e3, 1e7, 1e12])
def test_scores_may_be_of_any_size(size):
    """The largest is at 0 from itself, in the backward too, however coarse float32 is there."""
    q, k, v = inputs(33, 33, batch=1)
    q = (q.detach() * size).requires_grad_()
    cotangent = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact, (_, _, dv) = gradients(*(x.detach().double().requires_grad_() for x in (q, k, v)), cotangent)
    out = attention(q, k, v)
    for a, b in ((out, exact), (torch.autograd.grad(out, v, cotangent)[0], dv)):
        assert worst(a, b) <= 2**-7 * float(b.abs().max())


def test_not_a_number_stays_one():
    q, k, v = inputs(20, 20, batch=2)
    broken = k.detach().clone()
    broken[1, 0, 3, 5] = torch.nan
    out = attention(q, broken, v)
    assert out[1, 0].isnan().all() and out[0].isfinite().all() and out[1, 1].isfinite().all()


def test_heads_of_odd_sizes_touch_their_own_numbers_alone():
    q, k, v = inputs(20, 20, dim=12)

    def amid_none(x):
        whole = torch.full((*x.shape[:-1], 40), torch.nan, dtype=x.dtype)
        whole[..., 5:17] = x.detach()
        return whole[..., 5:17].requires_grad_()

    def answers(q, k, v, cotangent):
        out = attention(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), cotangent)

    given = q, k, v, torch.randn_like(q)
    for a, b in zip(answers(*given), answers(*map(amid_none, given)), strict=True):
        assert torch.equal(a, b)


def test_a_sample_is_bit_for_bit_the_same_alone_and_on_more_threads():
    q, k, v = inputs(40, 40, batch=5)

    def answers(*given):
        given = [x.detach().requires_grad_() for x in given]
        out = attention(*given)
        return out, *torch.autograd.grad(out.float().square().sum(), given)

    whole = answers(q, k, v)
    alone = answers(*(x[2:3] for x in (q, k, v)))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        more = answers(q, k, v)
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(whole, alone, more, strict=True):
        assert torch.equal(a[2:3], b) and torch.equal(a, c)


def test_nothing_is_kept_where_no_gradient_is_asked_for():
    q, k, v = inputs(24, 24)
    with torch.no_grad():
        out = attention(q, k, v)
    assert out.grad_fn is None and torch.equal(out, attention(q, k, v))


def test_others_take_torch_s_own(monkeypatch):
    q, k, v = inputs(8, 8)
    assert cpu.serves(q, k, v)
    assert not cpu.serves(q.float(), k.float(), v.float()) and not cpu.serves(
        *(x.repeat(1, 1, 1, 9) for x in (q, k, v))
    )
    long = torch.zeros(1, 1, cpu.LONGEST + 1, 32, dtype=torch.bfloat16)
    assert not cpu.serves(long, long, long)
    monkeypatch.setattr(native, "matrix_units", lambda: False)
    assert not cpu.serves(q, k, v)
    assert type(attention(q, k, v).grad_fn).__name__ != "MatrixAttentionBackward"


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_add_up_over_keys_that_are_taken_in_parts(causal):
    """So many weights that those kept for the gradient of the queries do not fit at once."""
    q, k, v = inputs(640, 640, batch=1, heads=1)
    cotangent = torch.randn(1, 640, 1, 32, generator=torch.Generator().manual_seed(1)).bfloat16().transpose(1, 2)
    got = torch.autograd.grad(attention(q, k, v, Mask(causal=causal)), (q, k, v), cotangent)
    _, exact = gradients(*(x.detach().double().requires_grad_() for x in (q, k, v)), cotangent, is_causal=causal)
    for a, b in zip(got, exact, strict=True):
        assert worst(a, b) <= 2**-6 * float(b.abs().max())


STREAMS = [
    ((5, 3), 16, 2),
    ((40, 33, 1), 12, 3),
    ((33,), 40, 1),
    ((256, 16), 64, 1),
    ((0, 70), 72, 2),
    ((270, 2), 256, 1),
]


def streams(lengths, dim, heads, *, norm, batch=3):
    """Each stream's QKV with weights that bf16 can hold, its tokens, and the gradient of what it hears."""
    torch.manual_seed(0)
    parts = [QKV(heads * dim, heads, qk_norm=norm) for _ in lengths]
    for part in parts:
        torch.nn.init.normal_(part.linear.bias, 0, 0.5)
        for w in (part.q_norm, part.k_norm):
            if w is not None:
                torch.nn.init.normal_(w, 1, 0.3)
    tokens, cotangents = ([torch.randn(batch, n, heads * dim).bfloat16() for n in lengths] for _ in range(2))
    return [part.bfloat16() for part in parts], tokens, cotangents


def heard(parts, tokens, cotangents, mask=None, dtype=torch.bfloat16):
    """What each stream hears, and every gradient; the name of what made it."""
    parts, tokens = [p.to(dtype) for p in parts], [x.detach().to(dtype).requires_grad_() for x in tokens]
    outs = joint_attention(list(zip(parts, tokens, strict=True)), mask)
    leaves = [*tokens, *(w for part in parts for w in part.parameters())]
    grads = torch.autograd.grad(outs, leaves, [g.to(dtype) for g in cotangents])
    return [x.detach() for x in (*outs, *grads)], type(outs[0].grad_fn).__name__


@pytest.mark.parametrize(("lengths", "dim", "heads"), STREAMS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_from_products_is_as_near_to_float64_as_in_two_steps(lengths, dim, heads, norm, causal, monkeypatch):
    mask, given = Mask(causal=causal), streams(lengths, dim, heads, norm=norm)
    got, name = heard(*given, mask)
    assert name == "JointAttentionBackward"
    monkeypatch.setattr("genflow.layers.modulation.joins", lambda *_: False)
    other, name = heard(*given, mask)
    assert name != "JointAttentionBackward"
    exact, _ = heard(*given, mask, dtype=torch.float64)
    for a, b, e in zip(got, other, exact, strict=True):
        if a.numel():
            assert a.shape == e.shape and worst(a, e) <= 1.3 * worst(b, e) + 2**-8 * float(e.abs().max())


def test_attention_from_products_hangs_on_neither_batch_nor_threads():
    parts, tokens, cotangents = streams((40, 9), 32, 3, norm=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [heard(parts, *([x[i : i + 1] for x in xs] for xs in (tokens, cotangents)))[0] for i in range(3)]
        torch.set_num_threads(2)
        together, _ = heard(parts, tokens, cotangents)
    finally:
        torch.set_num_threads(threads)
    for i, mine in enumerate(alone):
        for a, b in zip(mine[:2], together[:2], strict=True):
            assert torch.equal(a[0], b[i])


def test_attention_from_products_gives_way_to_what_it_cannot_serve():
    parts, tokens, cotangents = streams((6, 4), 16, 2, norm=True)

    def made_by(mask=None, tokens=tokens):
        return heard(parts, tokens, cotangents, mask)[1]

    keys = torch.arange(10) < 8
    assert made_by(Mask(keys=keys.expand(3, -1))) != "JointAttentionBackward"
    assert made_by(Mask(causal=True, keys=keys.expand(3, -1))) != "JointAttentionBackward"
    for way in (attention_backend("math"), attention_backend(needs=["double_backward"])):
        with way:
            assert made_by() != "JointAttentionBackward"
    long = [torch.zeros(1, cpu.LONGEST - 3, 32).bfloat16().requires_grad_(), tokens[1][:1]]
    assert type(joint_attention(list(zip(parts, long, strict=True)))[0].grad_fn).__name__ != "JointAttentionBackward"
    assert made_by() == "JointAttentionBackward"


def test_not_a_number_stays_in_its_sample():
    parts, tokens, _ = streams((20, 4), 16, 2, norm=True)
    tokens[0][1, 3, 5] = torch.nan
    for out in joint_attention(list(zip(parts, tokens, strict=True))):
        assert out[1].isnan().all() and out[::2].isfinite().all()


@pytest.mark.parametrize("scale", [1, 2])
def test_a_scale_may_be_a_whole_number(scale):
    q, k, v = inputs(9, 9)

    def answers(scale):
        out = attention(q, k, v, scale=scale)
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    for a, b in zip(answers(scale), answers(float(scale)), strict=True):
        assert torch.equal(a, b)


def test_many_cotangents_at_once_are_as_one_by_one():
    q, k, v = inputs(20, 20)
    out = attention(q, k, v)
    many = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = torch.autograd.grad(out, (q, k, v), many, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, (q, k, v), g, retain_graph=True) for g in many]
    for a, b in zip(got, zip(*each, strict=True), strict=True):
        assert torch.equal(a, torch.stack(b))
