"""A comparison as one page that needs nothing from outside, and as Markdown."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from genflow.evaluation.comparison import HIGHER, LOWER, Cell, Comparison, Entry
from genflow.evaluation.comparison_plots import inline_svg, plot_learning, plot_quality
from genflow.evaluation.plan import number

METRIC_OF = {
    **dict.fromkeys(("bits/dim", "nats", "nats of tokens"), "likelihood"),
    **{"FD": "fd", "KID": "kid", "R@1": "alignment", "R@10": "alignment"},
    **dict.fromkeys(("precision", "recall"), "precision-recall"),
    **dict.fromkeys(("density", "coverage"), "density-coverage"),
}
SPREAD = "After ± stands the standard error of a mean, of KID the standard deviation over its subsets."
CELL = 96  # pixels of a picture on the page, at least
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2129; --soft: #59616e; --faint: #8b93a1; --rule: #dfe3ea;
  --best: #e4f3e6; --note: #fff4d6; --series-0: #2563c9; --series-1: #c2410c; --series-2: #15803d; --series-3: #9333b8;
  --series-4: #0e7490; --series-5: #b4255a; --series-6: #7a6312; --series-7: #475569; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --ink: #e8eaee; --soft: #a8b0bd; --faint: #7c8594;
  --rule: #2d333d; --best: #173a22; --note: #3d3114; --series-0: #7aa7f7; --series-1: #f59466; --series-2: #6fd08c;
  --series-3: #d39bf0; --series-4: #5cc7dc; --series-5: #f28ab2; --series-6: #d9bd55; --series-7: #a3b1c6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, figcaption, .small, li { max-width: 46rem; } .lead, figcaption, .small { color: var(--soft); font-size: .9rem; }
.note { background: var(--note); padding: .7rem 1rem; border-radius: .4rem; max-width: none; }
.scroll { overflow-x: auto; } figure { margin: 0 0 1rem; } svg { width: 100%; height: auto; max-width: 62rem; }
svg text { font-family: inherit !important; fill: var(--ink); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .45rem .8rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap;
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead th { font-weight: 600; vertical-align: bottom; } tbody th { font-weight: 600; }
td.on, th.on { text-align: left; white-space: normal; min-width: 18rem; font-size: .8rem; color: var(--soft); }
td.best { background: var(--best); font-weight: 700; } td .error, th .family { color: var(--soft);
  font-weight: 400; font-size: .8rem; display: block; } td.real { color: var(--soft); }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
.pictures td, .pictures th { padding: .3rem; text-align: center; white-space: normal; font-weight: 400;
  font-size: .78rem; min-width: 6rem; } .pictures th:first-child { text-align: left; min-width: 9rem; font-weight: 600; }
.pictures img { image-rendering: pixelated; border-radius: .25rem; display: block; margin: 0 auto; }
img { max-width: 100%; height: auto; } details { border-top: 1px solid var(--rule); padding: .5rem 0; }
summary { cursor: pointer; font-weight: 600; } pre { overflow-x: auto; font-size: .8rem; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .88rem; } dt { font-weight: 600; }
dd { margin: 0; color: var(--soft); }
"""


def tag(name: str, *content: str, **attributes: object) -> str:
    """An element of HTML around content that is HTML already. An underscore at an attribute's end is left out."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value not in (None, "")
    )
    return f"<{name}{words}>{''.join(content)}</{name}>"


def to_html(comparison: Comparison, made: Sequence[Mapping[str, Any]]) -> str:
    """The page. made: what made the figures of each model, as JSON has it."""
    names = [entry.who.name for entry in comparison.entries]
    title = f"{', '.join(names[:-1])} and {names[-1]}"
    parts = [
        tag("h1", escape(title)),
        tag("p", "Models compared by genflow: the same figures, prompts and seeds of each.", class_="lead"),
        *(tag("p", escape(notice), class_="note", role="note") for notice in comparison.notices),
        tag("h2", "Summary"),
        tag("div", _table(comparison), class_="scroll"),
        _legend(comparison),
        _left_out(comparison),
        tag("h2", "Samples"),
        _samples(comparison),
        *_plot(
            plot_quality(comparison),
            "quality",
            "Quality against cost",
            "Fréchet distance against network evaluations, and against seconds for a sample",
            "Each model in its own way to sample, with other numbers of steps; a model without steps is one point. "
            "Seconds are of this machine, drawn in batches, both axes logarithmic.",
        ),
        *_plot(
            plot_learning(comparison),
            "training",
            "Training",
            "Losses over the samples seen in training",
            "Lines are running medians of the training loss, dots the validation loss, of the averaged weights where "
            "there are any. Losses of different kinds do not compare, and have panels of their own.",
        ),
        *_nearest(comparison),
        tag("h2", "What the figures hang on"),
        *(_made(entry, by) for entry, by in zip(comparison.entries, made, strict=True)),
    ]
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        tag("title", escape(title)),
        tag("style", STYLE),
    ]
    body = tag("main", *(f"{part}\n" for part in parts if part))
    return f"<!DOCTYPE html>\n{tag('html', tag('head', *head), tag('body', body), lang='en')}\n"


# -------------------------------------------------------------------------------------------------------------- summary


def _table(comparison: Comparison) -> str:
    """A row for each figure, a column for each model, the real samples and how it was measured."""
    common = _common_real(comparison)
    arrows = {**dict.fromkeys(LOWER, " ↓"), **dict.fromkeys(HIGHER, " ↑")}
    head = [tag("th", "figure", scope="col")]
    for i, entry in enumerate(comparison.entries):
        family = tag("span", escape(entry.family), class_="family")
        head.append(tag("th", _swatch(i), escape(entry.who.name), family, scope="col"))
    head += [tag("th", "real samples", scope="col")] * bool(common) + [
        tag("th", "measured on", scope="col", class_="on")
    ]
    rows = []
    for column in comparison.columns:
        cells = [tag("th", escape(column) + arrows.get(column, ""), scope="row")]
        cells += [_cell(comparison, entry, column, common) for entry in comparison.entries]
        cells += [tag("td", _short(column, common[column]) if column in common else "", class_="real")] * bool(common)
        rows.append(tag("tr", *cells, tag("td", escape(_measured_on(comparison, column)), class_="on")))
    return tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), id_="summary")


def _cell(comparison: Comparison, entry: Entry, column: str, common: Mapping[str, float]) -> str:
    name, cell = entry.who.name, entry.row.get(column)
    if cell is None:
        return tag("td", "–", title=_why_not(entry, column), data_run=name, data_figure=column)
    more = "" if cell.error is None else tag("span", f"± {_short(column, cell.error)}", class_="error")
    if cell.real is not None and column not in common:
        more += tag("span", f"real {_short(column, cell.real)}", class_="error")
    about: dict[str, Any] = {"data_run": name, "data_figure": column, "data_value": repr(cell.value)}
    return tag("td", _short(column, cell.value), more, class_="best" * (name in _best(comparison, column)), **about)


def _best(comparison: Comparison, column: str) -> set[str]:
    """The models whose figure reads as the best one's does; none where all read alike."""
    told = {e.who.name: _short(column, e.row[column].value) for e in comparison.entries if column in e.row}
    best = {told[name] for name in comparison.best(column)}
    return {name for name, text in told.items() if text in best} if len({*told.values()}) > 1 else set()


def _measured_on(comparison: Comparison, column: str) -> str:
    """How a figure was measured, by model where that differs."""
    said: dict[str, list[str]] = {}
    for entry in comparison.entries:
        if (cell := entry.row.get(column)) and cell.on:
            said.setdefault(cell.on, []).append(entry.who.name)
    return "; ".join(on if len(said) == 1 else f"{', '.join(names)}: {on}" for on, names in said.items())


def _common_real(comparison: Comparison) -> dict[str, float]:
    """What real samples have, by figure, where it is the same for all models."""
    found = {}
    for column in comparison.columns:
        values = {e.row[column].real for e in comparison.entries if column in e.row}
        if comparison.same_data and len(values) == 1 and (value := values.pop()) is not None:
            found[column] = value
    return found


def _why_not(entry: Entry, column: str) -> str:
    """The reason why a model has no figure of that name, in its own words."""
    return entry.found.left_out.get(METRIC_OF.get(column, ""), "")


def _swatch(i: int) -> str:
    return tag("span", class_="swatch", style=f"background: var(--series-{i % 8})")


def _short(column: str, value: float) -> str:
    if column == "parameters":
        return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.1f} K"
    if column == "memory":
        return f"{value:.0f} MiB"
    if column == "seconds":
        return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"
    return f"{value:.0f}" if column == "NFE" else number(value)


def _legend(comparison: Comparison) -> str:
    features = ", ".join(sorted({entry.who.features.name for entry in comparison.entries}))
    return tag(
        "p",
        f"↓ lower is better, ↑ higher; the best is shaded, but where figures do not compare. Distances are of features "
        f"{escape(features)}. {SPREAD} A dash: the model cannot honestly have it (below).",
        class_="small",
    )


def _left_out(comparison: Comparison) -> str:
    items = [
        tag("li", tag("b", escape(", ".join(names))), ": ", escape(remark))
        for remark, names in _remarks(comparison).items()
    ]
    return tag("h2", "What was left out, and what to be careful with") + tag("ul", *items) if items else ""


def _remarks(comparison: Comparison) -> dict[str, list[str]]:
    """Each remark, and of which models it is true."""
    said: dict[str, list[str]] = {}
    for entry in comparison.entries:
        for remark in entry.found.remarks:
            said.setdefault(remark, []).append(entry.who.name)
    return said


# ------------------------------------------------------------------------------------------------------------- pictures


def _samples(comparison: Comparison) -> str:
    scattered = [entry for entry in comparison.entries if len(entry.who.flow.shape) == 1]
    drawn = [entry for entry in comparison.entries if len(entry.who.flow.shape) == 3]
    parts = [
        _figure(e.pictures[0], f"Data, and {e.who.name}'s samples of the first seeds.")
        if e.pictures
        else tag("p", escape(f"{e.who.name}: {e.no_pictures}"))
        for e in scattered
    ]
    if drawn:
        heard = {tuple(e.prompts) for e in drawn if any(e.prompts)}  # a model that hears nothing fits in any column
        rows, known = [], set()
        if len(heard) == 1:
            rows.append(tag("tr", tag("th"), *(tag("th", escape(p), scope="col") for p in next(iter(heard)))))
        for entry in drawn:
            captions = entry.prompts if len(heard) > 1 else [""] * len(entry.prompts)
            if entry.real_pictures and (entry.identity, entry.split) not in known:
                known.add((entry.identity, entry.split))
                rows.append(_row(tag("th", f"real, {entry.split}", scope="row"), entry.real_pictures, captions))
            name = tag("th", _swatch(comparison.entries.index(entry)), escape(entry.who.name), scope="row")
            if entry.no_pictures:
                rows.append(tag("tr", name, tag("td", escape(entry.no_pictures), colspan=len(entry.prompts))))
            else:
                rows.append(_row(name, entry.pictures, captions))
        first = comparison.plan.seed
        caption = (
            f"Seeds {first} to {first + max(len(e.prompts) - 1 for e in drawn)} in each row, a column a seed"
            f"{' and a prompt' * bool(heard)}; nothing was chosen. Every model samples in its own way (at the end)."
        )
        table = tag("div", tag("table", tag("tbody", *rows)), class_="scroll pictures")
        parts.append(tag("figure", table, tag("figcaption", escape(caption))))
    return "".join(parts)


def _row(name: str, pictures: Sequence[Image.Image], captions: Sequence[str]) -> str:
    cells = [tag("td", _picture(image, caption), escape(caption)) for image, caption in zip(pictures, captions)]
    return tag("tr", name, *cells)


def _picture(image: Image.Image, alt: str) -> str:
    """The picture itself, enlarged by the page and not in its bytes."""
    zoom = max(1, -(-CELL // max(image.size)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = {"width": image.width * zoom, "height": image.height * zoom}
    words = "".join(f' {key}="{value}"' for key, value in size.items())
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt or "a sample")}"{words}>'


def _figure(image: Image.Image, caption: str) -> str:
    return tag("figure", _picture(image, caption), tag("figcaption", escape(caption)))


def _plot(figure: Any, name: str, title: str, label: str, caption: str) -> list[str]:
    if figure is None:
        return []
    return [
        tag("h2", escape(title)),
        tag("figure", inline_svg(figure, name, label), tag("figcaption", escape(caption)), id_=name),
    ]


def _nearest(comparison: Comparison) -> list[str]:
    shown = [entry for entry in comparison.entries if entry.found.picture is not None]
    if not shown:
        return []
    caption = "The samples that lie nearest to a training picture, each beside its nearest ones: is it memory?"
    parts = [tag("h2", "Nearest training pictures"), tag("p", caption, class_="small")]
    for entry in shown:
        assert entry.found.picture is not None
        picture = _picture(entry.found.picture.image, f"{entry.who.name}: samples and their nearest training pictures")
        parts.append(tag("details", tag("summary", escape(entry.who.name)), tag("div", picture, class_="scroll")))
    return parts


def _made(entry: Entry, made: Mapping[str, Any]) -> str:
    text = json.dumps({"sampling": dict(entry.who.sampling), **made}, indent=2, default=str)
    return tag("details", tag("summary", escape(entry.who.name)), tag("pre", escape(text)))


# ------------------------------------------------------------------------------------------------------------- markdown


def to_markdown(comparison: Comparison) -> str:
    """The summary and the remarks."""
    common = _common_real(comparison)
    heads = [f"{_plain(entry.who.name)}: {entry.family}" for entry in comparison.entries] + ["real samples"] * bool(
        common
    )
    lines = [*(f"> {notice}\n" for notice in comparison.notices), f"| figure | {' | '.join(heads)} |"]
    lines.append("|---" * (len(heads) + 1) + "|")
    for column in comparison.columns:
        cells = [_md(comparison, entry, column, entry.row.get(column)) for entry in comparison.entries]
        cells += [_short(column, common[column]) if column in common else ""] * bool(common)
        lines.append(f"| {column} | {' | '.join(cells)} |")
    lines += ["", *(f"- {', '.join(map(_plain, names))}: {remark}" for remark, names in _remarks(comparison).items())]
    return "\n".join([*lines, "", SPREAD]) + "\n"


def _plain(text: str) -> str:
    """A person's words within a table."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def _md(comparison: Comparison, entry: Entry, column: str, cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = _short(column, cell.value) + ("" if cell.error is None else f" ± {_short(column, cell.error)}")
    return f"**{text}**" if entry.who.name in _best(comparison, column) else text
