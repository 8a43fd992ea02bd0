"""Glow beside normflows' Glow, the same architecture: training and sampling in images/s, and peak memory.

python scripts/bench_glow.py [--shape 3 32 32] [--levels 3] [--steps 8] [--hidden 128] [--batch 32] [--blocks 7]

Both sides in one process, in alternation; medians over blocks. normflows is built as in its Glow example (GlowBlock with
split_mode "channel" and scale, Squeeze, Merge, DiagGaussian), with its priors' parameters fixed, and trained as its users
do, by Adam. Each side's training step is forward, backward and the same fused Adam. A third and fourth side put genflow's
and normflows' forward under bf16 autocast.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch

from genflow.flows.models.glow import GlowConfig

warnings.filterwarnings("ignore")
SIDES = ("genflow fp32", "genflow bf16", "normflows fp32", "normflows bf16")


def normflows_glow(shape: list[int], levels: int, steps: int, hidden: int) -> torch.nn.Module:
    """normflows' Glow; its levels count from the noise."""
    import normflows as nf

    channels, height, width = shape
    bases, flows = [], []
    for i in range(levels):
        inside = channels * 2 ** (levels + 1 - i)
        blocks = [nf.flows.GlowBlock(inside, hidden, split_mode="channel", scale=True) for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        latent = (inside // 2 if i else inside, height // 2 ** (levels - i), width // 2 ** (levels - i))
        bases.append(nf.distributions.DiagGaussian(latent, trainable=False))
    return nf.MultiscaleFlow(bases, flows, [nf.flows.Merge() for _ in range(levels - 1)], class_cond=False)


def side(name: str, args: argparse.Namespace) -> tuple[Callable[[], None], Callable[[], None], int]:
    """A training step, a batch of samples, and the number of parameters."""
    torch.manual_seed(0)
    x = torch.rand(args.batch, *args.shape) * 2 - 1
    bf16 = torch.autocast("cpu", torch.bfloat16) if name.endswith("bf16") else nullcontext()
    if name.startswith("genflow"):
        model = GlowConfig(args.levels, args.steps, args.hidden, shape=tuple(args.shape), condition_dim=0).build()
        model.initialise(x)

        def nll() -> torch.Tensor:
            z, ladj = model(x)
            return (0.5 * (z.square() + math.log(2 * math.pi))).flatten(1).sum(1).mean() - ladj.mean()

        def draw() -> object:
            return model.decode(torch.randn(args.batch, *args.shape))
    else:
        model = normflows_glow(args.shape, args.levels, args.steps, args.hidden)

        def nll() -> torch.Tensor:
            return model.forward_kld(x)

        def draw() -> object:
            return model.sample(args.batch)

    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        with bf16:
            loss = nll()
        loss.backward()
        optimizer.step()

    def sample() -> None:
        model.eval()
        with torch.no_grad(), bf16:
            draw()

    return train, sample, sum(p.numel() for p in model.parameters())


def peak_mb(name: str, args: argparse.Namespace) -> float:
    """The highest memory of two training steps, above what a fresh process with the model holds, MB. Linux only."""

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    train, _, _ = side(name, args)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = status("VmRSS")
    train()
    train()
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[3, 32, 32])
    for name, default in (("levels", 3), ("steps", 8), ("hidden", 128), ("batch", 32), ("blocks", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(peak_mb(args.memory_of, args))
        return
    print(f"torch {torch.__version__}, normflows {version('normflows')}, Python {platform.python_version()}")
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; {vars(args)}")
    sides = {name: side(name, args) for name in SIDES}
    print("parameters:", {name: count for name, (_, _, count) in sides.items()})
    for what, index in (("training", 0), ("sampling", 1)):
        seconds: dict[str, list[float]] = {name: [] for name in SIDES}
        for block in range(args.blocks + 1):
            for name in SIDES:
                start = time.perf_counter()
                sides[name][index]()
                if block:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
        rate = {name: args.batch / statistics.median(times) for name, times in seconds.items()}
        report(what, "images/s", rate, rate["normflows fp32"])
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of"]
    memory = {name: float(subprocess.check_output([*command, name], text=True).split()[-1]) for name in SIDES}
    report("memory of training", "MB", memory, memory["normflows fp32"])


def report(what: str, unit: str, figures: dict[str, float], reference: float) -> None:
    print(f"{what}:")
    for name, figure in figures.items():
        print(f"  {name:15} {figure:8.1f} {unit}   {figure / reference:.2f} x normflows fp32")


if __name__ == "__main__":
    main()
