"""A causal transformer: the output at a token is a function of that token, those before it and the condition."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genflow.attention import Mask, attention
from genflow.errors import UserError
from genflow.functional import wide
from genflow.layers.modulation import EPS, MLP, QKV, Linear, gated_residual, joint_attention, norm_beside
from genflow.networks.cache import KeyValueCache
from genflow.registry import api_export


@api_export("CausalTransformer")
class CausalTransformer(nn.Module):
    """A pre-norm transformer over `tokens` tokens of `inputs` numbers, `outputs` numbers for each; at first all zero.

    Positions are learned; the condition is added to every token. heads: by default one for each 64 of the width. Raises
    UserError for a width that the heads do not divide.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        tokens: int,
        *,
        condition_dim: int = 0,
        width: int = 128,
        layers: int = 2,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        heads = max(width // 64, 1) if heads is None else heads
        if min(width, layers, heads) < 1:
            raise UserError(f"width = {width}, layers = {layers}, heads = {heads}: the least of each is 1")
        if width % heads:
            raise UserError(f"width = {width} is not a multiple of heads = {heads}")
        self.tokens, self.heads = tokens, heads
        self.embed = nn.Linear(inputs, width)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.condition = nn.Linear(condition_dim, width) if condition_dim else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = WideLinear(width, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def cache(self, rows: int) -> KeyValueCache:
        """An empty cache for so many sequences."""
        weight = self.head.weight
        return KeyValueCache(len(self.blocks), rows, self.heads, self.tokens, weight.shape[1] // self.heads, weight)

    def forward(self, x: Tensor, condition: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """x: B x L x inputs; condition: B x condition_dim. Returns B x L x outputs, in float32 or wider.

        cache: then x are the L tokens after those it has, and it has them too afterwards. Not for gradients. Raises
        UserError for tokens beyond the last and for a condition that is missing.
        """
        before, new = 0 if cache is None else cache.length, x.shape[1]
        if before + new > self.tokens:
            raise UserError(f"{before} tokens and {new} more: this transformer has positions for {self.tokens} tokens")
        if self.condition is not None and condition is None:
            raise UserError(f"a condition is missing: this network needs B x {self.condition.in_features}")
        x = x.to(self.embed.weight.dtype)
        h = self.embed(x)
        start = 0 if cache is None else cache.open(new)
        extra = self.positions[slice(start, start + new) if isinstance(start, int) else start]
        if self.condition is not None and condition is not None:
            extra = extra + self.condition(condition.to(x.dtype))[:, None]
        h = h + extra.to(h.dtype)
        for i, block in enumerate(cast(Iterable[Block], self.blocks)):
            h = block(h) if cache is None else block.extend(h, cache, i)
        with torch.autocast(h.device.type, enabled=False):
            return self.head(self.norm(h.to(self.norm.weight.dtype)))


class WideLinear(nn.Linear):
    """A linear layer in float32 or wider: what is read off a map is not rounded to half precision."""

    def forward(self, x: Tensor) -> Tensor:
        weight = wide(self.weight)
        return F.linear(x.to(weight.dtype), weight, wide(self.bias))


CAUSAL = Mask(causal=True)


class Block(nn.Module):
    """x + g1 attention(norm(x)), then x + g2 MLP(norm(x)), with a learned scale and shift of each norm and gates g."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = QKV(width, heads, qk_norm=False)
        self.proj = Linear(width, width)
        self.mlp = MLP(width, 4 * width)
        table = torch.zeros(6, width)
        table[2::3] = 1
        self.modulation = nn.Parameter(table)  # shift, scale, gate; twice

    def forward(self, x: Tensor) -> Tensor:
        """x: B x L x width, and so the result."""
        m = self.modulation.to(x.dtype)[:, None, None].expand(-1, len(x), -1, -1).unbind()
        normed, x = norm_beside(x, m[0], m[1])
        (o,) = joint_attention([(self.qkv, normed)], CAUSAL)
        normed, x = norm_beside(gated_residual(x, m[2], self.proj, o), m[3], m[4])
        return gated_residual(x, m[5], self.mlp.fc2, self.mlp.hidden(normed))

    def extend(self, x: Tensor, cache: KeyValueCache, layer: int) -> Tensor:
        """The same for the L tokens after those in the cache, in few calls, since for one token these are the cost."""
        m = self.modulation.unbind()
        kv = self.qkv.linear(_norm(x, m[0], m[1])).unflatten(-1, (3, self.qkv.heads, -1)).permute(2, 0, 3, 1, 4)
        o = attention(kv[0].to(cache.tensor.dtype), *cache.extend(layer, kv[1:]), cache.mask)
        x = torch.addcmul(x, m[2], self.proj(o.transpose(1, 2).flatten(2)))
        inner = F.gelu(self.mlp.fc1(_norm(x, m[3], m[4])), approximate="tanh")
        return torch.addcmul(x, m[5], self.mlp.fc2(inner))


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], 1 + scale, shift, EPS)
