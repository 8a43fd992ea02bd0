"""The command line at its edges: what is ignored is refused, what a person writes is not read as something else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image
from safetensors.torch import load_file

from genflow.cli import main
from genflow.config import load as load_config
from genflow.data.pictures import read_settings
from genflow.evaluation.page import _plain
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
    import torch

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
    ):
        assert main(words) == 2, words
        assert told in capsys.readouterr().err


def test_models_go_to_the_accelerator_that_there_is(runs, tmp_path, monkeypatch):
    import torch

    from genflow.cli import options

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


def test_a_run_can_be_trained_in_a_thread(runs, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, config_of(runs, "glow", tmp_path)).result() == tmp_path / "run"
