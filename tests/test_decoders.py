"""Decoders: proven exact on a model that is a table of 5 symbols and 4 tokens, all 625 sequences of which are counted."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from tabular import TabularModel

from genflow.ar import rules
from genflow.ar.decoders import (
    Ancestral,
    GumbelCoupled,
    MedusaTypical,
    Relaxed,
    Speculative,
    SpeculativeJacobi,
    SpeculativeTree,
    decode,
)
from genflow.ar.drafts import JacobiDraft, ModelDraft
from genflow.ar.guess import Shape, shape_of
from genflow.ar.law import TokenLaw
from genflow.ar.rules import rejection
from genflow.errors import UserError
from genflow.registry import names, resolve, tag_of

N = 60_000
FEWER = 20_000  # in which a mistake is seen
FILTERED = TokenLaw(guidance=1.5, temperature=0.8, top_k=4, top_p=0.95)
LAWS = {"plain": TokenLaw(), "filtered": FILTERED}
LOSSLESS = {
    "ancestral": (Ancestral(), False),
    "speculative": (Speculative(window=3), True),
    "speculative, one guess": (Speculative(window=1), True),
    "tree": (SpeculativeTree(branching=(3, 2)), True),
    "tree, many of five": (SpeculativeTree(branching=(4, 1, 2)), True),
    "sjd": (SpeculativeJacobi(window=3), False),
    "sjd, one guess": (SpeculativeJacobi(window=1), False),
    "gumbel": (GumbelCoupled(window=2), False),
    "gumbel, drafted": (GumbelCoupled(window=3), True),
}


@cache
def model():
    return TabularModel.random(5, 4, 0, null=True)


@cache
def other():
    return TabularModel.random(5, 4, 1, null=True)


def run(decoder, law, seeds, *, drafted):
    draft = ModelDraft(other().reader(len(seeds), law)) if drafted else None
    return decoder(model().reader(len(seeds), law), seeds, draft=draft)


def z_score(tokens, law):
    """Pearson's chi-square of the counts of all sequences, as a standard normal; infinite where one cannot be."""
    _, p = model().sequences(law)
    counts = torch.bincount(tokens @ torch.tensor([125, 25, 5, 1]), minlength=625).double()
    if counts[p == 0].any():
        return math.inf
    expected = p * len(tokens)
    large = expected >= 5
    counts, expected = (torch.cat([a[large], a[~large].sum()[None]]) for a in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


# ------------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_decoder_draws_every_sequence_as_often_as_the_model_says(name, law):
    decoder, drafted = LOSSLESS[name]
    out = run(decoder, LAWS[law], range(N), drafted=drafted)
    assert abs(z_score(out.tokens, LAWS[law])) < 4


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_row_is_the_same_alone_as_in_any_batch(name):
    """So that what is proven of a large batch is proven of a batch of one."""
    decoder, drafted = LOSSLESS[name]
    seeds = [3, 2**62, 3, *range(100, 160)]
    together = run(decoder, FILTERED, seeds, drafted=drafted)
    assert torch.equal(together.tokens[0], together.tokens[2])
    for i, seed in enumerate(seeds):
        alone = run(decoder, FILTERED, [seed], drafted=drafted)
        for part in ("tokens", "passes", "tested", "accepted"):
            assert torch.equal(getattr(alone, part)[0], getattr(together, part)[i]), (seed, part)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("window", [1, 2, 3, 9])
@pytest.mark.parametrize("drafted", [False, True])
def test_gumbel_is_token_for_token_the_ancestral_sample(drafted, window, rows, law):
    seeds = range(7, 7 + rows)
    expected = run(Ancestral(), LAWS[law], seeds, drafted=False).tokens
    out = run(GumbelCoupled(window), LAWS[law], seeds, drafted=drafted)
    assert torch.equal(out.tokens, expected)
    assert out.accepted.sum() > 0 or rows == 1


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_is_token_for_token_the_likeliest(name, rows):
    decoder, drafted = LOSSLESS[name]
    law = TokenLaw(guidance=2.0, temperature=0)
    expected = run(Ancestral(), law, [0] * rows, drafted=False).tokens
    assert torch.equal(run(decoder, law, range(rows), drafted=drafted).tokens, expected)


def test_a_tree_without_branches_is_a_chain_token_for_token():
    a = run(SpeculativeTree((1, 1, 1)), FILTERED, range(500), drafted=True)
    b = run(Speculative(3), FILTERED, range(500), drafted=True)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.passes, b.passes) and torch.equal(a.accepted, b.accepted)


# ---------------------------------------------------------------------------------- the natural mistakes are all noticed


REJECTING = {"speculative": (Speculative(3), True), "tree": (SpeculativeTree((2, 2)), True), "sjd": LOSSLESS["sjd"]}


@pytest.mark.parametrize("name", REJECTING)
def test_resampling_from_p_in_place_of_the_residual_is_noticed(name, monkeypatch):
    monkeypatch.setattr(rules, "residual", lambda p, q: p)
    decoder, drafted = REJECTING[name]
    assert z_score(run(decoder, FILTERED, range(FEWER), drafted=drafted).tokens, FILTERED) > 8


@pytest.mark.parametrize("name", REJECTING)
def test_filtering_the_residual_a_second_time_is_noticed(name, monkeypatch):
    right, again = rules.residual, TokenLaw(temperature=0.8, top_k=4, top_p=0.95)
    monkeypatch.setattr(rules, "residual", lambda p, q: again(right(p, q).log()))
    decoder, drafted = REJECTING[name]
    assert z_score(run(decoder, FILTERED, range(N), drafted=drafted).tokens, FILTERED) > 8


def test_guessing_with_the_noise_of_the_residual_is_noticed():
    draft = ModelDraft(other().reader(N))
    out = decode(model().reader(N), range(N), draft, (1, 1, 1), rejection, stream="token")
    assert z_score(out.tokens, TokenLaw()) > 5


def test_unfiltered_guesses_said_to_be_filtered_are_noticed():
    class Wrong(ModelDraft):
        def propose(self, *args):
            guess = super().propose(*args)
            return guess._replace(q=TokenLaw(top_k=2)(guess.q.log()))

    out = Speculative(3)(model().reader(FEWER), range(FEWER), draft=Wrong(other().reader(FEWER)))
    assert z_score(out.tokens, TokenLaw()) > 8


@pytest.mark.parametrize("stale", [True, False])
def test_committing_the_minimum_of_a_batch_with_stale_laws_is_noticed(stale):
    """Pairs of rows in step: what stood beyond the shorter one of both is tested again. Its law is p by then, not q."""
    generator = torch.Generator().manual_seed(0)
    laws, n = model().laws(TokenLaw()), 4

    def draw(p):
        return torch.multinomial(p, 1, generator=generator)[:, 0]

    q = torch.full((N, n, 5), 0.2, dtype=torch.float64)
    x = torch.randint(5, (N, n), generator=generator)
    done = torch.zeros(N, dtype=torch.int64)
    while (done < n).any():
        prefix, good, new, law = torch.zeros_like(done), torch.ones(N, dtype=torch.bool), x.clone(), q.clone()
        stood = done.clone()
        for t in range(n):
            p, open_ = laws[t][prefix], done <= t
            tests = open_ & good
            stands = rules.accepted(p, q[:, t], x[:, t], torch.rand(N, generator=generator, dtype=torch.float64))
            drawn = draw(torch.where(tests[:, None], rules.residual(p, q[:, t]), p))
            new[:, t] = torch.where(~open_ | (tests & stands), x[:, t], drawn)
            law[:, t] = torch.where((tests & stands & stale)[:, None], q[:, t], p)
            stood += tests.long()  # what stood, and the first that was drawn anew
            prefix = 5 * prefix + x[:, t]
            good &= ~open_ | stands
        done = stood.view(-1, 2).amin(1).repeat_interleave(2)
        x, q = new, law
    z = z_score(x, TokenLaw())
    assert z > 8 if stale else abs(z) < 4


# --------------------------------------------------------------------------------------------------------------- figures


def test_a_guess_stands_with_one_minus_the_total_variation():
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    target, guesser = (TabularModel([a.expand(3**t, 3).double() for t in range(4)]) for a in (p, q))
    out = Speculative(3)(target.reader(N), range(N), draft=ModelDraft(guesser.reader(N)))
    alpha = 0.6  # 1 - TV
    assert out.acceptance == pytest.approx(alpha, abs=4 * math.sqrt(alpha * (1 - alpha) / int(out.tested.sum())))
    first = (out.passes == 1).sum(1).double().mean()  # tokens of the first pass
    assert float(first) == pytest.approx((1 - alpha**4) / (1 - alpha), abs=0.03)


def test_coupled_guesses_hold_at_least_as_often_as_their_bound():
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    target, guesser = (TabularModel([a.expand(3**t, 3).double() for t in range(4)]) for a in (p, q))
    out = GumbelCoupled(3)(target.reader(N), range(N), draft=ModelDraft(guesser.reader(N)))
    assert (1 - 0.4) / (1 + 0.4) - 0.01 < out.acceptance < 0.6


def test_a_draft_that_is_the_model_is_always_right():
    for decoder in (Speculative(3), GumbelCoupled(3), SpeculativeTree((2, 1, 1))):
        out = decoder(model().reader(90), range(90), draft=ModelDraft(model().reader(90)))
        assert out.acceptance == 1
        assert out.nfe == 1 and (out.tested == 3).all()


def test_more_guesses_at_a_place_hold_more_often():
    rates = [run(SpeculativeTree(b), TokenLaw(), range(5000), drafted=True).acceptance for b in ((1,), (2,), (4,))]
    assert rates[0] + 0.05 < rates[1] < rates[2] - 0.02


def test_passes_say_when_each_token_was_settled():
    out = run(SpeculativeJacobi(3), FILTERED, range(200), drafted=False)
    assert (out.passes[:, 0] == 1).all() and (out.passes.diff(dim=1) >= 0).all()
    assert out.nfe == int(out.passes.max()) <= 4
    assert torch.equal(out.passes[:, -1], 4 - out.accepted)  # every pass settles one token more than hold
    assert (out.accepted <= out.tested).all()


# -------------------------------------------------------------------------------------------------------------- the lossy


@pytest.mark.parametrize("decoder", [Relaxed(3, 0.5), MedusaTypical((2, 2))])
def test_a_lossy_decoder_takes_more_and_is_not_exact(decoder):
    lossless = Speculative(3) if isinstance(decoder, Relaxed) else SpeculativeTree((2, 2))
    a, b = (run(each, TokenLaw(), range(FEWER), drafted=True) for each in (decoder, lossless))
    assert a.acceptance > b.acceptance + 0.05
    assert z_score(a.tokens, TokenLaw()) > 8


def test_lenience_one_is_exact_and_bounds_what_comes_out_too_often():
    a, b = (run(d, FILTERED, range(300), drafted=True) for d in (Relaxed(3, 1.0), Speculative(3)))
    assert torch.equal(a.tokens, b.tokens)
    law = model().laws(TokenLaw())[0][0]
    drawn = run(Relaxed(3, 0.5), TokenLaw(), range(N), drafted=True).tokens[:, 0]
    often = torch.bincount(drawn, minlength=5) / N
    assert (often < law / 0.5 + 0.01).all()


def test_the_longest_typical_path_is_kept():
    shape = Shape((2, 2))  # nodes 1, 2; 3, 4 below 1; 5, 6 below 2
    p = torch.full((1, 7, 4), 0.01)
    tokens = torch.tensor([[0, 1, 0, 1, 0, 1]])
    p[0, 0, :2] = 0.49  # both children of the root are typical
    p[0, 1] = torch.tensor([0.01, 0.01, 0.97, 0.01])  # none of those below node 1
    p[0, 2] = torch.tensor([0.01, 0.97, 0.01, 0.01])  # node 6, the second below node 2
    node, law = rules.typical(
        rules.Guess(tokens, p[:, :3]), p, None, torch.zeros(1, dtype=torch.int64), shape, epsilon=0.09, delta=0.3
    )
    assert node.tolist() == [6] and torch.equal(law, p[:, 6])
    p[0, 0, 1] = 1e-3  # now node 2 is not, and what is below it does not count
    node, _ = rules.typical(
        rules.Guess(tokens, p[:, :3]), p, None, torch.zeros(1, dtype=torch.int64), shape, epsilon=0.09, delta=0.3
    )
    assert node.tolist() == [1]


# ------------------------------------------------------------------------------------------------------- names and shapes


def test_every_decoder_says_whether_it_is_lossless():
    assert {n for n in names("decoder") if tag_of(resolve("decoder", n)).metadata["lossless"]} == {
        *("ancestral", "gumbel", "sjd", "speculative", "speculative-tree"),
    }
    assert set(names("decoder")) >= {"medusa-typical", "relaxed"}
    for name in names("decoder"):
        decoder = resolve("decoder", name)
        assert tag_of(decoder).metadata["lossless"] != (decoder.__doc__.startswith("Lossy:"))


def test_the_shape_of_a_tree_by_hand():
    shape = Shape((2, 1, 2))
    assert shape.parents.tolist() == [-1, 0, 0, 1, 2, 3, 3, 4, 4]
    assert shape.depth.tolist() == [0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert shape.children.tolist() == [[1, 2], [3, -1], [4, -1], [5, 6], [7, 8]]
    assert shape.path[[0, 4, 8]].tolist() == [[0, 0, 0], [2, 4, 0], [2, 4, 8]]
    assert shape.levels == [(0, 1), (1, 3), (3, 5), (5, 9)]
    assert not shape.chain and Shape((1, 1)).chain and Shape(()).chain and Shape(()).nodes == 1
    assert shape_of((2, 1, 2), torch.device("cpu")) is shape_of((2, 1, 2), torch.device("cpu"))


@pytest.mark.parametrize(
    ("go", "says"),
    [
        (lambda: Speculative(0), "window = 0"),
        (lambda: SpeculativeJacobi(-1), "window = -1"),
        (lambda: GumbelCoupled(0), "ancestral makes none"),
        (lambda: SpeculativeTree((2, 0)), r"branching = \[2, 0\]"),
        (lambda: Relaxed(4, 0.0), "lenience = 0.0"),
        (lambda: MedusaTypical(epsilon=0), "epsilon = 0"),
        (lambda: run(Speculative(), TokenLaw(), [0], drafted=False), "needs a draft"),
        (lambda: run(Ancestral(), TokenLaw(), [0], drafted=True), "decoder ancestral takes no draft"),
        (lambda: run(SpeculativeJacobi(), TokenLaw(), [0], drafted=True), "decoder sjd takes no draft"),
        (lambda: Ancestral()(model().reader(2), [0]), "1 seeds for 2"),
        (lambda: Ancestral()(model().reader(1), [-1]), "seed -1 is out of range"),
        (lambda: Ancestral()(model().reader(1), [0.5]), "seed 0.5 is not a whole number"),
        (
            lambda: Speculative()(model().reader(1), [0], draft=ModelDraft(TabularModel.random(3, 4, 0).reader(1))),
            "draft has 3 tokens and the model 5",
        ),
        (
            lambda: SpeculativeTree((2, 1))(model().reader(1), [0], draft=JacobiDraft(5)),
            r"guesses chains, no trees; take branching \[1, 1\]",
        ),
    ],
)
def test_what_cannot_be_is_refused(go, says):
    with pytest.raises(UserError, match=says):
        go()


def test_a_reader_serves_one_decoding():
    reader = model().reader(1)
    Ancestral()(reader, [0])
    with pytest.raises(UserError, match="take a new one"):
        Ancestral()(reader, [0])


def test_progress_goes_from_the_first_token_to_the_last():
    seen = []
    SpeculativeJacobi(2)(model().reader(3), range(3), progress=lambda *a: seen.append(a))
    assert seen == sorted(seen) and seen[-1] == (4, 4)


def test_a_tree_wider_than_what_its_draft_ever_guesses_is_exact():
    """The children beyond come with no probability of having been drawn, and must never stand."""
    draft = ModelDraft(other().reader(FEWER, TokenLaw(top_k=1)))
    out = SpeculativeTree((3, 2))(model().reader(FEWER), range(FEWER), draft=draft)
    assert abs(z_score(out.tokens, TokenLaw())) < 4


def test_a_token_above_epsilon_is_typical_however_sure_the_model_is():
    p = torch.tensor([[[0.85, 0.15], [0.5, 0.5]]])  # delta exp(-H) = 0.2
    guess = rules.Guess(torch.tensor([[1]]), p[:, :1])
    for epsilon, holds in ((0.09, 1), (0.18, 0), (0.9, 0)):
        node, _ = rules.typical(
            guess, p, None, torch.zeros(1, dtype=torch.int64), Shape((1,)), epsilon=epsilon, delta=0.3
        )
        assert node.tolist() == [holds], epsilon
