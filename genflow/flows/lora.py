"""Low-rank updates of a model's matrices, W + B A (Hu et al. 2021, arXiv 2106.09685): what a LoRA run keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genflow.errors import UserError
from genflow.functional import wide

# How the factors of a matrix are called in a run's checkpoints, after the name of its module (peft's names).
A, B = ".lora_A.default.weight", ".lora_B.default.weight"
Factors = dict[str, tuple[Tensor, Tensor]]  # name of a weight -> A, rank x in, and B, out x rank, its scale within


def is_factor(name: str) -> bool:
    """Whether a tensor of a state dict is a factor."""
    return name.endswith((A, B))


def lora_scale(config: Mapping[str, Any]) -> float | None:
    """alpha / rank of a LoRA run, by its config.json; None where it is none."""
    section = (config.get("train") or {}).get("lora")
    return None if section is None else (section.get("alpha") or section["rank"]) / section["rank"]


def whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model by itself, its updates in the weights where it is a LoRA run's."""
    if lora_scale(config) is None:
        return dict(config)
    own = {key: value for key, value in config.items() if key != "base"}
    return {**own, "train": {**config["train"], "lora": None}}


def factors_of(tensors: Mapping[str, Tensor], scale: float, where: Path) -> Factors:
    """The factors among the tensors of a checkpoint. scale: alpha / rank.

    Raises UserError where there is none, or one has no other.
    """
    stems = sorted({name.removesuffix(A).removesuffix(B) for name in tensors if is_factor(name)})
    if not stems:
        raise UserError(f"{where} has no factors of a LoRA, as its config says it has; take another checkpoint")
    for stem in stems:
        if missing := [end for end in (A, B) if stem + end not in tensors]:
            raise UserError(f"{where} lacks {stem + missing[0]!r}; take another checkpoint")
    return {f"{stem}.weight": (tensors[stem + A].float(), scale * tensors[stem + B].float()) for stem in stems}


@torch.no_grad()
def merge(model: nn.Module, factors: Factors, where: Path) -> None:
    """Add the updates to the weights of a model. Raises UserError for a weight that it has not, or of another shape."""
    weights = dict(model.named_parameters())
    for name, (a, b) in factors.items():
        if name not in weights:
            raise UserError(f"{where}: its update of {name} is for no weight of the model; they do not belong together")
        if weights[name].shape != (shape := (len(b), a.shape[1])):
            raise UserError(
                f"{where}: its update of {name} is {list(shape)}, the model's weight {list(weights[name].shape)}; "
                "they do not belong together"
            )
    for name, (a, b) in factors.items():
        weight = weights[name]
        weight.copy_(wide(weight) + (b @ a).to(weight.device))
