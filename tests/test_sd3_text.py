"""SD3's text conditioning against diffusers' pipeline, and what becomes of encoders that are absent or dropped."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from genflow.config import from_dict, to_dict
from genflow.errors import UserError
from genflow.functional import Rng
from genflow.text.sd3 import CLIPS, SD3TextConfig
from tests import tiny_sd3

PROMPTS = ["red dog", "", "a photo of a green apple and more than twelve letters"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    made = tiny_sd3.pipeline()
    made.save_pretrained(folder := tmp_path_factory.mktemp("pipe"))
    return made, folder


@pytest.fixture
def config(pipe):
    return SD3TextConfig(folder=str(pipe[1]), t5_tokens=10)


def theirs(pipe, prompts: list[str], t5_tokens: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        tokens, _, pooled, _ = pipe[0].encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=t5_tokens
        )
    return tokens, pooled


def test_embeddings_are_those_of_diffusers_pipeline(pipe, config):
    with pytest.warns(UserWarning, match="cut to"):
        got = config.build().encode(PROMPTS)
    tokens, pooled = theirs(pipe, PROMPTS)
    assert got.tokens.shape == (3, 22, 48) == tokens.shape and got.pooled.shape == (3, 36)
    assert torch.allclose(got.tokens, tokens, atol=1e-6) and torch.allclose(got.pooled, pooled, atol=1e-6)
    assert got.tokens.abs().sum(-1).all(), "padding tokens are heard as well"
    assert not got.tokens[:, :12, 36:].any(), "the CLIPs are padded with zeros to T5's width"


def test_the_mask_tells_real_tokens_of_both_parts(config):
    mask = config.build().encode(["red dog"]).mask[0]
    assert mask.tolist() == [True] * 8 + [False] * 4 + [True] * 3 + [False] * 7  # letters and ends; words and an end


def test_the_null_condition_of_inference_mode_serves_training_too(config):
    text = config.build()
    with torch.inference_mode():
        text.null()
    assert not text.null().tokens.is_inference()


def test_long_prompts_are_cut_with_one_warning_for_each_limit(config):
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning) as caught:
            config.build().encode(["x" * 11, "y" * 15, "red"])
        words = [str(w.message) for w in caught]
        assert words[0].startswith("2 prompts cut to 12 tokens (CLIP), the first: 'xxx")
        assert words[1].startswith("2 prompts cut to 10 tokens (T5)") and len(words) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.build().encode(["red dog"])
        with pytest.raises(UserWarning, match=r"prompt cut to 12 tokens \(CLIP\)"):
            config.build().encode(["green apple dog"])


def test_an_absent_encoder_is_zeros_and_the_others_are_as_they_were(pipe, config, tmp_path):
    whole = config.build().encode(["red dog"])
    for absent in ("clip_l", "clip_g", "t5"):
        rest = tuple(name for name in (*CLIPS, "t5") if name != absent)
        text = replace(config, encoders=rest).build()
        where, features, place = config.build().places[absent]
        tokens, pooled = whole.tokens.clone(), whole.pooled.clone()
        tokens[:, where, features], pooled[:, place] = 0, 0
        got = text.encode(["red dog"])
        assert torch.equal(got.tokens, tokens) and torch.equal(got.pooled, pooled)
    shutil.copytree(pipe[1], tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "text_encoder_3")
    text = SD3TextConfig(folder=str(tmp_path / "pipe"), t5_tokens=10, width=48).build()
    assert list(text.parts) == ["clip_l", "clip_g"]  # those that the folder has
    assert torch.equal(text.encode(["red dog"]).tokens[:, :12], whole.tokens[:, :12])


def test_without_encoders_only_the_empty_prompt_can_be_heard():
    text = SD3TextConfig().build()
    assert (text.context_dim, text.pooled_dim, text.max_tokens) == (4096, 2048, 77 + 256)
    null = text.null()
    assert not null.tokens.any() and not null.pooled.any() and not null.mask.any()
    with pytest.raises(UserError, match="no encoder is there to read 'red'; give the folder"):
        text.encode(["", "red"])


def test_each_encoder_is_dropped_on_its_own(config):
    text = replace(config, drop=(0.2, 0.5, 0.8)).build()
    n, rng, position = 400, Rng(1, 2), torch.arange(400)
    prepared = text.encode(["red dog"] * n)
    dropped = text.drop(prepared, rng, position)
    gone = {}
    for name, (where, features, place) in text.places.items():
        part, before = dropped.tokens[:, where, features], prepared.tokens[:, where, features]
        gone[name] = ~part.flatten(1).any(1)
        assert torch.equal(part[~gone[name]], before[~gone[name]])
        if name != "t5":
            assert torch.equal(gone[name], ~dropped.pooled[:, place].any(1))
    rates = torch.stack([gone[name].float().mean() for name in text.parts])
    assert torch.allclose(rates, torch.tensor([0.2, 0.5, 0.8]), atol=0.07)
    together = (gone["clip_l"] & gone["clip_g"] & gone["t5"]).float().mean()
    assert abs(float(together) - 0.2 * 0.5 * 0.8) < 0.05  # independent of each other
    few = text.drop(prepared[:5], rng, position[:5])
    assert torch.equal(few.tokens, dropped.tokens[:5])  # whatever the batch mates
    kept = config.build().drop(prepared, rng, position)
    assert kept.tokens is prepared.tokens


def test_the_cache_is_by_what_the_encoder_is(pipe, config, tmp_path, monkeypatch):
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path / "cache"))
    first = config.build().encode(["red dog"])
    text = config.build()
    for part in text.parts.values():
        monkeypatch.setattr(part, "network", lambda: pytest.fail("loaded for a caption that is known"))
    again = text.encode(["red dog", "red dog"])
    assert torch.equal(again.tokens[1], first.tokens[0]) and torch.equal(again.pooled[1], first.pooled[0])
    assert len(list((tmp_path / "cache" / "text").glob("*.sqlite"))) == 3
    other = replace(config, t5_tokens=5).build()  # another length is another T5, and the same CLIPs
    same = [a.identity == b.identity for a, b in zip(text.parts.values(), other.parts.values(), strict=True)]
    assert same == [True, True, False]
    shutil.copytree(pipe[1], tmp_path / "pipe")
    half = tiny_sd3.clip(16, 189, "quick_gelu")
    with torch.no_grad():
        half.text_projection.weight[0, 0] += 1
    half.save_pretrained(tmp_path / "pipe" / "text_encoder")
    changed = replace(config, folder=str(tmp_path / "pipe")).build()
    assert changed.parts["clip_l"].identity != text.parts["clip_l"].identity
    assert not torch.equal(changed.encode(["red dog"]).pooled, first.pooled)


def test_embeddings_are_kept_as_the_weights_lie_or_as_was_asked(pipe, config, tmp_path):
    whole = config.build().encode(["red dog"])
    assert whole.tokens.dtype == torch.float32
    half = replace(config, dtype="bfloat16").build().encode(["red dog"])
    assert half.tokens.dtype == half.pooled.dtype == torch.bfloat16
    assert torch.allclose(half.tokens.float(), whole.tokens, atol=0.1)


def test_configs_come_back_and_mistakes_cost_one_line(pipe, config, tmp_path):
    again = from_dict(SD3TextConfig, {k: v for k, v in to_dict(config).items() if k != "name"})
    assert again == config
    assert from_dict(SD3TextConfig, {"drop": [0.1, 0.2, 0.3]}).drops == {"clip_l": 0.1, "clip_g": 0.2, "t5": 0.3}
    assert from_dict(SD3TextConfig, {"drop": 0.464}).drops["t5"] == 0.464
    (tmp_path / "empty").mkdir()
    shutil.copytree(pipe[1], tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "tokenizer_2")
    (tmp_path / "pipe" / "text_encoder" / "config.json").write_text("{")
    for change, words in (
        ({"encoders": ("clip_k",)}, "'clip_k' is unknown. Did you mean 'clip_l'"),
        ({"t5_tokens": 0}, "t5_tokens = 0 is too few"),
        ({"drop": 1.5}, "drop = 1.5 is not within"),
        ({"folder": None, "encoders": ("t5",)}, "but no folder; give the folder of a diffusers SD3 pipeline"),
        ({"folder": str(tmp_path / "nowhere")}, "nowhere is not there"),
        ({"folder": str(tmp_path / "empty")}, "has no text encoder"),
        ({"folder": str(tmp_path / "pipe")}, "has no tokenizer_2, which clip_g needs"),
        ({"folder": str(tmp_path / "pipe"), "encoders": ("clip_l",)}, "is no readable clip_l's"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            replace(config, **change).build()
        assert "\n" not in str(caught.value)
    shutil.copy(pipe[1] / "text_encoder" / "config.json", tmp_path / "pipe" / "text_encoder")
    bad = tmp_path / "pipe" / "text_encoder_3" / "model.safetensors"
    bad.write_bytes(bad.read_bytes()[:100])
    text = SD3TextConfig(folder=str(tmp_path / "pipe"), encoders=("t5",), t5_tokens=10).build()
    with pytest.raises(UserError, match="cannot be loaded"):
        text.encode(["never heard before"])
    assert json.loads(text.parts["t5"].identity)[1] == "t5"


def test_no_weight_of_an_encoder_is_made_up(pipe, config, tmp_path):
    shutil.copytree(pipe[1], tmp_path / "pipe")
    file, lost = tmp_path / "pipe" / "text_encoder_2" / "model.safetensors", "text_projection.weight"
    save_file({name: w for name, w in load_file(file).items() if name != lost}, file, metadata={"format": "pt"})
    text = replace(config, folder=str(tmp_path / "pipe")).build()
    with pytest.raises(UserError, match=rf"text_encoder_2 cannot be loaded \(its files lack {lost}\)"):
        text.encode(["never heard before"])
