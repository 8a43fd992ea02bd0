"""What the processes of one run have to agree on, and what they say when they do not, or when one of them is lost."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from genflow.errors import UserError

T = TypeVar("T")
MEETING = timedelta(minutes=5)  # for all processes of a run to have come; torch's own limit, of messages, is 30
# As gloo, NCCL and the store of addresses tell that another process is gone.
LOST = re.compile(
    "connection (closed|reset|refused)|broken pipe|socket (closed|timeout)|gloo|nccl|recv.* bytes|pair closure",
    re.IGNORECASE,
)


def join_processes() -> torch.device:
    """Meet the other processes that the launcher started (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); our device.

    Raises UserError where they cannot meet, such as at an address in use, or have not after `MEETING`, and where a machine
    has fewer GPUs than processes.
    """
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < gpus < here:
        raise UserError(f"{here} processes on a machine of {gpus} GPU{'s' * (gpus > 1)}; start one for each, {gpus}")
    try:
        return PartialState(cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()), **_meet()).device
    except (dist.DistError, ValueError) as error:
        words = " ".join(str(error).split())
        where = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"
        if "EADDRINUSE" in words:
            why = "another program listens there, perhaps a run that has not ended; set another MASTER_PORT"
        elif isinstance(error, ValueError) and "environment variable" not in words:
            raise
        else:
            why = f"{words[:200]}; look at MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE"
        raise UserError(f"the processes of this run cannot meet at {where}: {why}") from None


def _meet() -> dict[str, Any]:
    """Where the processes have met, for `init_process_group`; nothing where no launcher, or one of another kind, tells."""
    addressed = all(name in os.environ for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if not addressed or PartialState._shared_state or dist.is_initialized():
        return {}
    store, rank, world = next(dist.rendezvous("env://", timeout=MEETING))
    store.set_timeout(dist.distributed_c10d.default_pg_timeout)
    atexit.register(_part)
    return {"store": store, "rank": rank, "world_size": world}


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """A preparation on every rank, without messages between them: where one fails all end, and the first one says why.

    Raises UserError on the main process, SystemExit(2) on the others.
    """
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    state = PartialState()
    if state.num_processes == 1:
        if mine is not None:
            raise mine
        return
    failed = {rank: why for rank, why in enumerate(gather_object([mine and str(mine)])) if why is not None}
    if not failed:
        return
    if not state.is_main_process:
        time.sleep(1)  # a launcher ends all processes when one has ended; the main one has to speak first
        raise SystemExit(2)
    rank, why = next(iter(failed.items()))
    raise UserError(why if rank == 0 else f"rank {rank}: {why}") from mine


def same_on_all(what: Mapping[str, object]) -> None:
    """Raises UserError where an entry of another rank's is not the main one's, saying what differs."""
    if PartialState().num_processes == 1:
        return
    ranks = gather_object([dict(what)])
    with all_or_none():
        for rank, other in enumerate(ranks):
            differ = [key for key in {**ranks[0], **other} if ranks[0].get(key) != other.get(key)]
            if differ:
                told = "; ".join(f"{key} is {ranks[0].get(key)} and {other.get(key)}" for key in differ)
                raise UserError(f"ranks 0 and {rank} do not train the same run: {told}. Start all of them alike")


def from_main(value: T) -> T:
    """The main process's value, on every rank."""
    return value if PartialState().num_processes == 1 else gather_object([value])[0]


@contextlib.contextmanager
def lost_ranks_told() -> Iterator[None]:
    """Turns the error of a message that another rank can no longer answer into a UserError that says how to go on."""
    try:
        yield
    except RuntimeError as error:
        state = PartialState()
        if state.num_processes == 1 or not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        raise UserError(gone(state.process_index)) from error


def gone(rank: int) -> str:
    """What rank says where another process is lost."""
    return (
        f"rank {rank} ends: another process of this run is gone (it said why, or was killed). Start the run again: it goes "
        "on from its newest checkpoint"
    )
