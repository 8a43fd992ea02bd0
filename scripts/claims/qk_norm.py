"""RMS norms of queries and keys keep attention logits bounded, and training in bf16 stable, at a high learning rate
and when the resolution is raised (SD3, arXiv 2403.03206, sec. 5.3.2 and fig. 5).

Varies the norm; trains in bf16 at a learning rate far above the usual one, looking four times on the way, then on at
twice the resolution. Measures the largest attention logit q.k / sqrt(d) on held-out pictures and the training loss.
Shown where the logit is smaller with the norm, at the end and after the resolution was raised. Figures of a run
that leaves the numbers are infinite from there on.
"""

import json
import math
from pathlib import Path

import torch
from common import EMOJI, Study, gains, merged, study, told, verdict

import genflow.layers.modulation as layers
from genflow.attention import attention_backend
from genflow.config import from_dict
from genflow.data.emoji import EmojiConfig
from genflow.data.loading import loader
from genflow.data.prepared import PreparedConditions
from genflow.errors import UserError
from genflow.flows.store import load

FAST = merged(EMOJI, {"train": {"decay": 0.0, "clip": 0.0, "keep": 4, "optimizer": {"lr": 2e-2}}})
LOOKS = (0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def largest_logit(run: Path, size: int) -> float:
    """Over one batch of held-out pictures at eight times, all blocks and heads."""
    flow, seen, plain = load(run, ema=False), [], layers.attention

    def watched(q, k, v, *rest, **more):
        seen.append(float((q.float() @ k.float().mT).abs().max()) / math.sqrt(q.shape[-1]))
        return plain(q, k, v, *rest, **more)

    data = from_dict(EmojiConfig, {"size": size, "caption": "caption"}).build("test")
    batches = loader(
        data, PreparedConditions.prepare(data, flow.text), [[(i, i) for i in range(32)]], shape=(3, size, size)
    )
    layers.attention = watched
    try:
        with attention_backend("math"):  # others may make q and k themselves
            flow.validate(next(iter(batches)))
    finally:
        layers.attention = plain
    return max(seen)


def loss_of(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-10:]
    return sum(line["loss"] for line in lines) / len(lines)


def follow(claim: Study, side: str, seed: int, section: dict) -> dict[str, float]:
    """The figures of one run; from the step on at which it leaves the numbers they are infinite."""
    looks = {f"largest logit, {100 * part:.0f} % of training": max(round(claim.steps * part), 1) for part in LOOKS}
    found = dict.fromkeys((*looks, "loss", "largest logit at 32 px", "loss at 32 px"), math.inf)
    try:
        for figure, steps in looks.items():
            run = claim.train(side, seed, section, steps)
            found[figure] = largest_logit(run / "checkpoints" / f"step-{steps:08d}", 16)
        found["loss"] = loss_of(run)
        raised = merged(section, {"data": {"size": 32}, "init": str(run), "model": {"sample_size": 4}})
        run = claim.train(f"{side}-raised", seed, raised, max(claim.steps // 4, 1))
        return found | {"largest logit at 32 px": largest_logit(run, 32), "loss at 32 px": loss_of(run)}
    except UserError as error:
        if "gradient norm" not in str(error):
            raise
        print(f"{side}, seed {seed}: {error}")
        return found


def main() -> None:
    claim = study(__file__, __doc__, steps=800, n=0, features=False, precision="bf16")
    results = {}
    for seed in claim.seeds:
        for side, on in (("QK-norm", True), ("none", False)):
            section = merged(FAST, {"model": {"qk_norm": on}})
            found = claim.kept(f"{side}-{seed}", lambda: follow(claim, side, seed, section))  # noqa: B023
            for figure, value in found.items():
                results.setdefault(side, {}).setdefault(figure, []).append(value)
    figures = {"the largest logit is smaller": "largest logit, 100 % of training", "the loss is lower": "loss"}
    raised = "at a raised resolution"
    figures |= {
        f"the largest logit is smaller {raised}": "largest logit at 32 px",
        f"the loss is lower {raised}": "loss at 32 px",
    }
    said = {
        f"with QK-norm {statement}": verdict(gains(results, "QK-norm", "none", [figure]))
        for statement, figure in figures.items()
    }
    claim.report(results, said, note="Learning rate 0.02, no clipping.")


if __name__ == "__main__":
    told(main)
