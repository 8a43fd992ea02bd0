"""ODE solvers: plain functions over any velocity v(x, t) and any grid of times, in either direction.

The state is float32 (float64 where x is), whatever the network computes in. Gradients flow unless the caller turns
them off.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from genflow.registry import sampler_export
from genflow.samplers.solution import Progress, Solution, Velocity, evaluate, state


@sampler_export("euler")
def euler(velocity: Velocity, x: Tensor, grid: Sequence[float], *, progress: Progress | None = None) -> Solution:
    """Euler's method, first order, along the N + 1 times of grid: N evaluations.

    On the straight path it is the first-order DPM-Solver++ (DDIM) step, identically.
    """
    x, steps = state(x), len(grid) - 1
    for step, (t, t_next) in enumerate(pairwise(grid), start=1):
        x = x + (t_next - t) * evaluate(velocity, x, t)
        if progress is not None:
            progress(step, steps)
    return Solution(x, nfe=steps)


@sampler_export("heun")
def heun(velocity: Velocity, x: Tensor, grid: Sequence[float], *, progress: Progress | None = None) -> Solution:
    """Heun's method, second order, along the N + 1 times of grid (Karras et al. 2022, arXiv 2206.00364, alg. 1).

    A step that arrives at t = 0 is an Euler step, since a velocity may be singular there: 2N - 1 evaluations for a
    grid that ends in 0, else 2N.
    """
    x, steps, nfe = state(x), len(grid) - 1, 0
    for step, (t, t_next) in enumerate(pairwise(grid), start=1):
        h = t_next - t
        v = evaluate(velocity, x, t)
        nfe += 1
        if t_next != 0:
            v = (v + evaluate(velocity, x + h * v, t_next)) / 2
            nfe += 1
        x = x + h * v
        if progress is not None:
            progress(step, steps)
    return Solution(x, nfe=nfe)
