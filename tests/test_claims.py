"""The claims' shared machinery: verdicts, tables, and runs that are taken up again; and every claim at a toy size (slow)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from genflow.errors import UserError
from genflow.evaluation.features import PixelFeatures
from genflow.flows.store import newest_checkpoint

CLAIMS = Path(__file__).parent.parent / "scripts" / "claims"
SCRIPTS = sorted(path.stem for path in CLAIMS.glob("*.py") if path.stem not in ("common", "autoencoders"))
PLANE = {
    "data": {"name": "toy2d", "kind": "moons", "n": 200},
    "model": {"name": "mlp", "hidden": 8, "depth": 1},
    "flow": {"name": "rectified", "density": "uniform"},
    "train": {"batch_size": 8, "decay": 0.0, "log_every": 1, "preview_every": 0, "trackers": []},
    "sample": {"sampler": "euler", "steps": 2, "guidance": 1.0},
}


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))
    import common

    return common


@pytest.fixture
def claim(common, tmp_path):
    return common.Study(
        "toy", "Toys play.", tmp_path / "work", tmp_path / "out", [0, 1], 4, 20, PixelFeatures(), "fp32"
    )


@pytest.mark.parametrize(
    ("gains", "least", "word"),
    [
        ([0.1, 0.12, 0.11], 0.0, "shown"),
        ([-0.1, -0.12, -0.11], 0.0, "contradicted"),
        ([0.1, 0.12, -0.01], 0.0, "not shown at this size"),  # one seed says no
        ([0.01, 0.9, 0.02], 0.0, "not shown at this size"),
        ([0.05, 0.12, 0.2], 0.0, "not shown at this size"),  # 2.8 standard errors, of the 4.3 that three seeds ask for
        ([0.1, 0.12], 0.0, "not shown at this size"),  # 11 of the 12.7 of two
        ([0.1, 0.11], 0.0, "shown"),
        ([0.1, 0.12, 0.11], 0.2, "not shown at this size"),
        ([0.8, 0.82, 0.81], 0.7, "shown"),
        ([5.0], 0.0, "not shown at this size"),  # one seed shows nothing
        ([math.inf, math.inf, 0.3], 0.0, "shown"),  # the other side left the numbers
        ([math.inf, -0.1, 0.3], 0.0, "not shown at this size"),
        ([0.2, 0.2], 0.0, "shown"),
    ],
)
def test_a_gain_is_shown_where_all_seeds_and_their_spread_say_so(gains, least, word, common):
    assert common.verdict(gains, least).word == word


def test_a_verdict_tells_the_numbers_it_hangs_on(common):
    assert common.verdict([0.1, 0.12, 0.11]) == ("shown", " (0.1100 ± 0.0058: 0.1000, 0.1200, 0.1100)")
    assert common.verdict([0.8, 0.9], 0.7).why == " (above 0.7? 0.8500 ± 0.0500: 0.8000, 0.9000)"
    assert common.agreement([0.001, 0.5], 0.01).why == " (0.0010, 0.5000; 0.01 allowed)"


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
    assert common.agreement(differences, 0.01).word == word


def test_gains_are_mean_logs_of_ratios_seed_by_seed(common):
    results = {
        "a": {"x": [1.0, 2.0, 1.0], "y": [1.0, 1.0, 1.0]},
        "b": {"x": [math.e, 2.0, math.inf], "y": [1.0, 1.0, 1.0]},
    }
    assert common.gains(results, "a", "b", ["x", "y"]) == pytest.approx([0.5, 0.0, math.inf])
    assert common.gains(results, "b", "a", ["x"]) == pytest.approx([-1.0, 0.0, -math.inf])


@pytest.mark.parametrize(
    ("a", "b", "gain"),
    [
        (1.0, math.nan, math.inf),
        (math.nan, 1.0, -math.inf),
        (math.nan, math.inf, 0.0),
        (0.0, 0.0, 0.0),
        (0.0, 1.0, math.log(1e9)),
    ],
)
def test_no_number_is_infinite_and_nothing_is_a_gain_with_an_end(a, b, gain, common):
    assert common.gains({"a": {"x": [a]}, "b": {"x": [b]}}, "a", "b", ["x"]) == pytest.approx([gain])


def test_seeds_that_have_no_figure_are_not_shifted(common):
    with pytest.raises(ValueError, match="argument 2 is"):
        common.gains({"a": {"x": [1.0, 2.0]}, "b": {"x": [1.0]}}, "a", "b", ["x"])


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
    claim.report(results, {"one is lower": common.Verdict(common.OPEN, " (why)")})
    text = (claim.out / "toy.md").read_text()
    assert (
        "| one | 2.0000 ± 1.4142 | 4.0000 ± 0.0000 | 1.0000 ± 0.0000 |" in text
        and "| other | 2.0000 ± 0.0000 |  |" in text
    )
    assert text.startswith("# toy\n\nToys play.\n") and "one is lower: **not shown at this size** (why)\n" in text
    assert "python scripts/claims/toy.py --steps 4 --seeds 0 1 -n 20 --features pixels`" in text
    assert "trained in fp32;" in text and "Student's" in text
    assert (claim.out / "toy.png").stat().st_size > 5000
    assert capsys.readouterr().out.endswith("one is lower: not shown at this size (why)\n")


def test_a_finished_run_and_its_figures_are_not_made_again(common, claim):
    sides, made = {"straight": PLANE, "of x": common.merged(PLANE, {"flow": {"prediction": "x"}})}, []

    def measure(run):
        made.append(run.name)
        return claim.figures(run, steps=(1, 3))

    first = claim.sweep(sides, measure)
    runs = {run: (run / "metrics.jsonl").read_bytes() for run in (claim.work / "toy").iterdir() if run.is_dir()}
    assert sorted(made) == ["of_x-0-4", "of_x-1-4", "straight-0-4", "straight-1-4"] and len(runs) == 4
    assert set(first["straight"]) == {"loss", "FD, 1 steps", "FD, 3 steps"} and len(first["of x"]["loss"]) == 2
    assert first["straight"]["loss"][0] != first["straight"]["loss"][1]
    assert claim.sweep(sides, measure) == first and len(made) == 4
    (claim.work / "toy" / "of_x-1-4-20-pixels.json").unlink()
    assert claim.sweep(sides, measure) == first and made[4:] == ["of_x-1-4"]  # measured again, not trained again
    assert runs == {run: (run / "metrics.jsonl").read_bytes() for run in runs}


def test_a_run_goes_on_from_part_of_its_steps(claim):
    run = claim.train("straight", 0, PLANE, 2)
    assert newest_checkpoint(run).name == "step-00000002"
    assert claim.train("straight", 0, PLANE) == run and newest_checkpoint(run).name == "step-00000004"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_run_of_another_config_is_not_taken_for_the_asked_one(common, claim):
    claim.train("straight", 0, PLANE)
    with pytest.raises(UserError, match=r"model.hidden=8, this config says 16"):
        claim.train("straight", 0, common.merged(PLANE, {"model": {"hidden": 16}}))


def test_figures_of_other_features_are_not_mixed(common, claim):
    other = PixelFeatures()
    other.digest = "0123456789abcdef"
    assert claim.kept("a", lambda: {"FD": 1.0}) == {"FD": 1.0}
    assert replace(claim, features=other).kept("a", lambda: {"FD": 2.0}) == {"FD": 2.0}
    assert claim.kept("a", lambda: {"FD": 3.0}) == {"FD": 1.0}


def started(common, monkeypatch, tmp_path, *words, **how):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--work", str(tmp_path), *words])
    return common.study("toy.py", "Toys.", **{"steps": 4, **how})


def test_a_claim_finds_its_precision_once(common, monkeypatch, tmp_path):
    answers = iter(["bf16", "fp32"])
    monkeypatch.setattr(common, "resolve_precision", lambda asked, device: (next(answers), ""))
    first, again = (started(common, monkeypatch, tmp_path, "--features", "pixels") for _ in range(2))
    assert first.precision == again.precision == "bf16"
    assert first.config("a", 0, PLANE).train.precision == "bf16"
    own = common.merged(PLANE, {"train": {"precision": "fp32"}})
    assert first.config("a", 0, own).train.precision == "fp32"


@pytest.mark.parametrize(
    ("words", "match"), [(["--steps", "0"], "--steps 0"), (["--features", "pixel"], "Did you mean 'pixels'")]
)
def test_a_mistake_in_a_claims_options_is_told_in_one_line_before_anything_is_trained(
    words, match, common, monkeypatch, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stopped:
        common.told(lambda: started(common, monkeypatch, tmp_path, *words))
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and match in told and told.count("\n") == 1 and told.startswith("toy: ")


def test_a_claim_without_distances_takes_no_options_of_them(common, monkeypatch, tmp_path, capsys):
    claim = started(common, monkeypatch, tmp_path, n=0, features=False, precision="fp32")
    claim = replace(claim, out=tmp_path)
    claim.report({"one": {"loss": [1.0, 3.0, 2.0]}}, {})
    assert "toy.py --steps 4 --seeds 0 1 2`" in (tmp_path / "toy.md").read_text()
    with pytest.raises(SystemExit):
        started(common, monkeypatch, tmp_path, "-n", "5", n=0, features=False, precision="fp32")


def test_dits_of_text_have_the_parameters_of_the_mmdit(common):
    import architectures

    for way in ("cross", "concatenated"):
        assert architectures.parameters(architectures.dit(way, 1_777_072)) == pytest.approx(1_777_072, rel=0.015)


def test_every_claim_says_what_it_claims_what_it_varies_and_when_it_counts():
    for name in SCRIPTS:
        text = (CLAIMS / f"{name}.py").read_text()
        doc = text.split('"""')[1]
        assert len(doc.split("\n\n")) >= 2 and "Shown where" in " ".join(doc.split()), name


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_claim_runs_at_a_toy_size(name, tmp_path):
    of_distances = {"-n": "12", "--features": "pixels"}
    text = subprocess.run([sys.executable, str(CLAIMS / f"{name}.py"), "--help"], capture_output=True, text=True).stdout
    sizes = ["--steps", "8", "--seeds", "0", "1"]
    sizes += [word for option in of_distances if f"  {option} " in text for word in (option, of_distances[option])]
    where = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(CLAIMS / f"{name}.py"), *sizes, *where], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "out" / f"{name}.md").read_text()
    assert "**" in text and (tmp_path / "out" / f"{name}.png").exists()
    assert any(word in done.stdout for word in ("shown", "contradicted"))
