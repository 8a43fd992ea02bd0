"""A run of seconds, which tests of training make their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from genflow.config import load
from genflow.training.config import RunConfig

CONFIG = """
data: {name: emoji, size: 16, limit: 30, flip: true}
text: {name: learned, dim: 16, heads: 2, layers: 1, max_tokens: 24}
model: {name: mmdit, depth: 2, hidden: 32, heads: 2, patch_size: 8}
flow: {name: rectified, prediction: x}
train:
  steps: 40
  batch_size: 8
  precision: fp32
  optimizer: {name: adamw, lr: 1e-3}
  warmup: 5
  log_every: 5
  save_every: 4
  keep: 2
  preview_every: 0
  trackers: []
sample: {sampler: euler, steps: 2, guidance: 1.0}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def tiny(config: Path, tmp_path: Path):
    """The run's config, with other settings."""

    def build(*overrides: str) -> RunConfig:
        return load(config, [f"out={tmp_path / 'run'}", "train.steps=4", *overrides], schema=RunConfig)

    return build


@pytest.fixture
def with_a_bad_one(tmp_path: Path) -> Path:
    """A folder of nine pictures, one of which is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (i * 30, 0, 0)).save(folder / f"{i}.png")
    (folder / "bad.png").write_text("not a picture")
    return folder


@pytest.fixture(autouse=True)
def _one_accelerator_each():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
