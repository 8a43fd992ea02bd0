"""Weak scaling of the training step: n gloo processes of one thread each against one, at the same batch per process.

Times, in alternation in one run, a step of the quickstart's MM-DiT (bf16, AdamW): one process alone while the others
wait; all of them side by side, each for itself, which is what sharing the machine costs; and all of them together under
DDP and under FSDP2, which adds what distribution costs. The bytes that went over the loopback stand beside those that
genflow/training/README.md counts, and DDP's buckets are traced: does the reduction run while the backward does? Nothing
else may use the loopback meanwhile. Figures measured so far are in scripts/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from genflow import MMDiTConfig, RectifiedFlowConfig, Rng
from genflow.conditions import Condition
from genflow.flows.base import Flow
from genflow.text.base import FrozenText
from genflow.training.sharding import shard, unreduced, whole

WORDS, WIDTH = 8, 384  # of the quickstart's text encoder


class Vectors(FrozenText):
    """A text encoder whose vectors are there already."""

    max_tokens, context_dim, pooled_dim = WORDS, WIDTH, WIDTH

    def encode(self, prompts: Sequence[str]) -> Condition:
        n = len(prompts)
        return Condition(torch.zeros(n, WORDS, WIDTH), torch.ones(n, WORDS, dtype=torch.bool), torch.zeros(n, WIDTH))


@dataclass
class Rows:
    """What a loss reads of a batch."""

    x: Tensor
    condition: Condition
    position: Tensor


@dataclass
class Trace:
    """When each bucket of one backward was handed over and came back, and its bytes."""

    begun: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def hook(self, _state, bucket):  # DDP compares annotations, and finds ours to be text
        """DDP's own reduction, watched. bucket: GradBucket -> Future of a tensor."""
        i = len(self.begun)
        self.begun.append(time.perf_counter())
        self.ended.append(0.0)
        self.bytes.append(bucket.buffer().nbytes)
        reduced = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()

        def back(future: torch.futures.Future[Any]) -> Tensor:
            self.ended[i] = time.perf_counter()
            return future.value()[0]

        return reduced.then(back)


def build(args: argparse.Namespace) -> tuple[Flow, nn.Module]:
    torch.manual_seed(0)
    network = MMDiTConfig(
        depth=args.depth,
        hidden=args.width,
        patch_size=8,
        in_channels=3,
        sample_size=8,
        context_dim=WIDTH,
        pooled_dim=WIDTH,
    ).build()
    return RectifiedFlowConfig(prediction="x").build(network, Vectors(), shape=(3, 64, 64)), network


def stepper(model: nn.Module, args: argparse.Namespace) -> Callable[..., float]:
    """A function that does one training step and returns its seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    b = args.batch
    mask = torch.ones(b, WORDS, dtype=torch.bool)
    condition = Condition(torch.randn(b, WORDS, WIDTH), mask, torch.randn(b, WIDTH))
    rows = Rows(torch.randn(b, 3, 64, 64), condition, torch.arange(b))

    def step(*, reduce: bool = True) -> float:
        start = time.perf_counter()
        with nullcontext() if reduce else unreduced(model):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(rows, Rng(0)).loss
            loss.backward()
        if reduce:
            whole(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def loopback() -> int:
    """Bytes that this machine has sent to itself."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def measure(rank: int, args: argparse.Namespace, store: str) -> None:
    """One process: every phase in turn, `args.rounds` times."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # of a stream handed on as it is
    n = args.processes
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n)
    plain, _ = build(args)
    flow, network = build(args)
    ddp = {mb: DistributedDataParallel(build(args)[0], bucket_cap_mb=mb) for mb in args.buckets}
    traces = {mb: Trace() for mb in args.buckets}
    watched: dict[float, Callable[..., float]] = {}
    for mb, trace in traces.items():
        traced = DistributedDataParallel(build(args)[0], bucket_cap_mb=mb)
        traced.register_comm_hook(None, trace.hook)
        watched[mb] = stepper(traced, args)
    plain_step = stepper(plain, args)
    together = {f"DDP, buckets of {mb:g} MB": stepper(model, args) for mb, model in ddp.items()}
    together["FSDP2"] = stepper(shard(flow, network, torch.bfloat16), args)
    seconds: dict[str, list[float]] = {}
    sent: dict[str, list[int]] = {}
    overlap: dict[float, list[tuple[float, float, float]]] = {mb: [] for mb in args.buckets}
    for round_ in range(-2, args.rounds):  # the first two warm up
        took: dict[str, float] = {}
        dist.barrier()
        if rank == 0:
            took["alone"] = plain_step()
        dist.barrier()
        took["side by side"] = plain_step()
        for name, step in together.items():
            dist.barrier()
            before = loopback()
            took[name] = step()
            dist.barrier()
            if round_ >= 0:
                sent.setdefault(name, []).append(loopback() - before)
        for mb, trace in traces.items():
            trace.__init__()  # type: ignore[misc]
            dist.barrier()
            watched[mb]()
            last = max(trace.begun)  # the last gradient is complete
            early = sum(size for size, at in zip(trace.bytes, trace.begun, strict=True) if at < last)
            moving = covered(zip(trace.begun, trace.ended, strict=True))
            if round_ >= 0:
                overlap[mb].append((early / sum(trace.bytes), moving, max(trace.ended) - last))
        if round_ >= 0:
            for name, value in took.items():
                seconds.setdefault(name, []).append(value)
    if rank == 0:
        tell(args, plain, seconds, sent, overlap, traces)
    dist.barrier()
    dist.destroy_process_group()


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def tell(
    args: argparse.Namespace,
    model: nn.Module,
    seconds: dict[str, list[float]],
    sent: dict[str, list[int]],
    overlap: dict[float, list[tuple[float, float, float]]],
    traces: dict[float, Trace],
) -> None:
    n = args.processes
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    gradients = sum(p.numel() * 4 for p in model.parameters())
    print(
        f"{gradients / 4e6:.2f} M parameters, {gradients / 1e6:.1f} MB of gradients, batch {args.batch} per process, bf16, "
        f"{n} processes of 1 thread, medians of {args.rounds}, torch {torch.__version__}"
    )
    for name, value in middle.items():
        more = "" if name == "alone" else f"  {value / middle['alone'] - 1:+.1%} to alone"
        if name not in ("alone", "side by side"):
            more += f"  {value / middle['side by side'] - 1:+.1%} to side by side"
            moved = statistics.median(sent[name]) / n
            # Gloo's reduce-scatter is an all-reduce; FSDP2's two gathers are in bf16, half the bytes of gradients each.
            rounds = 2 if name.startswith("DDP") else 3
            counted = rounds * (n - 1) / n * gradients
            more += f"  {moved / 1e6:.2f} MB sent per process, {rounds} (n - 1) / n x gradients = {counted / 1e6:.2f}"
        print(f"  {name:26}{value * 1e3:8.1f} ms{more}")
    for mb, trace in traces.items():
        early, moving, exposed = (statistics.median(column) for column in zip(*overlap[mb], strict=True))
        sizes = ", ".join(f"{size / 1e6:.1f}" for size in trace.bytes)
        print(f"DDP, buckets of {mb:g} MB, watched: {len(trace.bytes)} buckets ({sizes} MB)")
        print(f"  {early:.0%} of the bytes set out while the backward ran on")
        print(f"  reducing {moving * 1e3:.1f} ms, of which {exposed * 1e3:.1f} ms after the last gradient was complete")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="of each process")
    parser.add_argument("--buckets", type=float, nargs="+", default=[25.0, 4.0], help="MB")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (args, str(Path(folder, "store"))), nprocs=args.processes)


if __name__ == "__main__":
    main()
