"""A causal transformer: the output at a token is a function of that token, those before it and the condition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genflow.attention import Mask, attention
from genflow.errors import UserError
from genflow.layers.modulation import MLP, QKV, Linear, gated_residual, joint_heads, modulated_norm
from genflow.registry import api_export


class KeyValueCache:
    """The keys and values of the first `length` tokens of a CausalTransformer, in room made once for all of them.

    keys, values: layers x B x heads x tokens x head_dim.
    """

    def __init__(self, layers: int, rows: int, heads: int, tokens: int, head_dim: int, like: Tensor) -> None:
        self.keys, self.values = (like.new_empty(layers, rows, heads, tokens, head_dim) for _ in range(2))
        self.length = 0
        self.mask = Mask(causal=True)  # keeps what backends make of it as long as the cache lives

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a window's k and v behind the first `length` tokens; returns those of all tokens up to its end."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`: the next window overwrites them."""
        if not 0 <= length <= self.length:
            raise UserError(f"truncate: the cache has {self.length} tokens, so it cannot keep the first {length}")
        self.length = length


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
        self.head = nn.Linear(width, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def cache(self, rows: int) -> KeyValueCache:
        """An empty cache for so many sequences."""
        weight = self.head.weight
        return KeyValueCache(len(self.blocks), rows, self.heads, self.tokens, weight.shape[1] // self.heads, weight)

    def forward(self, x: Tensor, condition: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """x: B x L x inputs; condition: B x condition_dim. Returns B x L x outputs, in float32 or wider.

        cache: then x are the L tokens after those it has, and it has them too afterwards. Not for gradients. Raises
        UserError for tokens beyond the last.
        """
        start = 0 if cache is None else cache.length
        if start + x.shape[1] > self.tokens:
            raise UserError(f"{start} tokens and {x.shape[1]} more: this transformer has positions for {self.tokens} tokens")
        x = x.to(self.embed.weight.dtype)
        h = self.embed(x)
        extra = self.positions[start : start + x.shape[1]]
        if self.condition is not None:
            assert condition is not None
            extra = extra + self.condition(condition.to(x.dtype))[:, None]
        h = h + extra.to(h.dtype)
        for i, block in enumerate(self.blocks):
            h = block(h, cache, i)
        if cache is not None:
            cache.length = start + x.shape[1]
        with torch.autocast(h.device.type, enabled=False):  # what is read off a map is not rounded to half precision
            wide = torch.promote_types(self.head.weight.dtype, torch.float32)
            return nn.functional.linear(
                self.norm(h.to(self.norm.weight.dtype)).to(wide), self.head.weight.to(wide), self.head.bias.to(wide)
            )


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

    def forward(self, x: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        m = self.modulation.to(x.dtype)[:, None, None].expand(-1, len(x), -1, -1).unbind()
        q, k, v = joint_heads([(self.qkv, modulated_norm(x, m[0], m[1]))])
        if cache is None:
            o = attention(q, k, v, CAUSAL)
        else:
            o = attention(q, *cache.extend(layer, k, v), cache.mask)
        x = gated_residual(x, m[2], self.proj, o.transpose(1, 2).flatten(2))
        return gated_residual(x, m[5], self.mlp.fc2, self.mlp.hidden(modulated_norm(x, m[3], m[4])))
