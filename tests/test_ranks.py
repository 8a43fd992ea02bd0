"""What the ranks of a run say where they do not fit together, cannot meet, or one of them is lost."""

from __future__ import annotations

import signal
import socket

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from genflow.config import load
from genflow.errors import UserError
from genflow.flows.store import newest_checkpoint
from genflow.training.config import RunConfig
from genflow.training.ranks import LOST, join_processes
from genflow.training.run import train
from tests.processes import Ended, together

CONFIG = """
data: {name: emoji, size: 8, limit: 31}
text: {name: learned, dim: 16, heads: 2, layers: 1, max_tokens: 8}
model: {name: mmdit, depth: 2, hidden: 32, heads: 2, patch_size: 4}
train: {steps: 8, batch_size: 12, precision: fp32, save_every: 2, preview_every: 0, trackers: []}
"""
# Before backward pass number 6, rank LOST kills itself: no word, no goodbye.
KILLED = """
backward, left = Accelerator.backward, [6]
def counted(*arguments, **options):
    left[0] -= 1
    if left[0] == 0 and rank == LOST:
        os.kill(os.getpid(), signal.SIGKILL)
    backward(*arguments, **options)
Accelerator.backward = counted
"""
SOON = 15  # seconds, on a busy machine


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path / "tiny.yaml"


def last_words(ended: Ended) -> str:
    """What genflow said at the end: one line, and no traceback."""
    assert ended.code == 2 and "Traceback" not in ended.said, ended.said
    return next(line for line in reversed(ended.said.splitlines()) if line.startswith("genflow: "))


@pytest.mark.parametrize(
    ("world", "lost", "parallel"),
    [
        (2, 1, "fsdp"),
        pytest.param(2, 0, "ddp", marks=pytest.mark.slow),
        pytest.param(4, 2, "ddp", marks=pytest.mark.slow),
        pytest.param(4, 0, "ddp", marks=pytest.mark.slow),
    ],
)
def test_where_one_rank_is_killed_the_others_end_and_the_run_goes_on(config, tmp_path, world, lost, parallel):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    ended = together(
        world, [config, f"out={cut}", f"train.parallel={parallel}"], before=KILLED.replace("LOST", str(lost))
    )
    assert ended[lost].code == -signal.SIGKILL
    for rank, each in enumerate(ended):
        if rank != lost:
            said = f"rank {rank} ends: another process of this run is gone (it said why, or was killed). Start the run again"
            assert said in last_words(each) and each.seconds - ended[lost].seconds < SOON
    assert newest_checkpoint(cut).name == "step-00000004"
    for out in (cut, whole):
        train(load(config, [f"out={out}"], schema=RunConfig))
        AcceleratorState._reset_state(reset_partial_state=True)
    a, b = (load_file(newest_checkpoint(out) / "model.safetensors") for out in (cut, whole))
    assert all((a[key] - b[key]).abs().max() < 1e-5 for key in b)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed={rank}", "do not train the same run: seed is 0 and 1. Start all of them alike"),
        pytest.param("data.limit=3{rank}", "data.limit is 30 and 31", marks=pytest.mark.slow),
        pytest.param("out={tmp}/{rank}", "the newest checkpoint is step-00000002 and None", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_do_not_train_the_same_run_are_refused(config, tmp_path, override, told):
    """Also where they see different folders, as on machines without a shared disk."""
    (tmp_path / "0").mkdir()
    override = override.replace("{tmp}", str(tmp_path))
    if override.startswith("out"):
        train(load(config, [f"out={tmp_path / '0'}", "train.steps=2"], schema=RunConfig))
        AcceleratorState._reset_state(reset_partial_state=True)
        override = f"out={tmp_path}/" + "{rank}"
    ended = together(2, [config, f"out={tmp_path / 'run'}", override])
    assert told in last_words(ended[0])
    assert ended[1].code == 2 and not any(line.startswith("genflow") for line in ended[1].said.splitlines())


def test_an_address_in_use_is_told(monkeypatch):
    """By the rank that would listen there; torch lets the others wait for an answer until the launcher ends them."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}
        for name, value in address.items():
            monkeypatch.setenv(name, str(value))
        told = f"cannot meet at 127.0.0.1:{port}: another program listens there, perhaps a run that has not ended; set"
        with pytest.raises(UserError, match=told):
            join_processes()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="3 processes on a machine of 2 GPUs; start one for each, 2"):
        join_processes()


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", True),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms", True),
        ("NCCL communicator was aborted on rank 1", True),
        ("DataLoader worker (pid 1) is killed by signal: Aborted.", False),
        ("CUDA error: the launch timed out and was terminated", False),
    ],
)
def test_only_what_is_said_of_messages_means_a_lost_rank(words, lost):
    assert bool(LOST.search(words)) is lost


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_ranks_do_not_wait_forever_for_one_that_does_not_come(config, tmp_path, late):
    soon = (
        "from datetime import timedelta; import genflow.training.ranks as ranks; ranks.MEETING = timedelta(seconds=3)"
    )
    ended = together(2, [config, f"out={tmp_path / 'run'}"], before=f"if rank == {late}: sys.exit()\n{soon}")
    assert "the processes of this run cannot meet at 127.0.0.1:" in last_words(ended[1 - late])


@pytest.mark.slow
def test_a_batch_that_three_processes_cannot_share_names_the_nearest(config, tmp_path):
    ended = together(3, [config, f"out={tmp_path / 'run'}", "train.batch_size=8"])
    told = "train.batch_size=8 does not divide among 3 processes x 1 micro-batches; try 9"
    assert told in last_words(ended[0]) and {each.code for each in ended} == {2}


POISONED = """
from genflow.flows.rectified import RectifiedFlow
error, calls = RectifiedFlow._error, []
def poisoned(self, *arguments):
    calls.append(1)
    return error(self, *arguments) * (float("nan") if len(calls) == 4 and rank == 1 else 1)
RectifiedFlow._error = poisoned
"""


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_ends_all_before_it_does_harm(config, tmp_path):
    for each in together(2, [config, f"out={tmp_path / 'run'}"], before=POISONED):
        assert "step 4: loss" in last_words(each) and "Last good checkpoint: " in each.said


ASKED = """
backward, left = Accelerator.backward, [3]
def counted(*arguments, **options):
    left[0] -= 1
    if left[0] == 0 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    backward(*arguments, **options)
Accelerator.backward = counted
"""


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_and_ends_all(config, tmp_path):
    ended = together(2, [config, f"out={tmp_path / 'run'}"], before=ASKED)
    assert [each.code for each in ended] == [130, 130]
    assert newest_checkpoint(tmp_path / "run").name == "step-00000003"
