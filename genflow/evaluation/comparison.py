"""Several models side by side: the same figures of each, distances at every cost, the same prompts and seeds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genflow.data.pictures import to_picture
from genflow.data.points import point_picture
from genflow.errors import UserError
from genflow.evaluation.bench import Side, peak_memory
from genflow.evaluation.features import FeatureNetwork, as_samples
from genflow.evaluation.plan import Bar, Evaluation, Plan, no_bar
from genflow.evaluation.report import Reals, evaluate
from genflow.flows.base import Flow
from genflow.flows.latent import velocity_flow
from genflow.flows.store import load
from genflow.registry import api_export

SHOWN = 8  # pictures of a model
POINTS = 2000  # of a model of vectors
ORDER = ("bits/dim", "nats", "nats of tokens", "FD", "R@1", "R@10", "KID", "precision", "recall", "density", "coverage")
LOWER = {"FD", "KID", "bits/dim", "nats", "seconds", "parameters", "memory", "NFE"}
HIGHER = {"precision", "recall", "coverage", "R@1", "R@10"}
OWN = {"seconds", "parameters", "memory", "NFE"}  # of the model alone, whatever its data
HELD_OUT = {"bits/dim", "nats", "R@1", "R@10"}


@api_export("Contestant")
@dataclass(frozen=True)
class Contestant:
    """One model of a comparison.

    model: its folder; ema: whether these are its averaged weights; data: its data set's config; section: the same as a
    config has it; sampling: its own settings; by_steps: those for other numbers of steps, none for a flow that has no
    steps; lines: of its metrics.jsonl.
    """

    name: str
    flow: Flow
    model: str
    ema: bool
    data: Any
    section: Mapping[str, Any]
    features: FeatureNetwork
    sampling: Mapping[str, Any]
    by_steps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    lines: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Point:
    """What a number of steps costs and gives. nfe: evaluations for a sample; seconds: for a sample, of its batch."""

    steps: int | None
    nfe: int
    seconds: float
    fd: float


@dataclass(frozen=True)
class Cell:
    """A figure with its spread, what real samples have, and what it hangs on."""

    value: float
    error: float | None = None
    real: float | None = None
    on: str = ""


@dataclass(frozen=True)
class Entry:
    """What was found of one model.

    row: its figures by name; identity: of the real samples that it was measured with; split: whose captions and real
    samples are shown; pictures: PIL images of `prompts`, or one scatter picture; no_pictures: why there are none.
    """

    who: Contestant
    found: Evaluation
    row: dict[str, Cell]
    curve: list[Point]
    identity: str
    split: str
    prompts: list[str]
    pictures: list[Any]
    real_pictures: list[Any]
    no_pictures: str = ""

    @property
    def family(self) -> str:
        """What kind of flow it is, and of which network where it has one."""
        network = getattr(self.who.flow, "network", None)
        return type(self.who.flow).__name__ + ("" if network is None else f" of {type(network).__name__}")


@api_export("Comparison")
@dataclass(frozen=True)
class Comparison:
    """entries, in the order asked; plan: what was asked of each; notices: what a reader must know first."""

    entries: list[Entry]
    plan: Plan
    notices: list[str]

    @property
    def same_data(self) -> bool:
        return len({entry.identity for entry in self.entries}) == 1

    @property
    def columns(self) -> list[str]:
        """Of the summary: the names of the figures, without those of the loss by time."""
        names = dict.fromkeys(name for entry in self.entries for name in entry.row if " at t = " not in name)
        return [*(name for name in ORDER if name in names), *(name for name in names if name not in ORDER)]

    def best(self, column: str) -> set[str]:
        """The names of the models with the best figure of a column; of none where that would mislead."""
        cells = {entry.who.name: entry.row[column].value for entry in self.entries if column in entry.row}
        ordered = column in LOWER | HIGHER
        held_out = {_held_out(self.plan, e.who) for e in self.entries if column in HELD_OUT and column in e.row}
        same = column in OWN or (self.same_data and len(held_out) < 2)
        if len(cells) < 2 or not ordered or not same or len(set(cells.values())) == 1:
            return set()
        best = (min if column in LOWER else max)(cells.values())
        return {name for name, value in cells.items() if value == best}


@api_export("compare")
def compare(
    contestants: Sequence[Contestant], plan: Plan, *, prompts: Sequence[str] = (), bar: Bar = no_bar
) -> Comparison:
    """Measure each as `genflow eval` does, then its distance in every number of steps, and draw the same prompts and seeds.

    plan.sampling is left out: each samples in its own way, models of a velocity in plan.dtype. A metric that a model cannot
    honestly have is left out of its row, with the reason. prompts: to draw; by default the first held-out captions. Raises
    UserError for fewer than two models, and for names that are not distinct.
    """
    names = [each.name for each in contestants]
    if len(contestants) < 2 or len(set(names)) < len(names):
        raise UserError(f"a comparison is of two models or more, each of a name of its own, and these are {names}")
    reals: dict[str, Reals] = {}
    entries = []
    for each in contestants:
        key = json.dumps([each.section, list(each.flow.shape), each.features.digest], default=str)
        named = partial(_of_model, bar, each.name)
        entries.append(_entry(each, plan, prompts, reals.setdefault(key, Reals()), named))
    notices = _notices(entries, plan)
    flows: list[Any] = [each.flow for each in contestants]
    if prompts and not any(flow.text.max_tokens for flow in flows):
        notices.append("None of these models hears a condition: the prompts were not drawn.")
    return Comparison(entries, plan, notices)


def _of_model(bar: Bar, name: str, what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    return bar(f"{name}: {what}", total)


def _entry(who: Contestant, plan: Plan, prompts: Sequence[str], reals: Reals, bar: Bar) -> Entry:
    count = min(plan.batch, plan.n or plan.batch)
    dtype = "fp32" if velocity_flow(who.flow) is None else plan.dtype
    draw = partial(_drawing, who.model, who.ema, who.flow.device, dict(who.sampling), count, plan.seed, dtype=dtype)
    memory = None if hasattr(who.flow, "no_samples") else peak_memory(draw, who.name, "sample", who.flow.device)

    def measured(sampling: Mapping[str, Any], metrics: Sequence[str]) -> Evaluation:
        asked = replace(plan, sampling=dict(sampling), metrics=tuple(metrics), dtype=dtype)
        about: dict[str, Any] = {"name": who.section["name"], "features": who.features, "bar": bar}
        try:
            return evaluate(who.flow, who.data, asked, **about, reals=reals, strict=False)
        except UserError as error:
            raise UserError(f"{who.name}: {error}") from error

    found = measured(who.sampling, plan.metrics)
    curve = [point] if (point := _point(found, who.sampling.get("steps") if who.by_steps else None)) else []
    for steps, sampling in who.by_steps.items() if curve else ():
        if sampling != who.sampling:
            again = _point(measured(sampling, ("fd",)), steps)
            curve += [again] if again else []
    row = {each.name: Cell(each.value, each.error, each.real, each.on) for each in found.figures}
    if found.counts.get("samples"):
        batch = f"{found.counts['samples']} samples in {dtype}, {plan.batch} at once, the captions' embedding included"
        row["seconds"] = Cell(_seconds(found), on=f"for a sample: {batch}; {who.flow.device}, {_threads()}")
        row["NFE"] = Cell(found.nfe, on="evaluations of the network for a sample; guidance doubles their cost")
    row["parameters"] = Cell(sum(p.numel() for p in who.flow.parameters() if p.requires_grad), on="that are trained")
    if memory is not None:
        row["memory"] = Cell(
            memory, on=f"MiB at the peak of drawing {count} at once in {dtype}, in a new process, with the weights"
        )
    split, known = _known(reals, plan, who)
    shown = _shown(who, plan, prompts, known)
    return Entry(who, found, row, sorted(curve, key=lambda p: p.nfe), _identity(who, reals, plan), split, *shown)


def _drawing(
    model: str,
    ema: bool,
    device: torch.device,
    sampling: dict[str, Any],
    count: int,
    seed: int,
    name: str,
    dtype: str = "fp32",
) -> Side:
    """The drawing of one batch, for its memory."""
    flow: Any = load(model, ema=ema, device=device)
    # A draft may have a text encoder of its own.
    heard = [""] * count if sampling.get("draft") else flow.text.null().to(device).expand(count)

    def sample() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            flow.sample(heard, seeds=range(seed, seed + count), **sampling)

    return Side.of(flow, {"sample": sample})


def _threads() -> str:
    return f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def _seconds(found: Evaluation) -> float:
    return found.seconds["sampling"] / (found.counts["samples"] + found.counts.get("alignment", 0))


def _point(found: Evaluation, steps: int | None) -> Point | None:
    fd = [each.value for each in found.figures if each.name == "FD"]
    return Point(steps, found.nfe, _seconds(found), fd[0]) if fd else None


# ------------------------------------------------------------------------------------------------------------- the data


def _known(reals: Reals, plan: Plan, who: Contestant) -> tuple[str, Any]:
    """The split whose captions are drawn, held-out where that was read, and its real samples."""
    for split in (plan.held_out(who.flow), "train"):
        if split in reals.samples:
            return split, reals.samples[split]
    return "", None


def _identity(who: Contestant, reals: Reals, plan: Plan) -> str:
    """Of the real samples themselves where they were read, for two configs may be of one data set."""
    known = reals.samples.get(plan.split or "train")
    if known is None:
        return json.dumps([who.section, who.flow.shape], default=str)
    count = min(len(known), 2 * (plan.n or 1000))
    return hashlib.blake2b(known.x[:count].contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _held_out(plan: Plan, who: Contestant) -> str:
    """What a model's likelihood is of: the split, how many grey levels tell its pictures apart, and what it was given."""
    flow: Any = who.flow
    levels = getattr(getattr(flow, "dequantize", None), "levels", 256)
    split = plan.held_out(flow) + (f" of {levels} grey levels" if levels < 256 else "")
    return split + (" given the captions" if flow.text.max_tokens else "")


def _notices(entries: Sequence[Entry], plan: Plan) -> list[str]:
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(entry.identity, []).append(entry)
    notices = []
    if len(kinds) > 1:
        told = "; ".join(f"{_and([e.who.name for e in group])}: {_about(group[0].who)}" for group in kinds.values())
        notices.append(
            f"These runs are of different data ({told}). Every distance and likelihood is against a run's own data: "
            "they do not compare, and none of them is marked as the best."
        )
    elif len({json.dumps(e.found.counts.get("samples")) for e in entries}) > 1:
        notices.append(
            "Not all were measured with as many samples; distances are biased, the more the fewer there are."
        )
    asked: dict[str, list[str]] = {}
    for entry in entries:
        if HELD_OUT & entry.row.keys():
            asked.setdefault(_held_out(plan, entry.who), []).append(entry.who.name)
    if len(kinds) == 1 and len(asked) > 1:
        told = "; ".join(f"{_and(names)}: {what}" for what, names in asked.items())
        notices.append(
            f"What is asked of held-out samples is not the same for all ({told}): likelihoods and R@k of different ones do "
            "not compare, nor is a best of them marked. A split for all is named by --split."
        )
    return notices


def _and(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def _about(who: Contestant) -> str:
    more = {k: v for k, v in who.section.items() if k not in ("name", "root", "path") and v not in (None, [], ())}
    path = who.section.get("path")
    told = ", ".join([*([Path(path).name] if path else []), *(f"{k} {v}" for k, v in list(more.items())[:3])])
    return f"{who.section['name']}{f' ({told})' if told else ''} as {' x '.join(map(str, who.flow.shape))}"


# --------------------------------------------------------------------------------------------------------- the pictures


def _shown(
    who: Contestant, plan: Plan, prompts: Sequence[str], known: Any
) -> tuple[list[str], list[Any], list[Any], str]:
    """Prompts, pictures of them, the real ones of these captions where they are known, and why there are none."""
    flow: Any = who.flow
    if len(flow.shape) == 1:
        return _scatter(who, plan, prompts, known)
    own = list(dict.fromkeys(known.captions))[:SHOWN] if known is not None else []
    wanted = list(prompts) or (own * SHOWN)[:SHOWN] or [""] * SHOWN
    heard = wanted if flow.text.max_tokens else [""] * len(wanted)
    try:
        x = flow.sample(heard, seeds=range(plan.seed, plan.seed + len(heard)), **who.sampling).x.cpu()
    except UserError as error:
        return wanted, [], [], str(error)
    real = []
    if known is not None and not prompts and len(own) > 1:
        real = [to_picture(as_samples(known.x[known.captions.index(caption)])).image for caption in wanted]
    return heard, [to_picture(each).image for each in x], real, ""


def _scatter(
    who: Contestant, plan: Plan, prompts: Sequence[str], known: Any
) -> tuple[list[str], list[Any], list[Any], str]:
    """One picture of samples of the prompts, or of the data's captions, in turn."""
    flow: Any = who.flow
    asked = list(prompts) if flow.text.max_tokens else []
    captions = asked or (known.captions if known is not None and flow.text.max_tokens else [""])
    heard, seeds = [captions[i % len(captions)] for i in range(POINTS)], range(plan.seed, plan.seed + POINTS)
    try:
        x: Tensor = flow.sample(heard, seeds=seeds, **who.sampling).x.cpu()
    except UserError as error:
        return asked or [""], [], [], str(error)
    panels = {"samples": x} if known is None else {"data": known.x, "samples": x}
    return asked or [""], [point_picture(panels).image], [], ""


def as_json(comparison: Comparison, made: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything but the pictures, as JSON has it. made: what made the figures of each model."""
    return {
        "notices": comparison.notices,
        "plan": {k: v for k, v in vars(comparison.plan).items() if k != "sampling"},
        "best": {column: sorted(comparison.best(column)) for column in comparison.columns},
        "runs": [
            {
                "name": entry.who.name,
                "model": entry.who.model,
                "family": entry.family,
                "data": dict(entry.who.section),
                "figures": {
                    name: {key: finite(value) for key, value in vars(cell).items()} for name, cell in entry.row.items()
                },
                "left_out": entry.found.left_out,
                "remarks": entry.found.remarks,
                "curve": [vars(point) for point in entry.curve],
                "sampling": dict(entry.who.sampling),
                "prompts": entry.prompts,
                "made": dict(by),
            }
            for entry, by in zip(comparison.entries, made, strict=True)
        ],
    }


def finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
