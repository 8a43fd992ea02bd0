"""Checkpoints of the SD3 family from any layout to any other, tensor by tensor: every one keeps its dtype and its bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from genflow.config import setting, to_dict
from genflow.errors import UserError
from genflow.flows.latent import LatentFlowConfig
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.store import CONFIG, MODEL, _write_json
from genflow.interop.autoencoder import vae_from_shapes, vae_to_diffusers, vae_to_stability
from genflow.interop.checkpoints import (
    ENCODERS,
    INDEX,
    NETWORK,
    PROJECTION,
    VAE,
    Checkpoint,
    completed,
    open_checkpoint,
    read_json,
)
from genflow.interop.diffusers import config_to_diffusers
from genflow.interop.layouts import DIFFUSERS, STABILITY, from_genflow
from genflow.interop.lora import save_lora
from genflow.interop.tensors import refuse_full, write_file
from genflow.registry import api_export
from genflow.text.sd3 import FOLDERS, SD3TextConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
# The parts of a pipeline: library and class, as model_index.json names them.
PARTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
LIKE = "--like a diffusers pipeline, which has both, adds them"
# As StableDiffusion3Pipeline draws unless told otherwise.
SAMPLE: dict[str, Any] = {"sampler": "euler", "grid": "double_shifted", "shift": 3.0, "steps": 28, "guidance": 7.0}

# diffusers' schedulers of flows, and the samplers that they are on the double-shifted grid.
SCHEDULERS = {"FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchHeunDiscreteScheduler": "heun"}

Layout = Literal["genflow", "diffusers", "stability", "lora"]


@api_export("convert")
def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Layout | None = None,
    like: str | Path | None = None,
    ema: bool = True,
) -> list[str]:
    """Write a checkpoint of the SD3 family in another layout; returns what a person should know of it, in lines.

    source: as of `open_checkpoint`. out: a new folder, or a new file where `to` is stability. to: by default stability for
    a name that ends in .safetensors, diffusers for a genflow model, else genflow. like: a diffusers pipeline folder, for the
    autoencoder, text encoders, tokenizers and configurations that source has not. ema: of a genflow model, the averaged
    weights. lora: of a LoRA run its updates alone, as diffusers loads them (`save_lora`); the other layouts have them added.

    Raises UserError for a file of another family, a damaged or unsafe one, and what the layout cannot hold.
    """
    source, out = Path(source), Path(out)
    if to == "lora":
        if like is not None:
            raise UserError("--like lends what a model lacks, and updates alone lack nothing; leave it out")
        save_lora(source, out, ema=ema)
        return []
    checkpoint = open_checkpoint(source, ema=ema)
    if like is not None:
        checkpoint = completed(checkpoint, open_checkpoint(like))
    if to is None:
        to = "genflow" if checkpoint.config is None else "diffusers"
        to = "stability" if out.suffix == ".safetensors" else to
    refuse_full(out)
    if to == "stability" and out.suffix != ".safetensors":
        raise UserError(f"{out}: Stability's layout is one file; name it {out.with_suffix('.safetensors')}")
    write = {"genflow": _write_genflow, "diffusers": _write_diffusers, "stability": _write_stability}
    if to not in write:
        raise UserError(f"to = {to!r} is no layout; choose from: {', '.join(write)}, lora")
    return write[to](checkpoint, out)


def recipe_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json of a genflow model folder of this checkpoint."""
    if checkpoint.config is not None:
        return dict(checkpoint.config)
    model, autoencoder = checkpoint.model, checkpoint.autoencoder
    assert model.sample_size is not None and model.in_channels is not None
    side = model.sample_size * model.patch_size
    shape = [model.in_channels, side, side]
    flow: Any = RectifiedFlowConfig()
    if autoencoder is not None:
        factor = 2 ** (len(autoencoder.channels) - 1)
        flow, shape = LatentFlowConfig(autoencoder), [autoencoder.picture_channels, side * factor, side * factor]
    folder = checkpoint.pipeline
    there = None if folder is None else [name for name, (part, _) in FOLDERS.items() if (folder / part).is_dir()]
    used = [name for name, (part, _) in FOLDERS.items() if part in checkpoint.encoders]
    text = SD3TextConfig(
        folder=None if folder is None else str(folder.resolve()),
        encoders=None if there is None or used == there else tuple(used),  # an index may leave out what lies there
        width=model.context_dim or 0,
        pooled=model.pooled_dim or 0,
    )
    return {
        "model": to_dict(model),
        "flow": to_dict(flow),
        "text": to_dict(text),
        "sample": {**SAMPLE, **_schedule(folder)},
        "shape": shape,
    }


def _schedule(pipeline: Path | None) -> dict[str, Any]:
    """What a pipeline's scheduler says of how to sample. Raises UserError where that is not said in genflow's words."""
    path = Path() if pipeline is None else pipeline / "scheduler" / "scheduler_config.json"
    if pipeline is None or not path.exists():
        return {}
    from genflow.interop.schedulers import FOREIGN

    config = read_json(path)
    if (kind := str(config.get("_class_name"))) not in SCHEDULERS:
        raise UserError(
            f"{path}: a {kind} is no scheduler of flows that is known here; those are: {', '.join(SCHEDULERS)}"
        )
    if found := [name for name in ("use_dynamic_shifting", *FOREIGN) if config.get(name)]:
        what = f"{found[0]} = {json.dumps(config[found[0]])} has no counterpart here"
        raise UserError(f"{path}: {what}; remove it there, and set shift to a number")
    if (heard := config.get("num_train_timesteps", 1000)) != 1000:
        raise UserError(
            f"{path}: num_train_timesteps = {heard}: the model hears {heard} t, and here it would hear 1000 t"
        )
    return {"sampler": SCHEDULERS[kind], "shift": setting(float, {"shift": 1.0, **config}, "shift", str(path))}


def scheduler_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the diffusers scheduler for a model of this config.json.

    Euler's where its own solver has none, and SD3's shift where its own hangs on the picture's size.
    """
    sample = {**SAMPLE, **recipe.get("sample", {})}
    own = [kind for kind, sampler in SCHEDULERS.items() if sampler == sample["sampler"]]
    kind = own[0] if own and sample["grid"] == SAMPLE["grid"] else PARTS["scheduler"][1]
    shift = SAMPLE["shift"] if isinstance(sample["shift"], str) else sample["shift"]
    return {"_class_name": kind, "shift": float(shift)}


def _draws_otherwise(recipe: Mapping[str, Any]) -> list[str]:
    """A note where the scheduler of a pipeline (`scheduler_of`) is not how the model itself samples."""
    scheduler, sample = scheduler_of(recipe), {**SAMPLE, **recipe.get("sample", {})}
    theirs = {"sampler": SCHEDULERS[scheduler["_class_name"]], "grid": SAMPLE["grid"], "shift": scheduler["shift"]}
    if all(sample[key] == theirs[key] for key in theirs):
        return []
    own, there = (", ".join(f"{key} {which[key]}" for key in theirs) for which in (sample, theirs))
    what = f"diffusers' scheduler draws with {there}, and the model itself with {own}"
    return [f"{what}; genflow.as_scheduler has more of them"]


def _write_genflow(checkpoint: Checkpoint, out: Path) -> list[str]:
    if checkpoint.config is not None:
        raise UserError("that is a genflow model already; copy its folder, or choose --to diffusers or stability")
    notes = []
    if checkpoint.carried and checkpoint.pipeline is not None:
        _check_encoders(checkpoint)
        _write_encoders(checkpoint, out / "text")
        if (checkpoint.pipeline / "scheduler").is_dir():
            shutil.copytree(checkpoint.pipeline / "scheduler", out / "text" / "scheduler")
        checkpoint = replace(checkpoint, pipeline=out / "text")
    inner = "flow.network." if checkpoint.autoencoder else "network."
    tensors = {f"{inner}{name}": tensor for name, tensor in checkpoint.transformer.items()}
    tensors |= {f"autoencoder.module.{name}": tensor for name, tensor in checkpoint.vae.items()}
    write_file(out / MODEL, tensors)
    _write_json(out / CONFIG, recipe_of(checkpoint))
    if checkpoint.autoencoder is None:
        notes.append("it holds no autoencoder, so that the model makes latents; --like a diffusers pipeline adds one")
    if checkpoint.pipeline is None:
        notes.append(f"no text encoders: without tokenizers none can be used; {LIKE}")
    else:
        notes.append(f"its text encoders are those of {checkpoint.pipeline.resolve()}, which must stay there")
    return notes


def _write_diffusers(checkpoint: Checkpoint, out: Path) -> list[str]:
    whole = checkpoint.autoencoder is not None
    if whole and checkpoint.pipeline is not None:
        _check_encoders(checkpoint)  # before anything is written
    transformer = out / "transformer" if whole else out
    write_file(
        transformer / WEIGHTS, from_genflow(checkpoint.transformer, checkpoint.model, DIFFUSERS), {"format": "pt"}
    )
    config = config_to_diffusers(checkpoint.model)
    _write_json(transformer / CONFIG, {"_class_name": "SD3Transformer2DModel", **config})
    if checkpoint.autoencoder is None:
        return [f"{_without_autoencoder(checkpoint)}, so that this is the folder of a transformer, not of a pipeline"]
    write_file(out / "vae" / WEIGHTS, checkpoint.vae, {"format": "pt"})
    _write_json(out / "vae" / CONFIG, {"_class_name": "AutoencoderKL", **vae_to_diffusers(checkpoint.autoencoder)})
    if checkpoint.pipeline is None:
        return [f"no text encoders: without tokenizers none can be used; {LIKE}"]
    _write_encoders(checkpoint, out)
    notes = []
    theirs = read_json(path) if (path := checkpoint.pipeline / INDEX).exists() else {}
    known = {name: kind for name in PARTS if (kind := theirs.get(name)) not in (None, [None, None])}
    if checkpoint.config is None and (checkpoint.pipeline / "scheduler").is_dir():
        shutil.copytree(checkpoint.pipeline / "scheduler", out / "scheduler", dirs_exist_ok=True)
    else:
        scheduler = scheduler_of(recipe := recipe_of(checkpoint))
        notes += _draws_otherwise(recipe)
        (out / "scheduler").mkdir(parents=True, exist_ok=True)
        _write_json(out / "scheduler" / "scheduler_config.json", scheduler)
        known["scheduler"] = ["diffusers", scheduler["_class_name"]]
    index = {name: known.get(name, kind) if (out / name).is_dir() else [None, None] for name, kind in PARTS.items()}
    _write_json(out / INDEX, {"_class_name": "StableDiffusion3Pipeline", **index})
    tokens = (checkpoint.config or {}).get("text", {}).get("t5_tokens", SD3TextConfig.t5_tokens)
    if "text_encoder_3" in checkpoint.encoders and tokens != SD3TextConfig.t5_tokens:
        told = f"T5 reads {tokens} tokens of a prompt; draw with max_sequence_length={tokens}"
        notes.append(f"{told}, or the pictures are others")
    return notes


def _without_autoencoder(checkpoint: Checkpoint) -> str:
    if checkpoint.foreign:
        return f"its autoencoder, a {checkpoint.foreign}, has no place in this layout"
    return "it holds no autoencoder"


def _tokenizer(name: str) -> str:
    """The folder beside a text encoder's."""
    return name.replace("text_encoder", "tokenizer")


def _check_encoders(checkpoint: Checkpoint) -> None:
    """Raises UserError where a text encoder's configuration or tokenizer is not there."""
    for name in checkpoint.encoders:
        home = checkpoint.homes[name]
        if not (home / name / CONFIG).is_file() or not (home / _tokenizer(name)).is_dir():
            raise UserError(f"{home} has no {name} with a {_tokenizer(name)}; give --like a pipeline that has them")


def _write_encoders(checkpoint: Checkpoint, out: Path) -> None:
    """The text encoders as folders of a pipeline, with the configurations and tokenizers of those that are known."""
    for name, tensors in checkpoint.encoders.items():
        home, tokenizer = checkpoint.homes[name], _tokenizer(name)
        write_file(out / name / MODEL, tensors, {"format": "pt"})
        shutil.copyfile(home / name / CONFIG, out / name / CONFIG)
        shutil.copytree(home / tokenizer, out / tokenizer, dirs_exist_ok=True)


def _write_stability(checkpoint: Checkpoint, out: Path) -> list[str]:
    network = from_genflow(checkpoint.transformer, checkpoint.model, STABILITY)
    tensors = {f"{NETWORK}{name}": tensor for name, tensor in network.items()}
    if checkpoint.autoencoder is not None:
        vae = vae_to_stability(checkpoint.vae, checkpoint.autoencoder)
        if (told := vae_from_shapes(vae)) != checkpoint.autoencoder:
            own, theirs = to_dict(checkpoint.autoencoder), to_dict(told)
            odd = next(name for name in own if own[name] != theirs[name])
            what = f"{odd} {theirs[odd]}, as SD3's, and this one has {own[odd]}"
            raise UserError(f"the autoencoder of a file of Stability's layout has {what}; take diffusers'")
        tensors |= {f"{VAE}{name}": tensor for name, tensor in vae.items()}
    for folder, prefix in ENCODERS.items():
        encoder = checkpoint.encoders.get(folder, {})
        tensors |= {f"{prefix}{name}": tensor for name, tensor in encoder.items()}
    identity = f"{ENCODERS['text_encoder']}{PROJECTION}"
    if identity in tensors and torch.equal(w := tensors[identity].read(), torch.eye(len(w), dtype=w.dtype)):
        del tensors[identity]
    write_file(out, tensors, {"format": "pt"})
    return [] if checkpoint.autoencoder else [f"{_without_autoencoder(checkpoint)}: the file makes latents"]
