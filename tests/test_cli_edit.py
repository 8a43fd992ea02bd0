"""genflow edit and genflow invert, on real pictures and a tiny model that never learned anything."""

from __future__ import annotations

import functools
import json
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import genflow.config
from genflow.cli import main
from genflow.cli.invert import _save_noise, _together
from genflow.data.emoji import EmojiConfig
from genflow.data.pictures import read_settings
from genflow.errors import UserError
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.store import load, save_model
from genflow.flows.tuned import save_tuned
from genflow.networks.mmdit import MMDiTConfig
from genflow.text.trained import LearnedTextConfig

TEXT = LearnedTextConfig(dim=8, heads=2, layers=1, max_tokens=16)
MODEL = MMDiTConfig(
    depth=1, hidden=32, heads=2, patch_size=8, in_channels=3, context_dim=8, pooled_dim=8, sample_size=2
)
FLOW = RectifiedFlowConfig()


def make_model(folder: Path, of: RectifiedFlowConfig | None = None) -> Path:
    torch.manual_seed(0)
    own = of or FLOW
    flow = own.build(MODEL.build(), TEXT.build(), shape=(3, 16, 16))
    for p in flow.network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    sections = {"model": ("mmdit", MODEL), "flow": ("rectified", own), "text": ("learned", TEXT)}
    config = {key: {"name": name, **genflow.config.to_dict(each)} for key, (name, each) in sections.items()}
    config |= {"sample": {"sampler": "euler", "steps": 3, "guidance": 2.0}, "shape": [3, 16, 16]}
    save_model(folder, config=config, state=flow.state_dict())
    return folder


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A model, two pictures and a mask, in one folder."""
    folder = tmp_path_factory.mktemp("edit")
    make_model(folder / "model")
    data = EmojiConfig(limit=2).build("test")
    for i in range(2):
        data.image(i).save(folder / f"p{i}.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:20]).save(folder / "wide.png")
    Image.fromarray(mask * 0).save(folder / "black.png")
    (folder / "broken.png").write_bytes((folder / "p0.png").read_bytes()[:300])
    return folder


@pytest.fixture
def genflow_(where, monkeypatch, tmp_path):
    """Runs a command in the folder; returns its output folder."""
    monkeypatch.chdir(where)

    def run(command, *arguments, code=0):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert main([command, "model", *arguments, "--out", str(out)]) == code
        return out

    return run


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def pictures(out):
    return [pixels(path) for path in sorted(out.glob("0*.png"))]


def original(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.LANCZOS)).astype(int)


@pytest.mark.parametrize(
    "how", [["invert", "p0.png"], ["edit", "p0.png", "--prompt", "a"], ["edit", "p0.png", "--into", "p1.png"]]
)
def test_steps_of_a_sampler_that_chooses_its_own_are_refused(how, genflow_, capsys):
    genflow_(*how, "--sampler", "dopri5", "--steps", "4", code=2)
    assert "--steps does nothing for sampler 'dopri5'" in capsys.readouterr().err


def test_invert_prints_the_error_of_every_round_trip_and_writes_the_noise(genflow_, where, capsys):
    out = genflow_("invert", "p0.png", "p1.png", "--prompt", "a", "--prompt", "b", "--steps", "4", "16", "64")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["PSNR,", "dB", "4", "steps", "16", "steps", "64", "steps", "std", "of", "noise"]
    for name, line in zip(("p0.png", "p1.png"), lines[1:3], strict=True):
        first, *rest = line.split()
        *dbs, std = [float(each) for each in rest]
        assert first == name and dbs[0] < dbs[2] and dbs[2] > 25 and 0.1 < std < 10, line
    assert lines[3].split()[:4] == ["evaluations", "8", "32", "128"]
    with safe_open(out / "noise.safetensors", framework="pt") as file:
        noise, about = file.get_tensor("noise"), json.loads(file.metadata()["genflow"])
    assert noise.shape == (2, 3, 16, 16) and about["steps"] == 64 and about["pictures"] == ["p0.png", "p1.png"]
    assert about["guidance"] == 1 and about["prompts"] == ["a", "b"]
    assert read_settings(out / "grid.png")["nfe"] == [8, 32, 128]
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "noise.safetensors"]
    # the noise gives the picture back
    flow = load(where / "model")
    with torch.no_grad():
        condition = flow.embed(flow.text.encode(["a"]))
        back = genflow.euler(flow.guided(condition), noise[:1], genflow.shifted(64)).x
    given = torch.from_numpy(original(where / "p0.png")).permute(2, 0, 1) / 127.5 - 1
    assert (back[0] - given).square().mean().sqrt() < 0.12


def test_invert_does_not_name_steps_that_a_sampler_chooses(genflow_, capsys):
    genflow_("invert", "p0.png", "--sampler", "dopri5", "--option", "rtol=0.1")
    out = capsys.readouterr().out
    assert out.startswith("PSNR, dB     own steps ") and "of own steps, in" in out


def test_noise_in_the_file_is_that_of_encode_and_strength_begins_within_the_grid(tmp_path, where):
    make_model(tmp_path / "eps", RectifiedFlowConfig(prediction="eps", t_min=0.3))
    asked = [str(tmp_path / "eps"), str(where / "p0.png"), "--device", "cpu"]
    assert main(["invert", *asked, "--sampler", "heun", "--steps", "8", "--out", str(tmp_path / "in")]) == 0
    flow = load(tmp_path / "eps")
    given = torch.from_numpy(original(where / "p0.png")).permute(2, 0, 1)[None] / 127.5 - 1
    noise = load_file(tmp_path / "in" / "noise.safetensors")["noise"]
    torch.testing.assert_close(noise, flow.encode(given, steps=8), rtol=0, atol=0.02)  # of bytes rounded once more
    assert flow.t_max == 0.7
    assert main(["edit", *asked, "--prompt", "red", "--from", "a", "--out", str(tmp_path / "out")]) == 0
    settings = read_settings(tmp_path / "out" / "grid.png")
    assert settings["strength"] == 0.7 and "sampler" not in settings


def test_every_number_of_steps_has_its_own_tuned_grid(tmp_path, where):
    shutil.copytree(where / "model", tmp_path / "model")
    save_tuned(tmp_path / "model", 3, {"sampler": "unipc", "grid": [1.0, 0.9, 0.2, 0.0]})
    asked = ["invert", str(tmp_path / "model"), str(where / "p0.png"), "--out", str(tmp_path / "out"), "--steps"]
    assert main([*asked, "3"]) == 0
    alone = read_settings(tmp_path / "out" / "grid.png")
    assert (alone["sampler"], alone["grid"], alone["steps"]) == ("unipc", [1.0, 0.9, 0.2, 0.0], [3])
    assert main([*asked, "3", "4"]) == 0
    both = read_settings(tmp_path / "out" / "grid.png")
    assert both["sampler"] == ["unipc", "euler"] and both["psnr"][0][0] == alone["psnr"][0][0]
    with safe_open(tmp_path / "out" / "noise.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["genflow"])["sampler"] == "euler"


def test_a_picture_of_a_batch_is_the_picture_alone(genflow_):
    stochastic = ["--sampler", "ancestral"]
    for extra in ([], stochastic, ["--mask", "mask.png", "--repeats", "2"], ["--from", "a"], ["--rf"]):
        edit = ["--prompt", "x", "--prompt", "y", "-n", "2", "--seed", "3", *extra]
        together, small = (
            genflow_("edit", "p0.png", "p1.png", *edit),
            genflow_("edit", "p0.png", "p1.png", *edit, "--batch", "3"),
        )
        alone = genflow_("edit", "p1.png", *edit)
        assert len(pictures(together)) == 8 and len({each.tobytes() for each in pictures(together)}) == 8
        for a, b in zip(pictures(together), pictures(small), strict=True):
            assert abs(a - b).max() <= 1
        for a, b in zip(pictures(together)[4:], pictures(alone), strict=True):
            assert abs(a - b).max() <= 1


def test_image_to_image_is_the_way_without_any_other_and_says_how_it_was_made(genflow_, capsys):
    out = genflow_("edit", "p0.png", "--prompt", "A red  apple!", "--seed", "5")
    assert capsys.readouterr().out == f"1 picture and grid.png in {out}: image-to-image, 2 network evaluations each\n"
    settings = read_settings(out / "0000-p0-a-red-apple-5.png")
    assert settings == {
        "way": "image-to-image",
        "n": 1,
        "seed": 5,
        "strength": 0.6,
        "model": "model",
        "ema": True,
        "sampler": "euler",
        "steps": 3,
        "guidance": 2.0,
        "nfe": 2,
        "picture": "p0.png",
        "prompt": "A red  apple!",
    }
    assert read_settings(out / "grid.png")["pictures"] == ["p0.png"]
    barely = genflow_("edit", "p0.png", "--prompt", "x", "--strength", "0.001")
    assert abs(pictures(barely)[0] - original("p0.png")).mean() < 4
    assert pixels(out / "grid.png")[20, 20].tolist() == original("p0.png")[2, 2].tolist()  # the picture is at the left


def test_inpainting_leaves_the_black_part_of_the_mask_bit_equal(genflow_):
    out = genflow_("edit", "p0.png", "p1.png", "--prompt", "x", "--mask", "mask.png", "--sampler", "heun")
    for name, edited in zip(("p0.png", "p1.png"), pictures(out), strict=True):
        assert np.array_equal(edited[:, :8], original(name)[:, :8])
        assert (edited[:, 8:] != original(name)[:, 8:]).any(-1).mean() > 0.5
    assert read_settings(out / "grid.png")["mask"] == "mask.png"


def test_flowedit_from_a_prompt_to_itself_changes_nothing(genflow_):
    same = genflow_("edit", "p0.png", "--from", "otter", "--from-guidance", "2", "--prompt", "otter")
    assert np.array_equal(pictures(same)[0], original("p0.png"))
    other = genflow_("edit", "p0.png", "--from", "otter", "--prompt", "pizza")
    assert not np.array_equal(pictures(other)[0], original("p0.png"))


def test_rf_inversion_with_full_control_returns_the_picture(genflow_):
    control = ["--rf", "--eta", "1", "--hold", "0", "--guidance", "1"]
    back = genflow_("edit", "p0.png", "--prompt", "x", *control)
    assert abs(pictures(back)[0] - original("p0.png")).max() <= 1
    assert {"gamma": 0.5, "eta": 1.0, "hold": 0.0, "nfe": 6}.items() <= read_settings(back / "grid.png").items()


def test_an_interpolation_begins_at_one_picture_and_ends_at_the_other(genflow_):
    frames = genflow_(
        "edit", "p0.png", "--into", "p1.png", "--prompt", "a", "--to", "b", "--frames", "5", "--steps", "60"
    )
    first, *between, last = pictures(frames)
    assert len(between) == 3
    assert abs(first - original("p0.png")).mean() < 16 > abs(last - original("p1.png")).mean()
    assert len({each.tobytes() for each in (first, *between, last)}) == 5
    prompts = genflow_("edit", "p0.png", "p1.png", "--to", "b", "--frames", "2", "--batch", "3")
    assert len(pictures(prompts)) == 4
    assert read_settings(prompts / "grid.png")["guidance"] == 1
    assert read_settings(prompts / "grid.png")["nfe"] == 6  # 3 steps to noise, and 3 back


def test_an_interpolation_has_both_ends_however_many_frames(genflow_):
    how = ["p0.png", "--into", "p1.png", "--prompt", "a"]
    outs = [genflow_("edit", *how, "--to", "b", "--frames", n) for n in "125"]
    (one,), (first, last), five = (pictures(out) for out in outs)
    for same in (one, five[0]):
        assert abs(same - first).max() <= 1
    assert abs(five[4] - last).max() <= 1
    assert read_settings(outs[1] / "grid.png")["to"] == "b"
    assert pixels(outs[1] / "grid.png")[20, 20].tolist() == original("p0.png")[2, 2].tolist()
    (there,) = pictures(genflow_("edit", "p1.png", "--into", "p1.png", "--prompt", "b", "--frames", "1"))
    assert abs(there - last).max() <= 1  # to noise and back under the prompt where it ends
    without, empty = (pictures(genflow_("edit", *how, *to, "--frames", "2"))[1] for to in ([], ["--to", ""]))
    assert abs(without - empty).max() > 1


def test_rf_inversion_inverts_without_a_prompt_and_comes_back_as_it_is_told(genflow_, where, monkeypatch):
    from genflow.samplers import editing

    seen, rf_inversion = {}, editing.rf_inversion

    def spied(now, velocity, x, noise, grid, **how):
        seen.update(now=now, x=x, **how)
        return rf_inversion(now, velocity, x, noise, grid, **how)

    monkeypatch.setattr(editing, "rf_inversion", spied)
    genflow_("edit", "p0.png", "--prompt", "x", "--rf", "--gamma", "0.2", "--eta", "0.7", "--hold", "0.4")
    assert (seen["gamma"], seen["eta"], seen["interval"]) == (0.2, 0.7, (0.4, 1.0))
    flow, half = load(where / "model"), torch.full((1,), 0.5)
    with torch.no_grad():
        unprompted = flow.guided(flow.embed(flow.text.encode([""])), guidance=1.0)(seen["x"], half)
        torch.testing.assert_close(seen["now"](seen["x"], half), unprompted)


def test_repeated_steps_draw_their_noise_from_the_seeds_of_the_pictures(genflow_, monkeypatch):
    from genflow.samplers import editing

    seen, inpaint = [], editing.inpaint

    def spied(*arguments, **how):
        seen.append((how["repeats"], list(how["seeds"])))
        return inpaint(*arguments, **how)

    monkeypatch.setattr(editing, "inpaint", spied)
    genflow_("edit", "p0.png", "--prompt", "x", "--mask", "mask.png", "--repeats", "3", "-n", "2", "--seed", "7")
    assert seen == [(3, [7, 8])]


def test_flowedit_leaves_the_runs_own_sampler_and_its_options_alone(where, tmp_path):
    shutil.copytree(where / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["sample"] |= {"sampler": "dopri5", "options": {"rtol": 0.01}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    asked = [str(tmp_path / "model"), str(where / "p0.png"), "--from", "a", "--prompt", "b"]
    assert main(["edit", *asked, "--out", str(tmp_path / "out")]) == 0
    assert not {"sampler", "options"} & set(read_settings(tmp_path / "out" / "grid.png"))


def test_the_sheet_says_what_its_cells_are_and_shows_what_is_masked(genflow_, monkeypatch):
    import genflow.data.pictures as module

    seen, caption_grid = [], module.caption_grid

    def spied(x, captions, **how):
        seen.append((x, captions, how["columns"]))
        return caption_grid(x, captions, **how)

    monkeypatch.setattr(module, "caption_grid", spied)
    genflow_("edit", "p0.png", "--prompt", "x", "--mask", "mask.png")
    genflow_("edit", "p0.png", "p1.png", "--to", "y", "--frames", "2")
    (x, captions, columns), (_, frames, _) = seen
    assert captions == ["p0", "masked", "x"] and columns == 3
    assert torch.equal(x[1, :, :, :8], x[0, :, :, :8]) and not x[1, :, :, 8:].any()
    assert frames == ["p0", "frame 1", "frame 2", "p1", "frame 1", "frame 2"]


def test_a_mask_may_be_smaller_but_not_of_another_shape_and_grey_is_not_white(genflow_, where, capsys):
    grey = np.full((16, 16), 100, np.uint8)
    grey[:, 8:] = 255
    Image.fromarray(grey).save(where / "grey.png")
    ways = [genflow_("edit", "p0.png", "--prompt", "x", "--mask", name) for name in ("mask.png", "grey.png")]
    assert np.array_equal(*(pictures(way)[0] for way in ways))
    with Image.open(where / "p0.png") as image:
        image.convert("RGB").resize((20, 32)).save(where / "tall.png")
    genflow_("edit", "tall.png", "--prompt", "x", "--mask", "wide.png", code=2)
    assert "the mask wide.png is 32 x 20 pixels, but tall.png is 20 x 32" in capsys.readouterr().err


def test_each_picture_is_inverted_under_its_own_prompt_in_any_batch(genflow_):
    how = ["invert", "p0.png", "p1.png", "--prompt", "a", "--prompt", "b"]
    together, apart = (load_file(genflow_(*how, "--batch", n) / "noise.safetensors")["noise"] for n in "21")
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    swapped = load_file(genflow_("invert", "p1.png", "p0.png", "--prompt", "b", "--prompt", "a") / "noise.safetensors")
    torch.testing.assert_close(swapped["noise"].flip(0), together, rtol=1e-4, atol=1e-4)


def test_what_all_ways_share_is_told_once():
    ways = [{"steps": 4, "sampler": "heun"}, {"steps": 8, "sampler": "heun"}, {"steps": 4, "shift": 2.0}]
    assert _together(ways[:2]) == {"steps": [4, 8], "sampler": "heun"}
    assert _together(ways) == {"steps": [4, 8, 4], "sampler": ["heun", "heun", None], "shift": [None, None, 2.0]}


def test_noise_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "noise.safetensors").mkdir()
    with pytest.raises(UserError, match=r"could not write .*noise\.safetensors: Is a directory"):
        _save_noise(tmp_path / "noise.safetensors", torch.zeros(1), {})
    assert [path.name for path in tmp_path.iterdir()] == ["noise.safetensors"]


def test_a_mask_may_be_strokes_on_a_clear_sheet(genflow_, where):
    mask = np.asarray(Image.open(where / "mask.png"))
    strokes = np.stack([np.full_like(mask, 255), mask], -1)
    Image.fromarray(strokes, "LA").save(where / "strokes.png")
    ways = [genflow_("edit", "p0.png", "--prompt", "x", "--mask", name) for name in ("mask.png", "strokes.png")]
    assert np.array_equal(*(pictures(way)[0] for way in ways))


def test_a_model_of_oblong_pictures_edits_and_inverts_oblong_ones(where, tmp_path, monkeypatch):
    from genflow.cli.options import fit_image

    monkeypatch.chdir(where)
    shutil.copytree("model", tmp_path / "oblong")
    config = json.loads((tmp_path / "oblong" / "config.json").read_text())
    (tmp_path / "oblong" / "config.json").write_text(json.dumps({**config, "shape": [3, 8, 16]}))
    with Image.open("p0.png") as image:
        assert fit_image(image.convert("RGB"), load(tmp_path / "oblong")).shape == (3, 8, 16)
    out = str(tmp_path / "out")
    asked = ["edit", str(tmp_path / "oblong"), "p0.png", "--prompt", "猫", "--mask", "mask.png", "--out", out]
    assert main(asked) == 0
    assert pixels(tmp_path / "out" / "0000-p0-猫-0.png").shape == (8, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "p0.png"], 'say what the pictures become, --prompt "..."'),
        (["edit", "none.png", "--prompt", "x"], "none.png: No such file"),
        (["edit", "broken.png", "--prompt", "x"], "broken.png: "),
        (["edit", "model/config.json", "--prompt", "x"], "model/config.json: not a picture"),
        (["edit", "p0.png", "--prompt", "x", "--mask", "mask.png", "--from", "y"], "--mask and --from are two ways"),
        (["edit", "p0.png", "--prompt", "x", "--rf", "--into", "p1.png"], "--rf and --into are two ways"),
        (
            ["edit", "p0.png", "--prompt", "x", "--eta", "1"],
            "--eta belongs to RF-inversion, and this is image-to-image",
        ),
        (
            ["edit", "p0.png", "--to", "x", "--seed", "1"],
            "--seed belongs to image-to-image, inpainting, FlowEdit, RF-inversion, and this is",
        ),
        (
            ["edit", "p0.png", "--prompt", "x", "--rf", "--strength", "1"],
            "--strength belongs to image-to-image, FlowEdit, and this is RF",
        ),
        (["edit", "p0.png", "--prompt", "x", "--rf", "--hold", "1"], "--hold must be 0 or more and below 1, not 1.0"),
        (["edit", "p0.png", "--prompt", "x", "-n", "0"], "-n must be 1 or more, not 0"),
        (["edit", "p0.png", "--prompt", "x", "--prompt", "y", "--to", "z"], "begins at one --prompt, not at 2"),
        (["edit", "p0.png", "--prompt", "x", "--strength", "1.5"], "strength = 1.5 is not within"),
        (
            ["edit", "p0.png", "--prompt", "x", "--mask", "wide.png"],
            "mask wide.png is 32 x 20 pixels, but p0.png is 32 x",
        ),
        (["edit", "p0.png", "--prompt", "x", "--mask", "black.png"], "black.png has no white part"),
        (["edit", "p0.png", "--into", "no.png"], "no.png: No such file"),
        (["edit", "p0.png", "--prompt", "x", "--mask", "no.png"], "no.png: No such file"),
        (["edit", "p0.png", "--prompt", "x", "--sampler", "huen"], "no sampler is named 'huen'. Did you mean 'heun'?"),
        (["edit", "p0.png", "--prompt", "x", "--from", "y", "--sampler", "rk4"], "--sampler does nothing in FlowEdit"),
        (["edit", "p0.png", "--prompt", "x", "--from", "y", "--option", "a=1"], "--option does nothing in FlowEdit"),
        (
            ["edit", "p0.png", "--prompt", "x", "--strength", "0.15", "--sampler", "restart"],
            "restart interval = (0.1, 0.3) reaches above the grid, which starts at 0.15; try (0.05, 0.15)",
        ),
        (
            ["edit", "p0.png", "--prompt", "x", "--rf", "--sampler", "dopri5", "--option", "max_steps=2"],
            "stopped at t = ",
        ),
        (["edit", "p0.png", "--prompt", "x", "--seed", "-1"], "seed -1 is out of range"),
        (["edit", "p0.png", "--prompt", "x", "--steps", "0"], "steps = 0 is too few"),
        (["edit", "p0.png", "--prompt", "x", "--batch", "0"], "--batch must be 1 or more"),
        (["invert", "p0.png", "--steps", "4", "0"], "steps = 0 is too few"),
        (["invert", "p0.png", "--sampler", "ancestral"], "sampler 'ancestral' draws noise, so it has no inverse"),
        (
            ["edit", "p0.png", "--prompt", "x", "--mask", "mask.png", "--repeats", "2", "--sampler", "ancestral"],
            "sampler 'ancestral' draws noise, which has no place here",
        ),
        (["sample"], 'nothing to draw: give --prompt "..."'),
        (["sample", "--class", "otter"], "model draws from text, not from classes; give --prompt 'otter'"),
        (["sample", "--prompt", "x", "-n", "0"], "-n must be 1 or more, not 0"),
        (["sample", "--prompt", "x", "--batch", "0"], "--batch must be 1 or more, not 0"),
        (["sample", "--prompt", "x", "--size", "16", "16", "16"], "--size takes one or two numbers, not 3"),
        (
            ["sample", "--prompt", "x", "--graphs", "--cache", "0.1"],
            "--graphs: first-block caching waits for the device at every step; leave one of the two out",
        ),
        (["invert", "p0.png", "--prompt", "a", "--prompt", "b"], "2 prompts for 1 pictures"),
        (["invert", "p0.png", "none.png"], "none.png: No such file"),
    ],
)
def test_mistakes_cost_one_line_and_exit_code_2(arguments, message, genflow_, capsys):
    command, *rest = arguments
    out = genflow_(command, *rest, code=2)
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert message in line and line.startswith("genflow: ") and error.count("genflow: ") == 1
    assert not out.exists()


def test_pictures_of_several_batches_are_those_of_their_prompts_and_seeds(genflow_, where):
    out = genflow_("sample", "--prompt", "a", "--prompt", "b", "-n", "2", "--seed", "5", "--batch", "3")
    names = ["0000-a-5.png", "0001-a-6.png", "0002-b-7.png", "0003-b-8.png"]
    assert sorted(path.name for path in out.glob("0*.png")) == names
    flow = load(where / "model")
    x = flow.sample(["a", "a", "b", "b"], seeds=[5, 6, 7, 8], **flow.recipe["sample"]).x
    for picture, expected in zip(pictures(out), x, strict=True):
        assert abs(picture - ((expected + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 1


def test_a_summary_is_of_all_batches(genflow_, monkeypatch, capsys):
    told = iter([(7, 0.8, 0.1), (3, 0.0, 0.5), (5, 0.0, 0.2)])

    def sample(self, prompts, *, seeds, **settings):
        nfe, skipped, off = next(told)
        return SimpleNamespace(x=torch.zeros(len(seeds), 3, 16, 16), nfe=nfe, skipped=skipped, certificate=off)

    monkeypatch.setattr("genflow.flows.rectified.RectifiedFlow.sample", sample)
    genflow_("sample", "--prompt", "a", "-n", "8", "--batch", "3", "--cache", "0.1")
    line = "(7 network evaluations each; max |f(x) - z| = 0.5; LOSSY cache: 30% of the blocks skipped)"
    assert capsys.readouterr().out.rstrip().endswith(line)


def test_the_weaker_model_is_opened_and_cast_as_the_other_is(genflow_, monkeypatch):
    from genflow.flows import store
    from genflow.flows.rectified import RectifiedFlow

    opened, load_, sample = [], store.load, RectifiedFlow.sample
    seen = []

    def spied(run, *, ema, device):
        opened.append((run, ema))
        return load_(run, ema=ema, device=device)

    @functools.wraps(sample)
    def sampled(self, *arguments, weak, **settings):
        seen.extend(next(each.network.parameters()).dtype for each in (self, weak))
        return sample(self, *arguments, weak=weak, **settings)

    monkeypatch.setattr(store, "load", spied)
    monkeypatch.setattr(RectifiedFlow, "sample", sampled)
    genflow_("sample", "--prompt", "a", "--weak", "model", "--dtype", "bf16", "--no-ema")
    assert opened[-2:] == [("model", False)] * 2 and seen == [torch.bfloat16] * 2


def test_prompts_are_those_of_the_words_then_classes_then_files(tmp_path):
    from genflow.cli.sample import _prompts, _stem

    (tmp_path / "p.txt").write_text("\ufeffone\n  \n\ntwo\n", encoding="utf-8")
    asked = Namespace(prompt=["a", ""], classes=["b"], prompt_file=[str(tmp_path / "p.txt")])
    assert _prompts(asked) == ["a", "", "b", "one", "two"]
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"p\.txt: not UTF-8 text"):
        _prompts(asked)
    assert _stem("A red_apple, 猫!") == "a-red-apple-猫" and _stem("!?") == "empty" and len(_stem("a" * 99)) == 40


def test_a_model_without_a_velocity_is_refused(genflow_, monkeypatch, capsys):
    monkeypatch.delattr("genflow.flows.rectified.RectifiedFlow.guided")
    genflow_("edit", "p0.png", "--prompt", "x", code=2)
    assert "has no velocity" in capsys.readouterr().err
