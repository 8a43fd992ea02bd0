"""Folders of pictures: captions beside them, in one table, or from the names of subfolders."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
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
# Of a table; its first group is one in quotes, with blanks behind it.
CELL = re.compile(r'("(?:[^"]|"")*+")[ \t]+(?=[,\r\n]|$)|"(?:[^"]|"")*+"|[^",\r\n][^,\r\n]*')
NOT_TRAIN = ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")  # names of other splits


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
    A subfolder named like the split (train, test) is taken where there is one, with a table in it or its rows of one
    beside it; else train is what lies in no subfolder of another split (test, val). buckets: shapes of several aspect
    ratios in place of size x size (data/buckets.py).
    """

    path: str
    size: int = 64
    flip: bool = False
    channels: Literal[1, 3] = 3
    buckets: Buckets | None = None

    def build(self, split: str = "train") -> ImageDataset:
        """Raises UserError for a folder that is missing or empty, and for captions without pictures."""
        try:
            found = self._open(split)
        except PermissionError as error:
            raise UserError(f"data folder: {error.filename or self.path}: {error.strerror}") from error
        return bucketed(found, self.buckets, self.size)

    def _open(self, split: str) -> ImageDataset:
        root = existing(self.path, "data folder")
        if not root.is_dir():
            raise UserError(f"data folder: {root} is a file, not a folder")
        folder, others = root / split, []
        if not folder.is_dir():
            if split != "train":
                there = sorted(p.name for p in root.iterdir() if p.is_dir())
                near = nearest_name(split, there) or next(
                    (f" Did you mean {name!r}?" for name in there if name.lower() in NOT_TRAIN),
                    " Make one, or ask for split 'train'.",
                )
                raise UserError(f"data folder: {root} has no subfolder {split!r} for that split.{near}")
            folder, others = root, [p for p in root.iterdir() if p.is_dir() and p.name.lower() in NOT_TRAIN]
        mine: Callable[[Path], bool] = lambda path: not any(map(path.is_relative_to, others))
        inside: Callable[[Path], bool] = lambda path: path.is_relative_to(folder)
        for table, taken in ((place / name, how) for place, how in ((folder, mine), (root, inside)) for name in TABLES):
            if table.is_file() and (found := _from_table(table, taken)):
                return found
        pictures = sorted(p for p in _below(folder) if _is_picture(p.relative_to(folder), folder) and mine(p))
        if not pictures:
            texts = sum(p.suffix == ".txt" for p in _below(folder))
            beside = f" ({texts} .txt files are there, but no pictures beside them)" if texts else ""
            but = f" outside {', '.join(p.name for p in others)}" if others else ""
            known = " ".join(sorted(SUFFIXES))
            raise UserError(f"data folder: {folder} holds no pictures{but}{beside}; known are {known}")
        captions = [_caption_of(p, folder) for p in pictures]
        return ImageDataset(captions, [str(p.relative_to(folder)) for p in pictures], pictures.__getitem__)


def _below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """What lies in a folder and in those below it, linked ones too, but for links that lead back up."""
    if (here := folder.resolve()) in above:
        return
    paths: list[Path] = []
    with suppress(PermissionError):  # of a folder that may not be read; a link to where none may look is no folder
        paths += folder.iterdir()
    for path in paths:
        if os.path.isdir(path):
            yield from _below(path, (*above, here))
        else:
            yield path


def _is_picture(name: Path, folder: Path) -> bool:
    """Of a path within a folder; what is hidden is none."""
    hidden = any(part.startswith(".") for part in name.parts)
    return name.suffix.lower() in SUFFIXES and not hidden and (folder / name).is_file()


def _caption_of(picture: Path, root: Path) -> str:
    text = picture.with_suffix(".txt")
    if text.is_file():
        return " ".join(decoded(text.read_bytes()).split())
    return picture.parent.name.replace("_", " ") if picture.parent != root else ""


def _from_table(table: Path, taken: Callable[[Path], bool]) -> ImageDataset | None:
    """The pictures of a table that are to be taken; None where it has none of them."""
    rows = _read_csv(table) if table.suffix == ".csv" else _read_jsonl(table)
    if not rows:
        raise UserError(f"{table}: no captions in it")
    file_key = column(table, rows[0], FILE_KEYS, "file")
    column(table, dict.fromkeys(key for row in rows for key in row), CAPTION_KEYS, "caption")
    files = [str(row.get(file_key) or "") for row in rows]
    numbers = [i for i, name in enumerate(files) if taken(table.parent / name)]
    if not numbers:
        return None
    files = [files[i] for i in numbers]
    paths = [table.parent / name for name in files]
    missing = [i for i, path in enumerate(paths) if not os.path.isfile(path)]  # False, too, for what can be no name
    if len(missing) == len(paths):
        raise UserError(f"{table}: none of its {len(paths)} pictures exists, for example {files[0][:80]}")
    if missing:
        name, path = files[missing[0]][:80], paths[missing[0]]
        near = nearest_name(path.name, os.listdir(path.parent)) if os.path.isdir(path.parent) else ""
        raise UserError(
            f"{table}: row {numbers[missing[0]] + 1} names {name or 'nothing'}, which does not exist.{near}"
        )
    captions = [text_of(next((rows[i][key] for key in CAPTION_KEYS if key in rows[i]), None)) for i in numbers]
    return ImageDataset(captions, files, paths.__getitem__)


def _read_csv(table: Path) -> list[dict[str, Any]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            text = CELL.sub(lambda cell: cell[1] or cell[0], file.read())
        # Strict, or a quote left open takes in the rows behind it.
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(reader)
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: not a table of comma-separated UTF-8 text: {error}") from error
    except csv.Error as error:
        doubled = "put a caption with quotes in quotes, each of its own written twice"
        raise UserError(f"{table}:{reader.reader.line_num}: not comma-separated: {error}; {doubled}") from error
    if long := [i for i, row in enumerate(rows, 1) if any(row.get(None, ()))]:  # type: ignore[call-overload]
        raise UserError(f"{table}: row {long[0]} has more cells than the header; put a caption with commas in quotes")
    return rows


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


def decoded(data: bytes) -> str:
    """UTF-8, or UTF-16 where its mark says so, as Windows writes it; what is neither is replaced."""
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if marked else "utf-8-sig", errors="replace")


def text_of(value: Any) -> str:
    """A caption out of a cell: text, bytes, the first of several, or that in a JSON object; empty for None and NaN."""
    while isinstance(value, list | dict):
        if isinstance(value, dict):
            value = [value[key] for key in CAPTION_KEYS if value.get(key) not in (None, "")]
        value = value[0] if value else None
    if isinstance(value, bytes):
        return decoded(value)
    return "" if value is None or value != value else str(value)


def column(where: object, row: Iterable[str], keys: tuple[str, ...], what: str) -> str:
    """The first of the usual names that a table has."""
    for key in keys:
        if key in row:
            return key
    raise UserError(f"{where}: no {what} column; it has {', '.join(map(str, row))}, known are {', '.join(keys)}")
