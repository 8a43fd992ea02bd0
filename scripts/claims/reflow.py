"""Reflow straightens: the next rectified flow, trained on the present one's own pairs of noise and sample, follows
its paths in fewer steps (Liu et al. 2022, arXiv 2209.03003, table 1 and fig. 5).

Trains flow matching on eight Gaussians and reflows it once, by `genflow reflow`. Measures the straightness (0 for
straight paths) and the Frechet distance in 1, 2, 4 and 8 Euler steps, before and after. Shown where straightness and
the distances in 1 and 2 steps fall.
"""

from common import gains, study, verdict

from genflow.cli import main as genflow
from genflow.cli.eval import data_of
from genflow.evaluation.few_steps import few_steps
from genflow.flows.store import load, newest_checkpoint

SECTION = {
    "data": {"name": "toy2d", "kind": "gaussians8"},
    "model": {"name": "mlp", "hidden": 128, "depth": 3},
    "flow": {"name": "rectified", "density": "uniform"},
    "train": {
        "batch_size": 256,
        "precision": "fp32",
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
    claim = study(__file__, __doc__, steps=2000, n=2000)

    def measure(run):
        flow = load(run)
        real = data_of(load(before), str(before))[1].build("test").rows[: claim.n].float()
        found = few_steps(flow, real, [""] * claim.n, list(range(claim.n)), batch=500)
        distances = {f"distance, {count} steps": value for count, value in found.distance.items()}
        return {"straightness": found.straightness, **distances}

    results = {"before": {}, "after": {}}
    for seed in claim.seeds:
        before = claim.train("before", seed, SECTION)
        after = before.with_name(f"{before.name}-reflow")
        if newest_checkpoint(after) is None:
            how = ["--pairs", str(4 * claim.n), "--samples", str(claim.n), "--set", f"train.steps={claim.steps}"]
            if code := genflow(["reflow", str(before), "--out", str(after), *how]):
                raise SystemExit(code)
        for side, run in (("before", before), ("after", after)):
            for figure, value in claim.kept(f"{side}-{seed}", lambda: measure(run)).items():  # noqa: B023
                results[side].setdefault(figure, []).append(value)
    said = {
        f"{figure} falls": verdict(gains(results, "after", "before", [figure]))
        for figure in ("straightness", "distance, 1 steps", "distance, 2 steps")
    }
    claim.report(results, said)


if __name__ == "__main__":
    main()
