"""LoRA files in diffusers' format: genflow's pictures with them equal those of diffusers' pipeline, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from genflow.cli import main
from genflow.data.pictures import read_settings
from genflow.errors import UserError
from genflow.flows.latent import LatentFlow
from genflow.functional import noise_from_seeds
from genflow.interop.lora import load_lora
from genflow.interop.pipelines import open_pipeline
from tests import tiny_sd3

peft = pytest.importorskip("peft")
PROMPT, SEED, STEPS = "a red dog", 3, 4
NAME = "pytorch_lora_weights.safetensors"
ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.to_add_out"]
# Names of adapters: their configurations, and whether the file tells them. Without, diffusers takes alpha = rank.
ADAPTERS = {
    "attention": ({"r": 2, "lora_alpha": 2, "target_modules": ATTENTION}, False),
    "all": ({"r": 3, "lora_alpha": 4, "target_modules": "all-linear", "rank_pattern": {"attn.to_v": 1}}, True),
    "patterns": (
        {
            "r": 4,
            "lora_alpha": 2,
            "target_modules": ["to_k", "net.2"],
            "alpha_pattern": {"^transformer_blocks.0.*to_k": 8},
        },
        True,
    ),
    "rslora": ({"r": 4, "lora_alpha": 3, "target_modules": ["to_v"], "use_rslora": True}, True),
    "ranks": (
        {
            "r": 2,
            "lora_alpha": 2,
            "target_modules": ATTENTION,
            "rank_pattern": {"to_q": 4},
            "alpha_pattern": {"to_q": 4},
        },
        False,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny SD3.5, `pipe`, and a folder with a LoRA of it, made by diffusers, under the name of each adapter."""
    root = tmp_path_factory.mktemp("loras")
    torch.manual_seed(0)
    tiny_sd3.pipeline(qk_norm="rms_norm", dual_attention_layers=(0,)).save_pretrained(root / "pipe")
    for name, (how, told) in ADAPTERS.items():
        pipe = diffusers_pipeline(root)
        config = peft.LoraConfig(init_lora_weights=False, **how)
        pipe.transformer.add_adapter(config)
        state = peft.get_peft_model_state_dict(pipe.transformer)
        metadata = pipe.transformer.peft_config["default"].to_dict() if told else None
        pipe.save_lora_weights(root / name, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata)
    return root


def diffusers_pipeline(folder: Path):
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder / "pipe")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(folder: Path, loras: dict[str, float]) -> np.ndarray:
    """H x W x 3 in [0, 1]."""
    pipe = diffusers_pipeline(folder)
    for name in loras:
        pipe.load_lora_weights(folder / name, adapter_name=name)
    if loras:
        pipe.set_adapters([*loras], [*loras.values()])
    noise = noise_from_seeds([SEED], (16, 8, 8))
    how = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "height": 16, "width": 16, "output_type": "np"}
    return pipe(PROMPT, latents=noise, **how).images[0]


def ours(flow: LatentFlow) -> np.ndarray:
    x = flow.sample([PROMPT], seeds=[SEED], **{**flow.recipe["sample"], "steps": STEPS, "guidance": 4.0}).x
    return (x[0] / 2 + 0.5).permute(1, 2, 0).numpy()


def drawn(folder: Path, out: Path, *loras: str) -> Path:
    """The picture that the command draws."""
    how = ["--prompt", PROMPT, "--seed", str(SEED), "--steps", str(STEPS), "--guidance", "4", "--device", "cpu"]
    assert main(["sample", str(folder / "pipe"), *how, "--lora", *loras, "--out", str(out)]) == 0
    return next(out.glob("0000-*.png"))


@pytest.mark.parametrize(
    "loras",
    [*({name: 1.0} for name in ADAPTERS), {"all": 0.5}, {"attention": -0.7, "all": 0.5, "rslora": 1.5}],
    ids=str,
)
def test_the_picture_is_that_of_diffusers(folder, loras):
    flow = open_pipeline(folder / "pipe")
    plain = ours(flow)
    for name, weight in loras.items():
        load_lora(flow, folder / name, weight=weight)
    got, expected = ours(flow), theirs(folder, loras)
    assert np.abs(got - expected).max() <= 1e-4
    assert np.abs(got - plain).max() > 1e-2


def test_the_command_draws_with_loras_and_writes_them_into_the_picture(folder, tmp_path):
    given = [f"{folder / 'all' / NAME}:0.5", str(folder / "attention")]
    file = drawn(folder, tmp_path, *given)
    assert (
        np.abs(np.asarray(Image.open(file)) / 255 - theirs(folder, {"all": 0.5, "attention": 1.0})).max()
        <= 0.5 / 255 + 1e-3
    )
    assert read_settings(file)["lora"] == read_settings(tmp_path / "grid.png")["lora"] == given


def test_weight_0_is_the_model_itself(folder):
    flow = open_pipeline(folder / "pipe")
    plain = ours(flow)
    load_lora(flow, folder / "all", weight=0.0)
    assert np.array_equal(ours(flow), plain)


def test_a_folder_may_have_a_file_of_another_name_and_a_path_a_colon(folder, tmp_path):
    (tmp_path / "style:2").mkdir()
    (tmp_path / "style:2" / "style.safetensors").write_bytes((folder / "all" / NAME).read_bytes())
    a = Image.open(drawn(folder, tmp_path / "a", str(tmp_path / "style:2")))
    b = Image.open(drawn(folder, tmp_path / "b", str(folder / "all")))
    assert np.array_equal(np.asarray(a), np.asarray(b))


def test_half_precision_pipelines_take_a_lora(folder, tmp_path):
    diffusers_pipeline(folder).to(torch.float16).save_pretrained(tmp_path / "pipe")
    flow = open_pipeline(tmp_path / "pipe")
    before = {name: p.clone() for name, p in flow.network.named_parameters()}
    load_lora(flow, folder / "all")
    wide = open_pipeline(folder / "pipe")
    load_lora(wide, folder / "all")
    for (name, p), q in zip(flow.network.named_parameters(), wide.network.parameters(), strict=True):
        assert p.dtype == torch.float16 and torch.allclose(p.float(), q, rtol=2e-3, atol=1e-4)
        assert torch.equal(p, before[name]) == (p.ndim != 2), name


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(capsys, folder: Path, lora: object) -> str:
    assert main(["sample", str(folder / "pipe"), "--prompt", "x", "--device", "cpu", "--lora", str(lora)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1, told
    return told


def test_a_missing_path_is_answered_with_the_nearest(folder, capsys):
    for missing in (folder / "attntion", f"{folder / 'attntion'}:0.5", f"{folder / 'attention'}:half"):
        assert f"Did you mean '{folder / 'attention'}'" in refused(capsys, folder, missing)


def test_pickles_and_other_files_are_refused(folder, tmp_path, capsys):
    (tmp_path / "pickles").mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickles" / "pytorch_lora_weights.bin")
    for path in (tmp_path / "pickles", tmp_path / "pickles" / "pytorch_lora_weights.bin"):
        assert "is a pickle, which can run any code" in refused(capsys, folder, path)
    (tmp_path / "empty").mkdir()
    assert "holds no files of weights" in refused(capsys, folder, tmp_path / "empty")
    vae = next((folder / "pipe" / "vae").glob("*.safetensors"))
    assert "is no LoRA in diffusers' format; it looks like an autoencoder" in refused(capsys, folder, vae)
    assert "weight = nan is not finite" in refused(capsys, folder, f"{folder / 'all'}:nan")


def test_a_lora_of_another_model_is_refused_and_changes_nothing(folder, tmp_path):
    flow = open_pipeline(folder / "pipe")
    before = {name: p.clone() for name, p in flow.network.named_parameters()}
    good = load_file(folder / "attention" / NAME)
    last = "transformer.transformer_blocks.1.attn.to_v"
    for change, message in (
        (
            {f"{last}.lora_B.weight": torch.zeros(64, 2)},
            r"attn.to_v is \[64, 2\] x \[2, 128\], the model's weight \[128, 128\]",
        ),
        ({f"{last}.lora_A.weight": torch.zeros(())}, r"attn.to_v is \[128, 2\] x \[\]"),
        ({f"{last}.lora_A.weight": torch.zeros(0, 128), f"{last}.lora_B.weight": torch.zeros(128, 0)}, "attn.to_v is"),
        ({f"{last}.lora_magnitude_vector": torch.zeros(128)}, "no linear layer for .*attn.to_v.lora_magnitude_vector"),
        (
            {"transformer.transformer_blocks.2.attn.to_v.lora_A.weight": torch.zeros(2, 128)},
            "for transformer_blocks.2.attn",
        ),
    ):
        save_file({**good, **change}, tmp_path / "lora.safetensors")
        with pytest.raises(UserError, match=message):
            load_lora(flow, tmp_path / "lora.safetensors")
    assert all(torch.equal(p, before[name]) for name, p in flow.network.named_parameters())


def test_damaged_settings_in_a_header_are_refused(folder, tmp_path):
    tensors = load_file(folder / "attention" / NAME)
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="settings in its header are damaged"):
        load_lora(open_pipeline(folder / "pipe"), tmp_path / "lora.safetensors")
