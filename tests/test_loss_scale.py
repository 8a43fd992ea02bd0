"""fp16: a gradient that overflows moves nothing but the loss scale. On the CPU, where torch has the scaler too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import genflow.training.precision
import genflow.training.run
from genflow.config import from_dict
from genflow.errors import UserError
from genflow.flows.store import newest_checkpoint
from genflow.training.config import RunConfig
from genflow.training.run import train

MADE = {
    "data": {"name": "emoji", "size": 16, "limit": 31},
    "text": {"name": "learned", "dim": 16, "heads": 2, "layers": 1, "max_tokens": 24},
    "model": {"name": "mmdit", "depth": 2, "hidden": 32, "heads": 2, "patch_size": 8},
    "train": {
        **{"steps": 6, "batch_size": 8, "precision": "fp16", "warmup": 4, "decay": 0.5, "ema": 0.2, "log_every": 1},
        **{"preview_every": 0, "trackers": []},
    },
}
CODES = {  # whose codebook moves in every forward
    **{key: MADE[key] for key in ("data", "train")},
    "model": {"name": "tiny_autoencoder", "factor": 4, "width": 8, "blocks": 1},
    "flow": {"name": "autoencoder", "bottleneck": {"name": "vq", "vocabulary": 8, "channels": 4}},
}
FIRST = 2.0**14  # loss scale: within fp16 for these gradients, and so are its eighths


class Scaled(Accelerator):
    """As on a GPU: accelerate itself keeps its hands off fp16 on a CPU.

    bad: backward passes that overflow, counted from 1; scales: the loss scale from some of them on.
    """

    bad: tuple[int, ...] = ()
    scales: Mapping[int, float] = {}

    def __init__(self, **options):
        super().__init__(**options)
        self.native_amp, self.done = True, 0
        self.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST, growth_interval=1000)

    def backward(self, loss, **options):
        self.done += 1
        if self.done in self.scales:
            self.scaler.scale(loss.detach())  # it begins with its first scaling
            self.scaler.update(self.scales[self.done])
        super().backward(loss, **options)
        if self.done in self.bad:
            self._optimizers[0].param_groups[0]["params"][0].grad.view(-1)[0] = math.inf


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(genflow.training.precision, "refusal", lambda precision, device: None)

    def go(*bad: int, name: str = "run", scales: Mapping[int, float] = {}, base: Mapping = MADE, **options):
        here = type("Here", (Scaled,), {"bad": bad, "scales": scales})
        monkeypatch.setattr(genflow.training.run, "Accelerator", here)
        made = {**base, "train": {**base["train"], **options}, "out": str(tmp_path / name)}
        AcceleratorState._reset_state(reset_partial_state=True)  # another test's is of another precision
        try:
            return train(from_dict(RunConfig, made))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return go


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in found]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("base", [MADE, CODES], ids=["velocity", "codebook"])
def test_an_overflow_moves_neither_weights_average_schedule_nor_count(run, base, accumulation):
    """The step is done again at half the scale: to the bit the run that has these scales and no overflow."""
    a = accumulation
    smooth = run(name="smooth", base=base, accumulation=a, scales={2 * a + 1: FIRST / 2, 3 * a + 1: FIRST / 8})
    # The first try of step 3, and two of step 4.
    struck = run(3 * a, 5 * a, 6 * a, base=base, accumulation=a)
    assert [line["loss_scale"] for line in lines(struck)] == [FIRST] * 2 + [FIRST / 2] + [FIRST / 8] * 3
    assert len({line["lr"] for line in lines(struck)}) == 6  # the schedule moves at every step
    assert lines(struck) == lines(smooth)
    for name in ("model", "ema", "optimizer"):
        mine, theirs = (load_file(newest_checkpoint(each) / f"{name}.safetensors") for each in (struck, smooth))
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), f"{name}: {key}"
            assert not key.endswith("/step") or value == 6


def test_the_scale_goes_on_where_it_was(run):
    """Over a restart, which is the same run."""
    run(2, steps=3)
    cut, whole = lines(run()), lines(run(2, name="whole"))
    assert [line["loss_scale"] for line in cut] == [line["loss_scale"] for line in whole] == [FIRST] + [FIRST / 2] * 5


def test_gradients_that_overflow_at_every_scale_end_the_run(run):
    with pytest.raises(UserError, match="step 0: gradients overflow fp16 at every loss scale; train with bf16 or fp32"):
        run(*range(1, 100))
