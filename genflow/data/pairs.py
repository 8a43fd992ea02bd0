"""Pairs of noise and the sample that a flow made of it: what a reflow learns from, with where they come from.

A folder holds pairs.json, {pairs, shape, shard, captions, about}, about being which weights drew them and how, and the pairs
themselves in shards of so many, shard-00000.safetensors and so on, each with `noise` and `x`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from genflow.data.folders import existing
from genflow.errors import UserError
from genflow.registry import api_export, dataset_export
from genflow.saving import replacing, save_file

SHARD = 1024
ABOUT = "pairs.json"

Draw = Callable[[range], tuple[Tensor, Tensor]]
"""The noise and the samples of the pairs of those numbers: B x *shape each."""


class Rows:
    """The rows of a tensor that is kept in shards, read where they are asked for."""

    def __init__(self, shards: Sequence[Tensor]) -> None:
        self.shards = shards
        self.size = len(shards[0])

    def __getitem__(self, index: int | Tensor) -> Tensor:
        """A row, or those of B numbers: B x *shape."""
        if isinstance(index, Tensor):
            return torch.stack([self[i] for i in index.tolist()])
        return self.shards[index // self.size][index % self.size]


@api_export("PairsDataset")
@dataclass(frozen=True)
class PairsDataset:
    """Captioned pairs by number.

    rows, noise: N x *shape float32, by row numbers; captions: one each, may be empty; identifiers: what a log calls each;
    about: where they come from.
    """

    rows: Rows
    noise: Rows
    captions: list[str]
    identifiers: list[str]
    shape: tuple[int, ...]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.captions)


@dataset_export("pairs")
@dataclass(frozen=True)
class PairsConfig:
    """The pairs in a folder that `genflow reflow` wrote, for a flow with coupling paired; split train only."""

    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample. Raises UserError."""
        return tuple(_about(existing(self.path, "data pairs"))["shape"])

    def build(self, split: str = "train") -> PairsDataset:
        """Raises UserError for another split, and for a folder that holds no pairs or lacks some."""
        if split != "train":
            raise UserError(f"data pairs: no split {split!r}; all pairs are 'train'")
        folder = existing(self.path, "data pairs")
        about = _about(folder)
        files = shard_files(folder, about["pairs"], about["shard"])
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"data pairs: {missing[0]} is missing: the drawing was cut short; run genflow reflow again")
        try:
            shards = [load_file(file) for file in files]  # mapped, not read
            rows, noise = (Rows([shard[name] for shard in shards]) for name in ("x", "noise"))
            for i, shard in enumerate(shards):
                count = min(about["shard"], about["pairs"] - i * about["shard"])
                if any(shard[name].shape != (count, *self.shape) for name in ("x", "noise")):
                    raise ValueError(f"{files[i].name} holds no {count} pairs of shape {self.shape}")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(
                f"data pairs: a shard of {folder} is damaged ({error}); remove it and draw again"
            ) from error
        names = [f"{folder.name}[{i}]" for i in range(about["pairs"])]
        return PairsDataset(rows, noise, about["captions"], names, self.shape, about["about"])


def shard_files(folder: Path, pairs: int, shard: int) -> list[Path]:
    return [folder / f"shard-{i:05d}.safetensors" for i in range(-(-pairs // shard))]


@api_export("write_pairs")
def write_pairs(
    folder: str | Path, draw: Draw, *, captions: Sequence[str], shape: Sequence[int], about: Mapping[str, Any]
) -> None:
    """Draw a pair for each caption, shard by shard, into a folder; those that it already holds of the same are kept.

    about: all that the pairs hang on, in JSON's types. Raises UserError where the folder holds other pairs, where a sample
    is not finite, and where the disk refuses.
    """
    folder, n = Path(folder), len(captions)
    if n < 1:
        raise UserError("0 pairs are too few; the least is 1")
    head = {"pairs": n, "shape": list(shape), "shard": SHARD, "captions": list(captions), "about": dict(about)}
    if (folder / ABOUT).exists() and _about(folder) != json.loads(json.dumps(head)):
        raise UserError(
            f"{folder} holds pairs drawn in another way (see its {ABOUT}); choose another place, or remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / ABOUT) as temporary:
            temporary.write_text(json.dumps(head, indent=1))
        for i, file in enumerate(shard_files(folder, n, SHARD)):
            if file.is_file():
                continue
            numbers = range(i * SHARD, min((i + 1) * SHARD, n))
            noise, x = (each.float().cpu().contiguous() for each in draw(numbers))
            if not bool(x.isfinite().all() and noise.isfinite().all()):
                raise UserError(
                    f"a sample of pairs {numbers.start} to {numbers[-1]} is not finite; take other settings"
                )
            with replacing(file) as temporary:
                save_file({"noise": noise, "x": x}, temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write pairs to {folder}: {error}; free some space or choose another place") from error


def _about(folder: Path) -> dict[str, Any]:
    """pairs.json of a folder. Raises UserError."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        if not all(key in about for key in ("pairs", "shape", "shard", "captions", "about")):
            raise ValueError("an entry is missing")
        numbers = (about["pairs"], about["shard"], *about["shape"])
        if not all(type(n) is int and n > 0 for n in numbers) or len(about["captions"]) != about["pairs"]:
            raise ValueError("an entry is none that it can have")
        return about
    except FileNotFoundError:
        raise UserError(f"data pairs: {folder} has no {ABOUT}; draw pairs with genflow reflow") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"data pairs: {folder / ABOUT} is damaged ({error}); draw the pairs again") from error
