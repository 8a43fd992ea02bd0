"""What the claims share: runs trained once, figures measured once, the verdict, the table, the picture.

A claim is a script of this folder: `python scripts/claims/NAME.py [--work FOLDER] [--seeds 0 1 2] [--steps N]` trains
what it compares under --work, where finished runs and their figures are kept and taken up again, and writes NAME.md
and NAME.png.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genflow.cli.eval import data_of
from genflow.config import from_dict
from genflow.data.pictures import write_atomic
from genflow.evaluation.features import feature_network
from genflow.evaluation.plan import Plan, number
from genflow.evaluation.report import Reals, evaluate
from genflow.flows.store import load, newest_checkpoint

SHOWN, OPEN, CONTRADICTED = "shown", "not shown at this size", "contradicted"
STEPS = (5, 10, 25, 50)  # at which distances are measured
Results = dict[str, dict[str, list[float]]]  # by side and figure, one number for each seed

EMOJI: dict[str, Any] = {  # a text-to-image MM-DiT that learns something in a minute of one core
    "data": {"name": "emoji", "size": 16, "caption": "caption"},
    "text": {"name": "minilm", "max_tokens": 8},
    "model": {"name": "mmdit", "depth": 3, "hidden": 128, "heads": 4, "patch_size": 4},
    "flow": {"name": "rectified", "whiten": 0.1},
    "train": {
        "batch_size": 64,
        "optimizer": {"name": "adamw", "lr": 2e-3},
        "decay": 0.3,
        "log_every": 20,
        "save_every": 100_000,
        "preview_every": 0,
        "trackers": [],
    },
    "sample": {"sampler": "euler", "steps": 25, "guidance": 1.0},
}
_reals: dict[str, Reals] = {}


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def merged(section: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with changes of its sections; one that names another thing (`name`) takes the section's place."""
    out = dict(section)
    for key, value in changes.items():
        before = out.get(key)
        inner = isinstance(value, Mapping) and isinstance(before, Mapping)
        out[key] = merged(before, value) if inner and value.get("name") in (None, before.get("name")) else value
    return out


@dataclass(frozen=True)
class Study:
    """One claim: its words, where its runs and its table go, and how large it is."""

    name: str
    says: str
    work: Path
    out: Path
    seeds: Sequence[int]
    steps: int
    n: int
    features: str | None

    def train(self, side: str, seed: int, section: Mapping[str, Any], steps: int | None = None) -> Path:
        """The folder of a run, trained to its steps unless it is already."""
        folder = self.work / self.name / _plain(f"{side}-{seed}-{self.steps}")
        steps = steps or self.steps
        newest = newest_checkpoint(folder)
        if newest is None or int(newest.name.removeprefix("step-")) < steps:
            from genflow.training.config import RunConfig
            from genflow.training.run import train

            change = {"seed": seed, "out": str(folder), "train": {"steps": steps, "warmup": min(100, self.steps // 10)}}
            train(from_dict(RunConfig, merged(section, change)))
        return folder

    def kept(self, key: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Figures that are made once, for these steps and this n."""
        file = self.work / self.name / _plain(f"{key}-{self.steps}-{self.n}.json")
        if not file.exists():
            found = json.dumps(make(), indent=2) + "\n"
            write_atomic(file, lambda out: out.write(found.encode()))
        return json.loads(file.read_text())

    def sweep(self, sides: Mapping[str, Mapping[str, Any]], measure: Callable[[Path], dict[str, float]]) -> Results:
        """Train and measure every side at every seed."""
        results: Results = {}
        for seed in self.seeds:
            for side, section in sides.items():
                found = self.kept(f"{side}-{seed}", lambda: measure(self.train(side, seed, section)))  # noqa: B023
                for figure, value in found.items():
                    results.setdefault(side, {}).setdefault(figure, []).append(value)
                print(
                    f"{self.name}: {side}, seed {seed}: {', '.join(f'{k} {number(v)}' for k, v in found.items())}",
                    flush=True,
                )
        return results

    def figures(
        self, run: Path, *, steps: Sequence[int] = STEPS, split: str | None = None, **changes: Any
    ) -> dict[str, float]:
        """The validation loss, and the Frechet distance in each number of steps; changes: of the run's sampling."""
        flow: Any = load(run)
        section, data = data_of(flow, str(run))
        network = feature_network(self.features if len(flow.shape) == 3 else "pixels")
        reals = _reals.setdefault(json.dumps([section, flow.shape, network.digest, self.n]), Reals())

        def value(metric: str, name: str, sampling: Mapping[str, Any]) -> float:
            plan = Plan((metric,), split=split, n=self.n, sampling=dict(sampling), batch=125)
            found = evaluate(flow, data, plan, name=section["name"], features=network, reals=reals)
            return next(each.value for each in found.figures if each.name == name)

        own = {**(flow.recipe or {}).get("sample", {}), **changes}
        distances = {f"FD, {count} steps": value("fd", "FD", {**own, "steps": count}) for count in steps}
        return {"loss": value("loss", "loss", {}), **distances}

    def report(self, results: Results, verdicts: Mapping[str, str], *, note: str = "", curves: bool = True) -> None:
        """Print and write the table, the picture and what it shows."""
        lines = [f"# {self.name}", "", self.says, "", table(results), ""]
        lines += [f"- {statement}: **{verdict}**" for statement, verdict in verdicts.items()]
        seeds, threads = " ".join(map(str, self.seeds)), torch.get_num_threads()
        features = f" --features {Path(self.features).name}" if self.features else ""
        command = f"python scripts/claims/{self.name}.py --steps {self.steps} --seeds {seeds} -n {self.n}{features}"
        made = f"Means with standard deviations over the seeds; torch {torch.__version__}, {threads} thread"
        lines += ["", f"`{command}`", "", f"{made}{'s' * (threads > 1)}. {note}".rstrip()]
        lines += ["", f"![{self.name}]({self.name}.png)", ""]
        text = "\n".join(lines)
        write_atomic(self.out / f"{self.name}.md", lambda file: file.write(text.encode()))
        draw(results, self.out / f"{self.name}.png", curves=curves)
        print(table(results))
        for statement, verdict in verdicts.items():
            print(f"{statement}: {verdict}")


def study(file: str, doc: str, *, steps: int, n: int = 500) -> Study:
    """A claim from its script and the command line. doc: what it says, what is varied and measured, when it is shown."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="where runs are kept (runs/claims)")
    parser.add_argument("--out", type=Path, default=Path("samples/claims"), help="of the table and the picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps, help=f"of each run ({steps})")
    parser.add_argument("-n", type=int, default=n, help=f"samples of each distance ({n})")
    parser.add_argument("--features", help="of the distances, as of genflow eval (mixed4, or pixels)")
    args = parser.parse_args(sys.argv[1:])
    says = "\n\n".join(" ".join(paragraph.split()) for paragraph in doc.strip().split("\n\n"))
    return Study(Path(file).stem, says, args.work, args.out, args.seeds, args.steps, args.n, args.features)


# -------------------------------------------------------------------------------------------------------------- verdicts


def verdict(gains: Sequence[float], least: float = 0.0) -> str:
    """What seeds say of a gain, a number for each: shown where all lie above `least`, and their mean by two standard errors.

    Contradicted where all lie as clearly below -least; else, and of a single seed, not shown at this size.
    """
    for sign, word in ((1, SHOWN), (-1, CONTRADICTED)):
        signed = [sign * gain - least for gain in gains]
        if len(signed) > 1 and all(each > 0 for each in signed):
            if not all(map(math.isfinite, signed)):  # one side left the numbers at every seed, or at some
                return word
            if statistics.mean(signed) > 2 * statistics.stdev(signed) / math.sqrt(len(signed)):
                return word
    return OPEN


def agreement(differences: Sequence[float], tolerance: float) -> str:
    """What seeds say of an equality: shown where all differences lie within the tolerance, contradicted where none does."""
    within = [abs(each) <= tolerance for each in differences]
    if len(within) < 2:
        return OPEN
    return SHOWN if all(within) else OPEN if any(within) else CONTRADICTED


def gains(results: Results, better: str, worse: str, figures: Sequence[str]) -> list[float]:
    """By how much one side is below another, seed by seed: the mean log of the ratio of their figures."""

    def ratio(a: float, b: float) -> float:
        if 0 < a < math.inf and 0 < b < math.inf:
            return math.log(b / a)
        return math.inf if b > a else -math.inf if a > b else 0.0

    rows = [[ratio(a, b) for a, b in zip(results[better][f], results[worse][f])] for f in figures]
    return [statistics.mean(each) for each in zip(*rows)]


# --------------------------------------------------------------------------------------------------- table and picture


def table(results: Results) -> str:
    """Markdown: a row for each side, a column for each figure, means and standard deviations over the seeds."""
    columns = list(dict.fromkeys(figure for found in results.values() for figure in found))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for side, found in results.items():
        cells = [spread(found[column]) if column in found else "" for column in columns]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return number(mean)
    return f"{number(mean)} ± {number(statistics.stdev(values))}"


def draw(results: Results, path: Path, *, curves: bool) -> None:
    """curves: figures called "NAME, X WORD" as lines over X, one for each side; others as dots, one for each seed."""
    from genflow.evaluation.plots import STYLE, save_plot

    columns = list(dict.fromkeys(figure for found in results.values() for figure in found))
    split = [figure.split(", ") for figure in columns]
    groups: dict[str, list[str]] = {}
    for figure, parts in zip(columns, split, strict=True):
        groups.setdefault(parts[0] if curves and len(parts) == 2 else figure, []).append(figure)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(4.2 * len(groups), 3.4), layout="constrained")
        for axes, (name, members) in zip(
            picture.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
        ):
            for place, (side, found) in enumerate(results.items()):
                if len(members) > 1:
                    x = [float(figure.split(", ")[1].split()[0]) for figure in members if figure in found]
                    rows = [found[figure] for figure in members if figure in found]
                    (line,) = axes.plot(x, [statistics.mean(row) for row in rows], "o-", label=side)
                    axes.fill_between(
                        x, [min(r) for r in rows], [max(r) for r in rows], color=line.get_color(), alpha=0.2, lw=0
                    )
                    axes.set(
                        xscale="log",
                        xlabel=members[0].split(", ")[1].split()[-1],
                        xticks=x,
                        xticklabels=[f"{v:g}" for v in x],
                    )
                    axes.minorticks_off()
                elif name in found:
                    axes.plot([place] * len(found[name]), found[name], "o", label=side)
            if len(members) == 1:
                axes.set(xticks=range(len(results)), xlim=(-0.5, len(results) - 0.5))
                axes.set_xticklabels(list(results), rotation=20, ha="right")
            else:
                axes.legend()
            values = [v for found in results.values() for m in members for v in found.get(m, ())]
            if all(0 < v < math.inf for v in values) and max(values, default=1) > 3 * min(values, default=1):
                axes.set_yscale("log")
            axes.set_title(name)
        save_plot(picture, path)
