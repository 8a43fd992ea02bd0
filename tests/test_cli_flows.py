"""Normalizing flows as a person meets them: train, eval, sample, invert and edit, of pictures and of numbers."""

from __future__ import annotations

import csv
import hashlib
import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from genflow.cli import main
from genflow.data.folders import FolderConfig
from genflow.data.pictures import read_settings
from genflow.data.toy2d import Toy2DConfig
from genflow.evaluation.frechet import frechet_distance
from genflow.evaluation.reals import read_real
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


def test_previews_of_a_flow_that_hears_nothing_are_sixteen_pictures_without_captions(genflow_):
    genflow_("sample", "glow", "-n", "16", "--out", "unheard")
    assert np.array_equal(pixels("glow/previews/step-00000006.png"), pixels("unheard/grid.png"))


@pytest.mark.parametrize(("name", "how"), [("glow", ""), ("tarflow", " --class dark")])
def test_a_finished_run_says_so_and_how_to_draw(name, how, genflow_, capsys):
    assert main(["train", config(name), f"out={name}"]) == 0
    error = capsys.readouterr().err
    assert f"{name} is already trained for 6 steps; set train.steps higher to go on" in error
    assert error.endswith(f"to draw: genflow sample {name}{how}\n")


# ------------------------------------------------------------------------------------------------------------------ eval


def figures(folder) -> dict[str, float]:
    return {each["name"]: each["value"] for each in json.loads(Path(folder, "figures.json").read_text())["figures"]}


def test_eval_prints_the_figure_and_lays_it_down_with_all_that_it_hangs_on(genflow_, where):
    out = genflow_("eval", "glow", "--metrics", "likelihood", "-n", "6", "-k", "2")
    found = json.loads(Path("glow/eval/figures.json").read_text())
    (figure,), plan, made = found["figures"], found["plan"], found["made"]
    line = f"{figure['name']}  {figure['value']:.4f} +- {figure['error']:.4f}    {figure['on']}\n"
    assert out.startswith(line) and figure["on"].startswith(
        "folder test, 6 samples; uniform dequantisation, K = 2, 256 "
    )
    assert (plan["n"], plan["k"], plan["metrics"]) == (6, 2, ["likelihood"]) and made["data"]["path"] == "pics"
    assert (made["ema"], made["device"], made["versions"]["torch"]) == (True, "cpu", torch.__version__)
    assert made["model"] == "glow/checkpoints/step-00000006" and made["counts"] == {"likelihood": 6, "overlap": 0}
    weights = Path("glow/checkpoints/step-00000006/ema.safetensors").read_bytes()
    assert made["weights"] == {"file": "ema.safetensors", "sha256": hashlib.sha256(weights).hexdigest()}
    how = ["--metrics", "likelihood", "-n", "6", "-k", "2"]
    genflow_("eval", "glow/checkpoints/step-00000006", *how, "--batch", "4", "--out", "e")
    assert figures("e")["bits/dim"] == pytest.approx(figure["value"], rel=1e-6)
    values = [figure["value"]]
    for more in (["--no-ema"], ["--split", "train"]):
        genflow_("eval", "glow", *how, *more, "--out", "e")
        values.append(figures("e")["bits/dim"])
    assert len(set(values)) == 3


def test_eval_of_one_sample_is_json_without_nan(genflow_):
    assert "+-" not in genflow_("eval", "glow", "--metrics", "likelihood", "-n", "1", "--out", "one")
    text = Path("one/figures.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["figures"][0]["error"] is None


def test_eval_of_numbers_is_in_nats_and_takes_the_solve_of_a_velocity(genflow_):
    out = genflow_("eval", "table")
    assert "nats" in out and "table test, " in out and "exact, float32" in out and "features pixels" in out
    assert {"nats", "FD", "KID", "precision", "recall", "density", "coverage", "copying"} == set(figures("table/eval"))
    how = ["--metrics", "likelihood", "-n", "3", "--divergence", "hutchinson", "--draws", "2", "--tolerance", "1e-3"]
    out = genflow_("eval", "plane", *how)
    assert "toy2d test, 3 samples; unguided ODE, divergence hutchinson, draws 2, rtol 0.001, atol 0.001" in out
    found = json.loads(Path("plane/eval/figures.json").read_text())
    assert found["plan"]["likelihood"] == {"divergence": "hutchinson", "draws": 2, "rtol": 1e-3, "atol": 1e-3}
    assert found["made"]["data"]["kind"] == "moons"


def test_eval_measures_all_that_a_model_can_honestly_have(genflow_):
    out = genflow_("eval", "noisy")
    assert {"loss", "FD", "KID", "precision", "recall", "density", "coverage", "copying"} == set(figures("noisy/eval"))
    assert "likelihood: left out, this flow was trained on pictures with added noise" in out
    assert "alignment: left out, the model hears no condition" in out
    assert "fd: 8 samples do not span 192 features" in out
    found = json.loads(Path("noisy/eval/figures.json").read_text())
    assert found["made"]["counts"] == {"loss": 16, "samples": 8, "real": 8, "overlap": 0} and found["made"]["nfe"] == 1
    fd = next(each for each in found["figures"] if each["name"] == "FD")
    assert fd["on"] == "8 samples, 8 of folder train" and 0 < fd["real"] < fd["value"]
    assert read_settings("noisy/eval/nearest.png")["model"] == "noisy/checkpoints/step-00000006"


def test_the_distance_is_that_of_the_samples_that_sample_draws(genflow_):
    genflow_("eval", "glow", "--metrics", "fd", "-n", "5", "--seed", "3", "--temperature", "0.5", "--out", "f")
    drawn = load("glow").sample([""], seeds=[3, 4, 5, 6, 7], temperature=0.5).x
    drawn = ((drawn + 1) * 127.5).round() / 127.5 - 1
    x = read_real(FolderConfig("pics", size=8).build("train"), (3, 8, 8)).x[:5].float() / 127.5 - 1
    assert figures("f")["FD"] == pytest.approx(frechet_distance(drawn.flatten(1), x.flatten(1)), rel=1e-5)
    genflow_(
        "eval",
        "glow",
        "--metrics",
        "fd",
        "-n",
        "5",
        "--seed",
        "3",
        "--temperature",
        "0.5",
        "--batch",
        "2",
        "--out",
        "g",
    )
    assert figures("g")["FD"] == pytest.approx(figures("f")["FD"], rel=1e-4)


def test_the_loss_is_that_of_all_held_out_samples_at_each_time(genflow_):
    genflow_("eval", "plane", "--metrics", "loss", "--batch", "7", "--out", "l")
    flow, data = load("plane"), Toy2DConfig("moons", n=200).build("test")
    rows, position = torch.arange(len(data)), torch.arange(len(data))
    batch = SimpleNamespace(x=data.rows[rows], condition=flow.text.encode([""]).expand(len(rows)), position=position)
    expected = {key.removeprefix("validation_"): float(value) for key, value in flow.validate(batch).items()}
    found = {key.replace("loss at t = ", "t"): value for key, value in figures("l").items()}
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 9


def test_an_evaluation_again_holds_until_something_changes(genflow_, capsys):
    genflow_("eval", "tarflow", "--metrics", "fd", "kid", "likelihood", "--guidance", "2", "--out", "again")
    file = Path("again/figures.json")
    out = genflow_("eval", "--again", file)
    assert out.count(" holds\n") == 3 and out.endswith("all hold, to 1e-06\n")
    found = json.loads(file.read_text())
    found["figures"][0]["value"] *= 1 + 1e-5
    file.write_text(json.dumps(found))
    assert "1 of 3 do not hold" in genflow_("eval", "--again", file, code=1)
    found["figures"][0]["value"] /= 1 + 1e-5
    found["made"]["weights"]["sha256"] = "0"
    found["figures"].append({"name": "FID", "value": 1.0})
    file.write_text(json.dumps(found))
    assert main(["eval", "--again", str(file)]) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("other weights, to 1e-06\n") and printed.err.startswith("other weights: ")
    assert "FID" in printed.out and "DOES NOT HOLD" in printed.out


def test_a_test_split_that_overlaps_the_training_split_is_reported(genflow_):
    for split in ("train", "test"):
        Path("twice", split).mkdir(parents=True, exist_ok=True)
        for path in Path("pics", split).glob("*/*.png"):
            (Path("twice", split) / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    Path("twice/test/copy.png").write_bytes(Path(A.replace("dark", "light")).read_bytes())
    data = {"name": "folder", "path": "twice", "size": 8}
    assert main(["train", config("glow", data=data), "out=overlapping"]) == 0
    out = genflow_("eval", "overlapping", "--metrics", "likelihood", "nearest")
    assert "(overlap: 1 of 17 samples of the test split are in the training split too, such as copy.png; " in out


def test_pictures_of_a_class_find_their_caption_and_their_neighbours(genflow_, tmp_path, monkeypatch):
    """By a network of one convolution that hears brightness."""
    weights = {
        "a.weight": torch.ones(2, 3, 1, 1) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1),
        "a.bias": torch.tensor([0.0, 3]),
    }
    save_file(weights, tmp_path / "bright.safetensors")
    op = {"op": "conv_relu", "stride": 1, "padding": 0, "inputs": ["x"], "name": "a"}
    (tmp_path / "bright.json").write_text(json.dumps({"graph": [{"op": "input", "name": "x"}, op]}))
    out = genflow_(
        "eval", "tarflow", "--metrics", "alignment", "nearest", "--features", tmp_path / "bright.json", "--out", "seen"
    )
    found = {each["name"]: each for each in json.loads(Path("seen/figures.json").read_text())["figures"]}
    assert set(found) == {"R@1", "copying"} and found["R@1"]["real"] == 1.0  # of two captions
    assert "16 pictures, 2 captions of folder test; ridge from features" in out and "nearest.png" in out
    assert (
        main(["eval", "tarflow", "--metrics", "fd", "alignment", "--features", "pixels"]) == 2
    )  # pixels know no words


def test_a_reflowed_run_is_evaluated_and_drawn_by_the_real_data(genflow_):
    few = ["train.steps=2", "train.preview_every=2"]
    genflow_("reflow", "plane", "--pairs", "16", "--samples", "4", "--steps", "2", "--out", "re", "--set", *few)
    assert Path("re/previews/step-00000002.png").exists()
    out = genflow_("eval", "re", "--metrics", "likelihood", "-n", "3", "--tolerance", "1e-3")
    assert "nats" in out and "toy2d test, 3 samples; " in out
    assert "in the units of the training data" in genflow_("sample", "re", "-n", "2", "--out", "r")


# ---------------------------------------------------------------------------------------------------------------- sample


def test_samples_are_those_of_the_flow_and_say_how_they_were_made(genflow_):
    assert genflow_("sample", "glow", "-n", "3", "--seed", "4", "--out", "s") == (
        "3 pictures and grid.png in s (1 network evaluation each)\n"
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
    assert not Path("v/points.png").exists()
    numbers = np.array([row[:3] for row in rows], dtype=float)
    assert abs(numbers.mean(0) - (1000, -5, 0)).max() < 100 and (numbers.std(0) / (100, 0.1, 1) > 0.3).all()
    assert (numbers.std(0) / (100, 0.1, 1) < 3).all()
    told = genflow_("sample", "plane", "--out", "p")
    assert told == "1 vector in p/samples.csv and points.png, in the units of the training data\n"
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
    genflow_("edit", "glow", first, "--into", last, "--frames", "1", "--out", "one")
    (frame,) = Path("one").glob("0*.png")
    assert abs(pixels(frame) - pixels(first)).max() <= 1


# -------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "glow", "--split", "nonsense"], "nonsense"),
        (["eval", "glow", "-n", "0"], "n = 0 is too few; the least is 1"),
        (["eval", "glow", "-k", "0"], "k = 0 is too few; the least is 1"),
        (["eval", "glow", "--batch", "0"], "--batch must be 1 or more, not 0"),
        (["eval", "glow", "--seed", "-1"], "seed = -1 is too few; the least is 0"),
        (["eval", "glow", "--metrics", "fid"], "no metric 'fid'. Did you mean 'fd'?"),
        (
            ["eval", "glow", "--metrics", "fd", "-n", "1"],
            "fd: 1 samples, and as many real ones twice, are too few; 2 are the least",
        ),
        (
            ["eval", "glow", "--metrics", "precision-recall", "-n", "3"],
            "3 samples, and as many real ones twice, are too few; 4 are",
        ),
        (["eval", "glow", "--metrics", "alignment"], "alignment: the model hears no condition"),
        (["eval", "tarflow", "--metrics", "alignment"], "alignment: pixels know no words"),
        (["eval", "table", "--metrics", "alignment"], "alignment: vectors show no caption"),
        (["eval", "table", "--features", "nothing.json"], "nothing.json: no such file"),
        (["eval", "glow", "--features", "pixles"], "no features 'pixles'"),
        (["eval", "glow", "--divergence", "exact"], "divergence is for likelihoods of a velocity"),
        (["eval", "plane", "--steps", "0"], "sampling: steps = 0 is too few"),  # before any data are read
        (["eval", "glow", "--steps", "3"], "--steps does nothing for a NormalizingFlow"),
        (["eval", "glow", "--out", "table.csv"], "table.csv is a file; name a folder"),
        (["eval", "noisy", "--metrics", "likelihood"], "trained on pictures with added noise"),
        (["eval", "table", "-k", "2"], "k = 2: vectors are continuous"),
        (["eval", "plane", "--metrics", "likelihood", "--tolerance", "1e-12"], "rtol = 1e-12 is below"),
        (["eval"], "which model? give its run's folder, or --again FILE"),
        (["eval", "glow", "--again", "x.json"], "says itself of which model and how; leave run out"),
        (["eval", "--again", "x.json", "-n", "3"], "--again x.json says itself of which model and how; leave n out"),
        (["eval", "--again", "x.json"], "--again x.json: No such file or directory"),
        (["eval", "--again", "table.csv"], "--again table.csv: no figures.json of an evaluation"),
        (
            ["sample", "glow", "--prompt", "light"],
            "glow hears no condition; leave --prompt, --prompt-file and --class out",
        ),
        (
            ["sample", "glow", "--steps", "4"],
            "--steps does nothing for a NormalizingFlow; what it takes: temperature, guid",
        ),
        (["sample", "glow", "--size", "16"], "--size is for models of a velocity"),
        (["sample", "glow", "--guidance", "2"], "--guidance does nothing: glow hears no condition to guide to"),
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
        (
            "glow",
            {"sample": {"steps": 20}},
            "unknown key 'steps' in sample. Choose from: guidance, inverse, temperature.",
        ),
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
