"""Continuous flows beside torchdiffeq (training) and zuko (likelihood): time, memory and error, both sides in one run.

Training: one step of maximum likelihood of the same network, ours checkpointed, theirs odeint_adjoint on FFJORD's augmented
state. Likelihood: the same network and noise under zuko's transform, and under flow_matching's solver where that is
installed. What is compared is the time at an equal error, interpolated between tolerances. Times are medians of CPU seconds,
measured in turn on one thread; errors are root mean squares against a solve in float64. In float32 log p of a picture has a
rounding of about 1e-3 nats, beneath which there is nothing to compare.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import torch
import zuko
from claims.common import told
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchdiffeq import odeint_adjoint

from genflow.flows.bijections.continuous import CNF, _Flow
from genflow.flows.divergence import Divergence, probing
from genflow.flows.stepping import Stepping
from genflow.flows.velocity_likelihood import path_integral
from genflow.functional import Rng
from genflow.networks.ode_nets import ConcatSquash

Work = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """A network, its weights moved by so much from the start, and data."""

    shape: tuple[int, ...]
    batch: int
    hidden: tuple[int, ...]
    activation: str
    divergence: str
    tolerance: float
    moved: float

    def build(self) -> tuple[ConcatSquash, Tensor]:
        torch.manual_seed(0)
        net = ConcatSquash(self.shape, hidden=self.hidden, activation=self.activation)  # type: ignore[arg-type]
        with torch.no_grad():
            for p in net.parameters():
                p.add_(self.moved * torch.randn_like(p))
        return net, torch.randn(self.batch, *self.shape)


PROBLEMS = {
    "2d exact, smooth": Problem((2,), 512, (64, 64, 64), "tanh", "exact", 1e-5, 0.2),
    "2d exact, curved": Problem((2,), 512, (64, 64, 64), "tanh", "exact", 1e-5, 0.5),
    "2d hutchinson, smooth": Problem((2,), 512, (64, 64, 64), "tanh", "hutchinson", 1e-5, 0.2),
    "2d hutchinson, curved": Problem((2,), 512, (64, 64, 64), "tanh", "hutchinson", 1e-5, 0.5),
    "mnist, dopri5": Problem((1, 28, 28), 32, (16, 16, 16), "softplus", "hutchinson", 1e-3, 0.3),
}
TIGHTER = (0.5, 0.25, 0.1)  # of the tolerance, where ours is the less exact at it


def nll(z: Tensor, ladj: Tensor) -> Tensor:
    return (0.5 * z.square().flatten(1).sum(1) - ladj).mean()


class Ours:
    def __init__(self, problem: Problem, tolerance: float | None = None, double: bool = False) -> None:
        net, x = problem.build()
        tolerance = tolerance or problem.tolerance
        self.x = x.double() if double else x
        self.flow = CNF(problem.shape, net, divergence=problem.divergence, rtol=tolerance, atol=tolerance)  # type: ignore[arg-type]
        if double:
            self.flow.double()

    def step(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        with probing(Rng(0), torch.arange(len(self.x))):
            z, ladj = self.flow(self.x)
        return z.detach(), ladj.detach(), torch.autograd.grad(nll(z, ladj), [*self.flow.velocity.parameters()])


class Theirs(nn.Module):
    """FFJORD's dynamics: the state beside its divergence, which is one vjp, or D of them, with a graph."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.net, self.x = problem.build()
        self.problem, self.calls = problem, 0
        probes = Divergence(problem.divergence).probes(self.x, Rng(0), torch.arange(len(self.x)), "divergence/0")  # type: ignore[arg-type]
        self.noise = None if probes is None else probes[0]

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.calls += 1
        x = state[0]
        with torch.enable_grad():
            x = x.requires_grad_() if x.is_leaf else x
            v = self.net(x, t.view(1))
            if self.noise is not None:
                (e,) = torch.autograd.grad(v, x, self.noise, create_graph=True)
                return v, (e * self.noise).flatten(1).sum(1)
            flat = v.flatten(1)
            trace = flat.new_zeros(len(flat))
            for i in range(flat.shape[1]):
                trace = trace + torch.autograd.grad(flat[:, i].sum(), x, create_graph=True)[0].flatten(1)[:, i]
            return v, trace

    def step(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        self.calls = 0
        tolerance = self.problem.tolerance
        state = (self.x, torch.zeros(len(self.x)))
        z, ladj = odeint_adjoint(self, state, torch.tensor([0.0, 1.0]), rtol=tolerance, atol=tolerance, method="dopri5")
        grads = torch.autograd.grad(nll(z[-1], ladj[-1]), [*self.net.parameters()])
        return z[-1].detach(), ladj[-1].detach(), grads


def errors(found: tuple, exact: tuple) -> tuple[float, float, float]:
    """Of z and of ladj, root mean squares; of the gradient, relative to it."""
    (z, ladj, grads), (z0, ladj0, grads0) = found, exact
    off = sum((a - b).square().sum() for a, b in zip(grads, grads0, strict=True))
    relative = (off / sum(b.square().sum() for b in grads0)).sqrt()
    return (z - z0).square().mean().sqrt().item(), (ladj - ladj0).square().mean().sqrt().item(), relative.item()


def medians(rounds: int, works: dict[str, Work]) -> dict[str, float]:
    """CPU seconds of each, measured in turn after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for done in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if done:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def peak(work: Work) -> float:
    """MiB of tensors that a piece of work has at once, beyond what was there before: by the allocator's own log."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    changes = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in changes)) / 2**20


def at_error(curve: list[tuple[float, float]], error: float) -> float | None:
    """The seconds of a curve of (error, seconds) at an error, linear in their logarithms between its points.

    Beyond its loosest point the seconds there; None where it never is so exact.
    """
    below, above = [p for p in curve if p[0] <= error], [p for p in curve if p[0] > error]
    if not below:
        return None
    low = max(below)
    if not above:
        return low[1]
    high = min(above)
    part = math.log(error / low[0]) / math.log(high[0] / low[0])
    return low[1] * (high[1] / low[1]) ** part


def training(rounds: int, names: list[str]) -> None:
    print("A training step against torchdiffeq's adjoint; errors of z, ladj and the gradient")
    for name in names:
        problem = PROBLEMS[name]
        exact = Ours(problem, max(problem.tolerance / 1000, 1e-9), double=True).step()
        theirs, found = Theirs(problem), errors(Theirs(problem).step(), exact)
        sides: dict[str, Any] = {"ours": Ours(problem)}
        if any(a > b for a, b in zip(errors(sides["ours"].step(), exact), found, strict=True)):
            for factor in TIGHTER:
                sides[f"ours at {factor:g} of it"] = Ours(problem, max(problem.tolerance * factor, 1e-6))
        sides["theirs"] = theirs
        seconds = medians(rounds, {side: each.step for side, each in sides.items()})
        print(f"  {name}, batch {problem.batch}, tolerance {problem.tolerance:g}")
        curves: list[list[tuple[float, float]]] = [[], [], []]
        for side, each in sides.items():
            off = errors(each.step(), exact)
            cells = " ".join(f"{e:.1e}" for e in off)
            ratio = "" if side == "theirs" else f"   {seconds['theirs'] / seconds[side]:.2f} x"
            size = f"{peak(each.step):7.1f} MiB"
            print(f"    {side:20} {seconds[side] * 1e3:8.1f} ms {size}   {cells}{ratio}")
            if side != "theirs":
                for curve, error in zip(curves, off, strict=True):
                    curve.append((error, seconds[side]))
        if len(sides) > 2:
            times = [at_error(curve, error) for curve, error in zip(curves, found, strict=True)]
            cells = ", ".join("-" if t is None else f"{seconds['theirs'] / t:.2f} x" for t in times)
            print(f"    at their errors of z, ladj and gradient: {cells}")


LIKELIHOODS = {
    "2d exact": Problem((2,), 512, (64, 64, 64), "tanh", "exact", 1e-5, 0.4),
    "3x8x8 exact": Problem((3, 8, 8), 8, (32, 32), "softplus", "exact", 1e-5, 0.2),
    "1x28x28 hutchinson": Problem((1, 28, 28), 32, (16, 16, 16), "softplus", "hutchinson", 1e-5, 0.3),
}
TOLERANCES = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # of each side, atol a tenth
EXACT = 3e-9  # of the reference, in float64


class Likelihoods:
    """log p of one batch by the same network and noise on every side, to a tolerance."""

    def __init__(self, problem: Problem, double: bool = False) -> None:
        net, x = problem.build()
        probes = Divergence("hutchinson").probes(x, Rng(0), torch.arange(len(x)))
        assert probes is not None
        dtype = torch.float64 if double else torch.float32
        self.problem, self.net, self.x, self.noise = problem, net.eval().to(dtype), x.to(dtype), probes[0].to(dtype)
        self.exact = problem.divergence == "exact"

    def log_prob(self, z: Tensor, ladj: Tensor) -> Tensor:
        """Less the normalisation, in float64, so that only the sides' own rounding is seen."""
        return ladj.double() - 0.5 * z.double().flatten(1).square().sum(1)

    def ours(self, tolerance: float) -> Tensor:
        estimator = Divergence(self.problem.divergence)  # type: ignore[arg-type]
        probes = None if self.exact else self.noise.unsqueeze(0)
        stepping = Stepping(rtol=tolerance, atol=tolerance / 10)
        z, ladj, _, nfe, divergences = path_integral(_Flow(self.net, ()), self.x, estimator, probes, stepping)
        self.counts = f"{nfe} evaluations, {divergences} with the divergence"
        return self.log_prob(z, ladj[0])

    def zuko(self, tolerance: float) -> Tensor:
        calls = 0

        def f(t: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self.net(y.unflatten(1, self.problem.shape), t.view(1)).flatten(1)

        transform = zuko.transforms.FreeFormJacobianTransform(f, rtol=tolerance, atol=tolerance / 10, exact=self.exact)
        with patch("torch.randn_like", lambda y: self.noise.flatten(1)):
            z, ladj = transform.call_and_ladj(self.x.flatten(1))
        self.counts = f"{calls} evaluations with the divergence"
        return self.log_prob(z, ladj)

    def flow_matching(self, tolerance: float) -> Tensor:
        """Its exact divergence is of vectors alone: a picture is handed over as one."""
        from flow_matching.solver import ODESolver
        from flow_matching.utils import ModelWrapper

        calls = 0

        class Wrapped(ModelWrapper):
            def forward(wrapped, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
                nonlocal calls
                calls += 1
                # Its time runs from 1, data, to 0.
                return -self.net(x.unflatten(1, self.problem.shape), (1 - t).view(1)).flatten(1)

        # Its noise is 1 where a normal number is negative.
        with patch("torch.randn_like", lambda y: -self.noise.flatten(1)):
            _, log_p = ODESolver(Wrapped(nn.Identity())).compute_likelihood(
                self.x.flatten(1),
                lambda z: -0.5 * z.double().square().sum(1),
                method="dopri5",
                step_size=None,
                rtol=tolerance,
                atol=tolerance / 10,
                exact_divergence=self.exact,
            )
        self.counts = f"{calls} evaluations with the divergence"
        return log_p.double()


def likelihood(rounds: int, names: list[str]) -> None:
    print(
        "\nA likelihood: time and error of log p, in nats, at each side's tolerances, and at equal errors, interpolated"
    )
    for name in names:
        problem = LIKELIHOODS[name]
        sides, reference = Likelihoods(problem), Likelihoods(problem, double=True)
        works: dict[str, Callable[[float], Tensor]] = {"ours": sides.ours, "zuko": sides.zuko}
        if find_spec("flow_matching"):
            works["flow_matching"] = sides.flow_matching
        print(f"  {name}, batch {problem.batch}")
        with torch.no_grad():
            exact = reference.ours(EXACT)
            off = float((reference.zuko(EXACT) - exact).square().mean().sqrt())
            print(f"    in float64 at {EXACT:g}, ours and zuko are {off:.1e} apart")
            slow = problem.divergence == "exact" and math.prod(problem.shape) > 100
            tolerances = TOLERANCES[:3:2] if slow else TOLERANCES
            curves: dict[str, list[tuple[float, float]]] = {}
            seconds = medians(
                rounds, {f"{side} {t:g}": partial(work, t) for side, work in works.items() for t in tolerances}
            )
            for side, work in works.items():
                for t in tolerances:
                    error = float((work(t) - exact).square().mean().sqrt())
                    took = seconds[f"{side} {t:g}"]
                    curves.setdefault(side, []).append((error, took))
                    print(f"    {side:14} rtol {t:<7g} {took * 1e3:8.1f} ms   error {error:.1e}   {sides.counts}")
        for side in [side for side in curves if side != "ours"]:
            ratios = []
            for t, (error, took) in zip(tolerances, curves[side], strict=True):
                mine = at_error(curves["ours"], error)
                ratios.append(f"{t:g}: " + ("-" if mine is None else f"{took / mine:.2f} x"))
            print(f"    at the error that {side} has at rtol {', '.join(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="problems with this in their names: training 2d, likelihood 1x28x28")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if names := [name for name in PROBLEMS if args.only in f"training {name}"]:
        training(args.rounds, names)
    if names := [name for name in LIKELIHOODS if args.only in f"likelihood {name}"]:
        likelihood(args.rounds, names)


if __name__ == "__main__":
    told(main)
