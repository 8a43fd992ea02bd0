"""AdamW's step and the average of the weights: torch's two passes over memory beside genflow's one (training/ema.py).

python scripts/bench_optimizer.py
"""

from __future__ import annotations

import argparse
import statistics

import torch
from claims.common import told

from genflow.evaluation.bench import alternate, ratio
from genflow.networks.mmdit import MMDiTConfig
from genflow.training.ema import EMA
from genflow.training.optimizers import AdamWConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=8, help="of an MM-DiT")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    sizes = {"in_channels": 3, "context_dim": 384, "pooled_dim": 384, "patch_size": 4, "sample_size": 16}
    model = MMDiTConfig(depth=args.depth, hidden=args.width, heads=4, **sizes).build()
    optimizer, average = AdamWConfig().build(model), EMA(model, 0.05)
    for p in model.parameters():
        p.grad = torch.randn_like(p)

    def two_passes() -> None:
        optimizer.step()
        average.update(2)

    runs = {"AdamW alone": optimizer.step, "two passes": two_passes, "one pass": lambda: average.step(optimizer, 2)}
    seconds = alternate(runs, args.rounds, torch.device("cpu"))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {torch.get_num_threads()} threads, {args.rounds} rounds")
    for name, each in seconds.items():
        print(f"  {name:14}{1000 * statistics.median(each):8.2f} ms")
    r = ratio(seconds["one pass"], seconds["two passes"])
    print(f"  two passes / one: {r.median:.2f} (pair by pair {r.least:.2f} to {r.most:.2f})")


if __name__ == "__main__":
    told(main)
