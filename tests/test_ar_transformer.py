"""The transformer of image tokens: its cache, its trees, its positions, and decoders on it."""

from __future__ import annotations

import pytest
import torch

from genflow.ar.decoders import Ancestral, GumbelCoupled, Speculative, SpeculativeJacobi, SpeculativeTree
from genflow.ar.drafts import ModelDraft
from genflow.ar.law import TokenLaw
from genflow.ar.reader import TransformerReader
from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.networks.token_transformer import TokenTransformerConfig, rotated, rotations
from tests.noise import shaken

V, N, P = 7, 12, 3


def make(seed=0, **options):
    torch.manual_seed(seed)
    options = {"context_dim": 5, "width": 32, "layers": 2, "heads": 2, **options}
    net = TokenTransformerConfig(vocabulary=V, grid=(3, 4), **options).build().double().eval()
    return shaken(net, 0.3)


def text(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[True, True, i % 2 == 0] for i in range(rows)])
    return Condition(torch.randn(rows, P, 5, generator=g).double(), mask, torch.zeros(rows, 0))


def tokens(rows, seed=0):
    return torch.randint(V, (rows, N), generator=torch.Generator().manual_seed(seed))


def symbols(x):
    return torch.cat([torch.full_like(x[:, :1], V), x], 1)


def forward(net, x, c):
    return net(x, c.tokens, c.mask)[0].softmax(-1)


NULL = Condition(torch.zeros(1, P, 5).double(), torch.ones(1, P, dtype=torch.bool), torch.zeros(1, 0))

# ------------------------------------------------------------------------------------------------------------ the network


def test_at_first_every_token_is_equally_likely():
    net = TokenTransformerConfig(vocabulary=V, grid=(3, 4), width=32, layers=1, context_dim=5, mtp=1).build()
    for logits in net(tokens(2), torch.randn(2, P, 5), torch.ones(2, P, dtype=torch.bool)):
        assert not logits.any()


@torch.no_grad()
def test_a_logit_hangs_on_the_text_and_all_tokens_before_it_and_on_none_after():
    net, x, c = make(), tokens(1), text(1)
    base = net(x, c.tokens, c.mask)[0][0]
    for i in range(N):
        other = x.clone()
        other[0, i] = (x[0, i] + 1) % V
        changed = (net(other, c.tokens, c.mask)[0][0] - base).abs().amax(-1) > 1e-9
        assert changed.tolist() == [t > i for t in range(N)]
    assert ((net(x, text(1, 1).tokens, c.mask)[0][0] - base).abs().amax(-1) > 1e-6).all()


@torch.no_grad()
def test_padding_of_the_text_is_one_vector_whatever_stands_there():
    net, x, c = make(), tokens(2), text(2)
    assert not c.mask[1, 2]
    junk = c.tokens.clone()
    junk[1, 2] = 1e3
    torch.testing.assert_close(net(x, junk, c.mask)[0], net(x, c.tokens, c.mask)[0])


@torch.no_grad()
def test_modules_of_mtp_look_one_token_further_each():
    net, x, c = make(mtp=2), tokens(1), text(1)
    base = net(x, c.tokens, c.mask)
    assert [tuple(a.shape) for a in base] == [(1, N, V), (1, N - 1, V), (1, N - 2, V)]
    for i in range(N):
        other = x.clone()
        other[0, i] = (x[0, i] + 1) % V
        for k, (a, b) in enumerate(zip(net(other, c.tokens, c.mask), base, strict=True)):
            changed = (a - b)[0].abs().amax(-1) > 1e-9  # at place t: of token t + k, from those up to t + k - 1
            assert changed.tolist() == [t + k > i for t in range(N - k)], (i, k)


def test_modules_of_mtp_have_weights_of_their_own_and_share_embedding_and_head():
    count = [sum(p.numel() for p in make(mtp=k).parameters()) for k in range(3)]
    width = 32
    block = 3 * width**2 + width**2 + 3 * width * 96 + 2 * width
    assert count[1] - count[0] == count[2] - count[1] == block + 2 * width**2 + 2 * width
    net = make(mtp=2)
    x, c = tokens(2), text(2)
    sum(logits.square().mean() for logits in net(x, c.tokens, c.mask)).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_turned_queries_and_keys_meet_by_the_difference_of_rows_and_columns_alone():
    cos, sin = rotations(4, 5, 16).double()
    q, k = torch.randn(2, 16, dtype=torch.float64)
    at = lambda r, c: slice(1 + 5 * r + c, 2 + 5 * r + c)

    def score(a, b):
        return float(rotated(q[None], cos[a], sin[a]) @ rotated(k[None], cos[b], sin[b]).T)

    assert score(at(2, 3), at(1, 1)) == pytest.approx(score(at(3, 4), at(2, 2)), abs=1e-6)
    assert score(at(2, 3), at(1, 1)) != pytest.approx(score(at(2, 3), at(1, 2)), abs=1e-3)
    assert score(at(2, 3), at(1, 1)) != pytest.approx(score(at(2, 3), at(2, 1)), abs=1e-3)
    torch.testing.assert_close(rotated(q[None], cos[:1], sin[:1]), q[None])  # the start is not turned


def test_half_precision_inside_gives_wide_logits_close_to_full():
    net, x, c = make().float(), tokens(2), text(2)
    context = c.tokens.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net(x, context, c.mask)[0]
    assert half.dtype == torch.float32
    full = net(x, context, c.mask)[0].detach()
    assert float((half - full).abs().max()) < 0.15 * float(full.abs().max())


# -------------------------------------------------------------------------------------------------------------- its cache


@pytest.mark.parametrize("windows", [[12], [1] * 12, [3, 1, 6, 2]])
def test_tokens_by_windows_are_the_tokens_at_once(windows):
    net, x, c = make(), tokens(3), text(3)
    reader = TransformerReader(net, c)
    parts = [reader.step(part) for part in symbols(x)[:, :N].split(windows, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), forward(net, x, c))
    assert reader.lengths.tolist() == [N] * 3


@pytest.mark.parametrize("lengths", [[4, 4, 4], [1, 7, 4], [0, 12, 3]])
def test_truncating_and_going_on_is_reading_anew(lengths):
    """Alike or each row at its own length; what was forgotten leaves no trace."""
    net, x, c = make(), tokens(3), text(3)
    y = tokens(3, seed=1)
    reader = TransformerReader(net, c)
    reader.step(symbols(x)[:, :N])
    reader.truncate(torch.tensor(lengths))
    s, t = symbols(x), symbols(y)
    mixed = torch.stack([torch.cat([s[i, :n], t[i, n:]]) for i, n in enumerate(lengths)])
    window = 4
    steps = torch.stack([torch.cat([mixed[i], mixed[i]])[n : n + window] for i, n in enumerate(lengths)])
    out = reader.step(steps)  # beyond the end: answered with anything
    expected = forward(net, mixed[:, 1:], c)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(out[i, : max(N - n, 0)], expected[i, n : n + window])
    assert reader.lengths.tolist() == [n + window for n in lengths]
    reader.truncate(torch.tensor([min(n + 2, N) for n in lengths]))  # and once more, from there
    steps = torch.stack([torch.cat([mixed[i], mixed[i]])[min(n + 2, N)][None] for i, n in enumerate(lengths)])
    out = reader.step(steps)
    for i, n in enumerate(lengths):
        if n + 2 < N:
            torch.testing.assert_close(out[i, 0], expected[i, n + 2])


TREE = torch.tensor([-1, 0, 0, 1, 1, 2, 5])  # the last four levels deep


@pytest.mark.parametrize("lengths", [[4, 4, 4], [1, 7, 4]])
def test_a_tree_is_its_paths_one_at_a_time(lengths):
    """And a path that is gathered is as if it had been read in a row."""
    net, x, c = make(), tokens(3), text(3)
    nodes = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(2))

    def read():
        reader = TransformerReader(net, c)
        reader.step(symbols(x)[:, :N])
        reader.truncate(torch.tensor(lengths))
        return reader

    reader = read()
    out = reader.step(nodes, TREE)
    paths = [[0, 1, 3], [0, 1, 4], [0, 2, 5, 6]]
    for path in paths:
        alone = read().step(nodes[:, path])
        torch.testing.assert_close(out[:, path], alone)
    per_row = torch.tensor([[0, 2, 5], [0, 1, 4], [0, 1, 3]])
    reader.gather(per_row)
    assert reader.lengths.tolist() == [n + 3 for n in lengths]
    more = tokens(3, seed=3)[:, :2]
    row = read()
    row.step(nodes.gather(1, per_row))
    torch.testing.assert_close(reader.step(more), row.step(more))


def test_a_cache_grows_where_a_tree_goes_beyond_its_room():
    net, x, c = make(), tokens(2), text(2)
    reader = TransformerReader(net, c)
    reader.step(symbols(x)[:, :N])
    room = reader._cache.tensor.shape[4]
    reader.step(torch.zeros(2, 9, dtype=torch.int64), torch.arange(9) - 1)
    assert reader._cache.tensor.shape[4] > room
    reader.truncate(torch.tensor([N - 1, 3]))
    torch.testing.assert_close(reader.step(symbols(x)[:, N - 1 : N])[0, 0], forward(net, x, c)[0, N - 1])


def test_the_cache_cannot_keep_what_it_does_not_have():
    reader = TransformerReader(make(), text(2))
    reader.step(symbols(tokens(2))[:, :3])
    for wrong in ([4, 1], [-4, 1]):
        with pytest.raises(UserError, match="truncate: the cache has"):
            reader.truncate(torch.tensor(wrong))


def test_guidance_is_two_branches_of_one_law():
    net, x, c, law = make(), tokens(3), text(3), TokenLaw(guidance=2.5, top_k=4)
    reader = TransformerReader(net, c, law=law, null=NULL)
    out = reader.step(symbols(x)[:, :N])
    null = NULL.expand(3)
    expected = law(net(x, c.tokens, c.mask)[0], net(x, null.tokens, null.mask)[0])
    torch.testing.assert_close(out, expected)
    assert reader.hidden.shape == (2 * 3, N, 32)
    with pytest.raises(UserError, match="needs the null condition"):
        TransformerReader(net, c, law=law)


# ----------------------------------------------------------------------------------------------------------- decoders on it


def reader(net, rows, law):
    return TransformerReader(net, text(50)[rows], law=law, null=NULL)


@pytest.mark.parametrize("law", [TokenLaw(), TokenLaw(guidance=1.5, top_k=5, top_p=0.9), TokenLaw(temperature=0)])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("window", [1, 4, 40])
def test_gumbel_is_token_for_token_ancestral(window, rows, law):
    net, draft = make(), make(1, layers=1)
    pick = list(range(rows))
    expected = Ancestral()(reader(net, pick, law), pick).tokens
    alone = GumbelCoupled(window)(reader(net, pick, law), pick)
    drafted = GumbelCoupled(window)(reader(net, pick, law), pick, draft=ModelDraft(reader(draft, pick, law)))
    assert torch.equal(alone.tokens, expected) and torch.equal(drafted.tokens, expected)


def test_ancestral_tokens_are_drawn_from_the_networks_own_law():
    """Against the forward of whole sequences: each drawn token is the one that its noise picks from the law there."""
    from genflow.ar.law import TokenNoise

    net, c, law = make(), text(4), TokenLaw(top_k=5)
    out = Ancestral()(TransformerReader(net, c, law=law), range(4)).tokens
    p = law(net(out, c.tokens, c.mask)[0])
    assert torch.equal(TokenNoise(range(4)).draw(p, "token", torch.arange(N).expand(4, N))[..., 0], out)


@pytest.mark.parametrize("decoder", [Speculative(3), SpeculativeTree((2, 2, 1)), SpeculativeJacobi(5)])
def test_rows_go_at_their_own_pace_and_do_not_hang_on_each_other(decoder):
    net, small, law = make(), make(1, layers=1), TokenLaw(guidance=1.5, top_k=5)

    def run(rows):
        draft = None if isinstance(decoder, SpeculativeJacobi) else ModelDraft(reader(small, rows, law))
        return decoder(reader(net, rows, law), rows, draft=draft)

    together = run(list(range(5)))
    assert len(together.passes[:, 4].unique()) > 1  # the rows are not in step
    for i in range(5):
        alone = run([i])
        assert torch.equal(alone.tokens[0], together.tokens[i]) and torch.equal(alone.passes[0], together.passes[i])


def test_a_tree_without_branches_is_a_chain():
    net, small, rows = make(), make(1, layers=1), list(range(4))
    a, b = (
        d(reader(net, rows, TokenLaw()), rows, draft=ModelDraft(reader(small, rows, TokenLaw())))
        for d in (SpeculativeTree((1, 1, 1)), Speculative(3))
    )
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.passes, b.passes)


def test_the_networks_own_tree_of_guesses_always_holds():
    net, rows = make(), list(range(3))
    out = SpeculativeTree((3, 2, 1))(
        reader(net, rows, TokenLaw()), rows, draft=ModelDraft(reader(net, rows, TokenLaw()))
    )
    assert out.acceptance == 1 and out.nfe == N // 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 30, "heads": 2}, "try 32"),
        ({"width": 446}, "try 448"),  # of 7 heads, where 446 would have had 6
        ({"layers": 0}, "layers = 0"),
        ({"mtp": 12}, "mtp = 12 looks beyond the 12 tokens"),
        ({"grid": (0, 4)}, "grid"),
        ({"vocabulary": 1}, "vocabulary = 1"),
        ({"context_dim": None}, "context_dim is not set"),
    ],
)
def test_bad_sizes_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        TokenTransformerConfig(**{"vocabulary": V, "grid": (3, 4), "context_dim": 5, **options}).build()


def test_without_a_text_there_is_no_prefix():
    net = make(context_dim=0)
    none = Condition(torch.zeros(2, 0, 0), torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0))
    x = tokens(2)
    torch.testing.assert_close(TransformerReader(net, none).step(symbols(x)[:, :N]), forward(net, x, none))


def test_the_lengths_that_a_cache_was_cut_to_are_its_own():
    cache, lengths = make().cache(2, 8), torch.tensor([3, 4])
    cache.open(5)
    cache.truncate(lengths)
    lengths.fill_(1)
    assert cache.lengths.tolist() == [3, 4]
