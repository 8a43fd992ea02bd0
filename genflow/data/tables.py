"""Parquet files and hub data sets, through the `datasets` library."""

from __future__ import annotations

import glob as globbing
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from genflow.data.buckets import Buckets, bucketed
from genflow.data.folders import CAPTION_KEYS, NOT_TRAIN, column, existing, text_of
from genflow.data.images import BadImage, ImageDataset
from genflow.errors import UserError, nearest
from genflow.registry import dataset_export

NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")  # of shards
IMAGE_KEYS = ("image", "img", "jpg", "png", "webp", "jpeg")


def _open(kind: str, where: str, split: str, **options: Any) -> Any:
    """A map-style split. Raises UserError in one line where the library cannot serve it."""
    import datasets
    from huggingface_hub.utils import logging

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.set_verbosity_error()
    try:
        return datasets.load_dataset(kind, split=split, **options)
    except Exception as error:
        told = (error.__cause__ or error) if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = " ".join(str(told).split())[:200]
        raise UserError(f"data {where}: cannot be loaded ({type(told).__name__}: {reason})") from error


def _captioned(table: Any, where: str, image: str | None, caption: str | None, files: Sequence[str]) -> ImageDataset:
    """Choose the picture and caption columns; decode pictures ourselves, so that a bad one is only skipped."""
    import datasets

    names: list[str] = table.column_names
    for asked in (image, caption):
        if asked is not None and asked not in names:
            raise UserError(f"data {where}: no column {asked!r}.{nearest(asked, names)}")
    image = image or column(f"data {where}", names, IMAGE_KEYS, "image")
    caption = caption or column(f"data {where}", names, (*CAPTION_KEYS, "txt", "json", "cls"), "caption")
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    labels = table.features[caption]
    if isinstance(labels, datasets.ClassLabel):
        captions = [labels.int2str(i) if i is not None and i >= 0 else "" for i in table[caption]]
    else:
        captions = [text_of(value) for value in table[caption]]

    pictures = table.select_columns([image])  # of a row, all columns would be decoded

    def read(i: int) -> Any:
        value = pictures[i][image]
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if value is None:
            raise BadImage("there is none in its row")
        return Path(value) if isinstance(value, str) else value

    keys = table["__key__"] if "__key__" in names else range(len(table))
    return ImageDataset(captions, [f"{where}[{key}]" for key in keys], read, files=files)


def _files(pattern: str, where: str, suffix: str) -> list[str]:
    """The files that a path, a folder, a glob or a path with {000..012} in it means. Raises UserError for none."""
    if (found := NUMBERS.search(pattern)) and not os.path.exists(os.path.expanduser(pattern)):
        first, last = found.groups()
        numbers = (f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1))
        named = (pattern[: found.start()] + number + pattern[found.end() :] for number in numbers)
        return [file for each in named for file in _files(each, where, suffix)]
    if any(c in pattern for c in "*?[") and not os.path.exists(os.path.expanduser(pattern)):
        files = sorted(globbing.glob(os.path.expanduser(pattern), recursive=True))
    else:
        path = existing(pattern, f"data {where}")
        files = sorted(str(p) for p in path.glob(f"[!.]*{suffix}")) if path.is_dir() else [str(path)]
    if not files:
        raise UserError(f"data {where}: no {suffix} files in {pattern}")
    return files


def _split_of(file: str) -> str:
    """The first split that is a word of a name, as in birds_test.parquet and test-00000-of-00001.parquet; else train."""
    words = re.split(r"[-._ \d]+", Path(file).stem.lower())
    return next((word for word in words if word in ("train", *NOT_TRAIN)), "train")


@dataset_export("parquet")
@dataclass(frozen=True)
class ParquetConfig:
    """Parquet files with a column of encoded pictures and one of captions. path: a file, a folder, a glob or a {000..012}.

    Of files named after splits, as on the hub (train-00000-of-00001.parquet, birds_test.parquet), those of the split are
    taken.
    split_column: where there is one, so are the rows whose value in it is the split; else all are of split train.
    """

    path: str
    image: str | None = None
    caption: str | None = None
    size: int = 64
    flip: bool = False
    channels: Literal[1, 3] = 3
    buckets: Buckets | None = None  # data/buckets.py
    split_column: str = "split"

    def build(self, split: str = "train") -> ImageDataset:
        """Raises UserError for files, columns or splits that are not there."""
        files = _files(self.path, "parquet", ".parquet")
        told = [file for file in files if _split_of(file) == split]
        own = told or files
        table = _open(
            "parquet", "parquet", "train", data_files=[globbing.escape(file) for file in own]
        )  # it takes patterns
        if self.split_column in table.column_names:
            values = table.with_format("arrow")[self.split_column][:].to_pylist()
            rows = [i for i, value in enumerate(values) if value == split]
            if not rows:
                raise UserError(f"data parquet: no row is of split {split!r}.{nearest(split, set(map(str, values)))}")
            table = table.select(rows)
        elif self.split_column != "split" or (split != "train" and not told):
            near = nearest(self.split_column, table.column_names)
            raise UserError(f"data parquet: no column {self.split_column!r} for split {split!r}.{near}")
        return bucketed(_captioned(table, "parquet", self.image, self.caption, own), self.buckets, self.size)


@dataset_export("hub")
@dataclass(frozen=True)
class HubConfig:
    """A data set of the Hugging Face hub, or a local folder in its layout. repo: "owner/name"."""

    repo: str
    subset: str | None = None
    image: str | None = None
    caption: str | None = None
    size: int = 64
    flip: bool = False
    channels: Literal[1, 3] = 3
    buckets: Buckets | None = None  # data/buckets.py

    def build(self, split: str = "train") -> ImageDataset:
        table = _open(self.repo, self.repo, split, name=self.subset)
        files = [each["filename"] for each in table.cache_files]
        return bucketed(_captioned(table, self.repo, self.image, self.caption, files), self.buckets, self.size)
