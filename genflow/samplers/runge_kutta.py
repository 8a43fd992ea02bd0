"""Runge-Kutta solvers of fixed steps: plain functions over any velocity v(x, t) and any grid of times, both ways.

The state is float32 (float64 where x is), whatever the network computes in. Gradients flow unless the caller turns
them off. record: keep the trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genflow.registry import sampler_export
from genflow.samplers.solution import Progress, Solution, Solve, Velocity


@sampler_export("euler", family="ode", order=1)
def euler(
    velocity: Velocity, x: Tensor, grid: Sequence[float], *, progress: Progress | None = None, record: bool = False
) -> Solution:
    """Euler's method, first order, along the N + 1 times of grid: N evaluations.

    On the straight path it is the first-order DPM-Solver++ (DDIM) step, identically.
    """
    solve = Solve(velocity, x, grid, progress, record)
    for t, t_next in solve:
        solve.x = torch.add(solve.x, solve.v(solve.x, t), alpha=t_next - t)
    return solve.solution()


@sampler_export("heun", family="ode", order=2)
def heun(
    velocity: Velocity, x: Tensor, grid: Sequence[float], *, progress: Progress | None = None, record: bool = False
) -> Solution:
    """Heun's method, second order, along the N + 1 times of grid (Karras et al. 2022, arXiv 2206.00364, alg. 1).

    A step that arrives at t = 0 is an Euler step, since a velocity may be singular there: 2N - 1 evaluations for a
    grid that ends in 0, else 2N.
    """
    solve = Solve(velocity, x, grid, progress, record)
    for t, t_next in solve:
        heun_step(solve, t, t_next)
    return solve.solution()


def heun_step(solve: Solve, t: float, t_next: float) -> None:
    """One step of `heun`."""
    x, h = solve.x, t_next - t
    v = solve.v(x, t)
    if t_next != 0:
        v = torch.lerp(v, solve.v(torch.add(x, v, alpha=h), t_next), 0.5)
    solve.x = torch.add(x, v, alpha=h)


@sampler_export("midpoint", family="ode", order=2)
def midpoint(
    velocity: Velocity, x: Tensor, grid: Sequence[float], *, progress: Progress | None = None, record: bool = False
) -> Solution:
    """The explicit midpoint method, second order: 2N evaluations, none of them at the grid's last time."""
    solve = Solve(velocity, x, grid, progress, record)
    for t, t_next in solve:
        x, h = solve.x, t_next - t
        half = solve.v(torch.add(x, solve.v(x, t), alpha=h / 2), t + h / 2)
        solve.x = torch.add(x, half, alpha=h)
    return solve.solution()


@sampler_export("rk4", family="ode", order=4)
def rk4(
    velocity: Velocity, x: Tensor, grid: Sequence[float], *, progress: Progress | None = None, record: bool = False
) -> Solution:
    """The classical Runge-Kutta method, fourth order (Kutta 1901): 4N evaluations.

    The last stage of a step that arrives at t = 0 is evaluated there; for a velocity that is singular at 0 end the grid
    a little before.
    """
    solve = Solve(velocity, x, grid, progress, record)
    for t, t_next in solve:
        x, h = solve.x, t_next - t
        k1 = solve.v(x, t)
        k2 = solve.v(torch.add(x, k1, alpha=h / 2), t + h / 2)
        k3 = solve.v(torch.add(x, k2, alpha=h / 2), t + h / 2)
        k4 = solve.v(torch.add(x, k3, alpha=h), t_next)
        solve.x = torch.add(x, torch.add(k1 + k4, k2 + k3, alpha=2), alpha=h / 6)
    return solve.solution()
