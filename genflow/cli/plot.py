"""genflow plot RUN"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genflow.cli.options import (
    add_decoding,
    embed,
    first_state,
    guided,
    has_instead,
    last_time,
    open_model,
    read_shift,
    refuse_fixed_steps,
    solver,
    time_grid,
    told_steps,
    writable,
)
from genflow.cli.tune import add_velocity, heard
from genflow.errors import UserError
from genflow.registry import resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from genflow.cli.plot2d import PlanePlotter
    from genflow.samplers import Trajectory

TRAINING = {"training": "the training curves"}
PICTURES = {
    "strip": "the pictures that a solve goes through, and those that they foretell",
    "trajectories": "fine trajectories and the solve of few steps, in two principal components",
    "error": "the error of every solver of fixed steps against its evaluations",
    "grid": "the time grids there are",
}
TOKENS = {"strip": "the tokens that each pass of the model settled: its own draws, and guesses that held"}
PLANE = {
    "density": "the model's density, beside its samples, the data and their true density",
    "samples": "samples and data, coloured by their captions",
    "trajectories": "the ways of points from noise to data",
    "field": "the velocity at five times, and the points there",
    "warp": "what the model does to a square grid of lines",
    "animation": "points on their way from noise to data",
}
VELOCITY = ("prompt", "guidance", "interval", "guide", "rescale")
DECODING = ("temperature", "decoder", "draft", "top_k", "top_p")
SOLVE = (*VELOCITY, *DECODING, "seed", "sampler", "steps", "grid", "shift", "no_ema")
USED = {
    "training": ("format",),
    "grid": ("steps", "format"),
    "error": (*VELOCITY, "seed", "images", "grid", "shift", "no_ema", "format"),
    "warp": ("prompt", "no_ema", "format"),
    "animation": SOLVE,
}
"""The options that a plot hangs on; the others show a solve."""
BUDGETS = (4, 6, 8, 12, 16, 24, 32)  # of evaluations
FINE = 64  # steps of a fine trajectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a model folder")
    names = list(TRAINING | PICTURES | PLANE)
    parser.add_argument(
        "--what",
        nargs="+",
        choices=names,
        metavar="PLOT",
        help=f"training; of pictures: {', '.join(PICTURES)}; of points in the plane: {', '.join(PLANE)} "
        "(all that the run allows)",
    )
    what = parser.add_argument_group("which pictures")
    what.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="several: each (captions of the training data)"
    )
    what.add_argument("--seed", type=int, help="of the first; the next have the next seeds (0)")
    what.add_argument("--images", type=int, metavar="N", help="of the errors, prompts in turn (8)")
    how = add_velocity(parser)
    how.add_argument("--sampler", metavar="NAME", help="see: genflow info sampler")
    how.add_argument("--steps", type=int, metavar="N")
    how.add_argument("--grid", metavar="NAME", help="of times, see: genflow info grid (the tuned one, if there is one)")
    how.add_argument("--shift", type=read_shift, help="of the time grid; 1 = none, resolution = by the picture's size")
    add_decoding(how)
    parser.add_argument("--format", choices=("png", "svg"), help="of the files but animations, GIFs (png)")
    parser.add_argument("--out", default="plots", metavar="FOLDER", help="where they go (./plots)")
    parser.set_defaults(option=None, batch=1)


def run(args: argparse.Namespace) -> int:
    from genflow.evaluation.plots import plot_training, save_plot

    told = {name: getattr(args, name) for name in (*SOLVE, "images", "format")}
    given = [name for name, value in told.items() if value not in (None, []) and value is not False]
    args.seed, args.images = args.seed or 0, 8 if args.images is None else args.images
    if args.images < 1:
        raise UserError(f"--images must be 1 or more, not {args.images}")
    metrics = Path(args.run, "metrics.jsonl")
    out = writable(args.out)
    plotter = None if args.what == ["training"] else _plotter(args)
    about = {**TRAINING, **(plotter.what if plotter else {})}
    wanted = args.what or [name for name in about if name != "training" or metrics.exists()]
    if refused := [name for name in wanted if name not in about]:
        raise UserError(f"{refused[0]} is no plot of {args.run}: {_why_not(plotter, refused[0])}")  # type: ignore[arg-type]
    if not wanted:
        flow: Any = plotter.flow  # type: ignore[union-attr]
        what = f"{type(flow).__name__} of {'pictures' if len(flow.shape) == 3 else 'vectors'}"
        raise UserError(f"nothing of {args.run} can be plotted: it has no {metrics.name}, and a {what} has no plots")
    if idle := [option for option in given if not any(option in USED.get(name, (*SOLVE, "format")) for name in wanted)]:
        raise UserError(f"--{idle[0].replace('_', '-')} does nothing for {', '.join(wanted)}; leave it out")
    if plotter and not {"grid", "error"} & set(wanted):  # which take grids of their own
        refuse_fixed_steps(args, plotter.settings)
    for name in wanted:
        drawn: Any
        if name == "training":
            drawn = plot_training(read_lines(metrics), title=f"of {Path(args.run).resolve().name}")
        else:
            drawn = plotter.draw(name)  # type: ignore[union-attr]
        if name == "animation":
            file = out / f"{name}.gif"
            drawn.save_atomic(file)
        else:
            file = out / f"{name}.{args.format or 'png'}"
            save_plot(drawn, file)
        print(f"{file}: {about[name]}")
    return 0


def _plotter(args: argparse.Namespace) -> _Plotter | PlanePlotter:
    """What draws the plots of a model, by what it makes."""
    from genflow.ar.flow import DecodeConfig
    from genflow.cli.plot2d import PlanePlotter

    flow, settings = open_model(args)
    if issubclass(flow.config.sampling, DecodeConfig):
        return _TokenPlotter(args, flow, settings)
    return PlanePlotter(args, flow, settings) if tuple(flow.shape) == (2,) else _Plotter(args, flow, settings)


def _why_not(plotter: _Plotter | PlanePlotter, name: str) -> str:
    shape = plotter.flow.shape
    is_plane, is_picture = tuple(shape) == (2,), len(shape) == 3
    if (is_plane and name in PLANE) or (is_picture and name in PICTURES):
        return f"a {type(plotter.flow).__name__} has {has_instead(plotter.flow)}"
    makes = "points in the plane" if is_plane else "pictures" if is_picture else f"vectors of {shape[0]} numbers"
    return f"it makes {makes}, and {name} is of {'pictures' if name in PICTURES else 'points in the plane'}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a running training is just writing is passed over. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a run, which keeps its metrics there") from error
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


class _Plotter:
    """Solves with one model of pictures, and the figures of them."""

    def __init__(self, args: argparse.Namespace, flow: Any, settings: dict[str, Any]) -> None:
        self.args, self.flow, self.settings = args, flow, settings
        self.what = PICTURES if hasattr(flow, "guided") and len(flow.shape) == 3 else {}
        if self.what:
            self.steps = self.settings.get("steps", 20)
            self.times = time_grid(self.flow, self.settings, self.steps)

    def draw(self, name: str) -> Figure:
        return getattr(self, name)()

    def strip(self) -> Figure:
        import torch

        from genflow.evaluation.plots import plot_strip
        from genflow.functional import x_from_velocity
        from genflow.samplers.solution import evaluate

        velocity, path, prompts = self.solve()
        with torch.no_grad():
            foretold = [
                x_from_velocity(z, evaluate(velocity, z, t), t) if t > 0 else z
                for t, z in zip(path.times, path.states, strict=True)
            ]
        return plot_strip(path.times, torch.stack(path.states), torch.stack(foretold), prompts)

    def trajectories(self) -> Figure:
        import torch

        from genflow.evaluation.plots import plot_trajectories
        from genflow.samplers import heun
        from genflow.samplers.tuning import fine_times

        velocity, path, prompts = self.solve()
        with torch.no_grad():
            fine = heun(
                velocity, path.states[0], fine_times(FINE, last_time(self.flow), self.flow.t_max), record=True
            ).trajectory
        assert fine is not None
        few = (path.times, torch.stack(path.states))
        sampler = self.settings.get("sampler", "heun")
        title = f"{sampler}, {told_steps(sampler, self.steps)}"
        return plot_trajectories(fine.times, torch.stack(fine.states), prompts, few=few, title=title)

    def solve(self) -> tuple[Any, Trajectory, list[str]]:
        """The velocity, the trajectory and the prompts of a solve as the settings say."""
        import torch

        count = len(self.args.prompt) or 4
        solve = solver(self.flow, self.settings, range(self.args.seed, self.args.seed + count))
        velocity, noise, prompts = self.problem(count)
        with torch.no_grad():
            path = solve(velocity, noise, self.times, record=True).checked().trajectory
        assert path is not None
        return velocity, path, prompts

    def error(self) -> Figure:
        import torch
        from tqdm import tqdm

        from genflow.evaluation.plots import plot_errors
        from genflow.flows.tuned import tuned
        from genflow.samplers.tuning import fine_solve, fixed_step, steps_within

        velocity, noise, _ = self.problem(self.args.images)
        own = self.settings
        if not isinstance(own.get("grid", ""), str):  # tuned for one number of steps
            recipe = (self.flow.recipe or {}).get("sample", {})
            own = {"grid": recipe.get("grid", "shifted"), "shift": recipe.get("shift", 1.0)}
        reference, floor = fine_solve(velocity, noise, last=last_time(self.flow), first=self.flow.t_max)

        def point(solve: Any, grid: Sequence[float]) -> tuple[int, float]:
            solution = solve(velocity, noise, grid)
            return solution.nfe, (solution.x - reference).square().mean().sqrt().item()

        with torch.no_grad():
            curves = {}
            for sampler in (bar := tqdm(fixed_step(), unit="sampler", disable=None)):
                steps = dict.fromkeys(steps_within(sampler, budget) for budget in BUDGETS)
                solve = solver(self.flow, {"sampler": sampler})
                curves[sampler] = [point(solve, time_grid(self.flow, own, n)) for n in steps if n]
                if bar.disable:  # where there is no terminal for it
                    print(f"error: {len(curves)} of {len(fixed_step())} samplers, {sampler}", file=sys.stderr)
            learnt = [found for n in range(1, max(BUDGETS) + 1) if (found := tuned(self.args.run, n))]
            stars = [point(resolve("sampler", found["sampler"]), found["grid"]) for found in learnt]
        return plot_errors(
            curves, tuned=stars, floor=floor, title=f"Error against evaluations, on the grid {grid_name(own)}"
        )

    def grid(self) -> Figure:
        from genflow.evaluation.plots import plot_grids
        from genflow.flows.tuned import tuned
        from genflow.samplers.tuning import hand_made

        grids = hand_made(self.steps, first=self.flow.t_max)
        if found := tuned(self.args.run, self.steps):
            grids[f"tuned for {found['sampler']}"] = found["grid"]
        return plot_grids(
            grids,
            marked=[name for name in grids if name.startswith("tuned")],
            title=f"Time grids of {self.steps} steps",
        )

    def problem(self, count: int) -> tuple[Any, Tensor, list[str]]:
        """The velocity, where the solves begin, and the prompts of so many pictures."""
        import torch

        every = heard(self.args, self.flow)
        apart = max(len(every) // count, 1)
        prompts = [every[i * apart % len(every)] for i in range(count)]
        with torch.no_grad():
            velocity = guided(self.flow, embed(self.flow, prompts), self.settings)
        return velocity, first_state(self.flow, range(self.args.seed, self.args.seed + count)), prompts


class _TokenPlotter(_Plotter):
    """Pictures of a model of tokens, and how they were decoded."""

    def __init__(self, args: argparse.Namespace, flow: Any, settings: dict[str, Any]) -> None:
        self.args, self.flow, self.settings, self.what = args, flow, settings, TOKENS

    def strip(self) -> Figure:
        from genflow.evaluation.plots_tokens import plot_passes

        every = heard(self.args, self.flow)
        count = len(self.args.prompt) or 4
        prompts = every[:: max(len(every) // count, 1)][:count]
        solution = self.flow.sample(
            prompts, seeds=range(self.args.seed, self.args.seed + len(prompts)), **self.settings
        )
        return plot_passes(solution.x.cpu(), solution.decoded.passes, solution.grid, prompts)


def grid_name(settings: dict[str, Any]) -> str:
    shift = settings.get("shift", 1.0)
    name = settings.get("grid", "shifted")
    return ("uniform" if name == "shifted" else name) if shift == 1 else f"{name}, shift {shift}"
