"""SD3-family transformers between diffusers' module and genflow's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genflow.config import setting
from genflow.errors import UserError
from genflow.interop.layouts import DIFFUSERS, TABLE, from_genflow, to_genflow
from genflow.interop.tensors import Lazy
from genflow.networks.mmdit import MMDiT, MMDiTConfig
from genflow.registry import api_export


@api_export("state_from_diffusers")
def state_from_diffusers(state: Mapping[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """A genflow MMDiT state dict from an SD3Transformer2DModel's.

    Raises UserError for a tensor that is missing, left over or of another shape.
    """
    return _read(to_genflow(_lazy(state), config, DIFFUSERS))


@api_export("state_to_diffusers")
def state_to_diffusers(state: Mapping[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """The reverse of state_from_diffusers, bit for bit. Raises UserError for an MLP of another width than SD3's."""
    return _read(from_genflow(_lazy(state), config, DIFFUSERS))


def _lazy(state: Mapping[str, Tensor]) -> dict[str, Lazy]:
    return {name: Lazy.of(tensor) for name, tensor in state.items()}


def _read(tensors: Mapping[str, Lazy]) -> dict[str, Tensor]:
    return {name: tensor.read().clone() for name, tensor in tensors.items()}


@api_export("config_from_diffusers")
def config_from_diffusers(source: Mapping[str, object]) -> MMDiTConfig:
    """An MMDiTConfig from SD3Transformer2DModel's config. Raises UserError for what an MM-DiT here has not."""
    later = ("dual_attention_layers", "qk_norm", "out_channels")  # not yet in the files of 2024
    if missing := [key for key in config_to_diffusers(_ANY) if key not in source and key not in later]:
        raise UserError(f"not the config of an SD3Transformer2DModel: it has no {missing[0]}")

    def get(key: str) -> int:
        if isinstance(value := source[key], bool) or not isinstance(value, int) or value < 1:
            what = "not a whole number of 1 or more; copy it again"
            raise UserError(f"the config of the transformer has {key} = {value!r}, {what}")
        return value

    heads, head_dim = get("num_attention_heads"), get("attention_head_dim")
    if (qk_norm := source.get("qk_norm")) not in (None, "rms_norm"):
        raise UserError(f"qk_norm = {qk_norm!r} in the diffusers model; only rms_norm or none is known here")
    if get("caption_projection_dim") != heads * head_dim:
        raise UserError(f"caption_projection_dim must be heads x head_dim = {heads * head_dim}")
    if source.get("out_channels") not in (None, source["in_channels"]):
        raise UserError("out_channels differs from in_channels in the diffusers model")
    dual = setting(tuple[int, ...] | None, source, "dual_attention_layers", "the config of the transformer")
    return MMDiTConfig(
        depth=get("num_layers"),
        hidden=heads * head_dim,
        heads=heads,
        patch_size=get("patch_size"),
        in_channels=get("in_channels"),
        context_dim=get("joint_attention_dim"),
        pooled_dim=get("pooled_projection_dim"),
        qk_norm=qk_norm is not None,
        dual_attention_layers=dual or (),
        sample_size=get("sample_size") // get("patch_size"),
        pos_embed_max_size=get("pos_embed_max_size"),
    )


_ANY = MMDiTConfig(depth=1, sample_size=1)


def config_to_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    """The arguments of an SD3Transformer2DModel of the same shape: the reverse of config_from_diffusers."""
    hidden, heads = config.sizes
    assert config.sample_size is not None
    return {
        "sample_size": config.sample_size * config.patch_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "attention_head_dim": hidden // heads,
        "num_attention_heads": heads,
        "joint_attention_dim": config.context_dim,
        "caption_projection_dim": hidden,
        "pooled_projection_dim": config.pooled_dim,
        "out_channels": config.in_channels,
        "pos_embed_max_size": config.pos_embed_max_size or config.sample_size,
        "dual_attention_layers": config.dual_attention_layers,
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


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
    if TABLE in state:
        model.position_table = state.pop(TABLE)
    model.load_state_dict(state, strict=False, assign=True)
    return model.train(module.training)


@api_export("to_diffusers")
def to_diffusers(model: MMDiT) -> Any:
    """A diffusers SD3Transformer2DModel with the weights, dtype and device of a genflow MMDiT.

    Raises UserError for another network.
    """
    from diffusers import SD3Transformer2DModel

    if not isinstance(model, MMDiT):
        raise UserError(f"to_diffusers takes an MMDiT, not a {type(model).__name__}")
    state = state_to_diffusers(model.state_dict(), model.config)
    with torch.device("meta"):
        module: Any = SD3Transformer2DModel(**config_to_diffusers(model.config))
    state[DIFFUSERS.positions] = state[DIFFUSERS.positions].to(model.final.weight.device)
    module.load_state_dict(state, strict=True, assign=True)
    return module.train(model.training)
