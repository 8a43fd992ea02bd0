"""Quality at equal cost: how near every ODE solver of fixed steps comes to a fine solve, for the same evaluations.

On a Gaussian mixture at 3 x 32 x 32, whose velocity is known in closed form, and on a trained run where one is given. Each
solver has the best of the hand-made grids, chosen on two thirds of the rows; the errors are those of the other third.
A learnt grid (genflow tune) stands beside them. Writes sampler-quality-NAME.md and .png for both. On one CPU thread the
mixture takes some minutes, a run of 32 pixels most of an hour.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from claims.common import told
from torch import Tensor

from genflow.cli.tune import captions, last_time
from genflow.evaluation.plots import plot_errors, save_plot
from genflow.flows.store import load
from genflow.functional import noise_from_seeds
from genflow.registry import resolve
from genflow.samplers import uniform
from genflow.samplers.tuning import fine_solve, fixed_step, hand_made, steps_within, tune

BUDGETS = (4, 6, 8, 12, 16, 24, 32, 48)  # of evaluations
LEARNT = (4, 6, 8, 12, 16)  # for which a grid is learnt
WIDE, KEPT = 16, 3  # beyond so many evaluations only the grids that did best before are tried, so many of them
PLAIN = (*range(4, 33), *range(36, 129, 4))  # steps of Euler on equal steps, the usual way to sample
SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Problem:
    name: str
    about: str
    velocity: Callable[..., Tensor]
    noise: Tensor
    last: float = 0.0
    first: float = 1.0

    @property
    def fitted(self) -> int:
        return len(self.noise) * 2 // 3


def mixture(rows: int, modes: int = 16, spread: float = 0.1, std: float = 0.2) -> Problem:
    """Equal Gaussians N(mean_k, std^2) with means drawn from N(0, spread^2).

    With s^2 = (1 - t)^2 std^2 + t^2 the posterior weight of mode k is softmax_k(-|z - (1 - t) mean_k|^2 / 2 s^2), and
    v = sum_k w_k [(t - (1 - t) std^2) / s^2 (z - (1 - t) mean_k) - mean_k].
    """
    means = spread * noise_from_seeds(range(1000, 1000 + modes), SHAPE).flatten(1).double()

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        flat, t = z.flatten(1), t.view(-1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        distance = (1 - t) ** 2 * means.square().sum(1) - 2 * (1 - t) * flat @ means.T
        mean = torch.softmax(-distance / (2 * variance), 1) @ means
        return ((t - (1 - t) * std**2) / variance * (flat - (1 - t) * mean) - mean).view_as(z)

    about = f"{modes} Gaussians of std {std} at 3 x 32 x 32, their means from N(0, {spread}^2); float64, {rows} rows"
    return Problem("mixture", about, velocity, noise_from_seeds(range(rows), SHAPE).double())


def trained(run: str, rows: int) -> Problem:
    """A run as it samples, on captions of its training data."""
    flow: Any = load(run)
    every = captions(flow, run)
    prompts = every[:: max(len(every) // rows, 1)][:rows]
    sample = (flow.recipe or {}).get("sample", {})
    how = {key: sample[key] for key in ("guidance", "interval", "guide", "rescale") if key in sample}
    velocity = flow.guided(flow.embed(flow.text.encode(prompts)), **how)
    name = Path(run).resolve().name
    about = f"{name}, guidance {how.get('guidance', 1.0)}; {len(prompts)} captions of its training data"
    noise = flow.t_max * noise_from_seeds(range(len(prompts)), flow.shape)
    return Problem(name, about, velocity, noise, last_time(flow), flow.t_max)


def rmse(problem: Problem, reference: Tensor, sampler: str, grid: list[float]) -> tuple[int, float, float]:
    """Evaluations, and the error on the rows that choose and on the others."""
    solution = resolve("sampler", sampler)(problem.velocity, problem.noise, grid)
    squares = (solution.x - reference).flatten(1).square().mean(1)
    parts = squares[: problem.fitted], squares[problem.fitted :]
    fitted, held_out = (part.mean().sqrt().nan_to_num(torch.inf).item() for part in parts)
    return solution.nfe, fitted, held_out


@dataclass(frozen=True)
class Point:
    """fitted, error: on the rows that choose, and on the others."""

    nfe: int
    fitted: float
    error: float
    grid: str


def compare(problem: Problem, reference: Tensor) -> dict[str, dict[int, Point]]:
    """For every solver and budget the hand-made grid that did best on the rows that choose."""
    table: dict[str, dict[int, Point]] = {}
    for sampler in fixed_step():
        table[sampler], kept = {}, None
        for budget in BUDGETS:
            if (steps := steps_within(sampler, budget)) is None:
                continue
            grids = hand_made(steps, problem.last, problem.first)
            tried = [n for n in grids if kept is None or budget <= WIDE or n in kept]
            found = sorted((rmse(problem, reference, sampler, grids[n])[1], n) for n in tried)
            kept = [name for _, name in found[:KEPT]]
            table[sampler][budget] = Point(*rmse(problem, reference, sampler, grids[kept[0]]), kept[0])
        print(f"  {sampler:10}" + "".join(f"{point.error:9.4f}" for point in table[sampler].values()), flush=True)
    return table


def learn(problem: Problem, reference: Tensor, table: dict[str, dict[int, Point]]) -> dict[int, Point]:
    """Learnt grids, for the solvers of one evaluation a step that do best on hand-made ones."""
    learnt = {}
    for budget in LEARNT:
        equal = [name for name, row in table.items() if budget in row and steps_within(name, budget) == budget]
        equal.sort(key=lambda name: table[name][budget].fitted)
        tuning = tune(
            problem.velocity,
            problem.noise,
            steps=budget,
            samplers=equal[:3],
            reference=reference,
            last=problem.last,
            first=problem.first,
            fitted=problem.fitted,
        )
        best = tuning.best
        learnt[budget] = Point(best.nfe, best.error, best.held_out, best.sampler)
        verdict = "" if tuning.wins else f"; {tuning.hand_made.sampler} on {tuning.hand_made.name} is better"
        print(f"  learnt, {budget} evaluations: {best.sampler} {best.held_out:.4f}{verdict}", flush=True)
    return learnt


def report(problem: Problem, floor: float, table: dict, learnt: dict[int, Point], plain: dict[int, float]) -> str:
    """The tables as Markdown, and what they say about 8 evaluations."""
    order = sorted(table, key=lambda name: table[name][8].error if 8 in table[name] else float("inf"))
    head = f"| | {' | '.join(map(str, BUDGETS))} |\n|---|{'---|' * len(BUDGETS)}\n"

    def row(name: str, cells: dict[int, str]) -> str:
        return f"| {name} | {' | '.join(cells.get(budget, '') for budget in BUDGETS)} |\n"

    def cell(budget: int, point: Point) -> str:
        text = f"{point.error:.4f}" + (f" ({point.nfe})" if point.nfe != budget else "")
        every = [each[budget].error for each in table.values() if budget in each]
        return f"**{text}**" if point.error == min(every) else text

    errors = row("learnt grid", {b: f"**{p.error:.4f}** {p.grid}" for b, p in learnt.items()})
    errors += "".join(row(name, {b: cell(b, p) for b, p in table[name].items()}) for name in order)
    errors += row("euler, equal steps", {b: f"{plain[b]:.4f}" for b in BUDGETS})
    grids = "".join(row(name, {b: p.grid for b, p in table[name].items()}) for name in order)
    name, best = min(((n, row[8]) for n, row in table.items() if 8 in row), key=lambda each: each[1].fitted)
    lines = [f"- {name} on {best.grid}: {best.error:.4f}, where euler on equal steps {_needs(best.error, plain)};"]
    lines += [f"- {learnt[8].grid} on a learnt grid: {learnt[8].error:.4f}, where it {_needs(learnt[8].error, plain)};"]
    own = ", ".join(f"{table['euler'][b].error:.4f} at {b}" for b in (16, 24, 32, 48))
    lines += [f"- euler on its own best grid: {own}."]
    return (
        f"# Quality at equal cost: {problem.name}\n\n{problem.about}. RMSE of the endpoints to a fine solve (itself known "
        f"to {floor:.1g}), by network evaluations; in brackets those really made. The grid of each solver is the best of "
        f"the hand-made ones on {problem.fitted} rows, by which the solvers of learnt grids and the one below are chosen "
        f"too; all errors are those of the other {len(problem.noise) - problem.fitted}.\n\n"
        f"{head}{errors}\nAt 8 evaluations:\n\n" + "\n".join(lines) + "\n\n"
        f"The hand-made grids:\n\n{head}{grids}\nMade by `scripts/compare_samplers.py`.\n"
    )


def _needs(error: float, plain: dict[int, float]) -> str:
    enough = [n for n, each in plain.items() if each <= error]
    return f"needs {min(enough)}" if enough else f"does not come to it with {max(plain)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", help="a trained run")
    parser.add_argument("--rows", type=int, default=96, help="of the mixture")
    parser.add_argument("--images", type=int, default=24, help="of the run")
    parser.add_argument("--out", type=Path, default=Path("samples"))
    args = parser.parse_args()
    with torch.no_grad():
        for problem in [mixture(args.rows), *([trained(args.run, args.images)] if args.run else [])]:
            print(f"{problem.name}: {problem.about}")
            reference, floor = fine_solve(
                problem.velocity, problem.noise, steps=256, last=problem.last, first=problem.first
            )
            table = compare(problem, reference)
            learnt = learn(problem, reference, table)
            plain = {n: rmse(problem, reference, "euler", uniform(n))[2] for n in PLAIN}
            text = report(problem, floor, table, learnt, plain)
            file = args.out / f"sampler-quality-{problem.name}.md"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            curves = {name: [(p.nfe, p.error) for p in row.values()] for name, row in table.items()}
            curves["euler, equal steps"] = [(n, plain[n]) for n in BUDGETS]
            figure = plot_errors(
                curves,
                tuned=[(p.nfe, p.error) for p in learnt.values()],
                floor=floor,
                title=f"Error against evaluations, best hand-made grids ({problem.name})",
            )
            save_plot(figure, file.with_suffix(".png"))
            print(text)


if __name__ == "__main__":
    told(main)
