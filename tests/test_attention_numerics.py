"""Every backend that runs here against a float64 softmax: numbers, gradients, and what a mask must hide.

The measure is flash-attention's own: an error no more than twice that of plain attention in the same dtype, and a little.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from genflow.attention import Call, Mask, attention, attention_report
from tests.test_attention_masks import ALL_KINDS, lengths_for, make_mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
CPU = Call("cpu", torch.float32, 16, needs=frozenset({"backward"}))
TRAINABLE = [name for name, reasons in attention_report(CPU).items() if not reasons]
CASES = [(1, 1, 16), (7, 7, 64), (128, 128, 16), (272, 272, 72), (7, 128, 72), (128, 7, 16), (1, 272, 64)]
LITTLE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-14}


def tensors(lq, lk, head_dim, dtype, *, seed=0):
    """q, k, v as a network makes them: views that permute."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda n: torch.randn(2, n, 2, head_dim, generator=generator).to(dtype).transpose(1, 2)
    return [make(n).requires_grad_() for n in (lq, lk, lk)]


def oracle(q, k, v, live=None, scale=None):
    """Softmax attention in float64, written from the formula; zeros where no key is live."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bhld,bhmd->bhlm", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    live = torch.ones_like(scores, dtype=torch.bool) if live is None else live
    scores = scores.masked_fill(~live, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top.masked_fill(top == -torch.inf, 0)).exp()
    return torch.einsum("bhlm,bhmd->bhld", weights / weights.sum(-1, keepdim=True).clamp(min=1), v)


def outputs(function, inputs):
    out = function(*inputs)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, g)]


@cache
def expected(kind, lq, lk, head_dim, dtype):
    """(inputs, mask, live, exact outputs, the largest errors of plain attention)"""
    inputs = tensors(lq, lk, head_dim, dtype)
    mask, live = make_mask(kind, 2, 2, lq, lk)
    exact = outputs(lambda *x: oracle(*x, live), [x.detach().double().requires_grad_() for x in inputs])
    plain = outputs(lambda *x: attention(*x, mask, backend="math"), inputs)
    return inputs, mask, exact, [(p.double() - e).abs().max() for p, e in zip(plain, exact, strict=True)]


@pytest.mark.parametrize("dtype", LITTLE, ids=str)
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("backend", TRAINABLE)
def test_every_backend_is_as_near_to_float64_as_plain_attention(backend, kind, dtype):
    cases = [case for case in CASES if lengths_for(kind, [case[:2]])]
    for lq, lk, head_dim in cases:
        inputs, mask, exact, errors = expected(kind, lq, lk, head_dim, dtype)
        got = outputs(lambda *x, mask=mask: attention(*x, mask, backend=backend), inputs)
        for name, g, e, error in zip(("o", "dq", "dk", "dv"), got, exact, errors, strict=True):
            assert g.dtype == dtype
            little = LITTLE[dtype] * e.abs().max().clamp(min=1)
            error = 4 * little if backend == "math" else error  # it is not its own measure
            assert (g.double() - e).abs().max() <= 2 * error + little, (lq, lk, head_dim, name)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_flex_gives_the_same_forward(kind):
    lq, lk = lengths_for(kind, [(5, 9), (9, 9)])[0]
    mask, live = make_mask(kind, 2, 2, lq, lk)
    inputs = [x.detach() for x in tensors(lq, lk, 16, torch.float64)]
    assert (attention(*inputs, mask, backend="flex") - oracle(*inputs, live)).abs().max() <= 1e-12


@pytest.mark.skipif(torch.__version__ < "2.11", reason="this torch takes the unfused formula there, and says so")
def test_flex_has_no_backward_on_a_cpu_still():
    """When this fails, torch has learned it: flex's limits can go."""
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 1, 4, 16, requires_grad=True)
    with pytest.raises(NotImplementedError):
        flex_attention(q, q, q)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("backend", TRAINABLE)
def test_a_query_without_a_live_key_gets_zeros_and_sends_none(backend, kind):
    lq, lk = lengths_for(kind, [(9, 5), (9, 9)])[0]
    mask, live = make_mask(kind, 2, 2, lq, lk)
    mask = mask & Mask(keys=torch.tensor([[True] * lk, [False] * lk]))
    live = live & torch.tensor([True, False])[:, None, None, None]
    dead = ~live.any(-1)
    assert dead[1].all()
    q, k, v = tensors(lq, lk, 16, torch.float32)
    out, dq, dk, dv = outputs(lambda *x: attention(*x, mask, backend=backend), [q, k, v])
    assert not out[dead].any() and not dq[dead].any()
    unseen = ~live.any(-2)
    assert not dk[unseen].any() and not dv[unseen].any()  # a hidden key is as if it were not there
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("backend", [*TRAINABLE, "flex"])
def test_causal_attention_does_not_see_the_future(backend):
    for lq, lk in [(6, 6), (4, 6)] if backend == "flex" else [(6, 6), (200, 200), (4, 6), (150, 200)]:
        q, k, v = (x.detach() for x in tensors(lq, lk, 16, torch.float32))
        before = attention(q, k, v, Mask(causal=True), backend=backend)
        cut = lk // 2
        k[:, :, cut:], v[:, :, cut:] = 1e3, -1e3
        after = attention(q, k, v, Mask(causal=True), backend=backend)
        same = [i for i in range(lq) if lk - lq + i < cut]
        assert after[:, :, same].equal(before[:, :, same])
        assert not after[:, :, -1].allclose(before[:, :, -1])


@pytest.mark.parametrize("backend", TRAINABLE)
def test_a_cached_step_is_the_last_row_of_the_whole(backend):
    q, k, v = tensors(9, 9, 16, torch.float64)
    whole = attention(q, k, v, Mask(causal=True), backend=backend)
    for n in (1, 3):
        step = attention(q[:, :, -n:], k, v, Mask(causal=True), backend=backend)
        assert torch.allclose(step, whole[:, :, -n:], atol=1e-12)


@pytest.mark.parametrize("backend", TRAINABLE)
def test_a_tree_gives_each_branch_what_it_would_get_alone(backend):
    """Nodes a, b after a, c after a, d after c: the branch a, c, d is a causal sequence after the same prefix."""
    q, k, v = tensors(4, 10, 16, torch.float64)
    tree = attention(q, k, v, Mask(tree=torch.tensor([-1, 0, 0, 2])), backend=backend)
    branch, prefix = [0, 2, 3], [*range(6)]
    kept = [*prefix, *(6 + node for node in branch)]
    alone = attention(q[:, :, branch], k[:, :, kept], v[:, :, kept], Mask(causal=True), backend=backend)
    assert torch.allclose(tree[:, :, branch], alone, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", [*TRAINABLE, "flex"])
def test_packed_is_padded_is_one_by_one(backend, causal):
    lengths = [5, 9, 3]
    alone = [[x.detach()[:1] for x in tensors(n, n, 16, torch.float64, seed=n)] for n in lengths]
    mask = Mask(causal=causal)
    outs = [attention(*each, mask, backend=backend) for each in alone]

    packed = [torch.cat([*parts, torch.full_like(parts[0], 9)], dim=2) for parts in zip(*alone, strict=True)]
    segments = torch.tensor([[0] * 5 + [1] * 9 + [2] * 3 + [-1] * 5])
    out = attention(*packed, mask & Mask(segments=segments), backend=backend)
    assert torch.allclose(out, torch.cat([*outs, torch.zeros_like(outs[0])], dim=2), atol=1e-12)

    pad = lambda x: torch.cat([x, x.new_full((1, 2, 9 - x.shape[2], 16), 9.0)], dim=2)
    padded = [torch.cat([pad(x) for x in parts]) for parts in zip(*alone, strict=True)]
    keys = torch.arange(9) < torch.tensor(lengths)[:, None]
    out = attention(*padded, mask & Mask(keys=keys), backend=backend)
    for i, n in enumerate(lengths):
        assert torch.allclose(out[i : i + 1, :, :n], outs[i], atol=1e-12)


@pytest.mark.parametrize("backend", TRAINABLE)
def test_large_logits_and_scale(backend):
    q = torch.full((1, 1, 2, 16), 20.0)
    k = torch.stack([torch.full((16,), 20.0), torch.full((16,), -20.0)]).view(1, 1, 2, 16)
    v = torch.eye(2, 16).view(1, 1, 2, 16)
    assert torch.allclose(attention(q, k, v, backend=backend)[0, 0, 0], v[0, 0, 0])
    half = attention(q, k, v, scale=0.0001, backend=backend)
    assert torch.allclose(half.double(), oracle(q, k, v, scale=0.0001), atol=1e-6)
    low = attention(q, -k.abs(), v, Mask(keys=torch.tensor([[True, False]])), backend=backend)  # logits of -1600
    assert torch.allclose(low, v[:, :, :1].expand_as(low))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0, -0.5])
@pytest.mark.parametrize("backend", TRAINABLE)
def test_causal_attention_hides_the_future_at_every_scale(backend, scale, dtype):
    inputs = tensors(9, 9, 16, dtype)
    live = torch.ones(2, 2, 9, 9, dtype=torch.bool).tril()
    exact = outputs(
        lambda q, k, v: oracle(q, k * scale, v, live, 1), [x.detach().double().requires_grad_() for x in inputs]
    )
    got = outputs(lambda *x: attention(*x, Mask(causal=True), scale=scale, backend=backend), inputs)
    for g, e in zip(got, exact, strict=True):
        assert (g.double() - e).abs().max() <= (0.03 if dtype == torch.bfloat16 else 1e-5) * e.abs().max()
