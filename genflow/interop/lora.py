"""LoRA of SD3-family transformers in diffusers' format, which ComfyUI and others read too."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from genflow.config import setting
from genflow.errors import UserError, nearest
from genflow.flows.base import Flow
from genflow.flows.lora import Factors, factors_of, is_factor, lora_scale, merge
from genflow.flows.store import CONFIG, EMA, MODEL, _read_tensors, find_model, read_config
from genflow.interop.families import looks_like
from genflow.interop.layouts import DIFFUSERS, _swap_halves
from genflow.interop.tensors import PICKLES, Lazy, read_file, refuse_full, write_file
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
        b = _swap_halves(b) if swap else b
        for part, rows in zip(parts, b.chunk(len(parts)), strict=True):
            stem = PREFIX + part.removesuffix(".weight")
            tensors |= {stem + A: a, stem + B: rows}
    file = out if out.suffix == ".safetensors" else out / FILE
    refuse_full(file)
    write_file(file, {name: Lazy.of(tensor) for name, tensor in tensors.items()}, {"format": "pt"})


@api_export("load_lora")
def load_lora(flow: Flow, path: str | Path, *, weight: float = 1.0) -> None:
    """Add weight alpha / rank B A to the matrices of a flow's MM-DiT, in place: sampling takes no longer, several add up.

    path: a LoRA run of genflow, or a file or folder in diffusers' format (`pytorch_lora_weights.safetensors`). weight: 0
    changes nothing; -1 takes away what 1 has added, but for rounding. Hu et al. 2021 (arXiv 2106.09685). Raises UserError
    for a flow without an MM-DiT, a path that is not there or holds no LoRA, and a LoRA of another model.
    """
    path, network = Path(path), getattr(flow, "network", flow)
    if not isinstance(network, MMDiT):
        raise UserError(f"{path}: a LoRA is for an MM-DiT, and the model is a {type(network).__name__}")
    if not math.isfinite(weight):
        raise UserError(f"{path}: weight = {weight} is not finite; 1 is the LoRA as it was trained")
    if not path.exists():
        around = [str(p) for p in path.parent.glob("*") if p.is_dir() or p.suffix == ".safetensors"]
        near = nearest(str(path), around) if around else ""
        raise UserError(f"{path} does not exist; give a LoRA run, or a file in diffusers' format.{near}")
    own = (path / CONFIG).exists() or (path / "checkpoints").is_dir()
    factors = read_lora(path) if own and not (path / FILE).exists() else _from_diffusers(_file(path), network.config)
    merge(network, {name: (a, weight * b) for name, (a, b) in factors.items()}, path)


def _file(path: Path) -> Path:
    """The file that a path means. Raises UserError for a folder with several, or none."""
    if not path.is_dir() or (path / FILE).exists():
        return path / FILE if path.is_dir() else path
    files = sorted(path.glob("*.safetensors")) or [p for p in sorted(path.iterdir()) if p.suffix in PICKLES]
    if len(files) != 1:
        raise UserError(f"{path} holds {len(files) or 'no'} files of weights; name the LoRA that is meant")
    return files[0]


def _from_diffusers(file: Path, config: MMDiTConfig) -> Factors:
    """Updates by genflow's names; those of q, k and v, each with factors of its own, as one of three times the rank."""
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_file(file).items()}
    if any(is_factor(name) for name in tensors):
        raise UserError(f"{file} is of a LoRA run of genflow; give its folder, {file.parent}")
    if not any(name.endswith((A, B)) for name in tensors):
        raise UserError(f"{file} is no LoRA in diffusers' format; {looks_like(tensors)}")
    scale = _scale_by_header(file)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in config.build().named_parameters() if p.ndim == 2}
    found: Factors = {}
    for name, (rows, columns) in shapes.items():
        parts, swap = DIFFUSERS.counterpart(name, config.depth)
        stems = [part.removesuffix(".weight") for part in parts]
        pairs = [_pair(tensors, stem, (rows // len(stems), columns), scale, file) for stem in stems]
        b = torch.block_diag(*(b for _, b in pairs))
        if b.shape[1]:
            found[name] = (torch.cat([a for a, _ in pairs]), _swap_halves(b) if swap else b)
    if tensors:
        raise UserError(
            f"{file}: the model has no linear layer for {min(tensors)}; it is a LoRA of another one, or more than a LoRA"
        )
    return found


def _pair(
    tensors: dict[str, Lazy], stem: str, shape: tuple[int, int], scale: Callable[[str, int], float], file: Path
) -> tuple[Tensor, Tensor]:
    """A and scaled B of a layer of that shape, taken out of the tensors; of rank 0 where there is no update of it."""
    rows, columns = shape
    a, b = tensors.pop(stem + A, None), tensors.pop(stem + B, None)
    if a is None and b is None:
        return torch.zeros(0, columns), torch.zeros(rows, 0)
    if a is None or b is None:
        raise UserError(f"{file}: {stem} has one of its two factors only; copy the file again")
    rank = a.shape[0] if a.shape else 0
    if not rank or (b.shape, a.shape) != ((rows, rank), (rank, columns)):
        raise UserError(
            f"{file}: its update of {stem} is {list(b.shape)} x {list(a.shape)}, the model's weight {list(shape)}; "
            "it is a LoRA of another one"
        )
    alpha = tensors.pop(f"{stem}.alpha", None)
    if alpha is not None and math.prod(alpha.shape) != 1:
        raise UserError(f"{file}: {stem}.alpha is {list(alpha.shape)}, not one number; copy the file again")
    return a.read().float(), b.read().float() * (scale(stem, rank) if alpha is None else alpha.read().item() / rank)


def _scale_by_header(file: Path) -> Callable[[str, int], float]:
    """alpha / rank of a layer by the settings (peft's LoraConfig) that diffusers writes into a file; without them 1."""
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        about = {key.removeprefix(PREFIX): value for key, value in json.loads(text).items()}
        pattern = about.get("alpha_pattern", {})
        alphas = {re.compile(rf"(.*\.)?({key})"): setting(float, pattern, key, "alpha_pattern") for key in pattern}
        rest = setting(float, about, "lora_alpha", "LoraConfig") if "lora_alpha" in about else None
    except (ValueError, AttributeError, TypeError, re.error) as error:
        raise UserError(f"{file}: the LoRA's settings in its header are damaged ({error}); copy it again") from error

    def scale(stem: str, rank: int) -> float:
        alpha = next(
            (alpha for names, alpha in alphas.items() if names.fullmatch(stem)), rank if rest is None else rest
        )
        return alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)

    return scale
