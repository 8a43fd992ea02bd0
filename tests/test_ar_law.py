"""The distribution that tokens are drawn from, and the randomness they are drawn with."""

from __future__ import annotations

import math

import pytest
import torch

from genflow.ar.law import TokenLaw, TokenNoise
from genflow.errors import UserError


def logits(rows=6, v=9, seed=0):
    return torch.randn(rows, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def test_the_plain_law_is_the_softmax():
    torch.testing.assert_close(TokenLaw()(logits()), logits().softmax(-1))
    assert TokenLaw()(logits().bfloat16()).dtype == torch.float32


def test_each_part_of_the_law_written_out():
    """Guidance, temperature, top-k, top-p, in that order, by hand for every row."""
    law = TokenLaw(guidance=1.7, temperature=0.6, top_k=5, top_p=0.7)
    a, null = logits(), logits(seed=1)
    for row, x, x0 in zip(law(a, null), a, null, strict=True):
        guided = (x0 + 1.7 * (x - x0)) / 0.6
        order = guided.argsort(descending=True)
        p = torch.zeros(9, dtype=torch.float64)
        p[order[:5]] = guided[order[:5]].softmax(0)
        kept, total = torch.zeros(9, dtype=torch.float64), 0.0
        for i in order[:5].tolist():
            if total >= 0.7:
                break
            kept[i], total = p[i], total + float(p[i])
        torch.testing.assert_close(row, kept / kept.sum())


def test_greedy_is_one_token_and_the_limit_of_cold():
    p = TokenLaw(temperature=0)(logits())
    assert torch.equal(p.argmax(-1), logits().argmax(-1)) and torch.equal(p.sum(-1), torch.ones(6).double())
    torch.testing.assert_close(TokenLaw(temperature=1e-3)(logits()), p)
    torch.testing.assert_close(TokenLaw(top_k=1)(logits()), p)
    torch.testing.assert_close(TokenLaw(top_p=1e-9)(logits()), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-46, 5e-324])
def test_the_coldest_law_is_greedy_and_finite(temperature, dtype):
    a = (100 * logits()).to(dtype)
    assert torch.equal(TokenLaw(temperature=temperature)(a), TokenLaw(temperature=0)(a))


def test_more_than_all_tokens_are_all():
    torch.testing.assert_close(TokenLaw(top_k=99)(logits()), logits().softmax(-1))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 0}, "top_k = 0"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"guidance": math.nan}, "guidance = nan"),
    ],
)
def test_what_cannot_be_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        TokenLaw(**options)


def test_guidance_without_the_null_logits_is_refused():
    with pytest.raises(UserError, match="guidance = 2"):
        TokenLaw(guidance=2.0)(logits())


def test_noise_is_a_function_of_seed_stream_and_position():
    at = torch.arange(5).expand(3, 5)
    noise = TokenNoise([4, 9, 4])
    u = noise.uniform("token", at, 3)
    assert torch.equal(u[0], u[2]) and not torch.equal(u[0], u[1])
    assert torch.equal(TokenNoise([9]).uniform("token", torch.tensor([[3]]), 3)[0, 0], u[1, 3])
    torch.testing.assert_close(u[..., :2], noise.uniform("token", at, 2), rtol=0, atol=0)
    streams = torch.cat([noise.uniform(s, at[:, :1], 1)[:2] for s in ("token", "draft", "accept")])
    assert len(streams.unique()) == 6


def test_noise_is_uniform_and_its_parts_do_not_go_together():
    noise, at = TokenNoise(range(2000)), torch.arange(4).expand(2000, 4)
    u = torch.cat([noise.uniform(s, at, 5).flatten(1) for s in ("token", "draft", "accept")], 1)  # 2000 x 60
    assert float(u.min()) > 0 and float(u.max()) < 1
    flat = u.flatten().sort().values
    assert float((flat - (torch.arange(len(flat)) + 0.5) / len(flat)).abs().max()) * math.sqrt(len(flat)) < 1.9
    apart = torch.corrcoef(u.T) - torch.eye(60)
    assert float(apart.abs().max()) < 5 / math.sqrt(2000)


def test_draws_have_their_distribution_and_are_without_replacement():
    n, p = 40_000, torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    tokens = TokenNoise(range(n)).draw(p.expand(n, 1, 5), "token", torch.zeros(n, 1, dtype=torch.int64), 4)[:, 0]
    assert (tokens.sort(1).values.diff(dim=1) > 0).all() and (tokens != 4).all()
    for first in range(4):
        assert float((tokens[:, 0] == first).double().mean()) == pytest.approx(float(p[first]), abs=0.01)
    second = tokens[tokens[:, 0] == 0, 1]
    for token in (1, 2, 3):
        assert float((second == token).double().mean()) == pytest.approx(float(p[token] / 0.5), abs=0.015)


def test_one_draw_is_the_first_of_many():
    p, at = TokenLaw()(logits())[None].expand(3, 6, 9), torch.arange(6).expand(3, 6)
    noise = TokenNoise(range(3))
    assert torch.equal(noise.draw(p, "draft", at), noise.draw(p, "draft", at, 4)[..., :1])
