"""genflow plot RUN"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genflow.cli.options import embed, guided, open_velocity, solver, time_grid
from genflow.cli.tune import add_guidance, captions, last_time
from genflow.errors import UserError
from genflow.registry import resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from genflow.samplers import Trajectory

WHAT = {
    "training": "the loss, its validation, and the loss by time",
    "strip": "the pictures that a solve goes through, and those that they foretell",
    "trajectories": "fine trajectories and the solve of few steps, in two principal components",
    "error": "the error of every solver of fixed steps against its evaluations",
    "grid": "the time grids there are",
}
BUDGETS = (4, 6, 8, 12, 16, 24, 32)  # of evaluations
FINE = 64  # steps of a fine trajectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a model folder")
    parser.add_argument(
        "--what", nargs="+", choices=WHAT, metavar="PLOT", help=f"of: {', '.join(WHAT)} (all that the run allows)"
    )
    what = parser.add_argument_group("which pictures")
    what.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="several: each (4 captions of the training data)"
    )
    what.add_argument("--seed", type=int, default=0, help="of the first; the next have the next seeds (0)")
    what.add_argument("--images", type=int, default=8, metavar="N", help="of the errors, prompts in turn (8)")
    how = add_guidance(parser)
    how.add_argument("--sampler", metavar="NAME", help="see: genflow info sampler")
    how.add_argument("--steps", type=int, metavar="N")
    how.add_argument("--grid", metavar="NAME", help="of times, see: genflow info grid (the tuned one, if there is one)")
    how.add_argument("--shift", type=float, help="of the time grid; 1 = none")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="of the files (png)")
    parser.add_argument("--out", default="plots", metavar="FOLDER", help="where they go (./plots)")
    parser.set_defaults(option=None, batch=1)


def run(args: argparse.Namespace) -> int:
    from genflow.evaluation.plots import plot_training, save_plot

    if args.images < 1:
        raise UserError(f"--images must be 1 or more, not {args.images}")
    metrics = Path(args.run, "metrics.jsonl")
    wanted = args.what or [name for name in WHAT if name != "training" or metrics.exists()]
    out = Path(args.out)
    plotter: _Plotter | None = None
    for name in wanted:
        if name == "training":
            figure = plot_training(_read_lines(metrics), title=f"of {Path(args.run).resolve().name}")
        else:
            plotter = plotter or _Plotter(args)
            figure = getattr(plotter, name)()
        file = out / f"{name}.{args.format}"
        save_plot(figure, file)
        print(f"{file}: {WHAT[name]}")
    return 0


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a running training is just writing is passed over. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a run, which keeps its metrics there") from error
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]


class _Plotter:
    """Solves with one model, and the figures of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.flow, self.settings = open_velocity(args)
        self.steps = self.settings.get("steps", 20)
        self.times = time_grid(self.flow, self.settings, self.steps)

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
            fine = heun(velocity, path.states[0], fine_times(FINE, last_time(self.flow)), record=True).trajectory
        assert fine is not None
        few = (path.times, torch.stack(path.states))
        title = f"{self.settings.get('sampler', 'heun')}, {self.steps} steps"
        return plot_trajectories(fine.times, torch.stack(fine.states), prompts, few=few, title=title)

    def solve(self) -> tuple[Any, Trajectory, list[str]]:
        """The velocity, the trajectory and the prompts of a solve as the settings say."""
        import torch

        count = len(self.args.prompt) or 4
        solve = solver(self.settings, range(self.args.seed, self.args.seed + count))
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
        own = {key: value for key, value in self.settings.items() if key != "grid" or isinstance(value, str)}
        reference, floor = fine_solve(velocity, noise, last=last_time(self.flow))

        def point(sampler: str, grid: Sequence[float]) -> tuple[int, float]:
            solution = resolve("sampler", sampler)(velocity, noise, grid)
            return solution.nfe, (solution.x - reference).square().mean().sqrt().item()

        with torch.no_grad():
            curves = {}
            for sampler in tqdm(fixed_step(), unit="sampler", disable=None):
                steps = dict.fromkeys(steps_within(sampler, budget) for budget in BUDGETS)
                curves[sampler] = [point(sampler, time_grid(self.flow, own, n)) for n in steps if n]
            learnt = [found for n in range(1, max(BUDGETS) + 1) if (found := tuned(self.args.run, n))]
            stars = [point(found["sampler"], found["grid"]) for found in learnt]
        return plot_errors(
            curves, tuned=stars, floor=floor, title=f"Error against evaluations, on the grid {grid_name(own)}"
        )

    def grid(self) -> Figure:
        from genflow.evaluation.plots import plot_grids
        from genflow.flows.tuned import tuned
        from genflow.samplers.tuning import hand_made

        grids = hand_made(self.steps)
        if found := tuned(self.args.run, self.steps):
            grids[f"tuned for {found['sampler']}"] = found["grid"]
        return plot_grids(
            grids,
            marked=[name for name in grids if name.startswith("tuned")],
            title=f"Time grids of {self.steps} steps",
        )

    def problem(self, count: int) -> tuple[Any, Tensor, list[str]]:
        """The velocity, the noise and the prompts of so many pictures."""
        import torch

        from genflow.functional import noise_from_seeds

        every = self.args.prompt or captions(self.flow, self.args.run)
        apart = max(len(every) // count, 1)
        prompts = [every[i * apart % len(every)] for i in range(count)]
        with torch.no_grad():
            velocity = guided(self.flow, embed(self.flow, prompts), self.settings)
        noise = noise_from_seeds(range(self.args.seed, self.args.seed + count), self.flow.image_shape)
        return velocity, noise.to(self.flow.device), prompts


def grid_name(settings: dict[str, Any]) -> str:
    shift = settings.get("shift", 1.0)
    name = settings.get("grid", "shifted")
    return ("uniform" if name == "shifted" else name) if shift == 1 else f"{name}, shift {shift}"
