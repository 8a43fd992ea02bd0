"""Plots of flows in the plane: densities, samples, trajectories, vector fields, bent grids, and points on their way.

Each function takes plain tensors and callables and returns a Figure for `save_plot`; `point_animation` needs no matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from genflow.data.pictures import write_atomic
from genflow.data.points import (
    GAMMA,
    RAMP,
    Extent,
    LogDensity,
    bins_for,
    brightest,
    density_2d,
    extent_of,
    histogram_2d,
    plane,
    shade,
)
from genflow.errors import UserError
from genflow.evaluation.plots import FAINT, INK, labelled, styled
from genflow.registry import api_export
from genflow.samplers import Velocity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TIME = "viridis_r"  # of t, as in the plots of pictures
ARROWS = 22  # of a field, on a side
LEGEND = 10  # entries; more conditions get a scale of colours


def _figure(panels: int, *, side: float = 3.1, shared: bool = True) -> tuple[Figure, list[Axes]]:
    """A row of squares."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side * panels + 0.9, side + 0.55), layout="compressed")
    return figure, list(figure.subplots(1, panels, sharex=shared, sharey=shared, squeeze=False)[0])


def _frame(axes: Axes, extent: Extent, title: str) -> None:
    """Equal axes over the extent, with few ticks and no clutter."""
    from matplotlib.ticker import MaxNLocator

    left, right, bottom, top = extent
    axes.set(title=title, xlim=(left, right), ylim=(bottom, top))
    axes.set_aspect("equal")
    axes.grid(False)
    axes.tick_params(length=2, labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))


def _dots(axes: Axes, points: Tensor, colour: str) -> None:
    """Points to lay underneath."""
    x, y = plane(points).numpy().T
    axes.scatter(x, y, s=2, color=colour, linewidths=0, rasterized=True, zorder=0)


# ------------------------------------------------------------------------------------------------ densities and samples


@api_export("plot_density_2d")
@styled
def plot_density_2d(
    panels: Mapping[str, Tensor | LogDensity], *, extent: Extent | None = None, resolution: int = 200
) -> Figure:
    """Densities side by side in one scale of colours: of points, N x 2, their histogram; of a log density, its exp.

    extent: by default that of the first points. Under a density stands its integral over the panel, which is 1 for an
    honest one that lies inside; under points, their number. Raises UserError without points and without an extent.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    extent = extent or _extent_of_first(panels.values())
    left, right, bottom, top = extent
    cells, notes = [], []
    for each in panels.values():
        if isinstance(each, Tensor):
            cells.append(histogram_2d(each, extent, bins_for(each)))
            notes.append(f"{len(each):,} points")
        else:
            cells.append(density_2d(each, extent, resolution))
            notes.append(f"∫ = {float(cells[-1].mean()) * (right - left) * (top - bottom):.3f}")
    exact = [cell for cell, each in zip(cells, panels.values(), strict=True) if not isinstance(each, Tensor)]
    norm = PowerNorm(GAMMA, 0, brightest((exact or cells)[0]))
    ramp = LinearSegmentedColormap.from_list("density", RAMP)
    figure, row = _figure(len(panels))
    for axes, name, cell, note in zip(row, panels, cells, notes, strict=True):
        image = axes.imshow(cell.numpy(), extent=extent, norm=norm, cmap=ramp, interpolation="nearest")
        _frame(axes, extent, name)
        axes.set_xlabel(note, color=FAINT, fontsize=8)
    figure.colorbar(image, ax=row, label="density", pad=0.01, aspect=30, extend="max").outline.set_visible(False)  # type: ignore[operator]
    return figure


def _extent_of_first(panels: Any) -> Extent:
    points = next((each for each in panels if isinstance(each, Tensor)), None)
    if points is None:
        raise UserError("a density has no bounds of its own: give points beside it, or an extent")
    return extent_of(points)


@api_export("plot_samples_2d")
@styled
def plot_samples_2d(panels: Mapping[str, tuple[Tensor, Sequence[str]]], *, extent: Extent | None = None) -> Figure:
    """Points coloured by their condition. panels: by name, N x 2 points and the caption of each."""
    import matplotlib

    extent = extent or extent_of(next(iter(panels.values()))[0])
    names = sorted({caption for _, captions in panels.values() for caption in captions}, key=_natural)
    few = len(names) <= LEGEND
    place = dict(zip(names, range(len(names)), strict=True))
    palette = matplotlib.colormaps["tab10" if few else "turbo"]
    colours = palette(np.arange(len(names)) if few else np.linspace(0.03, 0.97, len(names)))
    figure, row = _figure(len(panels))
    for axes, (name, (points, captions)) in zip(row, panels.items(), strict=True):
        xy = plane(points).numpy()
        shown = colours[[place[caption] for caption in captions]]
        axes.scatter(
            xy[:, 0], xy[:, 1], s=min(6, 20_000 / max(len(xy), 1)), c=shown, alpha=0.7, linewidths=0, rasterized=True
        )
        _frame(axes, extent, name)
    if few and len(names) > 1:
        for name, colour in zip(names, colours, strict=True):
            row[-1].plot([], [], "o", color=colour, label=labelled(name, 28) or "no caption")
        figure.legend(loc="outside right center", handletextpad=0.2)
    return figure


def _natural(name: str) -> tuple[str, float, str]:
    """gaussian 2 before gaussian 10."""
    words, _, number = name.rpartition(" ")
    return (words, float(number), name) if number.isdecimal() else (name, 0.0, name)


# ----------------------------------------------------------------------------------------------- the way between the two


@api_export("plot_trajectories_2d")
@styled
def plot_trajectories_2d(
    times: Sequence[float],
    states: Tensor,
    *,
    data: Tensor | None = None,
    extent: Extent | None = None,
) -> Figure:
    """The ways of points through the plane, coloured by time; where they set out is hollow, where they arrive, full.

    times: N + 1; states: N + 1 x B x 2, as in a Trajectory. data: M x 2 points to lay underneath.
    """
    from matplotlib.collections import LineCollection

    ways = torch.stack([plane(state) for state in states]).numpy()
    extent = extent or extent_of(torch.from_numpy(ways).flatten(0, 1))
    figure, (axes,) = _figure(1, side=4.6)
    if data is not None:
        _dots(axes, data, "#dddddd")
    segments = np.stack([ways[:-1], ways[1:]], 2)  # N x B x 2 ends x 2
    middle = (np.array(times[1:]) + np.array(times[:-1])) / 2
    lines = LineCollection(
        list(segments.reshape(-1, 2, 2)), cmap=TIME, array=np.repeat(middle, ways.shape[1]), linewidth=0.8, alpha=0.8
    )
    lines.set_clim(min(times), max(times))
    axes.add_collection(lines)
    axes.plot(*ways[0].T, "o", color=FAINT, markersize=2.6, markerfacecolor="white", markeredgewidth=0.6)
    axes.plot(*ways[-1].T, "o", color=INK, markersize=2.2, markeredgewidth=0)
    _frame(axes, extent, "Trajectories")
    figure.colorbar(lines, ax=axes, label="t (1 = noise, 0 = data)", pad=0.01, aspect=30).outline.set_visible(False)  # type: ignore[operator]
    return figure


@api_export("plot_field_2d")
@styled
def plot_field_2d(
    velocity: Velocity,
    times: Sequence[float],
    *,
    extent: Extent,
    arrows: int = ARROWS,
    points: Sequence[Tensor] = (),
    device: torch.device | str = "cpu",
) -> Figure:
    """The vector field at several times: arrows -v, the way that a sample goes, darker where it is faster.

    Their lengths compare within a panel, their colours across all. velocity: v(x, t), asked on `device`. points: for each
    time, N x 2 points to lay underneath. arrows: on a side.
    """
    from genflow.samplers.solution import evaluate

    left, right, bottom, top = extent
    middle = (torch.arange(arrows) + 0.5) / arrows
    y, x = torch.meshgrid(bottom + (top - bottom) * middle, left + (right - left) * middle, indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()], 1).to(device)
    with torch.no_grad():
        fields = [-evaluate(velocity, places, t).cpu().double() for t in times]
    speeds = [field.norm(dim=1) for field in fields]
    fastest = _fast(torch.stack(speeds))
    figure, row = _figure(len(times), side=2.9)
    for i, (axes, t, field, speed) in enumerate(zip(row, times, fields, speeds, strict=True)):
        if points:
            _dots(axes, points[i], "#f0b9a8")
        full = _fast(speed)
        shown = (
            field / speed.clamp(min=full)[:, None] * (right - left) / arrows * 1.3
        )  # the fastest still show their way
        quiver = axes.quiver(
            x.flatten(), y.flatten(), *shown.T.numpy(), speed.numpy(), cmap="Blues", clim=(-0.5 * fastest, fastest),
            angles="xy", scale_units="xy", scale=1, width=0.005, pivot="mid",
        )  # fmt: skip
        _frame(axes, extent, f"t = {t:.3g}")
    bar = figure.colorbar(quiver, ax=row, label="speed |v|", pad=0.01, aspect=30, extend="max")
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.set_ylim(0, fastest)
    return figure


def _fast(speed: Tensor) -> float:
    """All but a fiftieth are slower."""
    return float(np.quantile(speed.numpy(), 0.98)) or 1.0


@api_export("plot_warp_2d")
@styled
def plot_warp_2d(
    transform: Callable[[Tensor], Tensor],
    *,
    extent: Extent = (-3.0, 3.0, -3.0, 3.0),
    lines: int = 25,
    titles: tuple[str, str] = ("noise", "data"),
) -> Figure:
    """What a map does to a square grid of lines, such as a flow's decode: each line keeps its colour.

    transform: N x 2 -> N x 2. Where neighbouring lines part or crowd, the map has stretched or pressed.
    """
    import matplotlib
    from matplotlib.collections import LineCollection

    left, right, bottom, top = extent
    fine, at = torch.linspace(0, 1, 241), torch.linspace(0, 1, lines)
    across = torch.stack(
        torch.broadcast_tensors(left + (right - left) * fine, (bottom + (top - bottom) * at)[:, None]), 2
    )
    up = torch.stack(torch.broadcast_tensors((left + (right - left) * at)[:, None], bottom + (top - bottom) * fine), 2)
    grid = torch.cat([across, up])  # 2 lines x 241 x 2
    with torch.no_grad():
        bent = transform(grid.flatten(0, 1)).float().cpu().view_as(grid)
    colours = [
        colour for name in ("PuBu", "OrRd") for colour in matplotlib.colormaps[name](np.linspace(0.35, 1, lines))
    ]
    figure, row = _figure(2, side=3.8, shared=False)
    for axes, title, shown in zip(row, titles, (grid, bent), strict=True):
        axes.add_collection(LineCollection(list(shown.numpy()), colors=colours, linewidth=0.7))
        _frame(axes, extent_of(shown.flatten(0, 1), margin=0.04), title)
    return figure


# ------------------------------------------------------------------------------------------------------------- animation


@dataclass(frozen=True)
class Animation:
    """Frames of one palette, and how long each is shown, in milliseconds."""

    frames: list[Image.Image]
    durations: list[int]

    def save_atomic(self, path: Path) -> None:
        """Write a GIF that repeats, whole or not at all. Raises UserError where the disk refuses."""
        first, *rest = self.frames
        how: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": self.durations, "loop": 0}
        write_atomic(path, lambda file: first.save(file, "GIF", optimize=False, **how))


@api_export("point_animation")
def point_animation(
    places: Sequence[float],
    states: Tensor,
    *,
    extent: Extent | None = None,
    label: str = "t = {:.2f}",
    frames: int = 50,
    side: int = 320,
) -> Animation:
    """Points on their way, as a density that changes: a GIF of `frames` pictures, the last held for a while.

    places: N + 1 times, or depths, in order; states: N + 1 x B x D, the points there, between which they go straight.
    label: of a frame, formatted with its place. Raises UserError for fewer than two states.
    """
    if len(states) < 2 or frames < 2:
        raise UserError("an animation needs two states and two frames at least")
    ways = torch.stack([plane(state) for state in states])
    extent = extent or extent_of(ways[[0, -1]].flatten(0, 1), margin=0.05)
    top = brightest(_smooth(ways[-1], extent))
    along = torch.tensor([abs(place - places[0]) for place in places], dtype=torch.float64)
    pictures = []
    for at in torch.linspace(0, float(along[-1]), frames, dtype=torch.float64):
        k = int(torch.searchsorted(along, at).clamp(1, len(along) - 1))
        part = float((at - along[k - 1]) / (along[k] - along[k - 1]))
        points = torch.lerp(ways[k - 1], ways[k], part)
        image = shade(_smooth(points, extent), top, side, Image.Resampling.BILINEAR, levels=32)
        place = places[0] + math.copysign(float(at), places[-1] - places[0])
        _write(image, label.format(abs(place)), float(at / along[-1]))
        pictures.append(image)
    return Animation(pictures, [70] * (frames - 1) + [1500])


def _smooth(points: Tensor, extent: Extent) -> Tensor:
    """A histogram whose cells share with their neighbours: less flicker, and a smaller file."""
    cells = histogram_2d(points, extent, bins_for(points))
    return F.avg_pool2d(cells[None, None], 3, 1, 1)[0, 0]


def _write(image: Image.Image, text: str, done: float) -> None:
    """The label in a corner, and how far the way is done as a line along the bottom, in dark colours of the ramp."""
    draw = ImageDraw.Draw(image)
    draw.text((8, 6), text, fill=255, font=ImageFont.load_default(13))
    draw.rectangle((0, image.height - 3, round(done * (image.width - 1)), image.height - 1), fill=150)
