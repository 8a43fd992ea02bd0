"""A token transformer with the sequences that it reads, as decoders see it."""

from __future__ import annotations

import torch
from torch import Tensor

from genflow.ar.law import TokenLaw
from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.networks.token_transformer import TokenTransformer
from genflow.registry import api_export


@api_export("TransformerReader")
class TransformerReader:
    """B sequences of a TokenTransformer, their prefixes read, their tokens drawn from one law (guess.py has the protocol).

    condition: B rows, embedded; null: one row or B, for guidance, which goes as a second half of the batch. hidden: the
    states of the last step's symbols, copies B x W x width, from which heads and modules guess; copies: 2 under guidance,
    else 1. Raises UserError for guidance without the null condition.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: TokenTransformer,
        condition: Condition,
        *,
        law: TokenLaw | None = None,
        null: Condition | None = None,
    ) -> None:
        self.model, self.law = model, law or TokenLaw()
        self.vocabulary, self.tokens, self.rows = model.vocabulary, model.tokens, len(condition)
        self.copies = 1 if self.law.guidance == 1 else 2
        if self.copies == 2:
            if null is None:
                raise UserError(f"guidance = {self.law.guidance} needs the null condition; 1 is none")
            null = null if len(null) == self.rows else null.expand(self.rows)
            condition = Condition.cat([condition, null])
        prefix = model.prefix(condition.tokens.to(model.head.weight.dtype), condition.mask)
        self._prefix = prefix.shape[1]
        self._cache = model.cache(len(prefix), self._prefix + self.tokens + 1)
        if self._prefix:
            model.read(prefix, self._cache, self._prefix)
        self.hidden = prefix[:, :0]

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    @property
    def lengths(self) -> Tensor:
        return self._cache.lengths[: self.rows] - self._prefix

    @torch.no_grad()
    def step(self, symbols: Tensor, parents: Tensor | None = None) -> Tensor:
        x = self.model.embed(symbols.repeat(self.copies, 1))
        self.hidden = self.model.read(x, self._cache, self._prefix, parents)
        return self.says(self.model.logits(self.hidden))

    def says(self, logits: Tensor) -> Tensor:
        """The distribution of logits, copies B x ... x V: B x ... x V."""
        return self.law(*logits.chunk(self.copies))

    def truncate(self, lengths: Tensor) -> None:
        self._cache.truncate((lengths + self._prefix).repeat(self.copies))

    def gather(self, path: Tensor) -> None:
        self._cache.gather(path.repeat(self.copies, 1))
