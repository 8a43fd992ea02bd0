"""SD3-family transformers between diffusers' layout and genflow's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.layers.embeddings import sincos_2d
from genflow.networks.mmdit import MMDiT, MMDiTConfig
from genflow.registry import api_export

# genflow's name -> diffusers'. A tuple is one fused genflow tensor, cut into equal parts along its rows. `SWAP` marks the
# two layers that diffusers stores as (scale, shift) where SD3, and genflow, have (shift, scale).
SWAP = "swap"
OUTER: dict[str, str | tuple[str, ...]] = {
    "patch": "pos_embed.proj",
    "time_embed.fc1": "time_text_embed.timestep_embedder.linear_1",
    "time_embed.fc2": "time_text_embed.timestep_embedder.linear_2",
    "pooled_embed.fc1": "time_text_embed.text_embedder.linear_1",
    "pooled_embed.fc2": "time_text_embed.text_embedder.linear_2",
    "context_embed": "context_embedder",
    "final_modulation": (SWAP, "norm_out.linear"),
    "final": "proj_out",
}
BLOCK: dict[str, str | tuple[str, ...]] = {
    "image_modulation": "norm1.linear",
    "image_attention.qkv.linear": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "image_attention.qkv.q_norm": "attn.norm_q",
    "image_attention.qkv.k_norm": "attn.norm_k",
    "image_attention.proj": "attn.to_out.0",
    "image_attention2.qkv.linear": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "image_attention2.qkv.q_norm": "attn2.norm_q",
    "image_attention2.qkv.k_norm": "attn2.norm_k",
    "image_attention2.proj": "attn2.to_out.0",
    "image_mlp.fc1": "ff.net.0.proj",
    "image_mlp.fc2": "ff.net.2",
    "context_modulation": "norm1_context.linear",
    "context_attention.qkv.linear": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_attention.qkv.q_norm": "attn.norm_added_q",
    "context_attention.qkv.k_norm": "attn.norm_added_k",
    "context_attention.proj": "attn.to_add_out",
    "context_mlp.fc1": "ff_context.net.0.proj",
    "context_mlp.fc2": "ff_context.net.2",
}
POSITIONS = "pos_embed.pos_embed"


def _counterpart(name: str, depth: int) -> tuple[tuple[str, ...], bool]:
    """diffusers' names of one genflow tensor, and whether its halves are swapped."""
    stem, _, kind = name.rpartition(".")
    if kind in ("q_norm", "k_norm"):  # parameters here, modules with a `weight` there
        stem, kind = name, "weight"
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    target = BLOCK[match[2]] if match else OUTER[stem]
    parts = (target,) if isinstance(target, str) else target
    swap = parts[0] == SWAP
    if match:
        # The last block's context is normed and projected only: its two modulation vectors are stored swapped.
        swap = match[2] == "context_modulation" and int(match[1]) == depth - 1
        parts = tuple(f"transformer_blocks.{match[1]}.{part}" for part in parts)
    elif swap:
        parts = parts[1:]
    return tuple(f"{part}.{kind}" for part in parts), swap


def _swap_halves(w: Tensor) -> Tensor:
    return torch.cat(w.chunk(2)[::-1])


@api_export("state_from_diffusers")
def state_from_diffusers(state: Mapping[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """A genflow MMDiT state dict from an SD3Transformer2DModel's. Raises UserError for a tensor that is missing."""
    with torch.device("meta"):
        names = [name for name, _ in config.build().named_parameters()]
    result: dict[str, Tensor] = {}
    for name in names:
        parts, swap = _counterpart(name, config.depth)
        if missing := [part for part in parts if part not in state]:
            raise UserError(f"not an SD3 transformer of this configuration: it has no tensor {missing[0]}")
        w = torch.cat([state[part] for part in parts]) if len(parts) > 1 else state[parts[0]]
        result[name] = _swap_halves(w) if swap else w.clone()
    if not _is_computed(state[POSITIONS], config):
        result["position_table"] = state[POSITIONS][0].clone()
    return result


@api_export("state_to_diffusers")
def state_to_diffusers(state: Mapping[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """The reverse of state_from_diffusers, bit for bit."""
    result = {}
    for name, w in state.items():
        if name == "position_table":
            continue
        parts, swap = _counterpart(name, config.depth)
        pieces = (_swap_halves(w) if swap else w).chunk(len(parts))
        result.update({part: piece.clone() for part, piece in zip(parts, pieces, strict=True)})
    table = state.get("position_table")
    table = _computed_table(config) if table is None else table
    result[POSITIONS] = table[None].clone()
    return result


def _computed_table(config: MMDiTConfig) -> Tensor:
    side = config.pos_embed_max_size or config.sample_size
    hidden = config.hidden or 64 * config.depth
    assert side is not None and config.sample_size is not None
    return sincos_2d(side, side, hidden, sample_size=config.sample_size, max_size=side)


def _is_computed(table: Tensor, config: MMDiTConfig) -> bool:
    return isqrt(table.shape[1]) == (config.pos_embed_max_size or config.sample_size) and torch.equal(
        table[0].float(), _computed_table(config).to(table.device)
    )


@api_export("config_from_diffusers")
def config_from_diffusers(source: Mapping[str, object]) -> MMDiTConfig:
    """An MMDiTConfig from SD3Transformer2DModel's config. Raises UserError for what an MM-DiT here has not."""
    get: Callable[[str], int] = lambda key: int(source[key])  # type: ignore[call-overload]
    heads, head_dim = get("num_attention_heads"), get("attention_head_dim")
    if source["qk_norm"] not in (None, "rms_norm"):
        raise UserError(f"qk_norm = {source['qk_norm']!r} in the diffusers model; only rms_norm or none is known here")
    if get("caption_projection_dim") != heads * head_dim:
        raise UserError(f"caption_projection_dim must be heads x head_dim = {heads * head_dim}")
    if source["out_channels"] not in (None, source["in_channels"]):
        raise UserError("out_channels differs from in_channels in the diffusers model")
    return MMDiTConfig(
        depth=get("num_layers"),
        hidden=heads * head_dim,
        heads=heads,
        patch_size=get("patch_size"),
        in_channels=get("in_channels"),
        context_dim=get("joint_attention_dim"),
        pooled_dim=get("pooled_projection_dim"),
        qk_norm=source["qk_norm"] is not None,
        dual_attention_layers=tuple(source.get("dual_attention_layers") or ()),  # type: ignore[arg-type]
        sample_size=get("sample_size") // get("patch_size"),
        pos_embed_max_size=get("pos_embed_max_size"),
    )


@api_export("from_diffusers")
def from_diffusers(module: Any) -> MMDiT:
    """A genflow MMDiT with the weights, dtype and device of a diffusers SD3Transformer2DModel.

    Its position table is kept where it is not what the paper's formula gives. Raises UserError for another module and
    for an unknown layout.
    """
    if getattr(module, "config", None) is None or "caption_projection_dim" not in module.config:
        raise UserError(f"from_diffusers takes a diffusers SD3Transformer2DModel, not a {type(module).__name__}")
    config = config_from_diffusers(module.config)
    state = state_from_diffusers(module.state_dict(), config)
    with torch.device("meta"):
        model = config.build()
    if "position_table" in state:
        model.position_table = state.pop("position_table")
    model.load_state_dict(state, strict=False, assign=True)
    return model.train(module.training)


@api_export("to_diffusers")
def to_diffusers(model: MMDiT) -> Any:
    """A diffusers SD3Transformer2DModel with the weights, dtype and device of a genflow MMDiT."""
    from diffusers import SD3Transformer2DModel

    config = model.config
    if config.mlp_ratio != 4:
        raise UserError(f"diffusers' SD3Transformer2DModel has mlp_ratio 4, this model {config.mlp_ratio}")
    assert config.sample_size is not None
    with torch.device("meta"):
        module: Any = SD3Transformer2DModel(
            sample_size=config.sample_size * config.patch_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            num_layers=config.depth,
            attention_head_dim=model.hidden // model.heads,
            num_attention_heads=model.heads,
            joint_attention_dim=config.context_dim,
            caption_projection_dim=model.hidden,
            pooled_projection_dim=config.pooled_dim,
            out_channels=config.in_channels,
            pos_embed_max_size=config.pos_embed_max_size or config.sample_size,
            dual_attention_layers=config.dual_attention_layers,
            qk_norm="rms_norm" if config.qk_norm else None,
        )
    state = state_to_diffusers(model.state_dict(), config)
    state[POSITIONS] = state[POSITIONS].to(model.final.weight.device)
    module.load_state_dict(state, strict=True, assign=True)
    return module.train(model.training)
