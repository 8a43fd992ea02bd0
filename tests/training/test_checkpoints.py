"""Checkpoints: whole or not there, told where the disk or the file is at fault; and the signals that ask for one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from genflow import registry
from genflow.errors import UserError
from genflow.flows.store import checkpoints, finish_checkpoint, is_whole, newest_checkpoint
from genflow.training.checkpoint import checkpoint_tensors, load_checkpoint, save_checkpoint
from genflow.training.optimizers import decay_groups
from genflow.training.run import _alone, train
from genflow.training.signals import Interrupted, stop_signal


def test_what_was_half_written_before_is_not_in_the_way_and_not_in_the_checkpoint(tiny, tmp_path):
    left = tmp_path / "run" / "checkpoints" / ".step-00000004.partial"
    left.mkdir(parents=True)
    (left / "old.safetensors").write_bytes(b"x")
    run = train(tiny())
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert not (newest_checkpoint(run) / "old.safetensors").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
@pytest.mark.parametrize(
    ("steps", "last"), [(2, "no checkpoint had been written yet"), (6, "checkpoint is step-00000004")]
)
def test_a_disk_that_fills_up_is_told_with_what_is_left(tiny, monkeypatch, error, steps, last):
    import genflow.training.checkpoint as module

    save, calls = module.save_file, []

    def fills_up(tensors, path):
        calls.append(path)
        if len(calls) > 3 * (steps // 2 - 1):  # of three files each
            raise error
        save(tensors, path)

    monkeypatch.setattr(module, "save_file", fills_up)
    with pytest.raises(UserError, match=f"could not save step {steps} .*{last}. Free some space and run again"):
        train(tiny("train.steps=6", "train.save_every=2"))


def test_a_checkpoint_takes_its_name_when_it_is_whole_and_the_last_goes_after(tiny, tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def spied(source, target):
        if Path(target).name.startswith("step-"):
            seen.append((is_whole(Path(source)), [p.name for p in checkpoints(tmp_path / "run")]))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spied)
    train(tiny("train.save_every=2", "train.keep=1"))
    assert seen == [(True, []), (True, ["step-00000002"])]


@pytest.mark.parametrize(
    "harm",
    [
        lambda state: state.pop("network.final.bias"),
        lambda state: state.update(other=torch.zeros(1)),
        lambda state: state.update({name: value[:1].clone() for name, value in state.items()}),
    ],
    ids=["lacks", "other", "shapes"],
)
def test_a_checkpoint_that_does_not_fit_is_not_loaded_in_part(tiny, harm):
    folder = newest_checkpoint(train(tiny()))
    state = load_file(folder / "model.safetensors")
    harm(state)
    save_file(state, folder / "model.safetensors")
    finish_checkpoint(folder)
    with pytest.raises(UserError, match=r"step-00000004 is damaged .*; remove it to go on from the one before") as told:
        train(tiny("train.steps=8"))
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


@pytest.mark.parametrize("state", ["[]", '{"by_time": {}}', '{"step": "4"}'])
def test_a_checkpoint_that_does_not_say_its_step_is_damaged(tiny, state):
    folder = newest_checkpoint(train(tiny()))
    (folder / "state.json").write_text(state)
    finish_checkpoint(folder)
    with pytest.raises(UserError, match=r"step-00000004 is damaged \(state.json has no step\)"):
        train(tiny("train.steps=8"))


@pytest.mark.parametrize("harm", [{"step": 44}, {"by_time": None}, {"by_time": [[0.0]]}], ids=["step", "none", "short"])
def test_a_state_that_is_not_its_checkpoints_own_is_damaged(tiny, harm):
    folder = newest_checkpoint(train(tiny()))
    state = json.loads((folder / "state.json").read_text())
    kept = {key: value for key, value in (state | harm).items() if value is not None}
    (folder / "state.json").write_text(json.dumps(kept))
    finish_checkpoint(folder)
    with pytest.raises(UserError, match="step-00000004 is damaged"):
        train(tiny("train.steps=8"))


def test_what_a_module_says_of_its_checkpoint_is_told_as_it_is(tiny, monkeypatch):
    from genflow.flows.rectified import RectifiedFlow

    def refused(*_, **__):
        raise UserError("these are of another model")

    train(tiny())
    monkeypatch.setattr(RectifiedFlow, "load_state_dict", refused)
    with pytest.raises(UserError, match="^these are of another model$"):
        train(tiny("train.steps=8"))


def test_a_data_set_of_another_kind_is_told(monkeypatch, tiny):
    from genflow.data.emoji import EmojiConfig

    monkeypatch.setattr(EmojiConfig, "build", lambda *_: torch.utils.data.TensorDataset(torch.zeros(4, 3, 16, 16)))
    with pytest.raises(UserError, match="data: a TensorDataset has no `identifiers`"):
        train(tiny())


def test_weights_that_are_shared_and_counts_in_python_come_back(tmp_path):
    """bitsandbytes counts its steps in Python; so do others, in numbers that are not whole."""

    def made():
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        model[1].weight = model[0].weight
        return model, torch.optim.SGD(model.parameters())

    (model, optimizer), (again, other) = made(), made()
    for p in model.parameters():
        optimizer.state[p] = {"step": 3, "scale": 0.9, "state1": torch.randn(p.shape)}
    tensors = checkpoint_tensors(model, optimizer, None)
    state = {"by_time": [[0.0] * 8] * 2}
    folder = save_checkpoint(tmp_path, 3, config={}, tensors=tensors, state=state, keep=1)
    assert load_checkpoint(folder, model=again, optimizer=other, ema=None) == {"step": 3, **state}
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert type(other.state[q]["step"]) is int and other.state[q]["step"] == 3
        assert other.state[q]["scale"] == 0.9
        assert torch.equal(other.state[q]["state1"], optimizer.state[p]["state1"])


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_the_step_and_the_second_does_not(first, second, capfd):
    def at_once(number, _frame):
        raise InterruptedError(number)

    both = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, at_once) for each in both]
    try:
        with stop_signal() as caught:
            signal.raise_signal(first)
            assert caught == [first]
            assert capfd.readouterr().err == "stopping after this step; the same again stops at once\n"
            with pytest.raises(InterruptedError):
                signal.raise_signal(second)
            assert not capfd.readouterr().err
        with stop_signal():
            assert at_once not in map(signal.getsignal, both)
        assert [signal.getsignal(each) for each in both] == [at_once] * 2
    finally:
        for each, handler in zip(both, before, strict=True):
            signal.signal(each, handler)


def test_a_signal_is_heard_where_nobody_reads_the_answer(monkeypatch):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", closed)
    with stop_signal() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]


def test_a_run_whose_folder_was_removed_holds_it_again_or_leaves_it_to_the_next(tmp_path):
    with _alone(tmp_path / "run") as hold:
        shutil.rmtree(tmp_path / "run")
        hold()
        with pytest.raises(UserError, match="is being trained by another process"), _alone(tmp_path / "run"):
            pass
        shutil.rmtree(tmp_path / "run")
        with _alone(tmp_path / "run"), pytest.raises(UserError, match="is being trained by another process"):
            hold()


def test_a_checkpoints_name_is_on_the_disk_before_older_ones_go(tiny, tmp_path, monkeypatch):
    import genflow.training.checkpoint as module

    flush, seen = module.flush, []

    def spied(path):
        seen.append([each.name for each in sorted(path.iterdir())])
        flush(path)

    monkeypatch.setattr(module, "flush", spied)
    train(tiny("train.save_every=2", "train.keep=1"))
    assert seen == [["step-00000002"], ["step-00000002", "step-00000004"]]


class Growing(torch.optim.SGD):
    """Its steps grow, by a number that it keeps in its groups, as Prodigy does."""

    def __init__(self, groups, lr):
        super().__init__(groups, lr=lr)
        for group in self.param_groups:
            group["d"] = 1.0

    def step(self, closure=None):
        for group in self.param_groups:
            group["d"] *= 1.5
            group["lr"] *= group["d"]
        return super().step(closure)


@dataclass(frozen=True)
class GrowingConfig:
    lr: float = 1e-4

    def build(self, model):
        return Growing(decay_groups([p for p in model.parameters() if p.requires_grad], 0.0), lr=self.lr)


def test_what_an_optimiser_keeps_in_its_groups_goes_on(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_live", dict(registry._live))
    registry.optimizer_export("growing")(GrowingConfig)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out, steps in ((whole, 4), (cut, 2), (cut, 4)):
        train(tiny("train.optimizer=growing", "train.decay=0", f"train.steps={steps}", f"out={out}"))
    a, b = (load_file(newest_checkpoint(run) / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_of_several_processes_that_stop_one_says_so(rank, times, monkeypatch, capsys):
    from genflow.cli import main

    def stopped(config, overrides):
        raise Interrupted

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys.modules["genflow.training.run"], "train", stopped)
    assert main(["train", "c.yaml"]) == 130
    assert capsys.readouterr().err.count("stopped and saved; to go on: genflow train c.yaml") == times
