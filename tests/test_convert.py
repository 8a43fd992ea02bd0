"""Checkpoints of the SD3 family between layouts: bit for bit, at full size on the meta device, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from genflow.cli import main
from genflow.config import to_dict
from genflow.errors import UserError
from genflow.flows.store import save_model
from genflow.interop.autoencoder import KLAutoencoderConfig, vae_from_diffusers, vae_to_diffusers
from genflow.interop.checkpoints import open_checkpoint
from genflow.interop.convert import convert
from genflow.interop.diffusers import config_from_diffusers, config_to_diffusers
from genflow.interop.layouts import DIFFUSERS, STABILITY, config_from_shapes, from_genflow, to_genflow
from genflow.interop.tensors import Lazy, read_file, write_file
from genflow.networks.mmdit import MMDiTConfig
from genflow.saving import replacing
from tests import tiny_sd3

VARIANTS = {
    "plain": {},
    "qk-norm": {"qk_norm": "rms_norm"},
    "dual": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
}
FILES = ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
ENCODERS = ("text_encoder/model", "text_encoder_2/model", "text_encoder_3/model")


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """Folders of tiny pipelines by variant, saved by diffusers itself; and the pipelines."""
    root = tmp_path_factory.mktemp("pipes")
    made = {name: tiny_sd3.pipeline(**changes) for name, changes in VARIANTS.items()}
    for name, pipe in made.items():
        pipe.save_pretrained(root / name)
    return root, made


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_same_files(a: Path, b: Path, names: tuple[str, ...]) -> None:
    for name in names:
        assert_equal(load_file(a / f"{name}.safetensors"), load_file(b / f"{name}.safetensors"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pipeline_comes_back_bit_for_bit_from_genflow_and_from_one_file(variant, pipes, tmp_path):
    folder = pipes[0] / variant
    assert convert(folder, tmp_path / "ours")[0].startswith("its text encoders are those of")
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_files(folder, tmp_path / "back", FILES + ENCODERS)
    convert(folder, tmp_path / "one.safetensors")
    theirs = load_file(tiny_sd3.stability_file(pipes[1][variant], tmp_path / "theirs.safetensors"))
    assert_equal(load_file(tmp_path / "one.safetensors"), theirs)
    convert(tmp_path / "one.safetensors", tmp_path / "again", to="diffusers", like=folder)
    assert_same_files(folder, tmp_path / "again", FILES + ENCODERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_of_stability_s_comes_back_bit_for_bit(variant, dtype, pipes, tmp_path):
    file = tiny_sd3.stability_file(pipes[1][variant], tmp_path / "sd3.safetensors", dtype=dtype)
    convert(file, tmp_path / "ours", like=pipes[0] / variant)
    convert(tmp_path / "ours", tmp_path / "back.safetensors")
    assert_equal(load_file(tmp_path / "back.safetensors"), load_file(file))
    assert (tmp_path / "back.safetensors").read_bytes() == file.read_bytes()  # as safetensors itself writes it


def test_a_projection_of_clip_l_that_the_file_leaves_out_is_the_identity(pipes, tmp_path):
    state = load_file(tiny_sd3.stability_file(pipes[1]["plain"], tmp_path / "whole.safetensors"))
    del state["text_encoders.clip_l.transformer.text_projection.weight"]
    save_file(state, tmp_path / "sd3.safetensors")
    convert(tmp_path / "sd3.safetensors", tmp_path / "pipe", to="diffusers", like=pipes[0] / "plain")
    made = load_file(tmp_path / "pipe" / "text_encoder" / "model.safetensors")
    assert torch.equal(made["text_projection.weight"], torch.eye(16))
    convert(tmp_path / "pipe", tmp_path / "back.safetensors")
    assert_equal(load_file(tmp_path / "back.safetensors"), state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_own_converter_reads_our_file_to_the_same_model(variant, pipes, tmp_path):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    convert(pipes[0] / variant, tmp_path / "one.safetensors")
    state = load_file(tmp_path / "one.safetensors")
    network = {k: v for k, v in state.items() if k.startswith("model.diffusion_model.")}
    theirs = utils.convert_sd3_transformer_checkpoint_to_diffusers(network)
    assert_equal(theirs, pipes[1][variant].transformer.state_dict())
    vae = {k: v for k, v in state.items() if k.startswith("first_stage_model.")}
    theirs = utils.convert_ldm_vae_checkpoint(vae, dict(pipes[1][variant].vae.config))
    assert_equal(theirs, pipes[1][variant].vae.state_dict())


def test_a_transformer_alone_from_its_folder_or_a_bare_file(pipes, tmp_path):
    transformer = pipes[1]["dual"].transformer
    notes = convert(pipes[0] / "dual" / "transformer", tmp_path / "ours")
    assert "makes latents" in notes[0] and "no text encoders" in notes[1]
    convert(tmp_path / "ours", tmp_path / "back")
    from diffusers import SD3Transformer2DModel

    assert_equal(SD3Transformer2DModel.from_pretrained(tmp_path / "back").state_dict(), transformer.state_dict())
    bare = tiny_sd3.stability_names(transformer.state_dict())  # without a prefix, as trainers save it
    save_file({k: v.clone() for k, v in bare.items()}, tmp_path / "bare.safetensors")
    save_file(dict(transformer.state_dict()), tmp_path / "diffusers.safetensors")
    for name in ("bare", "diffusers"):
        got = open_checkpoint(tmp_path / f"{name}.safetensors")
        wanted = open_checkpoint(pipes[0] / "dual" / "transformer")
        assert_equal(*({k: v.read() for k, v in each.transformer.items()} for each in (got, wanted)))


def test_a_model_of_genflow_s_own_goes_to_diffusers_by_its_average_or_its_last_weights(tmp_path):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(1)
    config = MMDiTConfig(depth=2, hidden=32, heads=4, in_channels=3, context_dim=8, pooled_dim=8, sample_size=4)
    state = {f"network.{k}": torch.randn_like(v) for k, v in config.build().state_dict().items()}
    ema = {k: v + 1 for k, v in state.items()}
    about = {
        "text": {"name": "labels", "classes": ["cat"], "dim": 8},
        "flow": {"name": "rectified"},
        "shape": [3, 8, 8],
    }
    about["model"] = to_dict(config)
    save_model(tmp_path / "model", config=about, state=state | {"text.table.weight": torch.zeros(2, 8)}, ema=ema)
    for name, wanted, how in (("a", ema, {}), ("b", state, {"ema": False})):
        assert "not of a pipeline" in convert(tmp_path / "model", tmp_path / name, **how)[0]
        module = SD3Transformer2DModel.from_pretrained(tmp_path / name)
        assert torch.equal(module.proj_out.weight, wanted["network.final.weight"])
        assert torch.equal(module.norm_out.linear.bias, wanted["network.final_modulation.bias"].roll(32))
    with pytest.raises(
        UserError, match="Stability's layout has hidden 64 d and d heads at depth d, this model hidden 32"
    ):
        convert(tmp_path / "model", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="a genflow model already"):
        convert(tmp_path / "model", tmp_path / "x", to="genflow")
    for key, value in (("prediction", "x"), ("whiten", 0.1), ("path", {"name": "cosine"})):
        flow = {"name": "rectified", key: value}
        save_model(tmp_path / "other", config={**about, "flow": flow}, state=state)
        with pytest.raises(UserError, match=f"its flow has {key} .*, where SD3's has"):
            convert(tmp_path / "other", tmp_path / "y")


def test_tensors_that_belong_to_no_part_are_told(pipes, tmp_path):
    state = load_file(tiny_sd3.stability_file(pipes[1]["plain"], tmp_path / "whole.safetensors"))
    save_file({**state, "model_sampling.sigmas": torch.ones(3)}, tmp_path / "more.safetensors")
    with pytest.warns(UserWarning, match="1 tensors belong to no part of SD3 and are left out: model_sampling.sigmas"):
        convert(tmp_path / "more.safetensors", tmp_path / "out.safetensors")
    assert_equal(load_file(tmp_path / "out.safetensors"), state)


@pytest.mark.parametrize("name", ["text_encoders.t5xxl.transformer.scaled_fp8", "text_encoders.x.proj.scale_weight"])
def test_weights_of_8_bits_with_scales_beside_them_are_refused(name, pipes, tmp_path):
    state = load_file(tiny_sd3.stability_file(pipes[1]["plain"], tmp_path / "whole.safetensors"))
    save_file({**state, name: torch.ones(2)}, tmp_path / "scaled.safetensors")
    with pytest.raises(UserError, match=rf"is quantised, with scales of its own \({name}\)"):
        convert(tmp_path / "scaled.safetensors", tmp_path / "out", like=pipes[0] / "plain")


def test_parts_of_a_fused_tensor_of_several_dtypes_become_the_widest(pipes, tmp_path):
    folder = pipes[0] / "plain" / "transformer"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    q, k = (f"transformer_blocks.0.attn.to_{letter}.weight" for letter in "qk")
    changed = {**state, q: state[q].bfloat16(), k: state[k].to(torch.float8_e4m3fn)}
    save_file(changed, tmp_path / "several.safetensors")
    convert(tmp_path / "several.safetensors", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    made = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert_equal(made, {name: w.float() for name, w in changed.items()})


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_read_by_their_index(variant, pipes, tmp_path):
    pipes[1]["dual"].transformer.save_pretrained(tmp_path / "shards", max_shard_size="200KB", variant=variant)
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 3
    convert(tmp_path / "shards", tmp_path / "ours")
    convert(pipes[0] / "dual" / "transformer", tmp_path / "whole")
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    lost = min((tmp_path / "shards").glob("*-of-*.safetensors"))
    lost.unlink()
    with pytest.raises(UserError, match=f"lacks {lost.name}, one of"):
        convert(tmp_path / "shards", tmp_path / "more")


# ------------------------------------------------------------------------------------------------------------ full size

FULL = {
    "SD3-medium": (24, {}, 192),
    "SD3.5-medium": (24, {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}, 384),
    "SD3.5-large": (38, {"qk_norm": "rms_norm"}, 192),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_models_map_with_no_tensor_missing_or_left_over(name):
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    depth, changes, grid = FULL[name]
    sizes = {"num_layers": depth, "attention_head_dim": 64, "num_attention_heads": depth, "patch_size": 2}
    sizes |= {"joint_attention_dim": 4096, "caption_projection_dim": 64 * depth, "pooled_projection_dim": 2048}
    with torch.device("meta"):
        theirs = SD3Transformer2DModel(
            sample_size=128, in_channels=16, out_channels=16, pos_embed_max_size=grid, **sizes, **changes
        )
    source = {k: Lazy.of(v.to("meta")) for k, v in theirs.state_dict().items()}
    config = config_from_shapes(source, DIFFUSERS)
    assert config == config_from_diffusers(theirs.config)
    assert config.dual_attention_layers == changes.get("dual_attention_layers", ())
    ours = to_genflow(source, config, DIFFUSERS)
    with torch.device("meta"):
        wanted = {k: tuple(p.shape) for k, p in config.build().named_parameters()}
    assert {k: v.shape for k, v in ours.items()} == {**wanted, "position_table": (grid**2, 64 * depth)}
    file = from_genflow(ours, config, STABILITY)
    assert config_from_shapes(file, STABILITY) == config
    again = convert_sd3_transformer_checkpoint_to_diffusers({k: v.read() for k, v in file.items()})
    assert {k: tuple(v.shape) for k, v in again.items()} == {k: v.shape for k, v in source.items()}
    for there in (file, from_genflow(ours, config, DIFFUSERS)):
        layout = STABILITY if "pos_embed" in there else DIFFUSERS
        assert {k: v.shape for k, v in to_genflow(there, config, layout).items()} == {
            k: v.shape for k, v in ours.items()
        }
        assert all(tuple(v.read().shape) == v.shape for v in there.values())


def test_configurations_go_there_and_back():
    for config in (
        MMDiTConfig(depth=3, in_channels=4, context_dim=8, pooled_dim=6, sample_size=4, pos_embed_max_size=9),
        MMDiTConfig(depth=2, in_channels=4, context_dim=8, pooled_dim=6, sample_size=4, dual_attention_layers=(1,)),
    ):
        again = config_from_diffusers(config_to_diffusers(config))
        assert config_to_diffusers(again) == config_to_diffusers(config)
    vae = KLAutoencoderConfig(channels=(32, 64), latent_channels=8, layers=1, quant_convs=True, scale=2.0)
    assert vae_from_diffusers(vae_to_diffusers(vae)) == vae
    with pytest.raises(UserError, match="act_fn = mish, and only silu"):
        vae_from_diffusers({**vae_to_diffusers(vae), "act_fn": "mish"})


# --------------------------------------------------------------------------------------------------------------- memory


def test_a_file_is_written_as_safetensors_writes_it(tmp_path):
    tensors = {"b": torch.randn(3, 2), "a": torch.arange(3), "é": torch.zeros(0, 4), "h": torch.randn(5).bfloat16()}
    tensors["flag"] = torch.tensor(True)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_file(tmp_path / "ours", {k: Lazy.of(v) for k, v in tensors.items()}, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert_equal({k: v.read() for k, v in read_file(tmp_path / "ours").items()}, tensors)


MEASURE = """
import resource, sys
from genflow.interop.convert import convert
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
first, second, third = sys.argv[1:]
before = peak()
convert(first, second)
convert(second, third)
print(peak() - before)
"""


def test_no_whole_copy_is_ever_in_memory(tmp_path):
    config = MMDiTConfig(depth=8, in_channels=16, context_dim=512, pooled_dim=64, sample_size=16, qk_norm=False)
    with torch.device("meta"):
        shapes = {k: tuple(p.shape) for k, p in config.build().named_parameters()}
    zero = {k: Lazy(s, torch.bfloat16, lambda s=s: torch.zeros(s, dtype=torch.bfloat16)) for k, s in shapes.items()}
    places = [tmp_path / "diffusers.safetensors", tmp_path / "stability.safetensors", tmp_path / "genflow"]
    write_file(places[0], from_genflow(zero, config, DIFFUSERS))
    size = places[0].stat().st_size
    command = [sys.executable, "-c", MEASURE, *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert size > 120e6 and int(done.stdout) < 0.2 * size


# -------------------------------------------------------------------------------------------------------------- refusals

FOREIGN = {
    "FLUX.1": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "a Stable Diffusion XL UNet": ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x"],
    "a Stable Diffusion 1 UNet": ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"],
    "a Stable Diffusion UNet": ["down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"],
    "PixArt": ["adaln_single.linear.weight", "transformer_blocks.0.attn1.to_q.weight"],
    "AuraFlow": ["joint_transformer_blocks.0.attn.to_q.weight"],
    "Lumina": ["cap_embedder.0.weight", "layers.0.attention.qkv.weight"],
    "a LoRA file": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
    "a ControlNet": ["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"],
    "an autoencoder alone": ["encoder.down.0.block.0.conv1.weight"],
    "a text encoder alone": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "its names do not tell": ["something.weight"],
}


@pytest.mark.parametrize("family", FOREIGN)
def test_another_family_is_named(family, tmp_path):
    save_file({name: torch.zeros(2, 2) for name in FOREIGN[family]}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors: no transformer of the SD3 family; ") as caught:
        convert(tmp_path / "x.safetensors", tmp_path / "out")
    assert family in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_what_they_seem_cost_one_line(pipes, tmp_path, capsys):
    whole = (pipes[0] / "plain" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    for name, content, words in (
        ("cut.safetensors", whole[: len(whole) // 2], "damaged or cut short"),
        ("head.safetensors", whole[:40], "damaged or cut short"),
        ("empty.safetensors", b"", "is no safetensors file, whatever its name says"),
        ("renamed.safetensors", b"\x89PNG\r\n\x1a\n" + bytes(100), "is no safetensors file"),
        ("page.safetensors", b"<!DOCTYPE html><html>", "is a web page"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("q4.gguf", b"GGUF\x03" + bytes(50), "GGUF"),
        ("model.ckpt", pickle.dumps({"a": 1}), "is a pickle, which can run any code"),
        ("model.pt", b"PK\x03\x04" + bytes(40), "is a pickle, which can run any code"),
        ("odd.bin", bytes(40), "take the .safetensors file of the same model"),
    ):
        (tmp_path / name).write_bytes(content)
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error and name in error and error.count("\n") == 1, error
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "model.ckpt", tmp_path / "old" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle"):
        convert(tmp_path / "old", tmp_path / "out")
    shutil.copy(pipes[0] / "plain" / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path / "sd3.ckpt")
    convert(tmp_path / "sd3.ckpt", tmp_path / "out")  # what it holds counts, not its name


def test_what_does_not_fit_is_refused(pipes, tmp_path):
    file = pipes[0] / "plain" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)

    def refused(words: str, source: Path, **how: object) -> None:
        with pytest.raises(UserError, match=words) as caught:
            convert(source, tmp_path / "out", **how)
        assert "\n" not in str(caught.value)

    for words, change in (
        ("has no tensor proj_out.bias", lambda s: s.pop("proj_out.bias")),
        ("what would extra be for", lambda s: s.update(extra=torch.zeros(1))),
        ("block 0 of 2 is missing|no transformer", lambda s: [s.pop(k) for k in list(s) if "blocks.0." in k]),
        (r"its positions are \(1, 35, 128\)", lambda s: s.update({"pos_embed.pos_embed": torch.zeros(1, 35, 128)})),
        (r"its positions are \(\)", lambda s: s.update({"pos_embed.pos_embed": torch.zeros(())})),
        (r"proj_out.bias makes \(63,\), not \(64,\)", lambda s: s.update({"proj_out.bias": torch.zeros(63)})),
    ):
        changed = dict(state)
        change(changed)
        save_file(changed, tmp_path / "changed.safetensors")
        refused(words, tmp_path / "changed.safetensors")
    refused("to = 'comfy' is no layout", file, to="comfy")
    refused("Stability's layout is one file; name it .*out.safetensors", file, to="stability")
    refused("--like must be the folder of a diffusers pipeline", file, like=file)
    refused("does not exist", tmp_path / "nowhere")
    wide = tmp_path / "wide"
    shutil.copytree(pipes[0] / "plain", wide)
    index = json.loads((wide / "model_index.json").read_text())
    (wide / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    refused("is a FluxPipeline of diffusers", wide)
    (wide / "model_index.json").write_text(json.dumps(index))
    vae = json.loads((wide / "vae" / "config.json").read_text())
    (wide / "vae" / "config.json").write_text(json.dumps({**vae, "latent_channels": 4}))
    refused("latents of 16 channels, the autoencoder makes 4; they do not belong together", wide)
    with pytest.raises(UserError, match="is there already"):
        convert(file, file)
    (tmp_path / "out").mkdir()
    for name in ("precious", "precious.partial"):
        (tmp_path / "out" / name).write_text("")
        refused("is there already", file)
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "precious").symlink_to(wide)  # which rglob does not look into
    refused("is there already", file)


@pytest.mark.parametrize("out", ["out[1].safetensors", "out"])
def test_what_a_killed_conversion_left_is_gone_with_the_next(out, pipes, tmp_path):
    out = tmp_path / out
    file = out if out.suffix else out / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir(exist_ok=True)
    if not (child := os.fork()):
        with replacing(file) as temporary:
            temporary.write_text("half a file")
            os._exit(9)
    os.waitpid(child, 0)
    assert list(tmp_path.rglob(".*.partial"))
    convert(pipes[0] / "plain" / "transformer", out, to="stability" if out.suffix else "diffusers")
    assert file.is_file() and not list(tmp_path.rglob(".*.partial"))


def test_the_command_line_says_what_is_left_to_do(pipes, tmp_path, capsys):
    source = tiny_sd3.stability_file(pipes[1]["plain"], tmp_path / "sd3.safetensors", encoders=False)
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    assert "note: no text encoders" in out and f"written: {tmp_path / 'ours'}" in out
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "pipe"), "--like", str(pipes[0] / "plain")]) == 0
    assert_same_files(pipes[0] / "plain", tmp_path / "pipe", FILES + ENCODERS)
    assert main(["convert", str(source), str(tmp_path / "x"), "--to", "diffuser"]) == 2
