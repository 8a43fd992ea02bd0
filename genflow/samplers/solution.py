"""What a sampler gets and gives: velocities, solutions with their cost, and the bookkeeping between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from genflow.errors import UserError, nearest
from genflow.functional import Time, noise_from_seeds, sent, wide
from genflow.registry import resolve

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(x, t): x B x ..., t B in x's dtype and on its device, 0 = data and 1 = noise -> dx/dt, shaped as x, a tensor of its own
at every call. It must not write into x or t.

A velocity may also have
  at(x, time)  the same with the time as a plain number for all rows. Samplers call it where it exists: a wrapper can
               then decide by the time without waiting for the device;
  edges        times at which it jumps, such as just outside a guidance interval: multistep samplers forget there;
  take(rows)   the velocity of some of its rows (B' int64), where rows have conditions of their own: adaptive samplers
               then take finished rows out of the batch.
"""

Progress = Callable[[int, int], None]
"""progress(done, steps), called after every step of a sampler."""


@dataclass(frozen=True)
class Trajectory:
    """A solve, step by step, N steps.

    times: N + 1 of the grid; states: N + 1, each like x; nfe: evaluations per picture up to there, N + 1; speed: the root
    mean square of dx/dt over each step, N x B.
    """

    times: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)

    @property
    def speed(self) -> Tensor:
        steps = zip(pairwise(self.times), pairwise(self.states), strict=True)
        each = [((b - a) / (t - s)).unsqueeze(-1).flatten(1) for (s, t), (a, b) in steps]
        return torch.stack([speed.square().mean(1).sqrt() for speed in each])


@dataclass(frozen=True)
class StepStatistics:
    """What each row of an adaptive solve took: steps accepted and rejected, and evaluations, each B int64."""

    accepted: Tensor
    rejected: Tensor
    evaluations: Tensor


@dataclass(frozen=True)
class Solution:
    """Where a solve arrived.

    x: as given to the sampler, float32 or wider; nfe: network evaluations per picture (of the longest, where pictures
    take steps of their own). Guidance doubles the cost of an evaluation, not nfe. trajectory: where it was asked for.
    """

    x: Tensor
    nfe: int
    trajectory: Trajectory | None = None
    statistics: StepStatistics | None = None
    _stopped: dict[int, str] = field(default_factory=dict)  # rows that did not arrive, and why
    _sums: dict[int, Tensor] = field(default_factory=dict, repr=False)  # of the state, after some of the steps

    @cached_property
    def status(self) -> list[str]:
        """One word or line per row: "ok", or why the row is not what was asked. Waits for the device."""
        finite = self.x.detach().unsqueeze(-1).flatten(1).isfinite().all(1).tolist()
        where = ""
        if not all(finite) and self._sums:
            steps, sums = [0, *self._sums], torch.stack([*self._sums.values()])
            good = int(sums.isfinite().cumprod(0).sum())
            if good < len(sums):
                first, last = steps[good] + 1, steps[good + 1]
                where = f" from step {first}{f' to {last}' if last > first else ''} of {steps[-1]} on"
        return [
            self._stopped.get(i, "ok" if good else f"not finite (NaN or inf){where}") for i, good in enumerate(finite)
        ]

    @property
    def ok(self) -> bool:
        return all(each == "ok" for each in self.status)

    def checked(self) -> Solution:
        """Itself. Raises UserError, naming the samples and the step, where a row is not ok."""
        if wrong := [i for i, each in enumerate(self.status) if each != "ok"]:
            rows = ", ".join(map(str, wrong[:16])) + (" ..." if len(wrong) > 16 else "")
            raise UserError(f"sampling: {self.status[wrong[0]]}; samples {rows} of {len(self.status)}")
        return self


def evaluate(velocity: Velocity, x: Tensor, t: Time) -> Tensor:
    """The velocity at one time for all rows, a number, or at B times; in the dtype of the state x."""
    if isinstance(t, Tensor):
        return as_state(velocity(x, t), x)
    at = getattr(velocity, "at", None)
    return as_state(at(x, t) if at is not None else velocity(x, x.new_full((len(x),), t)), x)


def answer(velocity: Callable[[Tensor, Any], Tensor], x: Tensor, t: Time) -> Tensor:
    """What a velocity says, in the dtype of the state x. Raises UserError where it wrote into x or t, or as `as_state`."""
    before = _versions(x, t)
    v = velocity(x, t)
    if _versions(x, t) != before:
        raise UserError(
            "the velocity wrote into the x or t that it was given, from which the solve goes on; clone them"
        )
    return v if isinstance(v, Tensor) and v.shape == x.shape and v.dtype == x.dtype else as_state(v, x)


def _versions(*given: Time) -> list[int]:
    """How often each has been written to; those of inference mode do not know, and a compiler's graph may not ask."""
    if torch.compiler.is_compiling():
        return []
    return [a._version for a in given if isinstance(a, Tensor) and not a.is_inference()]


def edges_of(velocity: Velocity) -> tuple[float, ...]:
    """The times at which a velocity says that it jumps."""
    return tuple(getattr(velocity, "edges", ()))


def state(x: Tensor) -> Tensor:
    """x as float64 where it is, else as float32. Raises UserError for what is no batch of real numbers."""
    if not isinstance(x, Tensor):
        raise UserError(f"a solve begins at a {type(x).__name__}, not a tensor; torch.as_tensor(...) makes one of it")
    if not x.dim() or x.is_complex():
        raise UserError(f"a solve begins at B x ... real numbers, not at {x.dtype} of size {tuple(x.shape)}")
    return wide(x)


class Solve:
    """One solve of fixed steps: holds the state x, and leaves to a sampler only its formula.

        solve = Solve(velocity, x, grid, progress, record)
        for t, t_next in solve:
            solve.x = solve.x + (t_next - t) * solve.v(solve.x, t)
        return solve.solution()

    grid: N + 1 times, strictly falling or strictly rising. Raises UserError for any other, and for a velocity that
    answers in another shape or in no real number, or writes into what it is given.
    """

    def __init__(
        self, velocity: Velocity, x: Tensor, grid: Sequence[float], progress: Progress | None, record: bool
    ) -> None:
        self.velocity, self.x, self.grid = velocity, state(x), check_grid(grid)
        self.progress = progress
        self.trajectory = Trajectory([self.grid[0]], [self.x.clone()], [0]) if record else None
        self.nfe = 0
        self._sums: dict[int, Tensor] = {}
        self._at = getattr(velocity, "at", None)
        self._times: dict[float, Tensor] = {}
        if self._at is None:  # the times of all rows, made once: nothing goes to the device between two steps
            self._add_times(self.grid)

    def v(self, x: Tensor, time: float) -> Tensor:
        """The velocity at one time for all rows, in the dtype of the state; counted."""
        self.nfe += 1
        if self._at is not None:
            return answer(self._at, x, time)
        if time not in self._times:  # within a step: most likely in the middle, then of every step
            self._add_times([time, *(t + (t_next - t) / 2 for t, t_next in pairwise(self.grid))])
        return answer(self.velocity, x, self._times[time])

    def _add_times(self, times: list[float]) -> None:
        column = sent(torch.tensor(times, dtype=self.x.dtype, device="cpu").unsqueeze(1), self.x.device)
        rows = column.repeat(1, len(self.x))
        self._times.update(zip(times, rows.unbind(), strict=True))

    def __iter__(self) -> Iterator[tuple[float, float]]:
        steps = len(self.grid) - 1
        every = -(-steps // 16)  # a sum costs little, but small networks do not cost much more
        for done, (t, t_next) in enumerate(pairwise(self.grid), start=1):
            yield t, t_next
            if done % every == 0 or done == steps:
                self._sums[done] = (self.x.detach() if self.x.requires_grad else self.x).sum()
            if self.trajectory is not None:
                self.trajectory.times.append(t_next)
                self.trajectory.states.append(self.x)
                self.trajectory.nfe.append(self.nfe)
            if self.progress is not None:
                self.progress(done, steps)

    def jumps(self, t: float, t_next: float) -> bool:
        """Whether the velocity has an edge between two times: what was seen before it says nothing of what comes."""
        lo, hi = min(t, t_next), max(t, t_next)
        return any(lo <= edge <= hi for edge in edges_of(self.velocity))

    def solution(self) -> Solution:
        return Solution(self.x, self.nfe, self.trajectory, _sums=self._sums)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "float": ("a number", _is_number),
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "bool | None": ("true, false or null", lambda value: value is None or isinstance(value, bool)),
    "str": ("a name", lambda value: isinstance(value, str)),
    "tuple[float, float]": (
        "two numbers, such as [0.1, 0.3]",
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)),
    ),
}
"""What an option of a sampler must be, by its annotation."""


def bound_sampler(name: str, options: Mapping[str, Any], seeds: Sequence[int]) -> Callable[..., Solution]:
    """The sampler of that name with its own options, and with the seeds if it draws noise.

    Raises UserError for an unknown name or option, and for a value of another type.
    """
    sampler = resolve("sampler", name)
    takes = signature(sampler).parameters
    any_other = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    if lacking := [each for each in ("progress", "record") if each not in takes and not any_other]:
        raise UserError(f"sampler {name} does not take {lacking[0]}=, as samplers do; see genflow.samplers.heun")
    kinds = {p.name: str(p.annotation) for p in takes.values() if p.kind is p.KEYWORD_ONLY}
    own = kinds.keys() - {"progress", "record"}
    if unknown := [option for option in options if option not in own - {"seeds"}]:
        raise UserError(f"sampler {name} has no option {unknown[0]!r}.{nearest(unknown[0], own - {'seeds'})}")
    for option, value in options.items():
        kind = "str" if kinds[option].startswith("Literal") else kinds[option]
        if kind in _OPTIONS and not (test := _OPTIONS[kind])[1](value):
            raise UserError(f"sampler {name}: {option} = {value!r} is not {test[0]}")
    return partial(sampler, **options, **({"seeds": seeds} if "seeds" in own else {}))


def check_seeds(seeds: Sequence[int], x: Tensor) -> None:
    """Raises UserError for seeds that are not one whole number for each row of x."""
    noise_from_seeds(seeds, (0,))  # refuses what is no seed
    if len(seeds) != len(x):
        raise UserError(f"{len(seeds)} seeds for {len(x)} pictures; give one seed for each picture")


def noise_like(x: Tensor, seeds: Sequence[int], step: int, stream: str) -> Tensor:
    """Standard normal, like x: row i a function of (seeds[i], step, stream) alone."""
    return sent(noise_from_seeds(seeds, x.shape[1:], step=step, stream=stream).to(x.dtype), x.device)


def check_grid(grid: Sequence[float]) -> list[float]:
    """The times as floats. Raises UserError for what are no times, and for one that is not finite or not in its place."""
    try:
        times = [float(t) for t in grid]
    except (TypeError, ValueError):
        raise UserError(f"a time grid is numbers, such as uniform(20) or [1.0, 0.5, 0.0], not {grid!r}") from None
    if len(times) < 2:
        raise UserError(f"a time grid needs two times or more, such as [1.0, 0.0], not {times}")
    sign = -1 if times[-1] < times[0] else 1
    for i, (t, t_next) in enumerate(pairwise(times)):
        if not (math.isfinite(t) and math.isfinite(t_next) and sign * (t_next - t) > 0):
            way = "fall" if sign < 0 else "rise"
            raise UserError(f"the time grid must {way} at every step, but step {i + 1} goes from {t} to {t_next}")
    return times


def as_state(v: Tensor, x: Tensor) -> Tensor:
    """What a velocity answered, in the dtype of the state. Raises UserError for another shape or no real number."""
    if not isinstance(v, Tensor):
        kind = type(v).__name__
        raise UserError(f"the velocity returned a {kind}, not a tensor; give what is in it, such as its [0] or .sample")
    if v.shape != x.shape:
        raise UserError(f"the velocity returned {tuple(v.shape)} for a state of {tuple(x.shape)}; they must be alike")
    if not v.dtype.is_floating_point:
        raise UserError(f"the velocity returned {v.dtype}; it must be a floating dtype, such as {x.dtype}")
    return v.to(x.dtype)
