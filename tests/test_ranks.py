"""What the ranks of a run say where they do not fit together, cannot meet, or one of them is lost."""

from __future__ import annotations

import contextlib
import signal
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from genflow.config import load
from genflow.errors import UserError
from genflow.flows.store import newest_checkpoint
from genflow.training import ranks, sharding, watch
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
# Rank LOST goes so, or raises its own error, while the others wait in a call that nothing interrupts, as NCCL's is.
WAITING = """
import time
from genflow.training import watch
watch.GRACE = 1.0
def gone(*arguments, **options):
    if rank != LOST:
        time.sleep(1000)
    HOW
Accelerator.backward = gone
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
    ("world", "lost", "how"),
    [
        (2, 1, "os.kill(os.getpid(), signal.SIGKILL)"),
        pytest.param(3, 0, "raise ValueError", marks=pytest.mark.slow),
        pytest.param(3, 1, "os.kill(os.getpid(), signal.SIGKILL)", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_waits_for_one_that_is_gone_does_not_wait_for_ever(config, tmp_path, world, lost, how):
    before = WAITING.replace("LOST", str(lost)).replace("HOW", how)
    ended = together(world, [config, f"out={tmp_path / 'run'}"], before=before, limit=120)
    for rank, each in enumerate(ended):
        if rank != lost:
            assert f"rank {rank} ends: another process of this run is gone" in last_words(each)
            assert each.seconds - ended[lost].seconds < SOON


def test_who_does_not_know_the_word_is_not_watched():
    with socket.create_server(("127.0.0.1", 0)) as server:
        stranger, other, friend = (socket.create_connection(server.getsockname()) for _ in range(3))
        stranger.close()
        other.sendall(b"x" * 16)
        friend.sendall(b"w" * 16)
        (peer,) = watch._accepted(server, b"w" * 16, 1)
        assert peer.getpeername() == friend.getsockname()
        for each in (peer, other, friend):
            each.close()


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


@pytest.fixture
def nothing_before():
    """As in a process that has not trained yet."""
    AcceleratorState._reset_state(reset_partial_state=True)


def test_an_address_in_use_is_told(monkeypatch, nothing_before):
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


ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}


def test_a_process_for_each_gpu_meets_the_others(monkeypatch):
    for name in ADDRESS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ranks, "PartialState", lambda **how: SimpleNamespace(device="its own"))
    assert join_processes() == "its own"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("environment variable MASTER_PORT expected, but not set"), "expected, but not set; look at MASTER"),
        (dist.DistNetworkError("no\n  route"), "cannot meet at 127.0.0.1:29500: no route; look at MASTER_ADDR, MASTER"),
        (ValueError("a mistake of ours"), None),
    ],
)
def test_what_keeps_processes_apart_is_told_and_other_errors_stay(monkeypatch, error, told):
    def met(**how):
        raise error

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, ADDRESS[name])
    monkeypatch.setattr(ranks, "PartialState", met)
    monkeypatch.setattr(ranks, "_meet", dict)
    with pytest.raises(UserError if told else ValueError, match=told or "a mistake of ours") as raised:
        join_processes()
    assert isinstance(raised.value, UserError) == (told is not None)


def test_processes_wait_minutes_to_meet_and_as_long_as_torch_does_for_messages(monkeypatch):
    limits = []
    store = SimpleNamespace(set_timeout=limits.append)
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: limits.append(timeout) or iter([(store, 1, 2)]))
    monkeypatch.setattr(ranks.PartialState, "_shared_state", {})
    for name, value in ADDRESS.items():
        monkeypatch.setenv(name, value)
    assert ranks._meet() == {"store": store, "rank": 1, "world_size": 2}
    assert limits == [ranks.MEETING, dist.distributed_c10d.default_pg_timeout]
    monkeypatch.setattr(ranks.PartialState, "_shared_state", {"of": "the training before"})
    assert ranks._meet() == {}
    monkeypatch.setattr(ranks.PartialState, "_shared_state", {})
    for name in ADDRESS:
        with monkeypatch.context() as patch:
            patch.delenv(name)
            assert ranks._meet() == {}
    assert len(limits) == 2


@pytest.fixture
def one_of(monkeypatch):
    """As rank `rank` of those whose gathered objects, its own apart, are `others`."""

    def become(rank, others):
        state = SimpleNamespace(num_processes=len(others), process_index=rank, is_main_process=rank == 0)
        monkeypatch.setattr(ranks, "PartialState", lambda: state)
        monkeypatch.setattr(ranks, "gather_object", lambda own: [*others[:rank], *own, *others[rank + 1 :]])
        monkeypatch.setattr(ranks.time, "sleep", lambda seconds: None)

    return become


@pytest.mark.parametrize(
    ("rank", "others", "mine", "told"),
    [
        (0, [None, None, None], None, None),
        (0, [None, "no disk", "no data"], None, "^rank 1: no disk$"),
        (0, [None, "no disk", None], "no data", "^no data$"),
        (2, [None, None, None], "no data", None),
        (1, [None, None, "no data"], None, None),
    ],
)
def test_where_one_rank_fails_all_end_and_the_main_one_says_the_first_reason(one_of, rank, others, mine, told):
    one_of(rank, others)
    ended = pytest.raises(UserError, match=told) if told else pytest.raises(SystemExit, match="^2$")
    with ended if told or rank else contextlib.nullcontext(), ranks.all_or_none():
        if mine is not None:
            raise UserError(mine)


def test_what_only_another_rank_has_differs_too(one_of):
    one_of(0, [None, {"seed": 0, "init": "a run"}])
    with pytest.raises(UserError, match="ranks 0 and 1 do not train the same run: init is None and a run. Start all"):
        ranks.same_on_all({"seed": 0})


def test_the_main_ones_value_is_everyones(one_of):
    one_of(1, ["of rank 0", None])
    assert ranks.from_main("of rank 1") == "of rank 0"


@pytest.mark.parametrize(
    ("world", "error", "lost"),
    [
        (1, RuntimeError("Broken pipe"), False),
        (2, RuntimeError("Broken pipe"), True),
        (2, RuntimeError("shapes do not match"), False),
        (2, dist.DistBackendError("said otherwise"), True),
    ],
)
def test_only_among_several_is_another_one_lost(one_of, world, error, lost):
    one_of(world - 1, [None] * world)
    words = "rank 1 ends: another process of this run is gone" if lost else str(error)
    with pytest.raises(UserError if lost else type(error), match=words), ranks.lost_ranks_told():
        raise error


class Shared(sharding.FSDPModule):
    def set_requires_gradient_sync(self, synced):
        self.synced.append(synced)


class Replicated(torch.nn.parallel.DistributedDataParallel):
    @contextlib.contextmanager
    def no_sync(self):
        self.synced.append(False)
        try:
            yield
        finally:
            self.synced.append(True)


@pytest.mark.parametrize("kind", [Shared, Replicated])
def test_gradients_stay_on_their_rank_inside_and_go_out_again_after_an_error(kind):
    model = object.__new__(kind)
    model.__dict__["synced"] = [True]
    with contextlib.suppress(KeyError), sharding.unreduced(model):
        assert model.synced == [True, False]
        raise KeyError
    assert model.synced == [True, False, True]


def test_blocks_are_shared_out_in_the_runs_dtype_and_their_gradients_averaged_in_float32(monkeypatch):
    class Flow(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.device = network, torch.device("cpu")

        def sample(self):
            pass

        def preview(self):
            pass

    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    network.blocks[0].bias.requires_grad_(False)
    flow, shared, verbs = Flow(network), [], []
    monkeypatch.setattr(sharding.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(sharding, "init_device_mesh", lambda device, shape: (device, shape))
    monkeypatch.setattr(sharding, "fully_shard", lambda module, **how: shared.append((module, how)))
    monkeypatch.setattr(sharding, "register_fsdp_forward_method", lambda module, verb: verbs.append((module, verb)))
    assert sharding.shard(flow, network, torch.bfloat16) is flow
    assert [module for module, _ in shared] == [*network.blocks, flow]
    policies = [how["mp_policy"] for _, how in shared]
    assert [(each.param_dtype, each.reduce_dtype) for each in policies] == [(torch.bfloat16, torch.float32)] * 2 + [
        (None, None)
    ]
    assert not any(each.cast_forward_inputs for each in policies)
    for _, how in shared:
        assert how["mesh"] == ("cpu", (3,)) and how["ignored_params"] == {network.blocks[0].bias}
    assert verbs == [(flow, "sample"), (flow, "preview")]


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
        assert "step 4: loss nan" in last_words(each) and "Last good checkpoint: " in each.said


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
