"""The scripts: what they refuse in one line, what they take up again, and what setting up removes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from genflow.errors import UserError
from genflow.evaluation.few_steps import FewSteps

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "claims"))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module


def run(script, monkeypatch, name: str, *words: str) -> None:
    """As `python scripts/NAME.py WORDS` does."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    script("claims.common").told(script(name).main)


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("recognise", ["nowhere"]),
        ("compare_samplers", ["nowhere"]),
        ("bench_decoders", ["nowhere"]),
        ("bench_tarflow", ["nowhere"]),
        ("latent_against_pixels", ["--data", "nowhere.parquet", "--features", "nowhere.json", "--taef", "nowhere"]),
    ],
)
def test_what_is_not_there_is_told_in_one_line(name, words, script, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit) as stopped:
        run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith(f"{name}: ") and "nowhere" in told and told.count("\n") == 1


def test_a_kind_of_points_that_is_unknown_is_refused(script, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(script, monkeypatch, "compare_toy2d", "--kinds", "foo")
    assert "invalid choice: 'foo'" in capsys.readouterr().err


def test_a_model_that_fails_ends_the_comparison_without_a_traceback(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script("compare_mnist").subprocess, "run", lambda *_: SimpleNamespace(returncode=2))
    with pytest.raises(SystemExit) as stopped:
        run(script, monkeypatch, "compare_mnist", "--out", str(tmp_path))
    assert stopped.value.code == 2


# ---------------------------------------------------------------------------------------------------------- comparisons


def test_latents_and_pixels_share_minutes_and_precision(script, monkeypatch, tmp_path):
    module, answers = script("latent_against_pixels"), iter(["bf16", "fp32"])
    monkeypatch.setattr(module, "resolve_precision", lambda asked, device: (next(answers), ""))
    assert module.agreed(tmp_path, 5) == module.agreed(tmp_path, 5) == "bf16"
    with pytest.raises(UserError, match="--minutes 10: .* holds runs of 5"):
        module.agreed(tmp_path, 10)


@pytest.mark.parametrize("n", [1, 40, 256, 1000])
def test_the_latents_scale_is_measured_on_pictures_from_everywhere(n, script):
    chosen = script("latent_against_pixels").evenly(n)
    assert len(set(chosen)) == min(n, 256) and chosen[0] == 0 and chosen[-1] == n - 1


def test_solvers_of_learnt_grids_are_chosen_on_the_rows_that_choose(script, monkeypatch):
    module, asked = script("compare_samplers"), []
    best = SimpleNamespace(nfe=4, error=0.1, held_out=0.2, sampler="euler")

    def tune(*_, samplers, **__):
        asked.append(samplers)
        return SimpleNamespace(best=best, wins=True)

    monkeypatch.setattr(module, "tune", tune)
    names = ["euler", "ab2", "ab3", "ab4"]  # the last is the best on held-out rows, and the worst on the others
    table = {name: {b: module.Point(b, i, -i, "uniform") for b in module.LEARNT} for i, name in enumerate(names)}
    module.learn(module.Problem("toy", "", None, torch.zeros(3, 1)), torch.zeros(3, 1), table)
    assert asked == [names[:3]] * len(module.LEARNT)


def trained(tmp_path, section) -> Path:
    from genflow.config import from_dict
    from genflow.training.config import RunConfig
    from genflow.training.run import train

    how = {"steps": 1, "batch_size": 2, "precision": "fp32", "preview_every": 0, "validate_every": 0, "trackers": []}
    sample = {"sampler": "euler", "steps": 1, "guidance": 1.0}
    section = {"flow": "rectified", "sample": sample, "train": how, "out": str(tmp_path / "run"), **section}
    return train(from_dict(RunConfig, section))


def test_a_picture_is_looked_for_among_as_many_as_there_are(script, monkeypatch, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "data" / f"{i}.png")
    data = {"name": "folder", "path": str(tmp_path / "data"), "size": 8}
    found = trained(tmp_path, {"data": data, "model": {"name": "unet", "channels": 8, "blocks": 1}})
    run(script, monkeypatch, "recognise", str(found), "--prompts", "2")
    count = len(script("genflow.cli.eval").data_of(script("genflow").load(found), "")[1].build("train"))
    assert 1 < count <= 6 and f"nearest of {count} is its own picture" in capsys.readouterr().out


def test_vectors_are_not_recognised(script, monkeypatch, tmp_path, capsys):
    found = trained(tmp_path, {"data": {"name": "toy2d", "n": 20}, "model": {"name": "mlp", "hidden": 8, "depth": 1}})
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(script, monkeypatch, "recognise", str(found))
    assert "draws vectors of 2 numbers" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- claims


def test_a_reflow_is_always_gone_on_with_and_measured_on_noise_that_no_pair_has(script, monkeypatch, tmp_path):
    module, asked, measured = script("reflow"), [], []

    def reflow(words):
        asked.append(words)
        shutil.copytree(words[1], words[3], dirs_exist_ok=True)
        return 0

    def few_steps(flow, real, prompts, seeds, **_):
        measured.append(set(seeds))
        return FewSteps(1.0, {1: 1.0, 2: 1.0}, {})

    monkeypatch.setattr(module, "genflow", reflow)
    monkeypatch.setattr(module, "few_steps", few_steps)
    (tmp_path / "reflow" / "before-0-4-reflow" / "checkpoints" / "step-00000000").mkdir(parents=True)
    words = ["--steps", "4", "--seeds", "0", "1", "-n", "8", "--work", str(tmp_path), "--out", str(tmp_path)]
    run(script, monkeypatch, "reflow", *words)
    pairs = []
    for each in asked:
        n, first = (int(each[each.index(option) + 1]) for option in ("--pairs", "--seed"))
        pairs.append(set(range(first, first + n)))
    assert len(pairs) == 2 and not pairs[0] & pairs[1]
    before, after, *others = measured
    assert before == after and len(before) == 8 and not before & others[0]
    assert not any(of_pairs & of_samples for of_pairs in pairs for of_samples in measured)


def test_a_run_of_two_processes_that_was_cut_short_goes_on(script, monkeypatch, tmp_path):
    module, launched = script("ddp"), []

    def launch(words):
        launched.append(words)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", launch)
    claim = script("common").Study("ddp", "", tmp_path, tmp_path, [0], 4, 0, None, "fp32")
    checkpoint = tmp_path / "ddp" / "two-0-4" / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").write_text('{"files": {}}')
    assert module.by_two(claim, 0) == tmp_path / "ddp" / "two-0-4" and len(launched) == 1


@pytest.mark.parametrize("at", [2, 5])
def test_a_run_that_leaves_the_numbers_has_infinite_figures_from_there_on(at, script, monkeypatch):
    module, asked = script("qk_norm"), []
    monkeypatch.setattr(module, "largest_logit", lambda *_: 1.0)
    monkeypatch.setattr(module, "loss_of", lambda *_: 1.0)

    def train(*_):
        asked.append(0)
        if len(asked) == at:
            raise UserError("step 3: loss nan, gradient norm nan; the weights were left as they were before it.")
        return Path("run")

    found = module.follow(SimpleNamespace(steps=8, train=train), "none", 0, module.FAST)
    assert len(found) == 7 and list(found.values()).count(float("inf")) == {2: 6, 5: 2}[at]


def test_other_mistakes_than_divergence_end_the_claim(script):
    module = script("qk_norm")

    def train(*_):
        raise UserError("data: no such folder")

    with pytest.raises(UserError, match="no such folder"):
        module.follow(SimpleNamespace(steps=8, train=train), "none", 0, module.FAST)


# ------------------------------------------------------------------------------------------------------------ setting up

GOOD, NO_PIP = "#!/bin/sh\nexit 0\n", '#!/bin/sh\ncase "$*" in *ensurepip*|*"import pip"*) exit 1;; esac\n'
MAKES_VENV = '#!/bin/sh\n[ "$2" = venv ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python"\nexit 0\n'


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def home(tmp_path):
    """A repository of scripts and no more, with a Python that makes environments."""
    for name in ("setup.sh", "quickstart.sh"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        shutil.copy(SCRIPTS / name, tmp_path / "scripts" / name)
    (tmp_path / "pyproject.toml").touch()
    program(tmp_path / "bin" / "python3", MAKES_VENV)
    return tmp_path


def bash(home: Path, words: str) -> subprocess.CompletedProcess[str]:
    path = {**os.environ, "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", words], cwd=home, env=path, capture_output=True, text=True)


def test_an_environment_that_setup_did_not_begin_is_never_removed(home):
    program(home / ".venv" / "bin" / "python", NO_PIP)
    done = bash(home, "source scripts/setup.sh")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "has no pip" in done.stderr
    assert (home / ".venv" / "bin" / "python").read_text() == NO_PIP


def test_an_environment_whose_making_was_cut_short_is_made_again(home):
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / ".venv" / "half").touch()
    (home / ".venv" / "begun-by-setup").touch()
    assert bash(home, "source scripts/setup.sh").returncode == 0
    assert (home / ".venv" / "bin" / "python").exists() and not (home / ".venv" / "half").exists()
    assert not (home / ".venv" / "begun-by-setup").exists()  # it is whole, so that it is not removed again


@pytest.mark.parametrize("words", ["", "train.steps=5 out=runs/x"])
def test_the_quickstart_draws_with_the_run_it_trained(words, home):
    program(home / ".venv" / "bin" / "python", GOOD)
    program(home / ".venv" / "bin" / "genflow", f'#!/bin/sh\necho "$@" >> {home}/asked\n')
    done = bash(home, f"mkdir -p runs/x/pictures runs/quickstart/pictures; bash scripts/quickstart.sh {words}")
    trained, drawn = (home / "asked").read_text().splitlines()
    out = "runs/x" if words else "runs/quickstart"
    assert trained.split() == ["train", "configs/quickstart.yaml", *words.split()] and f"sample {out} " in drawn
    assert drawn.endswith(f"--out {out}/pictures") and done.stdout.endswith(f"{out}/pictures/grid.png\n")
