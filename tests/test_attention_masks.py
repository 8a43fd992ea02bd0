"""Masks: what each kind means, against definitions written out by hand, and what the backends are given of it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from genflow.attention import Mask, attention
from genflow.attention.masks import packed
from genflow.errors import UserError

ALL_KINDS = (
    "none",
    "causal",
    "keys",
    "segments",
    "tree",
    "dense",
    "causal+keys",
    "causal+segments",
    "keys+segments",
    "keys+tree",
)
PACKED = ("none", "causal", "keys", "segments", "causal+segments", "keys+segments")


def make_mask(kind: str, batch: int, heads: int, lq: int, lk: int, seed: int = 0) -> tuple[Mask, torch.Tensor]:
    """A random mask of that kind, and the same as bool batch x heads x lq x lk, written out from its meaning.

    Each kind that can has queries without a live key: a sample without keys, padding, a hidden row.
    """
    generator = torch.Generator().manual_seed(seed)
    live = torch.ones(batch, heads, lq, lk, dtype=torch.bool)
    parts: dict = {}
    if "causal" in kind:
        parts["causal"] = True
        live &= torch.tensor([[j <= lk - lq + i for j in range(lk)] for i in range(lq)])
    if "keys" in kind:
        keys = torch.rand(batch, lk, generator=generator) < 0.6
        keys[0] = False
        parts["keys"] = keys
        live &= keys[:, None, None]
    if "segments" in kind:
        assert lq == lk
        segments = torch.randint(-1, 4, (batch, lk), generator=generator).sort().values
        parts["segments"] = segments
        live &= ((segments[:, :, None] == segments[:, None]) & (segments >= 0)[:, None])[:, None]
    if "tree" in kind:
        parents = torch.tensor([[-1 if i == 0 else (i * 7 + s) % (i + 1) - 1 for i in range(lq)] for s in range(batch)])
        parts["tree"] = parents
        related = torch.zeros(batch, 1, lq, lk, dtype=torch.bool)
        related[..., : lk - lq] = True
        for s in range(batch):
            for i in range(lq):
                node = i
                while node >= 0:
                    related[s, 0, i, lk - lq + node] = True
                    node = int(parents[s, node])
        live &= related
    if "dense" in kind:
        dense = torch.rand(batch, heads, lq, lk, generator=generator) < 0.5
        dense[-1, -1, lq // 2] = False
        parts["dense"] = dense
        live &= dense
    return Mask(**parts), live


def lengths_for(kind: str, lengths: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of (Lq, Lk) that a mask of this kind can have."""
    if "segments" in kind:
        return [(a, b) for a, b in lengths if a == b]
    return [(a, b) for a, b in lengths if a <= b or "tree" not in kind]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_mask_says_what_its_definition_says(kind):
    for lq, lk in lengths_for(kind, [(1, 1), (1, 6), (9, 9), (4, 9), (9, 4)]):
        mask, live = make_mask(kind, 2, 3, lq, lk)
        assert mask.kind == kind
        mask.check(2, 3, lq, lk)
        full = mask.full(torch.empty(2, 3, 1), lq, lk)
        assert (live if full is None else full.expand_as(live)).equal(live)
        for rows in (range(lq), range(lq // 2, lq)):
            for columns in (range(0, (lk + 1) // 2), range(lk // 2, lk)):
                block = mask.block(torch.empty(2, 3, 1), rows, columns, lq, lk)
                part = live[:, :, rows.start :, columns.start : columns.stop]
                assert (torch.ones_like(part) if block is None else block.expand_as(part)).equal(part)


def test_small_parts_stand_for_every_sample_and_head():
    parents = torch.tensor([-1, 0, 0, 1])
    one = Mask(tree=parents).full(torch.empty(2, 3, 1), 4, 6)
    each = Mask(tree=parents.expand(2, 4)).full(torch.empty(2, 3, 1), 4, 6)
    assert one.expand(2, 3, 4, 6).equal(each.expand(2, 3, 4, 6))
    square = torch.rand(4, 6) < 0.5
    assert Mask(dense=square).full(torch.empty(2, 3, 1), 4, 6).expand(2, 3, 4, 6).equal(square.expand(2, 3, 4, 6))
    assert (Mask(dense=square) & Mask(causal=True)).full(torch.empty(2, 3, 1), 4, 6).shape[-2:] == (4, 6)


def test_a_mask_of_heads_alone_leaves_the_fused_kernel_its_own():
    """Which takes masks of two axes and of four."""
    q, k, v = torch.randn(3, 2, 3, 7, 8).unbind()
    mask = Mask(causal=True, dense=torch.rand(3, 7, 7) < 0.5)
    assert mask.full(q, 7, 7).shape == (1, 3, 7, 7)
    torch.testing.assert_close(attention(q, k, v, mask, backend="sdpa_flash"), attention(q, k, v, mask, backend="math"))


def test_two_masks_meet():
    for a, b in [("causal", "keys"), ("causal", "segments"), ("dense", "keys"), ("keys", "keys"), ("dense", "dense")]:
        (x, live_x), (y, live_y) = make_mask(a, 2, 3, 7, 7, seed=1), make_mask(b, 2, 3, 7, 7, seed=2)
        both = x & y
        assert both.full(torch.empty(2, 3, 1), 7, 7).expand(2, 3, 7, 7).equal(live_x & live_y)
        assert {*both.kind.split("+")} == {a, b}
    x, _ = make_mask("keys", 2, 3, 7, 7)
    assert (x & Mask()).kind == (Mask() & x).kind == "keys"
    s = Mask(segments=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(UserError, match="both sides of & have segments"):
        s & s


def test_parts_that_do_not_fit_are_refused():
    q = torch.randn(2, 3, 4, 8)
    wrong = [
        (Mask(keys=torch.ones(2, 5, dtype=torch.bool)), "mask.keys is bool 2 x 5, not bool 2 x 4"),
        (Mask(keys=torch.ones(2, 4)), "mask.keys is float32 2 x 4"),
        (Mask(segments=torch.zeros(2, 3, dtype=torch.long)), "mask.segments is int64 2 x 3, not integers 2 x 4"),
        (Mask(segments=torch.zeros(2, 4)), "mask.segments is float32"),
        (Mask(tree=torch.zeros(5, dtype=torch.long)), "mask.tree is int64 5"),
        (Mask(dense=torch.ones(2, 2, 4, 4, dtype=torch.bool)), "not bool that fits 2 x 3 x 4 x 4"),
        (Mask(dense=torch.zeros(4, 4)), "mask.dense is float32"),
    ]
    for mask, reason in wrong:
        with pytest.raises(UserError, match=reason):
            attention(q, q, q, mask)
    with pytest.raises(UserError, match=r"the mask is a Tensor; give a tensor, True = live, as Mask\(dense=...\)"):
        attention(q, q, q, torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="mask.segments is a list, not a tensor"):
        Mask(segments=[[0, 0, 1, 1]])
    with pytest.raises(UserError, match="for 5 keys"):
        attention(q, *[torch.randn(2, 3, 5, 8)] * 2, Mask(segments=torch.zeros(2, 4, dtype=torch.long)))


@pytest.mark.parametrize("kind", PACKED)
def test_packed_sequences_end_to_end_are_the_same_attention(kind):
    """With a kernel that does one sequence after the other, as the CUDA kernels for packed sequences do."""

    def kernel(q, k, v, packing):
        assert min(packing.q_lengths) > 0 and min(packing.k_lengths) > 0
        assert packing.q_starts.tolist() == torch.tensor([0, *packing.q_lengths]).cumsum(0).tolist()
        assert packing.k_starts.tolist() == torch.tensor([0, *packing.k_lengths]).cumsum(0).tolist()
        outs = []
        parts = (x.split(n) for x, n in ((q, packing.q_lengths), (k, packing.k_lengths), (v, packing.k_lengths)))
        for each in zip(*parts, strict=True):
            one = (x.transpose(0, 1)[None] for x in each)
            outs.append(attention(*one, Mask(causal="causal" in kind), backend="math")[0].transpose(0, 1))
        return torch.cat(outs)

    for lq, lk in lengths_for(kind, [(1, 1), (8, 8), (3, 8)]):
        mask, _ = make_mask(kind, 3, 2, lq, lk)
        q, k, v = (torch.randn(3, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (lq, lk, lk))
        outs = packed(q, k, v, mask, kernel), attention(q, k, v, mask, backend="math")
        assert torch.allclose(*outs, atol=1e-12)
        g = torch.randn_like(q)
        for got, expected in zip(*(torch.autograd.grad(o, (q, k, v), g) for o in outs), strict=True):
            assert torch.allclose(got, expected, atol=1e-12)


def test_interleaved_segments_pack_in_order():
    segments = torch.tensor([[7, 2, 7, -3, 2], [2, 2, 2, 7, 7]])
    packing = Mask(segments=segments).packing(2, 5, 5, torch.device("cpu"))
    assert packing.q.tolist() == packing.k.tolist() == [1, 4, 0, 2, 5, 6, 7, 8, 9]
    assert packing.q_lengths == [2, 2, 3, 2]


def test_a_packing_without_any_live_key_still_has_a_gradient():
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    out = packed(q, q, q, Mask(keys=torch.zeros(1, 3, dtype=torch.bool)), lambda *_: pytest.fail("nothing to do"))
    out.sum().backward()
    assert not out.any() and not q.grad.any()


def test_what_a_backend_makes_of_a_mask_is_made_once():
    mask, _ = make_mask("causal+segments", 2, 2, 6, 6)
    like = torch.empty(2, 2, 1)
    assert mask.full(like, 6, 6) is mask.full(like, 6, 6)
    assert mask.packing(2, 6, 6, like.device) is mask.packing(2, 6, 6, like.device)


@pytest.mark.parametrize("backend", ["sdpa", "math", "tiled"])
def test_a_mask_that_was_used_serves_other_numbers_of_keys(backend):
    """As the mask of a cache does, of windows of one width one after another."""
    mask, q = Mask(causal=True), torch.randn(1, 2, 3, 8)
    for keys in (4, 7, 3):
        k, v = torch.randn(1, 2, keys, 8), torch.randn(1, 2, keys, 8)
        expected = attention(q, k, v, Mask(causal=True), backend=backend)
        assert torch.equal(attention(q, k, v, mask, backend=backend), expected)


def test_a_tree_of_more_queries_than_keys_is_refused():
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 3, 8)
    with pytest.raises(UserError, match="mask.tree is int64 4, not integers 4 or 1 x 4 for 3 keys"):
        attention(q, k, k, Mask(tree=torch.tensor([-1, 0, 1, 2])))


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("parts", [{"causal": True}, {"tree": torch.tensor([-1, 0, 0, 1])}])
def test_shapes_that_were_followed_leave_nothing_in_a_mask(backend, parts):
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8)
    mask, expected = Mask(**parts), attention(q, k, k, Mask(**parts), backend=backend)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        attention(*map(mode.from_tensor, (q, k, k)), mask, backend=backend)
    assert torch.equal(attention(q, k, k, mask, backend=backend), expected)
