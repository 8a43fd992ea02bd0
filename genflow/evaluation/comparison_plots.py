"""The plots of a comparison, as SVG that takes its colours and letters from the page around it."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from genflow.evaluation.comparison import Comparison, Entry
from genflow.evaluation.plots import (
    FAINT,
    INK,
    MARKERS,
    STYLE,
    THERE_AND_BACK,
    _figure,
    _series,
    _smooth,
    _training,
    labelled,
    styled,
)
from genflow.flows.latent import velocity_flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins in matplotlib's output for the page's variables: each is a colour that nothing else has.
SERIES = tuple(f"#0{i}0{i}f{i}" for i in range(8))
LINES = ("-", ":", "-.")  # of the first eight models, of the next
GRID = str(STYLE["grid.color"])
COLOURS = {INK: "--ink", FAINT: "--faint", GRID: "--rule", **{c: f"--series-{i}" for i, c in enumerate(SERIES)}}


@styled
def plot_quality(comparison: Comparison) -> Figure | None:
    """The Frechet distance against evaluations and against seconds, a line for each model; None where none has one."""
    entries = [entry for entry in comparison.entries if entry.curve]
    if not entries:
        return None
    figure = _figure(9.6, _height(3.8, entries))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, what in ((left, "nfe"), (right, "seconds")):
        for number, entry in _numbered(comparison, entries):
            x, y = [getattr(p, what) for p in entry.curve], [p.fd for p in entry.curve]
            axes.plot(x, y, label=_named(entry), marker=MARKERS[number % len(MARKERS)], **_look(number))
        _real_line(axes, comparison)
        axes.set(xscale="log", yscale="log")
        axes.minorticks_off()
        for axis in (axes.xaxis, axes.yaxis):
            _plain_ticks(axis)
    left.set(xlabel="network evaluations for a sample", ylabel="Fréchet distance, lower is better")
    right.set(xlabel="seconds for a sample, of a batch")
    right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _look(number: int) -> dict[str, Any]:
    """Of a model's lines, by its place: a colour and, where those are used up, dashes."""
    return {"color": SERIES[number % 8], "linestyle": LINES[number // 8 % len(LINES)]}


def _named(entry: Entry) -> str:
    """Its name for a legend, whole, in short lines."""
    return labelled("\n".join(textwrap.wrap(entry.who.name, 28)))


def _height(least: float, entries: Sequence[Entry]) -> float:
    """In inches, so that a legend has room beside or in a panel."""
    return max(least, 1 + 0.22 * sum(_named(entry).count("\n") + 1 for entry in entries))


def _plain_ticks(axis: Any) -> None:
    """1, 2 and 5 of each decade, written out; where these are too few, equal steps."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    low, high = axis.get_view_interval()
    decades = np.log10(max(high / low, 1.0001))
    few = decades < 0.7
    axis.set_major_locator(
        MaxNLocator(5, steps=[1, 2, 5, 10]) if few else LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _real_line(axes: Axes, comparison: Comparison) -> None:
    real = {cell.real for e in comparison.entries if (cell := e.row.get("FD")) and cell.real}
    if comparison.same_data and len(real) == 1:
        axes.axhline(real.pop(), color=FAINT, linestyle="--", linewidth=1, label="real to real")


def _numbered(comparison: Comparison, entries: Sequence[Entry]) -> list[tuple[int, Entry]]:
    return [(number, entry) for number, entry in enumerate(comparison.entries) if entry in entries]


@styled
def plot_learning(comparison: Comparison) -> Figure | None:
    """The losses over the samples seen in training, a panel for each kind of loss; None where no run keeps its metrics."""
    kinds: dict[str, list[Entry]] = {}
    for entry in comparison.entries:
        if len(_training(entry.who.lines)[0]):
            kinds.setdefault(_loss_of(entry), []).append(entry)
    if not kinds:
        return None
    figure = _figure(max(4.8 * len(kinds), 5.6), max(_height(3.6, entries) for entries in kinds.values()))
    for axes, (kind, entries) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        for number, entry in _numbered(comparison, entries):
            batch = (entry.who.flow.recipe or {}).get("train", {}).get("batch_size", 1)
            steps, loss = _smooth(*_training(entry.who.lines))
            checks, validation = _series(entry.who.lines, "validation_loss")
            look, dots = _look(number), f"{MARKERS[number % len(MARKERS)]}--"
            axes.plot(steps * batch, loss, linewidth=0.9, label=_named(entry), **look)
            axes.plot(checks * batch, validation, dots, color=look["color"], markersize=3.5)
        axes.set(xlabel="samples seen", ylabel=kind)
        if all(v > 0 for e in entries for v in _training(e.who.lines)[1]):
            axes.set_yscale("log")
            axes.minorticks_off()
            _plain_ticks(axes.yaxis)
        axes.legend()
    return figure


def _loss_of(entry: Entry) -> str:
    """What a run's loss is of, in words."""
    flow, keys = entry.who.flow, {key for line in entry.who.lines for key in line}
    if any(key.startswith("loss_t") for key in keys):
        inner: Any = velocity_flow(flow)
        what = "noise" if inner.config.prediction == "eps" else "velocity"
        return f"squared error of the {what}{'' if inner is flow else ' of latents'}"
    if "l1" in keys:
        return THERE_AND_BACK
    unit = flow.unit
    return "nats a token" if unit == "nats of tokens" else f"-log p, {unit}"


@styled
def inline_svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an <svg> for the inside of a page: its own names begin with `name`, and its colours are the page's."""
    import matplotlib

    buffer = io.StringIO()
    nothing: Mapping[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=dict(nothing), transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    text = re.sub(r"<[^>]*>", _recoloured, text)
    opening = rf'<svg role="img" aria-label="{label}" viewBox="\1">'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', opening, text, count=1)
    return text.strip()


def _recoloured(tag: re.Match[str]) -> str:
    """In elements alone: a run may be called black."""
    text = tag[0]
    for colour, variable in COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r"#000000\b|\bblack\b", "var(--ink)", text)
