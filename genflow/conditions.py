"""What a network is conditioned on: text tokens, their mask and a pooled vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genflow.functional import sent


@dataclass(frozen=True)
class Condition:
    """One condition per row.

    tokens: B x L x D embeddings, or B x L int64 ids before the forward of an encoder that is trained.
    mask:   B x L bool, True where a token is real.
    pooled: B x P (P = 0 beside ids).
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Condition:
        return Condition(self.tokens[rows], self.mask[rows], self.pooled[rows])

    def to(self, device: torch.device | str) -> Condition:
        return Condition(*(sent(a, device) for a in (self.tokens, self.mask, self.pooled)))

    def expand(self, rows: int) -> Condition:
        """Repeat a single row."""
        return Condition(*(a.expand(rows, *a.shape[1:]) for a in (self.tokens, self.mask, self.pooled)))

    def where(self, keep: Tensor, other: Condition) -> Condition:
        """Rows of `self` where keep (B bool) is True, of `other` (B rows or one) elsewhere."""

        def pick(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (a.dim() - 1)), a, b.to(a.dtype))

        return Condition(pick(self.tokens, other.tokens), pick(self.mask, other.mask), pick(self.pooled, other.pooled))

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        return Condition(
            torch.cat([p.tokens for p in parts]),
            torch.cat([p.mask for p in parts]),
            torch.cat([p.pooled for p in parts]),
        )
