"""From logits to tokens: the one distribution that drafts and verifier share, and the randomness it is drawn with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.functional import Rng, double, mix, noise_from_seeds, wide
from genflow.registry import api_export


@api_export("TokenLaw")
@dataclass(frozen=True)
class TokenLaw:
    """How logits become the distribution of the next token: guidance, then temperature, top-k and top-p.

    guidance: 1 is none; the logits are moved from the null ones to, and past, the conditional ones (Ho & Salimans 2022,
    arXiv 2207.12598, on logits as in LlamaGen, arXiv 2406.06525). temperature: 0 is greedy, the likeliest token alone.
    top_k: the k likeliest tokens alone. top_p: the fewest likeliest tokens that have this much together (Holtzman et al.
    2019, arXiv 1904.09751). Raises UserError for numbers that cannot be.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise UserError(f"guidance = {self.guidance} is not finite; 1 is none")
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature = {self.temperature} must be 0 (greedy) or more, and finite; 1 is the model's own"
            )
        if self.top_k is not None and not isinstance(self.top_k, int):
            raise UserError(f"top_k = {self.top_k} is not a whole number; none keeps all")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k} leaves no token; the least is 1 (greedy), and none keeps all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} is not above 0 and up to 1; 1 keeps all tokens")

    def __call__(self, logits: Tensor, null: Tensor | None = None) -> Tensor:
        """logits, and the null ones where guidance is not 1: ... x V -> probabilities, ... x V, float32 or wider."""
        logits = wide(logits)
        if self.guidance != 1:
            if null is None:
                raise UserError(f"guidance = {self.guidance} needs the logits without a condition; 1 is none")
            logits = torch.lerp(null.to(logits.dtype), logits, self.guidance)
        if self.temperature == 0:
            most, at = logits.max(-1, keepdim=True)
            return torch.zeros_like(logits).scatter_(-1, at, 1 + 0 * most)  # NaN stays NaN
        coldest = torch.finfo(logits.dtype).tiny
        logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, coldest)  # the likeliest stays finite
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept, at = logits.topk(self.top_k)
            logits = torch.full_like(logits, -math.inf).scatter_(-1, at, kept)
        p = logits.softmax(-1)
        if self.top_p < 1:
            falling, at = p.sort(dim=-1, descending=True, stable=True)
            before = falling.cumsum(-1) - falling
            p = torch.zeros_like(p).scatter_(-1, at, falling.masked_fill(before >= self.top_p, 0))
            p = p / p.sum(-1, keepdim=True)
        return p


STREAMS = {"token": 1, "draft": 2, "accept": 3}


class TokenNoise:
    """Counter-based randomness of tokens: each number is a function of (seed of its row, stream, position) alone.

    So a row does not depend on its batch mates, nor on how many tokens a decoder settles at a time. Streams are
    independent: "token", with which the model's own draws are made; "draft", those of its guesses; "accept", the tests.
    A position may be drawn for again after its guess was dropped: what was before it, and so what it is drawn from, does
    not depend on the position's own numbers. Raises UserError for what is no seed.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        for seed in seeds:
            if type(seed) is not int or not 0 <= seed < 2**63:
                noise_from_seeds([seed], ())  # refuses what is no seed
        numbers = torch.tensor(list(map(int, seeds)), dtype=torch.int64, device="cpu")
        self.keys = Rng(0).bits("tokens", numbers).to(device)

    def _bits(self, stream: str, at: Tensor, n: int) -> Tensor:
        """B x W x n random int64 for the positions at, B x W."""
        streams = mix(self.keys + mix(torch.full_like(self.keys, STREAMS[stream])))
        bits = mix(streams[:, None] + mix(at + 1))
        return mix(bits[..., None] + mix(torch.arange(1, n + 1, device=at.device)))

    def uniform(self, stream: str, at: Tensor, n: int) -> Tensor:
        """n uniform numbers inside (0, 1) for each of the positions at, B x W: B x W x n float64."""
        return (double(self._bits(stream, at, n) >> 12) + (2.0**51 + 0.5)) * 2.0**-52

    def draw(self, p: Tensor, stream: str, at: Tensor, n: int = 1) -> Tensor:
        """n different tokens from each of the distributions p, one after another without replacement.

        By the Gumbel-max trick in its form of a race, argmax p / E with E exponential: the same numbers draw nearly the same
        tokens from nearly the same distributions (Kool et al. 2019, arXiv 1903.06059). p: B x W x V, need not sum to one;
        at: B x W, positions. Returns B x W x n int64; tokens of no probability come last.
        """
        race = p / -self.uniform(stream, at, p.shape[-1]).log().to(p)
        return race.argmax(-1, keepdim=True) if n == 1 else race.topk(n).indices
