"""What training refuses, and what its processes tell each other."""

from __future__ import annotations

import json
import math
from types import MethodType, SimpleNamespace

import pytest
import torch

from genflow.attention import Mask, attention
from genflow.config import from_dict
from genflow.errors import UserError
from genflow.networks.mmdit import MMDiTConfig
from genflow.training import loop
from genflow.training.config import RunConfig, TrainConfig
from genflow.training.log import Log
from genflow.training.optimizers import AdamW8bitConfig


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"ema": 1e-160}, "averages nothing; the least is 0.001, and 0 turns it off"),
        ({"parallel": "fsdp", "optimizer": AdamW8bitConfig()}, "take adamw, or parallel=ddp"),
    ],
)
def test_what_cannot_train_is_refused_with_the_config(section, says):
    with pytest.raises(UserError, match=says):
        TrainConfig(**section)


def test_an_attention_of_no_name_is_refused_with_the_config():
    section = {"data": {"name": "emoji"}, "model": {"name": "mmdit", "attention": "tild"}}
    with pytest.raises(UserError, match="no attention is named 'tild'. Did you mean 'tiled'"):
        from_dict(RunConfig, section)
    section["model"]["attention"] = "auto"
    assert from_dict(RunConfig, section).model == MMDiTConfig()


@pytest.mark.parametrize("backend", ["math", "tiled", "flex"])
def test_attention_of_no_samples_is_empty(backend):
    q = torch.randn(0, 2, 3, 16)
    assert attention(q, q, q, Mask(keys=torch.ones(0, 3, dtype=torch.bool)), backend=backend).shape == q.shape


def test_pictures_that_any_process_could_not_read_count_on_all(monkeypatch):
    monkeypatch.setattr(loop, "gather_object", lambda mine: [*mine, {"b.png": "truncated"}])
    said = []
    trainer = SimpleNamespace(bad={"a.png": "empty"}, log=SimpleNamespace(say=said.append))
    trainer._add_bad = MethodType(loop.Trainer._add_bad, trainer)
    loop.Trainer._share_bad(trainer)
    assert trainer.bad == {"a.png": "empty", "b.png": "truncated"}
    assert said == ["skipped b.png: truncated (2 so far)"]  # its own process is silent, where it is not the main one


def test_another_process_leaves_the_log_alone(tmp_path):
    """The main one may be mending its last line."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + '\n{"step": 2, "lo')
    other = Log(tmp_path, SimpleNamespace(is_main_process=False), steps=2, start=1, batch_size=1)
    assert not other.tells(1, "loss")


def test_the_log_tells_of_a_step_what_was_written_of_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "validation_loss": 1.0}\n{"step": 2, "loss": 1.0}\n')
    log = Log(tmp_path, SimpleNamespace(is_main_process=True, log_with=[]), steps=2, start=2, batch_size=1)
    assert log.tells(1, "validation_loss") and not log.tells(2, "validation_loss")


@pytest.mark.parametrize(("mine", "theirs", "names"), [(0.5, math.nan, "c, d"), (0.5, 0.5, "a, b, c, d")])
def test_what_is_not_finite_is_told_by_the_rank_that_has_it(monkeypatch, tmp_path, mine, theirs, names):
    monkeypatch.setattr(loop, "gather_object", lambda own: [*own, (theirs, ["c", "d"])])
    trainer = SimpleNamespace(step=3, run_folder=tmp_path)
    with pytest.raises(
        UserError, match=f"step 4: loss {theirs}, gradient norm nan; .* Samples: {names}. No checkpoint"
    ):
        loop.Trainer._refuse_nan(trainer, mine, math.nan, [SimpleNamespace(ids=["a"]), SimpleNamespace(ids=["b"])])
