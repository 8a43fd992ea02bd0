"""How a run samples unless told otherwise: the section `sample` of its config, one class for each way to sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from genflow.config import Choice, Named
from genflow.errors import UserError, nearest
from genflow.flows.prepared import check_cached_sampler, family
from genflow.registry import resolve
from genflow.samplers import Solution, Trajectory, Velocity, bound_sampler, cfg, euler
from genflow.samplers.guides import CFG
from genflow.samplers.solution import check_grid

SOME_SHIFT = 1.5  # for a picture of some size: whether a grid can be shifted at all


@dataclass(frozen=True)
class SolveConfig:
    """By solving the differential equation of a velocity."""

    sampler: Annotated[str, Named("sampler")] = "heun"
    options: Any = None  # of the sampler, such as {rtol: 1e-3}
    steps: int = 20
    grid: Annotated[str, Named("grid")] = "shifted"
    guidance: float = 2.0
    interval: tuple[float, float] = (0.0, 1.0)  # the times t in which guidance acts
    guide: Annotated[Any, Choice("guidance")] = field(default_factory=CFG)
    rescale: float = 0.0  # how far guidance keeps the standard deviation of the unguided velocity, 0 to 1
    shift: Literal["resolution"] | float = 1.0
    cache: float = 0.0  # LOSSY: the threshold of first-block caching; 0 computes every block

    def __post_init__(self) -> None:
        """Refuse now what the sampler, the grid and the guide would refuse at the first preview."""
        make = resolve("grid", self.grid)
        make(self.steps, shift := SOME_SHIFT if self.shift == "resolution" else self.shift)
        if self.options is not None and not isinstance(self.options, dict):
            raise UserError(f"options = {self.options!r} must be a section of keys, such as {{rtol: 1e-3}}")
        solve = bound_sampler(self.sampler, self.options or {}, [0])
        check_cached_sampler(self.cache, self.sampler)
        how = {"interval": self.interval, "guide": self.guide, "rescale": self.rescale}
        still = cfg(lambda x, t: torch.zeros_like(x), (), (), self.guidance, **how)
        solve(still, torch.zeros(1, 1, device="cpu"), make(min(self.steps, 4), shift))


@dataclass(frozen=True)
class InverseConfig:
    """By the inverse of a bijection, in one pass."""

    temperature: float = 1.0  # standard deviation of the noise: below 1 fewer surprises, and less variety
    guidance: float = 1.0  # towards the condition, for models that can be guided
    # of a tarflow: token by token, all tokens in sweeps, or what was fastest in a measurement made once for a batch size
    inverse: Literal["auto", "sequential", "jacobi", "measured"] = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature = {self.temperature} must be 0 or more, and finite; 1 is the model's own")
        if not 0 <= self.guidance < math.inf:
            raise UserError(
                f"guidance = {self.guidance} must be 0 or more, and finite; 1 is none, 0 hears no condition"
            )
        if self.inverse not in (ways := get_args(get_type_hints(InverseConfig)["inverse"])):
            raise UserError(f"inverse {self.inverse!r} is unknown.{nearest(self.inverse, ways)}")


def from_noise(grid: Sequence[float], t_max: float) -> list[float]:
    """Times given for a sample, as floats. UserError where they do not fall from t_max, about: 0.01, to 0 or above."""
    times = check_grid(grid)
    if not 0 <= times[-1] < times[0] or abs(times[0] - t_max) > 0.01:
        raise UserError(
            f"grid: a sample goes from noise to data, from t = {t_max:g} down to 0, not {times[0]} to {times[-1]}"
        )
    return times


def into_picture(sampler: str, solve: Callable[..., Solution], last: float) -> Callable[..., Solution]:
    """solve, for a velocity that does not lead to the picture that it predicts below `last`: from there one Euler step.

    Left as they are: samplers whose step from there is no other, as they ask for no velocity within or after it.
    """
    if not last or (family(sampler) != "adaptive" and sampler not in ("midpoint", "rk4")):
        return solve

    def solve_and_step(velocity: Velocity, noise: Tensor, times: Sequence[float], **how: Any) -> Solution:
        if not times[0] > last > times[-1]:
            return (euler if last >= times[0] > times[-1] else solve)(velocity, noise, times, **how)
        solved = solve(velocity, noise, [*(t for t in times if t > last), last], **how)
        x, nfe, path = euler(velocity, solved.x, [last, times[-1]]).x, solved.nfe + 1, solved.trajectory
        if path is not None:
            path = Trajectory([*path.times, times[-1]], [*path.states, x], [*path.nfe, nfe])
        if (told := solved.statistics) is not None:
            told = replace(told, accepted=told.accepted + 1, evaluations=told.evaluations + 1)
        return replace(solved, x=x, nfe=nfe, trajectory=path, statistics=told)

    return solve_and_step


def of_size(shape: Sequence[int], size: int | tuple[int, int]) -> tuple[int, ...]:
    """The shape of a picture of that size, for a model of this shape. Raises UserError for what is none."""
    if len(shape) != 3:
        raise UserError(f"size = {size} is for pictures; this model makes vectors of {shape[0]} numbers")
    sides = (size, size) if isinstance(size, int) else size
    if not (isinstance(sides, Sequence) and len(sides) == 2 and all(isinstance(n, int) for n in sides)):
        raise UserError(f"size = {size!r} is neither a side nor a height and a width, in whole numbers")
    height, width = sides
    if min(height, width) < 1:
        trained = " x ".join(map(str, shape[1:]))
        raise UserError(f"size = {height} x {width} is not a picture's; this model was trained at {trained}")
    return (shape[0], height, width)
