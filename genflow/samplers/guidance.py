"""Guidance: a pair of velocities made one; and other wrappers of a velocity.

The pair is v_c, what is wanted, and v_u, what to move away from: one network with and without its conditions (`cfg`), or
a network and a weaker one (`autoguidance`). A guide (guides.py) says how to move. All wrappers nest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.functional import Time
from genflow.registry import api_export
from genflow.samplers.guides import CFG, Guide, column, rescaled
from genflow.samplers.solution import Velocity, as_state, edges_of, evaluate

PLAIN = CFG()  # the guide, unless another is asked for
SLACK = 1e-6  # how far beyond an interval a time may be and belong to it: times come rounded, as 1 - 0.8 does

# -------------------------------------------------------------------------------------------------------------- the pair


@api_export("Conditioned")
@dataclass(frozen=True)
class Conditioned:
    """The velocity of a network under its conditions: velocity(x, t, *cond). cond: tensors of B rows, or of one.

    velocity may also have at(x, time, *cond), of one time for all rows, a number.
    """

    velocity: Callable[..., Tensor]
    cond: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        _check_tensors(self.cond)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity(x, t, *_rows(self.cond, len(x)))

    def at(self, x: Tensor, time: float) -> Tensor:
        return _at(self.velocity, x, time, _rows(self.cond, len(x)))

    def take(self, rows: Tensor) -> Conditioned:
        return Conditioned(self.velocity, take_rows(self.cond, rows))


@dataclass(frozen=True)
class OneNetwork:
    """Both branches from one call on a doubled batch, [cond, uncond]."""

    velocity: Callable[..., Tensor]
    cond: tuple[Tensor, ...]
    uncond: tuple[Tensor, ...]
    edges: ClassVar[tuple[float, ...]] = ()
    _pairs: dict[int, tuple[object, tuple[Tensor, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        _check_tensors(self.cond)
        _check_tensors(self.uncond)
        if len(self.cond) != len(self.uncond):
            raise UserError(f"cond has {len(self.cond)} tensors and uncond {len(self.uncond)}; they must be alike")
        for a, b in zip(self.cond, self.uncond, strict=True):
            if a.shape[1:] != b.shape[1:]:
                raise UserError(
                    f"a condition is B x {tuple(a.shape[1:])} in cond and B x {tuple(b.shape[1:])} in uncond, which go as "
                    "one batch; pad them alike"
                )

    def plain(self, x: Tensor, t: Time) -> Tensor:
        return evaluate(Conditioned(self.velocity, self.cond), x, t)

    def both(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        twice, pairs = torch.cat([x, x]), self._paired(len(x))
        if isinstance(t, Tensor):
            v = self.velocity(twice, torch.cat([t, t]), *pairs)
        else:
            v = _at(self.velocity, twice, t, pairs)
        v_c, v_u = as_state(v, twice).chunk(2)
        return v_c, v_u

    def _paired(self, n: int) -> tuple[Tensor, ...]:
        """The conditions of n rows of each branch: the same at every step, unless they have been written to since."""
        tensors = (*self.cond, *self.uncond)
        counted = not any(a.is_inference() for a in tensors)  # those of inference mode do not know of what is written
        now = (torch.is_grad_enabled(), *((a._version, a.requires_grad) for a in tensors)) if counted else None
        if counted and n in self._pairs and self._pairs[n][0] == now:
            return self._pairs[n][1]
        pairs = tuple(map(torch.cat, zip(_rows(self.cond, n), _rows(self.uncond, n), strict=True)))
        if counted and all(type(pair) is Tensor for pair in pairs):  # not those of a trace, which are no numbers
            self._pairs[n] = now, pairs
        return pairs

    def take(self, rows: Tensor) -> OneNetwork:
        return OneNetwork(self.velocity, take_rows(self.cond, rows), take_rows(self.uncond, rows))


@dataclass(frozen=True)
class TwoNetworks:
    """The branches from two velocities, each called once."""

    velocity: Velocity
    weak: Velocity

    @property
    def edges(self) -> tuple[float, ...]:
        return (*edges_of(self.velocity), *edges_of(self.weak))

    def plain(self, x: Tensor, t: Time) -> Tensor:
        return evaluate(self.velocity, x, t)

    def both(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        return evaluate(self.velocity, x, t), evaluate(self.weak, x, t)

    @property
    def take(self) -> Callable[[Tensor], TwoNetworks]:  # where both have it
        velocity, weak = self.velocity.take, self.weak.take  # type: ignore[attr-defined]
        return lambda rows: TwoNetworks(velocity(rows), weak(rows))


def _check_tensors(cond: object) -> None:
    wanted = "conditions are a tuple of tensors, such as (tokens, pooled) or (labels,), not"
    if isinstance(cond, Tensor):  # whose rows would be taken for tensors
        raise UserError(f"{wanted} one tensor")
    if not isinstance(cond, tuple | list):
        raise UserError(f"{wanted} of type {type(cond).__name__}")
    if other := [type(each).__name__ for each in cond if not isinstance(each, Tensor)]:
        raise UserError(f"{wanted} one with a {other[0]} in it")


def _at(velocity: Callable[..., Tensor], x: Tensor, time: float, cond: tuple[Tensor, ...]) -> Tensor:
    """The velocity at one time for all rows."""
    at = getattr(velocity, "at", None)
    return velocity(x, x.new_full((len(x),), time), *cond) if at is None else at(x, time, *cond)


def _rows(tensors: tuple[Tensor, ...], n: int) -> tuple[Tensor, ...]:
    if wrong := [len(a) for a in tensors if len(a) not in (1, n)]:
        raise UserError(f"a condition has {wrong[0]} rows for a batch of {n}; give {n} or one")
    return tuple(a.expand(n, *a.shape[1:]) for a in tensors)


def take_rows(tensors: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    """Those rows of tensors of B rows; a tensor of one row is every row's."""
    return tuple(a if len(a) == 1 else a[rows] for a in tensors)


# ------------------------------------------------------------------------------------------------------------- wrappers


@api_export("cfg")
def cfg(
    velocity: Callable[..., Tensor],
    cond: tuple[Tensor, ...],
    uncond: tuple[Tensor, ...],
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    guide: Guide = PLAIN,
    rescale: float = 0.0,
) -> Guided:
    """Classifier-free guidance, on all channels: away from what the network says without its conditions.

    velocity: called as velocity(x, t, *cond), or at(x, time, *cond) as of `Conditioned`; cond, uncond: tensors of B rows,
    or of one. Within the interval lo <= t
    <= hi (Kynkaanniemi et al. 2024, arXiv 2404.07724) both branches go as one doubled batch, [cond, uncond]; outside,
    and for scale 1, there is one plain call on cond. rescale: 0 .. 1, how far to bring each sample's standard deviation
    back to that of v_c (Lin et al. 2023, arXiv 2305.08891, sec. 3.4).

    Raises UserError for a scale that is not finite, an interval that is not 0 <= lo < hi <= 1, such a rescale, and for
    conditions that are one tensor, or more on one side than on the other.
    """
    return Guided(OneNetwork(velocity, cond, uncond), scale, interval, guide, rescale)


@api_export("autoguidance")
def autoguidance(
    velocity: Velocity,
    weak: Velocity,
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    guide: Guide = PLAIN,
    rescale: float = 0.0,
) -> Guided:
    """Away from a weaker model, smaller or less trained, of the same conditions (Karras et al. 2024, arXiv 2406.02507).

    velocity, weak: any velocities v(x, t), guided ones too. One call on each within the interval; outside, and for scale
    1, one on velocity. The rest is as with `cfg`.
    """
    return Guided(TwoNetworks(velocity, weak), scale, interval, guide, rescale)


class _Memory(NamedTuple):
    time: float
    before: Tensor | None  # the sum at the time before
    now: Tensor


@dataclass(eq=False)
class Guided:
    """The velocity that `cfg` and `autoguidance` make.

    A sampler hands over the time as a number (`at`), so that the test of the interval never waits for the device.
    Called with a tensor of times, every row decides for itself, and both branches are always evaluated.

    Momentum is memory along one solve. It begins anew when time rises, when the batch changes and outside the interval;
    at a time seen last, as in Heun's method, the new difference takes the place of the old, so that each time of the
    grid counts once. Nothing tells it where a solve ends: one that begins below where the last ended needs a Guided of its
    own. Rows with times of their own have no common past: then a guide with momentum raises UserError.
    """

    branches: OneNetwork | TwoNetworks
    scale: float
    interval: tuple[float, float]
    guide: Guide
    rescale: float
    _memory: _Memory | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.interval) != 2:
            raise UserError(f"guidance interval = {self.interval} is not two times, lo and hi, such as (0.0, 1.0)")
        lo, hi = self.interval
        if not isinstance(self.guide, Guide):
            raise UserError(f"guide = {self.guide!r} is not a Guide; give one made, such as genflow.APG()")
        if not math.isfinite(self.scale):
            raise UserError(f"guidance = {self.scale} is not a finite number; 1.0 is no guidance")
        if not 0 <= lo < hi <= 1:
            near = tuple(sorted(min(max(float(a), 0.0), 1.0) for a in self.interval))
            near = near if near[0] < near[1] else (0.0, 1.0)
            raise UserError(f"guidance interval = ({lo}, {hi}) is not 0 <= lo < hi <= 1; try {near}")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"rescale = {self.rescale} is not within 0 .. 1; try {float(self.rescale > 1)}")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.interval[0] - SLACK, self.interval[1] + SLACK

    @property
    def edges(self) -> tuple[float, ...]:
        """The ends of the interval belong to it: the jumps are just outside."""
        lo, hi = own = [*self._ends]
        start = 1 - self.guide.zero_init
        own += [math.nextafter(start, 1)] if lo <= start < hi else []
        return tuple(sorted({*(e for e in own if 0 < e < 1 and self.scale != 1), *self.branches.edges}))

    def at(self, x: Tensor, time: float) -> Tensor:
        lo, hi = self._ends
        if self.scale == 1 or not lo <= time <= hi:
            self._memory = None
            return self.branches.plain(x, time)
        if time > 1 - self.guide.zero_init:
            return torch.zeros_like(x)
        v_c, v_u = self.branches.both(x, time)
        if self.guide.momentum:
            v_u = v_c - self._remember(v_c - v_u, time)
        return self._moved(x, v_c, v_u, time)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.scale == 1:
            return self.branches.plain(x, t)
        if self.guide.momentum:
            raise UserError(
                f"guidance with momentum = {self.guide.momentum} needs a sampler in which all pictures share their times, "
                "such as 'heun'; choose one, or momentum = 0"
            )
        lo, hi = self._ends
        v_c, v_u = self.branches.both(x, t)
        v = self._moved(x, v_c, v_u, t).masked_fill(column(t > 1 - self.guide.zero_init, x), 0)
        return torch.where(column((t >= lo) & (t <= hi), x), v, v_c)

    @property
    def take(self) -> Callable[[Tensor], Guided]:  # where the branches have it
        take = self.branches.take
        return lambda rows: replace(self, branches=take(rows))

    def _moved(self, x: Tensor, v_c: Tensor, v_u: Tensor, t: Time) -> Tensor:
        v = self.guide(v_c, v_u, x, t, self.scale)
        return rescaled(v, v_c, self.rescale) if self.rescale else v

    def _remember(self, d: Tensor, time: float) -> Tensor:
        """sum = time d + momentum (the sum at the time before), divided by time; d alone at t = 0, where x_c is x."""
        before, last = None, self._memory
        if last is not None and last.now.shape == d.shape:
            before = last.now if time < last.time else last.before if time == last.time else None
        now = time * d if before is None else time * d + self.guide.momentum * before
        self._memory = _Memory(time, before, now)
        return now / time if before is not None and time > 0 else d


@api_export("reversed")
def reversed(velocity: Callable[..., Tensor]) -> Reversed:
    """A velocity of the other convention (t = 0 noise, t = 1 data) in ours, and the other way round: -v(x, 1 - t).

    Conditions go through: guide such a network as cfg(reversed(network), cond, uncond, ...), since intervals and guides
    speak of our time.
    """
    return Reversed(velocity)


@dataclass(frozen=True)
class Reversed:
    """The velocity that `reversed` makes."""

    velocity: Callable[..., Tensor]

    @property
    def edges(self) -> tuple[float, ...]:
        return tuple(1 - edge for edge in edges_of(self.velocity))

    def at(self, x: Tensor, time: float, *cond: Tensor) -> Tensor:
        return -as_state(_at(self.velocity, x, 1 - time, cond), x)

    def __call__(self, x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        return -as_state(self.velocity(x, 1 - t, *cond), x)

    @property
    def take(self) -> Callable[[Tensor], Reversed]:  # where the velocity has it
        take = self.velocity.take  # type: ignore[attr-defined]
        return lambda rows: Reversed(take(rows))
