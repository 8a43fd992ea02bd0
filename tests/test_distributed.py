"""A run is the same on any number of processes, shared out or not, also where it goes on with another number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from genflow.config import load
from genflow.errors import UserError
from genflow.flows.store import newest_checkpoint
from genflow.training.config import RunConfig
from genflow.training.run import train
from tests.processes import together

# 31 pictures: no number of processes, batches or steps here divides them, and the order starts anew on the way.
MMDIT = """
data: {name: emoji, size: 16, limit: 31, flip: true}
text: {name: learned, dim: 16, heads: 2, layers: 1, max_tokens: 24}
model: {name: mmdit, depth: 2, hidden: 32, heads: 2, patch_size: 8}
flow: {name: rectified, prediction: x}
sample: {sampler: euler, steps: 1, guidance: 1.0}
"""
GLOW = """
data: {name: emoji, size: 8, limit: 31}
model: {name: glow, levels: 2, steps: 2, hidden: 8}
flow: normalizing
"""
# Its loss has parts, which are told too.
AUTOENCODER = """
data: {name: emoji, size: 16, limit: 31}
model: {name: tiny_autoencoder, factor: 4, width: 8, blocks: 1}
flow: {name: autoencoder, bottleneck: {name: gaussian, channels: 2}}
"""
TOKENS = """
data: {name: emoji, size: 8, limit: 31}
text: {name: learned, dim: 16, heads: 2, layers: 1, max_tokens: 8}
model: {name: token_transformer, width: 32, layers: 2, heads: 2, mtp: 1}
flow: {name: tokens, tokenizer: toy_grey}
sample: {decoder: {name: speculative, window: 2}, guidance: 2.0}
"""
# eps: Adam would make steps of full size of gradients that are nothing but rounding.
TRAIN = """
train: {steps: 6, batch_size: 12, precision: fp32, optimizer: {name: adamw, lr: 3e-3, eps: 1e-3}, warmup: 3, log_every: 1,
  preview_every: 6, validate_every: 1, validation_split: train, validation_images: 11, trackers: []}
"""


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("configs")
    texts = {"mmdit": MMDIT, "glow": GLOW, "autoencoder": AUTOENCODER}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text + TRAIN)
    return {name: folder / f"{name}.yaml" for name in texts}


@pytest.fixture(scope="module")
def alone(configs, tmp_path_factory):
    """The run of one process, of each model."""
    made = {}
    for name, config in configs.items():
        made[name] = train(load(config, [f"out={tmp_path_factory.mktemp(name)}"], schema=RunConfig))
        AcceleratorState._reset_state(reset_partial_state=True)
    return made


def succeed(*arguments, **options) -> None:
    for ended in together(*arguments, **options):
        assert ended.code == 0, ended.said


def go_on_alone(config: Path, *overrides: str) -> None:
    try:
        train(load(config, overrides, schema=RunConfig))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def logged(run: Path) -> dict[tuple[int, str], float]:
    """What a run measured, by step and name. One step's gradient is the work of all ranks, and its data's order theirs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], key): value for line in lines for key, value in line.items() if key != "images_per_s"}


def assert_same_run(run: Path, other: Path) -> None:
    found, expected = logged(run), logged(other)
    assert found.keys() == expected.keys() and (6, "validation_loss") in found
    for key, value in expected.items():
        assert math.isclose(found[key], value, rel_tol=2e-5, abs_tol=1e-7), (key, found[key], value)
    assert (run / "previews" / "step-00000006.png").is_file()
    a, b = newest_checkpoint(run), newest_checkpoint(other)
    assert a.name == b.name == "step-00000006"
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        mine, theirs = load_file(a / name), load_file(b / name)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (mine[key].double() - value.double()).abs().max() <= 2e-5, f"{name}: {key}"


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_processes_together_are_one_process(configs, alone, tmp_path, world):
    """Glow among them: its activation norms are told by all samples of the first step, not by a rank's own."""
    ways = [(model, parallel) for model in configs for parallel in ("ddp", "fsdp")]
    runs = {way: tmp_path / "-".join(way) for way in ways}
    succeed(world, *([configs[m], f"train.parallel={p}", f"out={run}"] for (m, p), run in runs.items()))
    for (model, _), run in runs.items():
        assert_same_run(run, alone[model])


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(("fsdp", 2), ("ddp", 1)), (("ddp", 1), ("fsdp", 2))])
def test_a_run_goes_on_in_another_way(configs, alone, tmp_path, first, second):
    config, out = configs["mmdit"], f"out={tmp_path / 'run'}"
    for steps, (parallel, world) in ((3, first), (6, second)):
        how = [f"train.parallel={parallel}", f"train.steps={steps}", out]
        succeed(world, [config, *how]) if world > 1 else go_on_alone(config, *how)
    assert_same_run(tmp_path / "run", alone["mmdit"])


@pytest.mark.slow
def test_checkpoints_go_from_four_to_two_to_one_and_back(configs, alone, tmp_path):
    config = configs["mmdit"]
    runs = {way: tmp_path / "-".join(way) for way in [("ddp", "fsdp"), ("fsdp", "ddp")]}
    succeed(4, *([config, f"train.parallel={a}", "train.steps=2", f"out={run}"] for (a, _), run in runs.items()))
    succeed(2, *([config, f"train.parallel={b}", "train.steps=4", f"out={run}"] for (_, b), run in runs.items()))
    back = tmp_path / "back"
    go_on_alone(config, f"out={back}", "train.steps=4")
    succeed(4, [config, "train.parallel=fsdp", f"out={back}"])
    for run in runs.values():
        go_on_alone(config, f"out={run}")
        assert_same_run(run, alone["mmdit"])
    assert_same_run(back, alone["mmdit"])


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 3])
def test_micro_batches_of_several_processes_are_the_same_step(configs, alone, tmp_path, accumulation):
    succeed(
        2,
        *(
            [configs["mmdit"], f"train.parallel={p}", f"train.accumulation={accumulation}", f"out={tmp_path / p}"]
            for p in ("ddp", "fsdp")
        ),
    )
    for parallel in ("ddp", "fsdp"):
        assert_same_run(tmp_path / parallel, alone["mmdit"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_short_products_and_checkpointed_blocks_are_the_same_run_near_enough(configs, tmp_path, world):
    config, how = configs["mmdit"], ["train.precision=bf16", "train.checkpointing=true"]
    plain = tmp_path / "alone"
    go_on_alone(config, "train.precision=bf16", f"out={plain}")
    runs = {p: tmp_path / p for p in ("ddp", "fsdp")}
    succeed(world, *([config, *how, f"train.parallel={p}", f"out={run}"] for p, run in runs.items()))
    expected = logged(plain)
    for run in runs.values():
        found = logged(run)
        assert found.keys() == expected.keys()
        for key in [key for key in expected if "loss" in key[1]]:
            assert math.isclose(found[key], expected[key], rel_tol=2e-2), (key, found[key], expected[key])


def test_one_process_takes_any_batch(configs, tmp_path):
    """What is refused of several is not refused of one, and the nearest batch is told."""
    with pytest.raises(
        UserError, match=r"train.batch_size=7 does not divide among 1 processes x 2 micro-batches; try 8"
    ):
        go_on_alone(configs["mmdit"], f"out={tmp_path / 'run'}", "train.batch_size=7", "train.accumulation=2")


@pytest.mark.slow
def test_tokens_are_drawn_where_blocks_are_shared_out_in_short_products(tmp_path):
    """Their sampling is outside of any autocast, and blocks are gathered in the run's dtype."""
    (tmp_path / "tokens.yaml").write_text(TOKENS + TRAIN)
    how = ["train.parallel=fsdp", "train.precision=bf16", "train.steps=1", "train.preview_every=1"]
    succeed(2, [tmp_path / "tokens.yaml", *how, f"out={tmp_path / 'run'}"], before="import tests.toy_tokens")
    assert (tmp_path / "run" / "previews" / "step-00000001.png").is_file()
