"""Processes of one training run, started one by one and not by a launcher, so that each one's words and end are seen."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Several trainings one after another, with the imports of one.
WORKER = """
import json, os, signal, sys
import torch
from accelerate import Accelerator
from genflow.cli import main
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
{before}
code = 0
for arguments in json.loads(sys.argv[1]):
    try:
        code = main(["train", *arguments])
    except SystemExit as end:
        code = end.code
    if code:
        break
sys.stdout.flush(), sys.stderr.flush()
os._exit(code)  # a group that is still there may abort Python as it goes
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its code (minus the signal's number where one ended it), what it said, seconds it took."""

    code: int
    said: str
    seconds: float


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def together(
    world: int, *trainings: Sequence[object], before: str = "", port: int | None = None, limit: float = 300
) -> list[Ended]:
    """Train on `world` gloo processes. trainings: arguments of `genflow train`, "{rank}" in them being each one's own.

    before: Python that every process runs first, which knows its `rank`. Whoever runs after `limit` seconds is killed.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(world)}
    shared |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for rank in range(world):
            jobs = [[str(each).replace("{rank}", str(rank)) for each in arguments] for arguments in trainings]
            command = [sys.executable, "-c", WORKER.replace("{before}", before), json.dumps(jobs)]
            own = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with Path(folder, str(rank)).open("w") as words:
                running[rank] = subprocess.Popen(command, env=own, stderr=words)
        found: dict[int, Ended] = {}
        while len(found) < world:
            for rank, process in running.items():
                seconds = time.monotonic() - begun
                if seconds > limit:
                    process.kill()
                    process.wait()
                if rank not in found and process.poll() is not None:
                    found[rank] = Ended(process.returncode, Path(folder, str(rank)).read_text(), seconds)
            time.sleep(0.02)
    return [found[rank] for rank in range(world)]
