"""Training in bf16 or fp16, its weights, optimiser and losses in float32, follows the float32 run (Micikevicius et
al. 2017, arXiv 1710.03740), in less time and memory.

Trains the same MM-DiT, from the same seed, in each precision that the device has. Measures the validation loss, the
distance in 25 steps, the images a second of training (the median) and the memory at the peak of one forward and
backward, without optimiser and averaged weights. Shown where the validation loss is within 2 % of float32's at every
seed; a precision that the device refuses is left out, and said.
"""

import json
import statistics
from functools import partial
from types import SimpleNamespace

import torch
from common import EMOJI, OPEN, Verdict, agreement, gains, merged, study, told, verdict

from genflow.evaluation.bench import Side, peak_memory
from genflow.flows.store import load
from genflow.functional import Rng
from genflow.training.precision import DTYPES, refusal


def step(run: str, precision: str, device: torch.device, name: str) -> Side:
    """Forward and backward of a batch of 64, for its memory."""
    flow = load(run, device=device).train()
    x, condition = torch.zeros(64, *flow.shape, device=device), flow.text.null().to(device).expand(64)
    batch = SimpleNamespace(x=x, condition=condition, position=torch.arange(64))

    def train() -> None:
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            loss = flow(batch, Rng(0)).loss
        loss.backward()

    return Side.of(flow, {"train": train})


def main() -> None:
    claim = study(__file__, __doc__, steps=600, precision="the precision that each row names")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refused = {name: reason for name in ("bf16", "fp16") if (reason := refusal(name, device))}
    sides = {n: merged(EMOJI, {"train": {"precision": n}}) for n in ("fp32", "bf16", "fp16") if n not in refused}

    def measure(run):
        precision = next(name for name in sides if run.name.startswith(name))
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        rates = [line["images_per_s"] for line in lines if "images_per_s" in line]
        memory = peak_memory(partial(step, str(run), precision, device), "amp", "train", device)
        more = {} if memory is None else {"MiB": memory}
        return {**claim.figures(run, steps=(25,)), "images a second": statistics.median(rates), **more}

    results = claim.sweep(sides, measure)
    said = {}
    for name in list(sides)[1:]:
        losses = zip(results[name]["loss"], results["fp32"]["loss"], strict=True)
        said[f"{name} has float32's validation loss"] = agreement([a / b - 1 for a, b in losses], 0.02)
        said[f"{name} is faster"] = verdict(gains(results, "fp32", name, ["images a second"]))
        if "MiB" in results[name]:
            said[f"{name} takes less memory"] = verdict(gains(results, name, "fp32", ["MiB"]))
    said |= {f"{name} is left out ({reason})": Verdict(OPEN) for name, reason in refused.items()}
    claim.report(results, said, curves=False)


if __name__ == "__main__":
    told(main)
