"""WebDataset shards, read in place: tar files whose samples are found by their offsets, in an order that is a function.

The libraries that stream such shards keep a shuffle buffer, whose content a restart loses; here the order of an epoch is
computed from (seed, epoch), so that any number of ranks and any restart see the same stream.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from genflow.cachedir import cache_folder
from genflow.data.buckets import Buckets, bucketed
from genflow.data.folders import decoded, text_of
from genflow.data.images import SUFFIXES, BadImage, ImageDataset, _reason
from genflow.data.pictures import write_atomic
from genflow.data.tables import _files
from genflow.errors import UserError, nearest
from genflow.functional import Rng
from genflow.registry import dataset_export

TEXTS = ("txt", "caption", "text", "json", "cls")  # the members that captions come from, in this order
OPEN = 64  # shards held open
LONGEST = 2**20  # bytes of a caption's member

Members = dict[str, tuple[int, int]]  # of a sample: extension -> offset and size of its bytes in the shard


@dataclass(frozen=True)
class _Sample:
    shard: str
    key: str
    members: Members
    texts: dict[str, str]


@dataset_export("webdataset")
@dataclass(frozen=True)
class WebDatasetConfig:
    """WebDataset shards: tar files of pictures with .txt or .json captions.

    path: a file, a folder, a glob, or shards by number, such as shard-{000..012}.tar.
    image, caption: extensions to take, where a sample has several; without them, a sample may have a picture, and a caption,
    of any kind.
    buffer: 0 shuffles all samples, wherever they lie; more takes the shards of an epoch one after another, in an order of
    its own, and shuffles within a window of so many samples, so that disks read nearly straight on. The heads of a shard
    are read once, and kept until the shard changes.
    """

    path: str
    image: str | None = None
    caption: str | None = None
    size: int = 64
    flip: bool = False
    channels: Literal[1, 3] = 3
    buckets: Buckets | None = None  # data/buckets.py
    buffer: int = 0

    def __post_init__(self) -> None:
        if self.buffer < 0:
            raise UserError(f"buffer = {self.buffer} is too few; 0 shuffles everything")

    def build(self, split: str = "train") -> ImageDataset:
        """Raises UserError for another split, for files that are no shards, and for extensions that are not there."""
        if split != "train":
            raise UserError(f"data webdataset: shards have no split {split!r}; give its shards as another data set")
        files = _files(self.path, "webdataset", ".tar")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            shards = list(tqdm(pool.map(_index, files), total=len(files), desc="shards", leave=False, disable=None))
        samples = [sample for shard in shards for sample in shard]
        if not samples:
            raise UserError(f"data webdataset: {self.path} holds no samples")
        usual = sorted(suffix[1:] for suffix in SUFFIXES)
        image = self._extension("image", self.image, samples, usual)
        caption = self._extension("caption", self.caption, samples, TEXTS)
        opened = lru_cache(maxsize=OPEN)(partial(open, mode="rb", buffering=0))

        def read(i: int) -> bytes:
            sample = samples[i]
            others = () if self.image else usual
            if (taken := next((e for e in (image, *others) if e in sample.members), None)) is None:
                raise BadImage(f"it has no .{image}")
            offset, size = sample.members[taken]
            try:  # read at a place of its own: processes share the file
                file = opened(sample.shard)  # held, for it may be forgotten meanwhile, or never be kept
                return os.pread(file.fileno(), size, offset)
            except OSError as error:
                raise BadImage(_reason(error)) from error

        dataset = ImageDataset(
            [_caption(sample, (caption,) if self.caption else (caption, *TEXTS), opened) for sample in samples],
            [f"webdataset[{sample.key}]" for sample in samples],
            read,
            order=partial(stream_order, [len(shard) for shard in shards], self.buffer) if self.buffer else None,
            files=files,
        )
        return bucketed(dataset, self.buckets, self.size)

    def _extension(self, what: str, asked: str | None, samples: list[_Sample], usual: Sequence[str]) -> str:
        known = dict.fromkeys(extension for sample in samples for extension in sample.members)
        if asked is not None:
            if asked not in known:
                raise UserError(f"data webdataset: no sample has a .{asked}.{nearest(asked, known)}")
            return asked
        found = next((e for e in (usual if what == "caption" else known) if e in known and e in usual), None)
        if found is None:
            raise UserError(f"data webdataset: no {what} in its samples; they have {', '.join(known)}")
        return found


def stream_order(counts: Sequence[int], buffer: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: shards in a random order, and within a window of `buffer` samples any.

    counts: samples of each shard, which are numbered one shard after another. A sample comes at most `buffer` places before
    or after its turn. A function of (seed, epoch): no buffer has to be filled, saved or restored.
    """
    rng, n = Rng(seed, epoch), torch.tensor(counts)
    shards = rng.bits("shards", torch.arange(len(n))).argsort(stable=True)
    first = torch.empty_like(n)
    first[shards] = n[shards].cumsum(0) - n[shards]
    own = torch.arange(int(n.sum())) - (n.cumsum(0) - n).repeat_interleave(n)
    turn = first.repeat_interleave(n) + own
    return (turn + buffer * rng.uniform("buffer", torch.arange(len(turn)))).argsort(stable=True)


def _caption(sample: _Sample, extensions: Sequence[str], opened: Callable[[str], Any]) -> str:
    """The text of the first of these members that a sample has."""
    extension = next((each for each in extensions if each in sample.members), "")
    text = sample.texts.get(extension, "")
    if extension and extension not in TEXTS:
        offset, size = sample.members[extension]
        text = decoded(os.pread(opened(sample.shard).fileno(), min(size, LONGEST), offset))
    if extension.rpartition(".")[2] != "json":
        return " ".join(text.split())
    try:
        return text_of(json.loads(text))
    except (ValueError, RecursionError):
        return ""


def _index(shard: str) -> list[_Sample]:
    """The samples of a shard, by what an earlier reading left. Raises UserError for a file that is none."""
    about = os.stat(shard)
    name = hashlib.sha256(f"4 {os.path.abspath(shard)} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:24]
    kept = cache_folder() / "shards" / f"{name}.json"
    try:
        rows = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rows = _scan(shard)
        text = json.dumps(rows)
        with contextlib.suppress(UserError):  # a disk that takes no more costs a second reading, not the run
            write_atomic(kept, lambda file: file.write(text.encode()))
    return [_Sample(shard, key, {e: (o, s) for e, (o, s) in members.items()}, texts) for key, members, texts in rows]


def _scan(shard: str) -> list[list[Any]]:
    """(key, members, texts) of each sample: files of one name, whatever comes after its first dot, wherever they stand.

    A second file of one name and extension begins another sample.
    """
    rows: list[list[Any]] = []
    latest: dict[str, list[Any]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, dot, extension = file.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
                if key not in latest or extension in latest[key][1]:
                    rows.append([key, {}, {}])
                    latest[key] = rows[-1]
                latest[key][1][extension] = (member.offset_data, member.size)
                if extension in TEXTS and member.size <= LONGEST:
                    content = tar.extractfile(member)
                    assert content is not None
                    latest[key][2][extension] = decoded(content.read())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"data webdataset: {Path(shard)} cannot be loaded ({error}); download it again") from error
    return rows
