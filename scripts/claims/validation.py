"""The validation loss at fixed times says which of two models draws better: its rank follows that of the Frechet
distance (SD3, arXiv 2403.03206, sec. 5.3 and fig. 8).

Trains one MM-DiT in three widths, with five checkpoints of each. Measures the rank correlation (Spearman) of
validation loss and distance in 25 steps over the fifteen models of a seed, and over the three that were trained to
the end. Shown where the first is above 0.7 at every seed, and clearly so on average.
"""

from common import EMOJI, merged, study, told, verdict
from scipy.stats import spearmanr

from genflow.flows.store import checkpoints

WIDTHS, LOOKS = (32, 64, 128), 5


def main() -> None:
    claim = study(__file__, __doc__, steps=500)
    results: dict[str, dict[str, list[float]]] = {"all": {}}
    for seed in claim.seeds:
        pairs, last = [], []
        for width in WIDTHS:
            every = max(claim.steps // LOOKS, 1)
            change = {"model": {"hidden": width, "heads": 2}, "train": {"save_every": every, "keep": LOOKS + 1}}
            run = claim.train(f"{width}", seed, merged(EMOJI, change))
            for folder in checkpoints(run):
                found = claim.kept(f"{width}-{seed}-{folder.name}", lambda: claim.figures(folder, steps=(25,)))  # noqa: B023
                pairs.append((found["loss"], found["FD, 25 steps"]))
                print(f"{width}, seed {seed}, {folder.name}: {found}", flush=True)
            last.append(pairs[-1])
            for figure, value in found.items():
                results.setdefault(f"width {width}, to the end", {}).setdefault(figure, []).append(value)
        for name, points in (("rank correlation", pairs), ("of those trained to the end", last)):
            results["all"].setdefault(name, []).append(float(spearmanr(*zip(*points)).statistic))
    said = {"the validation loss ranks models as their distance does": verdict(results["all"]["rank correlation"], 0.7)}
    claim.report(results, said, curves=False)


if __name__ == "__main__":
    told(main)
