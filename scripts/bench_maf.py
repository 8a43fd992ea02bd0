"""A masked autoregressive flow beside zuko's: training and inverse, in alternation in one process.

python scripts/bench_maf.py [--features 64] [--hidden 256 256] [--layers 5] [--batch 1024] [--univariate affine]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import zuko
from claims.common import told

from genflow.flows.models.maf import MAFConfig
from genflow.flows.normalizing import standard_normal


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], rows: int, repeats: int) -> None:
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    mine, other = (rows / statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(t / o for o, t in pairs)
    print(f"{name:24s} genflow {mine:9.0f} rows/s   zuko {other:9.0f} rows/s   ratio {ratio:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--univariate", choices=("affine", "spline"), default="affine")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)

    config = MAFConfig(
        layers=args.layers,
        hidden=tuple(args.hidden),
        univariate=args.univariate,
        shape=(args.features,),
        condition_dim=0,
    )
    flow = config.build()
    peer = {"affine": zuko.flows.MAF, "spline": zuko.flows.NSF}[args.univariate](
        args.features, transforms=args.layers, hidden_features=args.hidden
    )
    x = torch.randn(args.batch, args.features)
    own_optimizer = torch.optim.Adam(flow.parameters(), lr=1e-4)
    peer_optimizer = torch.optim.Adam(peer.parameters(), lr=1e-4)

    def step(optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]) -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    def own_loss() -> torch.Tensor:
        z, ladj = flow(x)
        return -(standard_normal(z) + ladj).mean()

    def peer_loss() -> torch.Tensor:
        return -peer().log_prob(x).mean()

    def own_step() -> None:
        step(own_optimizer, own_loss)

    def peer_step() -> None:
        step(peer_optimizer, peer_loss)

    compare("training step", own_step, peer_step, args.batch, args.repeats)
    with torch.no_grad():
        transform = peer().transform
        compare("inverse", lambda: flow.decode(x), lambda: transform.inv(x), args.batch, max(args.repeats // 2, 1))


if __name__ == "__main__":
    told(main)
