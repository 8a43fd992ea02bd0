"""Drafts: guesses from a smaller model, and from the model's own last pass."""

from __future__ import annotations

import torch
from torch import Tensor

from genflow.ar.guess import Guess, Reader, Shape, symbols_at
from genflow.ar.law import TokenNoise
from genflow.registry import api_export


@api_export("ModelDraft")
class ModelDraft:
    """Guesses by another model of the same tokens, token by token, or level by level of a tree.

    reader: of as many rows as the model's, that has read nothing; let it have the model's own law (temperature, filters).
    """

    trees = True

    def __init__(self, reader: Reader) -> None:
        self.reader, self.vocabulary = reader, reader.vocabulary

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

    trees = False

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._said: tuple[Tensor, Tensor] | None = None

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
