"""Whole pipelines: genflow's picture of a diffusers folder equals StableDiffusion3Pipeline's, and the way back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from genflow.cli import main
from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.flows.latent import LatentFlow, LatentFlowConfig
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.store import load
from genflow.functional import Rng, noise_from_seeds
from genflow.interop.autoencoder import KLAutoencoderConfig
from genflow.interop.convert import convert
from genflow.interop.pipelines import open_pipeline, to_pipeline
from tests import tiny_sd3
from tests.test_convert import VARIANTS

PROMPTS = ["red dog", "green cat"]
SEEDS = [3, 4]
DOUBLE = {"sampler": "euler", "grid": "double_shifted", "shift": 3.0}
SINGLE = {"sampler": "euler", "grid": "shifted", "shift": 3.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipes")
    for name, changes in VARIANTS.items():
        tiny_sd3.pipeline(**changes).save_pretrained(root / name)
    return root


NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def theirs(folder, steps: int, guidance: float, *, size: tuple[int, int] = (16, 16), **how: object) -> np.ndarray:
    """Pictures of diffusers' pipeline from the noise of SEEDS: B x H x W x 3 in [0, 1]."""
    from diffusers import StableDiffusion3Pipeline

    lacks = {} if (folder / "text_encoder_3").is_dir() else NO_T5
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **lacks)
    pipe.set_progress_bar_config(disable=True)
    noise = noise_from_seeds(SEEDS, (16, size[0] // 2, size[1] // 2))
    shape = {"height": size[0], "width": size[1], "latents": noise}
    return pipe(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, output_type="np", **shape, **how).images


def ours(flow: LatentFlow, **how: object) -> np.ndarray:
    return (flow.sample(PROMPTS, seeds=SEEDS, **how).x / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def assert_same_pictures(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape and a.std() > 0.05
    assert np.abs(a - b).max() <= 1e-3
    assert np.abs(a[0] - a[1]).max() > 0.02, "two prompts and seeds, two pictures"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["double", "single"])
def test_pictures_equal_those_of_diffusers_in_both_shift_modes(variant, mode, folders):
    flow = open_pipeline(folders / variant)
    if mode == "double":
        expected = theirs(folders / variant, 5, 4.0)
        got = ours(flow, steps=5, guidance=4.0, **DOUBLE)
    else:  # given sigmas, diffusers' scheduler shifts them once
        expected = theirs(folders / variant, 5, 4.0, sigmas=np.linspace(1, 0.2, 5))
        got = ours(flow, steps=5, guidance=4.0, **SINGLE)
    assert_same_pictures(got, expected)


def test_the_shift_modes_and_the_prompt_matter(folders):
    flow = open_pipeline(folders / "plain")
    double, single = (ours(flow, steps=5, guidance=4.0, **how) for how in (DOUBLE, SINGLE))
    assert np.abs(double - single).max() > 2e-3
    other = (flow.sample(["a photo of apple"] * 2, seeds=SEEDS, steps=5, guidance=4.0, **DOUBLE).x / 2 + 0.5).numpy()
    assert np.abs(double - other.transpose(0, 2, 3, 1)).max() > 2e-3


def test_other_sizes_are_sizes_of_the_picture(folders):
    flow = open_pipeline(folders / "dual")
    assert flow.shape == (3, 16, 16) and flow.flow.shape == (16, 8, 8)
    got = ours(flow, steps=3, guidance=4.0, size=(24, 12), **DOUBLE)
    assert_same_pictures(got, theirs(folders / "dual", 3, 4.0, size=(24, 12)))
    with pytest.raises(
        UserError, match="25 x 12 is no multiple of 4, the autoencoder's 2 x the network's 2; try 24 x 12"
    ):
        flow.sample(PROMPTS, seeds=SEEDS, size=(25, 12))


@pytest.mark.parametrize("way", ["to_pipeline", "convert"])
def test_it_goes_back_to_a_pipeline_that_draws_the_same(way, folders, tmp_path):
    flow = open_pipeline(folders / "dual")
    if way == "to_pipeline":
        to_pipeline(flow).save_pretrained(tmp_path / "pipe")
    else:
        convert(folders / "dual", tmp_path / "model")
        convert(tmp_path / "model", tmp_path / "pipe")
    assert_same_pictures(theirs(tmp_path / "pipe", 3, 4.0), theirs(folders / "dual", 3, 4.0))
    assert_same_pictures(
        ours(open_pipeline(tmp_path / "pipe"), steps=3, guidance=4.0, **DOUBLE), theirs(folders / "dual", 3, 4.0)
    )


def test_parts_of_several_dtypes_become_one_pipeline(tmp_path):
    pipe = tiny_sd3.pipeline()
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "pipe")
    flow = open_pipeline(tmp_path / "pipe")
    made = to_pipeline(flow)
    assert made.vae.dtype == torch.bfloat16 and flow.autoencoder.module.dtype == torch.float32
    made.set_progress_bar_config(disable=True)
    noise = noise_from_seeds(SEEDS, (16, 8, 8)).to(torch.bfloat16)
    how = {"height": 16, "width": 16, "latents": noise, "guidance_scale": 4.0, "output_type": "np"}
    theirs = made(PROMPTS, num_inference_steps=3, **how).images
    assert np.abs(theirs - ours(flow, steps=3, guidance=4.0, **DOUBLE)).mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16])
def test_weights_of_8_bits_or_of_several_dtypes_are_drawn_with(dtype, tmp_path):
    """Biases stay as they are; diffusers computes in float32, unless it is told otherwise."""
    tiny_sd3.pipeline().save_pretrained(tmp_path / "pipe")
    file = tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.to(dtype) if v.ndim == 2 else v for k, v in load_file(file).items()}, file)
    flow = open_pipeline(tmp_path / "pipe")
    assert {p.dtype for p in flow.network.parameters()} == {torch.float32}
    assert_same_pictures(ours(flow, steps=3, guidance=4.0, **DOUBLE), theirs(tmp_path / "pipe", 3, 4.0))
    save_file({k: v.to(torch.float8_e5m2) for k, v in load_file(file).items()}, file)
    flow = open_pipeline(tmp_path / "pipe")
    assert {p.dtype for p in flow.network.parameters()} == {torch.bfloat16}
    assert np.isfinite(ours(flow, steps=1)).all()


def test_a_pipeline_of_one_variant_is_drawn_from(folders, tmp_path):
    tiny_sd3.pipeline().save_pretrained(tmp_path / "pipe", variant="fp16", max_shard_size="20KB")
    assert list((tmp_path / "pipe" / "text_encoder_3").glob("model.fp16-*-of-*.safetensors"))
    got = ours(open_pipeline(tmp_path / "pipe"), steps=3, guidance=4.0, **DOUBLE)
    assert_same_pictures(got, theirs(folders / "plain", 3, 4.0))


def test_a_converted_model_folder_draws_the_same(folders, tmp_path):
    convert(folders / "dual", tmp_path / "model")
    flow = load(tmp_path / "model")
    assert isinstance(flow, LatentFlow) and flow.recipe["sample"]["shift"] == 3.0
    assert_same_pictures(ours(flow, steps=3, guidance=4.0, **DOUBLE), theirs(folders / "dual", 3, 4.0))


def test_a_scheduler_of_heun_stays_one(folders, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "pipe")
    scheduler = {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 2.0}
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchHeunDiscreteScheduler"]
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    assert {"sampler": "heun", "shift": 2.0}.items() <= open_pipeline(tmp_path / "pipe").recipe["sample"].items()
    convert(tmp_path / "pipe", tmp_path / "again", to="diffusers")
    written = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert written["scheduler"] == index["scheduler"] and written["tokenizer"] == index["tokenizer"]


def test_a_pipeline_without_t5_hears_zeros_as_diffusers_has_it(folders, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folders / "plain", **NO_T5)
    pipe.save_pretrained(tmp_path / "pipe")
    flow = open_pipeline(tmp_path / "pipe")
    assert list(flow.text.parts) == ["clip_l", "clip_g"]
    assert_same_pictures(ours(flow, steps=3, guidance=4.0, **DOUBLE), theirs(tmp_path / "pipe", 3, 4.0))
    to_pipeline(flow).save_pretrained(tmp_path / "again")
    assert_same_pictures(theirs(tmp_path / "again", 3, 4.0), theirs(tmp_path / "pipe", 3, 4.0))


def test_the_command_line_draws_from_a_pipeline_folder(folders, tmp_path, capsys):
    command = ["sample", str(folders / "dual"), "--prompt", "red dog", "--seed", "3", "--steps", "3", "--guidance", "4"]
    assert main([*command, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0, capsys.readouterr().err
    picture = np.asarray(Image.open(next((tmp_path / "out").glob("0000-*.png")))) / 255
    assert np.abs(picture - theirs(folders / "dual", 3, 4.0)[0]).max() <= 1 / 255 + 1e-3
    assert main([*command, "--size", "24", "12", "--out", str(tmp_path / "wide"), "--device", "cpu"]) == 0
    assert Image.open(next((tmp_path / "wide").glob("0000-*.png"))).size == (12, 24)


def test_what_is_no_pipeline_of_sd3_costs_one_line(folders, tmp_path):
    pipe = tmp_path / "pipe"
    shutil.copytree(folders / "plain", pipe)
    (pipe / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"vae holds no \.safetensors file"):
        open_pipeline(pipe)
    scheduler = pipe / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    shutil.copy(folders / "plain" / "vae" / "diffusion_pytorch_model.safetensors", pipe / "vae")
    with pytest.raises(UserError, match="a DDIMScheduler is no scheduler of flows"):
        open_pipeline(pipe)


# ---------------------------------------------------------------------------------------------------------- latent flows


class Batch:
    def __init__(self, x: torch.Tensor, flow: LatentFlow) -> None:
        self.x, self.condition, self.position = x, flow.text.encode(["red dog"] * len(x)), torch.arange(len(x))


def test_a_latent_flow_s_loss_is_its_flow_s_on_scaled_draws_of_the_posterior(folders):
    flow = open_pipeline(folders / "plain")
    batch, rng = Batch(torch.rand(3, 3, 16, 16) * 2 - 1, flow), Rng(7, 1)
    got = flow.loss(batch, rng)
    vae = flow.autoencoder.module
    with torch.no_grad():
        latents = vae.encode(batch.x).latent_dist
        z = latents.mean + latents.std * rng.normal("latent", batch.position, (16, 8, 8))
    inner = Batch((z - vae.config.shift_factor) * vae.config.scaling_factor, flow)
    assert torch.allclose(got.per_sample, flow.flow.loss(inner, rng).per_sample, rtol=1e-5)
    got.loss.backward()
    assert all(p.grad is None for p in flow.autoencoder.parameters())
    assert any(p.grad is not None for p in flow.flow.parameters())
    inner = Batch((latents.mean - vae.config.shift_factor) * vae.config.scaling_factor, flow)
    assert torch.allclose(
        flow.validate(batch)["validation_loss"], flow.flow.validate(inner)["validation_loss"], rtol=1e-5
    )


def test_training_drops_what_the_text_says_it_drops(folders):
    flow = open_pipeline(folders / "plain")
    batch, rng = Batch(torch.rand(3, 3, 16, 16) * 2 - 1, flow), Rng(7, 1)
    flow.flow.config = replace(flow.flow.config, drop_condition=0.0)
    heard = flow.loss(batch, rng).per_sample
    flow.text.config = replace(flow.text.config, drop=1.0)
    dropped = flow.loss(batch, rng).per_sample
    flow.text.config = replace(flow.text.config, drop=0.0)
    none = batch.condition
    batch.condition = Condition(torch.zeros_like(none.tokens), none.mask, torch.zeros_like(none.pooled))
    assert torch.equal(dropped, flow.loss(batch, rng).per_sample) and not torch.allclose(dropped, heard, rtol=1e-3)


def test_latents_are_not_clamped_and_pictures_are(folders):
    flow = open_pipeline(folders / "plain")
    latents = flow.flow.sample(PROMPTS, seeds=SEEDS, steps=2)
    assert latents.x.abs().max() > 1.5
    assert flow.sample(PROMPTS, seeds=SEEDS, steps=2).x.abs().max() <= 1


def test_pictures_do_not_depend_on_their_batch_mates(folders):
    flow = open_pipeline(folders / "plain")
    both = flow.sample(PROMPTS, seeds=SEEDS, steps=2).x
    alone = flow.sample(PROMPTS[1:], seeds=SEEDS[1:], steps=2).x
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_the_frozen_autoencoder_stays_in_eval_mode_and_densities_are_refused(folders):
    flow = open_pipeline(folders / "plain").train()
    assert flow.flow.training and not flow.autoencoder.training
    with pytest.raises(UserError, match="the density of latents is not that of pictures"):
        flow.log_prob(torch.zeros(1, 3, 16, 16))
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    assert flow.encode(x).shape == (1, 16, 8, 8) and flow.decode(torch.randn(1, 16, 8, 8)).shape == x.shape


def test_an_autoencoder_that_does_not_fit_is_refused(folders):
    flow = open_pipeline(folders / "plain")
    config = LatentFlowConfig(KLAutoencoderConfig(channels=(32, 64), latent_channels=4, scale=1.0))
    other = config.autoencoder.build()
    with pytest.raises(UserError, match="the flow has 16 channels, the autoencoder 4"):
        LatentFlow(config, flow.flow, other)
    with pytest.raises(UserError, match="makes pictures of 3 channels, not samples of"):
        config.build(flow.flow.network, flow.text, shape=(1, 16, 16))
    assert config.sampling is RectifiedFlowConfig.sampling
    assert isinstance(flow.text.null(), Condition)
