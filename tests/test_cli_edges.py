"""The command line at its edges: what is ignored is refused, what a person writes is not read as something else."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from genflow.cli import main, options
from genflow.config import load as load_config
from genflow.data.pictures import read_settings
from genflow.errors import UserError
from genflow.evaluation.page import _plain
from genflow.flows.sampling import SolveConfig
from genflow.flows.store import find_model
from genflow.functional import noise_from_seeds
from genflow.training.config import RunConfig
from genflow.training.run import train

TRAIN = "train: {steps: 2, batch_size: 4, warmup: 1, preview_every: 0, trackers: [], precision: fp32}\n"
DATA = "data: {name: emoji, size: 16, limit: 8}\n"
MODELS = {
    "glow": DATA + "model: {name: glow, levels: 2, steps: 1, hidden: 8}\nflow: normalizing\n",
    "deaf": DATA + "model: {name: unet, channels: 8, channel_mult: [1, 2], blocks: 1}\nflow: rectified\n",
    "ae": DATA + "model: {name: tiny_autoencoder, factor: 2, width: 8, blocks: 1}\nflow: {name: autoencoder, "
    "bottleneck: {name: gaussian, channels: 4}}\n",
    "vq": DATA + "model: {name: tiny_autoencoder, factor: 2, width: 8, blocks: 1}\nflow: {name: autoencoder, "
    "bottleneck: {name: vq, vocabulary: 16, channels: 4}}\n",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, text in MODELS.items():
        (folder / f"{name}.yaml").write_text(text + TRAIN)
        train(load_config(folder / f"{name}.yaml", [f"out={folder / name}"], schema=RunConfig))
    Image.new("RGB", (16, 16), "red").save(folder / "picture.png")
    return folder


def test_the_noise_of_a_bijection_is_kept(runs, tmp_path):
    assert main(["invert", str(runs / "glow"), str(runs / "picture.png"), "--out", str(tmp_path)]) == 0
    assert load_file(tmp_path / "noise.safetensors")["noise"].shape == (1, 3, 16, 16)


def test_prompts_to_a_model_that_hears_none_are_refused(runs, tmp_path, capsys):
    run = str(runs / "deaf")
    for words in (
        ["plot", run, "--what", "strip", "--prompt", "otter", "--out", str(tmp_path / "p")],
        ["tune", run, "--steps", "2", "--images", "3", "--prompt", "otter"],
    ):
        assert main(words) == 2
        assert "hears no condition" in capsys.readouterr().err
    assert main(["plot", run, "--what", "strip", "--steps", "2", "--out", str(tmp_path / "p")]) == 0


def test_dollars_are_dollars(tmp_path):
    from genflow.evaluation.plots import plot_strip, save_plot

    states = torch.zeros(3, 1, 3, 8, 8)
    save_plot(plot_strip([1.0, 0.5, 0.0], states, states, [r"costs $\bad$"]), tmp_path / "strip.png")


def test_words_in_a_table_stay_in_their_cell():
    assert _plain("<b>|x&\n") == "&lt;b>\\|x&amp; "


def test_frames_tell_how_they_came(runs, tmp_path, capsys):
    picture = str(runs / "picture.png")
    words = ["edit", str(runs / "ae"), picture, "--into", picture, "--frames", "3", "--out", str(tmp_path)]
    assert main(words) == 0
    about = read_settings(tmp_path / "grid.png")
    assert about["frames"] == 3 and about["ema"] is True and about["into"] == picture
    assert "exactly" not in capsys.readouterr().out


def test_what_does_nothing_or_is_no_number_is_refused(runs, tmp_path, capsys):
    run, out = str(runs / "deaf"), ["--out", str(tmp_path / "o")]
    for words, told in (
        (["sample", run, "--guidance", "1", "--interval", "0.2", "0.8", *out], "--interval does nothing"),
        (["sample", run, "--sampler", "dopri5", "--option", "rtol=abc", *out], "rtol = 'abc' is not a number"),
        (["tune", run, "--steps", "2", "--images", "2"], "--images must be 3 or more"),
        (["sample", "x" * 300, *out], "File name too long"),
        (["reflow", run, "--pairs", "4", "--set", "out=elsewhere", *out], "--set out=elsewhere"),
        (["reflow", run, "--pairs", "4", "--out", str(runs / "glow")], "is another run's folder"),
        (["sample", str(runs / "glow"), "--graphs", *out], "--graphs is for models of a velocity; "),
        (["train"], "the following arguments are required: config;"),
    ):
        assert main(words) == 2, words
        assert told in capsys.readouterr().err


def test_guidance_of_a_model_that_hears_nothing_is_refused(runs, tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    for words in (["--guidance", "3"], ["--interval", "0.2", "0.7"], ["--guide", "apg"], ["--rescale", "1"]):
        for run in (["sample", str(runs / "deaf")], ["invert", str(runs / "deaf"), str(runs / "picture.png")]):
            assert main([*run, *words, *out]) == 2, words
            assert f"{words[0]} does nothing: " in capsys.readouterr().err
    assert main(["sample", str(runs / "deaf"), "--steps", "2", "--guidance", "1", *out]) == 0
    weak = ["--weak", str(runs / "deaf"), "--guidance", "2", "--rescale", "0.5"]
    assert main(["sample", str(runs / "deaf"), "--steps", "2", *weak, *out]) == 0


def test_empty_names_are_told(runs, tmp_path, capsys):
    run, picture, out = str(runs / "deaf"), str(runs / "picture.png"), ["--out", str(tmp_path)]
    for words, told in (
        (["sample", run, "--out", ""], "--out is empty; name a folder"),
        (["sample", run, "--weak", "", "--guidance", "2", *out], "has no config.json"),
        (["edit", run, picture, "--prompt", "", "--mask", "", *out], "the name of a picture is empty"),
        (["edit", run, picture, "--into", "", *out], "the name of a picture is empty"),
        (["edit", run, "", "--prompt", "", *out], "the name of a picture is empty"),
    ):
        assert main(words) == 2, words
        assert told in capsys.readouterr().err


def test_what_needs_a_velocity_says_so_whatever_else_is_asked(runs, tmp_path, capsys):
    for words in (["tune", "--steps", "2"], ["reflow", "--steps", "2", "--out", str(tmp_path)]):
        for run in ("glow", "ae"):
            assert main([words[0], str(runs / run), *words[1:]]) == 2
            assert "has no velocity; this is for models of one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"sample": None}, "sample must be a section of keys, not None"),
        ({"sample": {"colour": 1}}, "unknown key 'colour'"),
        ({"sample": {"steps": "many"}}, "steps must be a whole number, not 'many'"),
        ({"sample": {"interval": 3}}, "interval must be a list, not 3"),
        ({"data": [1]}, "data must be a section of keys, not [1]"),
        ({"data": {"size": 16}}, "data: it needs a `name`, one of: "),
        ({"data": {"name": "nope"}}, "data: no dataset is named 'nope'"),
        ({"train": 5}, "train must be a section of keys, not 5"),
    ],
)
def test_a_config_that_was_edited_wrongly_costs_one_line(runs, tmp_path, capsys, section, told):
    shutil.copytree(find_model(runs / "deaf"), tmp_path / "model", ignore=shutil.ignore_patterns("complete.json"))
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **section}))
    words = ["eval", str(tmp_path / "model"), "--metrics", "fd", "-n", "2", "--out", str(tmp_path / "o")]
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_models_go_to_the_accelerator_that_there_is(runs, tmp_path, monkeypatch):
    class Found(Exception):
        pass

    def load(run, *, ema, device):
        raise Found(device)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    monkeypatch.setattr(options, "_load", load)
    with pytest.raises(Found, match="mps"):
        main(["sample", str(runs / "deaf"), "--out", str(tmp_path)])


def test_an_evaluation_without_figures_holds(runs, tmp_path, capsys):
    run, out = str(runs / "glow"), str(tmp_path)
    assert main(["eval", run, "--metrics", "nearest", "--split", "train", "-n", "4", "--out", out]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["figures"] == []
    assert main(["eval", "--again", str(tmp_path / "figures.json")]) == 0
    assert "other" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("then", "now", "code"), [(None, math.inf, 0), (None, 1.0, 1), (1.0, math.inf, 1), (1.0, 1.0, 0)]
)
def test_a_figure_that_is_infinite_holds_where_it_was_so_before(runs, tmp_path, monkeypatch, then, now, code):
    from genflow.cli import eval as command
    from genflow.evaluation.plan import Figure

    run, out, file = str(runs / "glow"), str(tmp_path), tmp_path / "figures.json"
    assert main(["eval", run, "--metrics", "nearest", "--split", "train", "-n", "4", "--out", out]) == 0
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "figures": [{"name": "PSNR, dB", "value": then}]}))
    measure = command._measure

    def infinite(*given):
        found, made = measure(*given)
        return replace(found, figures=[Figure("PSNR, dB", now, "4 samples")]), made

    monkeypatch.setattr(command, "_measure", infinite)
    assert main(["eval", "--again", str(file)]) == code


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda about: about["made"].pop("threads"), 0, "other threads: not told then"),
        (lambda about: about["made"].pop("versions"), 0, "other versions: not told then"),
        (lambda about: about["made"].pop("weights"), 2, "no figures.json of an evaluation ('weights')"),
        (lambda about: about["plan"]["sampling"].update(old=1), 2, "'old', of its sampling, is nothing that"),
        (lambda about: about["plan"].update(seed="one"), 2, "plan: seed must be a whole number, not 'one'"),
        (lambda about: about["plan"].update(sampling=None), 2, "plan: sampling must be a section of keys, not nothing"),
        (
            lambda about: about["plan"]["sampling"].update(temperature="hot"),
            2,
            "its sampling: temperature must be a number",
        ),
        (lambda about: about["made"].update(model=None), 2, "made: model must be text, not nothing"),
        (lambda about: about.update(figures=[{"name": 1, "value": 1}]), 2, "figures: name must be text, not 1"),
        (lambda about: about.update(figures=[{"name": "FD", "value": "much"}]), 2, "could not convert string to float"),
    ],
    ids=["threads", "versions", "weights", "sampling", "seed", "no-sampling", "temperature", "model", "name", "value"],
)
def test_figures_of_another_version_are_computed_again_or_refused_in_one_line(
    runs, tmp_path, capsys, change, code, says
):
    file = tmp_path / "figures.json"
    words = ["--metrics", "nearest", "--split", "train", "-n", "4", "--out", str(tmp_path)]
    assert main(["eval", str(runs / "glow"), *words]) == 0
    change(about := json.loads(file.read_text()))
    file.write_text(json.dumps(about))
    assert main(["eval", "--again", str(file)]) == code
    assert says in capsys.readouterr().err


def test_a_link_to_nothing_is_no_folder_to_draw_into(runs, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    for out in ("link", "link/deep"):
        assert main(["sample", str(runs / "deaf"), "--out", str(tmp_path / out)]) == 2
        assert "link is a link to what is not there; name a folder" in capsys.readouterr().err


def test_a_grid_that_could_not_be_kept_is_not_learnt(runs, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert main(["tune", str(runs / "deaf"), "--steps", "2", "--images", "3"]) == 2
    err = capsys.readouterr().err
    assert "nothing can be written in" in err and "RMSE" not in err


# -------------------------------------------------------------------------------------------- how to sample, as it is asked


@dataclass(frozen=True)
class Decoding:
    """Settings of a model of tokens."""

    decoder: object = None
    draft: str | None = None


def settings_of(words, run, own, *, sampling=None, unguided=False):
    parser = argparse.ArgumentParser()
    options.add_solving(parser)
    args = parser.parse_args([str(word) for word in words])
    args.run = str(run)
    config, hears = SimpleNamespace(sampling=sampling or SolveConfig), SimpleNamespace(max_tokens=1)
    flow = SimpleNamespace(recipe={"sample": own}, config=config, text=hears)
    return options.sampling_of(args, flow, unguided=unguided)


def test_options_belong_to_the_sampler_they_came_with(tmp_path):
    own = {"sampler": "dopri5", "options": {"rtol": 0.01}, "steps": 4}
    assert settings_of([], tmp_path, own) == own
    assert settings_of(["--sampler", "heun"], tmp_path, own) == {"sampler": "heun", "steps": 4}
    asked = settings_of(["--sampler", "dopri5", "--option", "atol=1e-3", "max_steps=9"], tmp_path, own)
    assert asked["options"] == {"atol": 1e-3, "max_steps": 9}
    own = {"decoder": {"name": "gumbel"}, "draft": "another"}
    assert settings_of([], tmp_path, own, sampling=Decoding) == own
    assert settings_of(["--decoder", "sjd"], tmp_path, own, sampling=Decoding) == {"decoder": {"name": "sjd"}}


def test_what_needs_no_guidance_has_it_only_where_it_is_asked_for(tmp_path):
    own = {"guidance": 2.0}
    assert settings_of([], tmp_path, own)["guidance"] == 2.0
    assert settings_of([], tmp_path, own, unguided=True)["guidance"] == 1.0
    assert settings_of(["--guidance", 3], tmp_path, own, unguided=True)["guidance"] == 3.0
    for words in (["--interval", 0, 1], ["--guide", "apg"], ["--rescale", 0.5]):
        assert settings_of(words, tmp_path, own)["guidance"] == 2.0
        with pytest.raises(UserError, match=f"{words[0]} does nothing without guidance; add --guidance 2"):
            settings_of(words, tmp_path, own, unguided=True)


def test_what_was_learnt_holds_until_another_way_is_asked_for(tmp_path):
    learnt = {"sampler": "ab2", "grid": [1.0, 0.4, 0.0]}
    (tmp_path / "sampling.json").write_text(json.dumps({"2": learnt}))
    own = {"sampler": "dopri5", "options": {"rtol": 0.01}, "steps": 2, "shift": 3.0, "guidance": 2.0}
    plain = {**learnt, "options": None, "shift": 1.0, "steps": 2, "guidance": 2.0}
    assert settings_of([], tmp_path, own) == plain
    assert settings_of(["--guidance", 4], tmp_path, own) == {**plain, "guidance": 4.0}
    for words in (
        ["--sampler", "heun"],
        ["--shift", 2],
        ["--grid", "uniform"],
        ["--option", "rtol=0.1"],
        ["--steps", 3],
    ):
        assert settings_of(words, tmp_path, own).get("grid") != learnt["grid"]


def test_settings_reach_the_velocity_the_sampler_and_the_grid(monkeypatch):
    given = {"guidance": 2.0, "interval": (0.1, 0.9), "guide": {"name": "apg"}, "rescale": 0.5}
    settings = {**given, "sampler": "dopri5", "options": {"rtol": 0.01}, "grid": "uniform", "shift": 3.0, "steps": 4}
    flow = SimpleNamespace(
        guided=lambda condition, **how: (condition, how),
        times=lambda *how: how,
        config=SimpleNamespace(coupling=SimpleNamespace(independent=False), prediction="v"),
        shape=(2,),
        t_max=0.9,
        device="cpu",
    )
    assert options.guided(flow, "a", settings) == ("a", given)
    assert options.guided(flow, "a", settings, guidance=1.0) == ("a", {**given, "guidance": 1.0})
    assert options.time_grid(flow, settings, 5) == (5, "uniform", 3.0) and options.time_grid(flow, {}, 5)[2] == 1.0
    monkeypatch.setattr("genflow.samplers.bound_sampler", lambda *how: how)
    assert options.solver(flow, settings, [7]) == ("dopri5", {"rtol": 0.01}, [7])
    with pytest.raises(UserError, match="ancestral"):
        options.solver(flow, {"sampler": "ancestral"}, [7])
    torch.testing.assert_close(options.first_state(flow, [3, 4]), 0.9 * noise_from_seeds([3, 4], (2,)))


def test_a_device_that_computes_nothing_is_refused(runs, tmp_path, capsys):
    for device in ("meta", "meta:0"):
        assert main(["sample", str(runs / "deaf"), "--device", device, "--out", str(tmp_path)]) == 2
        assert "--device meta computes nothing" in capsys.readouterr().err


def test_a_device_that_is_asked_for_is_taken(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    monkeypatch.setattr(options, "_load", lambda run, *, ema, device: (device, ema))
    monkeypatch.setattr(options, "sampling_of", lambda args, flow, *, unguided: unguided)
    for device, no_ema in (("cpu", False), ("cuda", True)):
        asked = argparse.Namespace(run="x", batch=1, no_ema=no_ema, device=device)
        assert options.open_model(asked, unguided=no_ema) == ((device, not no_ema), no_ema)


def test_weights_of_loras_are_told_from_paths_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there:2").mkdir()
    taken = []
    monkeypatch.setattr("genflow.interop.lora.load_lora", lambda flow, path, weight: taken.append((path, weight)))
    options.take_loras(None, ["there:2", "there:2:0.5", "away:2", "away:two", ":2", "away"])
    assert taken == [("there:2", 1.0), ("there:2", 0.5), ("away", 2.0), ("away:two", 1.0), (":2", 1.0), ("away", 1.0)]


def test_values_are_read_as_json_does_and_otherwise_as_words():
    words = ["a=2", "b=1e-3", "c=.5", "d=True", "e=False", "f=true", "g=[1, 2]", "h=x=y", "i="]
    found = options.read_options("--option", words)
    assert found == {"a": 2, "b": 1e-3, "c": 0.5, "d": True, "e": False, "f": True, "g": [1, 2], "h": "x=y", "i": ""}
    assert type(found["a"]) is int
    for word in ("a", "=1", ""):
        with pytest.raises(UserError, match=f"--option: {word!r} is not KEY=VALUE, such as eta=0.5"):
            options.read_options("--option", [word])


def test_where_nothing_can_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert options.writable(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b" and not (tmp_path / "a").exists()
    for out in ("file", "file/below"):
        with pytest.raises(UserError, match="file is a file; name a folder"):
            options.writable(str(tmp_path / out))
    with pytest.raises(UserError, match="has 300 letters, too many for a folder's name"):
        options.writable(str(tmp_path / ("n" * 300)))
    monkeypatch.setattr(options.os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"nothing can be written in {tmp_path}; name another folder"):
        options.writable(str(tmp_path / "a"))


def test_white_is_1_and_black_is_minus_1():
    flow = SimpleNamespace(shape=(3, 4, 4), device="cpu")
    for colour, value in (("white", 1.0), ("black", -1.0)):
        assert (options.fit_image(Image.new("RGB", (8, 8), colour), flow) == value).all()


@pytest.mark.parametrize("option", ["temperature", "guidance", "inverse"])
def test_a_bijection_run_there_and_back_takes_no_options_of_sampling(option):
    none = dict.fromkeys(("temperature", "guidance", "inverse"))
    options.refuse_sampling(argparse.Namespace(**none))
    with pytest.raises(UserError, match=f"--{option} does nothing here"):
        options.refuse_sampling(argparse.Namespace(**{**none, option: 1}))


def test_the_error_of_a_bijection_is_the_largest_and_each_picture_has_its_own_condition(tmp_path, capsys):
    from genflow.cli.invert import _by_bijection

    def decode(z, own):
        x = z - own.view(-1, 1, 1, 1)
        x[own == 1, 0, 0, 0] += 0.25  # of the second picture
        return x

    text = SimpleNamespace(encode=lambda prompts: torch.arange(float(len(prompts))))
    flow = SimpleNamespace(text=text, encode=lambda x, own: x + own.view(-1, 1, 1, 1), decode=decode)
    args = argparse.Namespace(run="x", no_ema=False, batch=1, pictures=["a", "b"])
    args.temperature = args.guidance = args.inverse = None
    x = torch.zeros(2, 3, 4, 4)
    for prompts in (["p"], ["p", "q"]):
        assert _by_bijection(args, prompts, flow, x, tmp_path) == 0
        assert "the largest error of a value in [-1, 1]: 0.25" in capsys.readouterr().out
        noise = load_file(tmp_path / "noise.safetensors")["noise"]
        assert torch.equal(noise[:, 0, 0, 0], torch.tensor([0.0, 1.0]))


# ------------------------------------------------------------------------------------------------ weights, and how runs end


def config_of(runs, name, tmp_path, *changes):
    return load_config(runs / f"{name}.yaml", [f"out={tmp_path / 'run'}", *changes], schema=RunConfig)


def test_a_codebook_goes_with_the_weights_that_a_run_begins_with(runs, tmp_path):
    before = load_file(next((runs / "vq" / "checkpoints").glob("step-*")) / "model.safetensors")
    config = config_of(runs, "vq", tmp_path, f"init={runs / 'vq'}", "train.ema=0", "train.steps=1")
    optimizer = replace(config.train.optimizer, lr=0.0)
    run = train(replace(config, train=replace(config.train, optimizer=optimizer)))
    after = load_file(next((run / "checkpoints").glob("step-*")) / "model.safetensors")
    moved = (after["bottleneck.codebook"] - before["bottleneck.codebook"]).norm() / before["bottleneck.codebook"].norm()
    assert 0 < float(moved) < 0.5  # one step of its running means, and not another codebook


def test_what_was_to_come_after_the_last_checkpoint_comes_when_the_run_goes_on(runs, tmp_path):
    config = config_of(runs, "glow", tmp_path, "train.validate_every=2", "train.validation_split=train")
    run = train(config)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if "validation_loss" not in line) + "\n")
    train(config)
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told if "validation_loss" in line] == [2]
    train(config)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(lines)


def test_what_a_killed_process_left_goes_with_the_next_checkpoint(runs, tmp_path):
    left = tmp_path / "run" / "checkpoints"
    for name in (".step-00000009.partial", "step-00000001"):
        (left / name).mkdir(parents=True)
    train(config_of(runs, "glow", tmp_path))
    assert [path.name for path in left.iterdir()] == ["step-00000002"]


def test_what_a_person_laid_beside_the_checkpoints_stays(runs, tmp_path):
    mine = tmp_path / "run" / "checkpoints" / "step-00000001-reflow"
    mine.mkdir(parents=True)
    train(config_of(runs, "glow", tmp_path))
    assert mine.is_dir()


def test_a_run_can_be_trained_in_a_thread(runs, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, config_of(runs, "glow", tmp_path)).result() == tmp_path / "run"


def test_steps_of_a_sampler_that_chooses_its_own_are_refused(runs, tmp_path, capsys):
    draw = ["sample", str(runs / "deaf"), "--sampler", "dopri5", "--out", str(tmp_path)]
    for option, value in {"--steps": "3", "--grid": "karras", "--shift": "2"}.items():
        assert main([*draw, option, value]) == 2
        assert f"{option} does nothing for sampler 'dopri5'" in capsys.readouterr().err
    assert main([*draw, "--option", "rtol=0.1"]) == 0
    measure = ["eval", str(runs / "deaf"), "--metrics", "fd", "-n", "4", "--sampler", "dopri5", "--steps", "3"]
    assert main([*measure, "--out", str(tmp_path)]) == 2
    assert "--steps does nothing for sampler 'dopri5'" in capsys.readouterr().err


def test_how_to_draw_is_refused_where_nothing_is_drawn(runs, tmp_path, capsys):
    measure = ["eval", str(runs / "deaf"), "--out", str(tmp_path), "--metrics", "loss"]
    for given in ("--guidance 3", "--steps 4", "--top-k 2", "--dtype bf16", "--seed 5", "--features pixels"):
        assert main([*measure, *given.split()]) == 2
        assert f"{given.split()[0]} does nothing for loss: nothing is drawn" in capsys.readouterr().err
    assert main([*measure, "--batch", "2", "--no-ema"]) == 0


def test_options_are_known_by_their_whole_names(runs, capsys):
    assert main(["sample", str(runs / "deaf"), "--step", "3"]) == 2
    assert "unrecognized arguments: --step 3; see genflow sample --help" in capsys.readouterr().err
    assert main(["bench", "train", "--round", "3"]) == 2  # of a command's own command too
    assert "--round" in capsys.readouterr().err


def test_what_to_type_next_can_be_typed(runs, tmp_path, capsys):
    run = tmp_path / "a run"
    assert main(["train", str(runs / "deaf.yaml"), f"out={run}"]) == 0
    assert f"genflow sample '{run}'" in capsys.readouterr().err
    run = tmp_path / "another run"
    assert main(["train", str(runs / "ae.yaml"), f"out={run}"]) == 0
    assert f"genflow eval '{run}'" in capsys.readouterr().err


def test_long_names_are_apart_from_what_they_are(capsys):
    assert main(["info", "bijection"]) == 0
    assert "  transformer_autoregressive z_i" in capsys.readouterr().out


def test_an_autoencoder_of_pictures_without_a_split_says_which_is_missing(runs, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    data = f"data={{name: folder, path: {tmp_path / 'pictures'}, size: 16}}"
    assert main(["train", str(runs / "ae.yaml"), f"out={tmp_path / 'ae'}", data]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "ae")]) == 2
    error = capsys.readouterr().err
    assert "reconstruction: left out" in error and "no subfolder 'test'" in error and "split 'train'" in error
