"""Edits and inversions of latent flows, on a tiny SD3 pipeline: in its latents, as diffusers' own pipelines do them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genflow.cli import demo_actions, main
from genflow.cli.canvas import Canvas
from genflow.cli.demo_actions import Choice, open_player
from genflow.cli.options import embed, guided, time_grid
from genflow.data.pictures import read_settings
from genflow.interop.pipelines import open_pipeline
from genflow.samplers import euler
from genflow.samplers.editing import image_to_image
from tests import tiny_sd3

PROMPT, STEPS = "a red dog", 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny SD3, `pipe`; picture.png and the mask of its left upper part, mask.png."""
    root = tmp_path_factory.mktemp("latent")
    tiny_sd3.pipeline().save_pretrained(root / "pipe")
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / "picture.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[:5, :7] = 255
    Image.fromarray(mask).save(root / "mask.png")
    return root


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def edited(folder: Path, out: Path, *words: str) -> Path:
    how = ["--prompt", PROMPT, "--steps", str(STEPS), "--device", "cpu", "--out", str(out)]
    assert main(["edit", str(folder / "pipe"), str(folder / "picture.png"), *how, *words]) == 0
    return next(out.glob("0000-*.png"))


def test_image_to_image_is_that_of_diffusers(folder):
    from diffusers import StableDiffusion3Img2ImgPipeline

    flow = open_pipeline(folder / "pipe")
    canvas = Canvas.of(flow)
    settings = {**flow.recipe["sample"], "guidance": 4.0}
    grid = time_grid(canvas.flow, settings, STEPS)
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = canvas.lay(x)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(7))
    velocity = guided(canvas.flow, embed(canvas.flow, [PROMPT]), settings)
    with torch.no_grad():
        ours = canvas.show(image_to_image(velocity, z, noise, grid, grid[2], sampler=euler).x)

    pipe = StableDiffusion3Img2ImgPipeline.from_pretrained(folder / "pipe")
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": STEPS, "strength": (STEPS - 2) / STEPS, "guidance_scale": 4.0}
    made = pipe(PROMPT, image=z, generator=torch.Generator().manual_seed(7), output_type="pt", **how).images
    assert (ours / 2 + 0.5 - made).abs().max() <= 1e-3
    assert (canvas.show(z) / 2 + 0.5 - made).abs().max() > 0.01


def test_strength_takes_a_picture_from_what_the_autoencoder_makes_of_it_to_a_new_one(folder, tmp_path):
    flow = open_pipeline(folder / "pipe")
    x = torch.from_numpy(pixels(folder / "picture.png")).permute(2, 0, 1)[None] / 127.5 - 1
    kept = ((flow.reconstruct(x)[0] + 1) * 127.5).permute(1, 2, 0).numpy()
    off = [
        np.abs(pixels(edited(folder, tmp_path / strength, "--strength", strength)) - kept).mean()
        for strength in ("0.02", "0.5", "1")
    ]
    assert off[0] < 3 and off[0] < off[1] < off[2]


def test_what_is_not_masked_stays_pixel_by_pixel(folder, tmp_path):
    file = edited(folder, tmp_path, "--mask", str(folder / "mask.png"))
    new, old, free = pixels(file), pixels(folder / "picture.png"), pixels(folder / "mask.png") > 0
    assert np.array_equal(new[~free], old[~free]) and np.abs(new[free] - old[free]).mean() > 5
    mask = torch.from_numpy(free)[None, None]
    over = Canvas.of(open_pipeline(folder / "pipe")).lay_mask(mask)
    assert (
        over.shape == (1, 1, 8, 8) and over[0, 0, :3, :4].all() and over.sum() == 12
    )  # 5 x 7 pixels touch 3 x 4 latents


@pytest.mark.parametrize(
    "words", [["--from", "a cat"], ["--rf"], ["--to", "a green apple", "--frames", "3"], ["--lora", "lora"]], ids=str
)
def test_every_way_goes_through_latents(folder, tmp_path, words):
    if words[0] == "--lora":
        pytest.importorskip("peft")
        words = ["--lora", str(lora(folder, tmp_path))]
    file = edited(folder, tmp_path / "out", *words)
    assert pixels(file).shape == (16, 16, 3) and read_settings(file)["prompt"] == PROMPT
    if words[0] == "--lora":
        assert read_settings(file)["lora"] == words[1:]
        assert np.abs(pixels(file) - pixels(edited(folder, tmp_path / "plain"))).max() > 2


def lora(folder: Path, out: Path) -> Path:
    import peft
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder / "pipe")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(out, transformer_lora_layers=peft.get_peft_model_state_dict(pipe.transformer))
    return out


def test_pictures_are_drawn_in_bf16(folder, tmp_path):
    how = ["sample", str(folder / "pipe"), "--prompt", PROMPT, "--steps", "3", "--device", "cpu", "--out"]
    assert main([*how, str(tmp_path / "fp32")]) == 0 and main([*how, str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    wide, short = (next((tmp_path / name).glob("0000-*.png")) for name in ("fp32", "bf16"))
    assert read_settings(short)["dtype"] == "bf16" and 0 < np.abs(pixels(wide) - pixels(short)).max() < 12


def test_pictures_are_decoded_in_float32_under_any_autocast(folder):
    flow = open_pipeline(folder / "pipe")
    z = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = flow.to_pictures(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow.to_pictures(z), expected)


def test_the_page_edits_and_inverts_latent_flows(folder):
    args = Namespace(batch=4, no_ema=False, device="cpu")
    player = open_player(str(folder / "pipe"), args)
    choice = Choice(PROMPT, count=2, sampler="heun", steps=4, guidance=2.0)
    image = str(folder / "picture.png")
    near, told = demo_actions.edit(player, choice, image, 0.3)
    far, _ = demo_actions.edit(player, choice, image, 1.0)
    assert told.startswith("image-to-image") and near.size == far.size and near.tobytes() != far.tobytes()
    assert demo_actions.edit(player, choice, image, 0.8, "a cat")[1].startswith("FlowEdit")
    sheet, told = demo_actions.invert(player, choice, image)
    assert "evaluations there and back, unguided, beside what the autoencoder alone gives back, at " in told
    assert float(told.partition(" dB")[0]) > 25 and "standard deviation of 0.00" not in told
    assert sheet.size[0] == 338  # two cells of 160 pixels: its noise is no picture


def test_a_velocity_of_latents_is_told_from_none(folder, tmp_path, capsys):
    for words in (
        ["tune", "--steps", "2", "--images", "3"],
        ["plot", "--what", "strip", "--out", str(tmp_path / "out")],
    ):
        command, *rest = words
        assert main([command, str(folder / "pipe"), "--device", "cpu", *rest]) == 2
        assert "has a velocity of latents, none of pictures" in capsys.readouterr().err


def test_an_inversion_is_measured_beside_the_autoencoder_alone(folder, tmp_path, capsys):
    words = [str(folder / "pipe"), str(folder / "picture.png"), "--steps", "4", "40", "--out", str(tmp_path)]
    assert main(["invert", *words, "--sampler", "heun", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "beside what the autoencoder alone gives back of them, at " in out
    few, many = read_settings(tmp_path / "grid.png")["psnr"][0]
    assert many > few and many > 25
