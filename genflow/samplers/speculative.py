"""Speculative sampling of an SDE: steps guessed with the last prediction, verified many at a time, exactly.

The idea of speculative decoding (ar/decoders.py) for steps that are Gaussian: a guess from N(m_q, s^2) becomes a draw from
N(m_p, s^2) by reflection coupling, and most often it is one already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from genflow.errors import check_whole
from genflow.functional import Rng, noise_from_seeds, noise_from_velocity, velocity_from_x, x_from_velocity
from genflow.registry import sampler_export
from genflow.samplers.parallel import ParallelSolution, _Path, _to
from genflow.samplers.solution import Progress, Velocity, as_state
from genflow.samplers.stochastic import _diffusion, _falling


@dataclass(frozen=True)
class SpeculativeSolution(ParallelSolution):
    """tested, held: B int64, guesses of each row that were verified, and that stood."""

    tested: Tensor | None = None
    held: Tensor | None = None


def reflected(z: Tensor, delta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The maximal coupling of N(m_q, I) and N(m_p, I) by reflection (De Bortoli et al. 2025, arXiv 2501.05370).

    z: B x ..., standard normal, of the guess m_q + z; delta: m_q - m_p, as z; u: B, uniform in (0, 1). Returns what to add
    to m_p for a draw from N(m_p, I), and whether that is the guess itself, B, which has probability 2 Phi(-|delta| / 2).
    """
    flat, d = (each.unsqueeze(-1).flatten(1) for each in (z, delta))
    along, square = (flat * d).sum(1), d.square().sum(1)
    stands = u.log() <= -along - square / 2  # phi(z + delta) / phi(z)
    turned = flat - 2 * (along / square.clamp(min=torch.finfo(square.dtype).tiny))[:, None] * d
    return torch.where(stands[:, None], flat + d, turned).view_as(z), stands


@sampler_export("speculative", family="sde", order=1)
def speculative(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    seeds: Sequence[int],
    window: int = 4,
    diffusion: str = "sigma",
    scale: float = 1.0,
    progress: Progress | None = None,
    record: bool = False,
) -> SpeculativeSolution:
    """Samples of `euler_maruyama`, whose steps are guessed `window` at a time and verified in one call of the network.

    De Bortoli et al. 2025 (arXiv 2501.05370), with frozen drafts: the guesses take the picture that the network foretold
    last. A guess that does not stand is reflected, which is a draw from the right law, and the next window begins there. A
    step's noise has |m_q - m_p| / s to cover, which grows with the root of a picture's dimensions and with the step: it pays
    for many short steps, and where a call of window x B rows takes little longer than one of B.

    Exact in law, up to rounding, not step for step: another window gives another sample of the same SDE. diffusion, scale:
    as of `euler_maruyama`; steps without noise, such as the last one, are computed and never guessed at. The velocity gets
    rows of different times, as from `picard`. nfe counts all evaluations of a picture, sweeps the calls after one another.

    Raises UserError for a window that is not a whole number above 0, and as `euler_maruyama`.
    """
    check_whole(window=window)
    w = _diffusion(diffusion, scale)
    solve = _falling(velocity, x, grid, seeds, progress, record)
    grid, x = solve.grid, solve.x
    steps, places = len(grid) - 1, torch.arange(min(int(window), len(grid) - 1), device="cpu")
    times = torch.tensor(grid, dtype=torch.float64, device="cpu")
    h = -times.diff()
    rate = times.new_tensor([w(t, t_next**2 / (t - t_next)) for t, t_next in pairwise(grid)])
    still = torch.where(rate * h > 0, steps - 1, torch.arange(steps, device="cpu"))
    reach = still.flip(0).cummin(0).values.flip(0)  # the first step without noise from each on: there a window ends
    noise = _Noise(seeds, x)

    # The host keeps for each row the step up to which it is settled, and what it spent.
    at, spent, tested, held = torch.zeros(4, len(x), dtype=torch.int64, device="cpu")
    foretold: Tensor | None = None
    path, sweeps = _Path(x, grid) if record else None, 0
    part, part_of = velocity, None

    def numbers(per_step: Tensor, k: Tensor) -> Tensor:
        """Those of steps k, B, to broadcast over x."""
        return _to(per_step[k].to(x.dtype), x).view(-1, *[1] * (x.dim() - 1))

    def mean(z: Tensor, v: Tensor, k: Tensor) -> Tensor:
        """Of the step k from z: z - h (v - w/2 score)."""
        t = numbers(times, k)
        return z - numbers(h, k) * (v + numbers(rate, k) / (2 * t) * noise_from_velocity(z, v, t))

    while (at < steps).any():
        # Guess the states of the window, with the picture foretold last ...
        ahead = reach[at.clamp(max=steps - 1)] - at  # -1 where a row has arrived
        width = 1 if foretold is None else min(len(places), 1 + int(ahead.max()))
        guessed, means = [x], []
        number = (at[:, None] + places[:width]).clamp(max=steps - 1)  # beyond the end nothing is used
        for i in range(width - 1):
            k, z = number[:, i], guessed[-1]
            assert foretold is not None
            means.append(mean(z, velocity_from_x(z, foretold, numbers(times, k)), k))
            guessed.append(means[-1] + numbers((rate * h).sqrt(), k) * noise(k))

        # ... evaluate the velocity at all of them ...
        states = torch.stack(guessed, 1)
        rows, slots = (places[:width] <= ahead[:, None]).nonzero(as_tuple=True)
        cells = _to(rows, x), _to(slots, x)
        if hasattr(velocity, "take") and (part_of is None or not torch.equal(part_of, rows)):
            part, part_of = velocity.take(cells[0]), rows
        z = states[cells]
        answer = as_state(part(z, _to(times[number[rows, slots]].to(z.dtype), x)), z)
        v = torch.zeros_like(states).index_put(cells, answer)
        spent, sweeps = spent + torch.bincount(rows, minlength=len(x)), sweeps + 1

        # ... and keep what stands, with the reflected one after it.
        going = at < steps
        new: list[Tensor] = []
        settled = torch.zeros_like(at)
        for i in range(width):
            k = number[:, i]
            m, s = mean(states[:, i], v[:, i], k), numbers((rate * h).sqrt(), k)
            z, good, follows = noise(k), torch.zeros_like(going), going & (i < ahead)
            if i < width - 1:
                delta = torch.where(s > 0, (means[i] - m) / s.clamp(min=1e-30), 0)
                turned, stands = reflected(z, delta, noise.uniform(k))
                # a row's last step is not guessed at, however far the windows of others reach
                z, good = torch.where(_to(follows, x).view_as(s), turned, z), stands.cpu() & follows
            new.append(torch.where(_to(going, x).view_as(s), m + s * z, new[-1] if new else x))
            settled += going
            tested += follows & (i < width - 1)
            held += good
            going = good
        sums = torch.stack([x, *new], 1)
        if path is not None:
            path.add(sums, at, settled, spent)
        every, last = torch.arange(len(x), device=x.device), _to((settled - 1).clamp(min=0), x)
        t_last = numbers(times, number.gather(1, (settled - 1).clamp(min=0)[:, None])[:, 0])
        foretold = x_from_velocity(states[every, last], v[every, last], t_last)
        x, at = sums[every, _to(settled, x)], at + settled
        noise.forget(at)
        if progress is not None:
            progress(int(at.min()), steps)

    trajectory = None if path is None else path.trajectory()
    most = max(spent.tolist(), default=0)
    return SpeculativeSolution(x, most, trajectory, sweeps=sweeps, tested=tested, held=held)


class _Noise:
    """The noise of each row's steps, a function of its seed and the step alone; kept until the step is settled."""

    def __init__(self, seeds: Sequence[int], x: Tensor) -> None:
        self.seeds, self.x = list(seeds), x
        self.kept: dict[tuple[int, int], Tensor] = {}

    def __call__(self, k: Tensor) -> Tensor:
        """Standard normal, like x: row i that of step k[i]."""
        rows = []
        for i, step in enumerate(k.tolist()):
            if (i, step) not in self.kept:
                self.kept[i, step] = noise_from_seeds([self.seeds[i]], self.x.shape[1:], step=step, stream="wiener").to(
                    self.x
                )
            rows.append(self.kept[i, step])
        return torch.cat(rows) if rows else torch.empty_like(self.x)

    def uniform(self, k: Tensor) -> Tensor:
        """Uniform in (0, 1), B: row i that of step k[i]."""
        zero = torch.zeros(1, dtype=torch.int64, device="cpu")
        each = [Rng(seed, step).uniform("accept", zero) for seed, step in zip(self.seeds, k.tolist(), strict=True)]
        return torch.cat([zero.new_empty(0, dtype=torch.float64), *each]).to(self.x.dtype).to(self.x.device)

    def forget(self, at: Tensor) -> None:
        """Drop the steps before at[i] of each row i."""
        settled = at.tolist()
        self.kept = {key: z for key, z in self.kept.items() if key[1] >= settled[key[0]]}
