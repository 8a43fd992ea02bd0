"""Writing a cache of latents: encode every picture and every caption of a data set once, shard by shard."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from genflow.data.buckets import digest, digests, stamps
from genflow.data.images import BadImage, ImageDataset
from genflow.data.latents import DTYPES, HEAD, Encoder, names, read_head
from genflow.data.locks import lock, still_at
from genflow.data.sources import Pictures
from genflow.errors import UserError
from genflow.networks.identity import identity
from genflow.registry import api_export
from genflow.saving import leftovers, replacing, save_file
from genflow.text import TextEncoder, cuts_told_at_once

SHARD = 1024  # samples, or captions
T = TypeVar("T")


@api_export("CacheReport")
@dataclass(frozen=True)
class CacheReport:
    """What `cache_latents` did. written, there, elsewhere: shards that it wrote, that were there, that others are writing.

    samples: encoded by this call; bad: (identifier, reason) of pictures that it could not read, which are not in the cache.
    """

    written: int
    there: int
    elsewhere: int
    samples: int
    bad: list[tuple[str, str]]


@api_export("cache_latents")
def cache_latents(
    folder: str | Path,
    dataset: ImageDataset,
    autoencoder: nn.Module,
    text: TextEncoder,
    *,
    shape: Sequence[int],
    flip: bool = False,
    dtype: str = "float16",
    batch: int = 16,
    device: torch.device | str = "cpu",
    about: Mapping[str, Any] | None = None,
) -> CacheReport:
    """Encode a data set into the folder of a cache's split (`LatentsConfig`): what is there is kept, what is missing added.

    shape: of a picture, (C, H, H); pictures of a data set with buckets keep their own. flip: mirror images as well. about:
    more that the cache should tell, in JSON's types, such as the configurations. Any number of processes may be at it: each
    takes a shard that no other has. A process that is killed leaves its shard to the next. Raises UserError where the folder
    holds another cache, where latents are not finite in dtype, and where the disk refuses.
    """
    folder, encoder = Path(folder), _encoder(autoencoder, shape)
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} is unknown; choose from: {', '.join(DTYPES)}")
    if batch < 1:
        raise UserError(f"batch = {batch} is too few; the least is 1")
    parts, stamped = _parts(dataset, shape, encoder.factor), bool(stamps(dataset))
    files = [*(_content(dataset, i) for i in range(len(dataset)) if stamped), *digests(dataset)]
    captions = list(dict.fromkeys(dataset.captions)) if text.fingerprint() is not None else []
    pieces = [captions[i : i + SHARD] for i in range(0, len(captions), SHARD)]
    head = {
        "shape": list(shape),
        "channels": encoder.channels,
        "flip": flip,
        "dtype": dtype,
        "autoencoder": identity(autoencoder),
        "text": text.fingerprint(),
        "data": None,
        "latents": len(parts),
        "texts": len(pieces),
        "listing": _digest([dataset.identifiers, dataset.captions, files, [list(map(int, part)) for part in parts]]),
        **(about or {}),
    }
    pictures = Pictures(dataset, size=shape[1], channels=shape[0], own_shapes=True)
    try:
        autoencoder.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # as torch says that there is no such device, or no room on it
        raise UserError(f"device {str(device)!r} cannot take the autoencoder: {str(error).splitlines()[0]}") from error
    work = _Encoding(dataset, pictures, encoder, flip=flip, batch=batch, device=device, dtype=DTYPES[dtype])
    written = there = elsewhere = samples = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_head(folder, json.loads(json.dumps(head)))
        shards = [*names("latents", len(parts)), *names("text", len(pieces))]
        with cuts_told_at_once(), tqdm(total=len(dataset), desc="latents", unit=" pictures", disable=None) as bar:
            for i, name in enumerate(shards):
                with _ours(folder / name) as ours:
                    if not ours:
                        done = (folder / name).is_file()
                        there, elsewhere = there + done, elsewhere + (not done)
                        bar.update(len(parts[i]) if i < len(parts) else 0)
                    elif i < len(parts):
                        tensors, told, moments = work.shard(parts[i], bar)
                        _write(folder / name, tensors, rows=told, moments=moments)
                        written, samples = written + 1, samples + len(told)
                    else:
                        piece = pieces[i - len(parts)]
                        _write(folder / name, _texts(text, piece), rows=piece)
                        written += 1
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the cache {folder}: {error}; free some space or choose another place") from error
    return CacheReport(written, there, elsewhere, samples, work.bad)


def _encoder(autoencoder: Any, shape: Sequence[int]) -> Encoder:
    if shape[0] != autoencoder.picture_channels:
        raise UserError(f"the pictures have {shape[0]} channels, the autoencoder {autoencoder.picture_channels}")
    return autoencoder


def _parts(dataset: ImageDataset, shape: Sequence[int], factor: int) -> list[list[int]]:
    """The samples of each shard: of one shape. Raises UserError for a shape that the autoencoder does not divide."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in range(len(dataset)):
        own = tuple(shape[1:]) if dataset.shapes is None else tuple(dataset.shapes[i].tolist())
        groups.setdefault(own, []).append(i)
    if wrong := [s for s in groups if any(side % factor for side in s)]:
        what = "take another size" if dataset.shapes is None else "take another step of buckets"
        raise UserError(f"{wrong[0][0]} x {wrong[0][1]} is no multiple of the autoencoder's {factor}; {what}")
    return [rows[i : i + SHARD] for _, rows in sorted(groups.items()) for i in range(0, len(rows), SHARD)]


class _Encoding:
    """Pictures to the shards of their posteriors. bad: those that could not be read so far."""

    def __init__(
        self,
        dataset: ImageDataset,
        pictures: Pictures,
        encoder: Encoder,
        *,
        flip: bool,
        batch: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.dataset, self.pictures, self.encoder = dataset, pictures, encoder
        self.flip, self.batch, self.device, self.dtype = flip, batch, device, dtype
        self.bad: list[tuple[str, str]] = []

    def shard(self, rows: list[int], bar: Any) -> tuple[dict[str, Tensor], list[Any], list[float]]:
        """Of the samples of those numbers: the tensors, M x (1 or 2) x c x h x w; (number, identifier, caption) of each.

        Last, how many numbers there are, and the sums of z and of z^2 of latents drawn from them. bar: of progress.
        """
        told: list[Any] = []
        parts: list[tuple[Tensor, Tensor]] = []
        waiting: list[Tensor] = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders let go of the interpreter
            for i, picture in zip(rows, _ahead(pool, self._read, rows, 2 * self.batch), strict=True):
                bar.update()
                if isinstance(picture, BadImage):
                    self.bad.append((self.dataset.identifiers[i], str(picture)))
                    continue
                told.append([i, self.dataset.identifiers[i], self.dataset.captions[i]])
                waiting.append(picture)
                if len(waiting) == self.batch:
                    parts.append(self._encode(waiting))
                    waiting = []
        if waiting:
            parts.append(self._encode(waiting))
        if not parts:
            return {"mean": torch.zeros(0, 1, self.encoder.channels, 1, 1, dtype=self.dtype)}, told, [0, 0.0, 0.0]
        mean, std = (torch.cat(each) for each in zip(*parts, strict=True))
        moments = [mean.numel(), float(mean.sum(dtype=torch.float64)), float((mean**2 + std**2).double().sum())]
        tensors = {"mean": mean.to(self.dtype)} | (
            {"logvar": (2 * std.log()).to(self.dtype)} if bool(std.any()) else {}
        )
        if not bool(tensors["mean"].isfinite().all()):
            raise UserError(f"latents are not finite in {self.dtype}; take dtype float32, or mend the autoencoder")
        return tensors, told, moments

    def _read(self, i: int) -> Tensor | BadImage:
        try:
            return self.pictures[i]
        except BadImage as error:
            return error

    @torch.no_grad()
    def _encode(self, pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, B x (1 or 2) x c x h x w float32 on the CPU."""
        x = torch.stack(pictures).to(self.device).float() / 127.5 - 1
        both = torch.stack([x, x.flip(-1)], 1).flatten(0, 1) if self.flip else x
        mean, std = (each.float().cpu().unflatten(0, (len(x), -1)) for each in self.encoder.posterior(both))
        return mean, std


def _ahead(pool: ThreadPoolExecutor, work: Callable[[int], T], items: Sequence[int], count: int) -> Iterator[T]:
    """work of each item in order, `count` of them begun before they are asked for."""
    begun = deque(pool.submit(work, item) for item in items[:count])
    for item in items[count:]:
        yield begun.popleft().result()
        begun.append(pool.submit(work, item))
    while begun:
        yield begun.popleft().result()


def _texts(text: TextEncoder, captions: list[str]) -> dict[str, Tensor]:
    condition = text.encode(captions)
    return {"tokens": condition.tokens, "mask": condition.mask, "pooled": condition.pooled}


# -------------------------------------------------------------------------------------------------------------- the disk


def _content(dataset: ImageDataset, i: int) -> str:
    """What tells the content of a picture that is a file of its own, and not its time, which a copy changes."""
    try:
        return digest(source) if isinstance(source := dataset.read(i), Path) else ""
    except (OSError, BadImage):
        return ""


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", errors="replace")).hexdigest()


def _write_head(folder: Path, head: dict[str, Any]) -> None:
    """Raises UserError where the folder holds another cache."""
    if (folder / HEAD).exists():
        there = read_head(folder)
        if wrong := [key for key in {**head, **there} if head.get(key) != there.get(key)]:
            key, was, now = wrong[0], there.get(wrong[0]), head.get(wrong[0])
            while isinstance(was, dict) and isinstance(now, dict):  # of a section, the key that differs
                inner = next(k for k in {**now, **was} if was.get(k, ...) != now.get(k, ...))  # a null is a value
                key, was, now = f"{key}.{inner}", was.get(inner), now.get(inner)
            told = f"{key} {str(was)[:60]}, not {str(now)[:60]}"
            raise UserError(f"{folder} holds a cache with {told}; choose another folder, or remove it")
        return
    with replacing(folder / HEAD) as temporary:
        temporary.write_text(json.dumps(head, indent=1))


def _write(path: Path, tensors: Mapping[str, Tensor], **told: Any) -> None:
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    metadata = {"about": json.dumps(told)}  # one entry: of several, safetensors shuffles the order
    with replacing(path) as temporary:
        save_file(whole, temporary, metadata=metadata)


@contextlib.contextmanager
def _ours(path: Path) -> Iterator[bool]:
    """Whether a shard is missing and no other process is at it; none will be inside, and a killed one lets go.

    Without locks, processes may do the same shard, one after the other.
    """
    if path.is_file():
        yield False
        return
    locked = path.with_name(f".{path.name}.lock")
    with locked.open("a") as file:
        held = lock(file, wait=False)
        removed = held and not still_at(file, locked)  # by one who failed, as we opened it: the next takes a new file
        if held is False or removed:
            yield False
            return
        if held:
            for leftover in leftovers(path):
                leftover.unlink(missing_ok=True)
        try:
            yield not path.is_file()
        finally:
            locked.unlink(missing_ok=True)
