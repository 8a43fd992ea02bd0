"""What a sampler costs beside the network calls that it makes: both timed in turn, in one run, on a tiny MM-DiT."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import genflow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    sizes = {"in_channels": 3, "context_dim": 16, "pooled_dim": 16, "sample_size": 4, "patch_size": 4}
    network = genflow.MMDiTConfig(depth=2, hidden=64, heads=2, **sizes).build().eval()
    x, t = torch.randn(args.batch, 3, 16, 16), torch.full((args.batch,), 0.5)
    cond = torch.randn(args.batch, 4, 16), torch.randn(args.batch, 16)
    uncond = torch.zeros(1, 4, 16), torch.zeros(1, 16)
    doubled = tuple(torch.cat([c, u.expand_as(c)]) for c, u in zip(cond, uncond, strict=True))
    grid = genflow.uniform(args.steps)

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def bare(calls: int, x: torch.Tensor, t: torch.Tensor, cond: tuple[torch.Tensor, ...]) -> Callable[[], None]:
        def work() -> None:
            for _ in range(calls):
                network(x, t, *cond)

        return work

    velocity = lambda x, t: network(x, t, *cond)
    guided = genflow.cfg(network, cond, uncond, 3.0)
    twice = torch.cat([x, x]), torch.cat([t, t]), doubled
    n = args.steps
    pairs = {
        "euler": (lambda: genflow.euler(velocity, x, grid), bare(n, x, t, cond)),
        "heun": (lambda: genflow.heun(velocity, x, grid), bare(2 * n - 1, x, t, cond)),
        "euler, guided": (lambda: genflow.euler(guided, x, grid), bare(n, *twice)),
    }
    with torch.no_grad():
        for name, (sampler, calls) in pairs.items():
            sampler(), calls()
            ratios = []
            for _ in range(args.rounds):
                ratios.append(seconds(sampler) / seconds(calls))
            each = seconds(calls) / n * 1e3
            print(f"{name:14} {statistics.median(ratios) - 1:+7.1%} over its network calls ({each:.2f} ms a step)")


if __name__ == "__main__":
    main()
