"""Embeddings on disk, by content: a small database per encoder."""

from __future__ import annotations

import hashlib
import sqlite3
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

Row = dict[str, Tensor]


class EmbeddingCache:
    """Rows of tensors by caption, for one encoder identity. A cache that cannot be used is done without, with a warning."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.sqlite"

    def get(self, captions: Sequence[str], compute: Callable[[list[str]], list[Row]]) -> list[Row]:
        """The rows of captions, those missing or damaged computed and added."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=60)) as base:
                base.execute("CREATE TABLE IF NOT EXISTS rows (caption TEXT PRIMARY KEY, data BLOB)")
                found = self._read(base, captions)
                missing = [c for c in dict.fromkeys(captions) if c not in found]
                if missing:
                    computed = dict(zip(missing, compute(missing), strict=True))
                    found |= computed
                    with base:
                        rows = ((_key(c), save(row)) for c, row in computed.items())
                        base.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", rows)
            return [found[c] for c in captions]
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, sqlite3.DatabaseError) and "malformed" in str(error) or "not a database" in str(error):
                self.path.unlink(missing_ok=True)  # damaged as a whole: start it again next time
            warnings.warn(f"text cache {self.path} cannot be used ({error}); going on without it", stacklevel=2)
            return compute(list(captions))

    def _read(self, base: sqlite3.Connection, captions: Sequence[str]) -> dict[str, Row]:
        found = {}
        for caption in dict.fromkeys(captions):
            row = base.execute("SELECT data FROM rows WHERE caption = ?", (_key(caption),)).fetchone()
            if row is not None:
                try:
                    found[caption] = load(row[0])
                except (SafetensorError, TypeError):
                    continue
        return found


def _key(caption: str) -> str:
    return hashlib.sha256(caption.encode("utf-8", errors="surrogatepass")).hexdigest()
