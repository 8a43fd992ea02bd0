"""genflow edit and genflow invert, on real pictures and a tiny model that never learned anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import genflow.config
from genflow.cli import main
from genflow.data.emoji import EmojiConfig
from genflow.data.pictures import read_settings
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
    for extra in ([], ["--mask", "mask.png", "--repeats", "2"], ["--from", "a"], ["--rf"]):
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
    assert capsys.readouterr().out == f"1 pictures and grid.png in {out}: image-to-image, 2 network evaluations each\n"
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


def test_a_model_without_a_velocity_is_refused(genflow_, monkeypatch, capsys):
    monkeypatch.delattr("genflow.flows.rectified.RectifiedFlow.guided")
    genflow_("edit", "p0.png", "--prompt", "x", code=2)
    assert "has no velocity" in capsys.readouterr().err
