"""The inverse of a TarFlow by sweeps against its sequential inverse, in alternation in one process.

usage: python scripts/bench_tarflow.py [RUN] [--batch 1 4 16] [--rounds 5] [--root FOLDER] [--patch 4] [--minutes 5]

Both sides are the same code with the same cache of keys and values: `window` = 1 token at a time, and all tokens or, block
by block, what measure_inverse found. RUN: a trained run of a normalizing flow; without one a small TarFlow is trained on
MNIST (root: torchvision's folder) for so many minutes of one core. Prints for each batch the seconds, their ratio, the
largest error |f(x) - z| of the blocks, and the windows and sweeps of every block. Times are those of the wall.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from claims.common import told
from torch import Tensor

from genflow.data.images import fit
from genflow.data.vision import MNISTConfig
from genflow.flows.bijections.transformer import certificate
from genflow.flows.models.tarflow import TarFlow, TarFlowConfig, measure_inverse
from genflow.flows.normalizing import standard_normal
from genflow.flows.store import load


def trained(root: str | None, patch: int, minutes: float, batch: int = 32, lr: float = 3e-3) -> TarFlow:
    """A TarFlow of MNIST, uniformly dequantised."""
    torch.manual_seed(0)
    data = MNISTConfig(root=root).build("train")
    pixels = torch.stack([fit(data.image(i), 28, 1) for i in range(len(data))])
    model = TarFlowConfig(patch=patch, marginals=True, shape=(1, 28, 28), condition_dim=0).build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    draw = lambda rows: (pixels[rows] + torch.rand(len(rows), 1, 28, 28)) / 128 - 1
    model.initialise(draw(torch.arange(256)))
    begun = time.process_time()
    while (used := (time.process_time() - begun) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * used))
        with torch.autocast("cpu", torch.bfloat16):
            z, ladj = model(draw(torch.randint(len(pixels), (batch,))))
        loss = -(standard_normal(z) + ladj).mean() / (784 * math.log(2)) + 7
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"trained for {minutes:g} minutes of one core; the last batch has {float(loss):.2f} bits per dimension")
    return model.eval()


def decode(model: TarFlow, z: Tensor, condition: Tensor | None, windows: list[int]) -> tuple[float, Tensor]:
    for block, window in zip(model, windows, strict=True):
        block.window = window
    start = time.perf_counter()
    x = model.decode(z, condition)
    x.sum().item()
    return time.perf_counter() - start, x


@torch.no_grad()
def bench(model: TarFlow, batch: int, rounds: int) -> None:
    device = next(model.parameters()).device
    z = torch.randn(batch, *model.shape, generator=torch.Generator().manual_seed(batch)).to(device)
    condition = torch.zeros(batch, model.condition_dim, device=device) if model.condition_dim else None
    plan: list[int] = [p.window for p in measure_inverse(model, z, condition)]
    blocks, model.marginals = (
        len(plan),
        None,
    )  # whose rounding in float32, the same for all, would hide that of the inverse
    sides: dict[str, list[int]] = {
        "sequential": [1] * blocks,
        "all tokens": [next(iter(model)).tokens] * blocks,
        "measured": plan,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    report = {}
    for _ in range(rounds):
        for name, windows in sides.items():
            spent, x = decode(model, z, condition, windows)
            seconds[name].append(spent)
            report[name] = (float(certificate(model, x, z, condition).max()), [block.sweeps for block in model])
    for name, windows in sides.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["sequential"], seconds[name], strict=True))
        error, sweeps = report[name]
        print(
            f"batch {batch:3d}  {name:10s} {statistics.median(seconds[name]):8.3f} s  ratio {ratio:5.2f}  "
            f"max |f(x) - z| {error:.1e}  windows {windows}  sweeps {sweeps}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--root")
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=5.0)
    args = parser.parse_args()
    model = load(args.run).network if args.run else trained(args.root, args.patch, args.minutes)  # type: ignore[attr-defined]
    if not isinstance(model, TarFlow):
        parser.error(f"{args.run} is no run of a tarflow")
    tokens = next(iter(model)).tokens
    print(f"{torch.get_num_threads()} thread(s), {tokens} tokens, {len(list(model))} blocks")
    for batch in args.batch:
        bench(model, batch, args.rounds)


if __name__ == "__main__":
    told(main)
