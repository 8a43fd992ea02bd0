"""Continuous flows beside torchdiffeq (training) and zuko (likelihood): time, memory and error, both sides in one run.

Training: one step of maximum likelihood of the same network, ours checkpointed, theirs odeint_adjoint on FFJORD's augmented
state. Likelihood: the same network under zuko's transform. Times are medians of CPU seconds, measured in turn on one
thread; errors are root mean squares against a solve in float64 at a hundredth of the tolerance or less. Where one side is
the more exact at the same tolerance, it says so: `equal error` is ours at the loosest tolerance of a ladder at which none of
its errors is above theirs; the likelihoods are compared so alone.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import torch
import zuko
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
LADDER = [0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.025, 0.01]


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


def training(rounds: int, names: list[str]) -> None:
    print("A training step against torchdiffeq's adjoint; errors of z, ladj and the gradient")
    for name in names:
        problem = PROBLEMS[name]
        exact = Ours(problem, max(problem.tolerance / 1000, 1e-9), double=True).step()
        theirs, found = Theirs(problem), errors(Theirs(problem).step(), exact)
        sides: dict[str, Any] = {"ours": Ours(problem)}
        level = errors(sides["ours"].step(), exact)
        if any(a > b for a, b in zip(level, found, strict=True)):
            for factor in LADDER:
                tighter = Ours(problem, max(problem.tolerance * factor, 1e-6))
                if all(a <= b for a, b in zip(errors(tighter.step(), exact), found, strict=True)):
                    sides[f"equal error, {factor:g} of the tolerance"] = tighter
                    break
        seconds = medians(rounds, {**{side: each.step for side, each in sides.items()}, "theirs": theirs.step})
        print(f"  {name}, batch {problem.batch}, tolerance {problem.tolerance:g}")
        for side, each in (*sides.items(), ("theirs", theirs)):
            cells = " ".join(f"{e:.1e}" for e in errors(each.step(), exact))
            ratio = "" if side == "theirs" else f"   {seconds['theirs'] / seconds[side]:.2f} x"
            size = f"{peak(each.step):7.1f} MiB"
            print(f"    {side:36} {seconds[side] * 1e3:8.1f} ms {size}   {cells}{ratio}")


LIKELIHOODS = {
    "2d exact": Problem((2,), 512, (64, 64, 64), "tanh", "exact", 1e-5, 0.4),
    "3x8x8 exact": Problem((3, 8, 8), 8, (32, 32), "softplus", "exact", 1e-5, 0.2),
    "1x28x28 hutchinson": Problem((1, 28, 28), 32, (16, 16, 16), "softplus", "hutchinson_gaussian", 1e-5, 0.3),
}


def likelihood(rounds: int) -> None:
    print(
        "\nz and ladj of the same network, noise and error beside zuko's transform (at its tolerances); errors of z and ladj"
    )
    for name, problem in LIKELIHOODS.items():
        net, x = problem.build()
        net.eval()
        noise, flat = torch.randn_like(x), x.flatten(1)
        estimator = Divergence(problem.divergence)  # type: ignore[arg-type]

        def ours(tolerance: float, net: nn.Module = net, x: Tensor = x, estimator=estimator, noise=noise) -> tuple:  # type: ignore[no-untyped-def]
            probes = None if estimator.kind == "exact" else noise.to(x).unsqueeze(0)
            stepping = Stepping(rtol=tolerance, atol=tolerance / 10)
            z, ladj, _, nfe, divergences = path_integral(_Flow(net, ()), x, estimator, probes, stepping)
            return z.flatten(1), ladj[0], nfe, divergences

        def theirs(
            net: nn.Module = net, flat: Tensor = flat, problem=problem, noise=noise, rtol=1e-5, atol=1e-6
        ) -> tuple:  # type: ignore[no-untyped-def]
            def f(t: Tensor, y: Tensor) -> Tensor:
                theirs.nfe += 1  # type: ignore[attr-defined]
                return net(y.unflatten(1, problem.shape), t.view(1)).flatten(1)

            theirs.nfe = 0  # type: ignore[attr-defined]
            transform = zuko.transforms.FreeFormJacobianTransform(
                f, rtol=rtol, atol=atol, exact=problem.divergence == "exact"
            )
            with patch("torch.randn_like", lambda y: noise.flatten(1).to(y)):
                return *transform.call_and_ladj(flat), theirs.nfe  # type: ignore[attr-defined]

        def off(found: tuple, exact: tuple) -> list[float]:
            return [(a - b).square().mean().sqrt().item() for a, b in zip(found[:2], exact[:2], strict=True)]

        with torch.no_grad():
            exact = theirs(copy.deepcopy(net).double(), flat.double(), rtol=3e-8, atol=3e-9)
            level = off(theirs(), exact)
            for tolerance in (1e-3, 3e-4, 1e-4, 5e-5, 3e-5, 1e-5, 5e-6, 3e-6, 2e-6, 1e-6):
                found = ours(tolerance)
                if all(a <= b for a, b in zip(off(found, exact), level, strict=True)):
                    break
            seconds = medians(rounds, {"ours": lambda t=tolerance: ours(t), "theirs": theirs})
        print(f"  {name}, batch {problem.batch}: {seconds['theirs'] / seconds['ours']:.2f} x")
        cells = " ".join(f"{e:.1e}" for e in off(found, exact))
        counts = f"{found[2]} evaluations, {found[3]} with the divergence"
        print(f"    ours {seconds['ours'] * 1e3:8.1f} ms, rtol {tolerance:g}: {cells}; {counts}")
        cells = " ".join(f"{e:.1e}" for e in level)
        print(
            f"    zuko {seconds['theirs'] * 1e3:8.1f} ms, rtol 1e-05: {cells}; {theirs()[2]} evaluations with the divergence"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", help="training problems whose name has this, or likelihood")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in PROBLEMS if not args.only or args.only in name]
    if names:
        training(args.rounds, names)
    if not args.only or args.only in "likelihood":
        likelihood(args.rounds)


if __name__ == "__main__":
    main()
