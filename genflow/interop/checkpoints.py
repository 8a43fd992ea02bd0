"""Checkpoints of the SD3 family as they lie on the disk, opened without reading them.

A diffusers pipeline folder or the folder of its transformer, sharded or not; a file of Stability's names
(`model.diffusion_model.`, `first_stage_model.`, `text_encoders.`); a genflow run or model folder.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genflow.config import from_dict, setting, to_dict
from genflow.errors import UserError
from genflow.flows.latent import LatentFlowConfig
from genflow.flows.lora import factors_of, is_factor, lora_scale
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.store import CONFIG, EMA, MODEL, Recipe, _plain, check_base, find_model, read_config
from genflow.flows.trained import Parts, TrainedAutoencoderConfig
from genflow.interop.autoencoder import (
    KLAutoencoderConfig,
    KLNetworkConfig,
    check_vae,
    vae_from_diffusers,
    vae_from_shapes,
    vae_from_stability,
)
from genflow.interop.diffusers import config_from_diffusers
from genflow.interop.families import looks_like
from genflow.interop.layouts import DIFFUSERS, STABILITY, config_from_shapes, to_genflow
from genflow.interop.tensors import Lazy, read_file, read_folder, strip
from genflow.networks.bottlenecks import GaussianConfig
from genflow.networks.mmdit import MMDiTConfig
from genflow.text.sd3 import FOLDERS

INDEX = "model_index.json"
NETWORK, VAE = "model.diffusion_model.", "first_stage_model."
# Folders of a pipeline -> the prefixes of Stability's files.
ENCODERS = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale")  # of ComfyUI's 8 bits; without them the weights are others
PROJECTION, FINAL_NORM = "text_projection.weight", "text_model.final_layer_norm.weight"


@dataclass(frozen=True)
class Checkpoint:
    """What a model's files hold, read as it is asked for.

    transformer: under genflow's names; vae: under diffusers', with its configuration, where there is one; encoders: under
    transformers', by their folder in a pipeline; homes: by the same folders, the pipeline that has their configuration and
    tokenizer; pipeline: the folder of the scheduler, and of all text encoders but where some are carried along, from a file
    of Stability's or another pipeline (carried). config: of a genflow model folder, its own. foreign: what the autoencoder
    of a genflow model is, where the other layouts have none such.
    """

    model: MMDiTConfig
    transformer: Mapping[str, Lazy]
    vae: Mapping[str, Lazy] = field(default_factory=dict)
    autoencoder: KLAutoencoderConfig | None = None
    encoders: Mapping[str, Mapping[str, Lazy]] = field(default_factory=dict)
    homes: Mapping[str, Path] = field(default_factory=dict)
    pipeline: Path | None = None
    carried: bool = False
    config: Mapping[str, Any] | None = None
    foreign: str | None = None


def open_checkpoint(path: str | Path, *, ema: bool = True) -> Checkpoint:
    """A checkpoint of any layout. Raises UserError for what is none of the SD3 family, saying what it looks like."""
    path = Path(path)
    try:
        if path.is_file():
            return _open_file(path)
        if (path / INDEX).exists():
            return _open_pipeline(path)
        if path.is_dir() and not (path / "checkpoints").is_dir() and not (path / MODEL).exists():
            return _open_transformer(path)
        return _open_genflow(path, ema)
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError, with the file's name."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy the whole folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: not a JSON object; copy it again")
    return content


def _open_file(path: Path) -> Checkpoint:
    everything = read_file(path)
    prefixed = strip(everything, NETWORK)
    bare = prefixed or everything
    if f"{STABILITY.blocks}.0.x_block.attn.qkv.weight" in bare:
        network = {k: v for k, v in bare.items() if not k.startswith((VAE, *ENCODERS.values()))}
        if scales := [name for name in everything if name.endswith(SCALES)]:
            raise UserError(f"{path} is quantised, with scales of its own ({scales[0]}); take a file without")
        model = config_from_shapes(network, STABILITY)
        known = (NETWORK, VAE, *ENCODERS.values())
        if prefixed and (rest := [name for name in everything if not name.startswith(known)]):
            warnings.warn(
                f"{path}: {len(rest)} tensors belong to no part of SD3 and are left out: {rest[0]}", stacklevel=4
            )
        vae = strip(everything, VAE)
        autoencoder = vae_from_shapes(vae) if vae else None
        encoders = {name: tensors for name, prefix in ENCODERS.items() if (tensors := strip(everything, prefix))}
        clip = encoders.get("text_encoder", {})
        if FINAL_NORM in clip and PROJECTION not in clip:  # SD3's CLIP-L projects nothing
            width, dtype = clip[FINAL_NORM].shape[0], clip[FINAL_NORM].dtype
            clip[PROJECTION] = Lazy((width, width), dtype, lambda: torch.eye(width, dtype=dtype))
        return Checkpoint(
            model,
            to_genflow(network, model, STABILITY),
            vae=vae_from_stability(vae, autoencoder) if autoencoder else {},
            autoencoder=autoencoder,
            encoders=encoders,
            carried=bool(encoders),
        )
    return _transformer(everything, None)


def _transformer(tensors: Mapping[str, Lazy], config: Mapping[str, Any] | None) -> Checkpoint:
    """A transformer under diffusers' names. config: its config.json's content; without, its shapes tell."""
    if f"{DIFFUSERS.blocks}.0.attn.add_q_proj.weight" not in tensors or DIFFUSERS.positions not in tensors:
        raise UserError(f"no transformer of the SD3 family; {looks_like(tensors)}")
    model = config_from_shapes(tensors, DIFFUSERS) if config is None else config_from_diffusers(config)
    return Checkpoint(model, to_genflow(tensors, model, DIFFUSERS))


def _open_transformer(folder: Path) -> Checkpoint:
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else None
    kind = (config or {}).get("_class_name", "SD3Transformer2DModel")
    if kind != "SD3Transformer2DModel":
        raise UserError(f"{folder} holds a {kind}, not an SD3Transformer2DModel")
    return _transformer(read_folder(folder), config)


def _open_pipeline(folder: Path) -> Checkpoint:
    index = read_json(folder / INDEX)
    kind = str(index.get("_class_name"))
    if not kind.startswith("StableDiffusion3"):
        raise UserError(f"{folder} is a {kind} of diffusers; only those of Stable Diffusion 3 are known here")
    checkpoint = _open_transformer(folder / "transformer")
    autoencoder = vae_from_diffusers(read_json(folder / "vae" / CONFIG))
    _check_channels(checkpoint.model, autoencoder)
    check_vae(vae := read_folder(folder / "vae"), autoencoder)
    kinds = {name: setting(list[Any] | None, index, name, str(folder / INDEX)) or [None] for name in ENCODERS}
    there = [name for name, kind in kinds.items() if kind[0] is not None]
    return replace(
        checkpoint,
        vae=vae,
        autoencoder=autoencoder,
        encoders={name: read_folder(folder / name) for name in there},
        homes=dict.fromkeys(there, folder),
        pipeline=folder,
    )


def _open_genflow(path: Path, ema: bool) -> Checkpoint:
    folder = find_model(path)
    config = read_config(folder)
    recipe = from_dict(Recipe, {name: config[name] for name in ("model", "flow", "text")}, where=str(folder / CONFIG))
    if not isinstance(recipe.model, MMDiTConfig):
        more = ", and genflow.autoencoder_to_diffusers makes an autoencoder diffusers'"
        more *= isinstance(recipe.model, KLNetworkConfig)
        raise UserError(f"{folder} holds a {config['model'].get('name')}; only an mmdit has SD3's layout{more}")
    tensors = _genflow_weights(folder, config, ema)
    latent = isinstance(recipe.flow, LatentFlowConfig)
    check_velocity(recipe.flow.flow if latent else recipe.flow, folder)
    autoencoder, vae, foreign = _autoencoder(recipe.flow.autoencoder, tensors) if latent else (None, {}, None)
    pipeline, there = _text_folder(recipe.text)
    return Checkpoint(
        recipe.model,
        strip(tensors, "flow.network." if latent else "network."),
        vae=vae,
        autoencoder=autoencoder,
        encoders={name: read_folder(home / name) for name, home in there.items()},
        homes=there,
        pipeline=pipeline,
        config=config,
        foreign=foreign,
    )


def _text_folder(text: Any) -> tuple[Path | None, dict[str, Path]]:
    """The pipeline whose text encoders a genflow model hears, where it is there, and those that it hears."""
    if getattr(text, "folder", None) is None or not (folder := Path(text.folder).expanduser()).is_dir():
        return None, {}
    heard = [part for name, (part, _) in FOLDERS.items() if name in (text.encoders or FOLDERS)]
    return folder, {part: folder for part in heard if (folder / part).is_dir()}


def _autoencoder(
    config: Any, tensors: Mapping[str, Lazy]
) -> tuple[KLAutoencoderConfig | None, dict[str, Lazy], str | None]:
    """A latent flow's autoencoder under diffusers' names; or, where diffusers has none such, what it is."""
    if isinstance(config, KLAutoencoderConfig):
        return config, strip(tensors, "autoencoder.module."), None
    if not isinstance(config, TrainedAutoencoderConfig):
        return None, {}, type(config).__name__
    parts = from_dict(Parts, config.resolved().recipe, where=f"recipe of {config.run}")
    if not (isinstance(parts.model, KLNetworkConfig) and isinstance(parts.bottleneck, GaussianConfig)):
        return None, {}, config.resolved().recipe["model"]["name"]
    bottleneck = parts.bottleneck.build()
    bottleneck.running.copy_(tensors["autoencoder.bottleneck.running"].read())
    kl = parts.model.autoencoder(scale=float(bottleneck.scale), shift=float(bottleneck.shift))
    return kl, strip(tensors, "autoencoder.network.module."), None


def _genflow_weights(folder: Path, config: Mapping[str, Any], ema: bool) -> dict[str, Lazy]:
    """The tensors of a genflow model folder; of a LoRA run those of its `init`, updated when they are read."""
    tensors = {_plain(key): tensor for key, tensor in read_file(folder / MODEL).items()}
    if ema and (folder / EMA).exists():
        tensors |= {_plain(key): tensor for key, tensor in read_file(folder / EMA).items()}
    if (scale := lora_scale(config)) is None:
        return tensors
    base = check_base(folder)
    weights = _genflow_weights(base, read_config(base), True)
    factors = factors_of({name: tensor.read() for name, tensor in tensors.items() if is_factor(name)}, scale, folder)
    if strange := factors.keys() - weights.keys():
        raise UserError(f"{folder}: its update of {min(strange)} is of nothing that {base} has")
    updated = {name: weights[name].map(partial(_updated, *pair)) for name, pair in factors.items()}
    return {**weights, **updated}


def _updated(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight.float() + b @ a).to(weight.dtype)


def check_velocity(flow: Any, where: str | Path) -> None:
    """Raises UserError for a flow, by its config, whose network is not asked as SD3's is."""
    plain = RectifiedFlowConfig()
    for name in ("prediction", "path", "whiten", "text_mask"):
        if (own := getattr(flow, name, None)) != (theirs := getattr(plain, name)):
            what = f"{name} {to_dict(own)}, where SD3's has {to_dict(theirs)}"
            raise UserError(f"{where}: its flow has {what}; another program would draw something else with it")


def completed(checkpoint: Checkpoint, like: Checkpoint) -> Checkpoint:
    """A checkpoint with what it lacks from another. Raises UserError where their channels or widths differ."""
    if like.pipeline is None:
        raise UserError("--like must be the folder of a diffusers pipeline, which has text encoders and tokenizers")
    if checkpoint.foreign:
        raise UserError(
            f"its latents are those of its own {checkpoint.foreign}, which no pipeline of diffusers has, and another "
            "autoencoder would not read them; leave --like out, and the transformer alone is written"
        )
    if like.model.context_dim != checkpoint.model.context_dim or like.model.pooled_dim != checkpoint.model.pooled_dim:
        raise UserError(f"the text encoders of {like.pipeline} are of other widths than this transformer hears")
    vae = checkpoint if checkpoint.autoencoder else like
    assert vae.autoencoder is not None
    _check_channels(checkpoint.model, vae.autoencoder)
    return replace(
        checkpoint,
        vae=vae.vae,
        autoencoder=vae.autoencoder,
        encoders={**like.encoders, **checkpoint.encoders},
        homes={**dict.fromkeys(ENCODERS, like.pipeline), **checkpoint.homes},
        pipeline=checkpoint.pipeline or like.pipeline,
        carried=checkpoint.carried or bool(checkpoint.pipeline and like.encoders.keys() - checkpoint.encoders.keys()),
    )


def _check_channels(model: MMDiTConfig, autoencoder: KLAutoencoderConfig) -> None:
    if model.in_channels != autoencoder.latent_channels:
        what = f"latents of {model.in_channels} channels, the autoencoder makes {autoencoder.latent_channels}"
        raise UserError(f"the transformer takes {what}; they do not belong together")
