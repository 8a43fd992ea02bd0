"""How far samples are from real ones in feature space, by the names that a plan has for it."""

from __future__ import annotations

from torch import Tensor

from genflow.evaluation.frechet import frechet_distance
from genflow.evaluation.kernel import kernel_distance
from genflow.evaluation.neighbours import density_coverage, precision_recall


def distance_figures(metric: str, real: Tensor, samples: Tensor) -> dict[str, tuple[float, float | None]]:
    """The figures of a metric of `plan.DISTANCES` by name, with their spread, of N x D and M x D features."""
    if metric == "fd":
        return {"FD": (frechet_distance(real, samples), None)}
    if metric == "kid":
        found = kernel_distance(real, samples)
        return {"KID": (found.mean, found.spread)}
    if metric == "precision-recall":
        pair = precision_recall(real, samples)
        return {"precision": (pair.precision, None), "recall": (pair.recall, None)}
    each = density_coverage(real, samples)
    return {"density": (each.density, None), "coverage": (each.coverage, None)}
