"""LoRA of SD3-family transformers in diffusers' format, which ComfyUI and others read too."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.flows.base import Flow
from genflow.flows.latent import LatentFlow
from genflow.flows.lora import Factors, factors_of, lora_scale, merge
from genflow.flows.store import EMA, MODEL, _read_tensors, find_model, read_config
from genflow.interop.layouts import DIFFUSERS
from genflow.interop.tensors import Lazy, read_file, write_file
from genflow.networks.mmdit import MMDiT, MMDiTConfig
from genflow.registry import api_export

PREFIX = "transformer."
A, B = ".lora_A.weight", ".lora_B.weight"
FILE = "pytorch_lora_weights.safetensors"  # as diffusers looks for it in a folder


def read_lora(path: str | Path, *, ema: bool = True) -> Factors:
    """The updates that a LoRA run of genflow has learned, by the names of the network's weights.

    Raises UserError for a run of another kind.
    """
    folder = find_model(path)
    config = read_config(folder)
    if (scale := lora_scale(config)) is None:
        raise UserError(f"{path} is no LoRA run: its config has no train.lora")
    file = folder / (EMA if ema and (folder / EMA).exists() else MODEL)
    factors = factors_of(_read_tensors(file, skip={}), scale, file)
    return {name.removeprefix("flow.").removeprefix("network."): pair for name, pair in factors.items()}


@api_export("save_lora")
def save_lora(run: str | Path, out: str | Path, *, ema: bool = True) -> None:
    """Write the updates of a LoRA run as diffusers' pipelines load them (`load_lora_weights`).

    out: a file, or a new folder for one. The scale alpha / rank is in B; q, k and v share an A, of which each has a copy.
    Raises UserError for a run of another kind, and where the disk refuses.
    """
    folder, out = find_model(run), Path(out)
    if (kind := read_config(folder)["model"].get("name")) != "mmdit":
        raise UserError(f"{run} holds a {kind}; only an mmdit has diffusers' layers")
    factors, depth = read_lora(run, ema=ema), read_config(folder)["model"]["depth"]
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        parts, swap = DIFFUSERS.counterpart(name, depth)
        b = torch.cat(b.chunk(2)[::-1]) if swap else b
        for part, rows in zip(parts, b.chunk(len(parts)), strict=True):
            stem = PREFIX + part.removesuffix(".weight")
            tensors |= {stem + A: a, stem + B: rows}
    file = out if out.suffix == ".safetensors" else out / FILE
    write_file(file, {name: Lazy.of(tensor) for name, tensor in tensors.items()}, {"format": "pt"})


@api_export("load_lora")
def load_lora(flow: Flow, path: str | Path, *, scale: float = 1.0) -> None:
    """Add the updates of a LoRA in diffusers' format, or of a LoRA run, to a flow with an MM-DiT, in place.

    scale: of the update; -1 takes away what 1 has added, but for rounding. Raises UserError for a file that is none, and for
    one of another model.
    """
    path = Path(path)
    network = flow.network if isinstance(flow, LatentFlow) else getattr(flow, "network", None)
    if not isinstance(network, MMDiT):
        raise UserError(f"load_lora takes a flow with an MM-DiT, not a {type(flow).__name__}")
    if path.is_dir() and not (path / FILE).is_file():
        factors = read_lora(path)
    else:
        factors = _from_diffusers(path / FILE if path.is_dir() else path, network.config)
    merge(network, {name: (a, scale * b) for name, (a, b) in factors.items()}, path)


def _from_diffusers(file: Path, config: MMDiTConfig) -> Factors:
    """Updates by genflow's names; those of q, k and v, each with factors of its own, as one of three times the rank."""
    tensors = {name.removeprefix(PREFIX): tensor.read() for name, tensor in read_file(file).items()}
    stems = {name.removesuffix(A).removesuffix(B) for name in tensors if name.endswith((A, B))}
    if not stems:
        raise UserError(f"{file} is no LoRA in diffusers' format: no name in it ends in {A}")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in config.build().named_parameters() if p.ndim == 2}
    found: Factors = {}
    for name, (rows, columns) in shapes.items():
        parts, swap = DIFFUSERS.counterpart(name, config.depth)
        own = [part.removesuffix(".weight") for part in parts]
        if not stems.intersection(own):
            continue
        pairs = []
        for stem in own:
            a, b = tensors.get(stem + A), tensors.get(stem + B)
            if (a is None) != (b is None):
                raise UserError(f"{file}: {stem} has one of its two factors only; copy the file again")
            a = torch.zeros(1, columns) if a is None else a.float()
            b = torch.zeros(rows // len(own), 1) if b is None else b.float()
            if a.shape[1] != columns or b.shape[0] != rows // len(own) or a.shape[0] != b.shape[1]:
                raise UserError(
                    f"{file}: its update of {stem} is not for this model: {list(b.shape)} x {list(a.shape)}"
                )
            alpha = tensors.get(f"{stem}.alpha")
            pairs.append((a, b if alpha is None else b * (alpha.float() / a.shape[0])))
        b = torch.block_diag(*(b for _, b in pairs))
        found[name] = (torch.cat([a for a, _ in pairs]), torch.cat(b.chunk(2)[::-1]) if swap else b)
        stems -= {*own}
    if stems:
        raise UserError(f"{file}: no layer of this model is called {min(stems)}; it is a LoRA of another one")
    return found
