"""Embeddings on disk, by content: a small database per encoder."""

from __future__ import annotations

import hashlib
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

Row = dict[str, Tensor]
DIGEST = 16  # bytes


class EmbeddingCache:
    """Rows of tensors by caption, for one encoder identity; several processes may use it at once.

    A cache that cannot be read or written is done without, with a warning; what is damaged in it is computed anew.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.sqlite"
        self.usable = True

    def get(self, captions: Sequence[str], compute: Callable[[list[str]], list[Row]]) -> list[Row]:
        """The rows of captions, those missing or damaged computed and added."""
        wanted = list(dict.fromkeys(captions))
        found: dict[str, Row] = {}
        with self._base() as base:
            if base is not None:
                found.update(_read(base, wanted))
        missing = [caption for caption in wanted if caption not in found]
        if missing:
            computed = dict(zip(missing, compute(missing), strict=True))
            found |= computed
            with self._base() as base:
                if base is not None:
                    _write(base, computed)
        return [found[caption] for caption in captions]

    @contextmanager
    def _base(self) -> Iterator[sqlite3.Connection | None]:
        """The database, None if it cannot be used; its errors inside end the block with a warning."""
        if not self.usable:
            yield None
            return
        entered = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=60)) as base:
                base.execute("CREATE TABLE IF NOT EXISTS rows (caption TEXT PRIMARY KEY, data BLOB)")
                entered = True
                yield base
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the last of what a damaged schema is quoted as
            found = isinstance(error, sqlite3.DatabaseError | UnicodeDecodeError)
            damaged = found and not isinstance(error, sqlite3.OperationalError)
            self.usable = damaged and self._removed()
            way = "beginning it anew" if self.usable else "going on without it"
            warnings.warn(f"text cache {self.path} cannot be used ({error}); {way}", stacklevel=4)
            if not entered:
                yield None

    def _removed(self) -> bool:
        try:
            self.path.unlink(missing_ok=True)
        except OSError:
            return False
        return True


def _read(base: sqlite3.Connection, captions: Sequence[str]) -> Iterator[tuple[str, Row]]:
    for caption in captions:
        key = _key(caption)
        row = base.execute("SELECT data FROM rows WHERE caption = ?", (key,)).fetchone()
        if row is not None and isinstance(row[0], bytes) and _digest(key, row[0][DIGEST:]) == row[0][:DIGEST]:
            yield caption, load(row[0][DIGEST:])


def _write(base: sqlite3.Connection, rows: Mapping[str, Row]) -> None:
    with base:  # row by row, so that there is no second copy of all
        data = ((_key(caption), save(row)) for caption, row in rows.items())
        sealed = ((key, _digest(key, each) + each) for key, each in data)
        base.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", sealed)


def _key(caption: str) -> str:
    return hashlib.sha256(caption.encode("utf-8", errors="surrogatepass")).hexdigest()


def _digest(key: str, data: bytes) -> bytes:
    """Of both: a damaged index leads to another caption's row, which is whole."""
    return hashlib.blake2b(key.encode() + data, digest_size=DIGEST).digest()
