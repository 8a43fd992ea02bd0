"""Conversion of models whose parts are of several origins, or lack one: nothing is swapped, lost or half written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from genflow.cli import main
from genflow.config import to_dict
from genflow.errors import UserError
from genflow.flows.autoencoder import AutoencoderFlowConfig
from genflow.flows.latent import LatentFlowConfig
from genflow.flows.store import load, save_model
from genflow.flows.trained import TrainedAutoencoderConfig
from genflow.functional import noise_from_seeds
from genflow.interop.autoencoder import KLAutoencoderConfig, KLNetworkConfig
from genflow.interop.checkpoints import open_checkpoint
from genflow.interop.convert import convert
from genflow.interop.pipelines import open_pipeline
from genflow.networks.autoencoders import TinyAutoencoderConfig
from genflow.networks.bottlenecks import GaussianConfig
from genflow.text.none import NoTextConfig
from genflow.text.sd3 import SD3TextConfig
from genflow.training.config import RunConfig
from genflow.training.warm import autoencoder_of, begin_with
from tests import tiny_sd3


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipe") / "pipe"
    tiny_sd3.pipeline().save_pretrained(folder)
    return folder


def saved(path, model, flow, text, module):
    about = {"model": to_dict(model), "flow": to_dict(flow), "text": to_dict(text), "shape": [3, 16, 16]}
    save_model(path, config=about, state=module.state_dict())
    return path


def latent_model(root, pipe, network):
    """A latent MM-DiT as wide as the pipeline's, on an autoencoder trained by genflow."""
    model = open_checkpoint(pipe).model
    parts = AutoencoderFlowConfig(GaussianConfig(model.in_channels))
    flow = parts.build(network.build(), NoTextConfig().build(), shape=(3, 16, 16))
    flow.bottleneck.running.copy_(torch.tensor([0.5, 4.25]))
    saved(root / "vae", network, parts, NoTextConfig(), flow)
    text = SD3TextConfig(folder=str(pipe))
    config = LatentFlowConfig(TrainedAutoencoderConfig(str(root / "vae")).resolved())
    whole = config.build(model.build(), text.build(), shape=(3, 16, 16))
    whole.autoencoder.network.load_state_dict(flow.network.state_dict())
    whole.autoencoder.bottleneck.load_state_dict(flow.bottleneck.state_dict())
    return saved(root / "model", model, config, text, whole)


def test_an_autoencoder_of_its_own_goes_along(tmp_path, pipe):
    channels = open_checkpoint(pipe).model.in_channels
    network = KLNetworkConfig((32, 64), in_channels=3, encoder_channels=2 * channels, latent_channels=channels)
    model = latent_model(tmp_path, pipe, network)
    for name, like in (("plain", None), ("like", pipe)):
        assert convert(model, tmp_path / name, like=like) == []
        made = load_file(tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors")
        own = load(tmp_path / "vae").network.module.state_dict()
        assert made.keys() == own.keys() and all(torch.equal(made[key], own[key]) for key in own)
        config = json.loads((tmp_path / name / "vae" / "config.json").read_text())
        assert config["scaling_factor"] == pytest.approx(0.5) and config["shift_factor"] == pytest.approx(0.5)
    ours, theirs = load(model), open_pipeline(tmp_path / "plain")
    pictures = [flow.sample(["a cat"], seeds=[1], steps=2, guidance=1.0).x for flow in (ours, theirs)]
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)


def test_no_other_autoencoder_takes_the_place_of_one_that_diffusers_has_not(tmp_path, pipe):
    channels = open_checkpoint(pipe).model.in_channels
    network = TinyAutoencoderConfig(
        width=8, blocks=1, factor=2, in_channels=3, encoder_channels=2 * channels, latent_channels=channels
    )
    model = latent_model(tmp_path, pipe, network)
    with pytest.raises(UserError, match="its latents are those of its own tiny_autoencoder"):
        convert(model, tmp_path / "like", like=pipe)
    (note,) = convert(model, tmp_path / "plain")
    assert note.startswith("its autoencoder, a tiny_autoencoder, has no place") and not (tmp_path / "like").exists()
    (note,) = convert(model, tmp_path / "one.safetensors")
    assert note.endswith("the file makes latents")


def test_nothing_is_written_where_something_is_or_where_a_part_is_missing(tmp_path, pipe, capsys):
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"precious")
    for words in (["--to", "lora"], ["--to", "stability"]):
        assert main(["convert", str(pipe), str(taken), *words]) == 2
    assert taken.read_bytes() == b"precious"
    assert main(["convert", str(pipe), str(tmp_path / "x"), "--to", "lora", "--like", str(pipe)]) == 2
    assert "updates alone lack nothing" in capsys.readouterr().err
    for part in ("text_encoder_3", "transformer", "vae"):
        lacking = tmp_path / f"no-{part}"
        shutil.copytree(pipe, lacking)
        shutil.rmtree(lacking / part)
        assert main(["sample", str(lacking), "--prompt", "a", "--out", str(tmp_path / "o")]) == 2
        assert main(["convert", str(lacking), str(tmp_path / "o")]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 2 and all(part in line and "is missing" in line for line in told)
    lacking = tmp_path / "no-tokenizer"
    shutil.copytree(pipe, lacking)
    shutil.rmtree(lacking / "tokenizer_3")
    with pytest.raises(UserError, match="has no text_encoder_3 with a tokenizer_3"):
        convert(lacking, tmp_path / "out", to="diffusers")
    assert not (tmp_path / "out").exists()
    config = json.loads((lacking / "transformer" / "config.json").read_text())
    (lacking / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": "x"}))
    with pytest.raises(UserError, match="num_layers = 'x', not a whole number"):
        open_checkpoint(lacking)


def test_a_scheduler_comes_along_with_encoders_from_a_file(tmp_path, pipe):
    like = tmp_path / "like"
    shutil.copytree(pipe, like)
    path = like / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift": 5.0}))
    file = tiny_sd3.stability_file(tiny_sd3.pipeline(), tmp_path / "sd3.safetensors")
    convert(file, tmp_path / "model", to="genflow", like=like)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["sample"]["shift"] == 5.0


def test_an_encoder_that_the_index_leaves_out_is_not_used(tmp_path, pipe):
    folder = tmp_path / "pipe"
    shutil.copytree(pipe, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": [None, None]}))
    assert list(open_pipeline(folder).text.parts) == ["clip_l", "clip_g"] and "t5" in open_pipeline(pipe).text.parts


@pytest.mark.parametrize(
    ("key", "value", "told"), [("scaling_factor", 0.5, "scale"), ("norm_num_groups", 16, "groups")]
)
def test_what_a_file_of_stability_s_does_not_tell_of_an_autoencoder_is_not_lost(tmp_path, pipe, key, value, told):
    shutil.copytree(pipe, tmp_path / "pipe")
    edited(tmp_path / "pipe", "vae/config.json", **{key: value})
    with pytest.raises(UserError, match=f"layout has {told} .*as SD3's, and this one has {value}"):
        convert(tmp_path / "pipe", tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()


@pytest.mark.parametrize("shape", [None, (3,), (1,)])
def test_an_autoencoder_without_all_its_tensors_is_not_converted(tmp_path, pipe, shape):
    shutil.copytree(pipe, tmp_path / "pipe")
    file, name = tmp_path / "pipe" / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"
    tensors = load_file(file)
    if shape is None:
        del tensors[name]
    else:
        tensors[name if shape == (1,) else "loss.scale"] = torch.zeros(shape)
    save_file(tensors, file)
    with pytest.raises(
        UserError, match=r"not as its config says: (decoder.conv_out.bias is (missing|\(1,\))|loss.scale is)"
    ):
        convert(tmp_path / "pipe", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edited(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_encoder_that_a_model_does_not_use_does_not_go_along(tmp_path, pipe):
    convert(pipe, tmp_path / "model")
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    edited(tmp_path / "model", "config.json", text={**about["text"], "encoders": ["clip_l", "clip_g"]})
    convert(tmp_path / "model", tmp_path / "out")
    assert list(open_pipeline(tmp_path / "out").text.parts) == ["clip_l", "clip_g"]


def test_fewer_tokens_of_t5_are_told_and_draw_the_same(tmp_path, pipe):
    convert(pipe, tmp_path / "model")
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    edited(tmp_path / "model", "config.json", text={**about["text"], "t5_tokens": 20})
    (note,) = convert(tmp_path / "model", tmp_path / "out")
    assert "max_sequence_length=20" in note
    ours, made = load(tmp_path / "model"), StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")
    x = ours.sample(["red dog"], seeds=[3], **{**ours.recipe["sample"], "steps": 2}).x
    noise = noise_from_seeds([3], (16, 8, 8))
    how = {"num_inference_steps": 2, "latents": noise, "height": 16, "width": 16, "output_type": "pt"}
    torch.testing.assert_close(made("red dog", max_sequence_length=20, **how).images * 2 - 1, x, rtol=0, atol=3e-3)
    assert (made("red dog", **how).images * 2 - 1 - x).abs().max() > 0.02


@pytest.mark.parametrize("sample", [{"grid": "shifted"}, {"sampler": "unipc"}, {"shift": "resolution"}])
def test_a_way_to_sample_that_no_scheduler_of_diffusers_has_is_told(sample, tmp_path, pipe):
    convert(pipe, tmp_path / "model")
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    edited(tmp_path / "model", "config.json", sample={**about["sample"], **sample})
    (note,) = convert(tmp_path / "model", tmp_path / "out")
    (key, value), *_ = sample.items()
    theirs, own = note.split(", and the model itself with ")
    assert theirs == "diffusers' scheduler draws with sampler euler, grid double_shifted, shift 3.0"
    assert f"{key} {value}" in own and note.endswith("; genflow.as_scheduler has more of them")


def test_a_model_whose_text_encoders_are_gone_says_so(tmp_path, pipe):
    shutil.copytree(pipe, tmp_path / "pipe")
    convert(tmp_path / "pipe", tmp_path / "model")
    shutil.rmtree(tmp_path / "pipe")
    (note,) = convert(tmp_path / "model", tmp_path / "out")
    assert note.startswith("no text encoders")
    assert convert(tmp_path / "model", tmp_path / "whole", like=pipe) == []
    assert list(open_pipeline(tmp_path / "whole").text.parts) == ["clip_l", "clip_g", "t5"]


@pytest.mark.parametrize("to", ["genflow", "diffusers"])
def test_a_pipeline_is_lent_what_it_lacks_and_keeps_its_own(tmp_path, pipe, to):
    own = tiny_sd3.pipeline()
    with torch.no_grad():
        own.text_encoder.text_projection.weight.mul_(2)
    own.register_modules(text_encoder_3=None, tokenizer_3=None)
    own.save_pretrained(tmp_path / "own")
    edited(tmp_path / "own", "scheduler/scheduler_config.json", shift=6.0)
    edited(tmp_path / "own", "text_encoder/config.json", hidden_act="gelu")
    convert(tmp_path / "own", tmp_path / "out", to=to, like=pipe)
    flow = load(tmp_path / "out") if to == "genflow" else open_pipeline(tmp_path / "out")
    assert list(flow.text.parts) == ["clip_l", "clip_g", "t5"] and flow.recipe["sample"]["shift"] == 6.0
    clip = flow.text.parts["clip_l"].network()[1]
    assert torch.equal(clip.text_projection.weight, own.text_encoder.text_projection.weight)
    assert clip.config.hidden_act == "gelu" and not hasattr(flow.text.parts["t5"].network()[1].config, "hidden_act")


def test_groups_that_do_not_divide_an_autoencoder_cost_one_line(tmp_path):
    for how in ({"channels": (24, 48)}, {"groups": 0}, {"channels": ()}):
        with pytest.raises(UserError, match="autoencoder kl: channels = .* must be multiples of groups"):
            KLAutoencoderConfig(**how).build()
        with pytest.raises(UserError, match="kl_autoencoder: channels = .* must be multiples of groups"):
            KLNetworkConfig(**how, in_channels=3, latent_channels=4).build()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"layers": 0}, "layers = 0 is too few; the least is 1"),
        ({"latent_channels": -1}, "latent_channels = -1 is too few"),
        ({"picture_channels": 0}, "picture_channels = 0 is too few"),
        ({"scale": 0.0}, "scale = 0.0 and shift = 0.0609 must be finite, and scale not 0"),
        ({"shift": float("nan")}, "shift = nan must be finite"),
    ],
)
def test_an_autoencoder_of_numbers_that_cannot_be_costs_one_line(how, says):
    with pytest.raises(UserError, match=f"autoencoder kl: .*{says}"):
        KLAutoencoderConfig(**how).build()


def test_a_kl_autoencoder_to_train_has_a_block_a_level():
    with pytest.raises(UserError, match="kl_autoencoder: layers = 0 is too few"):
        KLNetworkConfig(layers=0, in_channels=3, latent_channels=4).build()


def test_weights_of_latents_that_are_scaled_otherwise_are_refused(tmp_path, pipe):
    model, text = open_checkpoint(pipe).model, SD3TextConfig(folder=str(pipe))
    vae = {"channels": (32, 64), "latent_channels": model.in_channels}
    flux, sd3 = (
        LatentFlowConfig(KLAutoencoderConfig(**vae, **how)) for how in ({"scale": 0.3611, "shift": 0.1159}, {})
    )
    flows = [each.build(model.build(), text.build(), shape=(3, 16, 16)) for each in (flux, sd3)]
    saved(tmp_path / "flux", model, flux, text, flows[0])
    with pytest.raises(UserError, match=r"its latents have scale 0.3611, those of the config 1.5305; set"):
        begin_with(flows[1], str(tmp_path / "flux"))
    begin_with(flows[0], str(tmp_path / "flux"))
    with pytest.raises(UserError, match="is a pipeline of diffusers; genflow convert it first"):
        begin_with(flows[0], str(pipe))


def test_options_that_a_pipeline_cannot_heed(tmp_path, pipe, capsys):
    assert main(["sample", str(pipe), "--prompt", "a", "--no-ema", "--out", str(tmp_path / "o")]) == 2
    assert "has no averaged weights" in capsys.readouterr().err
    assert main(["sample", str(pipe / "transformer"), "--out", str(tmp_path / "o")]) == 2
    assert "holds a SD3Transformer2DModel of diffusers; genflow convert it first" in capsys.readouterr().err


def test_weights_of_latents_that_are_shifted_otherwise_are_refused_also_for_a_cache(tmp_path, pipe):
    model, text = open_checkpoint(pipe).model, SD3TextConfig(folder=str(pipe))
    vae = {"channels": (32, 64), "latent_channels": model.in_channels}
    other, own = (LatentFlowConfig(KLAutoencoderConfig(**vae, **how)) for how in ({"shift": 0.1159}, {}))
    flows = [each.build(model.build(), text.build(), shape=(3, 16, 16)) for each in (other, own)]
    saved(tmp_path / "other", model, other, text, flows[0])
    told = r"its latents have shift 0.1159, those of the config 0.0609; set flow\.autoencoder\.shift=0.1159"
    with pytest.raises(UserError, match=told):
        begin_with(flows[1], str(tmp_path / "other"))
    with pytest.raises(UserError, match=told):
        autoencoder_of(RunConfig(data=None, model=model, flow=own, init=str(tmp_path / "other")))


def test_a_model_without_all_of_an_autoencoder_is_no_init_of_a_cache(tmp_path, pipe):
    model, text = open_checkpoint(pipe).model, SD3TextConfig(folder=str(pipe))
    config = LatentFlowConfig(KLAutoencoderConfig(channels=(32, 64), latent_channels=model.in_channels))
    flow = config.build(model.build(), text.build(), shape=(3, 16, 16))
    saved(tmp_path / "m", model, config, text, flow)
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights[next(name for name in weights if name.startswith("autoencoder."))]
    save_file(weights, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match=r"it has not the autoencoder of the config: Missing key"):
        autoencoder_of(RunConfig(data=None, model=model, flow=config, init=str(tmp_path / "m")))
