"""Drafts: guesses from a smaller model, from a model's modules and heads, and from its own last pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor

from genflow.ar.guess import Guess, Reader, Shape, symbols_at
from genflow.ar.law import TokenNoise
from genflow.ar.reader import TransformerReader
from genflow.errors import UserError
from genflow.networks.token_transformer import MTPModule
from genflow.registry import api_export


@api_export("ModelDraft")
class ModelDraft:
    """Guesses by another model of the same tokens, token by token, or level by level of a tree.

    reader: of as many rows as the model's, that has read nothing; let it have the model's own law (temperature, filters).
    """

    trees, reach = True, math.inf

    def __init__(self, reader: Reader) -> None:
        self.reader, self.vocabulary = reader, reader.vocabulary

    def check(self, target: Reader) -> None:
        mine, rows = self.reader.lengths, len(target.lengths)
        if self.reader is target:
            raise UserError("the draft and the model have one reader, and each needs its own; make the draft another")
        if len(mine) != rows:
            raise UserError(f"the draft's reader has {len(mine)} rows and the model's {rows}; both must have as many")
        if mine.any():
            raise UserError("the draft's reader has read something already; take a new draft for each decoding")

    def propose(self, symbols: Tensor, done: Tensor, shape: Shape, noise: TokenNoise, stream: str) -> Guess:
        reader, at = self.reader, done.to(symbols.device)[:, None]
        missed = done + 1 - reader.lengths  # what was settled since, one symbol or more
        p = reader.step(symbols_at(symbols, reader.lengths, int(missed.max())))
        laws = p[torch.arange(len(p), device=p.device), (missed - 1).to(p.device)][:, None]
        reader.truncate(done + 1)
        tokens, q = [], []
        for depth, width in enumerate(shape.branching):
            q.append(laws)
            tokens.append(noise.draw(laws, stream, (at + depth).expand(laws.shape[:2]), width).flatten(1))
            if depth + 1 == len(shape.branching):
                break
            if shape.chain:
                laws = reader.step(tokens[-1])
            else:
                first, _ = shape.levels[depth + 1]
                laws = reader.step(torch.cat(tokens, 1), shape.forests[depth + 1])[:, first - 1 :]
                reader.truncate(done + 1)
        return Guess(torch.cat(tokens, 1), torch.cat(q, 1))

    def observe(self, p: Tensor, path: Tensor, settled: Tensor, done: Tensor) -> None:
        self.reader.truncate(torch.minimum(self.reader.lengths, done))


class JacobiDraft:
    """Guesses from what the model itself said of the same positions in its last pass, given the guesses of then.

    A position that was not seen then has the law of the last that was. Speculative Jacobi decoding (Teng et al. 2024, arXiv
    2410.01699): with each guess goes the law that it was drawn from, always that of the last pass.
    """

    trees, reach = False, math.inf

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._said: tuple[Tensor, Tensor] | None = None

    def check(self, target: Reader) -> None:
        pass

    def propose(self, symbols: Tensor, done: Tensor, shape: Shape, noise: TokenNoise, stream: str) -> Guess | None:
        if self._said is None:
            return None
        p, settled = self._said
        places = torch.arange(len(shape.branching), device=p.device)
        q = p[torch.arange(len(p), device=p.device)[:, None], (settled[:, None] + places).clamp(max=p.shape[1] - 1)]
        at = done.to(p.device)[:, None] + places
        return Guess(noise.draw(q, stream, at)[..., 0], q)

    def observe(self, p: Tensor, path: Tensor, settled: Tensor, done: Tensor) -> None:
        self._said = p, settled


@api_export("MTPDraft")
class MTPDraft:
    """Guesses by the modules of multi-token prediction of the model itself (DeepSeek-V3, arXiv 2412.19437, sec. 2.2).

    The d-th guess is module d's, given the trunk's last state, the last settled token and the guesses so far; beyond the
    modules there are the last one goes on with its own state in place of the trunk's, as EAGLE does (Li et al. 2024, arXiv
    2401.15077). reader: the model's, with which its decoder works. Raises UserError for a model without modules.

    Module k joins the state one module shallower of place i with token i + k. _hidden[k]: copies B x n + 1 x width, the
    states of module k (0: the trunk) at each place, the last one for what is beyond the end. The cache of each module has
    the places that settled tokens made.
    """

    trees, reach = False, math.inf

    def __init__(self, reader: TransformerReader) -> None:
        model = reader.model
        self.reader, self.model, self.vocabulary = reader, model, model.vocabulary
        self.modules = list(cast(Iterable[MTPModule], model.mtp))
        if not self.modules:
            raise UserError("draft mtp: the model has no modules of multi-token prediction; train one with model.mtp=1")
        rows = reader.rows * reader.copies
        self._caches = [model.cache(rows, model.tokens + 1, layers=1) for _ in self.modules]
        like = model.head.weight
        self._hidden = [like.new_zeros(rows, model.tokens + 1, model.config.width) for _ in range(len(self.modules))]

    def check(self, target: Reader) -> None:
        _check_shared(self, target)

    @torch.no_grad()
    def propose(self, symbols: Tensor, done: Tensor, shape: Shape, noise: TokenNoise, stream: str) -> Guess | None:
        if not done.all():  # the trunk has no state yet
            return None
        symbols, at = symbols.clone(), done.to(symbols.device)[:, None]
        tokens, q = list[Tensor](), list[Tensor]()
        for depth in range(len(shape.branching)):
            if depth < len(self.modules):
                h = self._read(depth, symbols, done + depth)
            else:
                h = self._module(-1, h[:, None], tokens[-1], at + depth)[:, 0]
            q.append(self.reader.says(self.model.logits(h[:, None])))
            tokens.append(noise.draw(q[-1], stream, at + depth)[..., 0])
            symbols.scatter_(1, at + depth + 1, tokens[-1])
        for k, cache in enumerate(self._caches):
            cache.truncate(torch.minimum(cache.lengths, (done - k).clamp(min=0).repeat(self.reader.copies)))
        return Guess(torch.cat(tokens, 1), torch.cat(q, 1))

    def observe(self, p: Tensor, path: Tensor, settled: Tensor, done: Tensor) -> None:
        copies, h = self.reader.copies, self.reader.hidden
        path = path.repeat(copies, 1)
        new = h.gather(1, path[..., None].expand(-1, -1, h.shape[2]))
        self._write(0, done.to(path.device) - settled, new)

    def _read(self, k: int, symbols: Tensor, known: Tensor) -> Tensor:
        """Let module k read all places that so many known tokens make: its state at the last one, copies B x width."""
        cache, copies = self._caches[k], self.reader.copies
        first, places = cache.lengths[: len(known)], (known - k).clamp(min=0)
        width, start = int((places - first).max()), first.to(symbols.device)
        at = start[:, None] + torch.arange(width, device=symbols.device)
        each = at.clamp(max=self.model.tokens).repeat(copies, 1)[..., None]
        before = self._hidden[k].gather(1, each.expand(-1, -1, self.model.config.width))
        h = self._module(k, before, symbols_at(symbols, first + k + 1, width), at + k + 1)
        cache.truncate(places.repeat(copies))
        if k + 1 < len(self.modules):
            self._write(k + 1, start, h)
        last = (places - first - 1).clamp(min=0).to(h.device).repeat(copies)
        return h[torch.arange(len(h), device=h.device), last]

    def _module(self, k: int, h: Tensor, symbols: Tensor, index: Tensor) -> Tensor:
        """Module k on hidden states, copies B x W x width, and the symbols of those numbers, B x W each."""
        cache, copies = self._caches[k], self.reader.copies
        cache.open(h.shape[1])
        rotation = self.model.rotation(index.clamp(max=self.model.tokens).repeat(copies, 1))
        return self.modules[k](h, self.model.embed(symbols.repeat(copies, 1)), rotation, cache)

    def _write(self, k: int, first: Tensor, h: Tensor) -> None:
        """Keep states from place `first` on, B; those of guesses will be written again."""
        at = first.repeat(self.reader.copies)[:, None] + torch.arange(h.shape[1], device=h.device)
        self._hidden[k].scatter_(1, at.clamp(max=self.model.tokens)[..., None].expand(h.shape), h)


@api_export("HeadsDraft")
class HeadsDraft:
    """Guesses by heads on the model's last state, the d-th by head d whatever those before it are: Medusa's.

    Cai et al. 2024 (arXiv 2401.10774). reader: the model's, with which its decoder works; heads: states, B x width, to
    logits, B x heads x V; reach: how many heads there are. In a tree all nodes of a depth have the same children.
    """

    trees = True
    reach: float

    def __init__(self, reader: TransformerReader, heads: Callable[[Tensor], Tensor], reach: int) -> None:
        self.reader, self.heads, self.reach, self.vocabulary = reader, heads, reach, reader.vocabulary
        self._last: Tensor | None = None

    def check(self, target: Reader) -> None:
        _check_shared(self, target)

    @torch.no_grad()
    def propose(self, symbols: Tensor, done: Tensor, shape: Shape, noise: TokenNoise, stream: str) -> Guess | None:
        if self._last is None:
            return None
        laws, at = self.reader.says(self.heads(self._last)), done.to(symbols.device)[:, None]
        tokens, q = [], []
        for depth, width in enumerate(shape.branching):
            first, last = shape.levels[depth]
            q.append(laws[:, depth : depth + 1].expand(-1, last - first, -1))
            tokens.append(noise.draw(q[-1], stream, (at + depth).expand(-1, last - first), width).flatten(1))
        return Guess(torch.cat(tokens, 1), torch.cat(q, 1))

    def observe(self, p: Tensor, path: Tensor, settled: Tensor, done: Tensor) -> None:
        h, copies = self.reader.hidden, self.reader.copies
        node = path.gather(1, (settled - 1).clamp(min=0)[:, None])[:, 0].repeat(copies)
        self._last = h[torch.arange(len(h), device=h.device), node]


def _check_shared(draft: MTPDraft | HeadsDraft, target: Reader) -> None:
    if draft.reader is not target:
        raise UserError(f"{type(draft).__name__} guesses from the model's own states; make it of the model's reader")
