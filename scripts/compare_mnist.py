"""Bits per dimension of MNIST after the same time of training: genflow's Glow and TarFlow, and normflows' Glow.

usage: python scripts/compare_mnist.py [--root FOLDER] [--minutes 30] [--models normflows-glow glow tarflow] [--out FOLDER]

Every model is trained by the same loop: Adam, the same schedule over the time, the same average of weights, the same
dequantisation, and is measured on the test set in float32 with K = 1. The time is that of the processor, summed over its
cores (minutes of one core), so that what else runs on the machine does not count; reading and measuring are left out. Each
model runs in a process of its own. Writes MODEL.json and curves.png; a model whose file is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from claims.common import told
from torch import Tensor, nn

from genflow.data.images import fit
from genflow.data.vision import MNISTConfig
from genflow.flows.dequantization import UniformDequantization, bits_per_dim
from genflow.flows.normalizing import standard_normal
from genflow.functional import Rng
from genflow.training.ema import EMA
from genflow.training.loop import learning_rate

MODELS = ("normflows-glow", "glow", "tarflow")
LOOKS = 12  # measurements on a part of the test set on the way
SHAPE = (1, 28, 28)
LogProb = Callable[[Tensor], Tensor]


def pictures(root: str | None, split: str) -> Tensor:
    """N x 1 x 28 x 28, uint8."""
    data = MNISTConfig(root=root).build(split)
    return torch.stack([fit(data.image(i), 28, 1) for i in range(len(data))])


def on_grid(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def normflows_glow(levels: int = 2, steps: int = 8, hidden: int = 128) -> tuple[nn.Module, LogProb]:
    """Glow as normflows' own example builds it. Its actnorms fit themselves to the first batch."""
    import normflows as nf

    bases, merges, flows = [], [], []
    for i in range(levels):
        wide = SHAPE[0] * 2 ** (levels + 1 - i)
        flows.append([nf.flows.GlowBlock(wide, hidden, split_mode="channel", scale=True) for _ in range(steps)])
        flows[-1].append(nf.flows.Squeeze())
        if i > 0:
            merges.append(nf.flows.Merge())
        side = SHAPE[1] // 2 ** max(levels - i, 1)
        bases.append(nf.distributions.DiagGaussian((wide if i == 0 else wide // 2, side, side)))
    model = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)
    return model, lambda y: model.log_prob(y, None)


def ours(name: str, options: dict) -> tuple[nn.Module, LogProb]:
    from genflow.registry import resolve

    bijection = resolve("network", name)(shape=SHAPE, condition_dim=0, **options).build()

    def log_prob(y: Tensor) -> Tensor:
        z, ladj = bijection(y)
        return standard_normal(z) + ladj

    return bijection, log_prob


# How each is built, its batch and its learning rate.
BUILD: dict[str, tuple[Callable[[], tuple[nn.Module, LogProb]], int, float]] = {
    "normflows-glow": (normflows_glow, 64, 1e-3),
    "glow": (lambda: ours("glow", {"levels": 2, "steps": 8, "hidden": 128}), 64, 1e-3),
    "tarflow": (lambda: ours("tarflow", {"patch": 2, "marginals": True}), 16, 2e-3),
}


def measure(log_prob: LogProb, pixels: Tensor, batch: int = 100) -> float:
    """Bits per dimension, K = 1, float32, noise by the picture's number."""
    dequantize, total = UniformDequantization().build(SHAPE), 0.0
    for rows in torch.arange(len(pixels)).split(batch):
        y, _ = dequantize(on_grid(pixels[rows]), Rng(0), rows)
        total += float(bits_per_dim(log_prob(y), math.prod(SHAPE)).sum())
    return total / len(pixels)


def train(name: str, root: str | None, minutes: float, bf16: bool) -> dict:
    """One model, its curve, and what it reached on the whole test set."""
    torch.manual_seed(0)
    training, test = pictures(root, "train"), pictures(root, "test")
    dequantize = UniformDequantization().build(SHAPE)
    build, batch, lr = BUILD[name]
    model, log_prob = build()
    first = torch.arange(64)
    y, _ = dequantize(on_grid(training[first]), Rng(0), first)
    if hasattr(model, "initialise"):
        model.initialise(y)
    else:
        with torch.no_grad():
            log_prob(y)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    ema = EMA(model, 0.05)
    budget, used, step, curve = 60 * minutes, 0.0, 0, []
    marks = [budget * (i + 1) / LOOKS for i in range(LOOKS)]
    while used < budget:
        begun = time.process_time()
        chosen = Rng(0, step).bits("order", torch.arange(batch)).remainder(len(training))
        position = torch.arange(step * batch, (step + 1) * batch)
        y, _ = dequantize(on_grid(training[chosen]), Rng(1), position)
        factor = learning_rate(step, steps=1, warmup=100, decay=0) * min(1.0, (1 - used / budget) / 0.4)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = bits_per_dim(log_prob(y), math.prod(SHAPE)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        ema.update(step)
        used += time.process_time() - begun
        if marks and used >= marks[0]:
            while marks and used >= marks[0]:
                marks.pop(0)
            model.eval()
            with torch.no_grad(), ema.swapped():
                curve.append((used / 60, step, measure(log_prob, test[:1000])))
            model.train()
            print(f"{name}: {used / 60:.1f} min, step {step}: {curve[-1][2]:.4f} (1000 pictures)", flush=True)
            if math.isnan(curve[-1][2]):  # it does not come back
                break
    model.eval()
    with torch.no_grad(), ema.swapped():
        final = curve[-1][2] if math.isnan(curve[-1][2]) else measure(log_prob, test)
    return {
        "bits_per_dim": final,
        "curve": curve,
        "steps": step,
        "batch": batch,
        "lr": lr,
        "bf16": bf16,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "cpu_minutes": used / 60,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def draw(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    from genflow.evaluation.plots import save_plot

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, result in results.items():
        minutes, _, values = zip(*result["curve"], strict=True)
        axes.plot(minutes, values, marker="o", markersize=3, label=f"{name}: {result['bits_per_dim']:.3f}")
    axes.set(xlabel="minutes of one core", ylabel="bits/dim, MNIST test")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_plot(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", help="torchvision's folder of MNIST (fetched)")
    parser.add_argument("--minutes", type=float, default=30, help="of one core, for each model (30)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--bf16", action="store_true", help="genflow's networks under autocast")
    parser.add_argument("--out", type=Path, default=Path("mnist-flows"))
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        bf16 = args.bf16 and not args.one.startswith("normflows")
        result = train(args.one, args.root, args.minutes, bf16)
        (args.out / f"{args.one}.json").write_text(json.dumps(result))
        return
    for name in args.models:
        if (args.out / f"{name}.json").exists():
            continue
        if code := subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", name]).returncode:
            sys.exit(code)
    results = {n: json.loads((args.out / f"{n}.json").read_text()) for n in MODELS if (args.out / f"{n}.json").exists()}
    for name, result in results.items():
        print(
            f"{name:16}{result['bits_per_dim']:.4f} bits/dim  {result['steps']} steps  {result['parameters']} parameters"
        )
    draw(results, args.out / "curves.png")


if __name__ == "__main__":
    told(main)
