"""Encoders that are trained with the model: bytes through a small transformer, and a table of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genflow.conditions import Condition
from genflow.errors import UserError, nearest
from genflow.registry import text_export
from genflow.text.base import TextEncoder, warn_cut


@text_export("learned")
@dataclass(frozen=True)
class LearnedTextConfig:
    """UTF-8 bytes through a small transformer, trained with the model: for when there is no other encoder.

    dim, layers, heads: of the transformer; max_tokens: a start token and bytes.
    """

    dim: int = 256
    layers: int = 2
    heads: int = 4
    max_tokens: int = 32

    def build(self) -> LearnedText:
        """Raises UserError for sizes that do not fit together."""
        if self.max_tokens < 2:
            raise UserError(f"text learned: max_tokens={self.max_tokens} must be 2 or more: a start and a byte")
        for name in ("dim", "heads", "layers"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"text learned: {name} = {value} is too few; the least is 1")
        if self.dim % self.heads:
            raise UserError(f"text learned: dim={self.dim} must be a multiple of heads={self.heads}")
        return LearnedText(self)


class LearnedText(TextEncoder):
    """Prepares byte ids (0 pads, 1 begins, byte b is b + 2); its forward embeds them."""

    trainable = True

    def __init__(self, config: LearnedTextConfig) -> None:
        super().__init__()
        self.context_dim = self.pooled_dim = config.dim
        self.max_tokens = config.max_tokens
        self.bytes = nn.Embedding(258, config.dim)
        self.positions = nn.Parameter(torch.randn(config.max_tokens, config.dim) * 0.02)
        self.layers = nn.ModuleList(_Layer(config.dim, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.pool = nn.Linear(config.dim, config.dim)

    def encode(self, prompts: Sequence[str]) -> Condition:
        ids = torch.zeros(len(prompts), self.max_tokens, dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            data = prompt.encode("utf-8", errors="replace")[: self.max_tokens - 1]
            row[: len(data) + 1] = torch.tensor([1, *(b + 2 for b in data)])
        long = [p for p in prompts if len(p.encode("utf-8", errors="replace")) >= self.max_tokens]
        warn_cut(long, f"{self.max_tokens - 1} bytes")
        return Condition(ids, ids > 0, torch.zeros(len(prompts), 0))

    def keep_pooled(self) -> None:
        self.pool.requires_grad_(False)

    def forward(self, condition: Condition) -> Condition:
        x = self.bytes(condition.tokens) + self.positions
        for layer in self.layers:
            x = layer(x, condition.mask)
        x = self.norm(x) * condition.mask[..., None]
        pooled = self.pool(x.sum(1) / condition.mask.sum(1, keepdim=True))
        return Condition(x, condition.mask, pooled)


class _Layer(nn.Module):
    """Pre-norm self-attention over real tokens, then an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.proj(o.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@text_export("labels")
@dataclass(frozen=True)
class LabelsConfig:
    """Classes instead of text: one trained vector each, and one for none. A prompt is a class's name or its number."""

    classes: tuple[str, ...]
    dim: int = 256

    def build(self) -> Labels:
        """Raises UserError where classes are no distinct names."""
        if self.dim < 1:
            raise UserError(f"text labels: dim = {self.dim} is too few; the least is 1")
        if len(set(self.classes)) != len(self.classes) or not self.classes or "" in self.classes:
            raise UserError("text labels: classes must be distinct names, at least one")
        return Labels(self)


class Labels(TextEncoder):
    """Prepares class numbers (the last is no class); its forward looks them up: one token and the pooled vector."""

    trainable = True
    max_tokens = 1

    def __init__(self, config: LabelsConfig) -> None:
        super().__init__()
        self.classes = list(config.classes)
        self.context_dim = self.pooled_dim = config.dim
        self.table = nn.Embedding(len(self.classes) + 1, config.dim)

    def _number(self, prompt: str) -> int:
        if prompt == "":
            return len(self.classes)
        if prompt in self.classes:
            return self.classes.index(prompt)
        if prompt.isdecimal() and len(prompt) < 10 and int(prompt) < len(self.classes):
            return int(prompt)
        shown = prompt if len(prompt) <= 60 else prompt[:60] + "..."
        raise UserError(f"no class {shown!r}.{nearest(shown, self.classes)}")

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Raises UserError for a prompt that is no class."""
        ids = torch.tensor([[self._number(p)] for p in prompts], dtype=torch.int64).view(-1, 1)
        return Condition(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(prompts), 0))

    def forward(self, condition: Condition) -> Condition:
        tokens = self.table(condition.tokens)
        return Condition(tokens, condition.mask, tokens[:, 0])
