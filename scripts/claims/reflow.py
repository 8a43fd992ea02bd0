"""Reflow straightens: the next rectified flow, trained on the present one's own pairs of noise and sample, follows
its paths in fewer steps (Liu et al. 2022, arXiv 2209.03003, table 1 and fig. 5).

Trains flow matching on eight Gaussians and reflows it once, by `genflow reflow`. Measures the straightness (0 for
straight paths) and the Frechet distance in 1, 2, 4 and 8 Euler steps, before and after. Shown where straightness and
the distances in 1 and 2 steps fall. Each seed has noise of its own, and is measured on other noise than the pairs have.
"""

from common import gains, study, told, verdict

from genflow.cli import main as genflow
from genflow.cli.eval import data_of
from genflow.evaluation.few_steps import few_steps
from genflow.flows.store import load

SECTION = {
    "data": {"name": "toy2d", "kind": "gaussians8"},
    "model": {"name": "mlp", "hidden": 128, "depth": 3},
    "flow": {"name": "rectified", "density": "uniform"},
    "train": {
        "batch_size": 256,
        "optimizer": {"name": "adamw", "lr": 2e-3},
        "decay": 0.5,
        "log_every": 100,
        "save_every": 100_000,
        "preview_every": 0,
        "trackers": [],
    },
    "sample": {"sampler": "heun", "steps": 32, "guidance": 1.0},
}


def main() -> None:
    claim = study(__file__, __doc__, steps=2000, n=2000, features=False, precision="fp32")

    def measure(run, seeds):
        flow = load(run)
        real = data_of(load(before), str(before))[1].build("test").rows[: claim.n].float()
        found = few_steps(flow, real, [""] * claim.n, seeds, batch=500)
        distances = {f"distance, {count} steps": value for count, value in found.distance.items()}
        return {"straightness": found.straightness, **distances}

    results = {"before": {}, "after": {}}
    for seed in claim.seeds:
        before = claim.train("before", seed, SECTION)
        after = before.with_name(f"{before.name}-reflow")
        first = seed * 5 * claim.n  # noise: the pairs have the first 4 n seeds, the measurement the next n
        fresh = list(range(first + 4 * claim.n, first + 5 * claim.n))
        how = ["--pairs", str(4 * claim.n), "--seed", str(first), "--samples", str(claim.n)]
        if code := genflow(["reflow", str(before), "--out", str(after), *how, "--set", f"train.steps={claim.steps}"]):
            raise SystemExit(code)
        for side, run in (("before", before), ("after", after)):
            found = claim.kept(f"{side}-{seed}", lambda: measure(run, fresh))  # noqa: B023
            for figure, value in found.items():
                results[side].setdefault(figure, []).append(value)
    said = {
        f"{figure} falls": verdict(gains(results, "after", "before", [figure]))
        for figure in ("straightness", "distance, 1 steps", "distance, 2 steps")
    }
    claim.report(results, said)


if __name__ == "__main__":
    told(main)
