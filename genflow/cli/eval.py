"""genflow eval RUN, and genflow eval --again FILE"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from genflow.cli.options import (
    add_dtype,
    add_lora,
    add_solving,
    open_model,
    real_data,
    refuse_dtype,
    refuse_fixed_steps,
    take_loras,
    writable,
)
from genflow.errors import UserError

if TYPE_CHECKING:
    from genflow.evaluation.features import FeatureNetwork
    from genflow.evaluation.plan import Evaluation, Plan

FIGURES = "figures.json"
HOLDS = 1e-6  # relative: what a figure may differ by when it is computed again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="a run's folder, one of its checkpoints, or a model folder")
    parser.add_argument("--again", metavar="FILE", help="compute an earlier figures.json again: does it hold, to 1e-6?")
    add_measuring(parser)
    likely = parser.add_argument_group("of likelihoods")
    likely.add_argument("-k", type=int, default=1, metavar="K", help="draws of the dequantisation for each picture (1)")
    likely.add_argument("--divergence", help="exact, hutchinson, hutchinson_gaussian, hutch++ (exact to 16 numbers)")
    likely.add_argument("--draws", type=int, metavar="N", help="of the divergence's estimator, for each sample (1)")
    likely.add_argument("--tolerance", type=float, metavar="T", help="of the ODE solve, relative and absolute (1e-4)")
    how = add_solving(parser)
    add_lora(how)
    add_dtype(how)
    parser.add_argument("--out", metavar="FOLDER", help=f"where {FIGURES} and nearest.png go (RUN/eval)")


def add_measuring(parser: argparse.ArgumentParser) -> Any:
    """What to measure, and on what, as every command that measures takes it; the group "of what"."""
    from genflow.evaluation.plan import METRICS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "metrics:\n" + "\n".join(f"  {name:18}{what}" for name, what in METRICS.items())
    parser.add_argument(
        "--metrics", nargs="+", default=[], metavar="NAME", help="see below (those that a model can honestly have)"
    )
    what = parser.add_argument_group("of what")
    what.add_argument("--split", help="of a run's data (held-out figures: as validated; distances: train)")
    what.add_argument("-n", type=int, metavar="N", help="samples (2000, or half of the split; likelihoods: all of it)")
    what.add_argument("--seed", type=int, default=0, help="of the first sample; the next have the next seeds (0)")
    what.add_argument(
        "--features",
        metavar="NAME",
        help="GRAPH.json, a name in the cache folder, inception, pixels (mixed4, or pixels)",
    )
    return what


def run(args: argparse.Namespace) -> int:
    if args.again:
        _refuse_more(args)
        return _again(args)
    if not args.run:
        raise UserError("which model? give its run's folder, or --again FILE")
    from genflow.evaluation.plan import Plan
    from genflow.flows.store import find_model

    _refuse_solving(args)
    asked = {"divergence": args.divergence, "draws": args.draws, "rtol": args.tolerance, "atol": args.tolerance}
    out = writable(args.out or str(Path(args.run) / "eval"))
    flow, settings = open_model(args)
    _check_sampling(flow, settings, "sampling")
    refuse_fixed_steps(args, settings)
    refuse_dtype(args, flow)
    plan = Plan(
        metrics=tuple(args.metrics),
        split=args.split,
        n=args.n,
        k=args.k,
        seed=args.seed,
        batch=args.batch,
        dtype=args.dtype,
        sampling=settings,
        likelihood={key: value for key, value in asked.items() if value is not None},
    )
    found, made = _measure(flow, plan, str(find_model(args.run)), not args.no_ema, args.features)
    made |= {"lora": args.lora} if args.lora else {}
    _print(found, made)
    _write(found, made, plan, out)
    return 0


def _check_sampling(flow: Any, settings: dict[str, Any], where: str) -> None:
    """Raises UserError, before any data are read, for what a flow cannot be sampled with."""
    from genflow.config import from_dict

    # A tuned grid is times, and not of the config.
    plain = {key: value for key, value in settings.items() if key != "grid" or isinstance(value, str)}
    from_dict(flow.config.sampling, plain, where=where)


def _refuse_solving(args: argparse.Namespace) -> None:
    """Raises UserError for how to draw samples, where no metric asked for draws any, and for features that none looks at."""
    from genflow.evaluation.plan import UNDRAWN

    if args.metrics and UNDRAWN.issuperset(args.metrics):
        how = argparse.ArgumentParser()
        add_dtype(add_solving(how))
        how.set_defaults(seed=0, features=args.features if "reconstruction" in args.metrics else None)
        for name, value in vars(how.parse_args([])).items():
            if getattr(args, name) != value and name not in ("batch", "no_ema", "device"):
                option = name.replace("_", "-")
                raise UserError(
                    f"--{option} does nothing for {', '.join(args.metrics)}: nothing is drawn; leave it out"
                )


def _measure(flow: Any, plan: Plan, model: str, ema: bool, features: str | None) -> tuple[Evaluation, dict[str, Any]]:
    """The figures, and everything that made them."""
    from genflow.evaluation.report import evaluate

    section, data = data_of(flow, model)
    network = network_for(flow, features)
    found = evaluate(flow, data, plan, name=section["name"], features=network, bar=bar)
    return found, made_by(found, flow, section, network, model=model, ema=ema, features=features)


def data_of(flow: Any, model: str) -> tuple[dict[str, Any], Any]:
    """The section of the real data that a model was trained on, and its config. Raises UserError."""
    from genflow.config import Choice, from_dict

    section = (flow.recipe or {}).get("data")
    if not section:
        raise UserError(f"{model} does not say which data it was trained on, so there is none to evaluate it with")
    section = real_data(section)
    return section, from_dict(Annotated[Any, Choice("dataset")], section, where=f"{model}: data")


def network_for(flow: Any, features: str | None) -> FeatureNetwork:
    """The features asked for: by default the best there are for pictures, coordinates for vectors."""
    from genflow.evaluation.features import feature_network

    return feature_network(features if len(flow.shape) == 3 or features else "pixels")


def made_by(
    found: Evaluation,
    flow: Any,
    section: dict[str, Any],
    network: FeatureNetwork,
    *,
    model: str,
    ema: bool,
    features: str | None,
) -> dict[str, Any]:
    """Everything that made an evaluation's figures."""
    import numpy
    import torch

    from genflow import __version__
    from genflow.evaluation.features import GraphFeatures
    from genflow.flows.store import weights_of

    return {
        "model": model,
        "weights": weights_of(model, ema=ema),
        "ema": ema,
        "data": section,
        "features": {
            "name": network.name,
            "sha256": network.digest,
            "file": str(network.graph.path.resolve()) if isinstance(network, GraphFeatures) else features,
        },
        "counts": found.counts,
        "nfe": found.nfe,
        "device": str(flow.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "genflow": __version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
        "seconds": found.seconds,
    }


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="sample", leave=False, dynamic_ncols=True, disable=None) as shown:
        yield shown.update


# -------------------------------------------------------------------------------------------------------------- a report


def _print(found: Evaluation, made: dict[str, Any]) -> None:
    from genflow.evaluation.plan import number

    rows, before = [("", "", "real" if any(each.real is not None for each in found.figures) else "", "")], ""
    for each in found.figures:
        error = "" if each.error is None else f" +- {number(each.error)}"
        real = "" if each.real is None else number(each.real)
        rows.append((each.name, number(each.value) + error, real, each.on if each.on != before else ""))
        before = each.on or before
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows if rows[0][2] else rows[1:]:
        print("  ".join([*(f"{text:{width}}" for text, width in zip(row, widths)), row[3]]).rstrip())
    if found.counts.get("samples") or found.counts.get("alignment"):
        print(f"features {made['features']['name']}; {found.nfe} network evaluations for each sample")
    for remark in found.remarks:
        print(f"({remark})")


def _write(found: Evaluation, made: dict[str, Any], plan: Plan, out: Path) -> None:
    from genflow.data.pictures import write_atomic
    from genflow.evaluation.comparison import finite

    about = {
        "figures": [{key: finite(value) for key, value in asdict(each).items()} for each in found.figures],
        "remarks": found.remarks,
        "plan": {**asdict(plan), "metrics": found.metrics},
        "made": made,
    }
    write_atomic(out / FIGURES, lambda file: file.write((json.dumps(about, indent=2) + "\n").encode()))
    print(f"with all that made them in {out / FIGURES}")
    if found.picture is not None:
        from dataclasses import replace

        replace(found.picture, settings={"model": made["model"], "seed": plan.seed}).save_atomic(out / "nearest.png")
        print(f"samples beside their nearest training pictures in {out / 'nearest.png'}")


# --------------------------------------------------------------------------------------------------------------- again


def _refuse_more(args: argparse.Namespace) -> None:
    """Raises UserError for what the file says already."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    plain = {**vars(parser.parse_args([])), "again": args.again, "device": args.device}
    if more := [name for name, value in vars(args).items() if value != plain[name]]:
        raise UserError(
            f"--again {args.again} says itself of which model and how; leave {more[0].replace('_', '-')} out"
        )


def _told(what: Any) -> Any:
    """Of what made a figure, all but where it lay."""
    return {key: value for key, value in what.items() if key != "file"} if isinstance(what, dict) else what


def _again(args: argparse.Namespace) -> int:
    """0 where every figure holds, 1 where one does not."""
    from genflow.config import from_dict, setting
    from genflow.evaluation.comparison import finite
    from genflow.evaluation.plan import Plan
    from genflow.flows.store import load

    path = Path(args.again)
    try:
        old = json.loads(path.read_text())
        plan, made, weights = from_dict(Plan, old["plan"], where="plan"), old["made"], old["made"]["weights"]
        before: dict[str, Any] = {
            setting(str, each, "name", "figures"): None if each["value"] is None else float(each["value"])
            for each in old["figures"]
        }
        model, device = (setting(str, made, key, "made") for key in ("model", "device"))
        ema, features = setting(bool, made, "ema", "made"), setting(str | None, made["features"], "file", "made")
    except OSError as error:
        raise UserError(f"--again {path}: {error.strerror}; give the {FIGURES} of an earlier evaluation") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--again {path}: no {FIGURES} of an evaluation ({error})") from error
    flow: Any = load(model, ema=ema, device=args.device or device)
    if unknown := [name for name in plan.sampling if name not in [f.name for f in fields(flow.config.sampling)]]:
        raise UserError(
            f"--again {path}: {unknown[0]!r}, of its sampling, is nothing that {model} takes; measure it anew"
        )
    _check_sampling(flow, plan.sampling, f"--again {path}: its sampling")
    take_loras(flow, made.get("lora", ()))
    found, now = _measure(flow, plan, model, ema, features or "pixels")
    for what in ("weights", "data", "features", "versions", "device", "threads"):
        then = made.get(what, "not told")  # by another version
        if _told(then) != _told(now[what]):
            print(f"other {what}: {then} then, {now[what]} now", file=sys.stderr)
    width, fails = max(map(len, before), default=0), 0
    for each in found.figures:
        known, then, value = each.name in before, before.pop(each.name, None), finite(each.value)
        same = then is value if None in (then, value) else math.isclose(value, then, rel_tol=HOLDS, abs_tol=1e-12)
        holds = known and same
        fails += not holds
        print(f"{each.name:{width}}  {then!r:>22}  {each.value!r:>22}  {'holds' if holds else 'DOES NOT HOLD'}")
    for name in before:
        print(f"{name:{width}}  {before[name]!r:>22}  {'':>22}  DOES NOT HOLD")
    fails += len(before)
    changed = weights != now["weights"]
    verdict = "other weights" if changed else f"{fails} of {len(found.figures)} do not hold" if fails else "all hold"
    print(f"{verdict}, to {HOLDS:g}")
    return int(bool(fails) or changed)
