"""The tensors of SD3's transformer under three sets of names: genflow's, diffusers' and Stability's.

reference: the state dicts of Stability-AI/sd3.5 (mmditx.py) and of diffusers' SD3Transformer2DModel. genflow fuses q, k
and v as Stability does and orders every modulation (shift, scale) as the paper does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.interop.tensors import Lazy, numbers, widest
from genflow.layers.embeddings import sincos_2d
from genflow.networks.mmdit import MMDiTConfig

TABLE = "position_table"
PICTURE = 64  # patches a side of SD3's own pictures, 1024 x 1024


@dataclass(frozen=True)
class Layout:
    """genflow's names -> those of another layout; several are one fused genflow tensor, cut into equal parts of its rows.

    outer, block: stems of names, the block's within block i of `blocks`. positions: 1 x P^2 x hidden. swaps: whether the
    final modulation, and that of the last block's context, lie as (scale, shift).
    """

    name: str
    blocks: str
    positions: str
    swaps: bool
    outer: Mapping[str, tuple[str, ...]]
    block: Mapping[str, tuple[str, ...]]

    def counterpart(self, name: str, depth: int) -> tuple[tuple[str, ...], bool]:
        """The names here of one genflow tensor, and whether its halves lie swapped."""
        stem, _, kind = name.rpartition(".")
        if kind in ("q_norm", "k_norm"):  # parameters in genflow, modules with a `weight` elsewhere
            stem, kind = name, "weight"
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", stem):
            parts = tuple(f"{self.blocks}.{match[1]}.{part}" for part in self.block[match[2]])
            last_context = match[2] == "context_modulation" and int(match[1]) == depth - 1
            return tuple(f"{part}.{kind}" for part in parts), self.swaps and last_context
        return tuple(f"{part}.{kind}" for part in self.outer[stem]), self.swaps and stem == "final_modulation"


DIFFUSERS = Layout(
    "diffusers",
    "transformer_blocks",
    "pos_embed.pos_embed",
    True,
    {
        "patch": ("pos_embed.proj",),
        "time_embed.fc1": ("time_text_embed.timestep_embedder.linear_1",),
        "time_embed.fc2": ("time_text_embed.timestep_embedder.linear_2",),
        "pooled_embed.fc1": ("time_text_embed.text_embedder.linear_1",),
        "pooled_embed.fc2": ("time_text_embed.text_embedder.linear_2",),
        "context_embed": ("context_embedder",),
        "final_modulation": ("norm_out.linear",),
        "final": ("proj_out",),
    },
    {
        "image_modulation": ("norm1.linear",),
        "image_attention.qkv.linear": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "image_attention.qkv.q_norm": ("attn.norm_q",),
        "image_attention.qkv.k_norm": ("attn.norm_k",),
        "image_attention.proj": ("attn.to_out.0",),
        "image_attention2.qkv.linear": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "image_attention2.qkv.q_norm": ("attn2.norm_q",),
        "image_attention2.qkv.k_norm": ("attn2.norm_k",),
        "image_attention2.proj": ("attn2.to_out.0",),
        "image_mlp.fc1": ("ff.net.0.proj",),
        "image_mlp.fc2": ("ff.net.2",),
        "context_modulation": ("norm1_context.linear",),
        "context_attention.qkv.linear": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "context_attention.qkv.q_norm": ("attn.norm_added_q",),
        "context_attention.qkv.k_norm": ("attn.norm_added_k",),
        "context_attention.proj": ("attn.to_add_out",),
        "context_mlp.fc1": ("ff_context.net.0.proj",),
        "context_mlp.fc2": ("ff_context.net.2",),
    },
)
STABILITY = Layout(
    "Stability's",
    "joint_blocks",
    "pos_embed",
    False,
    {
        "patch": ("x_embedder.proj",),
        "time_embed.fc1": ("t_embedder.mlp.0",),
        "time_embed.fc2": ("t_embedder.mlp.2",),
        "pooled_embed.fc1": ("y_embedder.mlp.0",),
        "pooled_embed.fc2": ("y_embedder.mlp.2",),
        "context_embed": ("context_embedder",),
        "final_modulation": ("final_layer.adaLN_modulation.1",),
        "final": ("final_layer.linear",),
    },
    {
        "image_modulation": ("x_block.adaLN_modulation.1",),
        "image_attention.qkv.linear": ("x_block.attn.qkv",),
        "image_attention.qkv.q_norm": ("x_block.attn.ln_q",),
        "image_attention.qkv.k_norm": ("x_block.attn.ln_k",),
        "image_attention.proj": ("x_block.attn.proj",),
        "image_attention2.qkv.linear": ("x_block.attn2.qkv",),
        "image_attention2.qkv.q_norm": ("x_block.attn2.ln_q",),
        "image_attention2.qkv.k_norm": ("x_block.attn2.ln_k",),
        "image_attention2.proj": ("x_block.attn2.proj",),
        "image_mlp.fc1": ("x_block.mlp.fc1",),
        "image_mlp.fc2": ("x_block.mlp.fc2",),
        "context_modulation": ("context_block.adaLN_modulation.1",),
        "context_attention.qkv.linear": ("context_block.attn.qkv",),
        "context_attention.qkv.q_norm": ("context_block.attn.ln_q",),
        "context_attention.qkv.k_norm": ("context_block.attn.ln_k",),
        "context_attention.proj": ("context_block.attn.proj",),
        "context_mlp.fc1": ("context_block.mlp.fc1",),
        "context_mlp.fc2": ("context_block.mlp.fc2",),
    },
)


def to_genflow(source: Mapping[str, Lazy], config: MMDiTConfig, layout: Layout) -> dict[str, Lazy]:
    """A genflow MMDiT's tensors from those of another layout; its position table where it is not what the formula gives.

    Raises UserError for a tensor that is missing, left over or of another shape.
    """
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in config.build().named_parameters()}
    unused = {*source} - {layout.positions}
    result: dict[str, Lazy] = {}
    for name, shape in wanted.items():
        parts, swap = layout.counterpart(name, config.depth)
        if missing := [part for part in parts if part not in source]:
            raise UserError(f"not an SD3 transformer of this configuration: it has no tensor {missing[0]}")
        fused = _cat([source[part] for part in parts])
        if fused.shape != shape:
            raise UserError(
                f"not an SD3 transformer of this configuration: {parts[0]} makes {fused.shape}, not {shape}"
            )
        result[name] = fused.map(_swap_halves) if swap else fused
        unused -= {*parts}
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise UserError(f"not an SD3 transformer of this configuration: what would {min(unused)}{more} be for?")
    if layout.positions not in source:
        raise UserError(f"not an SD3 transformer: it has no tensor {layout.positions}")
    table = source[layout.positions]
    _side(table, config.sizes[0])
    if not _is_computed(table, config):
        result[TABLE] = table.map(lambda w: w[0], table.shape[1:])
    return result


def from_genflow(state: Mapping[str, Lazy], config: MMDiTConfig, layout: Layout) -> dict[str, Lazy]:
    """The reverse of to_genflow, bit for bit. Raises UserError for what the layout cannot hold."""
    if config.mlp_ratio != 4:
        raise UserError(f"SD3's transformer has mlp_ratio 4, this model {config.mlp_ratio}")
    hidden, heads = config.sizes
    if layout is STABILITY and not hidden // 64 == heads == config.depth:
        shape = f"hidden {hidden}, heads {heads} and depth {config.depth}"
        raise UserError(
            f"Stability's layout has hidden 64 d and d heads at depth d, this model {shape}; take diffusers'"
        )
    result: dict[str, Lazy] = {}
    for name, tensor in state.items():
        if name == TABLE:
            continue
        parts, swap = layout.counterpart(name, config.depth)
        whole = tensor.map(_swap_halves) if swap else tensor
        result.update(zip(parts, _chunks(whole, len(parts)), strict=True))
    if (table := state.get(TABLE)) is None:
        side = _grid(config)
        table = Lazy((side**2, hidden), torch.float32, lambda: _computed_table(config))
    result[layout.positions] = table.map(lambda w: w[None], (1, *table.shape))
    return result


def config_from_shapes(tensors: Mapping[str, Lazy], layout: Layout) -> MMDiTConfig:
    """The configuration of a transformer from its tensors' shapes. Raises UserError where they are no SD3 transformer's.

    Heads are 64 wide where no norm of q tells. The picture is SD3's own, 64 patches a side, or the grid where that is less.
    """

    def shape(stem: str) -> tuple[int, ...]:
        parts, _ = layout.counterpart(stem, 0)
        if (tensor := tensors.get(parts[0])) is None:
            raise UserError(f"not an SD3 transformer: it has no tensor {parts[0]}")
        return tensor.shape

    blocks = numbers(tensors, rf"{layout.blocks}\.(\d+)\.")
    hidden, channels, patch, _ = shape("patch.weight")
    if blocks != list(range(len(blocks))):
        lost = next(i for i in range(len(blocks)) if i != blocks[i])
        raise UserError(f"not an SD3 transformer: block {lost} of {blocks[-1] + 1} is missing")
    if layout.positions not in tensors:
        raise UserError(f"not an SD3 transformer: it has no tensor {layout.positions}")
    q_norm = tensors.get(layout.counterpart("blocks.0.image_attention.qkv.q_norm", 0)[0][0])
    dual = [layout.counterpart(f"blocks.{i}.image_attention2.qkv.linear.weight", 0)[0][0] in tensors for i in blocks]
    side = _side(tensors[layout.positions], hidden)
    return MMDiTConfig(
        depth=len(blocks),
        hidden=hidden,
        heads=hidden // (64 if q_norm is None else q_norm.shape[0]),
        mlp_ratio=shape("blocks.0.image_mlp.fc1.weight")[0] // hidden,
        patch_size=patch,
        in_channels=channels,
        context_dim=shape("context_embed.weight")[1],
        pooled_dim=shape("pooled_embed.fc1.weight")[1],
        qk_norm=q_norm is not None,
        dual_attention_layers=tuple(i for i in blocks if dual[i]),
        sample_size=min(side, PICTURE),
        pos_embed_max_size=side,
    )


def _cat(parts: list[Lazy]) -> Lazy:
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.shape[0] for part in parts)
    shape = (rows, *parts[0].shape[1:])
    dtypes = {part.dtype for part in parts}
    dtype = widest(dtypes) if len(dtypes) > 1 else parts[0].dtype
    return Lazy(shape, dtype, lambda: torch.cat([part.read().to(dtype) for part in parts]))


def _chunks(whole: Lazy, n: int) -> list[Lazy]:
    shape = (whole.shape[0] // n, *whole.shape[1:])
    return [whole] if n == 1 else [whole.map(lambda w, i=i: w.chunk(n)[i], shape) for i in range(n)]  # type: ignore[misc]


def _swap_halves(w: Tensor) -> Tensor:
    return torch.cat(w.chunk(2)[::-1])


# ------------------------------------------------------------------------------------------------------------ positions


def _side(table: Lazy, hidden: int) -> int:
    """P of a table, 1 x P^2 x hidden. Raises UserError for what is none."""
    side = isqrt(prod(table.shape) // hidden)
    if table.shape != (1, side**2, hidden):
        raise UserError(f"not an SD3 transformer: its positions are {table.shape}, not 1 x side^2 x {hidden}")
    return side


def _grid(config: MMDiTConfig) -> int:
    side = config.pos_embed_max_size or config.sample_size
    assert side is not None
    return side


def _axes(config: MMDiTConfig) -> Tensor:
    """The halves of the table that hang on x and on y: 2 x P x hidden/2, float32."""
    side, (hidden, _) = _grid(config), config.sizes
    assert config.sample_size is not None
    how = {"sample_size": config.sample_size, "max_size": side}
    x = sincos_2d(1, side, hidden, **how)[:, : hidden // 2]
    return torch.stack([x, sincos_2d(side, 1, hidden, **how)[:, hidden // 2 :]])


def _computed_table(config: MMDiTConfig) -> Tensor:
    """The table of `sincos_2d`, P^2 x hidden, without its float64 intermediate, which at P = 384 is of 2 GB."""
    side, axes = _grid(config), _axes(config)
    rows = [axes[0].expand(side, side, -1), axes[1][:, None].expand(side, side, -1)]
    return torch.cat(rows, dim=-1).reshape(side**2, -1)


def _is_computed(table: Lazy, config: MMDiTConfig) -> bool:
    """Whether a table, 1 x P^2 x hidden, is the formula's bit for bit."""
    side, (hidden, _) = _grid(config), config.sizes
    if table.shape != (1, side**2, hidden) or table.dtype != torch.float32:
        return False
    read = table.read()
    if read.is_meta:
        return False
    axes, rows = _axes(config).to(read.device), read.view(side, side, 2, hidden // 2)
    return all(
        torch.equal(row[:, 0], axes[0]) and torch.equal(row[:, 1], y.expand(side, -1))
        for row, y in zip(rows, axes[1], strict=True)
    )
