"""genflow tune RUN --steps N"""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

from genflow.cli.options import (
    add_guidance,
    add_weights,
    embed,
    first_state,
    guided,
    last_time,
    open_velocity,
    refuse_unheard,
)
from genflow.config import Choice, from_dict
from genflow.errors import UserError

if TYPE_CHECKING:
    from genflow.samplers.tuning import Candidate, Tuning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a model folder")
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="of the grid that is learnt")
    parser.add_argument(
        "--samplers", nargs="+", default=[], metavar="NAME", help="to choose from (all of one evaluation a step)"
    )
    what = parser.add_argument_group("on which pictures")
    what.add_argument(
        "--images", type=int, default=32, metavar="N", help="two thirds to fit a grid to, a third to check it (32)"
    )
    what.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="in turn (captions of the training data)"
    )
    what.add_argument("--seed", type=int, default=0, help="of the first; the next have the next seeds (0)")
    add_velocity(parser)
    parser.set_defaults(sampler=None, option=None, grid=None, shift=None, batch=1)


def run(args: argparse.Namespace) -> int:
    if args.images < 3:
        raise UserError(f"--images must be 3 or more, some to fit a grid to and some to check it, not {args.images}")

    import torch

    from genflow.flows.tuned import save_tuned
    from genflow.samplers.tuning import hand_made, tune

    flow, settings = open_velocity(args)
    if not os.access(args.run, os.W_OK | os.X_OK):
        raise UserError(f"nothing can be written in {args.run}, where the grid is kept; tune a copy of it")
    last, first = last_time(flow), flow.t_max
    prompts = heard(args, flow)
    rows = [i for i in range(args.images) if i % 3 != 2] + list(range(2, args.images, 3))  # the last third checks
    texts = [prompts[i * max(len(prompts) // args.images, 1) % len(prompts)] for i in rows]
    noise = first_state(flow, [args.seed + i for i in rows])
    with torch.no_grad():
        velocity = guided(flow, embed(flow, texts), settings)
        grids = hand_made(args.steps, last, first)
        own = (flow.recipe or {}).get("sample", {}).get("shift", 1.0)
        if own != 1:
            grids[f"shifted {own}"] = flow.times(args.steps, "shifted", own)
        fitted = sum(i % 3 != 2 for i in range(args.images))
        tuning = tune(
            velocity,
            noise,
            steps=args.steps,
            samplers=args.samplers,
            grids=grids,
            last=last,
            first=first,
            fitted=fitted,
            say=_say,
        )
    best = tuning.best if tuning.wins else tuning.hand_made
    _print_table(tuning, best, pictures=len(flow.shape) == 3)
    found = {"sampler": best.sampler, "grid": best.grid, "name": best.name, "nfe": best.nfe, "error": best.held_out}
    under = {key: settings[key] for key in ("guidance", "interval", "guide", "rescale") if key in settings}
    file = save_tuned(args.run, args.steps, {**found, "images": args.images, "under": under})
    print(f"saved in {file}; genflow sample {args.run} --steps {args.steps} draws with it")
    return 0


def add_velocity(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options of the velocity that `open_velocity` makes, as a group."""
    how = parser.add_argument_group("how they are drawn (defaults: the run's own)")
    add_guidance(how)
    add_weights(how)
    return how


def heard(args: argparse.Namespace, flow: Any) -> list[str]:
    """The prompts asked for, or the training captions; the empty one for a model that hears nothing.

    Raises UserError for prompts to such a model.
    """
    refuse_unheard(args, flow, *args.prompt)
    return args.prompt or (captions(flow, args.run) if flow.text.max_tokens else [""])


def captions(flow: Any, run: str) -> list[str]:
    """The captions that a model was trained on. Raises UserError where its data are not to be had."""
    try:
        data = from_dict(Annotated[Any, Choice("dataset")], flow.recipe["data"], where=f"{run}: data")
        return data.build("train").captions
    except (KeyError, UserError) as error:
        raise UserError(f'no captions of {run}: {error}; say what to draw, --prompt "..."') from error


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _print_table(tuning: Tuning, best: Candidate, *, pictures: bool) -> None:
    """The best hand-made, planned and tuned grid of every solver, on what was held out."""
    first: dict[tuple[str, str], Candidate] = {}
    for c in sorted(tuning.candidates, key=lambda c: c.held_out):
        kind = "tuned" if c.name == "tuned" else "planned" if c.learnt else "hand-made"
        first.setdefault((c.sampler, kind), c)
    column, of = (f"{'PSNR, dB':>10}", "pictures") if pictures else ("", "vectors")
    print(f"\n{'solver':12}{'grid':26}{'evaluations':>12}{'RMSE':>10}{column}   of the fine solve, held-out {of}")
    for c in first.values():
        decibels = f"{psnr(c.held_out):10.2f}" if pictures else ""
        print(f"{c.sampler:12}{c.name:26}{c.nfe:12}{c.held_out:10.4f}{decibels}{'  *' * (c is best)}")
    print(f"\nthe fine solve itself is known to {tuning.reference_error:.1g}")
    if not tuning.wins:
        print(f"the fitted grid does not hold: {best.sampler} on {best.name} is better; --images more may help")
    print("times: " + " ".join(f"{t:.4g}" for t in best.grid))


def psnr(rmse: float) -> float:
    """Of pictures in [-1, 1], in dB."""
    return math.inf if rmse == 0 else 20 * math.log10(2 / rmse)
