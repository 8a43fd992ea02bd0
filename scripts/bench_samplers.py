"""What a sampler costs beside the calls of its velocity, and torchdiffeq's on the same problems in the same run.

Every figure is a median of CPU times on one thread, measured in turn: ours, the bare calls, theirs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from claims.common import told
from torch import Tensor, nn

import genflow
from genflow.samplers.adaptive import bosh3, dopri5, tsit5
from genflow.samplers.runge_kutta import euler, heun, midpoint, rk4
from genflow.samplers.solution import Velocity

try:
    from torchdiffeq import odeint
except ImportError:
    odeint = None

Work = Callable[[], object]


def medians(rounds: int, **works: Work) -> dict[str, float]:
    """Seconds of each, measured in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for done in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if done:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def bare(velocity: Velocity, x: Tensor, calls: int) -> Work:
    t = torch.full((len(x),), 0.5, dtype=x.dtype)

    def work() -> None:
        for _ in range(calls):
            velocity(x, t)

    return work


class Theirs:
    """torchdiffeq's solve of a velocity, its calls counted."""

    def __init__(self, velocity: Velocity, x: Tensor) -> None:
        self.velocity, self.x, self.calls = velocity, x, 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return self.velocity(x, t.to(x.dtype).expand(len(x)))

    def solve(self, method: str, grid: Sequence[float], **tolerances: float) -> Tensor:
        self.calls = 0
        return odeint(self, self.x, torch.tensor(grid, dtype=torch.float64), method=method, **tolerances)[-1]


class MLP(nn.Module):
    """A network of three layers of 64 on points of the plane."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        sizes = 3, hidden, hidden, hidden
        layers = [each for a, b in pairwise(sizes) for each in (nn.Linear(a, b), nn.GELU())]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t.unsqueeze(1)], 1))


class Ring(nn.Module):
    """The exact velocity to eight Gaussians on a ring in the plane."""

    def __init__(self, modes: int = 8, radius: float = 1.5, std: float = 0.2) -> None:
        super().__init__()
        angles = torch.arange(modes) * (2 * math.pi / modes)
        self.register_buffer("ring", radius * torch.stack([angles.cos(), angles.sin()], 1))
        self.std = std

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.unsqueeze(1)
        var = ((1 - t) * self.std) ** 2 + t**2
        away = x.unsqueeze(1) - (1 - t).unsqueeze(2) * self.ring  # B x modes x 2
        weights = torch.softmax(away.square().sum(2) / (-2 * var), 1).unsqueeze(2)
        slope = (t - (1 - t) * self.std**2) / var
        return (weights * (slope.unsqueeze(2) * away - self.ring)).sum(1)


def turns(x: Tensor, t: Tensor) -> Tensor:
    """Points of the plane that turn about 0, each by its third number: 3 -> 3."""
    return torch.stack([-x[:, 2] * x[:, 1], x[:, 2] * x[:, 0], torch.zeros_like(t)], 1)


def network(rounds: int, steps: int = 50, batch: int = 4) -> None:
    print(f"A tiny MM-DiT, {batch} x 3 x 16 x 16, {steps} steps: time / bare calls")
    sizes = {"in_channels": 3, "context_dim": 16, "pooled_dim": 16, "sample_size": 4, "patch_size": 4}
    model = genflow.MMDiTConfig(depth=2, hidden=64, heads=2, **sizes).build().eval()
    x, grid = torch.randn(batch, 3, 16, 16), genflow.uniform(steps)
    cond = torch.randn(batch, 4, 16), torch.randn(batch, 16)
    uncond = torch.zeros(1, 4, 16), torch.zeros(1, 16)
    doubled = tuple(torch.cat([c, u.expand_as(c)]) for c, u in zip(cond, uncond, strict=True))
    plain = lambda x, t: model(x, t, *cond)
    twice = lambda x, t: model(x, t, *doubled)
    guided = genflow.cfg(model, cond, uncond, 3.0)
    for name, sampler, velocity, calls in (
        ("euler", euler, plain, bare(plain, x, steps)),
        ("heun", heun, plain, bare(plain, x, 2 * steps - 1)),
        ("euler, guided", euler, guided, bare(twice, torch.cat([x, x]), steps)),
    ):
        t = medians(rounds, ours=lambda s=sampler, v=velocity: s(v, x, grid), bare=calls)
        print(f"  {name:14} {t['ours'] / t['bare']:.3f}")


def fixed_steps(rounds: int, steps: int = 50) -> None:
    print(f"\nFixed steps, {steps} of them, 256 x 2, an MLP of 3 x 64: time / bare calls")
    velocity, x, grid = MLP(), torch.randn(256, 2), genflow.uniform(steps)
    theirs = Theirs(velocity, x)
    for name, sampler in {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4}.items():
        calls = sampler(velocity, x, grid).nfe
        works: dict[str, Work] = {"ours": lambda s=sampler: s(velocity, x, grid), "bare": bare(velocity, x, calls)}
        method = "heun2" if name == "heun" else name
        if odeint is not None:
            theirs.solve(method, grid)
            works["theirs"] = lambda m=method: theirs.solve(m, grid)
            works["their calls"] = bare(velocity, x, theirs.calls)
        t = medians(rounds, **works)
        peer = f"   torchdiffeq {t['theirs'] / t['their calls']:.3f}" if odeint is not None else ""
        print(f"  {name:9} {t['ours'] / t['bare']:.3f}{peer}   ({t['bare'] / calls * 1e6:.0f} us a call)")


def adaptive_time(rounds: int) -> None:
    print(
        "\nAdaptive steps, 256 x 2, rtol 1e-5, atol 1e-6: time / as many bare calls of the whole batch as the longest row"
    )
    x, tolerances, grid = torch.randn(256, 2), {"rtol": 1e-5, "atol": 1e-6}, [1.0, 0.0]
    for problem, velocity in (("MLP", MLP()), ("ring", Ring())):
        for sampler in (dopri5, tsit5, bosh3):
            nfe = sampler(velocity, x, grid, **tolerances).nfe
            t = medians(
                rounds,
                ours=lambda s=sampler, v=velocity: s(v, x, grid, **tolerances),
                compact=lambda s=sampler, v=velocity: s(v, x, grid, compact=True, **tolerances),
                bare=bare(velocity, x, nfe),
            )
            ours, compact = t["ours"] / t["bare"], t["compact"] / t["bare"]
            print(f"  {problem:4} {sampler.__name__:12} {ours:.3f}, compacting {compact:.3f}   ({nfe} NFE)")
        if odeint is not None:
            theirs = Theirs(velocity, x)
            theirs.solve("dopri5", grid, **tolerances)
            nfe = theirs.calls
            t = medians(
                rounds, theirs=lambda o=theirs: o.solve("dopri5", grid, **tolerances), bare=bare(velocity, x, nfe)
            )
            print(f"  {problem:4} torchdiffeq  {t['theirs'] / t['bare']:.3f}                     ({nfe} NFE)")


def adaptive_work() -> None:
    print("\nEvaluations at equal true error (root mean square over 256 samples, float64): mean of samples / longest")
    targets, ladder = (1e-2, 1e-3, 1e-4, 1e-5), [10 ** (-e / 2) for e in range(4, 15)]
    x, grid = torch.randn(256, 2, dtype=torch.float64), [1.0, 0.0]
    for spread in (0.2, 0.05):
        velocity = Ring(std=spread).double()
        exact = tsit5(velocity, x, grid, rtol=1e-12, atol=1e-12, max_steps=100_000).x
        theirs = Theirs(velocity, x)
        problem = f"ring {spread}"

        def at_targets(points: list[tuple[float, ...]]) -> list[np.ndarray]:
            error, *costs = np.log(np.array(sorted(points))).T
            return [np.exp(np.interp(np.log(targets), error, cost)) for cost in costs]

        for sampler in (dopri5, tsit5, bosh3):
            points = []
            for tol in ladder:
                solution = sampler(velocity, x, grid, rtol=tol, atol=tol / 10, max_steps=100_000)
                mean = solution.statistics.evaluations.double().mean().item()
                points.append(((solution.x - exact).square().mean().sqrt().item(), mean, solution.nfe))
            cells = "   ".join(f"{m:5.0f} /{n:5.0f}" for m, n in zip(*at_targets(points), strict=True))
            print(f"  {problem:9} {sampler.__name__:12} {cells}")
        if odeint is not None:
            points = []
            for tol in ladder:
                error = (theirs.solve("dopri5", grid, rtol=tol, atol=tol / 10) - exact).square().mean().sqrt().item()
                points.append((error, theirs.calls))
            cells = "   ".join(f"      {n:6.0f}" for n in at_targets(points)[0])
            print(f"  {problem:9} torchdiffeq  {cells}")
    print(f"            true error:  {'   '.join(f'{target:12.0e}' for target in targets)}")


def one_hard_sample() -> None:
    print("\n64 easy samples (1 radian) and a hard one (100), rtol 1e-5, atol 1e-6: row evaluations per sample")
    x, tolerances, grid = torch.randn(65, 3, dtype=torch.float64), {"rtol": 1e-5, "atol": 1e-6}, [1.0, 0.0]
    x[:, 2] = 1
    x[-1, 2] = 100
    angle = -x[:, 2]
    exact = torch.stack(
        [x[:, 0] * angle.cos() - x[:, 1] * angle.sin(), x[:, 0] * angle.sin() + x[:, 1] * angle.cos(), x[:, 2]], 1
    )
    seen = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        return turns(x, t)

    solution = dopri5(velocity, x, grid, compact=True, **tolerances)
    ours = sum(seen) / len(x)
    error = (solution.x - exact).abs().amax(1)
    print(f"  dopri5       {ours:7.1f}   (largest error: easy {error[:-1].max():.1e}, hard {error[-1]:.1e})")
    if odeint is not None:
        theirs = Theirs(turns, x)
        error = (theirs.solve("dopri5", grid, **tolerances) - exact).abs().amax(1)
        print(
            f"  torchdiffeq  {theirs.calls:7.1f}   (largest error: easy {error[:-1].max():.1e}, hard {error[-1]:.1e})"
            f"   {theirs.calls / ours:.1f} x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.empty(2**22)  # 16 MiB, freed at once: from here on glibc keeps the heap that it has, whatever the call
    if odeint is None:
        print("torchdiffeq is not installed (pip install torchdiffeq): its columns are left out\n")
    with torch.no_grad():
        network(rounds)
        fixed_steps(rounds)
        adaptive_time(rounds)
        adaptive_work()
        one_hard_sample()


if __name__ == "__main__":
    told(main)
