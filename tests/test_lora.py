"""LoRA runs: what is trained, kept, resumed, drawn with, and given to diffusers; fine-tuning from a model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from genflow.cli import main
from genflow.config import load as load_config
from genflow.data.pictures import read_settings
from genflow.errors import UserError
from genflow.flows.lora import lora_scale
from genflow.flows.models.tarflow import TarFlowConfig
from genflow.flows.normalizing import NormalizingFlowConfig
from genflow.flows.store import load, save_model
from genflow.interop.convert import convert
from genflow.interop.lora import load_lora, read_lora, save_lora
from genflow.interop.pipelines import open_pipeline
from genflow.text.none import NoTextConfig
from genflow.training.config import RunConfig, TrainConfig
from genflow.training.lora import LoRA, adapted
from genflow.training.run import train
from tests.tiny_sd3 import pipeline, transformer

peft = pytest.importorskip("peft")
CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG = """
data: {{name: folder, path: {pictures}, size: 16}}
text: {{name: learned, dim: 8, layers: 1, heads: 2, max_tokens: 4}}
model: {{name: mmdit, depth: 2, hidden: 32, heads: 2}}
train: {{batch_size: 4, steps: 3, warmup: 1, save_every: 1, keep: 9, preview_every: 0, trackers: [], precision: fp32,
        optimizer: {{name: adamw, lr: 0.05}}}}
sample: {{steps: 2, sampler: euler}}
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "sks dog"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(noise.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder.parent


@pytest.fixture(scope="module")
def config(pictures, tmp_path_factory) -> Path:
    """A config of a plain run, its path."""
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(CONFIG.format(pictures=pictures))
    return path


@pytest.fixture(scope="module")
def base(config, tmp_path_factory) -> Path:
    return train(config, [f"out={tmp_path_factory.mktemp('runs') / 'base'}"])


@pytest.fixture(scope="module")
def tuned(config, base, tmp_path_factory) -> Path:
    """A LoRA run of base."""
    out = tmp_path_factory.mktemp("runs") / "tuned"
    return train(config, [f"out={out}", f"init={base}", "train.lora={rank: 3, alpha: 6}"])


def draw(flow) -> torch.Tensor:
    return flow.sample(["sks dog"], seeds=[0], steps=2, sampler="euler").x


# ------------------------------------------------------------------------------------------------------------- the run


def test_only_factors_are_trained_and_kept(base, tuned):
    kept = load_file(tuned / "checkpoints/step-00000003/model.safetensors")
    assert all(".lora_" in name for name in kept)
    assert {name.split(".")[3] for name in kept} == {"image_attention", "context_attention"}
    qkv = "network.blocks.0.image_attention.qkv.linear.lora_{}.default.weight"
    assert kept[qkv.format("A")].shape == (3, 32) and kept[qkv.format("B")].shape == (96, 3)
    assert kept[qkv.format("B")].abs().max() > 1e-3
    whole = (base / "checkpoints/step-00000003/model.safetensors").stat().st_size
    assert (tuned / "checkpoints/step-00000003/model.safetensors").stat().st_size < whole / 3


def test_a_loaded_run_is_its_base_with_the_update(base, tuned):
    plain, updated = load(base), load(tuned, ema=False)
    factors = load_file(tuned / "checkpoints/step-00000003/model.safetensors")
    for name, before in plain.state_dict().items():
        stem = name.removesuffix(".weight")
        a, b = (factors.get(f"{stem}.lora_{x}.default.weight") for x in "AB")
        expected = before if a is None else before + 2 * b @ a
        assert torch.allclose(updated.state_dict()[name], expected, atol=1e-6), name
    assert not torch.equal(draw(plain), draw(updated)) and torch.isfinite(draw(updated)).all()
    assert not torch.equal(draw(updated), draw(load(tuned)))  # the average


def test_a_loaded_run_saved_elsewhere_keeps_the_update(tuned, tmp_path):
    flow = load(tuned)
    save_model(tmp_path, config=flow.recipe, state=flow.state_dict())
    assert torch.equal(draw(load(tmp_path)), draw(flow))
    own = json.loads((tuned / "checkpoints/step-00000003/config.json").read_text())
    save_model(tmp_path, config=own, state=flow.state_dict())
    with pytest.raises(UserError, match="has no factors of a LoRA"):
        load(tmp_path)


def test_a_lora_run_resumes_to_the_same_factors(config, base, tuned, tmp_path):
    how = [f"out={tmp_path / 'run'}", f"init={base}", "train.lora={rank: 3, alpha: 6}"]
    whole = train(config, [f"out={tmp_path / 'whole'}", *how[1:]])
    train(config, [*how, "train.steps=2"])
    parts = train(config, how)
    for file in ("model", "ema", "optimizer"):
        a, b = (load_file(run / f"checkpoints/step-00000003/{file}.safetensors") for run in (whole, parts))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_lora_run_goes_on_and_draws_where_its_base_has_moved_to(config, base, tmp_path, capsys):
    old, new, out = (tmp_path / name for name in ("old", "new", "run"))
    shutil.copytree(base, old)
    how = [f"out={out}", "train.lora={rank: 2}", "train.steps=2"]
    before = load(train(config, [*how, f"init={old}"])).state_dict()
    old.rename(new)
    with pytest.raises(UserError, match=f"is an update of {old}, which is not there; .* init=FOLDER"):
        load(out)
    with pytest.raises(UserError, match="which is not there"):
        train(config, [*how, f"init={old}"])
    train(config, [*how, f"init={new}"])
    assert "draws by the config's `init` from now on" in capsys.readouterr().err
    assert all(torch.equal(tensor, before[name]) for name, tensor in load(out).state_dict().items())
    train(config, [*how, f"init={new}", "train.steps=3"])
    load(out)
    other = train(config, [f"out={tmp_path / 'other'}", "train.steps=1", "seed=5"])
    with pytest.raises(UserError, match=f"is an update of other weights of {other}"):
        train(config, [*how, f"init={other}", "train.steps=4"])


def test_a_lora_run_is_reflowed_as_the_whole_model_that_it_is(tuned, tmp_path):
    how = ["--pairs", "4", "--samples", "2", "--steps", "2", "--set", "train.steps=1", "train.optimizer.lr=0"]
    assert main(["reflow", str(tuned), *how, "--out", str(tmp_path / "next")]) == 0
    before, after = load(tuned).state_dict(), load(tmp_path / "next").state_dict()
    assert all(torch.allclose(after[name], tensor) for name, tensor in before.items())


def test_training_sees_what_sampling_will(config, base, tmp_path):
    """The network with its factors beside it, and with them added to its weights, answer alike."""
    from genflow.training.lora import adapted

    flow = load(base)
    adapted(flow, flow.network, LoRA(rank=2, alpha=6, targets=("qkv.linear", "proj", "image_mlp.fc1", "image_mlp.fc2")))
    with torch.no_grad():
        for name, p in flow.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape) * 0.1)
    beside = draw(flow.eval())
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(flow.state_dict(), folder / "model.safetensors")
    about = json.loads((base / "checkpoints/step-00000003/config.json").read_text())
    about |= {"init": str(base), "train": {"lora": {"rank": 2, "alpha": 6}}}
    (folder / "config.json").write_text(json.dumps(about))
    assert torch.allclose(draw(load(folder)), beside, atol=1e-5)
    assert not torch.allclose(draw(load(base)), beside, atol=1e-2)


def test_a_lora_of_a_lora_run(config, tuned, tmp_path):
    out = train(config, [f"out={tmp_path}", f"init={tuned}", "train.lora={rank: 2}", "train.steps=1"])
    assert torch.isfinite(draw(load(out))).all()


def test_a_full_fine_tuning_begins_with_the_weights(config, base, tmp_path):
    out = train(config, [f"out={tmp_path}", f"init={base}", "train.steps=1", "train.optimizer.lr=0"])
    a, b = load(out, ema=False).state_dict(), load(base).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["train.lora={rank: 2}", "init=null"], "train.lora: an update of what? Set `init`"),
        (["train.lora={rank: 0}"], "rank = 0 is too few"),
        (["train.lora={alpha: -1}"], "alpha = -1.0 must be positive"),
        (["train.lora={targets: []}"], "targets is empty"),
        (["train.lora={targets: [qkv.liner]}"], "no linear layer is called 'qkv.liner'. Did you mean 'qkv.linear'"),
        (["train.lora={targets: [image_modulation]}"], "no linear layer is called 'image_modulation'"),
        (["init=nowhere"], "nowhere does not exist"),
        (["model.hidden=64"], "but the run's model wants"),
    ],
)
def test_mistakes_cost_one_line(config, base, tmp_path, capsys, change, message):
    assert main(["train", str(config), f"init={base}", f"out={tmp_path / 'run'}", *change]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1, told


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_on_buckets_learn_the_factors_of_one(config, base, tmp_path, parallel):
    from tests.processes import together

    more = tmp_path / "pictures"
    more.mkdir()
    noise = np.random.default_rng(0)
    for i in range(12):
        size = (24, 24) if i % 3 else (36, 20)
        Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)).save(more / f"{i}.png")
    data = [f"data.path={more}", "data.buckets={step: 4}", f"init={base}", "train.lora={rank: 2}"]
    whole = train(config, [*data, f"out={tmp_path / 'whole'}"])
    ended = together(2, [config, *data, f"train.parallel={parallel}", f"out={tmp_path / 'two'}"])
    assert [each.code for each in ended] == [0, 0], ended
    a, b = (load_file(run / "checkpoints/step-00000003/model.safetensors") for run in (whole, tmp_path / "two"))
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


# ----------------------------------------------------------------------------------------------------------- diffusers


@pytest.fixture(
    scope="module", params=[{}, {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}], ids=["sd3", "sd35"]
)
def sd3(request, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny pipeline's folder, and a LoRA run of genflow on it."""
    folder = tmp_path_factory.mktemp("sd3")
    pipeline(**request.param).save_pretrained(folder / "pipeline")
    convert(folder / "pipeline", folder / "model")
    pictures = folder / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a photo of dog")
    about = json.loads((folder / "model" / "config.json").read_text())
    parts = {name: about[name] for name in ("model", "flow", "text")}
    train_ = {"batch_size": 4, "steps": 3, "warmup": 1, "preview_every": 0, "trackers": [], "precision": "fp32"}
    optimizer = {"name": "adamw", "lr": 0.05}
    targets = ["qkv.linear", "proj", "image_mlp.fc1", "context_mlp.fc2", "context_embed"]
    run = {
        **parts,
        "data": {"name": "folder", "path": str(pictures), "size": 16},
        "train": {**train_, "optimizer": optimizer, "lora": {"rank": 3, "alpha": 6, "targets": targets}},
        "init": str(folder / "model"),
        "out": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    return folder / "pipeline", train(folder / "run.yaml")


def picture_of(pipe, latents: torch.Tensor) -> torch.Tensor:
    how = {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 16, "output_type": "pt"}
    return pipe("a photo of dog", latents=latents.clone(), height=16, width=16, **how).images


def test_diffusers_draws_the_same_picture_with_the_lora(sd3, tmp_path):
    import diffusers

    folder, run = sd3
    save_lora(run, tmp_path)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 8, 8)
    plain = picture_of(pipe, noise)
    pipe.load_lora_weights(tmp_path)
    with_lora = picture_of(pipe, noise)
    assert (with_lora - plain).abs().max() > 1e-2
    ours = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    ours.set_progress_bar_config(disable=True)
    from genflow.interop.diffusers import to_diffusers

    ours.transformer = to_diffusers(load(run).flow.network)
    assert (picture_of(ours, noise) - with_lora).abs().max() < 1e-3


def test_genflow_draws_the_same_picture_from_diffusers_file(sd3, tmp_path):
    folder, run = sd3
    save_lora(run, tmp_path / "lora.safetensors")
    flow, trained = open_pipeline(folder), load(run)
    how = {"seeds": [3], "steps": 3, "sampler": "euler"}
    plain = flow.sample(["a dog"], **how).x
    load_lora(flow, tmp_path / "lora.safetensors")
    assert (flow.sample(["a dog"], **how).x - trained.sample(["a dog"], **how).x).abs().max() < 1e-3
    load_lora(flow, run, weight=-1.0)
    assert (flow.sample(["a dog"], **how).x - plain).abs().max() < 1e-3
    assert (plain - trained.sample(["a dog"], **how).x).abs().max() > 1e-2


def test_a_lora_that_diffusers_made_is_heard_the_same(sd3, tmp_path):
    """With factors of their own for q, k and v, and an alpha."""
    import diffusers

    folder, _ = sd3
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    targets = ["attn.to_q", "attn.to_v", "attn.to_out.0", "norm_out.linear"]
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    state = peft.get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=state)
    flow = open_pipeline(folder)
    load_lora(flow, tmp_path)
    tokens, pooled, x, t = (
        torch.randn(2, 20, 48),
        torch.randn(2, 36),
        torch.randn(2, 16, 8, 8),
        torch.tensor([0.3, 0.9]),
    )
    with torch.no_grad():
        theirs = pipe.transformer(x, tokens, pooled, t * 1000).sample
        ours = flow.flow.network(x, t, tokens, pooled)
        plain = open_pipeline(folder).flow.network(x, t, tokens, pooled)
    assert (ours - theirs).abs().max() < 1e-3 < 0.05 < (ours - plain).abs().max()


def test_the_command_draws_with_a_lora_run(base, tuned, tmp_path, capsys):
    """What the run was trained on and its LoRA are together the run."""

    def pixels(*command: str) -> np.ndarray:
        out = tmp_path / str(len([*tmp_path.iterdir()]))
        assert main(["sample", *command, "--prompt", "sks dog", "--out", str(out)]) == 0, capsys.readouterr().err
        return np.asarray(Image.open(out / "0000-sks-dog-0.png")).astype(int)

    plain, run = pixels(str(base)), pixels(str(tuned))
    assert np.abs(pixels(str(base), "--lora", str(tuned)) - run).max() <= 1
    assert np.abs(pixels(str(base), "--lora", f"{tuned}:0.5", f"{tuned}:.5") - run).max() <= 1
    assert np.array_equal(pixels(str(base), "--lora", f"{tuned}:0"), plain)
    assert np.abs(pixels(str(tuned), "--lora", f"{tuned}:-1") - plain).max() <= 1
    assert np.abs(run - plain).max() > 8


def test_edits_inversions_and_figures_are_of_the_model_with_its_lora(base, tuned, pictures, tmp_path):
    """As they are of the LoRA run itself, which its base with the update is."""
    picture, seen = str(pictures / "sks dog" / "0.png"), {}
    for name, words in {"whole": [str(tuned)], "added": [str(base), "--lora", str(tuned)]}.items():
        seen[name] = []
        for command in (["edit"], ["invert"]):
            out = tmp_path / name / command[0]
            assert main([*command, words[0], picture, "--prompt", "x", "--out", str(out), *words[1:]]) == 0
            assert read_settings(out / "grid.png").get("lora", []) == words[2:]
            seen[name].append(Image.open(out / "grid.png").tobytes())
        out = tmp_path / name / "eval"
        how = ["--metrics", "fd", "-n", "2", "--features", "pixels"]
        assert main(["eval", *words, *how, "--out", str(out)]) == 0
        made = json.loads((out / "figures.json").read_text())
        seen[name].append(made["figures"][0]["value"])
        assert made["made"].get("lora", []) == words[2:] and main(["eval", "--again", str(out / "figures.json")]) == 0
    for whole, added in zip(seen["whole"][:2], seen["added"][:2], strict=True):
        assert abs(np.frombuffer(whole, np.uint8).astype(int) - np.frombuffer(added, np.uint8)).max() <= 1
    assert seen["whole"][2] == pytest.approx(seen["added"][2], rel=1e-3)


def test_the_command_writes_the_lora_or_the_whole(sd3, tmp_path):
    folder, run = sd3
    assert main(["convert", str(run), str(tmp_path / "lora"), "--to", "lora"]) == 0
    names = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert "transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight" in names
    assert main(["convert", str(run), str(tmp_path / "whole"), "--to", "diffusers", "--like", str(folder)]) == 0
    merged = open_pipeline(tmp_path / "whole").flow.network.state_dict()
    for name, weight in load(run).flow.network.state_dict().items():
        assert torch.allclose(merged[name], weight, atol=1e-6), name


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": torch.zeros(1)}, "is no LoRA in diffusers' format"),
        ({"transformer.other.to_q.lora_A.weight": torch.zeros(2, 4)}, "no linear layer for other.to_q.lora_A.weight"),
        (
            {"text_encoder.layer.lora_A.weight": torch.zeros(2, 4)},
            "no linear layer for text_encoder.layer.lora_A.weight; it is a LoRA of another one, or more than a LoRA",
        ),
        ({"lora_unet_joint_blocks_0.lora_down.weight": torch.zeros(2, 4)}, "looks like a LoRA file, of changes"),
        (
            {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 128)},
            "has one of its two factors only",
        ),
        (
            {
                "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 64),
                "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(64, 2),
            },
            r"attn.to_q is \[64, 2\] x \[2, 64\], the model's weight \[128, 128\]",
        ),
    ],
)
def test_files_that_are_no_lora_of_the_model_are_refused(tmp_path, tensors, message):
    from genflow.interop.diffusers import from_diffusers

    network = from_diffusers(transformer())
    save_file(tensors, tmp_path / "a.safetensors")
    from genflow.interop.lora import _from_diffusers

    with pytest.raises(UserError, match=message):
        _from_diffusers(tmp_path / "a.safetensors", network.config)


def test_a_layer_whose_weight_is_read_by_others_is_no_target():
    model = TarFlowConfig(blocks=1, layers=1, shape=(4,), condition_dim=0).build()
    flow = NormalizingFlowConfig().build(model, NoTextConfig().build(), shape=(4,))
    with pytest.raises(UserError, match="no linear layer is called 'head'"):
        adapted(flow, model, LoRA(targets=("fc1", "head")))


def test_other_flows_and_runs_have_no_lora(base, tuned, tmp_path):
    with pytest.raises(UserError, match="is no LoRA run: its config has no train.lora"):
        read_lora(base)
    with pytest.raises(UserError, match="a LoRA is for an MM-DiT, and the model is a Linear"):
        load_lora(torch.nn.Linear(2, 2), tuned)
    save_lora(tuned, tmp_path / "a.safetensors")
    assert len(load_file(tmp_path / "a.safetensors")) == 2 * (2 * 4 + 1 * 4 + 3)


# ------------------------------------------------------------------------------------------------- 8 bits, and configs


def test_eight_bit_moments_resume_exactly(config, base, tmp_path):
    pytest.importorskip("bitsandbytes")
    how = [f"init={base}", "train.optimizer={name: adamw8bit, lr: 1e-3}"]
    whole = train(config, [f"out={tmp_path / 'whole'}", *how])
    train(config, [f"out={tmp_path / 'parts'}", *how, "train.steps=2"])
    parts = train(config, [f"out={tmp_path / 'parts'}", *how])
    for file in ("model", "optimizer"):
        a, b = (load_file(run / f"checkpoints/step-00000003/{file}.safetensors") for run in (whole, parts))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    large = {value.dtype for name, value in a.items() if "/state" in name and value.numel() >= 4096}
    assert large == {torch.uint8}


@pytest.mark.parametrize(
    ("name", "changes", "grid"),
    [
        ("sd35-medium-lora", {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}, 384),
        ("sd3-medium-finetune", {}, 192),
    ],
)
def test_the_configs_of_sd3_fit_its_weights(name, changes, grid):
    """On the meta device: the network, the autoencoder and the factors that they describe."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    from genflow.interop.layouts import DIFFUSERS, to_genflow
    from genflow.interop.tensors import Lazy
    from genflow.text.sd3 import SD3TextConfig
    from genflow.training.lora import adapted

    config = load_config(CONFIGS / f"{name}.yaml", schema=RunConfig)
    sizes = {"num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "patch_size": 2}
    sizes |= {"joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048}
    text = SD3TextConfig(width=4096, pooled=2048, drop=config.text.drop).build()
    with torch.device("meta"):
        theirs = SD3Transformer2DModel(
            sample_size=128, in_channels=16, out_channels=16, pos_embed_max_size=grid, **sizes, **changes
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        network = config.model.build()
        flow = config.flow.build(network, text, shape=(3, config.data.size, config.data.size))
    mapped = to_genflow({k: Lazy.of(v.to("meta")) for k, v in theirs.state_dict().items()}, config.model, DIFFUSERS)
    ours = {k: tuple(p.shape) for k, p in network.named_parameters()}
    assert {k: v.shape for k, v in mapped.items() if k != "position_table"} == ours
    assert {k: v.shape for k, v in vae.state_dict().items()} == {
        k: v.shape for k, v in flow.autoencoder.module.state_dict().items()
    }
    if (lora := config.train.lora) is not None:
        adapted(flow, network, lora)
        trained = [k for k, p in flow.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * (24 * 4 - 1 + 13 * 2) and all("lora_" in k for k in trained)
    shapes = config.data.buckets.shapes(config.data.size)
    assert len(shapes) > 4 and all(side % 16 == 0 for shape in shapes for side in shape)


def test_defaults_are_a_choice_of_none():
    assert TrainConfig().lora is None and LoRA().targets == ("qkv.linear", "proj")


def test_alpha_is_the_rank_where_none_is_told(config, base, tmp_path):
    run = train(config, [f"out={tmp_path / 'run'}", f"init={base}", "train.lora={rank: 3}", "train.steps=1"])
    factors = load_file(run / "checkpoints/step-00000001/model.safetensors")
    name = "network.blocks.0.image_attention.qkv.linear"
    update = factors[f"{name}.lora_B.default.weight"] @ factors[f"{name}.lora_A.default.weight"]
    before, after = (flow.state_dict()[f"{name}.weight"] for flow in (load(base), load(run, ema=False)))
    assert update.abs().max() > 1e-4
    torch.testing.assert_close(after, before + update, rtol=0, atol=1e-6)


def test_a_lora_run_that_does_not_tell_its_alpha_has_its_rank():
    assert lora_scale({"train": {"lora": {"rank": 3}}}) == 1.0


def test_a_model_whose_base_has_other_weights_by_now_is_not_loaded(config, base, tmp_path):
    """Not only where training goes on."""
    other = train(config, [f"out={tmp_path / 'base'}"])
    run = train(config, [f"out={tmp_path / 'run'}", f"init={other}", "train.lora={rank: 2}", "train.steps=1"])
    load(run)
    train(config, [f"out={other}", "train.steps=4"])
    with pytest.raises(UserError, match="is an update of other weights of .*put those back"):
        load(run)
