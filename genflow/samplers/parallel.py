"""Sampling parallel in time: many of Euler's steps in one call of the network, by fixed-point sweeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from genflow.errors import UserError, check_whole
from genflow.functional import sent
from genflow.registry import sampler_export
from genflow.samplers.fixed_point import check_seen, verified
from genflow.samplers.solution import Progress, Solution, Trajectory, Velocity, as_state, check_grid, state


@dataclass(frozen=True)
class ParallelSolution(Solution):
    """A solution of sweeps: nfe counts all evaluations of a picture, sweeps the calls that came one after another."""

    sweeps: int = 0


@sampler_export("picard", family="parallel", order=1)
def picard(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    window: int = 16,
    tolerance: float = 1e-3,
    progress: Progress | None = None,
    record: bool = False,
) -> ParallelSolution:
    """Euler's method parallel in time, by Picard iteration (ParaDiGMS, Shih et al. 2023, arXiv 2305.16317, alg. 1).

    A sweep evaluates the velocity at all states of a window in one batch and sums Euler's steps anew from the first. A
    state is verified once all those between it and the first stayed within tolerance (root mean square). Each row's
    window slides over what is verified; the states that come into it begin on the line of the last velocity. A sweep
    verifies a step or more, so there are at most N. With tolerance 0 the result is Euler's, up to rounding; with another
    it is off by about tolerance times the velocity's Lipschitz constant.

    It saves time, not work: nfe is N or more, for a wait of `sweeps` calls. The velocity gets up to window x B rows,
    each with a time of its own. With conditions by the row it needs `take`; without `take` it must accept any number of
    rows. Each sweep waits for the device once. A trajectory's nfe is that of the picture that spent most to get there.

    Raises UserError for a window that is not a whole number above 0, and a tolerance that is negative or not finite.
    """
    check_whole(window=window)
    if not 0 <= tolerance < math.inf:
        raise UserError(f"tolerance = {tolerance} must be 0 or more, and finite; 0 is Euler's method itself")
    grid, x = check_grid(grid), state(x)
    check_seen(x, "picard")
    steps = len(grid) - 1
    size = min(int(window), steps)

    # The host keeps the times, and for each row the step that is verified (its window begins there) and what it spent.
    clock, places = torch.tensor(grid, dtype=torch.float64, device="cpu"), torch.arange(size + 1, device="cpu")
    at, spent, sweeps = *torch.zeros(2, len(x), dtype=torch.int64, device="cpu"), 0
    states = x.unsqueeze(1).repeat_interleave(size + 1, dim=1)  # B x window + 1: the verified one, then guesses
    path = _Path(x, grid) if record else None
    part, part_of = velocity, None

    while (at < steps).any():
        # Evaluate the steps of all windows that are there, h = 0 beyond the end of the grid ...
        times = clock[(at[:, None] + places).clamp(max=steps)]
        h = times.diff(dim=1)
        rows, slots = (h != 0).nonzero(as_tuple=True)
        cells = _to(rows, x), _to(slots, x)
        if hasattr(velocity, "take") and (part_of is None or not torch.equal(part_of, rows)):
            part, part_of = velocity.take(cells[0]), rows
        z = states[cells]
        answer = as_state(part(z, _to(times[rows, slots].to(z.dtype), x)), z)
        v = torch.zeros_like(states[:, 1:]).index_put(cells, answer)
        spent, sweeps = spent + (h != 0).sum(1), sweeps + 1

        # ... sum them up ...
        sums = torch.stack(list(accumulate((_over(h, x) * v).unbind(1), initial=states[:, 0])), dim=1)

        # ... see which states stayed: the one after them is right too, as the step from the last of them ...
        change = (sums - states)[:, 1:].unsqueeze(-1).flatten(2).square().mean(2).sqrt()
        settled = torch.minimum(verified(change, tolerance).cpu(), (h != 0).sum(1))
        if path is not None:
            path.add(sums, at, settled, spent)

        # ... and slide the windows there.
        at = at + settled
        kept = (places + settled[:, None]).clamp(max=size)
        ahead = _over(clock[(at[:, None] + places).clamp(max=steps)] - times.gather(1, kept), x)
        states = sums[torch.arange(len(x), device=x.device)[:, None], _to(kept, x)]
        states = torch.where(ahead == 0, states, states + ahead * v[:, -1:])  # a guess may be NaN, and 0 NaN is too
        if progress is not None:
            progress(int(at.min()), steps)

    trajectory = None if path is None else path.trajectory()
    return ParallelSolution(states[:, 0], max(spent.tolist(), default=0), trajectory, sweeps=sweeps)


class _Path:
    """The verified states of all rows: N + 1 x B x ..."""

    def __init__(self, x: Tensor, grid: list[float]) -> None:
        self.grid = grid
        self.states = x.unsqueeze(0).repeat_interleave(len(grid), dim=0)
        self.nfe = torch.zeros(len(grid), dtype=torch.int64, device="cpu")

    def add(self, sums: Tensor, at: Tensor, settled: Tensor, spent: Tensor) -> None:
        rows, places = (torch.arange(sums.shape[1] - 1, device="cpu") < settled[:, None]).nonzero(as_tuple=True)
        steps = at[rows] + places + 1
        self.states[_to(steps, sums), _to(rows, sums)] = sums[_to(rows, sums), _to(places + 1, sums)]
        self.nfe.scatter_reduce_(0, steps, spent[rows], "amax")

    def trajectory(self) -> Trajectory:
        return Trajectory(self.grid, list(self.states.unbind()), self.nfe.tolist())


def _to(host: Tensor, x: Tensor) -> Tensor:
    return sent(host, x.device)


def _over(numbers: Tensor, x: Tensor) -> Tensor:
    """B x n numbers of the host, to broadcast over B x n x ... on x's device."""
    return sent(numbers.to(x.dtype), x.device).view(*numbers.shape, *[1] * (x.dim() - 1))
