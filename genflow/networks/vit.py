"""A plain vision transformer on tokens (Dosovitskiy et al. 2021, arXiv 2010.11929), with pre-norm blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genflow.errors import UserError
from genflow.layers.modulation import MLP, QKV, Linear, joint_attention
from genflow.registry import api_export


@api_export("ViT")
class ViT(nn.Module):
    """Tokens in, tokens out, each attending to all, their positions learnt; the output is zero at first.

    tokens: how many there are; in_dim, out_dim: their widths outside; width: inside; heads: default one for each 64 of it.
    condition_dim: the width of a condition that is added to every token, 0 for none. Raises UserError for numbers that do
    not fit each other.
    """

    def __init__(
        self,
        tokens: int,
        in_dim: int,
        out_dim: int,
        *,
        width: int,
        depth: int,
        heads: int | None = None,
        condition_dim: int = 0,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("depth", depth), ("heads", heads)):
            if value is not None and value < 1:
                raise UserError(f"vit: {name} = {value} is too few; the least is 1")
        heads = heads or max(width // 64, 1)
        if width % heads:
            near = max(width // heads, 1) * heads
            raise UserError(f"vit: width = {width} is not a multiple of heads = {heads}; try {near}")
        self.embed = nn.Linear(in_dim, width)
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        self.condition = nn.Linear(condition_dim, width, bias=False) if condition_dim else None
        self.blocks = nn.ModuleList(Block(width, heads, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier linears without biases, N(0, 1 / width) positions, a zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions, std=self.positions.shape[-1] ** -0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x: B x tokens x in_dim; condition: B x condition_dim. Returns B x tokens x out_dim.

        Raises UserError for another number of tokens and for a condition that is missing.
        """
        if x.shape[1] != (tokens := self.positions.shape[1]):
            raise UserError(f"vit: there are {x.shape[1]} tokens, and this transformer has positions for {tokens}")
        if self.condition is not None and condition is None:
            raise UserError(f"vit: a condition is missing: this network needs B x {self.condition.in_features}")
        x = self.embed(x) + self.positions
        if self.condition is not None and condition is not None:
            x = x + self.condition(condition.to(x.dtype))[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Self-attention, then an MLP, each on the norm of the tokens and added to them."""

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = QKV(width, heads, qk_norm=False)
        self.proj = Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """x: B x L x width."""
        (heard,) = joint_attention([(self.qkv, self.attention_norm(x))], default=self.backend)
        x = x + self.proj(heard)
        return x + self.mlp.fc2(self.mlp.hidden(self.mlp_norm(x)))
