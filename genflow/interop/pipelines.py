"""Stable Diffusion 3 pipelines of diffusers as flows, and flows as pipelines."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genflow.config import from_dict
from genflow.errors import UserError
from genflow.flows.latent import LatentFlow
from genflow.flows.store import CONFIG, Recipe
from genflow.interop.checkpoints import check_velocity, open_checkpoint
from genflow.interop.convert import recipe_of, scheduler_of
from genflow.interop.diffusers import to_diffusers
from genflow.interop.layouts import TABLE
from genflow.interop.tensors import widest
from genflow.registry import api_export
from genflow.text.sd3 import FOLDERS, SD3Text


@api_export("open_pipeline")
def open_pipeline(path: str | Path, *, device: str | torch.device = "cpu") -> LatentFlow:
    """A diffusers SD3 pipeline folder as a flow of pictures, in eval mode; its text encoders are loaded at the first prompt.

    The transformer keeps the dtype of its file, of several the widest, and for one of 8 bits takes bfloat16; the
    autoencoder computes in float32. `flow.recipe` holds its configuration and how the pipeline samples: its solver, shift
    and the double-shifted grid of diffusers' scheduler, 28 steps, guidance 7. Raises UserError for another pipeline, and
    for damaged or missing files.
    """
    checkpoint = open_checkpoint(path)
    config = recipe_of(checkpoint)
    recipe = from_dict(
        Recipe, {name: config[name] for name in ("model", "flow", "text")}, where=str(Path(path) / CONFIG)
    )
    with torch.device("meta"):
        flow = recipe.flow.build(recipe.model.build(), recipe.text.build(), shape=config["shape"])
    vae = {name: tensor.read().clone() for name, tensor in checkpoint.vae.items()}
    weights = {name: tensor for name, tensor in checkpoint.transformer.items() if name != TABLE}
    dtype = widest({tensor.dtype for tensor in weights.values()})
    network = {name: tensor.read().to(dtype, copy=True) for name, tensor in weights.items()}
    if (table := checkpoint.transformer.get(TABLE)) is not None:
        flow.flow.network.position_table = table.read().clone()
    flow.flow.network.load_state_dict(network, strict=False, assign=True)
    flow.autoencoder.module.load_state_dict(vae, assign=True)
    flow.autoencoder.float()
    flow.recipe = config
    return flow.to(device).eval()


@api_export("to_pipeline")
def to_pipeline(flow: LatentFlow) -> Any:
    """A diffusers StableDiffusion3Pipeline of the same weights; its `save_pretrained` writes a folder that diffusers opens.

    Its scheduler has the flow's solver, where diffusers has it, and shift (`recipe`), applied twice as diffusers does. All
    parts are of the network's dtype, as a pipeline needs them, copies of those that have another, and on its device. It
    reads 256 tokens by T5 unless it is told max_sequence_length, which must be the flow's t5_tokens.
    Raises UserError for a flow whose text or autoencoder is not SD3's, or whose network is another or not asked as SD3's.
    """
    import diffusers

    from genflow.interop.autoencoder import KLAutoencoder

    if not isinstance(flow, LatentFlow) or not isinstance(flow.autoencoder, KLAutoencoder):
        what = type(getattr(flow, "autoencoder", flow)).__name__
        raise UserError(f"to_pipeline takes a LatentFlow in the latents of a KLAutoencoder, not a {what}")
    if not isinstance(flow.text, SD3Text):
        raise UserError(
            f"a StableDiffusion3Pipeline hears text sd3, not a {type(flow.text).__name__}; convert the parts"
        )
    transformer = to_diffusers(flow.flow.network)  # type: ignore[arg-type]
    check_velocity(flow.flow.config, "to_pipeline")
    parts: dict[str, Any] = {}
    for name, (encoder, tokenizer) in FOLDERS.items():
        loaded = flow.text.parts[name].network() if name in flow.text.parts else (None, None)
        parts[tokenizer], parts[encoder] = loaded
    parts["vae"] = flow.autoencoder.module
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            part = part if part.dtype == transformer.dtype else deepcopy(part).to(transformer.dtype)
            parts[name] = part.to(transformer.device)
    scheduler = scheduler_of(flow.recipe or {})
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=getattr(diffusers, scheduler["_class_name"])(shift=scheduler["shift"]),
        **parts,
    )
