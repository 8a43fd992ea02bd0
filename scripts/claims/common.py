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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from scipy.stats import t as student

from genflow.cli.eval import data_of
from genflow.config import from_dict
from genflow.data.pictures import write_atomic
from genflow.errors import UserError
from genflow.evaluation.features import FeatureNetwork, PixelFeatures, feature_network
from genflow.evaluation.plan import Plan, number
from genflow.evaluation.plots import save_plot, styled
from genflow.evaluation.report import Reals, evaluate
from genflow.flows.store import load
from genflow.training.config import RunConfig
from genflow.training.precision import resolve_precision
from genflow.training.ranks import join_processes
from genflow.training.run import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN, OPEN, CONTRADICTED = "shown", "not shown at this size", "contradicted"
STEPS = (5, 10, 25, 50)  # at which distances are measured
LEAST = 1e-9  # a figure below it counts as it, or its ratio to another would be without end
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
    """One claim: its words, where its runs and its table go, and how large it is.

    n, features: of the distances, 0 and None where there are none. precision: of every run that does not name its own.
    """

    name: str
    says: str
    work: Path
    out: Path
    seeds: Sequence[int]
    steps: int
    n: int
    features: FeatureNetwork | None
    precision: str

    def config(self, side: str, seed: int, section: Mapping[str, Any], steps: int | None = None) -> RunConfig:
        """Of one run, which its name and the claim's steps tell from others; `out` is its folder."""
        folder = self.work / self.name / _plain(f"{side}-{seed}-{self.steps}")
        own = {"precision": self.precision, **section["train"]}
        own |= {"steps": steps or self.steps, "warmup": min(100, self.steps // 10)}
        return from_dict(RunConfig, {**section, "seed": seed, "out": str(folder), "train": own})

    def train(self, side: str, seed: int, section: Mapping[str, Any], steps: int | None = None) -> Path:
        """The folder of a run, trained to its steps unless it is already. Raises UserError where it is another one's."""
        return train(self.config(side, seed, section, steps))

    def kept(self, key: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Figures that are made once, for these steps, this n and these features."""
        network = self.features and (self.features.digest or self.features.name)[:12]
        file = self.work / self.name / _plain(f"{key}-{self.steps}-{self.n}-{network}.json")
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
        network = self.features if len(flow.shape) == 3 else PixelFeatures()
        reals = _reals.setdefault(json.dumps([section, flow.shape, network.digest, self.n]), Reals())

        def value(metric: str, name: str, sampling: Mapping[str, Any]) -> float:
            plan = Plan((metric,), split=split, n=self.n, sampling=dict(sampling), batch=125)
            found = evaluate(flow, data, plan, name=section["name"], features=network, reals=reals)
            return next(each.value for each in found.figures if each.name == name)

        own = {**(flow.recipe or {}).get("sample", {}), **changes}
        distances = {f"FD, {count} steps": value("fd", "FD", {**own, "steps": count}) for count in steps}
        return {"loss": value("loss", "loss", {}), **distances}

    def report(self, results: Results, verdicts: Mapping[str, Verdict], *, note: str = "", curves: bool = True) -> None:
        """Print and write the table, the picture and what it shows."""
        lines = [f"# {self.name}", "", self.says, "", table(results), ""]
        lines += [f"- {statement}: **{found.word}**{found.why}" for statement, found in verdicts.items()]
        lines += ["", " ".join(LEGEND.split())]
        command = f"python scripts/claims/{self.name}.py --steps {self.steps} --seeds {' '.join(map(str, self.seeds))}"
        command += f" -n {self.n}" * (self.n > 0) + (f" --features {self.features.name}" if self.features else "")
        made = f"Means with standard deviations over the seeds; trained in {self.precision}"
        page = f"this page by torch {torch.__version__}, threads: {torch.get_num_threads()}"
        lines += ["", f"`{command}`", "", f"{made}; {page}. {note}".rstrip()]
        lines += ["", f"![{self.name}]({self.name}.png)", ""]
        text = "\n".join(lines)
        write_atomic(self.out / f"{self.name}.md", lambda file: file.write(text.encode()))
        save_plot(draw(results, curves=curves), self.out / f"{self.name}.png")
        print(table(results))
        for statement, found in verdicts.items():
            print(f"{statement}: {found.word}{found.why}")


def study(file: str, doc: str, *, steps: int, n: int = 500, features: bool = True, precision: str = "auto") -> Study:
    """A claim from its script and the command line. doc: what it says, what is varied and measured, when it is shown.

    n, features: as of `Study`; 0 and False leave their options out. "auto": as the first run of the claim found, for all.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="where runs are kept (runs/claims)")
    parser.add_argument("--out", type=Path, default=Path("samples/claims"), help="of the table and the picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps, help=f"of each run ({steps})")
    if n:
        parser.add_argument("-n", type=int, default=n, help=f"samples of each distance ({n})")
    if features:
        parser.add_argument("--features", help="of the distances, as of genflow eval (mixed4, or pixels)")
    args = parser.parse_args(sys.argv[1:])
    name, n = Path(file).stem, args.n if n else 0
    if args.steps < 1:
        raise UserError(f"--steps {args.steps} trains nothing; the least is 1")
    network = feature_network(args.features) if features else None
    if precision == "auto":
        measured = args.work / name / "precision"
        if not measured.exists():
            found, _ = resolve_precision("auto", join_processes())
            write_atomic(measured, lambda out: out.write(found.encode()))
        precision = measured.read_text()
    says = "\n\n".join(" ".join(paragraph.split()) for paragraph in doc.strip().split("\n\n"))
    return Study(name, says, args.work, args.out, args.seeds, args.steps, n, network, precision)


def told(main: Callable[[], None]) -> None:
    """Run a script; a person's mistake is one line and exit code 2, as in the command line."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)


# -------------------------------------------------------------------------------------------------------------- verdicts


LEGEND = """In brackets is what a verdict hangs on. Of a gain, the log of the ratio of two figures unless said otherwise: its
mean ± its standard error, and each seed's; shown where all are above the bound (0, or as said) and the mean is so by
Student's two-sided 95 %. Of an equality: each seed's difference, and how much is allowed."""


class Verdict(NamedTuple):
    """word: SHOWN, OPEN or CONTRADICTED; why: the numbers that it hangs on, in brackets."""

    word: str
    why: str = ""


def verdict(gains: Sequence[float], least: float = 0.0) -> Verdict:
    """What seeds say of a gain, a number for each: shown where all lie above `least`, and their mean clearly so.

    That is by more standard errors than Student's t has at two-sided 95 % for one degree of freedom less than seeds: 12.7
    of two seeds, 4.3 of three. Contradicted where all lie as clearly below -least; else, and of a single seed, not shown
    at this size.
    """
    n, mean, word = len(gains), statistics.mean(gains), OPEN
    measured = n > 1 and math.isfinite(mean)  # else one side left the numbers at every seed, or at some
    error = statistics.stdev(gains) / math.sqrt(n) if measured else math.nan
    for sign, each in ((1, SHOWN), (-1, CONTRADICTED)):
        if n > 1 and all(sign * gain > least for gain in gains):
            word = each if not measured or sign * mean - least > student.ppf(0.975, n - 1) * error else word
    bound = f"above {least:g}? " if least else ""
    return Verdict(word, f" ({bound}{number(mean)} ± {number(error)}: {', '.join(map(number, gains))})")


def agreement(differences: Sequence[float], tolerance: float) -> Verdict:
    """What seeds say of an equality: shown where all differences lie within the tolerance, contradicted where none does."""
    within = [abs(each) <= tolerance for each in differences]
    word = SHOWN if all(within) else OPEN if any(within) else CONTRADICTED
    why = f" ({', '.join(map(number, differences))}; {tolerance:g} allowed)"
    return Verdict(word if len(within) > 1 else OPEN, why)


def gains(results: Results, better: str, worse: str, figures: Sequence[str]) -> list[float]:
    """By how much one side is below another, seed by seed: the mean log of the ratio of their figures.

    What is not a number counts as infinite.
    """

    def ratio(a: float, b: float) -> float:
        a, b = (math.inf if math.isnan(each) else max(each, LEAST) for each in (a, b))
        return 0.0 if a == b else math.log(b) - math.log(a)

    rows = [[ratio(a, b) for a, b in zip(results[better][f], results[worse][f], strict=True)] for f in figures]
    return [statistics.mean(each) for each in zip(*rows, strict=True)]


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


@styled
def draw(results: Results, *, curves: bool) -> Figure:
    """curves: figures called "NAME, X WORD" as lines over X, one for each side; others as dots, one for each seed."""
    columns = list(dict.fromkeys(figure for found in results.values() for figure in found))
    split = [figure.split(", ") for figure in columns]
    groups: dict[str, list[str]] = {}
    for figure, parts in zip(columns, split, strict=True):
        groups.setdefault(parts[0] if curves and len(parts) == 2 else figure, []).append(figure)
    from matplotlib.figure import Figure

    picture = Figure(figsize=(4.2 * len(groups), 3.4), layout="constrained")
    for axes, (name, members) in zip(picture.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
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
    return picture
