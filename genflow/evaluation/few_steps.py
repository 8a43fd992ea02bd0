"""What a flow is worth in few steps: how straight its paths are, how far its samples are from real ones, and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genflow.evaluation.features import Features, pixel_features
from genflow.evaluation.frechet import frechet_distance
from genflow.evaluation.plots import ACCENT, FAINT, INK, _figure, _pixels, styled
from genflow.flows.rectified import RectifiedFlow
from genflow.flows.reflow import straightness
from genflow.registry import api_export

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNTS = (1, 2, 4, 8)
FINE: dict[str, Any] = {
    "sampler": "heun",
    "steps": 32,
    "grid": "uniform",
    "shift": 1.0,
    "options": None,
}  # as good as the exact paths
PATHS = 256  # whose straightness is averaged
EXAMPLES = 8  # samples that are kept to be looked at


@dataclass(frozen=True)
class FewSteps:
    """By the number of steps, distance: the Frechet distance to real samples; examples: the first samples, n x *shape.

    straightness: S, see `straightness`.
    """

    straightness: float
    distance: dict[int, float]
    examples: dict[int, Tensor]


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

    def parts(count: int) -> list[slice]:
        return [slice(i, min(i + batch, count)) for i in range(0, count, batch)]

    def of(samples: Tensor) -> Tensor:
        return torch.cat([features(part) for part in samples.split(batch)])

    paths = []
    for part in parts(min(PATHS, len(seeds))):
        solution = flow.sample(prompts[part], seeds=seeds[part], record=True, **{**guidance, **FINE})
        assert solution.trajectory is not None
        paths.append(straightness(solution.trajectory).cpu())
    known, distance, examples = of(real), dict[int, float](), dict[int, Tensor]()
    for steps in counts:
        how = {**guidance, **FINE, "sampler": "euler", "steps": steps}
        made = []
        for part in parts(len(seeds)):
            made.append(flow.sample(prompts[part], seeds=seeds[part], **how).x.cpu())
            progress(len(made[-1]))
        samples = torch.cat(made)
        distance[steps], examples[steps] = frechet_distance(of(samples), known), samples[:EXAMPLES]
    return FewSteps(float(torch.cat(paths).mean()), distance, examples)


@api_export("plot_few_steps")
@styled
def plot_few_steps(rows: Mapping[str, FewSteps], *, floor: float, features: str) -> Figure:
    """Straightness and distance of flows by their names, the last in colour; of pictures also the same seeds' samples.

    floor: the distance of real samples to real ones; features: what the distance is of.
    """
    from matplotlib.ticker import NullLocator

    colours = [INK if len(rows) < 3 else FAINT] * (len(rows) - 1) + [ACCENT]
    counts = list(next(iter(rows.values())).distance)
    pictures = all(each.dim() == 4 for row in rows.values() for each in row.examples.values())
    heights = [2.9, 6.4 / len(rows) * len(counts) / EXAMPLES + 0.4]  # of square pictures
    figure = _figure(7.6, sum(heights) if pictures else heights[0])
    above, below = figure.subfigures(2, 1, height_ratios=heights) if pictures else (figure, None)  # type: ignore[misc]
    straight, far = above.subplots(1, 2, width_ratios=[1, 2])
    values = [row.straightness for row in rows.values()]
    bars = straight.bar(list(rows), values, color=colours, width=0.6)
    straight.bar_label(bars, [f"{value:.2g}" for value in values], padding=2)
    straight.set(title="Straightness (0: straight)", yticks=[])
    straight.margins(y=0.12)
    straight.spines["left"].set_visible(False)
    straight.grid(visible=False)
    for (name, row), colour in zip(rows.items(), colours, strict=True):
        far.plot(counts, list(row.distance.values()), "o-", color=colour, label=name)
    far.axhline(floor, color=FAINT, linestyle="--", linewidth=1, label="real to real")
    far.set(xscale="log", yscale="log", title=f"Fréchet distance by {features}", xlabel="steps of Euler's method")
    far.set_xticks(counts, map(str, counts))
    far.xaxis.set_minor_locator(NullLocator())
    far.legend()
    if below is not None:
        for axes, (name, row) in zip(below.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
            # One picture of rows of samples, with a white line between all.
            framed = [torch.nn.functional.pad(each, (0, 1, 0, 1), value=1.0) for each in row.examples.values()]
            tiles = torch.cat([torch.cat(list(each), 2) for each in framed], 1)
            axes.imshow(_pixels(tiles), interpolation="nearest")
            height = framed[0].shape[2]
            axes.set_yticks([height * (i + 0.5) for i in range(len(counts))], map(str, counts))
            axes.set(xticks=[], title=name, ylabel="steps")
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            axes.grid(visible=False)
    return figure
