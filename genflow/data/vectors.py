"""Vectors with captions, and tables of numbers: standardised, split by what is in their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genflow.data.folders import existing, text_of
from genflow.errors import UserError, nearest
from genflow.functional import Rng, double
from genflow.registry import api_export, dataset_export

SPLITS = ("train", "test", "validation")
SUFFIXES = (".csv", ".tsv", ".npy", ".npz", ".parquet")


@api_export("VectorDataset")
class VectorDataset:
    """Captioned vectors by number.

    rows: N x D float32, as a model sees them, standardised; captions: one each, may be empty; identifiers: what a log
    calls each; columns: the name of each of the D numbers; mean, std: D float64, of the training rows before they were
    standardised; log_prob: the exact density that rows were drawn from, N x D -> N nats, where it is known.
    """

    def __init__(
        self,
        rows: Tensor,
        captions: list[str],
        identifiers: list[str],
        *,
        columns: list[str] | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        log_prob: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.rows = rows
        self.captions = captions
        self.identifiers = identifiers
        dim = rows.shape[1]
        self.columns = columns or [f"x{i + 1}" for i in range(dim)]
        self.mean = torch.zeros(dim, dtype=torch.float64) if mean is None else mean
        self.std = torch.ones(dim, dtype=torch.float64) if std is None else std
        self.log_prob = log_prob

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one vector: (D,)."""
        return tuple(self.rows.shape[1:])

    def __len__(self) -> int:
        return len(self.captions)

    def restore(self, rows: Tensor) -> Tensor:
        """Standardised rows in the units of the table. B x D -> B x D float64."""
        wide = double(rows)
        return wide * self.std.to(wide.device) + self.mean.to(wide.device)


@dataset_export("table")
@dataclass(frozen=True)
class TableConfig:
    """A table of numbers (.csv, .tsv, .npy, .npz, .parquet), each column brought to mean 0 and deviation 1 in training.

    columns: which to take; empty means all but the label, the split and, in text, those without a name. Those of arrays
    are called 0, 1, ..., or name[0], name[1], ... in an .npz. label: the column that becomes the caption. split_column: rows
    whose value in it is the split are taken. Without one, test and validation are the parts of the rows, 0 to 1, that go
    there; which, hangs on the numbers in a row, so that equal rows stay together, whatever their order.
    """

    path: str
    columns: tuple[str, ...] = ()
    label: str | None = None
    split_column: str | None = None
    test: float = 0.1
    validation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("test", "validation"):
            if not 0 <= (part := getattr(self, name)) < 1:
                raise UserError(f"{name} = {part} is not a part of the rows, 0 to 1; try 0.1")
        if self.test + self.validation >= 1:
            raise UserError(f"test = {self.test} and validation = {self.validation} leave no row to train on")

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,), from the file's header. Raises UserError."""
        return (len(self._chosen(_open(self.path).names)),)

    def build(self, split: str = "train") -> VectorDataset:
        """Raises UserError for columns and splits that are not there, cells that are no numbers, constant columns."""
        table = _open(self.path, texts=(self.label, self.split_column))
        names = self._chosen(table.names)
        values = np.stack([_numbers(table, name) for name in names], 1) + 0.0  # -0 is 0
        if not len(values):
            raise UserError(f"data table: {table.path} has no row but its header")
        splits = self._splits(table, values)
        training, taken = (np.flatnonzero(splits == each) for each in ("train", split))
        if not len(taken) or not len(training):
            known = sorted(set(map(str, splits)))
            missing = split if len(training) else "train"
            raise UserError(f"data table: {table.path} has no row of split {missing!r}.{nearest(missing, known)}")
        mean = values[training].mean(0)
        with np.errstate(over="ignore", invalid="ignore"):
            spread, std = np.ptp(values[training], 0), values[training].std(0)
        reach = np.finfo(np.float32)
        for name, width, centre, deviation in zip(names, spread, mean, std, strict=True):
            if width <= 1e-12 * abs(centre):
                raise UserError(
                    f"data table: column {name!r} of {table.path} is {centre:g} in all {len(training)} training rows, "
                    "and a constant has no density; leave it out of `columns`"
                )
            if not reach.tiny <= deviation <= reach.max:
                raise UserError(
                    f"data table: column {name!r} of {table.path} has a standard deviation of {deviation:g}, out of "
                    f"float32's reach ({reach.tiny:g} to {reach.max:g}); give it in another unit"
                )
        labels = _texts(table, self.label) if self.label else np.full(len(values), "")
        return VectorDataset(
            torch.from_numpy((values[taken] - mean) / std).float(),
            labels[taken].tolist(),
            [f"{table.path.name}[{i + 1}]" for i in taken.tolist()],
            columns=names,
            mean=torch.from_numpy(mean),
            std=torch.from_numpy(std),
        )

    def _chosen(self, names: list[str]) -> list[str]:
        """The columns of numbers, by name."""
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"data table: {self.path} has two columns {doubled[0]!r}; give each a name of its own")
        others = [name for name in (self.label, self.split_column) if name is not None]
        for asked in (*self.columns, *others):
            if asked not in names:
                raise UserError(f"data table: {self.path} has no column {asked!r}.{nearest(asked, names)}")
        if twice := [name for name in self.columns if self.columns.count(name) > 1 or name in others]:
            raise UserError(f"data table: column {twice[0]!r} is asked for twice")
        chosen = list(self.columns) or [name for name in names if name not in others]
        if not chosen:
            raise UserError(f"data table: no column of {self.path} is left but {', '.join(others) or 'none'}")
        return chosen

    def _splits(self, table: _Table, values: np.ndarray) -> np.ndarray:
        """The split of each row."""
        if self.split_column is not None:
            return _texts(table, self.split_column)
        state = torch.zeros(len(values), dtype=torch.int64)
        for column in torch.from_numpy(values).view(torch.int64).unbind(1):
            state = Rng(0).bits("table", state ^ column)
        place = Rng(0).uniform("split", state).numpy()
        return np.where(place < self.test, "test", np.where(place < self.test + self.validation, "validation", "train"))


# ---------------------------------------------------------------------------------------------------------- the file


@dataclass(frozen=True)
class _Table:
    """An open table: the names of its columns, and how to read one, as an array or an arrow array."""

    path: Path
    names: list[str]
    read: Callable[[str], Any]


def _open(path: str, *, texts: Sequence[str | None] = ()) -> _Table:
    """texts: columns to be read as they are written, 01 as 01. Raises UserError for what is no table."""
    file = existing(path, "data table")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES or file.is_dir():
        raise UserError(f"data table: {file} is none of the tables known: {' '.join(SUFFIXES)}")
    opener = {".npy": _arrays, ".npz": _arrays, ".parquet": _parquet}.get(suffix, partial(_text, texts=texts))
    try:
        return opener(file)
    except UserError:
        raise
    except Exception as error:  # of the libraries, on damaged files
        raise UserError(f"data table: {file} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _arrays(file: Path) -> _Table:
    try:
        loaded = np.load(file, allow_pickle=False)
    except ValueError as error:  # NumPy takes anything it does not know for a pickle, and offers to run it
        raise UserError(f"data table: {file} holds no NumPy array of numbers") from error
    arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    columns: dict[str, Any] = {}
    for name, array in arrays.items():
        if array.ndim == 1 and name:
            columns[name] = array
        elif array.ndim == 2:
            columns |= {f"{name}[{j}]" if name else str(j): array[:, j] for j in range(array.shape[1])}
        else:
            raise UserError(f"data table: {file} has an array of shape {array.shape}, not rows x columns")
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name or file.name}: {len(array)}" for name, array in arrays.items())
        raise UserError(f"data table: the arrays of {file} have different numbers of rows ({lengths})")
    return _Table(file, list(columns), columns.__getitem__)


def _parquet(file: Path) -> _Table:
    import pyarrow.parquet as pq

    names = [
        name for name in pq.read_schema(file).names if not name.startswith("__index_level_")
    ]  # pandas's row numbers
    return _Table(file, names, lambda name: pq.read_table(file, columns=[name]).column(0))


def _text(file: Path, texts: Sequence[str | None]) -> _Table:
    """A first line with a number in it is no header: the columns are then called 0, 1, ...

    But for one that counts them so itself, as pandas does; its row numbers stand in a column without a name, left out.
    """
    import csv

    import pyarrow as pa
    from pyarrow import csv as arrow

    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter)
        first = next(filter(None, reader), [])
    named, counted = [cell for cell in first if cell], [str(j) for j in range(len(first))]
    headless = named != counted[: len(named)] and any(np.isfinite(_float(cell)) for cell in first)
    read = arrow.ReadOptions(column_names=counted if headless else first, skip_rows=0 if headless else reader.line_num)
    parse = arrow.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    convert = arrow.ConvertOptions(column_types={name: pa.string() for name in texts if name is not None})
    held: list[Any] = []

    def check_quotes() -> None:
        """Arrow takes one that is left open to hold the rows behind it."""
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            if not any('"' in line for line in lines):
                return
            lines.seek(0)
            reader = csv.reader(map(str.rstrip, lines), delimiter=delimiter, strict=True)
            try:
                for _ in reader:
                    pass
            except csv.Error as error:
                raise ValueError(f"line {reader.line_num}: {error}; look at its quotes") from error

    def column(name: str) -> Any:
        if not held:
            check_quotes()
            held.append(arrow.read_csv(file, read_options=read, parse_options=parse, convert_options=convert))
        return held[0].column(name)

    return _Table(file, counted if headless else named, column)


def _column(table: _Table, name: str) -> np.ndarray:
    """As an array of numbers or of objects, None where there is nothing. Raises UserError."""
    try:
        column = table.read(name)
    except Exception as error:  # arrow reads, and complains, when a column is asked for
        raise UserError(f"data table: {table.path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if isinstance(column, np.ndarray):
        return column
    return np.array(column.to_pylist(), dtype=object) if column.null_count else column.to_numpy()


def _numbers(table: _Table, name: str) -> np.ndarray:
    """A column as float64. Raises UserError, with the row, for what is missing, no number or not finite."""
    column = _column(table, name)
    if column.dtype.kind in "cmM":  # complex numbers and times, which NumPy would make real ones
        raise UserError(
            f"data table: column {name!r} of {table.path} is of {column.dtype}, no real numbers; leave it out"
        )
    values = column.astype(np.float64) if column.dtype.kind in "biuf" else np.array([_float(cell) for cell in column])
    wrong = np.flatnonzero(~np.isfinite(values))
    if not len(wrong):
        return values
    row = int(wrong[0])
    cell = column[row].item() if isinstance(column[row], np.generic) else column[row]
    what = "nothing, or NaN" if isinstance(cell, str | None) and not cell else repr(cell)
    raise UserError(
        f"data table: {table.path}, column {name!r}: row {row + 1} holds {what[:60]}, no finite number; "
        "mend or remove the row, or leave the column out of `columns`"
    )


def _float(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return np.nan


def _texts(table: _Table, name: str) -> np.ndarray:
    return np.array([text_of(cell) for cell in _column(table, name).tolist()], dtype=np.str_)
