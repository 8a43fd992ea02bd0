"""Folders of pictures: captions beside them, in one table, or from the names of subfolders."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from genflow.data.buckets import Buckets, bucketed
from genflow.data.images import SUFFIXES, ImageDataset
from genflow.errors import UserError, nearest
from genflow.registry import dataset_export

TABLES = ("metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.csv")
FILE_KEYS = ("file_name", "image", "file", "path")
CAPTION_KEYS = ("caption", "text", "prompt", "label")


def existing(path: str, what: str) -> Path:
    """The path, or a UserError that names the nearest one there is."""
    if not path.strip():
        raise UserError(f"{what}: its path is empty; name a folder or a file")
    try:
        folder = Path(path).expanduser()
        if folder.exists():
            return folder
        around = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else None
    except RuntimeError as error:  # ~ of nobody
        raise UserError(f"{what}: {path[:80]}: {error}") from error
    except OSError as error:
        raise UserError(f"{what}: {path[:80]}: {error.strerror}") from error
    near = f" {folder.parent} is not there either." if around is None else nearest_name(folder.name, around)
    raise UserError(f"{what}: {folder} does not exist.{near}")


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The question whether one of them was meant, or nothing: a folder may hold too many names to list."""
    near = nearest(name, names)
    return near if near.startswith(" Did you mean") else ""


@dataset_export("folder")
@dataclass(frozen=True)
class FolderConfig:
    """Pictures in a folder, captioned in one of three ways.

    1. a table in it: metadata.jsonl, captions.jsonl or the same as .csv, with a file and a caption column;
    2. a text file beside each picture, of the same name; 3. else the name of each picture's subfolder is its class.
    A subfolder named like the split (train, test) is taken where there is one. buckets: shapes of several aspect ratios
    in place of size x size (data/buckets.py).
    """

    path: str
    size: int = 64
    flip: bool = False
    channels: Literal[1, 3] = 3
    buckets: Buckets | None = None

    def build(self, split: str = "train") -> ImageDataset:
        """Raises UserError for a folder that is missing or empty, and for captions without pictures."""
        return bucketed(self._open(split), self.buckets, self.size)

    def _open(self, split: str) -> ImageDataset:
        root = existing(self.path, "data folder")
        if not root.is_dir():
            raise UserError(f"data folder: {root} is a file, not a folder")
        if (root / split).is_dir():
            root = root / split
        elif split != "train":
            near = nearest_name(split, [p.name for p in root.iterdir() if p.is_dir()])
            raise UserError(f"data folder: {root} has no subfolder {split!r} for that split.{near}")
        for name in TABLES:
            if (root / name).is_file():
                return _from_table(root / name)
        pictures = sorted(p for p in root.rglob("*") if _is_picture(p))
        if not pictures:
            texts = len(list(root.rglob("*.txt")))
            beside = f" ({texts} .txt files are there, but no pictures beside them)" if texts else ""
            raise UserError(f"data folder: {root} holds no pictures{beside}; known are {' '.join(sorted(SUFFIXES))}")
        captions = [_caption_of(p, root) for p in pictures]
        return ImageDataset(captions, [str(p.relative_to(root)) for p in pictures], pictures.__getitem__)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _caption_of(picture: Path, root: Path) -> str:
    text = picture.with_suffix(".txt")
    if text.is_file():
        return " ".join(text.read_text(encoding="utf-8", errors="replace").split())
    return picture.parent.name.replace("_", " ") if picture.parent != root else ""


def _from_table(table: Path) -> ImageDataset:
    rows = _read_csv(table) if table.suffix == ".csv" else _read_jsonl(table)
    if not rows:
        raise UserError(f"{table}: no captions in it")
    file_key, caption_key = column(table, rows[0], FILE_KEYS, "file"), column(table, rows[0], CAPTION_KEYS, "caption")
    files = [str(r.get(file_key) or "") for r in rows]
    paths = [table.parent / name for name in files]
    missing = [i for i, path in enumerate(paths) if not os.path.isfile(path)]  # False, too, for what can be no name
    if len(missing) == len(paths):
        raise UserError(f"{table}: none of its {len(paths)} pictures exists, for example {files[0][:80]}")
    if missing:
        name, path = files[missing[0]][:80], paths[missing[0]]
        near = nearest_name(path.name, os.listdir(path.parent)) if os.path.isdir(path.parent) else ""
        raise UserError(f"{table}: row {missing[0] + 1} names {name or 'nothing'}, which does not exist.{near}")
    return ImageDataset([str(r.get(caption_key) or "") for r in rows], files, paths.__getitem__)


def _read_csv(table: Path) -> list[dict[str, Any]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: not a table of comma-separated UTF-8 text: {error}") from error


def _read_jsonl(table: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(table.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{table}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f'{table}:{number}: not an object such as {{"file_name": "a.png", "caption": "a cat"}}')
            rows.append(row)
    return rows


def column(where: object, row: Iterable[str], keys: tuple[str, ...], what: str) -> str:
    """The first of the usual names that a table has."""
    for key in keys:
        if key in row:
            return key
    raise UserError(f"{where}: no {what} column; it has {', '.join(map(str, row))}, known are {', '.join(keys)}")
