"""Cached latents as a data set: the posteriors of an autoencoder and the embeddings of captions, in shards on the disk.

A cache has a folder for each split, with cache.json, which tells all that its contents hang on, latents-00000.safetensors
and so on, each with `mean` and `logvar` of its samples (no logvar: all are zero wide), and text-00000.safetensors and so on
with `tokens`, `mask` and `pooled` of distinct captions. A shard is whole or absent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from genflow.conditions import Condition
from genflow.data.folders import existing
from genflow.errors import UserError, nearest
from genflow.networks.identity import identity
from genflow.registry import api_export, dataset_export
from genflow.text import TextEncoder

HEAD = "cache.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KEYS = ("shape", "channels", "flip", "dtype", "autoencoder", "text", "data", "latents", "texts")
AGAIN = "run genflow data cache again"


class Encoder(Protocol):
    """What a cache reads of an autoencoder (flows/latent.py)."""

    picture_channels: int
    channels: int
    factor: int

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x)."""


class Texts:
    """The rows of a table of conditions that is kept in shards, read where they are asked for."""

    def __init__(self, shards: Sequence[Condition]) -> None:
        self.shards = shards
        self.size = len(shards[0])

    @property
    def mask(self) -> Tensor:
        return torch.cat([shard.mask for shard in self.shards])

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def __getitem__(self, rows: Tensor) -> Condition:
        return Condition.cat([self.shards[i // self.size][[i % self.size]] for i in rows.tolist()])

    def to(self, device: torch.device | str) -> Condition:
        """All of them."""
        return Condition.cat(self.shards).to(device)


@api_export("LatentDataset")
@dataclass(frozen=True)
class LatentDataset:
    """Captioned posteriors by number.

    captions: one each; identifiers: what a log calls each; shapes: N x 2, height and width of the latents; about: the
    cache.json; moments: mean and standard deviation of all numbers in latents drawn from the posteriors. Latents are as the
    autoencoder gives them, before scale and shift.
    """

    folder: Path
    captions: list[str]
    identifiers: list[str]
    shapes: Tensor
    about: dict[str, Any]
    moments: tuple[float, float]
    _shards: list[dict[str, Tensor]]
    _places: list[tuple[int, int]]  # shard, row in it
    _texts: Texts | None
    _caption_rows: dict[str, int]

    def __len__(self) -> int:
        return len(self.captions)

    def posterior(self, i: int, mirrored: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of sample i, or of its mirror image where the cache has them; float32."""
        number, row = self._places[i]
        shard = self._shards[number]
        mean = shard["mean"][row, int(mirrored)].float()
        if "logvar" not in shard:
            return mean, torch.zeros_like(mean)
        return mean, (shard["logvar"][row, int(mirrored)].float() / 2).exp()

    def check(self, flow: nn.Module) -> None:
        """Raises UserError for a flow that has no autoencoder, or another one than the cache was made by."""
        autoencoder: Any = getattr(flow, "autoencoder", None)
        if autoencoder is None:
            raise UserError(f"data latents: {type(flow).__name__} takes no latents; take flow latent")
        if autoencoder.channels != (channels := self.about["channels"]):
            raise UserError(
                f"data latents: {self.folder} has latents of {channels} channels, the flow's autoencoder makes "
                f"{autoencoder.channels}; {AGAIN}"
            )
        if (own := identity(autoencoder)) != self.about["autoencoder"]:
            raise UserError(
                f"data latents: {self.folder} was made by another autoencoder ({self.about['autoencoder'][:12]}) than the "
                f"flow's ({own[:12]}); {AGAIN}, into another folder"
            )

    def conditions(self, text: TextEncoder) -> tuple[Texts, Tensor] | None:
        """The cached table of conditions, and the row of each sample; None where the encoder is one that needs no cache.

        Raises UserError for another encoder than the cache was made by.
        """
        own = text.fingerprint()
        if own is None:
            return None
        if own != self.about["text"] or self._texts is None:
            made = f"texts of another encoder ({self.about['text'][:12]})" if self.about["text"] else "no texts"
            raise UserError(
                f"data latents: {self.folder} has {made}, the run's is {own[:12]}; {AGAIN}, into another folder"
            )
        return self._texts, torch.tensor([self._caption_rows[caption] for caption in self.captions])


@dataset_export("latents")
@dataclass(frozen=True)
class LatentsConfig:
    """The latents and texts in a folder that `genflow data cache` wrote, for a flow latent of the same autoencoder."""

    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pictures that the latents are of. Raises UserError."""
        return tuple(self.head()["shape"])

    @property
    def flip(self) -> bool:
        """Whether the cache has the mirror images too, so that training may take either."""
        return bool(self.head()["flip"])

    def head(self) -> dict[str, Any]:
        """cache.json of a split, train if it is there. Raises UserError."""
        folder = existing(self.path, "data latents")
        heads = sorted(folder.glob(f"*/{HEAD}"), key=lambda p: p.parent.name != "train")
        if not heads:
            raise UserError(
                f"data latents: {folder} holds no cache; make one with genflow data cache CONFIG --out {folder}"
            )
        return read_head(heads[0])

    def build(self, split: str = "train") -> LatentDataset:
        """Raises UserError for a split that was not cached, and for a cache that is cut short or damaged."""
        root = existing(self.path, "data latents")
        folder = root / split
        if not (folder / HEAD).is_file():
            known = [p.parent.name for p in root.glob(f"*/{HEAD}")]
            raise UserError(f"data latents: {root} has no split {split!r}.{nearest(split, known)}")
        about = read_head(folder)
        files = [folder / name for name in (*names("latents", about["latents"]), *names("text", about["texts"]))]
        if missing := [file for file in files if not file.is_file()]:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"data latents: {missing[0]} is missing{more}; the caching was cut short: {AGAIN}")
        latents = [_read(file, DTYPES[about["dtype"]]) for file in files[: about["latents"]]]
        texts = [_read(file, None) for file in files[about["latents"] :]]
        found = sorted(
            (row, number, place, name, caption)
            for number, (_, told) in enumerate(latents)
            for place, (row, name, caption) in enumerate(told["rows"])
        )
        if not found:
            raise UserError(f"data latents: {folder} holds no sample: no picture could be read")
        shards = [tensors for tensors, _ in latents]
        return LatentDataset(
            folder,
            captions=[caption for *_, caption in found],
            identifiers=[name for _, _, _, name, _ in found],
            shapes=torch.tensor([shards[number]["mean"].shape[-2:] for _, number, *_ in found]),
            about=about,
            moments=_moments([told["moments"] for _, told in latents]),
            _shards=shards,
            _places=[(number, place) for _, number, place, *_ in found],
            _texts=Texts([Condition(t["tokens"], t["mask"], t["pooled"]) for t, _ in texts]) if texts else None,
            _caption_rows={caption: row for row, caption in enumerate(c for _, told in texts for c in told["rows"])},
        )


def _moments(parts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean and standard deviation from (count, sum, sum of squares) of several parts."""
    count, total, squares = (sum(each) for each in zip(*parts, strict=True))
    mean = total / count
    return mean, max(squares / count - mean**2, 0.0) ** 0.5


def names(kind: str, count: int) -> list[str]:
    """The files of the shards of a kind, latents or text."""
    return [f"{kind}-{i:05d}.safetensors" for i in range(count)]


def read_head(path: Path) -> dict[str, Any]:
    """cache.json, of a folder or by its own path. Raises UserError."""
    path = path / HEAD if path.is_dir() else path
    try:
        about = json.loads(path.read_text())
        if missing := [key for key in KEYS if key not in about]:
            raise ValueError(f"it has no {missing[0]}")
        counts = all(isinstance(about[key], int) for key in ("channels", "latents", "texts"))
        if not counts or not isinstance(about["shape"], list) or about["dtype"] not in DTYPES:
            raise ValueError("an entry is none that it can have")
        return about
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"data latents: {path} is damaged ({error}); remove its folder and {AGAIN}") from error


def _read(file: Path, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a shard, mapped and not read, and what it tells of its rows. Raises UserError."""
    try:
        with safe_open(file, framework="pt") as opened:
            told = json.loads(opened.metadata()["about"])
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        if any(len(t) != len(told["rows"]) for t in tensors.values()):
            raise ValueError("its tensors and rows do not fit")
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"data latents: {file} is damaged ({error}); remove it and {AGAIN}") from error
    if dtype is not None and (wrong := [t.dtype for t in tensors.values() if t.dtype != dtype]):
        raise UserError(f"data latents: {file} is of {wrong[0]}, its {HEAD} says {dtype}; remove it and {AGAIN}")
    return tensors, told
