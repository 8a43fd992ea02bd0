"""MM-DiT: the multimodal diffusion transformer of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genflow.attention import Mask
from genflow.config import Named
from genflow.errors import UserError, check_least
from genflow.layers.embeddings import MLPEmbedder, PatchEmbed, sincos_2d, sinusoidal, unpatchify
from genflow.layers.modulation import (
    MLP,
    QKV,
    Linear,
    Modulation,
    gated_residual,
    joint_attention,
    modulated_norm,
    norm_beside,
)
from genflow.native.library import untransformed
from genflow.networks.caching import FirstBlockCache
from genflow.registry import api_export, network_export

Conditioning = Tensor | tuple[Tensor, Tensor]  # c, B x hidden, or the modulation of both streams made of it


@network_export("mmdit")
@dataclass(frozen=True)
class MMDiTConfig:
    """An MM-DiT of `depth` blocks; depth d alone gives SD3's shape: hidden 64 d, d heads of 64.

    in_channels, context_dim and pooled_dim may be left out where a run's data and text encoder tell them. The position
    grid has pos_embed_max_size tokens a side (default: sample_size), of which the training picture takes sample_size
    (default: from the run's picture size).
    """

    depth: int = 6
    hidden: int | None = None
    heads: int | None = None
    mlp_ratio: int = 4
    patch_size: int = 2
    in_channels: int | None = None
    context_dim: int | None = None
    pooled_dim: int | None = None
    qk_norm: bool = True
    dual_attention_layers: tuple[int, ...] = ()
    sample_size: int | None = None
    pos_embed_max_size: int | None = None
    attention: Annotated[str, Named("attention", also=("auto",))] = "auto"

    def __post_init__(self) -> None:
        check_least(self, **{field.name: 1 for field in fields(self) if str(field.type).startswith("int")})

    @property
    def sizes(self) -> tuple[int, int]:
        """Hidden width and heads."""
        hidden = self.hidden or 64 * self.depth
        return hidden, self.heads or max(hidden // 64, 1)

    def build(self) -> MMDiT:
        """The network, freshly initialised. Raises UserError where the numbers do not fit each other."""
        return MMDiT(self)


@api_export("MMDiT")
class MMDiT(nn.Module):
    """A velocity (or picture) predictor of two token streams, picture and text, that attend to each other."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        for name in ("in_channels", "context_dim", "pooled_dim", "sample_size"):
            if getattr(config, name) is None:
                raise UserError(f"mmdit: {name} is not set, and no data set or text encoder is there to tell it")
        assert config.in_channels and config.context_dim and config.pooled_dim and config.sample_size
        hidden, heads = config.sizes
        if hidden % heads or hidden % 4:
            raise UserError(f"mmdit: hidden = {hidden} must be a multiple of 4 and of heads = {heads}")
        if wrong := [i for i in config.dual_attention_layers if not 0 <= i < config.depth]:
            raise UserError(f"mmdit: dual_attention_layers names block {wrong[0]}, but depth is {config.depth}")
        self.config = config
        self.hidden, self.heads, self.patch_size = hidden, heads, config.patch_size
        self.patch = PatchEmbed(config.in_channels, hidden, config.patch_size)
        self.time_embed = MLPEmbedder(256, hidden)
        self.pooled_embed = MLPEmbedder(config.pooled_dim, hidden)
        self.context_embed = nn.Linear(config.context_dim, hidden)
        self.blocks = nn.ModuleList(
            JointBlock(
                hidden,
                heads,
                mlp_ratio=config.mlp_ratio,
                qk_norm=config.qk_norm,
                dual=i in config.dual_attention_layers,
                context_pre_only=i == config.depth - 1,
                backend=config.attention,
            )
            for i in range(config.depth)
        )
        self.final_modulation = Modulation(hidden, 2)
        self.final = nn.Linear(hidden, config.patch_size**2 * config.in_channels)
        # A checkpoint's own table, P^2 x hidden, where it is not what sincos_2d gives; else computed.
        self.position_table: Tensor | None
        self.register_buffer("position_table", None)
        self._positions: dict[tuple, Tensor] = {}
        self.reset_parameters()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if (table := state_dict.get(prefix + "position_table")) is not None and self.position_table is None:
            self.position_table = torch.empty_like(table, device=self.final.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier linears, N(0, 0.02) embedders, zeros for every modulation and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch.weight.view(self.hidden, -1))
        for embed in (self.time_embed, self.pooled_embed):
            nn.init.normal_(embed.fc1.weight, std=0.02)
            nn.init.normal_(embed.fc2.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.weight)
        nn.init.zeros_(self.final.weight)

    def positions(self, height: int, width: int, like: Tensor) -> Tensor:
        """Positions of a height x width crop (in patches) from the middle of the grid: 1 x height*width x hidden."""
        config = self.config
        if self.position_table is not None:
            side = int(self.position_table.shape[0] ** 0.5)
            if max(height, width) > side:
                raise UserError(f"mmdit: {height} x {width} patches, but this model's position table has {side} a side")
            top, left = (side - height) // 2, (side - width) // 2
            table = self.position_table.view(side, side, -1)[top : top + height, left : left + width]
            return table.reshape(1, height * width, -1).to(like.dtype)
        assert config.sample_size is not None
        key = (height, width, like.device, like.dtype)
        if key in self._positions:
            return self._positions[key]
        table = sincos_2d(
            height, width, self.hidden, sample_size=config.sample_size, max_size=config.pos_embed_max_size
        )
        table = table[None].to(like.device, like.dtype)
        if untransformed():
            self._positions[key] = table
        return table

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, *, context_mask: Tensor | None = None
    ) -> Tensor:
        """Velocity at time t.

        x: B x C x H x W, H and W multiples of the patch size; t: B in [0, 1], 0 = data, 1 = noise; context: B x L x
        context_dim; pooled: B x pooled_dim; context_mask: B x L bool, True = attend (None, as SD3 was trained: all).
        Returns B x C x H x W. Raises UserError for a picture size that the patches do not divide.
        """
        context, pooled = self.prepare(context, pooled)
        return self.denoise(x, t, context, pooled, context_mask=context_mask)

    def prepare(self, context: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """What `denoise` takes, computed once for all steps of a solve: the context, B x L x hidden, and the pooled vector.

        context, pooled: as of the forward. The pooled vector is B x hidden.
        """
        return self.context_embed(context), self.pooled_embed(pooled)

    def modulations(self, pooled: Tensor, times: Tensor) -> Tensor:
        """The modulation of every block at each of S times, in one product each: B x S x what all of them take.

        pooled: as `prepare` gives it; times: S float32.
        """
        c = F.silu(self.time_embed(sinusoidal(times, 256).to(pooled.dtype)) + pooled[:, None])
        every = self._modulations()
        ends = list(accumulate(m.out_features for m in every))
        table = c.new_empty(*c.shape[:2], ends[-1])
        for end, modulation in zip(ends, every, strict=True):
            table[..., end - modulation.out_features : end] = modulation(c)
        return table

    def _modulations(self) -> list[Modulation]:
        blocks: Any = self.blocks
        return [m for b in blocks for m in (b.image_modulation, b.context_modulation)] + [self.final_modulation]

    def denoise(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        *,
        context_mask: Tensor | None = None,
        modulation: Tensor | None = None,
        cache: FirstBlockCache | None = None,
    ) -> Tensor:
        """Velocity at time t, of what `prepare` made of the condition; the rest as of the forward.

        modulation: B x ..., of `modulations` at this time, where it is there; then t is not looked at. cache: for sampling,
        LOSSY.
        """
        p, (height, width) = self.config.patch_size, x.shape[-2:]
        if height % p or width % p:
            near = f"{max(round(height / p), 1) * p} x {max(round(width / p), 1) * p}"
            raise UserError(f"mmdit: a picture of {height} x {width} does not divide into patches of {p}; try {near}")
        h, w = height // p, width // p
        dtype = self.final.weight.dtype
        keys = None
        if context_mask is not None:
            keys = torch.cat([context_mask.new_ones(len(x), h * w), context_mask], dim=1)

        x = self.patch(x)
        x = x + self.positions(h, w, x)
        each: Sequence[Conditioning]
        if modulation is None:
            c = F.silu(self.time_embed(sinusoidal(t, 256).to(dtype)) + pooled)
            each, last = [c] * len(self.blocks), self.final_modulation(c)
        else:
            *streams, last = modulation.split([m.out_features for m in self._modulations()], dim=-1)
            each = list(zip(streams[::2], streams[1::2], strict=True))
        if cache is None:
            x, _ = self._through(slice(None), x, context, each, keys)
        else:
            first, context = self._through(slice(1), x, context, each, keys)

            def rest(rows: Tensor | slice) -> Tensor:
                some = [c[rows] if isinstance(c, Tensor) else (c[0][rows], c[1][rows]) for c in each]
                left = None if keys is None else keys[rows]
                return self._through(slice(1, None), first[rows], context[rows], some, left)[0]

            x = cache(x, first, rest, len(self.blocks) - 1)
        shift, scale = self.final_modulation.vectors(last)
        x = self.final(modulated_norm(x, shift, scale))
        return unpatchify(x, h, w, p)

    def _through(
        self, which: slice, x: Tensor, context: Tensor, each: Sequence[Conditioning], keys: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both streams through some of the blocks. each: of all blocks; keys: B x (Lx + Lc) bool."""
        mask = None if keys is None else Mask(keys=keys)
        for block, c in zip(self.blocks[which], each[which], strict=True):
            x, context = block(x, context, c, mask)
        return x, context


class JointBlock(nn.Module):
    """One block: each stream is modulated and projected, both attend to both, each goes on through its own MLP."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        *,
        mlp_ratio: int,
        qk_norm: bool,
        dual: bool,
        context_pre_only: bool,
        backend: str,
    ) -> None:
        super().__init__()
        self.context_pre_only = context_pre_only
        self.dual = dual
        self.backend = backend
        self.image_modulation = Modulation(hidden, 9 if dual else 6)
        self.image_attention = SelfAttention(hidden, heads, qk_norm=qk_norm)
        self.image_attention2 = SelfAttention(hidden, heads, qk_norm=qk_norm) if dual else None
        self.image_mlp = MLP(hidden, mlp_ratio * hidden)
        self.context_modulation = Modulation(hidden, 2 if context_pre_only else 6)
        self.context_attention = SelfAttention(hidden, heads, qk_norm=qk_norm, project=not context_pre_only)
        self.context_mlp = None if context_pre_only else MLP(hidden, mlp_ratio * hidden)

    def forward(self, x: Tensor, context: Tensor, c: Conditioning, mask: Mask | None) -> tuple[Tensor, Tensor]:
        """x: B x Lx x hidden; context: B x Lc x hidden; mask: over Lx + Lc keys. Returns both streams.

        c: B x hidden, or what the two modulations make of it, where that is known.
        """
        packed = (self.image_modulation(c), self.context_modulation(c)) if isinstance(c, Tensor) else c
        x_mod, context_mod = self.image_modulation.vectors(packed[0]), self.context_modulation.vectors(packed[1])
        x_in, x = norm_beside(x, x_mod[0], x_mod[1])
        context_in, context = norm_beside(context, context_mod[0], context_mod[1])
        x_out, context_out = joint_attention(
            [(self.image_attention.qkv, x_in), (self.context_attention.qkv, context_in)], mask, default=self.backend
        )
        del x_in, context_in
        if self.image_attention2 is not None:
            own_in, x = norm_beside(x, x_mod[6], x_mod[7])
            (own_out,) = joint_attention([(self.image_attention2.qkv, own_in)], default=self.backend)
        x = self.image_attention.add_to(x, x_mod[2], x_out)
        if self.image_attention2 is not None:
            x = self.image_attention2.add_to(x, x_mod[8], own_out)
        del x_out
        hidden, x = norm_beside(x, x_mod[3], x_mod[4])
        hidden = self.image_mlp.hidden(hidden)
        x = gated_residual(x, x_mod[5], self.image_mlp.fc2, hidden)

        if self.context_mlp is not None:
            context = self.context_attention.add_to(context, context_mod[2], context_out)
            hidden, context = norm_beside(context, context_mod[3], context_mod[4])
            hidden = self.context_mlp.hidden(hidden)
            context = gated_residual(context, context_mod[5], self.context_mlp.fc2, hidden)
        return x, context


class SelfAttention(nn.Module):
    """The projections around one stream's attention."""

    def __init__(self, hidden: int, heads: int, *, qk_norm: bool, project: bool = True) -> None:
        super().__init__()
        self.qkv = QKV(hidden, heads, qk_norm=qk_norm)
        self.proj = Linear(hidden, hidden) if project else None

    def add_to(self, x: Tensor, gate: Tensor, o: Tensor) -> Tensor:
        """x + gate proj(o). x, o: B x L x hidden; gate: B x 1 x hidden."""
        assert self.proj is not None
        return gated_residual(x, gate, self.proj, o)
