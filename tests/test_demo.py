"""genflow demo: what its buttons do, without a browser; the page, where gradio is; and a click, where a browser is too."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genflow.cli import main
from genflow.cli.demo_actions import Choice, draw, edit, invert, open_player, plain, settings_of, strip
from genflow.config import from_dict, to_dict
from genflow.errors import UserError
from genflow.flows.store import save_model
from genflow.flows.tuned import save_tuned
from genflow.training.config import RunConfig, fit_to, shape_of

PICS = {"name": "folder", "path": "pics", "size": 8}
LABELS = {"name": "labels", "classes": ["dark", "light"], "dim": 4}
UNET = {"name": "unet", "channels": 8, "channel_mult": [1], "blocks": 1, "attention_size": 0}
RUNS = {
    "glow": {"data": PICS, "model": {"name": "glow", "levels": 1, "steps": 1, "hidden": 8}, "flow": "normalizing"},
    "unet": {
        "data": PICS,
        "model": UNET,
        "text": LABELS,
        "sample": {"sampler": "euler", "steps": 4, "guidance": 2.0},
    },
    "eps": {
        "data": PICS,
        "model": UNET,
        "flow": {"name": "rectified", "prediction": "eps", "coupling": "optimal_transport"},
        "sample": {"sampler": "euler", "steps": 150, "guidance": -1.0},
    },
    "ae": {
        "data": PICS,
        "model": {"name": "tiny_autoencoder", "factor": 4, "width": 8, "blocks": 1},
        "flow": {"name": "autoencoder", "bottleneck": {"name": "fsq", "levels": [3, 3]}},
    },
    "tokens": {
        "data": PICS,
        "model": {"name": "token_transformer", "width": 16, "layers": 1, "heads": 2},
        "text": LABELS,
        "flow": {"name": "tokens", "tokenizer": {"name": "trained", "run": "ae"}},
    },
    "plane": {
        "data": {"name": "toy2d", "kind": "moons", "n": 400},
        "model": {"name": "nsf", "steps": 2, "hidden": 8, "blocks": 1},
        "flow": "normalizing",
    },
}
CHOICE = Choice("dark", seed=3, count=2, sampler="euler", steps=3, guidance=1.5)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    for name, section in RUNS.items():
        torch.manual_seed(0)
        config = from_dict(RunConfig, section)
        text, shape = config.text.build(), shape_of(config.data)
        model = fit_to(config.model, text, shape, config.flow)
        flow = config.flow.build(model.build(), text, shape=shape)
        for weight in flow.parameters():  # a fresh network answers nothing but zeros
            torch.nn.init.normal_(weight, std=0.1)
        about = {**to_dict(config), "model": to_dict(RunConfig(config.data, model))["model"], "shape": list(shape)}
        save_model(folder / name, config=about, state=flow.state_dict())
    noise_image().save(folder / "noise.png")
    patch.undo()
    return folder


@pytest.fixture
def player(where, monkeypatch):
    monkeypatch.chdir(where)
    args = argparse.Namespace(batch=64, no_ema=False, device="cpu")
    return lambda name: open_player(name, args)


def noise_image(seed=0, size=8):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def cell(sheet, left, top, size=160):
    return np.asarray(sheet.convert("RGB"))[top : top + size, left : left + size][:: size // 8, :: size // 8]


def bytes_of(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).byte().numpy()


def test_what_is_drawn_is_what_sample_draws(player):
    unet = player("unet")
    sheet, told = draw(unet, CHOICE)
    x = unet.flow.sample(["dark"], seeds=[3], **{**unet.own, "steps": 3, "guidance": 1.5}).x
    assert np.array_equal(cell(sheet, 6, 6), bytes_of(x[0]))
    assert told == "2 of 3 evaluations each: sampler euler, steps 3, guidance 1.5"
    _, told = draw(unet, dataclasses.replace(CHOICE, sampler="dopri5"))
    assert told.endswith("each: sampler dopri5, guidance 1.5")  # whose steps are its own


def test_only_what_a_model_takes_is_asked_of_it(player):
    assert draw(player("glow"), Choice(steps=7, guidance=1.0))[1].startswith("4 of 1 evaluations")
    assert "steps" not in settings_of(player("glow"), CHOICE)
    assert draw(player("glow"), Choice(guidance=3.0))[1].startswith("4 of 1 evaluations")


def test_a_tuned_grid_is_taken_as_sample_takes_it(player, where):
    save_tuned("unet", 2, {"sampler": "ab2", "grid": [1.0, 0.3, 0.0], "nfe": 2, "error": 0.1, "guidance": 1.0})
    assert settings_of(player("unet"), Choice(sampler="euler", steps=2))["grid"] == [1.0, 0.3, 0.0]
    assert settings_of(player("unet"), Choice(sampler="heun", steps=2))["sampler"] == "heun"


def test_a_sampler_that_is_chosen_is_taken_though_a_tuned_grid_has_another(player):
    save_tuned("unet", 4, {"sampler": "ab2", "grid": [1.0, 0.8, 0.5, 0.2, 0.0], "nfe": 4, "error": 0.1})
    try:
        unet = player("unet")
        assert unet.own["sampler"] == "euler"
        assert settings_of(unet, Choice(sampler="ab2", steps=9))["sampler"] == "ab2"
    finally:
        Path("unet", "sampling.json").unlink()


def test_a_strip_begins_where_a_sample_does(player, monkeypatch):
    from genflow.evaluation import plots

    seen = {}
    real = plots.plot_strip
    monkeypatch.setattr(
        plots, "plot_strip", lambda times, states, *rest: seen.update(x=states) or real(times, states, *rest)
    )
    eps = player("eps")
    strip(eps, Choice(seed=3, sampler="euler", steps=3))
    x = eps.flow.sample([""], seeds=[3], sampler="euler", steps=3).x
    torch.testing.assert_close(seen["x"][-1].clamp(-1, 1), x)


def test_a_sampler_that_draws_noise_is_refused_where_sample_refuses_it(player):
    eps, choice = player("eps"), Choice(sampler="ancestral", steps=3, count=1)
    for act in (lambda: draw(eps, choice), lambda: strip(eps, choice), lambda: edit(eps, choice, "noise.png", 0.5)):
        with pytest.raises(UserError, match="right for coupling independent alone"):
            act()


def test_what_is_told_is_what_was_heard(player):
    told = edit(player("eps"), Choice(count=1, sampler="euler", steps=4), "noise.png", 1.0)[1]
    assert told == "image-to-image, 4 evaluations: sampler euler, steps 4"  # all of them: strength 1 is where it begins
    assert draw(player("tokens"), Choice("dark", count=1))[1].endswith(
        "decoder ancestral, guidance 1.0, temperature 1.0"
    )


def test_pictures_are_read_as_everywhere(player, tmp_path):
    from genflow.cli.options import read_image

    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4, :, 3] = 255
    deep = np.full((8, 8), 30_000, np.uint16)
    for name, pixels in {"clear.png": clear, "deep.png": deep}.items():
        file = str(tmp_path / name)
        Image.fromarray(pixels).save(file)
        sheet, _ = invert(player("glow"), Choice(), file)
        assert np.array_equal(cell(sheet, 6, 6), np.asarray(read_image(file).convert("RGB")))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png: not a picture"):
        invert(player("glow"), Choice(), str(tmp_path / "broken.png"))


def test_half_a_character_is_drawn_as_a_question_mark():
    assert plain("a\ud800") == "a?" and plain(None) == ""


def test_vectors_are_drawn_where_they_lie(player):
    sheet, told = draw(player("plane"), Choice())
    assert sheet.size[0] > 250 and told.startswith("2000 of 1")


def test_the_strip_has_a_column_for_each_step(player):
    few, many = (strip(player("unet"), Choice("dark", steps=n, sampler="euler")).size for n in (2, 8))
    assert many[0] > few[0]


def test_an_edit_begins_at_the_picture_and_goes_the_farther_the_stronger(player):
    (near, told), (far, _) = (edit(player("unet"), CHOICE, "noise.png", strength) for strength in (0.3, 1.0))
    given = np.asarray(noise_image()).astype(int)
    assert np.array_equal(cell(near, 6, 6), given) and "image-to-image, 1 evaluations" in told
    columns = [np.abs(cell(sheet, 172, 6).astype(int) - given).mean() for sheet in (near, far)]
    assert columns[0] < columns[1]


def test_an_edit_that_knows_what_was_there_is_flowedit(player):
    assert edit(player("unet"), CHOICE, "noise.png", 0.8, "light")[1].startswith("FlowEdit")
    with pytest.raises(UserError, match="draws noise, which has no place here"):
        edit(player("unet"), Choice("dark", sampler="euler_maruyama"), "noise.png", 0.8, "light")


def test_a_bijection_comes_back_exactly_and_a_velocity_nearly(player):
    sheet, told = invert(player("glow"), Choice(), "noise.png")
    assert np.abs(cell(sheet, 338, 6).astype(int) - np.asarray(noise_image())).max() <= 1 and "one pass" in told
    assert "evaluations there and back" in invert(player("unet"), Choice("dark", steps=8), "noise.png")[1]


@pytest.mark.parametrize(
    ("name", "action", "message"),
    [
        ("unet", lambda p: draw(p, Choice("a cat")), "a cat"),
        ("unet", lambda p: draw(p, Choice("dark", count=0)), "pictures = 0"),
        ("unet", lambda p: edit(p, CHOICE, None, 0.5), "there is no picture yet"),
        ("unet", lambda p: invert(p, Choice("dark", sampler="ancestral"), "noise.png"), "has no inverse"),
        ("glow", lambda p: strip(p, Choice()), "no velocity of pictures; a strip shows its solve"),
        ("glow", lambda p: edit(p, Choice(), "noise.png", 0.5), "no velocity of pictures"),
        ("glow", lambda p: draw(p, Choice("dark")), "hears no condition"),
        ("plane", lambda p: invert(p, Choice(), "noise.png"), "makes vectors of 2 numbers"),
    ],
)
def test_mistakes_are_told_in_one_line(name, action, message, player):
    with pytest.raises(UserError, match=message) as error:
        action(player(name))
    assert "\n" not in str(error.value)


def test_without_gradio_and_with_too_many_models_the_command_says_so(where, monkeypatch, capsys):
    monkeypatch.chdir(where)
    assert main(["demo", "unet", "glow", "plane"]) == 2
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "unet"]) == 2
    errors = capsys.readouterr().err
    assert main(["demo", "unet", "--port", "70000"]) == 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["demo", "unet", "--port", str(taken.getsockname()[1])]) == 2
    ports = capsys.readouterr().err
    assert "--port 70000 is not within 1 .. 65535" in ports and "cannot be had (Address already in use)" in ports
    assert "3 models are too many" in errors and "pip install gradio" in errors


def page_of(players):
    pytest.importorskip("gradio")
    from genflow.cli.demo import build_page

    return build_page(players)


def labels(page):
    return {block.label for block in page.blocks.values() if getattr(block, "label", None) and block.visible}


def test_the_page_shows_the_controls_and_tabs_that_its_models_have(player):
    both = labels(page_of([player("unet"), player("glow")]))
    assert {"prompt", "sampler", "steps", "guidance", "Draw", "Step by step", "Edit", "Invert", "unet"} <= both
    assert "glow (hears no prompt)" in both
    one = [block.value for block in page_of([player("glow")]).blocks.values() if type(block).__name__ == "Button"]
    assert one == ["Draw", "To noise and back"]
    plane = labels(page_of([player("plane")]))
    assert "Draw" in plane and not plane & {"prompt", "sampler", "steps", "Edit", "Invert", "pictures"}


def test_there_are_tabs_for_what_a_model_can_do_alone(player):
    can = {"ae": ["To noise and back"], "tokens": ["Draw"]}
    for name, buttons in can.items():
        blocks = page_of([player(name)]).blocks.values()
        assert [block.value for block in blocks if type(block).__name__ == "Button"] == buttons


def test_sliders_reach_as_far_as_a_run_goes(player):
    blocks = page_of([player("eps")]).blocks.values()
    sliders = {block.label: block for block in blocks if type(block).__name__ == "Slider"}
    assert (sliders["steps"].value, sliders["steps"].maximum) == (150, 150)
    assert (sliders["guidance"].value, sliders["guidance"].minimum) == (-1.0, -1.0)


def test_clicks_wait_for_each_other_and_a_seed_is_asked_for(player):
    page = page_of([player("unet")])
    clicks = [fn for fn in page.fns.values() if fn.concurrency_id == "models"]
    assert len(clicks) == 4 and {fn.concurrency_limit for fn in clicks} == {1}
    with pytest.raises(Exception, match="give a seed"):
        clicks[0].fn("dark", None, 1, "euler", 2, 1.0)


def test_a_browser_draws_with_two_models_side_by_side(player):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    page = page_of([player("unet"), player("glow")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page.launch(server_name="127.0.0.1", server_port=port, quiet=True, prevent_thread_lock=True)
    try:
        with playwright.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            view = browser.new_page()
            view.goto(f"http://127.0.0.1:{port}")
            view.get_by_label("prompt").first.fill("dark")
            view.get_by_role("button", name="Draw", exact=True).click()
            view.get_by_text("evaluations each").nth(1).wait_for(timeout=60_000)
            told = " ".join(view.get_by_text("evaluations each").all_inner_texts())
            assert "sampler euler, steps 4" in told and "4 of 1 evaluations each" in told
            assert view.locator("img[src*='/file=']").count() >= 2
            view.get_by_label("prompt").first.fill("a cat")
            view.get_by_role("button", name="Draw", exact=True).click()
            view.get_by_text("a cat", exact=False).last.wait_for(timeout=60_000)
            browser.close()
    finally:
        page.close()
    assert Path("unet").is_dir()
