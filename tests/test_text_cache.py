"""The cache of embeddings: by content, shared, and never in the way."""

from __future__ import annotations

import multiprocessing
import sqlite3
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest
import torch

from genflow.text import cache as cache_module
from genflow.text.cache import EmbeddingCache


def rows(captions: list[str]) -> list[dict[str, torch.Tensor]]:
    return [{"tokens": torch.full((2, 3), float(len(c)))} for c in captions]


def test_cache_survives_damage(tmp_path):
    cache = EmbeddingCache(tmp_path, "x")
    first = cache.get(["a", "bb"], rows)
    base = sqlite3.connect(cache.path)
    with base:
        base.execute("UPDATE rows SET data = ? WHERE rowid = 1", (b"junk",))
    base.close()
    again = cache.get(["a", "bb"], rows)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(first, again, strict=True))
    cache.path.write_bytes(b"this is no database" * 100)
    with pytest.warns(UserWarning, match="beginning it anew"):
        assert len(cache.get(["a"], rows)) == 1
    assert cache.get(["a"], lambda _: pytest.fail("computed again"))[0]["tokens"][0, 0] == 1


def test_a_row_is_of_its_own_caption(tmp_path):
    cache = EmbeddingCache(tmp_path, "x")
    cache.get(["a", "bb"], rows)
    with closing(sqlite3.connect(cache.path)) as base, base:  # as a damaged index answers
        base.execute("UPDATE rows SET data = (SELECT data FROM rows WHERE rowid = 2)")
    assert [float(row["tokens"][0, 0]) for row in cache.get(["a", "bb"], rows)] == [1, 2]


def test_a_damaged_schema_is_begun_anew(tmp_path):
    cache = EmbeddingCache(tmp_path, "x")
    cache.get(["a"], rows)
    content = cache.path.read_bytes()
    cache.path.write_bytes(content.replace(b"CREATE TABLE", b"CREATE \xcb\xff\xfe\xcb\xff"))
    with pytest.warns(UserWarning, match="beginning it anew"):
        assert len(cache.get(["a"], rows)) == 1


def test_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="going on without it"):
        assert len(EmbeddingCache(tmp_path / "file" / "below", "x").get(["a"], rows)) == 1


def test_a_damaged_cache_that_cannot_be_removed_is_done_without(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    cache = EmbeddingCache(tmp_path, "x")
    cache.path.write_bytes(b"this is no database" * 100)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.warns(UserWarning, match="going on without it"):
        assert len(cache.get(["a"], rows)) == 1


def test_cache_is_by_content(tmp_path):
    calls: list[list[str]] = []

    def compute(captions):
        calls.append(captions)
        return rows(captions)

    EmbeddingCache(tmp_path, "x").get(["a", "b", "a"], compute)
    EmbeddingCache(tmp_path, "x").get(["b", "c"], compute)
    EmbeddingCache(tmp_path, "y").get(["b"], compute)
    assert calls == [["a", "b"], ["c"], ["b"]]


def test_a_full_disk_costs_nothing_but_the_cache(tmp_path, monkeypatch):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    calls = []
    monkeypatch.setattr(cache_module, "_write", full)
    cache = EmbeddingCache(tmp_path, "x")
    with pytest.warns(UserWarning, match="disk is full.; going on without it") as caught:
        for _ in range(3):
            assert len(cache.get(["a", "b"], lambda c: calls.append(c) or rows(c))) == 2
    assert len(caught) == 1 and len(calls) == 3  # warned of once, computed once each time


def test_a_flipped_bit_is_noticed(tmp_path):
    cache = EmbeddingCache(tmp_path, "x")
    cache.get(["a"], rows)
    with closing(sqlite3.connect(cache.path)) as base, base:
        (data,) = base.execute("SELECT data FROM rows").fetchone()
        base.execute("UPDATE rows SET data = ?", (data[:-1] + bytes([data[-1] ^ 1]),))
    assert torch.equal(cache.get(["a"], rows)[0]["tokens"], rows(["a"])[0]["tokens"])


def test_rows_of_a_text_cache_are_written_one_by_one():
    class Base:
        def __enter__(self): ...

        def __exit__(self, *_): ...

        def executemany(self, _, rows):
            for _ in rows:
                pass

    rows = {str(i): {"states": torch.zeros(2**18)} for i in range(16)}  # 1 MiB each
    tracemalloc.start()
    cache_module._write(Base(), rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 2**20


def fill(folder, begin: int) -> None:
    for i in range(begin, begin + 40):
        EmbeddingCache(folder, "x").get([str(i), str(i + 1)], rows)


def test_processes_share_a_cache(tmp_path):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=fill, args=(tmp_path, begin)) for begin in (0, 10, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    known = [str(i) for i in range(61)]
    got = EmbeddingCache(tmp_path, "x").get(known, lambda _: pytest.fail("something was lost"))
    assert [row["tokens"][0, 0] for row in got] == [len(c) for c in known]
