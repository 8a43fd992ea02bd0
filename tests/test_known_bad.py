"""The table of known-bad combinations: each row is looked at, stands for a public issue, and says when it can go."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch

import genflow
from genflow import registry
from genflow.attention import Call, choose, known_bad
from genflow.attention.known_bad import KNOWN_BAD
from genflow.errors import UserError

BACKWARD = frozenset({"backward"})
# For each row: the torch and the card that have it, a call that it hits, and changes of which each makes it harmless.
ROWS = {
    "pytorch/pytorch#196678": (
        (2, 13),
        (9, 0),
        Call("cuda", torch.bfloat16, 64, "keys", 704, 704, BACKWARD),
        [{"mask": "causal"}, {"lk": 640}, {"needs": frozenset()}],
    ),
    "pytorch/pytorch#162588": (
        (2, 13),
        (9, 0),
        Call("cuda", torch.bfloat16, 64, "dense", 65537, 65537),
        [{"mask": "none"}, {"lq": 65536, "lk": 65536}],
    ),
    "pytorch/pytorch#195910": (
        (2, 13),
        (0, 0),
        Call("mps", torch.float16, 64, "causal", 64, 64),
        [{"mask": "none"}, {"dtype": torch.float32}, {"device": "cpu"}],
    ),
    "pytorch/pytorch#174861": (
        (2, 10),
        (0, 0),
        Call("mps", torch.bfloat16, 64, "none", 1, 1024),
        [{"dtype": torch.float32}],
    ),
}


def on(monkeypatch, version, capability):
    monkeypatch.setattr(known_bad, "torch_version", lambda: version)
    monkeypatch.setattr(known_bad, "capability", lambda: capability)


@pytest.mark.parametrize("row", KNOWN_BAD, ids=lambda row: row.issue)
def test_a_row_keeps_its_backends_from_such_calls_and_no_others(row, monkeypatch):
    version, capability, call, harmless = ROWS[row.issue]
    on(monkeypatch, version, capability)
    assert row.backends <= {*registry.names("attention")}
    for name in row.backends:
        assert row.issue in " ".join(registry.resolve("attention", name)().refusals(call))
        with pytest.raises(UserError, match=row.issue):
            choose(name, call)
    assert choose("auto", call).name not in row.backends
    for change in harmless:
        assert not row.hits(next(iter(row.backends)), call._replace(**change)), change


@pytest.mark.parametrize("row", KNOWN_BAD, ids=lambda row: row.issue)
def test_a_row_holds_for_its_versions_and_cards(row, monkeypatch):
    version, capability, call, _ = ROWS[row.issue]
    name = next(iter(row.backends))
    if row.since:
        on(monkeypatch, (row.since[0], row.since[1] - 1), capability)
        assert not row.hits(name, call)
    if row.fixed:
        on(monkeypatch, row.fixed, capability)
        assert not row.hits(name, call)
    if row.capability:
        on(monkeypatch, version, (8, 0))
        assert not row.hits(name, call)
    on(monkeypatch, version, capability)
    assert row.hits(name, call)


@pytest.mark.parametrize("row", KNOWN_BAD, ids=lambda row: row.issue)
def test_a_row_still_concerns_a_torch_that_genflow_supports(row):
    """When this fails, the row can go."""
    assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", row.issue) and row.reason
    project = tomllib.loads((Path(genflow.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    (oldest,) = (re.fullmatch(r"torch>=(\d+)\.(\d+).*", d) for d in project["dependencies"] if re.match(r"torch\W", d))
    assert row.fixed is None or row.fixed > (int(oldest[1]), int(oldest[2]))


def test_a_causal_mask_counts_where_it_has_to_be_written_out(monkeypatch):
    on(monkeypatch, (2, 13), (9, 0))
    call = Call("cuda", torch.bfloat16, 64, "causal", 704, 704, BACKWARD)
    assert choose("auto", call).name == "sdpa"
    assert choose("auto", call._replace(lq=8)).name == "sdpa_efficient"


def test_lengths_that_a_compiled_graph_does_not_know_count_as_hit(monkeypatch):
    on(monkeypatch, (2, 13), (9, 0))
    call = Call("cuda", torch.bfloat16, 64, "keys", needs=BACKWARD)
    assert choose("auto", call).name == "sdpa_efficient"
    assert (
        choose("auto", call._replace(mask="none")).name == choose("auto", call._replace(mask="causal")).name == "sdpa"
    )


def test_this_machine_is_looked_at():
    assert known_bad.torch_version() == tuple(map(int, torch.__version__.split(".")[:2]))
    assert (known_bad.capability() == (0, 0)) != torch.cuda.is_available()
