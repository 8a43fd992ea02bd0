"""genflow compare RUN RUN ..."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genflow.cli.eval import add_measuring, bar, data_of, made_by, network_for
from genflow.cli.options import add_dtype, add_solving, add_weights, open_model, refuse_dtype, sampling_of, writable
from genflow.errors import UserError

if TYPE_CHECKING:
    from genflow.evaluation.comparison import Contestant

STEPS = (2, 4, 8, 16, 32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, checkpoints or models")
    what = add_measuring(parser)
    what.add_argument("--prompts", nargs="+", default=[], metavar="TEXT", help="to draw (held-out captions)")
    what.add_argument("--steps", type=int, nargs="+", default=list(STEPS), metavar="N", help="of the distances' curve")
    how = parser.add_argument_group("how (each run samples in its own way)")
    how.add_argument("--batch", type=int, default=64, help="samples at once; does not change them (64)")
    add_dtype(how, "of models of a velocity while they draw samples to be measured (fp32)")
    add_weights(how)
    parser.add_argument(
        "--out", default="comparison", metavar="FOLDER", help="where compare.html, .md and .json go (./comparison)"
    )


def run(args: argparse.Namespace) -> int:
    from genflow.data.pictures import write_atomic
    from genflow.evaluation.comparison import as_json, compare
    from genflow.evaluation.page import to_html, to_markdown
    from genflow.evaluation.plan import Plan

    plan = Plan(tuple(args.metrics), split=args.split, n=args.n, seed=args.seed, batch=args.batch, dtype=args.dtype)
    if wrong := [n for n in args.steps if n < 1]:
        raise UserError(f"--steps {wrong[0]} is too few; the least is 1")
    if len(args.runs) < 2:
        raise UserError(f"{args.runs[0]} alone is no comparison; name two runs or more (genflow eval measures one)")
    out = writable(args.out)
    contestants = [_contestant(args, path, name) for path, name in zip(args.runs, _names(args.runs), strict=True)]
    comparison = compare(contestants, plan, prompts=args.prompts, bar=bar)
    made = []
    for entry in comparison.entries:
        who = entry.who
        about: dict[str, Any] = {"model": who.model, "ema": who.ema, "features": _features(args, who.flow)}
        made.append(made_by(entry.found, who.flow, dict(who.section), who.features, **about))
    texts = {
        "compare.json": json.dumps(as_json(comparison, made), indent=2, default=str) + "\n",
        "compare.md": to_markdown(comparison),
        "compare.html": to_html(comparison, made),
    }
    for name, text in texts.items():
        write_atomic(out / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    print(texts["compare.md"], end="")
    print(f"\n{out / 'compare.html'}, with compare.md and compare.json")
    return 0


def _names(paths: list[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart. Raises UserError for a run named twice."""
    whole = [Path(path).resolve() for path in paths]
    if twice := [path for path, each in zip(paths, whole, strict=True) if whole.count(each) > 1]:
        raise UserError(f"{twice[0]} is named twice; a comparison is of different runs")
    for parts in range(1, max(len(each.parts) for each in whole)):
        names = ["/".join(each.parts[-parts:]) for each in whole]
        if len(set(names)) == len(names):
            return names
    return paths


def _contestant(args: argparse.Namespace, path: str, name: str) -> Contestant:
    from genflow.cli.plot import read_lines
    from genflow.evaluation.comparison import Contestant
    from genflow.flows.latent import velocity_flow
    from genflow.flows.prepared import family
    from genflow.flows.store import find_model

    asked = own_way(path, args)
    flow, sampling = open_model(asked)
    if velocity_flow(flow) is not None:
        asked.dtype = args.dtype
        refuse_dtype(asked, flow)
    model = str(find_model(path))
    section, data = data_of(flow, model)
    by_steps: dict[int, dict[str, Any]] = {}
    stepped = "steps" in [f.name for f in fields(flow.config.sampling)]
    if stepped and family(sampling.get("sampler", "heun")) != "adaptive":
        for steps in dict.fromkeys(args.steps):
            asked.steps = steps
            by_steps[steps] = sampling_of(asked, flow)
    metrics = Path(path, "metrics.jsonl")
    lines = read_lines(metrics) if metrics.exists() else []
    return Contestant(
        name,
        flow,
        model,
        not args.no_ema,
        data,
        section,
        network_for(flow, _features(args, flow)),
        sampling,
        by_steps,
        lines,
    )


def _features(args: argparse.Namespace, flow: Any) -> str | None:
    """Those asked for are of pictures; vectors are measured by their coordinates."""
    return args.features if len(flow.shape) == 3 else None


def own_way(path: str, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments by which `genflow sample` draws in a run's own way. args: batch, no_ema and device."""
    parser = argparse.ArgumentParser()
    add_solving(parser)
    asked = parser.parse_args([])
    asked.run, asked.batch, asked.no_ema, asked.device = path, args.batch, args.no_ema, args.device
    return asked
