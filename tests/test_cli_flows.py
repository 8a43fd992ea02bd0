"""Normalizing flows as a person meets them: train, eval, sample, invert and edit, of pictures and of numbers."""

from __future__ import annotations

import csv
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from genflow.cli import main
from genflow.data.pictures import read_settings
from genflow.flows.store import load

TRAIN = {
    "steps": 6,
    "batch_size": 8,
    "precision": "fp32",
    "warmup": 1,
    "log_every": 3,
    "preview_every": 6,
    "validate_every": 6,
    "validation_images": 8,
    "trackers": [],
}
GLOW = {"name": "glow", "levels": 2, "steps": 1, "hidden": 8}
NSF = {"name": "nsf", "steps": 2, "hidden": 8, "blocks": 1}
TARFLOW = {"name": "tarflow", "patch": 4, "blocks": 2, "layers": 1, "width": 16}
A, B = "pics/train/dark/0.png", "pics/train/light/0.png"
RUNS = {
    "glow": {"data": "pics", "model": GLOW},
    "tarflow": {
        "data": "pics",
        "model": TARFLOW,
        "text": {"name": "labels", "classes": ["dark", "light"], "dim": 4},
        "flow": {"name": "normalizing", "drop_condition": 0.5},
    },
    "noisy": {"data": "pics", "model": GLOW, "flow": {"name": "normalizing", "dequantization": "gaussian"}},
    "table": {"data": {"name": "table", "path": "table.csv", "label": "kind"}, "model": NSF},
    "plane": {"data": {"name": "toy2d", "kind": "moons", "n": 200}, "model": {"name": "mlp", "hidden": 8, "depth": 1}},
}


def config(name: str, **changes) -> str:
    run = {"flow": "normalizing", **RUNS[name], **changes}
    if name == "plane":
        run["flow"] = "rectified"
    if run["data"] == "pics":
        run["data"] = {"name": "folder", "path": "pics", "size": 8}
    run["train"] = {**TRAIN, **changes.get("train", {})}
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump(run))
    return str(path)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """Pictures of two classes, a table, and a run of each of RUNS."""
    folder = tmp_path_factory.mktemp("flows")
    draw = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for split, (name, low) in product(("train", "test"), (("dark", 0), ("light", 128))):
            Path("pics", split, name).mkdir(parents=True)
            for i in range(8):
                grey = draw.integers(low, low + 128, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(grey).save(f"pics/{split}/{name}/{i}.png")
        rows = draw.normal((1000.0, -5.0, 0.0), (100.0, 0.1, 1.0), (60, 3))
        lines = [f"{a},{b},{c},{'even' if i % 2 else 'odd'}" for i, (a, b, c) in enumerate(rows.tolist())]
        Path("table.csv").write_text("\n".join(['weight,"height, m",x,kind', *lines]))
        for name in RUNS:
            torch.manual_seed(0)
            assert main(["train", config(name), f"out={name}"]) == 0
    return folder


@pytest.fixture
def genflow_(where, monkeypatch, capsys):
    """Runs a command in the folder; returns what it prints."""
    monkeypatch.chdir(where)

    def run(*arguments, code=0):
        assert main([str(each) for each in arguments]) == code
        return capsys.readouterr().out

    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def table(path) -> list[list[str]]:
    return list(csv.reader(Path(path).read_text().splitlines()))


def test_a_run_logs_its_likelihood_and_draws_previews(where):
    for name in RUNS:
        steps = [json.loads(line) for line in (where / name / "metrics.jsonl").read_text().splitlines()]
        assert np.isfinite([line["validation_loss"] for line in steps if "validation_loss" in line]).all()
        assert (where / name / "previews" / "step-00000006.png").exists()


@pytest.mark.parametrize(("name", "how"), [("glow", ""), ("tarflow", " --class dark")])
def test_a_finished_run_says_so_and_how_to_draw(name, how, genflow_, capsys):
    assert main(["train", config(name), f"out={name}"]) == 0
    error = capsys.readouterr().err
    assert f"{name} is already trained for 6 steps; set train.steps higher to go on" in error
    assert error.endswith(f"to draw: genflow sample {name}{how}\n")


# ------------------------------------------------------------------------------------------------------------------ eval


def test_eval_prints_the_figure_and_lays_it_down_with_all_that_it_hangs_on(genflow_, where):
    out = genflow_("eval", "glow", "-n", "6", "-k", "2")
    found = json.loads(Path("glow/eval.json").read_text())
    line = f"{found['mean']:.4f} +- {found['error']:.4f} bits/dim (folder test, 6 samples; {found['how']})\n"
    assert out == line and "uniform dequantisation, K = 2, 256 levels" in found["how"]
    assert found["data"]["path"] == "pics" and found["split"] == "test" and found["unit"] == "bits/dim"
    assert (found["n"], found["k"], found["ema"], found["device"]) == (6, 2, True, "cpu")
    assert found["model"] == "glow/checkpoints/step-00000006" and found["torch"] == torch.__version__
    again = genflow_(
        "eval", "glow/checkpoints/step-00000006", "-n", "6", "-k", "2", "--batch", "4", "--out", "e/g.json"
    )
    assert again == out and json.loads(Path("e/g.json").read_text())["mean"] == pytest.approx(found["mean"], rel=1e-6)
    last = genflow_("eval", "glow", "--no-ema", "-n", "6", "-k", "2")
    assert len({out, last, genflow_("eval", "glow", "--split", "train", "-n", "6", "-k", "2")}) == 3


def test_eval_of_one_sample_is_json_without_nan(genflow_):
    assert "+-" not in genflow_("eval", "glow", "-n", "1", "--out", "one.json")
    assert json.loads(Path("one.json").read_text(), parse_constant=pytest.fail)["error"] is None


def test_eval_of_numbers_is_in_nats_and_takes_the_solve_of_a_velocity(genflow_):
    assert "nats (table test, " in genflow_("eval", "table") and "exact, float32" in genflow_("eval", "table")
    out = genflow_("eval", "plane", "-n", "3", "--divergence", "hutchinson", "--draws", "2", "--tolerance", "1e-3")
    assert "nats (toy2d test, 3 samples; unguided ODE, divergence hutchinson, draws 2, rtol 0.001, atol 0.001" in out
    found = json.loads(Path("plane/eval.json").read_text())
    assert found["draws"] == 2 and found["rtol"] == 1e-3 and found["data"]["kind"] == "moons"


def test_a_reflowed_run_is_evaluated_and_drawn_by_the_real_data(genflow_):
    few = ["train.steps=2", "train.preview_every=2"]
    genflow_("reflow", "plane", "--pairs", "16", "--samples", "4", "--steps", "2", "--out", "re", "--set", *few)
    assert Path("re/previews/step-00000002.png").exists()
    assert "nats (toy2d test, 3 samples; " in genflow_("eval", "re", "-n", "3", "--tolerance", "1e-3")
    assert "in the units of the training data" in genflow_("sample", "re", "-n", "2", "--out", "r")


# ---------------------------------------------------------------------------------------------------------------- sample


def test_samples_are_those_of_the_flow_and_say_how_they_were_made(genflow_):
    assert genflow_("sample", "glow", "-n", "3", "--seed", "4", "--out", "s") == (
        "3 pictures and grid.png in s (1 network evaluations each)\n"
    )
    x = load("glow").sample([""], seeds=[5]).x[0]
    assert abs(pixels("s/0001-empty-5.png") - ((x.permute(1, 2, 0) + 1) * 127.5).numpy()).max() <= 0.51
    about = read_settings("s/grid.png")
    assert about["model"] == "glow" and about["temperature"] == 1.0 and about["nfe"] == 1
    genflow_("sample", "glow", "-n", "3", "--seed", "4", "--temperature", "0", "--out", "cold")
    assert np.array_equal(pixels("cold/0000-empty-4.png"), pixels("cold/0002-empty-6.png"))


def test_classes_and_guidance_change_the_sample(genflow_):
    how = ["sample", "tarflow", "--out", "c", "--class", "light"]
    genflow_(*how)
    plain = pixels("c/0000-light-0.png")
    genflow_(*how, "--guidance", "3")
    assert not np.array_equal(plain, pixels("c/0000-light-0.png"))
    genflow_("sample", "tarflow", "--out", "c", "--class", "dark")
    assert not np.array_equal(plain, pixels("c/0000-dark-0.png"))


def test_samples_of_a_noise_augmented_flow_are_drawn(genflow_):
    genflow_("sample", "noisy", "--out", "n")
    assert pixels("n/0000-empty-0.png").shape == (8, 8, 3)


def test_vectors_come_in_the_units_and_columns_of_the_table(genflow_, where):
    assert genflow_("sample", "table", "-n", "200", "--out", "v") == (
        "200 vectors in v/samples.csv, in the units of the training data\n"
    )
    head, *rows = table("v/samples.csv")
    assert head == ["weight", "height, m", "x", "caption"] and len(rows) == 200
    numbers = np.array([row[:3] for row in rows], dtype=float)
    assert abs(numbers.mean(0) - (1000, -5, 0)).max() < 100 and (numbers.std(0) / (100, 0.1, 1) > 0.3).all()
    assert (numbers.std(0) / (100, 0.1, 1) < 3).all()
    genflow_("sample", "plane", "-n", "9", "--out", "p")
    assert table("p/samples.csv")[0] == ["x1", "x2", "caption"] and Path("p/points.png").exists()


def test_vectors_without_their_table_are_as_the_model_sees_them(genflow_, where):
    Path("table.csv").rename("away.csv")
    try:
        out = genflow_("sample", "table", "-n", "20", "--out", "w")
    finally:
        Path("away.csv").rename("table.csv")
    assert "as the model sees them, standardised: data table: table.csv does not exist" in out
    assert table("w/samples.csv")[0] == ["x1", "x2", "x3", "caption"]


# -------------------------------------------------------------------------------------------------------- there and back


def test_pictures_come_back_from_noise_exactly(genflow_):
    out = genflow_("invert", "tarflow", A, B, "--prompt", "dark", "--prompt", "light")
    head, *lines = out.splitlines()
    assert head.split() == ["PSNR,", "dB", "1", "pass", "std", "of", "noise"]
    assert all(float(line.split()[1]) > 80 for line in lines[:2])
    assert float(lines[3].split()[-1]) < 1e-3 and lines[3].startswith("the largest error of a value in [-1, 1]")
    with safe_open("inverted/noise.safetensors", framework="pt") as file:
        noise = file.get_tensor("noise")
    flow = load("tarflow")
    back = flow.decode(noise, flow.text.encode(["dark", "light"]))
    given = torch.from_numpy(pixels(B)).permute(2, 0, 1) / 127.5 - 1
    assert noise.shape == (2, 3, 8, 8) and (back[1] - given).abs().max() < 1e-3
    assert read_settings("inverted/grid.png")["prompts"] == ["dark", "light"]


def test_an_interpolation_begins_and_ends_at_the_pictures(genflow_):
    first, last = "pics/train/dark/1.png", "pics/train/light/1.png"
    out = genflow_("edit", "glow", first, last, "--into", last, "--frames", "4", "--batch", "3", "--out", "i")
    assert out == "8 pictures and grid.png in i: interpolation through the flow's noise, and exactly back\n"
    frames = [pixels(path) for path in sorted(Path("i").glob("0*.png"))]
    assert abs(frames[0] - pixels(first)).max() <= 1 and abs(frames[3] - pixels(last)).max() <= 1
    assert len({frame.tobytes() for frame in frames[:4]}) == 4
    assert all(abs(frame - pixels(last)).max() <= 1 for frame in frames[4:])
    assert read_settings("i/grid.png")["into"] == last


# -------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "glow", "--split", "nonsense"], "nonsense"),
        (["eval", "glow", "-n", "0"], "n = 0 is too few; the least is 1"),
        (["eval", "glow", "-k", "0"], "k = 0 is too few; the least is 1"),
        (["eval", "glow", "--batch", "0"], "batch = 0 is too few"),
        (["eval", "glow", "--divergence", "exact"], "divergence is for likelihoods of a velocity"),
        (["eval", "glow", "--out", "pics"], "--out pics is a folder; name a file, such as pics/eval.json"),
        (["eval", "glow", "--out", "table.csv/x.json"], "table.csv is a file; name a folder"),
        (["eval", "noisy"], "trained on pictures with added noise"),
        (["eval", "table", "-k", "2"], "k = 2: vectors are continuous"),
        (["eval", "plane", "--tolerance", "1e-12"], "rtol = 1e-12 is below"),
        (
            ["sample", "glow", "--prompt", "light"],
            "glow hears no condition; leave --prompt, --prompt-file and --class out",
        ),
        (
            ["sample", "glow", "--steps", "4"],
            "--steps does nothing for a NormalizingFlow; what it takes: temperature, guid",
        ),
        (["sample", "glow", "--size", "16"], "--size is for models of a velocity"),
        (["sample", "glow", "--guidance", "2"], "guidance = 2.0: this model has no condition; leave it at 1"),
        (["sample", "glow", "--temperature", "-1"], "temperature = -1.0 must be 0 or more"),
        (["sample", "tarflow"], 'nothing to draw: give --prompt "..."'),
        (["sample", "tarflow", "--class", "lihgt"], "no class 'lihgt'. Did you mean 'light'?"),
        (["sample", "plane", "--temperature", "2"], "--temperature does nothing for a RectifiedFlow"),
        (["invert", "glow", A, "--prompt", "dark"], "glow hears no condition; leave out what it should hear, 'dark'"),
        (["invert", "tarflow", A, "--guidance", "2"], "--guidance does nothing here"),
        (["invert", "tarflow", A, "--steps", "4"], "--steps does nothing for a NormalizingFlow"),
        (["invert", "table", A], "the model makes vectors of 3 numbers, not pictures"),
        (["invert", "plane", A], "the model makes vectors of 2 numbers, not pictures"),
        (["edit", "glow", A, "--prompt", ""], "which has no velocity: it can only go --into a picture"),
        (["edit", "glow", A, "--into", B, "--prompt", "x"], "glow hears no condition"),
        (["edit", "tarflow", A, "--into", B, "--to", "light"], "--to is for models of a velocity"),
        (["edit", "tarflow", A, "--into", B, "--temperature", "2"], "--temperature does nothing here"),
        (["edit", "table", A, "--into", B], "the model makes vectors of 3 numbers, not pictures"),
        (["edit", "plane", A, "--prompt", ""], "the model makes vectors of 2 numbers, not pictures"),
        (["reflow", "glow"], "glow is a NormalizingFlow, which has no velocity"),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(arguments, message, genflow_, capsys):
    out = [] if arguments[0] == "eval" else ["--out", "never"]
    assert main([*arguments, *out]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("genflow: ") and error.count("\n") == 1
    assert not Path("never").exists()


MMDIT = {"name": "mmdit", "depth": 1, "hidden": 16, "heads": 2, "patch_size": 4}
LEARNED = {"name": "learned", "dim": 8, "heads": 2, "layers": 1}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("glow", {"data": {"name": "folder", "path": "pics", "size": 10}}, "10 x 10 is not; the nearest: 8 x 8"),
        ("glow", {"flow": "rectified"}, "flow rectified: the model is a bijection; take flow normalizing"),
        (
            "glow",
            {"model": MMDIT, "text": LEARNED},
            "flow normalizing: MMDiT is no bijection; take a model such as glow",
        ),
        ("glow", {"model": MMDIT, "flow": "rectified"}, "a model MMDiT reads the tokens of a text, and text is none"),
        (
            "glow",
            {"flow": {"name": "normalizing", "whiten": 0.1}},
            "whiten = 0.1: the text encoder hears no difference",
        ),
        ("glow", {"sample": {"steps": 20}}, "unknown key 'steps' in sample. Choose from: guidance, inverse, temperature."),
        ("table", {"model": GLOW}, "glow is for pictures"),
        (
            "table",
            {"flow": {"name": "normalizing", "dequantization": "uniform"}},
            "vectors are continuous: leave it out",
        ),
        ("table", {"data": {"name": "table", "path": "nan.csv"}}, "column 'b': row 3 holds nothing, or NaN"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_begins(name, changes, message, genflow_, capsys):
    Path("nan.csv").write_text("a,b\n1,2\n2,3\n3,nan\n4,5\n")
    assert main(["train", config(name, **changes), "out=wrong"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("genflow: ") and error.count("\n") == 1
