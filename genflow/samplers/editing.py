"""Editing pictures with a velocity: inversion, image-to-image, inpainting, FlowEdit, RF-inversion.

Plain functions over any velocity v(x, t). Grids fall from noise to data, as for sampling. sampler: any solver of fixed
steps, called as sampler(velocity, x, grid, progress=...). A picture's result does not depend on its batch mates. Under
a sampler that takes rows apart (adaptive, picard) a velocity with conditions by the row must have `take`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genflow.errors import UserError, check_whole
from genflow.functional import Time, interpolate, path_velocity, renoise
from genflow.registry import api_export, tag_of
from genflow.samplers.guidance import SLACK, take_rows
from genflow.samplers.runge_kutta import euler, heun
from genflow.samplers.solution import (
    Progress,
    Solution,
    Solve,
    Velocity,
    check_grid,
    check_seeds,
    edges_of,
    evaluate,
    noise_like,
    state,
)

Sampler = Callable[..., Solution]

# ------------------------------------------------------------------------------------------------------------ inversion


@api_export("invert")
def invert(
    velocity: Velocity, x: Tensor, grid: Sequence[float], *, sampler: Sampler = heun, progress: Progress | None = None
) -> Solution:
    """Pictures to the noise from which they would be drawn: the ODE along the reversed grid (DDIM inversion, where the
    sampler is euler). x: B x ...; the solution's x is the noise.
    """
    return sampler(velocity, x, _falling(grid)[::-1], progress=progress)


@dataclass(frozen=True)
class RoundTrip:
    """Pictures to noise and back. noise, x: as the pictures; psnr: of x against them, B; nfe: of both ways together."""

    noise: Tensor
    x: Tensor
    psnr: Tensor
    nfe: int


@api_export("round_trip")
def round_trip(
    velocity: Velocity, x: Tensor, grid: Sequence[float], *, sampler: Sampler = heun, progress: Progress | None = None
) -> RoundTrip:
    """Inversion, then sampling along the same grid: how well a picture survives it is the error of the inversion.

    Raises UserError for a solve that did not arrive.
    """
    there = invert(velocity, x, grid, sampler=sampler, progress=progress).checked()
    back = sampler(velocity, there.x, grid, progress=progress).checked()
    return RoundTrip(there.x, back.x, psnr(back.x, x), there.nfe + back.nfe)


@api_export("psnr")
def psnr(a: Tensor, b: Tensor, *, peak: float = 2.0) -> Tensor:
    """The peak signal-to-noise ratio of each picture in dB: 10 log10(peak^2 / mean (a - b)^2), infinite where equal.

    a, b: B x ...; peak: the width of their range, 2 for [-1, 1]. Returns B. Raises UserError for two sizes.
    """
    if a.shape != b.shape:
        raise UserError(f"psnr: pictures of {_size(a)} and of {_size(b)} are not alike; give both of one size")
    return 10 * torch.log10(peak**2 / (state(a) - state(b)).unsqueeze(-1).flatten(1).square().mean(1))


# ------------------------------------------------------------------------------------------ image-to-image and inpainting


@api_export("image_to_image")
def image_to_image(
    velocity: Velocity,
    x: Tensor,
    noise: Tensor,
    grid: Sequence[float],
    strength: float,
    *,
    sampler: Sampler = heun,
    progress: Progress | None = None,
) -> Solution:
    """Draw pictures anew from a noised version of themselves (SDEdit, Meng et al. 2021, arXiv 2108.01073).

    strength: the time to start at, above the grid's end; the grid goes on from there. At its first time, 1, nothing of
    the picture is left: plain sampling from the noise. Raises UserError for a strength outside the grid.
    """
    x, noise = _alike(x, noise)
    times = _begin(grid, strength)
    return sampler(velocity, interpolate(x, noise, strength), times, progress=progress)


@api_export("inpaint")
def inpaint(
    velocity: Velocity,
    x: Tensor,
    mask: Tensor,
    noise: Tensor,
    grid: Sequence[float],
    *,
    repeats: int = 1,
    seeds: Sequence[int] = (),
    sampler: Sampler = heun,
    progress: Progress | None = None,
) -> Solution:
    """Draw the masked part of pictures anew; every other pixel of the result is the picture's, bit for bit.

    Known pixels are at every time their own noised version (the replacement of RePaint, Lugmayr et al. 2022, arXiv
    2201.09865): the straight path from `noise`, which any solver follows exactly. So is all at the grid's first time.

    mask: B or 1 x 1 x H x W, bool or in [0, 1], 1 = draw anew; between, a pixel's velocity is the mixture. repeats: how
    often each step is taken, with fresh noise back up to its start between (RePaint's resampling): the new part then
    agrees better with the known one, at so many times the cost; a multistep sampler begins at each of them anew. seeds: one
    per picture, of that noise. Raises UserError for a mask that does not fit, and for repeats of a sampler of the SDE.
    """
    (x, noise), times = _alike(x, noise), _falling(grid)
    free = _check_mask(mask, x)
    velocity, z = Known(velocity, x, noise, free), interpolate(x, noise, times[0])
    check_whole(repeats=repeats)
    tag = tag_of(getattr(sampler, "func", sampler))
    if repeats > 1 and tag is not None and tag.metadata.get("family") == "sde":
        raise UserError(
            f"repeats = {repeats}: {tag.names[0]} would draw the same noise at each; take a sampler such as heun"
        )
    if repeats == 1:
        solution = sampler(velocity, z, times, progress=progress)
    else:
        solution = _resample(velocity, z, times, repeats, seeds, sampler, progress)
    return replace(solution, x=torch.where(free == 0, x, solution.x))


def _resample(
    velocity: Velocity,
    z: Tensor,
    times: list[float],
    repeats: int,
    seeds: Sequence[int],
    sampler: Sampler,
    progress: Progress | None,
) -> Solution:
    check_seeds(seeds, z)
    nfe, steps, stopped, sums = 0, len(times) - 1, dict[int, str](), dict[int, Tensor]()
    for step in range(steps):
        t, t_next = times[step : step + 2]
        for again in range(repeats):
            if again:
                z = renoise(z, noise_like(z, seeds, step, f"resample {again}"), t_next, t)
            solution = sampler(velocity, z, [t, t_next])
            z, nfe, stopped = solution.x, nfe + solution.nfe, {**solution._stopped, **stopped}
            if solution._sums:
                sums[step + 1] = solution._sums[1]
        if progress is not None:
            progress(step + 1, steps)
    return replace(solution, nfe=nfe, _stopped=stopped, _sums=sums)


@dataclass(frozen=True)
class Known:
    """A velocity under which the pixels where free = 0 keep to the straight path between x and noise."""

    velocity: Velocity
    x: Tensor
    noise: Tensor
    free: Tensor

    def __call__(self, z: Tensor, t: Time) -> Tensor:
        z = torch.where(self.free == 0, interpolate(self.x, self.noise, t), z)
        return torch.lerp(path_velocity(self.x, self.noise), evaluate(self.velocity, z, t), self.free)

    at = __call__

    @property
    def edges(self) -> tuple[float, ...]:
        return edges_of(self.velocity)

    def take(self, rows: Tensor) -> Known:
        return Known(_taken(self.velocity, rows), *take_rows((self.x, self.noise, self.free), rows))


# ------------------------------------------------------------------------------------------------- editing by a prompt


@api_export("flowedit")
def flowedit(
    velocity_source: Velocity,
    velocity_target: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    seeds: Sequence[int],
    strength: float = 0.85,
    regular: float = 0.0,
    draws: int = 1,
    sampler: Sampler = heun,
    progress: Progress | None = None,
) -> Solution:
    """From a picture to its edit without inversion (FlowEdit, Kulikov et al. 2024, arXiv 2412.08629, algorithm 1).

    By Euler steps from `strength` on, z from x: z += (t' - t) (v_target(z_source + z - x, t) - v_source(z_source, t)),
    where z_source = (1 - t) x + t noise has fresh noise at every step. Equal velocities leave x as it is, bit for bit.

    velocity_source, velocity_target: under the prompts of the picture and of the edit. seeds: one per picture, of the
    noise. strength: the time to start at (the paper's n_max). regular: the time from which plain sampling by `sampler`
    ends it (n_min); 0 is never, and regular = strength is `image_to_image`. draws: of noise, averaged (n_avg): 2 draws
    evaluations a step.
    """
    check_seeds(seeds, x)
    x, times = state(x), _begin(grid, strength)
    if not 0 <= regular <= strength:
        raise UserError(f"regular = {regular} is not within 0 .. strength = {strength}; 0 is never")
    check_whole(draws=draws)
    editing = [t for t in times if t >= regular]
    solution, plain = Solution(x, 0), times[len(editing) - 1 :]
    if len(editing) > 1:
        solve = Solve(velocity_target, x, editing, progress, record=False)
        for step, (t, t_next) in enumerate(solve):
            change = torch.zeros_like(x)
            for draw in range(draws):
                z_source = interpolate(x, noise_like(x, seeds, step, f"flowedit {draw}"), t)
                change += solve.v(z_source + (solve.x - x), t) - evaluate(velocity_source, z_source, t)
            solve.nfe += draws
            solve.x = solve.x + (t_next - t) / draws * change
        solution = solve.solution()
    if len(plain) > 1:
        z_source = interpolate(x, noise_like(x, seeds, len(editing) - 1, "flowedit 0"), plain[0])
        end = sampler(velocity_target, z_source + (solution.x - x), plain, progress=progress)
        solution = replace(end, nfe=solution.nfe + end.nfe)
    return solution


@api_export("rf_inversion")
def rf_inversion(
    velocity_source: Velocity,
    velocity_target: Velocity,
    x: Tensor,
    noise: Tensor,
    grid: Sequence[float],
    *,
    gamma: float = 0.5,
    eta: float = 0.9,
    interval: tuple[float, float] = (0.75, 1.0),
    sampler: Sampler = euler,
    progress: Progress | None = None,
) -> Solution:
    """Edit by a controlled inversion and a controlled sampling (RF-inversion, Rout et al. 2024, arXiv 2410.10792).

    To noise: dz/dt = v_source + gamma ((noise - z) / (1 - t) - v_source), which draws it to a typical noise. Back:
    dz/dt = v_target + eta ((z - x) / t - v_target) at the times of `interval`, which draws it to the picture. 0 is no
    control: with both 0 and one velocity it is the plain round trip, exactly.

    velocity_source: mostly under the empty prompt; velocity_target: under the prompt of the edit. The controls are
    singular at their ends, where there is none. The paper takes Euler steps, and so does the default: with ever finer
    steps any gamma > 0 would end in `noise` itself.
    """
    x, noise = _alike(x, noise)
    for name, value in (("gamma", gamma), ("eta", eta)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} = {value} is not within 0 .. 1; 0 is no control")
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(f"interval = {tuple(interval)} is not 0 <= lo < hi <= 1; try (0.75, 1.0)")
    times = _falling(grid)
    to_noise = Drawn(velocity_source, noise, 1.0, gamma)
    to_picture = Drawn(velocity_target, x, 0.0, eta, interval)
    there = sampler(to_noise, x, times[::-1], progress=progress)
    back = sampler(to_picture, there.x, times, progress=progress)
    return replace(back, nfe=there.nfe + back.nfe, _stopped={**back._stopped, **there._stopped})


@dataclass(frozen=True)
class Drawn:
    """A velocity mixed, within an interval of times, with that of the straight line to `target` at time `end`."""

    velocity: Velocity
    target: Tensor
    end: float
    weight: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __call__(self, z: Tensor, t: Time) -> Tensor:
        v, (lo, hi) = evaluate(self.velocity, z, t), self._ends
        t = (t if isinstance(t, Tensor) else z.new_full((1,), t)).view(-1, *[1] * (z.dim() - 1))
        inside = (t >= lo) & (t <= hi) & (t != self.end)
        line = (self.target - z) / torch.where(inside, self.end - t, 1)
        return torch.lerp(v, line, (inside * self.weight).to(z.dtype))

    at = __call__

    @property
    def edges(self) -> tuple[float, ...]:
        return edges_of(self.velocity) + (self._ends if self.weight else ())

    @property
    def _ends(self) -> tuple[float, float]:
        return self.interval[0] - SLACK, self.interval[1] + SLACK

    def take(self, rows: Tensor) -> Drawn:
        return replace(self, velocity=_taken(self.velocity, rows), target=take_rows((self.target,), rows)[0])


def _taken(velocity: Velocity, rows: Tensor) -> Velocity:
    """Some rows of a velocity; without `take` it is one function for all rows."""
    take = getattr(velocity, "take", None)
    return velocity if take is None else take(rows)


# --------------------------------------------------------------------------------------------------------- what is given


def _falling(grid: Sequence[float]) -> list[float]:
    times = check_grid(grid)
    if times[0] < times[-1]:
        raise UserError(f"the grid must fall, from noise to data, but it rises to {times[-1]}; give grid[::-1]")
    return times


def _begin(grid: Sequence[float], strength: float) -> list[float]:
    """The times of a grid from `strength` on."""
    times = _falling(grid)
    if not times[-1] < strength <= times[0]:
        raise UserError(f"strength = {strength} is not within {times[-1]} < strength <= {times[0]}, the grid's times")
    return [strength, *(t for t in times if t < strength and not math.isclose(t, strength))]


def _alike(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Both as states of the wider dtype."""
    if x.shape != noise.shape:
        raise UserError(f"the noise is {_size(noise)}, but the pictures are {_size(x)}; they must be alike")
    dtype = torch.promote_types(x.dtype, noise.dtype)
    return state(x.to(dtype)), state(noise.to(dtype))


def _check_mask(mask: Tensor, x: Tensor) -> Tensor:
    wanted = (1, *x.shape[2:])
    if mask.dim() != x.dim() or mask.shape[1:] != wanted or len(mask) not in (1, len(x)):
        sizes = " x ".join(map(str, wanted))
        raise UserError(f"the mask is {_size(mask)}, but the pictures are {_size(x)}; give {len(x)} or 1 x {sizes}")
    free = mask.to(x)
    if not bool(((free >= 0) & (free <= 1)).all()):
        raise UserError("the mask must hold numbers within 0 .. 1, 1 where to draw anew; divide bytes by 255")
    return free


def _size(x: Tensor) -> str:
    return " x ".join(map(str, x.shape))
