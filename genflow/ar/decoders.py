"""Decoders of token models: guess, verify the guesses in one pass of the model, keep what holds.

The lossless ones draw from exactly the distribution that token by token drawing has, up to the rounding of a pass over
many tokens; the others say in their names and registration that they do not. What there is to gain is fewer passes, which
are the wait at small batches; at large ones each pass costs what its tokens cost.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from genflow.ar.drafts import JacobiDraft
from genflow.ar.guess import Draft, Guess, Reader, Shape, check_seeds, shape_of, symbols_at
from genflow.ar.law import TokenNoise
from genflow.ar.rules import Rule, agreement, rejection, tree_rejection, typical
from genflow.errors import UserError
from genflow.registry import api_export, decoder_export, tag_of

Progress = Callable[[int, int], None]


@api_export("Decoded")
@dataclass(frozen=True)
class Decoded:
    """Sequences and what they took.

    tokens: B x n int64; passes: B x n int64, the pass of the model, from 1, in which each was settled; tested, accepted: B
    int64, guesses that were put to the test (those after the first that fails are not), and those that held.
    """

    tokens: Tensor
    passes: Tensor
    tested: Tensor
    accepted: Tensor

    @property
    def nfe(self) -> int:
        """Passes of the model, of the row that took most."""
        return int(self.passes.max()) if self.passes.numel() else 0

    @property
    def acceptance(self) -> float:
        """The part of the tested guesses that held; NaN where none was tested."""
        tested = int(self.tested.sum())
        return int(self.accepted.sum()) / tested if tested else math.nan


class Decoder(ABC):
    """A decoder: a dataclass of its options. needs_draft, takes_draft: whether it must, and may, have a draft."""

    needs_draft: ClassVar[bool] = False
    takes_draft: ClassVar[bool] = True
    stream: ClassVar[str] = "draft"

    @abstractmethod
    def how(self) -> tuple[Sequence[int], Rule]:
        """The shape of the guesses and the rule of their verification."""

    def __call__(
        self, target: Reader, seeds: Sequence[int], *, draft: Draft | None = None, progress: Progress | None = None
    ) -> Decoded:
        """One sequence for each seed. target: a reader of so many rows, that has read nothing. Raises UserError.

        draft: where guesses come from; without one the model's last pass guesses, where the decoder makes guesses.
        """
        tag = tag_of(type(self))
        name = tag.names[0] if tag is not None else type(self).__name__
        if draft is None and self.needs_draft:
            raise UserError(f"decoder {name} needs a draft; decoders sjd and gumbel do without one")
        if draft is not None and not self.takes_draft:
            raise UserError(f"decoder {name} takes no draft; leave it out, or take decoder speculative")
        branching, rule = self.how()
        if draft is None and branching:
            draft = JacobiDraft(target.vocabulary)
        return decode(target, seeds, draft, branching, rule, stream=self.stream, progress=progress)


@dataclass(frozen=True)
class Windowed(Decoder):
    """A decoder of chains of `window` guesses."""

    window: int

    def __post_init__(self) -> None:
        if not isinstance(self.window, int):
            raise UserError(f"window = {self.window!r} is not a whole number of guesses")
        if self.window < 1:
            why = "is too few guesses; the least is 1, and decoder ancestral makes none"
            raise UserError(f"window = {self.window} {why}")


# ------------------------------------------------------------------------------------------------------------- the loop


def decode(
    target: Reader,
    seeds: Sequence[int],
    draft: Draft | None,
    branching: Sequence[int],
    rule: Rule,
    *,
    stream: str = "draft",
    progress: Progress | None = None,
) -> Decoded:
    """The loop of all decoders: each pass reads the last settled symbol and a guess, and settles a token or more.

    draft: where guesses come from; none, for no guesses. branching: their shape; it is cut short at the end of the sequence.
    rule: of verification (rules.py). stream: of the guesses' noise. Every row goes at its own pace. Each pass waits for the
    device once. Raises UserError for a draft of another vocabulary or of a reader that does not fit, or that cannot guess
    such a shape, for more guesses at a place than there are tokens, for seeds that are not one for each row, and for NaN.
    """
    rows, n, device = len(target.lengths), target.tokens, target.device
    _check(target, seeds, draft, branching)
    noise = TokenNoise(seeds, device)
    symbols = torch.full((rows, n + 2 + len(branching)), target.vocabulary, dtype=torch.int64, device=device)
    passes = torch.zeros(rows, n, dtype=torch.int64, device="cpu")
    tested, held, done = (torch.zeros(rows, dtype=torch.int64, device="cpu") for _ in range(3))
    each, number = torch.arange(rows, device=device)[:, None], 0
    finite = torch.ones(rows, dtype=torch.bool, device=device)
    while (left := n - done).any():
        number += 1
        # Guess ...
        depth = min(len(branching), int(left.max()) - 1) if draft is not None else 0
        shape = shape_of(tuple(branching[:depth]), device)
        guess = draft.propose(symbols, done, shape, noise, stream) if draft is not None and depth else None
        if guess is None:
            shape = shape_of((), device)
            guess = Guess(symbols[:, :0], symbols.new_zeros(rows, 0, target.vocabulary))

        # ... verify all guesses in one pass ...
        root, at = symbols_at(symbols, done, 1), done.to(device)
        p = target.step(torch.cat([root, guess.tokens], 1), None if shape.chain else shape.parents)
        finite &= p.flatten(1).isfinite().all(1)
        node, law = rule(guess, p, noise, at, shape)
        if int(left.min()) <= depth:  # the last token is the model's own, however far the guesses of others go
            node, law = _end(node, law, p, shape, (left - 1).clamp(min=0).to(device))
        token = noise.draw(law[:, None], "token", (at + shape.depth[node])[:, None])[..., 0]

        # ... and keep what holds, with the token after it.
        path = torch.cat([torch.zeros_like(root), shape.path[node]], 1)
        new = torch.cat([guess.tokens[each, path[:, 1:] - 1], token], 1)
        new = new.scatter(1, shape.depth[node][:, None], token)
        symbols.scatter_(1, at[:, None] + 1 + torch.arange(new.shape[1], device=device), new)
        good = shape.depth[node].cpu()
        settled = torch.minimum(good + 1, left)
        tested += torch.minimum(settled, (left - 1).clamp(0, len(shape.branching)))
        held += (settled - 1).clamp(min=0)
        places = torch.arange(n, device="cpu")
        passes[(places >= done[:, None]) & (places < (done + settled)[:, None])] = number
        done = done + settled
        if not shape.chain:
            target.gather(path)
        target.truncate(done)
        if draft is not None:
            draft.observe(p, path, settled.to(device), done)
        if progress is not None:
            progress(int(done.min()), n)
    if not bool(finite.all()):
        wrong = (~finite).nonzero().flatten().tolist()
        raise UserError(f"decoding: the model's probabilities are not finite; samples {wrong[:16]} of {rows}")
    return Decoded(symbols[:, 1 : n + 1].clone(), passes, tested, held)


def _end(node: Tensor, law: Tensor, p: Tensor, shape: Shape, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The node and law of each row, but no deeper than its limit, B, and there the model's own law."""
    there = shape.depth[node] >= limit
    ancestors = torch.cat([torch.zeros_like(node)[:, None], shape.path[node]], 1)
    above = ancestors.gather(1, limit.clamp(max=ancestors.shape[1] - 1)[:, None])[:, 0]
    node = torch.where(there, above, node)
    return node, torch.where(there[:, None], p[torch.arange(len(p), device=p.device), node], law)


def _check(target: Reader, seeds: Sequence[int], draft: Draft | None, branching: Sequence[int]) -> None:
    check_seeds(seeds, len(target.lengths))
    if target.lengths.any():
        raise UserError("the reader has read something already; take a new one for each decoding")
    if draft is not None:
        draft.check(target)
    if draft is not None and draft.vocabulary != target.vocabulary:
        raise UserError(
            f"the draft has {draft.vocabulary} tokens and the model {target.vocabulary}; both must be of one tokenizer"
        )
    if max(branching, default=1) > target.vocabulary:
        near = [min(width, target.vocabulary) for width in branching]
        what = f"{max(branching)} different guesses at a place, and there are {target.vocabulary} tokens"
        raise UserError(f"branching {list(branching)}: {what}; take {near}")
    if draft is not None and not draft.trees and max(branching, default=1) > 1:
        chain = [1] * len(branching)
        raise UserError(f"{type(draft).__name__} guesses chains, no trees; take branching {chain} or another draft")
    if draft is not None and len(branching) > draft.reach:
        raise UserError(f"the draft looks {draft.reach} tokens ahead, and {len(branching)} are asked; ask for fewer")


# --------------------------------------------------------------------------------------------------------- the lossless


@decoder_export("ancestral", lossless=True)
@dataclass(frozen=True)
class Ancestral(Decoder):
    """Token by token, each drawn from the model's distribution after those before it."""

    takes_draft: ClassVar[bool] = False

    def how(self) -> tuple[Sequence[int], Rule]:
        return (), rejection


@decoder_export("speculative", lossless=True)
@dataclass(frozen=True)
class Speculative(Windowed):
    """A draft guesses `window` tokens, the model verifies them in one pass (Leviathan et al. 2022, arXiv 2211.17192).

    With a guess standing with probability a there come (1 - a^(window + 1)) / (1 - a) tokens of a pass.
    """

    window: int = 4

    needs_draft: ClassVar[bool] = True

    def how(self) -> tuple[Sequence[int], Rule]:
        return (1,) * self.window, rejection


@decoder_export("speculative-tree", lossless=True)
@dataclass(frozen=True)
class SpeculativeTree(Decoder):
    """A draft guesses several tokens for each place, the model verifies the tree of them in one pass.

    SpecInfer (Miao et al. 2023, arXiv 2305.09781), the guesses drawn without replacement (Jeon et al. 2024, arXiv
    2402.14160). branching: how many children each node has, by depth.
    """

    branching: tuple[int, ...] = (3, 2, 1)

    needs_draft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Shape(tuple(self.branching))

    def how(self) -> tuple[Sequence[int], Rule]:
        return self.branching, tree_rejection


@decoder_export("sjd", lossless=True)
@dataclass(frozen=True)
class SpeculativeJacobi(Windowed):
    """The model verifies its own guesses of the last pass at the next `window` tokens: speculative Jacobi decoding.

    Teng et al. 2024 (arXiv 2410.01699). No draft and no training. Rows go at their own pace, and filters act once.
    """

    window: int = 8

    takes_draft: ClassVar[bool] = False

    def how(self) -> tuple[Sequence[int], Rule]:
        return (1,) * self.window, rejection


@decoder_export("gumbel", lossless=True)
@dataclass(frozen=True)
class GumbelCoupled(Windowed):
    """Token for token the ancestral sample of each seed, whatever guesses the next `window` tokens.

    A guess is drawn with the noise with which the model would draw, and holds where both draw the same (Wiggers & Hoogeboom
    2020, arXiv 2002.09928; Daliri et al. 2024, arXiv 2408.07978). Without a draft the model's last pass guesses. A guess
    holds a little less often than where only the distribution is kept, with (1 - TV) / (1 + TV) or more.
    """

    window: int = 8

    stream: ClassVar[str] = "token"

    def how(self) -> tuple[Sequence[int], Rule]:
        return (1,) * self.window, agreement


# ------------------------------------------------------------------------------------------------------------- the lossy


@decoder_export("relaxed", lossless=False)
@dataclass(frozen=True)
class Relaxed(Windowed):
    """Lossy: speculative decoding with guesses accepted more often than is right (arXiv 2211.17192, app. A.5).

    lenience: 1 is exact; below, no token comes out with more than 1 / lenience of its probability after those before it.
    Without a draft the model's last pass guesses, as in sjd.
    """

    window: int = 4
    lenience: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lenience <= 1:
            raise UserError(f"lenience = {self.lenience} is not above 0 and up to 1; 1 is exact")

    def how(self) -> tuple[Sequence[int], Rule]:
        return (1,) * self.window, partial(rejection, lenience=self.lenience)


@decoder_export("medusa-typical", lossless=False)
@dataclass(frozen=True)
class MedusaTypical(SpeculativeTree):
    """Lossy: of a tree of guesses the longest path without an untypical token is kept.

    A token is typical where p > min(epsilon, delta exp(-entropy)) (Medusa, Cai et al. 2024, arXiv 2401.10774, sec. 2.3.1).
    Any draft will do; its guesses are drawn, and not the likeliest as in the paper. branching: how many children each node
    has, by depth.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epsilon", "delta"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise UserError(
                    f"{name} = {value} is not above 0 and up to 1; the default is {getattr(type(self), name)}"
                )

    def how(self) -> tuple[Sequence[int], Rule]:
        return self.branching, partial(typical, epsilon=self.epsilon, delta=self.delta)
