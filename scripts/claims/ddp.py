"""A run of two data-parallel processes is the run of one: the same losses, the same weights, up to the order of sums
(Li et al. 2020, arXiv 2006.15704; here randomness hangs on the sample, not on the rank).

Trains an MM-DiT in float32 by one process and by two; another seed by one process shows how far runs are apart that
are not the same. Measures the largest relative difference of the logged losses and the relative difference of the
final weights. Shown where both stay within a thousandth.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from common import EMOJI, Study, agreement, merged, study, told

from genflow.config import dump
from genflow.flows.store import load

SECTION = merged(EMOJI, {"train": {"log_every": 1}, "model": {"depth": 2, "hidden": 64, "heads": 2}})


def by_two(claim: Study, seed: int) -> Path:
    """The same run by two processes."""
    config = claim.config("two", seed, SECTION)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    dump(config, folder / "asked.yaml")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "genflow", "train"]
    if code := subprocess.run([sys.executable, *launch, str(folder / "asked.yaml")]).returncode:
        raise SystemExit(code)
    return folder


def apart(a: Path, b: Path) -> dict[str, float]:
    losses = []
    for run in (a, b):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append(torch.tensor([line["loss"] for line in lines if "loss" in line], dtype=torch.float64))
    weights = [torch.cat([p.detach().flatten().double() for p in load(run, ema=False).parameters()]) for run in (a, b)]
    return {
        "largest relative difference of a loss": float(((losses[0] - losses[1]) / losses[0]).abs().max()),
        "relative difference of the weights": float((weights[0] - weights[1]).norm() / weights[0].norm()),
    }


def main() -> None:
    claim = study(__file__, __doc__, steps=300, n=0, features=False, precision="fp32")
    results = {"two processes": {}, "another seed": {}}
    for seed in claim.seeds:
        one = claim.train("one", seed, SECTION)
        found = {
            "two processes": apart(one, by_two(claim, seed)),
            "another seed": apart(one, claim.train("one", seed + 100, SECTION)),
        }
        for side, figures in found.items():
            for figure, value in figures.items():
                results[side].setdefault(figure, []).append(value)
    names = {"the losses are the same": "largest relative difference of a loss"}
    names |= {"the weights are the same": "relative difference of the weights"}
    said = {name: agreement(results["two processes"][figure], 1e-3) for name, figure in names.items()}
    claim.report(results, said, curves=False)


if __name__ == "__main__":
    told(main)
