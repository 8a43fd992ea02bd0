"""Edges of other people's files: schedulers that genflow has no words for, and settings that cannot be."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import save_file

from genflow.cli import main
from genflow.data.pictures import read_settings
from genflow.errors import UserError
from genflow.flows.paths import CosinePath
from genflow.flows.store import load
from genflow.interop.checkpoints import open_checkpoint
from genflow.interop.convert import convert, recipe_of
from genflow.interop.diffusers import to_diffusers
from genflow.interop.lora import load_lora
from genflow.interop.pipelines import open_pipeline, to_pipeline
from genflow.interop.schedulers import as_scheduler
from genflow.networks.mmdit import MMDiTConfig
from tests import tiny_sd3


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges") / "pipe"
    tiny_sd3.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def changed(pipe, tmp_path):
    """Opens a copy of the pipeline, of whose file some settings are others."""

    def openit(file, **settings):
        shutil.copytree(pipe, tmp_path / "pipe")
        path = tmp_path / "pipe" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        return recipe_of(open_checkpoint(tmp_path / "pipe"))

    return openit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting = true has no counterpart here"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas = true"),
        ({"shift_terminal": 0.1}, "shift_terminal = 0.1"),
        ({"stochastic_sampling": True}, "stochastic_sampling = true"),
        ({"num_train_timesteps": 100}, "num_train_timesteps = 100: the model hears 100 t"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "a FlowMatchLCMScheduler is no scheduler of flows"),
        ({"_class_name": ["x"]}, "is no scheduler of flows"),
        ({"shift": None}, "shift must be a number, not nothing"),
        ({"shift": "a"}, "shift must be a number, not 'a'"),
    ],
)
def test_a_scheduler_without_a_counterpart_is_refused(changed, settings, message):
    with pytest.raises(UserError, match=message) as error:
        changed("scheduler/scheduler_config.json", **settings)
    assert "scheduler_config.json: " in str(error.value)


@pytest.mark.parametrize(("kind", "sampler"), [("Euler", "euler"), ("Heun", "heun")])
def test_euler_and_heun_are_samplers_on_the_double_shifted_grid(changed, kind, sampler):
    sample = changed("scheduler/scheduler_config.json", _class_name=f"FlowMatch{kind}DiscreteScheduler", shift=2.5)[
        "sample"
    ]
    assert (sample["sampler"], sample["grid"], sample["shift"]) == (sampler, "double_shifted", 2.5)


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("transformer/config.json", {"dual_attention_layers": "x"}, "dual_attention_layers must be a list, not 'x'"),
        ("transformer/config.json", {"dual_attention_layers": -1}, "dual_attention_layers must be a list, not -1"),
        ("transformer/config.json", {"patch_size": 0}, "patch_size = 0, not a whole number of 1 or more"),
        ("vae/config.json", {"block_out_channels": None}, "block_out_channels must be a list, not nothing"),
        ("vae/config.json", {"down_block_types": None}, "down_block_types = None"),
        ("vae/config.json", {"up_block_types": 0}, "up_block_types = 0"),
        ("vae/config.json", {"norm_num_groups": 0}, "no multiples of norm_num_groups = 0"),
        ("vae/config.json", {"layers_per_block": "x"}, "layers_per_block must be a whole number, not 'x'"),
        ("model_index.json", {"text_encoder_2": -1}, "text_encoder_2 must be a list, not -1"),
    ],
)
def test_a_damaged_setting_costs_one_line(changed, file, settings, message):
    with pytest.raises(UserError, match=message):
        changed(file, **settings)


@pytest.mark.parametrize(
    ("header", "alpha", "message"),
    [
        ({"transformer.lora_alpha": None}, None, "lora_alpha must be a number, not nothing"),
        ({"transformer.lora_alpha": "8"}, None, "lora_alpha must be a number, not '8'"),
        ({"transformer.alpha_pattern": {"to_q": None}}, None, "to_q must be a number, not nothing"),
        ({"transformer.alpha_pattern": None}, None, "damaged"),
        (None, torch.ones(2), r"attn.to_q.alpha is \[2\], not one number"),
    ],
)
def test_a_damaged_lora_costs_one_line(tmp_path, header, alpha, message):
    network = MMDiTConfig(
        depth=1, hidden=32, heads=2, patch_size=2, in_channels=3, context_dim=8, pooled_dim=8, sample_size=2
    ).build()
    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_A.weight": torch.ones(4, 32), f"{stem}.lora_B.weight": torch.ones(32, 4)}
    tensors |= {} if alpha is None else {f"{stem}.alpha": alpha}
    about = None if header is None else {"lora_adapter_metadata": json.dumps(header)}
    save_file(tensors, tmp_path / "lora.safetensors", metadata=about)
    with pytest.raises(UserError, match=message):
        load_lora(network, tmp_path / "lora.safetensors")


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_double_shifted_grid_is_that_of_diffusers_for_a_shift_by_size_too(kind, steps):
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    ours = as_scheduler("euler", grid="double_shifted", like=theirs)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps, mu=1.15)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_double_shifted_grid_is_that_of_diffusers_for_fewer_steps_of_training(dynamic):
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=100, use_dynamic_shifting=dynamic)
    ours = as_scheduler("euler", grid="double_shifted", like=theirs)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7, mu=1.15 if dynamic else None)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-4)


def test_no_sigmas_are_refused():
    with pytest.raises(UserError, match="sigmas is empty"):
        as_scheduler("euler").set_timesteps(sigmas=[])


def test_a_latent_flow_is_guided_away_from_a_weaker_one_of_its_latents(pipe, tmp_path, capsys):
    convert(pipe, tmp_path / "weak")
    asked = ["sample", str(pipe), "--prompt", "a", "--steps", "2", "--guidance", "3", "--device", "cpu"]
    assert main([*asked, "--weak", str(tmp_path / "weak"), "--out", str(tmp_path / "a")]) == 0
    assert main([*asked, "--guidance", "1", "--out", str(tmp_path / "b")]) == 0
    assert read_settings(tmp_path / "a" / "grid.png")["weak"] == str(tmp_path / "weak")
    weak, plain = (np.asarray(Image.open(tmp_path / name / "0000-a-0.png")).astype(int) for name in "ab")
    assert abs(weak - plain).max() <= 1  # as strong as the other is, there is nothing to move away from

    config = json.loads((tmp_path / "weak" / "config.json").read_text())
    config["flow"]["autoencoder"]["scale"] = 2.0
    (tmp_path / "weak" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main([*asked, "--weak", str(tmp_path / "weak"), "--out", str(tmp_path / "c")]) == 2
    assert "whose autoencoder is another" in capsys.readouterr().err
    assert main([*asked, "--graphs", "--out", str(tmp_path / "c")]) == 2
    assert "--graphs records CUDA graphs, and this is cpu" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("prediction", "x"), ("path", CosinePath()), ("text_mask", True)])
def test_a_flow_that_is_not_asked_as_sd3_is_becomes_no_pipeline(pipe, key, value):
    flow = open_pipeline(pipe)
    flow.flow.config = replace(flow.flow.config, **{key: value})
    with pytest.raises(UserError, match=f"its flow has {key} .*, where SD3's has"):
        to_pipeline(flow)


def test_a_text_mask_is_not_lost_in_a_conversion(pipe, tmp_path):
    convert(pipe, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["flow"]["flow"]["text_mask"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="its flow has text_mask True, where SD3.s has False"):
        convert(tmp_path / "model", tmp_path / "out")


def test_parts_without_an_index_are_told_from_a_model_that_was_cut_short(tmp_path):
    (tmp_path / "transformer").mkdir()
    with pytest.raises(
        UserError, match="parts of a diffusers pipeline, but no model_index.json; .* --like adds the rest"
    ):
        load(tmp_path)


def test_another_network_is_no_transformer_of_diffusers():
    with pytest.raises(UserError, match="to_diffusers takes an MMDiT, not a Linear"):
        to_diffusers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("sampler", "kind"), [("heun", "Heun"), ("euler", "Euler"), ("unipc", "Euler")])
def test_a_model_goes_back_to_diffusers_with_its_own_solver(pipe, tmp_path, sampler, kind):
    theirs = tmp_path / "pipe"
    shutil.copytree(pipe, theirs)
    FlowMatchHeunDiscreteScheduler(shift=2.0).save_pretrained(theirs / "scheduler")
    index = json.loads((theirs / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchHeunDiscreteScheduler"]
    (theirs / "model_index.json").write_text(json.dumps(index))
    convert(theirs, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["sample"]["sampler"] = sampler
    path.write_text(json.dumps(config))
    convert(tmp_path / "model", tmp_path / "back")
    flow = open_pipeline(theirs)
    flow.recipe["sample"]["sampler"] = sampler
    for found in (StableDiffusion3Pipeline.from_pretrained(tmp_path / "back"), to_pipeline(flow)):
        assert type(found.scheduler).__name__ == f"FlowMatch{kind}DiscreteScheduler"
        assert found.scheduler.config.shift == 2.0


def test_a_lora_of_no_weight_changes_nothing_of_wide_weights(tmp_path):
    network = MMDiTConfig(
        depth=1, hidden=32, heads=2, patch_size=2, in_channels=3, context_dim=8, pooled_dim=8, sample_size=2
    ).build()
    network.double()
    stem = "transformer.transformer_blocks.0.ff.net.2"
    tensors = {f"{stem}.lora_A.weight": torch.ones(4, 128), f"{stem}.lora_B.weight": torch.ones(32, 4)}
    save_file(tensors, tmp_path / "lora.safetensors")
    weight = network.blocks[0].image_mlp.fc2.weight
    torch.nn.init.normal_(weight)
    before = weight.clone()
    load_lora(network, tmp_path / "lora.safetensors", weight=0.0)
    assert torch.equal(weight, before)


def test_bitsandbytes_says_nothing_where_diffusers_opens_it():
    code = "import genflow.interop.autoencoder, logging; print(logging.getLogger('bitsandbytes').level)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(told.stdout) == logging.ERROR
