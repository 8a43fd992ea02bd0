"""The claims' shared machinery: verdicts, tables, and runs that are taken up again; and every claim at a toy size (slow)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from genflow.flows.store import newest_checkpoint

CLAIMS = Path(__file__).parent.parent / "scripts" / "claims"
SCRIPTS = sorted(path.stem for path in CLAIMS.glob("*.py") if path.stem != "common")
PLANE = {
    "data": {"name": "toy2d", "kind": "moons", "n": 200},
    "model": {"name": "mlp", "hidden": 8, "depth": 1},
    "flow": {"name": "rectified", "density": "uniform"},
    "train": {"batch_size": 8, "precision": "fp32", "decay": 0.0, "log_every": 1, "preview_every": 0, "trackers": []},
    "sample": {"sampler": "euler", "steps": 2, "guidance": 1.0},
}


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))
    import common

    return common


@pytest.fixture
def claim(common, tmp_path):
    return common.Study("toy", "Toys play.", tmp_path / "work", tmp_path / "out", [0, 1], 4, 20, "pixels")


@pytest.mark.parametrize(
    ("gains", "least", "word"),
    [
        ([0.1, 0.12, 0.11], 0.0, "shown"),
        ([-0.1, -0.12, -0.11], 0.0, "contradicted"),
        ([0.1, 0.12, -0.01], 0.0, "not shown at this size"),  # one seed says no
        ([0.01, 0.9, 0.02], 0.0, "not shown at this size"),  # the mean is within two standard errors of nothing
        ([0.1, 0.12, 0.11], 0.2, "not shown at this size"),
        ([0.8, 0.82, 0.81], 0.7, "shown"),
        ([5.0], 0.0, "not shown at this size"),  # one seed shows nothing
        ([math.inf, math.inf, 0.3], 0.0, "shown"),  # the other side left the numbers
        ([math.inf, -0.1, 0.3], 0.0, "not shown at this size"),
        ([0.2, 0.2], 0.0, "shown"),
    ],
)
def test_a_gain_is_shown_where_all_seeds_and_their_spread_say_so(gains, least, word, common):
    assert common.verdict(gains, least) == word


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([0.001, -0.002], "shown"),
        ([0.001, 0.02], "not shown at this size"),
        ([0.03, -0.02], "contradicted"),
        ([0.0], "not shown at this size"),
        ([math.nan, math.nan], "contradicted"),
    ],
)
def test_an_equality_is_shown_where_every_seed_is_within_the_tolerance(differences, word, common):
    assert common.agreement(differences, 0.01) == word


def test_gains_are_mean_logs_of_ratios_seed_by_seed(common):
    results = {
        "a": {"x": [1.0, 2.0, 1.0], "y": [1.0, 1.0, 1.0]},
        "b": {"x": [math.e, 2.0, math.inf], "y": [1.0, 1.0, 1.0]},
    }
    assert common.gains(results, "a", "b", ["x", "y"]) == pytest.approx([0.5, 0.0, math.inf])
    assert common.gains(results, "b", "a", ["x"]) == pytest.approx([-1.0, 0.0, -math.inf])


def test_sections_are_merged_and_another_name_takes_the_place(common):
    base = {"a": {"name": "x", "one": 1, "two": 2}, "b": 1}
    assert common.merged(base, {"a": {"two": 3}}) == {"a": {"name": "x", "one": 1, "two": 3}, "b": 1}
    assert common.merged(base, {"a": {"name": "y"}, "c": 2}) == {"a": {"name": "y"}, "b": 1, "c": 2}
    assert base["a"]["two"] == 2


def test_the_table_has_means_with_spread_and_the_report_its_verdicts(common, claim, capsys):
    results = {
        "one": {"loss": [1.0, 3.0], "FD, 5 steps": [4.0, 4.0], "FD, 50 steps": [1.0, 1.0]},
        "other": {"loss": [2.0, 2.0]},
    }
    claim.report(results, {"one is lower": common.OPEN})
    text = (claim.out / "toy.md").read_text()
    assert (
        "| one | 2.0000 ± 1.4142 | 4.0000 ± 0.0000 | 1.0000 ± 0.0000 |" in text
        and "| other | 2.0000 ± 0.0000 |  |" in text
    )
    assert text.startswith("# toy\n\nToys play.\n") and "one is lower: **not shown at this size**" in text
    assert "python scripts/claims/toy.py --steps 4 --seeds 0 1 -n 20 --features pixels" in text
    assert (claim.out / "toy.png").stat().st_size > 5000
    assert capsys.readouterr().out.endswith("one is lower: not shown at this size\n")


def test_a_finished_run_and_its_figures_are_not_made_again(common, claim):
    sides, made = {"straight": PLANE, "of x": common.merged(PLANE, {"flow": {"prediction": "x"}})}, []

    def measure(run):
        made.append(run.name)
        return claim.figures(run, steps=(1, 3))

    first = claim.sweep(sides, measure)
    runs = {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in (claim.work / "toy").iterdir() if run.is_dir()}
    assert sorted(made) == ["of_x-0-4", "of_x-1-4", "straight-0-4", "straight-1-4"] and len(runs) == 4
    assert set(first["straight"]) == {"loss", "FD, 1 steps", "FD, 3 steps"} and len(first["of x"]["loss"]) == 2
    assert first["straight"]["loss"][0] != first["straight"]["loss"][1]
    assert claim.sweep(sides, measure) == first and len(made) == 4
    (claim.work / "toy" / "of_x-1-4-20.json").unlink()
    assert claim.sweep(sides, measure) == first and made[4:] == ["of_x-1-4"]  # measured again, not trained again
    assert runs == {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in runs}


def test_a_run_goes_on_from_part_of_its_steps(claim):
    run = claim.train("straight", 0, PLANE, 2)
    assert newest_checkpoint(run).name == "step-00000002"
    assert claim.train("straight", 0, PLANE) == run and newest_checkpoint(run).name == "step-00000004"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_every_claim_says_what_it_claims_what_it_varies_and_when_it_counts():
    for name in SCRIPTS:
        text = (CLAIMS / f"{name}.py").read_text()
        doc = text.split('"""')[1]
        assert len(doc.split("\n\n")) >= 2 and "Shown where" in " ".join(doc.split()), name


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_claim_runs_at_a_toy_size(name, tmp_path):
    sizes = ["--steps", "8", "--seeds", "0", "1", "-n", "12", "--features", "pixels"]
    where = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(CLAIMS / f"{name}.py"), *sizes, *where], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "out" / f"{name}.md").read_text()
    assert "**" in text and (tmp_path / "out" / f"{name}.png").exists()
    assert any(word in done.stdout for word in ("shown", "contradicted"))
