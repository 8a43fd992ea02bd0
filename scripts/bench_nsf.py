"""Training speed of RQ-NSF on vectors beside zuko's: python scripts/bench_nsf.py [--threads 2] [--repeats 9]

The same family on both sides: 4 couplings with 32 of 64 features kept, a network of 256 x 256, 8 bins on [-5, 5], the kept
features through splines of their own. A step is -log p, its backward and Adam. Sides alternate; medians are printed.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import zuko
from torch import Tensor, nn

from genflow.flows.bijections.base import Chain
from genflow.flows.bijections.coupling import SplineCoupling
from genflow.flows.models.nsf import NSFConfig
from genflow.networks.couplers import MLP

D, STEPS, HIDDEN, BATCH, BINS = 64, 4, 256, 1024, 8


def couplings() -> Chain:
    """What zuko's is: bare couplings, the halves changing places."""
    network = partial(MLP, hidden=(HIDDEN, HIDDEN))
    return Chain(SplineCoupling((D,), flip=i % 2 == 1, network=network, bins=BINS, bound=5.0) for i in range(STEPS))


def full() -> nn.Module:
    """The model nsf: ActNorm, a learned linear map and a coupling with a residual network, 4 times."""
    return NSFConfig(steps=STEPS, bins=BINS, bound=5.0, hidden=HIDDEN, blocks=1, shape=(D,), condition_dim=0).build()


def step_of(model: nn.Module, nll: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        nll(x).mean().backward()
        optimizer.step()

    return step


def ours(bijection: nn.Module) -> Callable[[Tensor], Tensor]:
    def nll(x: Tensor) -> Tensor:
        z, ladj = bijection(x)
        return 0.5 * (z.square() + math.log(2 * math.pi)).sum(1) - ladj

    return nll


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    x = torch.randn(BATCH, D)
    peer = zuko.flows.NSF(D, transforms=STEPS, hidden_features=(HIDDEN, HIDDEN), passes=2, bins=BINS)
    models = {"zuko NSF, passes=2": peer, "genflow, couplings": couplings(), "genflow, nsf": full()}
    steps = {
        name: step_of(model, ours(model) if model is not peer else lambda x: -peer().log_prob(x), x)
        for name, model in models.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(arguments.repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:  # the first warms up
                times[name].append(time.perf_counter() - start)

    print(f"RQ-NSF, {D}-d, batch {BATCH}, float32, {arguments.threads} threads, median of {arguments.repeats}")
    print(f"torch {torch.__version__}, zuko {zuko.__version__}, python {platform.python_version()}")
    first = statistics.median(times["zuko NSF, passes=2"])
    masks = [m for name, m in peer.named_buffers() if name.endswith("mask")]
    for name, model in models.items():
        median, count = statistics.median(times[name]), sum(p.numel() for p in model.parameters())
        masked = f", {sum(int((~m).sum()) for m in masks):,} of them masked" if model is peer else ""
        print(f"{name:20} {BATCH / median:9,.0f} rows/s   x {first / median:.2f}   {count:,} parameters{masked}")


if __name__ == "__main__":
    main()
