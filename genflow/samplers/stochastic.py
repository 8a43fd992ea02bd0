"""Stochastic samplers: Euler-Maruyama and Heun for the SDEs of a flow, ancestral steps, Restart.

Every one draws from the marginals that the velocity was trained on, and needs what that takes: the straight path, data
and noise paired independently, Gaussian noise. A reflowed or OT-coupled velocity has another score: use an ODE sampler.
They run from noise to data, along times that fall within [0, 1]. The noise of step k in row i is a function of seeds[i]
and k alone, so that a picture does not depend on its batch mates.

Each function raises UserError for seeds that are not one whole number per row, and for a grid that rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral

from torch import Tensor

from genflow.errors import UserError, nearest
from genflow.functional import noise_from_velocity, renoise
from genflow.registry import sampler_export
from genflow.samplers.runge_kutta import heun_step
from genflow.samplers.solution import Progress, Solution, Solve, Velocity, check_seeds, noise_like

DIFFUSIONS: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "sigma": lambda t: t,
    "linear": lambda t: t,
    "sbdm": lambda t: t / (1 - t) if t < 1 else math.inf,
    "decreasing": lambda t: math.sin(math.pi * t / 2) ** 4,
    "bump": lambda t: math.sin(math.pi * t) ** 2,
}
"""D(t) by name: the diffusion coefficients of SiT (Ma et al. 2024, arXiv 2401.08740), time turned."""


@sampler_export("euler_maruyama", family="sde", order=1)
def euler_maruyama(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    seeds: Sequence[int],
    diffusion: str = "sigma",
    scale: float = 1.0,
    progress: Progress | None = None,
    record: bool = False,
) -> Solution:
    """Euler-Maruyama on an SDE with the flow's marginals, weak order 1: N evaluations.

        dx = [v - w/2 score] dt + sqrt(w) dW,    score = -(x + (1 - t) v) / t,    w(t) = 2 scale D(t)

    diffusion names D (SiT, Ma et al. 2024, arXiv 2401.08740, whose time is 1 - t; w is twice its "diffusion"):

        constant     1
        sigma        t
        linear       t, on the straight path the same
        sbdm         t / (1 - t), the reverse of the path's own forward SDE
        decreasing   (1 - cos(pi t))^2 / 4 = sin(pi t / 2)^4
        bump         sin(pi t)^2, SiT's increasing-decreasing

    Any w >= 0 has the same marginals, so a step from t to t' is free to hold w h, the variance that it adds, at t'^2,
    all the noise there should be. That makes sbdm finite at t = 1 and constant stable towards 0, and changes nothing
    where steps are short. A step that arrives at 0 thus adds none: it is an Euler step, which on the straight path is
    Tweedie's mean x - t v (SiT's last steps "Euler" and "Tweedie" are one). scale 0 is `euler`.

    Raises UserError for an unknown diffusion and a scale that is negative or not finite.
    """
    w = _diffusion(diffusion, scale)
    solve = _falling(velocity, x, grid, seeds, progress, record)
    for k, (t, t_next) in enumerate(solve):
        x, h = solve.x, t - t_next
        w_t = w(t, t_next**2 / h)
        d = _drift(x, solve.v(x, t), t, w_t)
        solve.x = x - h * d + math.sqrt(w_t * h) * noise_like(x, seeds, k, "wiener")
    return solve.solution()


@sampler_export("stochastic_heun", family="sde", order=2)
def stochastic_heun(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    seeds: Sequence[int],
    diffusion: str = "sigma",
    scale: float = 1.0,
    progress: Progress | None = None,
    record: bool = False,
) -> Solution:
    """Heun's method on the same SDE, weak order 2: 2N - 1 evaluations for a grid that ends in 0, else 2N.

    The SDE, its options and errors are those of `euler_maruyama`. Half of a step's noise comes before Heun's step and
    half after it (Strang 1968); SiT's stochastic Heun (Ma et al. 2024, arXiv 2401.08740) draws all of it before, at the
    same cost, which is of order 1. scale 0 is `heun`.
    """
    w = _diffusion(diffusion, scale)
    solve = _falling(velocity, x, grid, seeds, progress, record)
    for k, (t, t_next) in enumerate(solve):
        x, h = solve.x, t - t_next
        if t_next == 0:
            solve.x = x - h * solve.v(x, t)
            continue
        w_t, w_next = w(t, t_next**2 / h), w(t_next, t_next**2 / h)
        x = x + math.sqrt(w_t * h / 2) * noise_like(x, seeds, k, "before")
        d = _drift(x, solve.v(x, t), t, w_t)
        ahead = x - h * d
        d = (d + _drift(ahead, solve.v(ahead, t_next), t_next, w_next)) / 2
        solve.x = x - h * d + math.sqrt(w_next * h / 2) * noise_like(x, seeds, k, "after")
    return solve.solution()


@sampler_export("ancestral", family="sde", order=1)
def ancestral(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    seeds: Sequence[int],
    eta: float = 1.0,
    progress: Progress | None = None,
    record: bool = False,
) -> Solution:
    """Ancestral steps for the straight path, first order: N evaluations.

    From t an Euler step goes below t', to t_down = t' (1 + eta (t' / t - 1)), and the forward transition of the path
    goes back up to t' (ComfyUI's Euler ancestral for rectified flows). eta 0 is `euler`. With small steps it is the SDE
    of `euler_maruyama` with diffusion sbdm and scale eta, here without a pole at t = 1.

    Raises UserError for an eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta = {eta} is not within 0 .. 1; 0 draws no noise, 1 is fully ancestral")
    solve = _falling(velocity, x, grid, seeds, progress, record)
    for k, (t, t_next) in enumerate(solve):
        t_down = t_next * (1 + eta * (t_next / t - 1))
        solve.x = solve.x + (t_down - t) * solve.v(solve.x, t)
        if t_down < t_next:
            solve.x = renoise(solve.x, noise_like(solve.x, seeds, k, "ancestral"), t_down, t_next)
    return solve.solution()


@sampler_export("restart", family="sde", order=2)
def restart(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    seeds: Sequence[int],
    interval: tuple[float, float] = (0.1, 0.3),
    times: int = 2,
    inner: int = 3,
    progress: Progress | None = None,
    record: bool = False,
) -> Solution:
    """Restart (Xu et al. 2023, arXiv 2306.14878, alg. 1): Heun's method that goes back up and down again.

    Heun's steps go down the grid. At its time nearest to lo the state goes up to hi by the path's forward transition
    and comes down again in `inner` equal steps of Heun, `times` times. That is 2 x times x inner evaluations more than
    `heun` has, one less each time where lo is 0. times 0 is `heun`. interval: (lo, hi).

    Raises UserError for an interval that is not 0 <= lo < hi <= 1, reaches above the grid or lies below it, and for counts
    that are not whole numbers.
    """
    solve = _falling(velocity, x, grid, seeds, progress, record)
    lo, hi = interval
    _whole("times", times, 0)
    _whole("inner", inner, 1)
    if not 0 <= lo < hi <= 1:
        near = (hi, lo) if 0 <= hi < lo <= 1 else (0.1, 0.3)
        raise UserError(f"restart interval = ({lo}, {hi}) is not 0 <= lo < hi <= 1; try {near}")
    if hi > (first := solve.grid[0]):
        below_it = f"({first / 3:.2g}, {first})"
        raise UserError(
            f"restart interval = ({lo}, {hi}) reaches above the grid, which starts at {first}; try {below_it}"
        )
    if not (below := [t for t in solve.grid if t < hi]):
        raise UserError(f"restart interval = ({lo}, {hi}) lies below the grid, which ends at {solve.grid[-1]}")
    lo = min(below, key=lambda t: abs(t - lo))
    again = [hi + (lo - hi) * i / inner for i in range(inner)] + [lo]
    for t, t_next in solve:
        heun_step(solve, t, t_next)
        for k in range(times if t_next == lo else 0):
            solve.x = renoise(solve.x, noise_like(solve.x, seeds, k, "restart"), lo, hi)
            for s, s_next in pairwise(again):
                heun_step(solve, s, s_next)
    return solve.solution()


# ------------------------------------------------------------------------------------------------------------ the parts


def _drift(x: Tensor, v: Tensor, t: float, w: float) -> Tensor:
    """v - w/2 score."""
    return v + w / (2 * t) * noise_from_velocity(x, v, t)


def _diffusion(name: str, scale: float) -> Callable[[float, float], float]:
    """w(t), at most so much."""
    if name not in DIFFUSIONS:
        raise UserError(f"no diffusion is named {name!r}.{nearest(name, DIFFUSIONS)}")
    if not 0 <= scale < math.inf:
        raise UserError(f"scale = {scale} of the diffusion must be 0 or more, and finite; 0 draws no noise")
    return lambda t, most: min(2 * scale * DIFFUSIONS[name](t), most) if scale else 0.0


def _falling(
    velocity: Velocity, x: Tensor, grid: Sequence[float], seeds: Sequence[int], progress: Progress | None, record: bool
) -> Solve:
    """The solve, once the seeds and the direction are right."""
    check_seeds(seeds, x)
    solve = Solve(velocity, x, grid, progress, record)
    first, last = solve.grid[0], solve.grid[-1]
    if first < last:
        raise UserError(
            f"a stochastic sampler goes from noise to data, but the grid rises from {first} to {last};"
            " to encode use an ODE sampler, such as 'heun'"
        )
    if not 0 <= last < first <= 1:
        raise UserError(f"the grid of a stochastic sampler must be within 1 .. 0, but goes from {first} to {last}")
    return solve


def _whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name} = {value!r} is not a whole number")
    if value < least:
        raise UserError(f"{name} = {value} is too few; the nearest possible number is {least}")
