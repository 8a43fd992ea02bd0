"""Folders of pictures: captions beside them, in one table, or from the names of subfolders."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from genflow.data.images import SUFFIXES, ImageDataset
from genflow.errors import UserError, nearest
from genflow.registry import dataset_export

TABLES = ("metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.csv")
FILE_KEYS = ("file_name", "image", "file", "path")
CAPTION_KEYS = ("caption", "text", "prompt", "label")


def existing(path: str, what: str) -> Path:
    """The path, or a UserError that names the nearest one there is."""
    folder = Path(path).expanduser()
    if not folder.exists():
        parent = folder.parent
        around = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        near = nearest(folder.name, around) if around else f" {parent} is not there either."
        raise UserError(f"{what}: {folder} does not exist.{near if 'mean' in near or not around else ''}")
    return folder


@dataset_export("folder")
@dataclass(frozen=True)
class FolderConfig:
    """Pictures in a folder, captioned in one of three ways.

    1. a table in it: metadata.jsonl, captions.jsonl or the same as .csv, with a file and a caption column;
    2. a text file beside each picture, of the same name; 3. else the name of each picture's subfolder is its class.
    A subfolder named like the split (train, test) is taken where there is one.
    """

    path: str
    size: int = 64
    flip: bool = False
    channels: int = 3

    def build(self, split: str = "train") -> ImageDataset:
        """Raises UserError for a folder that is missing or empty, and for captions without pictures."""
        root = existing(self.path, "data folder")
        if not root.is_dir():
            raise UserError(f"data folder: {root} is a file, not a folder")
        if (root / split).is_dir():
            root = root / split
        elif split != "train":
            raise UserError(f"data folder: {root} has no subfolder {split!r} for that split")
        for name in TABLES:
            if (root / name).is_file():
                return _from_table(root / name)
        pictures = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not pictures:
            texts = len(list(root.rglob("*.txt")))
            beside = f" ({texts} .txt files are there, but no pictures beside them)" if texts else ""
            raise UserError(f"data folder: {root} holds no pictures{beside}; known are {' '.join(sorted(SUFFIXES))}")
        captions = [_caption_of(p, root) for p in pictures]
        return ImageDataset(captions, [str(p.relative_to(root)) for p in pictures], pictures.__getitem__)


def _caption_of(picture: Path, root: Path) -> str:
    text = picture.with_suffix(".txt")
    if text.is_file():
        return " ".join(text.read_text(encoding="utf-8", errors="replace").split())
    return picture.parent.name.replace("_", " ") if picture.parent != root else ""


def _from_table(table: Path) -> ImageDataset:
    rows: list[dict]
    try:
        with table.open(encoding="utf-8", newline="") as file:
            if table.suffix == ".csv":
                rows = list(csv.DictReader(file))
            else:
                rows = []
                for number, line in enumerate(file, 1):
                    try:
                        rows += [json.loads(line)] if line.strip() else []
                    except ValueError as error:
                        raise UserError(f"{table}:{number}: not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: not UTF-8 text") from error
    if not rows:
        raise UserError(f"{table}: no captions in it")
    file_key, caption_key = column(table, rows[0], FILE_KEYS, "file"), column(table, rows[0], CAPTION_KEYS, "caption")
    paths = [table.parent / str(r.get(file_key)) for r in rows]
    missing = [(i, p) for i, p in enumerate(paths) if not p.is_file()]
    if missing:
        i, path = missing[0]
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        if len(missing) == len(paths):
            raise UserError(f"{table}: none of its {len(paths)} pictures exists, for example {path}")
        raise UserError(f"{table}: row {i + 1} names {path.name}, which does not exist.{near if 'mean' in near else ''}")
    captions = [str(r.get(caption_key) or "") for r in rows]
    return ImageDataset(captions, [str(p.relative_to(table.parent)) for p in paths], paths.__getitem__)


def column(where: object, row: dict, keys: tuple[str, ...], what: str) -> str:
    """The first of the usual names that a table has."""
    for key in keys:
        if key in row:
            return key
    raise UserError(f"{where}: no {what} column; it has {', '.join(map(str, row))}, known are {', '.join(keys)}")
