"""A run that is sharded over processes is the run of one process, also where it goes on in another way."""

from __future__ import annotations

import os
import subprocess
import sys

from safetensors.torch import load_file

from genflow.flows.store import newest_checkpoint

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(out, *overrides, launch=(sys.executable,)):
    small = ["train.batch_size=8", "train.preview_every=0", "train.precision=fp32", "model.depth=2", "model.hidden=64"]
    command = [*launch, "-m", "genflow", "train", "configs/quickstart.yaml", *small, f"out={out}", *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stderr


def test_a_sharded_run_that_goes_on_in_one_process_is_the_run_of_one(tmp_path):
    said = train(tmp_path / "two", "train.steps=2", "train.parallel=fsdp", launch=LAUNCH)
    assert "2 process(es), sharded" in said
    train(tmp_path / "two", "train.steps=4")
    train(tmp_path / "one", "train.steps=4")
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, two = (load_file(newest_checkpoint(tmp_path / run) / name) for run in ("one", "two"))
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert (value - two[key]).abs().max() <= 1e-5, f"{name}: {key}"
