"""What training a deep flow needs: plain autograd, torch.utils.checkpoint for each layer, and the invertible checkpoint.

Couplings as Glow's (3 x 3, 1 x 1 and 3 x 3 convolutions) on pictures, one depth after the other. Prints the peak of what a
step allocates, as the CPU's or the GPU's allocator counts it, gradients of parameters included and parameters not; what of
it is those gradients, which no checkpoint can save; and the seconds of a step, medians of the three in turn. Figures
measured so far are in scripts/README.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts allocations has much to say

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from genflow.flows.bijections.base import Chain, zero_ladj
from genflow.flows.bijections.coupling import AffineCoupling
from genflow.flows.bijections.memory import Reversible
from genflow.networks.couplers import ConvNet


class Checkpointed(Chain):
    """A chain of which each bijection's input is kept."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = zero_ladj(x)
        for bijection in self:
            x, ladj = checkpoint(bijection, x, condition, use_reentrant=False)
            total = total + ladj
        return x, total


KINDS: dict[str, type[Chain]] = {"plain": Chain, "checkpoint": Checkpointed, "reversible": Reversible}


def couplings(shape: Sequence[int], depth: int, hidden: int) -> list[AffineCoupling]:
    """Affine couplings that keep one half of the channels, then the other, a little away from the identity."""

    def network(inputs: int, outputs: int, condition_dim: int) -> nn.Module:
        net = ConvNet(inputs, outputs, condition_dim, hidden=hidden)
        nn.init.normal_(net.last.weight, std=0.01)
        return net

    return [AffineCoupling(shape, mask="halves", flip=i % 2 == 1, network=network) for i in range(depth)]


def step(flow: Chain, x: Tensor) -> None:
    """Forward and backward of maximum likelihood under a standard normal base, from no gradients."""
    flow.zero_grad(set_to_none=True)
    z, ladj = flow(x)
    (0.5 * z.square().flatten(1).sum(1) - ladj).mean().backward()


def peak_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """The most that is allocated at once within work() over what there was before, as the allocator counts it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[12, 16, 16], help="C H W, after a squeeze of 3 x 32 x 32"
    )
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    x = torch.randn(args.batch, *args.shape, device=args.device)
    print(f"{args.batch} x {args.shape}, hidden {args.hidden}, float32, {args.device}, torch {torch.__version__}")
    print("depth | gradients, MiB | " + " | ".join(f"{kind}: MiB, s/step" for kind in KINDS))
    first: dict[str, float] = {}
    for depth in args.depths:
        layers = couplings(args.shape, depth, args.hidden)
        flows = {kind: make(layers).to(args.device) for kind, make in KINDS.items()}
        mebibytes, times = {}, {kind: [] for kind in KINDS}
        for kind, flow in flows.items():
            step(flow, x)  # warms up
            flow.zero_grad(set_to_none=True)
            mebibytes[kind] = peak_bytes(lambda flow=flow: step(flow, x), args.device) / 2**20
        for _ in range(args.rounds):
            for kind, flow in flows.items():
                times[kind].append(seconds(lambda flow=flow: step(flow, x), args.device))
        first = first or mebibytes
        cells = [
            f"{mebibytes[kind]:.0f} ({mebibytes[kind] / first[kind]:.2f} x), {statistics.median(times[kind]):.2f}"
            for kind in KINDS
        ]
        gradients = sum(p.numel() * p.element_size() for p in flows["plain"].parameters()) / 2**20
        print(f"{depth} | {gradients:.0f} | " + " | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
