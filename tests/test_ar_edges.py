"""Token models at the edges: no number in their probabilities, more guesses than tokens, numbers that cannot be."""

from __future__ import annotations

import math

import pytest
import torch
from tabular import TabularModel
from toy_tokens import model

from genflow.ar.decoders import MedusaTypical, Speculative, SpeculativeTree
from genflow.ar.drafts import HeadsDraft, ModelDraft, MTPDraft
from genflow.ar.guess import shape_of
from genflow.ar.law import TokenLaw
from genflow.ar.reader import TransformerReader
from genflow.errors import UserError


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("decoder", ["ancestral", "sjd"])
def test_a_model_of_nan_is_told_also_where_it_is_greedy(temperature, decoder):
    flow = model()
    with torch.no_grad():
        flow.network.blocks[0].qkv.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the model's probabilities are not finite; samples .0. of 1"):
        flow.sample(["dark"], seeds=[0], temperature=temperature, decoder=decoder)


def test_greedy_is_the_first_of_the_likeliest_and_not_finite_where_any_other_law_is_not():
    logits = torch.tensor([[0.0, 3.0, 3.0], [-math.inf, -5.0, -9.0], [math.nan, 1.0, 2.0], [math.inf, 0.0, 1.0]])
    greedy, drawn = TokenLaw(temperature=0)(logits), TokenLaw()(logits)
    assert torch.equal(greedy[:2], torch.tensor([[0.0, 1, 0], [0, 1, 0]]))
    assert torch.equal(greedy.isfinite().all(1), drawn.isfinite().all(1))


@pytest.mark.parametrize("decoder", [SpeculativeTree(), MedusaTypical((3, 1))])
def test_more_different_guesses_than_tokens_are_refused(decoder):
    toy = TabularModel.random(2, 4, 0)
    with pytest.raises(UserError, match=r"3 different guesses at a place, and there are 2 tokens; take \[2, "):
        decoder(toy.reader(1), [0], draft=ModelDraft(toy.reader(1)))
    narrow = type(decoder)((2, 1))
    assert narrow(toy.reader(1), [0], draft=ModelDraft(toy.reader(1))).tokens.shape == (1, 4)


def test_top_k_is_a_whole_number():
    with pytest.raises(UserError, match="top_k = 2.5 is not a whole number; none keeps all"):
        model().sample(["dark"], seeds=[0], top_k=2.5)


def test_a_draft_and_the_model_do_not_share_a_reader():
    toy = TabularModel.random(3, 4, 0)
    reader = toy.reader(2)
    with pytest.raises(UserError, match="one reader, and each needs its own"):
        Speculative(2)(reader, range(2), draft=ModelDraft(reader))


def test_a_draft_of_another_number_of_rows_or_that_was_used_is_refused():
    toy = TabularModel.random(3, 4, 0)
    with pytest.raises(UserError, match="the draft's reader has 1 rows and the model's 2"):
        Speculative(2)(toy.reader(2), range(2), draft=ModelDraft(toy.reader(1)))
    draft = ModelDraft(toy.reader(2))
    Speculative(2)(toy.reader(2), range(2), draft=draft)
    with pytest.raises(UserError, match="the draft's reader has read something already; take a new draft"):
        Speculative(2)(toy.reader(2), range(2), draft=draft)


@pytest.mark.parametrize("make", [MTPDraft, lambda reader: HeadsDraft(reader, lambda h: h[:, None], 1)])
def test_guesses_from_the_states_of_another_reader_are_refused(make):
    flow = model(mtp=1)
    one, other = (flow.reader(["dark"], 2, TokenLaw()) for _ in range(2))
    with pytest.raises(UserError, match="Draft guesses from the model's own states; make it of the model's reader"):
        Speculative(1)(one, range(2), draft=make(other))


def test_numbers_of_guesses_are_whole():
    with pytest.raises(UserError, match="window = 2.5 is not a whole number"):
        Speculative(2.5)
    with pytest.raises(UserError, match="1.5 is not a whole number"):
        SpeculativeTree((2, 1.5))


def test_decoding_is_the_same_under_another_default_device():
    flow = model()
    condition = flow.embed_prompts(["dark", "light"], 2)
    shape_of.cache_clear()

    def tokens():
        reader = TransformerReader(flow.network, condition)
        return Speculative()(reader, [0, 1], draft=ModelDraft(TransformerReader(flow.network, condition))).tokens

    with torch.device("meta"):
        elsewhere = tokens()
    assert torch.equal(elsewhere, tokens())
