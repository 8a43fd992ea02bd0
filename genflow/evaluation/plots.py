"""Plots of a model: its training, its solves step by step, their errors, and time grids. matplotlib, without a screen.

Each function takes plain data and returns a Figure; `save_plot` writes it. matplotlib's global state is left alone.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from genflow.data.pictures import write_atomic
from genflow.errors import UserError
from genflow.functional import log_snr
from genflow.registry import api_export, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")
INK, FAINT, ACCENT = "#222222", "#9a9a9a", "#c8102e"
HUES = {"runge_kutta": "Blues", "adams": "Oranges", "exponential": "Greens"}  # of the modules that hold the samplers
MARKERS = "osD^vP"
COLUMNS = 11  # of a strip, at most
TITLE = 40  # letters that a panel has room for
THERE_AND_BACK = "error there and back, and penalties"
STYLE: Any = {
    "figure.dpi": 150,
    "text.parse_math": False,  # captions and names are a person's own
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.hashsalt": "genflow",  # the same plot is the same file
}


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs in the style of these plots. Raises UserError where matplotlib is missing."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            import matplotlib.figure
        except ImportError as error:
            raise UserError("plots need matplotlib: pip install matplotlib") from error
        with matplotlib.rc_context(STYLE):
            drawn = function(*args, **kwargs)
        if isinstance(drawn, matplotlib.figure.Figure):
            _plain_ticks(drawn)
        return drawn

    return wrapped


def _plain_ticks(figure: Figure) -> None:
    """Numbers on logarithmic axes as plain text: matplotlib writes them as formulas, which the style does not read."""
    from matplotlib.ticker import LogFormatter, LogFormatterMathtext, StrMethodFormatter

    class Plain(LogFormatter):
        """Labels the same ticks."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return super().__call__(x, pos) and f"{x:g}"

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        if isinstance(axis.get_minor_formatter(), LogFormatterMathtext):
            axis.set_minor_formatter(Plain())


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@api_export("save_plot")
@styled
def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure, as the ending of path says, .png or .svg, whole or not at all. Raises UserError for another one."""
    kind = path.suffix.removeprefix(".")
    if kind not in ("png", "svg"):
        raise UserError(f"{path}: a plot is a .png or .svg")
    metadata = {"Date": None} if kind == "svg" else None
    write_atomic(path, lambda file: figure.savefig(file, format=kind, metadata=metadata))


def labelled(name: str, most: int | None = None) -> str:
    """A name as a legend takes it, of `most` letters: matplotlib leaves out those that begin with an underscore."""
    name = name if most is None or len(name) <= most else f"{name[: most - 1]}…"
    return f"\u200b{name}" if name.startswith("_") else name


# ------------------------------------------------------------------------------------------------------------- training


@api_export("plot_training")
@styled
def plot_training(lines: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """The lines of metrics.jsonl: the loss, faint as it was and its running median, its validation, and the loss by time.

    A flow whose loss has no times is one of likelihood: it has one panel. Raises UserError where there is no loss in them.
    """
    import matplotlib

    steps, loss = _training(lines)
    if not len(steps):
        raise UserError("there is no loss to plot yet; let the run write its first line of metrics")
    bins = sorted({key for line in lines for key in line if key.startswith("loss_t")})
    figure = _figure(9 if bins else 5.5, 3.4)
    panels = figure.subplots(1, 2 if bins else 1, squeeze=False)[0]
    left = panels[0]
    left.plot(steps, loss, color=FAINT, linewidth=0.5, alpha=0.6)
    left.plot(*_smooth(steps, loss), color=INK, marker=_dot(steps), label="training, running median")
    checks, validation = _series(lines, "validation_loss")
    if len(checks):
        left.plot(checks, validation, "o-", color=ACCENT, label="validation")
    what = "mean squared error of the prediction" if bins else "negative log-likelihood (bits/dim, or nats)"
    if any("l1" in line for line in lines):  # an autoencoder's
        what = THERE_AND_BACK
    left.set(title=labelled(f"Loss {title}".strip(), TITLE), xlabel="optimiser step", ylabel=what)
    left.legend()
    if not bins:
        return figure
    right = panels[1]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(bins)))
    for key, colour in zip(bins, colours, strict=False):
        begin = float(key.removeprefix("loss_t"))
        series, label = _series(lines, key), f"{begin:.3g} – {begin + 1 / 8:.3g}"
        right.plot(*_smooth(*series), color=colour, marker=_dot(series[0]), label=label)
    right.set(title="By time, running medians", xlabel="optimiser step")
    for axes in panels:
        axes.set_yscale("log")
    right.legend(title="t (0 = data)", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    return figure


def _dot(steps: np.ndarray) -> str:
    """A marker where one point makes no line."""
    return "o" if len(steps) == 1 else ""


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    steps, values = zip(*pairs) if pairs else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def _training(lines: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The training loss, where it has a likelihood that alone: penalties and drafts are not in the validation either."""
    alone = (_series(lines, key) for key in ("bits_per_dim", "nll"))
    return next((series for series in alone if len(series[0])), _series(lines, "loss"))


def _smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median of a thirtieth of the values around each, at most 500 of them."""
    half = len(values) // 60
    places = np.unique(np.linspace(0, max(len(values) - 1, 0), min(len(values), 500)).round().astype(int))
    medians = [np.median(values[max(i - half, 0) : i + half + 1]) for i in places]
    return steps[places], np.array(medians)


# --------------------------------------------------------------------------------------------------------------- solves


@api_export("plot_strip")
@styled
def plot_strip(times: Sequence[float], states: Tensor, predictions: Tensor, captions: Sequence[str]) -> Figure:
    """What a solve goes through: for each picture a row of states and a row of the pictures that they foretell.

    times: N + 1, of which at most COLUMNS are shown; states, predictions (x = z - t v): N + 1 x B x C x H x W in about
    [-1, 1]. Raises UserError for anything but 1 or 3 channels.
    """
    if states.shape[2] not in (1, 3):
        raise UserError(f"a strip shows pictures of 1 or 3 channels, and these have {states.shape[2]}")
    columns = np.unique(np.linspace(0, len(times) - 1, min(len(times), COLUMNS)).round().astype(int))
    count = len(captions)
    figure = _figure(0.95 * len(columns) + 1.2, 1.92 * count + 0.25)
    figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0, wspace=0)  # type: ignore[union-attr, call-arg]
    cells = figure.subplots(2 * count, len(columns), squeeze=False)
    for row in range(2 * count):
        shown, label = (states, "state z") if row % 2 == 0 else (predictions, "z − t v")
        for axes, column in zip(cells[row], columns, strict=True):
            axes.imshow(_pixels(shown[column, row // 2]), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        cells[row, 0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="top")  # beneath the caption
    for axes, column in zip(cells[0], columns, strict=True):
        axes.set_title(f"t = {times[column]:.3g}", fontsize=8, fontweight="normal", loc="center")
    for caption, axes in zip(captions, cells[::2, 0], strict=True):
        text = "\n".join(textwrap.wrap(caption, 16, max_lines=3, placeholder="…"))
        axes.annotate(text, (-0.08, 1), xycoords="axes fraction", ha="right", va="top", fontweight="bold")
    return figure


def _pixels(x: Tensor) -> np.ndarray:
    """C x H x W in [-1, 1] -> H x W x 3 in [0, 1]."""
    return ((x.float().cpu().clamp(-1, 1) + 1) / 2).permute(1, 2, 0).expand(-1, -1, 3).numpy()


@api_export("plot_trajectories")
@styled
def plot_trajectories(
    times: Sequence[float],
    states: Tensor,
    captions: Sequence[str],
    *,
    few: tuple[Sequence[float], Tensor] | None = None,
    title: str = "few steps",
) -> Figure:
    """Fine trajectories in the plane of their two largest principal components, and how far they leave straight lines.

    times: N + 1; states: N + 1 x B x C x H x W. few: times and states of a solve of few steps from the same noise, drawn
    over them. The second panel has the root mean square distance per value to the chord from noise to data.
    """
    import matplotlib
    from matplotlib.collections import LineCollection
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    flat = states.flatten(2).float().cpu()
    centre = flat.flatten(0, 1).mean(0)
    _, _, axes_of = torch.linalg.svd(flat.flatten(0, 1) - centre, full_matrices=False)
    axes_of = torch.nn.functional.pad(axes_of[:2], (0, 0, 0, 2 - len(axes_of[:2])))  # one number has one
    plane = axes_of.T / math.sqrt(flat.shape[-1])  # a distance is then a root mean square over the values
    points = ((flat - centre) @ plane).numpy()
    figure = _figure(10, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    colours = matplotlib.colormaps["tab10"](np.arange(flat.shape[1]) % 10)
    for i in range(flat.shape[1]):
        way = points[:, i]
        lines = LineCollection(
            list(np.stack([way[:-1], way[1:]], 1)), cmap="viridis_r", array=np.array(times[:-1]), linewidth=3
        )
        left.add_collection(lines)
        left.plot(*way[0], "o", color=INK, markersize=3)
        if states.shape[2] in (1, 3):
            box = OffsetImage(_pixels(states[-1, i]), zoom=20 / max(states.shape[3:]), interpolation="nearest")
            frame = {"edgecolor": colours[i], "linewidth": 1.5, "boxstyle": "square,pad=0.1"}
            left.add_artist(AnnotationBbox(box, way[-1], frameon=True, bboxprops=frame, pad=0.1))
    if few is not None:
        dots: Any = {"marker": "o", "markersize": 3, "markerfacecolor": "white", "linewidth": 0.6}
        steps = ((few[1].flatten(2).float().cpu() - centre) @ plane).numpy()
        for i in range(steps.shape[1]):
            left.plot(*steps[:, i].T, color=ACCENT, label=title if i == 0 else None, **dots)
        left.legend(loc="best")
    figure.colorbar(lines, ax=left, label="t (1 = noise, 0 = data)", pad=0.01, aspect=30)
    left.set(title="Trajectories, first two principal components", xlabel="component 1, RMS per value")
    left.set(ylabel="component 2, RMS per value")
    left.set_aspect("equal", adjustable="datalim")
    left.margins(0.12)
    left.autoscale_view()
    t = torch.tensor(times, dtype=torch.float32).view(-1, 1, 1)
    gone = (t - t[-1]) / (t[0] - t[-1])  # some flows begin below t = 1
    bend = (flat - (1 - gone) * flat[-1] - gone * flat[0]).square().mean(2).sqrt().numpy()
    for i, caption in enumerate(captions):
        right.plot(times, bend[:, i], color=colours[i], label=labelled(caption, 28))
    right.set(title="Distance from the straight line", xlabel="t (1 = noise, 0 = data)", ylabel="RMS per value")
    right.set(xlim=(1, 0), ylim=(0, None))
    if any(captions):
        right.legend(fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------- errors and grids


@api_export("plot_errors")
@styled
def plot_errors(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    tuned: Sequence[tuple[int, float]] = (),
    floor: float = 0.0,
    title: str = "Error against evaluations",
) -> Figure:
    """RMSE to a fine solve against evaluations, a line for each sampler; both axes are logarithmic.

    curves: a sampler, or one with a remark ("euler, equal steps"; dashed) -> (nfe, RMSE) pairs; tuned: such pairs of
    learnt grids, as stars; floor: the RMSE of the fine solve.
    """
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    figure = _figure(7.6, 4.6)
    axes = figure.subplots()
    order = sorted(curves, key=lambda name: -curves[name][-1][1] if curves[name] else 0.0)
    for name, (colour, marker) in zip(order, _looks(order), strict=True):
        nfe, error = zip(*curves[name]) if curves[name] else ((), ())
        axes.plot(nfe, error, "--" if "," in name else "-", marker=marker, color=colour, label=name)
    if tuned:
        axes.plot(*zip(*tuned), "*", color=ACCENT, markersize=11, label="tuned", zorder=5)
    axes.set(xscale="log", yscale="log", title=title, xlabel="network evaluations per picture")
    axes.set_ylabel("RMSE to the fine solve, pixels in [−1, 1]")
    axes.xaxis.set_major_locator(FixedLocator([2**k * m for k in range(12) for m in (2, 3)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    if floor > 0:
        low, high = axes.get_ylim()
        axes.axhspan(1e-12, floor, color="#f0f0f0", zorder=0)
        axes.set_ylim(min(low, floor / 1.6), high)  # of which the words take a part
        axes.annotate("the fine solve itself", (0.01, floor), xycoords=("axes fraction", "data"), va="top", color=FAINT)
    _decibels(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.12, 0.5))
    return figure


def _decibels(axes: Axes) -> None:
    """A second scale on the right: the PSNR of pictures in [-1, 1]."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = axes.get_ylim()
    right = axes.twinx()
    right.set(yscale="log", ylim=(low, high), ylabel="PSNR, dB")
    right.spines["right"].set_visible(True)
    right.grid(False)
    levels = [d for d in range(0, 200, 10) if low <= 2 / 10 ** (d / 20) <= high]
    right.yaxis.set_major_locator(FixedLocator([2 / 10 ** (d / 20) for d in levels]))
    right.yaxis.set_minor_locator(NullLocator())
    right.set_yticklabels([str(d) for d in levels])


def _looks(samplers: Sequence[str]) -> list[tuple[Any, str]]:
    """A colour and a marker for each sampler: its module gives the hue, its place there the shade."""
    import matplotlib

    homes = [resolve("sampler", name.partition(",")[0]).__module__.rpartition(".")[2] for name in samplers]
    looks = []
    for i, home in enumerate(homes):
        place, size = homes[:i].count(home), homes.count(home)
        shade = 0.45 + 0.5 * place / max(size - 1, 1)
        looks.append((matplotlib.colormaps[HUES.get(home, "Purples")](shade), MARKERS[place % len(MARKERS)]))
    return looks


@api_export("plot_grids")
@styled
def plot_grids(grids: Mapping[str, Sequence[float]], *, marked: Sequence[str] = (), title: str = "") -> Figure:
    """Time grids as rows of dots, over t and over log-SNR, in which the ends 1 and 0 are infinitely far. marked: in red."""
    figure = _figure(9, 0.28 * len(grids) + 1.1)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    rows = list(grids)[::-1]
    for y, name in enumerate(rows):
        colour = ACCENT if name in marked else INK
        times = list(grids[name])
        inner = [t for t in times if 0 < t < 1]
        left.plot(times, [y] * len(times), "o-", color=colour, linewidth=0.5)
        right.plot([log_snr(t) for t in inner], [y] * len(inner), "o-", color=colour, linewidth=0.5)
    left.set(
        title="Time", xlabel="t (1 = noise, 0 = data)", xlim=(1.02, -0.02), yticks=range(len(rows)), yticklabels=rows
    )
    right.set(title="Log-SNR, without the ends", xlabel="λ = log((1 − t) / t)", ylim=(-0.6, len(rows) - 0.4))
    return figure
