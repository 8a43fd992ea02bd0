"""Training: the same run however it was cut, shared out or loaded; and clear ends."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from genflow.cli import main
from genflow.cli.plot import read_lines
from genflow.config import dump, from_dict, load
from genflow.errors import UserError
from genflow.flows.store import checkpoints, newest_checkpoint, read_config
from genflow.training.apply import checkpointed, compile_blocks
from genflow.training.config import RunConfig
from genflow.training.log import Log, LossByTime
from genflow.training.loop import learning_rate
from genflow.training.run import train

# Asked to end by a signal, after so many backward passes: in the middle of a step where there are micro-batches.
SIGNALLED = """
import os, sys
import accelerate
from genflow.cli import main
backward, left = accelerate.Accelerator.backward, [int(sys.argv[2])]
def counted(*arguments, **options):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), int(sys.argv[1]))
    backward(*arguments, **options)
accelerate.Accelerator.backward = counted
sys.exit(main(['train', *sys.argv[3:]]))
"""


def ended_by(sent: signal.Signals, after: int, *arguments: str) -> subprocess.CompletedProcess:
    """A run in a process of its own that is sent a signal after so many backward passes."""
    words = [sys.executable, "-c", SIGNALLED, str(sent.value), str(after), *arguments]
    return subprocess.run(words, capture_output=True, text=True)


def contents(run: Path) -> dict:
    """All that must be equal between two runs that are the same."""
    newest = newest_checkpoint(run)
    assert newest is not None
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in log:
        line.pop("images_per_s", None)
    tensors = {f.name: load_file(f) for f in newest.glob("*.safetensors")}
    return {"step": newest.name, "log": log, "tensors": tensors}


def assert_same(a: dict, b: dict) -> None:
    assert a["step"] == b["step"] and a["log"] == b["log"]
    assert set(a["tensors"]) == set(b["tensors"]) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    for name, state in a["tensors"].items():
        assert state.keys() == b["tensors"][name].keys()
        for key, value in state.items():
            assert torch.equal(value, b["tensors"][name][key]), f"{name}: {key}"


@pytest.mark.parametrize(("accumulation", "killed_at", "workers"), [(1, 23, 0), (2, 54, 2)])
def test_killed_and_resumed_is_the_same_run(config, tiny, tmp_path, accumulation, killed_at, workers):
    cut, how = tmp_path / "cut", ("train.steps=40", f"train.accumulation={accumulation}")
    died = ended_by(signal.SIGKILL, killed_at, str(config), f"out={cut}", *how)
    assert died.returncode == -signal.SIGKILL
    reached = newest_checkpoint(cut)
    assert reached is not None and reached.name != "step-00000040"
    train(tiny(*how, f"out={cut}", f"train.workers={workers}"))
    assert_same(contents(train(tiny(*how))), contents(cut))


def test_dropout_is_of_each_step_and_the_same_in_a_resumed_run(tiny, monkeypatch):
    drop, seeds = F.dropout, set()
    monkeypatch.setattr(F, "dropout", lambda *arguments: (seeds.add(torch.initial_seed()), drop(*arguments))[1])
    model = "model={name: unet, channels: 4, channel_mult: [1], blocks: 1, attention_size: 0, dropout: 0.5}"
    run = train(tiny(model, "text=none", "train.save_every=2", "train.warmup=0"))
    whole = contents(run)
    assert len(seeds) == 4
    shutil.rmtree(newest_checkpoint(run))
    train(tiny(model, "text=none", "train.save_every=2", "train.warmup=0"))
    assert_same(contents(run), whole)


def test_a_checkpoint_cut_short_is_passed_over(tiny, tmp_path):
    cut = train(tiny("train.steps=8", f"out={tmp_path / 'cut'}"))
    newest = newest_checkpoint(cut)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert newest_checkpoint(cut).name == "step-00000004"
    train(tiny("train.steps=12", f"out={cut}"))
    assert_same(contents(train(tiny("train.steps=12"))), contents(cut))


DDP = """
import os, sys
import torch
from genflow.cli import main
# Every rank's gradient, after the reduction, goes into a file of each run.
clip, seen = torch.nn.utils.clip_grad_norm_, []
def spy(parameters, *rest, **options):
    parameters = list(parameters)
    seen.append(torch.cat([p.grad.flatten() for p in parameters]).clone())
    return clip(parameters, *rest, **options)
torch.nn.utils.clip_grad_norm_ = spy
torch.set_num_threads(1)
for accumulation in (1, 2):
    seen.clear()
    run = f"{sys.argv[1]}{accumulation}"
    code = main(['train', *sys.argv[2:], f"train.accumulation={accumulation}", f"out={run}"])
    if code:
        sys.exit(code)
    torch.save(torch.stack(seen), f"{run}.{os.environ.get('RANK', 0)}")
"""


def test_two_processes_are_one_process(config, tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, words in (("one", [sys.executable]), ("two", launch)):
        command = [*words, str(script), str(tmp_path / name), str(config), "train.steps=20"]
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr[-3000:]
        assert {"one": "1 process on", "two": "2 processes on"}[name] in result.stderr
    for accumulation in (1, 2):
        one, two = (tmp_path / f"{name}{accumulation}" for name in ("one", "two"))
        a, b = contents(one), contents(two)
        assert a["step"] == b["step"] == "step-00000020"
        for name in ("model.safetensors", "ema.safetensors"):
            for key, value in a["tensors"][name].items():
                assert (value - b["tensors"][name][key]).abs().max() <= 1e-6, f"{name}: {key}"
        ranks = [torch.load(f"{two}.{r}") for r in range(2)]
        assert torch.equal(*ranks)
        alone = torch.load(f"{one}.0")
        assert (ranks[0][0] - alone[0]).abs().max() <= 1e-6 * alone[0].abs().max().clamp(min=1)
        for x, y in zip(a["log"], b["log"], strict=True):
            assert x["step"] == y["step"] and math.isclose(x["loss"], y["loss"], rel_tol=1e-4)


def test_ctrl_c_saves_and_goes_on(config, tiny, tmp_path):
    cut, how = tmp_path / "cut", "train.steps=20"
    result = ended_by(signal.SIGINT, 18, str(config), f"out={cut}", how)
    assert result.returncode == 130 and "to go on: genflow train" in result.stderr
    assert newest_checkpoint(cut).name == "step-00000018"
    train(tiny(how, f"out={cut}"))
    assert_same(contents(train(tiny(how))), contents(cut))


def test_a_run_learns_and_leaves_what_it_should(tiny, tmp_path):
    run = train(
        tiny("train.steps=62", "train.preview_every=30", "train.validate_every=30", "train.trackers=[tensorboard]")
    )
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 13 and min(losses[-3:]) < 0.8 * losses[0]
    assert {"loss", "grad_norm", "lr", "images_per_s"} <= set(log[0])
    assert any(key.startswith("loss_t") for key in log[0])
    validation = [line for line in log if "validation_loss" in line]
    assert len(validation) == 3 and len([k for k in validation[0] if k.startswith("validation_t")]) == 8
    assert [p.name for p in checkpoints(run)] == ["step-00000060", "step-00000062"]
    assert sorted(int(p.stem[-2:]) for p in (run / "previews").iterdir()) == [30, 60, 62]
    state = json.loads((newest_checkpoint(run) / "state.json").read_text())
    assert not any(map(sum, state["by_time"]))  # it is of the steps since the last line of the log
    assert list(run.rglob("events.out.tfevents*"))
    again = load(run / "config.yaml", schema=RunConfig)
    assert again.train.steps == 62 and again.model.in_channels == 3 and again.model.sample_size == 2


def test_validation_asks_the_same_questions(tiny, tmp_path):
    from genflow.flows.store import load as load_flow

    run = train(tiny("train.validate_every=4"))
    line = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines() if "validation_loss" in x][-1]
    flow = load_flow(run)
    assert line["validation_loss"] > 0 and flow.shape == (3, 16, 16)


def test_the_saved_average_is_what_is_loaded(tiny):
    from genflow.flows.store import load as load_flow

    run = train(tiny())
    state = load_file(newest_checkpoint(run) / "ema.safetensors")
    averaged, raw = load_flow(run).state_dict(), load_flow(run, ema=False).state_dict()
    assert all(torch.equal(averaged[k], v) for k, v in state.items())
    assert any(not torch.equal(averaged[k], raw[k]) for k in state)


def test_another_choice_is_another_run_also_where_it_has_no_weights(tmp_path):
    """Of a section that was a name, was nothing, or becomes nothing."""

    def config(dequantization: object) -> RunConfig:
        made = {
            "data": {"name": "emoji", "size": 8, "limit": 8},
            "model": {"name": "glow", "levels": 1, "steps": 1, "hidden": 4},
            "flow": {"name": "normalizing", "dequantization": dequantization},
            "train": {"steps": 1, "batch_size": 2, "precision": "fp32", "preview_every": 0, "trackers": []},
            "out": str(tmp_path / "run"),
        }
        return from_dict(RunConfig, made)

    train(config(None))
    with pytest.raises(UserError, match=r"holds a run with flow\.dequantization=None"):
        train(config({"name": "gaussian", "sigma": 0.1}))


def test_a_model_that_needs_full_precision_gets_it_and_says_so(tmp_path, capsys):
    made = {
        "data": {"name": "toy2d", "kind": "moons", "n": 64},
        "model": {"name": "maf", "layers": 1, "hidden": [8]},
        "flow": "normalizing",
        "train": {"steps": 1, "batch_size": 4, "preview_every": 0, "trackers": []},
        "out": str(tmp_path / "run"),
    }
    train(from_dict(RunConfig, made))
    assert "precision fp32 (auto: this model needs it)" in capsys.readouterr().err
    AcceleratorState._reset_state()
    made["train"], made["out"] = {**made["train"], "precision": "bf16"}, str(tmp_path / "other")
    with pytest.raises(UserError, match="nothing in this network computes in it; take fp32"):
        train(from_dict(RunConfig, made))


def test_another_config_is_refused_and_more_steps_are_not(tiny, capsys):
    run = train(tiny())
    with pytest.raises(UserError, match=r"holds a run with model\.depth=2, this config says 3"):
        train(tiny("model.depth=3"))
    train(tiny())
    assert "already trained for 4 steps" in capsys.readouterr().err
    train(tiny("train.steps=6"))
    assert newest_checkpoint(run).name == "step-00000006"


def test_a_finished_run_takes_other_settings_of_sampling(tiny, capsys):
    run = train(tiny())
    before = load_file(newest_checkpoint(run) / "model.safetensors")
    train(tiny("sample.steps=3"))
    assert "draws by the config's `sample` from now on" in capsys.readouterr().err
    assert read_config(newest_checkpoint(run))["sample"]["steps"] == 3
    assert load(run / "config.yaml", schema=RunConfig).sample.steps == 3
    after = load_file(newest_checkpoint(run) / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_as_many_other_samples_are_another_run(tiny, with_a_bad_one):
    data = (f"data={{name: folder, path: {with_a_bad_one}, size: 16}}", "train.max_bad=0.5")
    train(tiny(*data))
    (with_a_bad_one / "0.png").rename(with_a_bad_one / "z.png")
    with pytest.raises(
        UserError, match="data: other names, captions or numbers of the 9 samples than when .* was written"
    ):
        train(tiny(*data, "train.steps=5"))


def test_a_run_goes_on_with_data_that_have_moved(tiny, with_a_bad_one, tmp_path, capsys):
    more = ("train.max_bad=0.5",)
    train(tiny(f"data={{name: folder, path: {with_a_bad_one}, size: 16}}", *more))
    moved = with_a_bad_one.rename(tmp_path / "moved")
    run = train(tiny(f"data={{name: folder, path: {moved}, size: 16}}", *more, "train.steps=5"))
    assert "resuming at step 4 of 5" in capsys.readouterr().err
    assert read_config(newest_checkpoint(run))["data"]["path"] == str(moved)


def test_another_table_of_as_many_rows_is_another_run(tmp_path, capsys):
    text = "data: {name: table, path: %s, test: 0}\nmodel: {name: nsf, steps: 1, hidden: 8}\nflow: normalizing\n"
    text += "train: {steps: 1, batch_size: 4, precision: fp32, trackers: [], preview_every: 0}\nout: %s\n"
    tables = [tmp_path / name / "table.csv" for name in ("a", "b")]
    for last, table in enumerate(tables):
        table.parent.mkdir()
        table.write_text("x,y\n" + "".join(f"{i},{i * i + last * i}\n" for i in range(8)))
        table.with_suffix(".yaml").write_text(text % (table, tmp_path / "run"))
    train(tables[0].with_suffix(".yaml"))
    assert "batch 4, 8 vectors, 548 parameters\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="data: other names, captions or numbers of the 8 samples than when"):
        train(tables[1].with_suffix(".yaml"))


@pytest.mark.parametrize("where", ["loss nan", r"loss [\d.]+, gradient norm nan"])
def test_nan_stops_before_it_does_harm(tiny, monkeypatch, where):
    from genflow.flows.rectified import RectifiedFlow

    run = train(tiny())
    before = load_file(newest_checkpoint(run) / "model.safetensors")
    error, calls = RectifiedFlow._error, []

    def poisoned(self, *arguments):
        calls.append(1)
        found = error(self, *arguments)
        if len(calls) == 2:
            found.register_hook(lambda gradient: gradient * math.nan)
        return found * (math.nan if len(calls) == 2 and where == "loss nan" else 1)

    monkeypatch.setattr(RectifiedFlow, "_error", poisoned)
    with pytest.raises(
        UserError, match=rf"step 6: {where}.* Samples: \w+/[\w-]+, .*Last good checkpoint: .*step-00000004"
    ):
        train(tiny("train.steps=8"))
    after = load_file(newest_checkpoint(run) / "model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_full_disk_keeps_the_last_good_checkpoint(tiny, monkeypatch):
    import genflow.training.checkpoint as module

    run = train(tiny())

    def full(_tensors, path):
        Path(path).write_bytes(b"x" * 10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match="could not save step 8 .*No space left.*last good checkpoint is step-00000004"):
        train(tiny("train.steps=8"))
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = Log(tmp_path, Accelerator(cpu=True), steps=4, start=0, batch_size=1)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"could not write .*metrics\.jsonl: Is a directory"):
        log.write(1, {"loss": 1.0})


def test_lines_of_a_log_that_are_none_are_dropped(tiny):
    run = train(tiny("train.log_every=1"))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n5\n\xff\xfe\n{"step": "x"}\n')
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
    train(tiny("train.log_every=1", "train.steps=5"))
    assert [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", [".lock", "config.yaml"])
def test_a_folder_in_a_files_place_is_told(tiny, name, capsys):
    run = Path(tiny().out)
    (run / name).mkdir(parents=True)
    dump(tiny(), run / "asked.yaml")
    assert main(["train", str(run / "asked.yaml")]) == 2
    assert f"{run / name}: Is a directory" in capsys.readouterr().err


def test_what_a_killed_preview_left_goes_with_the_next(tiny):
    run = train(tiny("train.preview_every=4"))
    (run / "previews" / ".step-00000002.png.7-7.partial").touch()
    train(tiny("train.preview_every=4", "train.steps=8"))
    assert sorted(p.name for p in (run / "previews").iterdir()) == ["step-00000004.png", "step-00000008.png"]


def test_a_checkpoint_written_anew_is_never_without_the_one_before(tiny, monkeypatch):
    run = train(tiny())
    replace = os.replace

    def refuse(source, target):
        if Path(source).name == ".step-00000004.partial":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="could not save step 4 .*the last good checkpoint is step-00000004"):
        train(tiny("sample.steps=3"))
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    train(tiny("sample.steps=3"))
    assert read_config(newest_checkpoint(run))["sample"]["steps"] == 3
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]


def test_bad_pictures_are_counted_and_too_many_stop_the_run(tmp_path, config, capsys, with_a_bad_one):
    more = [f"data={{name: folder, path: {with_a_bad_one}, size: 16}}", f"out={tmp_path / 'run'}", "train.steps=4"]
    train(load(config, more, schema=RunConfig))
    assert capsys.readouterr().err.count("skipped bad.png") == 1
    for i in range(4):
        picture = with_a_bad_one / f"{i}.png"
        picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(UserError, match=r"pictures cannot be read, more than train\.max_bad"):
        train(load(config, [*more, f"out={tmp_path / 'other'}", "train.steps=40"], schema=RunConfig))


@pytest.mark.parametrize("option", ["checkpointing", "compile"])
def test_how_a_block_runs_does_not_change_what_it_learns(tiny, tmp_path, option):
    plain = contents(train(tiny()))["tensors"]["model.safetensors"]
    other = contents(train(tiny(f"train.{option}=true", f"out={tmp_path / 'other'}")))["tensors"]["model.safetensors"]
    assert plain.keys() == other.keys()
    for key, value in plain.items():
        assert torch.allclose(value, other[key], atol=2e-5), key


def test_checkpointing_recomputes_and_compiling_compiles():
    from genflow.networks.mmdit import MMDiTConfig

    sizes = {"in_channels": 1, "context_dim": 4, "pooled_dim": 4, "sample_size": 2}
    network = MMDiTConfig(depth=2, hidden=32, heads=2, **sizes).build()
    calls = []
    network.blocks[0].image_mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    checkpointed(network)
    network(torch.randn(1, 1, 4, 4), torch.rand(1), torch.randn(1, 3, 4), torch.randn(1, 4)).sum().backward()
    assert len(calls) == 2
    compile_blocks(network)
    assert all(block._compiled_call_impl is not None for block in network.blocks)
    with pytest.raises(UserError, match="has no `blocks`"):
        checkpointed(torch.nn.Linear(1, 1))


# ----------------------------------------------------------------------------------------------------------- small parts


def test_the_loss_by_time_is_summed_in_equal_bins_with_both_ends_of_time():
    by_time = LossByTime([[1.0] * 8, [2.0] * 8])
    by_time.add(torch.tensor([3.0, 5.0, 7.0, 11.0]), torch.tensor([0.0, 0.124, 0.125, 1.0]))
    for _ in range(2):  # what was added is counted once
        assert by_time.sums.tolist() == [[9, 8, 1, 1, 1, 1, 1, 12], [4, 3, 2, 2, 2, 2, 2, 3]]


def test_learning_rate_rises_stays_and_falls():
    factor = [learning_rate(s, steps=100, warmup=10, decay=0.5) for s in range(100)]
    assert factor[0] == 0.1 and factor[9:51] == [1.0] * 42
    assert math.isclose(factor[75], 0.5) and math.isclose(factor[99], 0.02)
    assert learning_rate(99, steps=100, warmup=0, decay=0.0) == 1.0
