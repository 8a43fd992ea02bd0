"""A model of tokens that is a table: every sequence can be enumerated, so that decoders can be proven on it."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from genflow.ar.law import TokenLaw
from genflow.errors import UserError


class TabularModel:
    """The logits of each token given all before it. logits: for t = 0 .. n - 1, V^t x V, prefixes in the order of counting.

    null: the same without a condition, for guidance.
    """

    def __init__(self, logits: list[Tensor], null: list[Tensor] | None = None) -> None:
        self.vocabulary, self.tokens = logits[0].shape[-1], len(logits)
        for t, table in enumerate([*logits, *(null or [])]):
            wanted = (self.vocabulary ** (t % self.tokens), self.vocabulary)
            if table.shape != wanted:
                raise UserError(f"the table of token {t % self.tokens} is {tuple(table.shape)}, not {wanted}")
        self.logits, self.null = logits, null

    @classmethod
    def random(cls, vocabulary: int, tokens: int, seed: int, *, scale: float = 1.0, null: bool = False) -> TabularModel:
        """Normal logits of that scale."""
        generator = torch.Generator().manual_seed(seed)
        tables = [
            [scale * torch.randn(vocabulary**t, vocabulary, generator=generator).double() for t in range(tokens)]
            for _ in range(1 + null)
        ]
        return cls(*tables)

    def laws(self, law: TokenLaw) -> list[Tensor]:
        """The distributions that tokens are drawn from, V^t x V each."""
        return [law(table, self.null[t] if self.null else None) for t, table in enumerate(self.logits)]

    def sequences(self, law: TokenLaw) -> tuple[Tensor, Tensor]:
        """All V^n sequences in the order of counting, V^n x n, and the probability of each."""
        every = torch.tensor(list(product(range(self.vocabulary), repeat=self.tokens)))
        p, prefix = torch.ones(len(every), dtype=torch.float64), torch.zeros(len(every), dtype=torch.int64)
        for t, table in enumerate(self.laws(law)):
            p = p * table[prefix, every[:, t]]
            prefix = self.vocabulary * prefix + every[:, t]
        return every, p

    def reader(self, rows: int, law: TokenLaw | None = None) -> TabularReader:
        """A reader of so many sequences, for decoders."""
        return TabularReader(self, rows, law or TokenLaw())


class TabularReader:
    """A table with the sequences that it reads (guess.py)."""

    def __init__(self, model: TabularModel, rows: int, law: TokenLaw) -> None:
        self.vocabulary, self.tokens = model.vocabulary, model.tokens
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self._laws = torch.stack([table.repeat(len(model.logits[-1]) // len(table), 1) for table in model.laws(law)])
        self._prefix = torch.zeros(rows, 0, dtype=torch.int64)  # of each symbol read, the tokens up to it as a number
        self._base = self.lengths  # how many were kept before the last step

    @property
    def device(self) -> torch.device:
        return self._laws.device

    def step(self, symbols: Tensor, parents: Tensor | None = None) -> Tensor:
        rows, width = symbols.shape
        above = range(-1, width - 1) if parents is None else parents.tolist()
        before = self._prefix.gather(1, (self.lengths - 1).clamp(min=0)[:, None])[:, 0] if self._prefix.numel() else 0
        prefixes: list[Tensor] = []
        depth: list[int] = []
        for symbol, parent in zip(symbols.unbind(1), above, strict=True):
            prefix = before if parent < 0 else prefixes[parent]
            prefixes.append(torch.where(symbol == self.vocabulary, 0, self.vocabulary * prefix + symbol))
            depth.append(0 if parent < 0 else depth[parent] + 1)
        prefix = torch.stack(prefixes, 1)
        at = (self.lengths[:, None] + torch.tensor(depth)).clamp(max=self.tokens - 1)
        self._base = self.lengths
        self.lengths = self.lengths + width
        room = int(self.lengths.max())
        kept = torch.zeros(rows, room, dtype=torch.int64)
        kept[:, : self._prefix.shape[1]] = self._prefix[:, :room]
        self._prefix = kept.scatter(1, self._base[:, None] + torch.arange(width), prefix)
        return self._laws[at, prefix % self._laws.shape[1]]

    def truncate(self, lengths: Tensor) -> None:
        assert ((lengths >= 0) & (lengths <= self.lengths)).all()
        self.lengths = lengths.clone()

    def gather(self, path: Tensor) -> None:
        picked = self._prefix.gather(1, self._base[:, None] + path)
        self._prefix = self._prefix.scatter(1, self._base[:, None] + torch.arange(path.shape[1]), picked)
        self.lengths = self._base + path.shape[1]
