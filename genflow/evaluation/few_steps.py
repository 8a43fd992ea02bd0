"""What a flow is worth in few steps: how straight its paths are, and how far its samples are from real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genflow.evaluation.features import Features, pixel_features
from genflow.evaluation.frechet import frechet_distance
from genflow.flows.rectified import RectifiedFlow
from genflow.flows.reflow import straightness
from genflow.registry import api_export

COUNTS = (1, 2, 4, 8)
FINE: dict[str, Any] = {
    "sampler": "heun",
    "steps": 32,
    "grid": "uniform",
    "shift": 1.0,
    "options": None,
}  # as good as the exact paths
PATHS = 256  # whose straightness is averaged


@dataclass(frozen=True)
class FewSteps:
    """straightness: S, see `straightness`; distance: the Frechet distance to real samples by the number of steps."""

    straightness: float
    distance: dict[int, float]


@api_export("few_steps")
def few_steps(
    flow: RectifiedFlow,
    real: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    features: Features = pixel_features,
    counts: Sequence[int] = COUNTS,
    batch: int = 64,
    progress: Callable[[int], object] = lambda done: None,
    **guidance: Any,
) -> FewSteps:
    """Measure a flow with Euler's method on a uniform grid of each number of steps.

    real: N x *shape, on the scale of the samples; prompts and seeds: of the samples; guidance: of `flow.sample`. progress:
    told how many samples are done since.
    """

    def parts() -> list[slice]:
        return [slice(i, i + batch) for i in range(0, len(seeds), batch)]

    def of(samples: Tensor) -> Tensor:
        return torch.cat([features(part) for part in samples.split(batch)])

    paths = []
    for part in parts()[: -(-PATHS // batch)]:
        solution = flow.sample(prompts[part], seeds=seeds[part], record=True, **{**guidance, **FINE})
        assert solution.trajectory is not None
        paths.append(straightness(solution.trajectory).cpu())
    known, distance = of(real), {}
    for steps in counts:
        how = {**guidance, **FINE, "sampler": "euler", "steps": steps}
        made = []
        for part in parts():
            made.append(flow.sample(prompts[part], seeds=seeds[part], **how).x.cpu())
            progress(len(made[-1]))
        distance[steps] = frechet_distance(of(torch.cat(made)), known)
    return FewSteps(float(torch.cat(paths).mean()), distance)
