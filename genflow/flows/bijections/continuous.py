"""Continuous normalizing flows: the bijection that a velocity carries its points along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genflow.errors import UserError, nearest
from genflow.flows.adjoint import GRADIENTS
from genflow.flows.bijections.base import Bijection, check_condition
from genflow.flows.bijections.jacobian import check_plain
from genflow.flows.divergence import Divergence, current_probing, fingerprint
from genflow.flows.stepping import Stepping
from genflow.flows.velocity_likelihood import check_velocity, path_integral
from genflow.functional import Rng
from genflow.networks.ode_nets import ConcatSquash
from genflow.registry import bijection_export, resolve
from genflow.samplers.solution import state


@bijection_export("cnf")
class CNF(Bijection):
    """dx/dt = v(x, t) from data at t = 0 to noise at t = 1, with ladj = int tr(dv/dx) dt; FFJORD (arXiv 1810.01367).

    velocity: a module, v = velocity(x, t), t: B, or velocity(x, t, condition) where condition_dim > 0; None is a
    small `ConcatSquash`. solver: dopri5, tsit5 or bosh3 to rtol and atol, or any of `TABLEAUS` in so many equal steps.
    divergence, draws: see `Divergence`; the noise of a row is fixed for a solve, and hangs on `probing` or on seed and the
    row. gradient: "checkpoint", "adjoint" or "interpolated" (flows/adjoint.py). kinetic, jacobian: weights of the penalties
    int |v|^2 / D and int |dv/dx|^2 / D of RNODE (arXiv 2002.02798), accumulated in the same solve, either way, within
    `probing`.

    Where gradients flow, a batch shares its steps, to the tolerance in the root mean square over it; elsewhere every sample
    has its own, and is the same alone and in a batch. The ladj chooses no steps. Raises UserError for what cannot be.
    """

    keep_input = True  # the way back is a solve of its own

    def __init__(
        self,
        shape: Sequence[int],
        velocity: nn.Module | None = None,
        *,
        condition_dim: int = 0,
        solver: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        steps: int | None = None,
        divergence: Literal["exact", "hutchinson", "hutchinson_gaussian", "hutch++"] = "exact",
        draws: int = 1,
        gradient: Literal["checkpoint", "adjoint", "interpolated"] = "checkpoint",
        kinetic: float = 0.0,
        jacobian: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if gradient not in GRADIENTS:
            raise UserError(f"gradient {gradient!r} is unknown.{nearest(gradient, GRADIENTS)}")
        for name, weight in (("kinetic", kinetic), ("jacobian", jacobian)):
            if not 0 <= weight < math.inf:
                raise UserError(f"{name} = {weight} must be 0 or more, and finite; RNODE has 0.01")
        self.shape, self.condition_dim, self.seed = tuple(shape), condition_dim, seed
        if velocity is None:
            velocity = ConcatSquash(shape, condition_dim, hidden=(16, 16) if len(shape) == 3 else (64, 64))
        self.velocity = velocity
        self.stepping = Stepping(solver, rtol, atol, steps)
        self.divergence, self.gradient = Divergence(divergence, draws), gradient
        self.inverse_error = 10 * (rtol + atol) if steps is None else 1e-2
        self.weights = {"kinetic": kinetic, "jacobian": jacobian}
        self.nfe = 0

    @property
    def exact(self) -> bool:
        """Whether ladj is no estimate, but for the error of the solve."""
        return self.divergence.kind == "exact"

    @property
    def note(self) -> str:
        """What its likelihoods hang on, to stand beside them."""
        how, divergence = self.stepping, self.divergence
        steps = f"rtol {how.rtol}, atol {how.atol}" if how.steps is None else f"{how.steps} steps"
        return f"{how.solver} to {steps}, divergence {divergence.kind}, draws {divergence.draws}"

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(x, condition, 0.0, 1.0)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(z, condition, 1.0, 0.0)

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The x of `inverse`, without the divergence; `nfe` then tells the evaluations that it took."""
        flow, z = self._flow(z, condition)
        if self._shares(z, condition):
            empty = z.new_zeros(len(z), 0)
            dynamics = lambda y, t, rates: (flow.at(y, t), empty if rates else None)
            solved = self._integrate(dynamics, z, condition, 1.0, 0.0)
            self.nfe = solved.nfe
            return solved.x
        sampler = resolve("sampler", self.stepping.solver)
        tolerances = {"rtol": self.stepping.rtol, "atol": self.stepping.atol, "max_steps": self.stepping.max_steps}
        with torch.no_grad():
            solution = sampler(flow, z, [1.0, 0.0], **tolerances).checked()
        self.nfe = solution.nfe
        return solution.x

    def _solve(self, x: Tensor, condition: Tensor | None, start: float, end: float) -> tuple[Tensor, Tensor]:
        check_plain("a solve")
        flow, x = self._flow(x, condition)
        scope = current_probing()
        rng, index = (Rng(self.seed), fingerprint(x)) if scope is None else (scope.rng, scope.counters)
        probes = self.divergence.probes(x, rng, index, f"divergence/{self.seed}")
        if not self._shares(x, condition):
            with torch.no_grad():
                z, ladj, *_ = path_integral(flow, x, self.divergence, probes, self.stepping, start, end)
            return z, ladj.mean(0)
        wanted = [] if scope is None else [name for name, weight in self.weights.items() if weight]
        dims = math.prod(self.shape)

        def dynamics(y: Tensor, t: float, rates: bool) -> tuple[Tensor, Tensor | None]:
            if not rates:
                return flow.at(y, t), None
            v, divergence, frobenius = self.divergence(flow, y, flow.time(y, t), probes)
            penalties = {"kinetic": lambda: v.square().flatten(1).sum(1) / dims, "jacobian": lambda: frobenius / dims}
            return v, torch.stack([divergence.mean(0), *(penalties[name]() for name in wanted)], 1)

        solved = self._integrate(dynamics, x, condition, start, end)
        ladj, *penalties = solved.q.unbind(1)
        for name, penalty in zip(wanted, penalties, strict=True):
            assert scope is not None
            scope.penalties[name] = scope.penalties.get(name, 0.0) + self.weights[name] * (end - start) * penalty
        return solved.x, ladj

    def _integrate(self, dynamics: Any, x: Tensor, condition: Tensor | None, start: float, end: float) -> Any:
        parameters = [*self.velocity.parameters(), *([] if condition is None else [condition])]
        return GRADIENTS[self.gradient](dynamics, x, parameters, self.stepping, start=start, end=end)

    def _flow(self, x: Tensor, condition: Tensor | None) -> tuple[_Flow, Tensor]:
        """The velocity under its condition, and x in the precision of the solve."""
        if tuple(x.shape[1:]) != self.shape:
            raise UserError(f"cnf: a sample of {tuple(x.shape[1:])}; this flow is of {self.shape}")
        check_condition(condition, self.condition_dim, len(x))
        check_velocity(self.velocity, x, self.stepping)
        return _Flow(self.velocity, (condition,) if self.condition_dim else ()), state(x)

    def _shares(self, x: Tensor, condition: Tensor | None) -> bool:
        """Whether the batch takes its steps together: where they are fixed, or gradients are to go through them."""
        tensors = [x, *([] if condition is None else [condition]), *self.velocity.parameters()]
        return self.stepping.steps is not None or (torch.is_grad_enabled() and any(p.requires_grad for p in tensors))


@dataclass(frozen=True)
class _Flow:
    """A velocity under its condition, as solvers and divergences ask it."""

    velocity: nn.Module
    condition: tuple[Tensor | None, ...]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity(x, t, *self.condition).to(x.dtype)

    @property
    def broadcasts_time(self) -> bool:
        return getattr(self.velocity, "broadcasts_time", False)

    def time(self, x: Tensor, t: float) -> Tensor:
        """One time for all rows, as few as the velocity takes."""
        return x.new_full((1 if self.broadcasts_time else len(x),), t)

    def at(self, x: Tensor, t: float) -> Tensor:
        if (push := self.pushforward) is not None:  # with no tangents: the same pass
            return push(x, self.time(x, t), x.new_empty(0, *x.shape))[0]
        return self(x, self.time(x, t))

    def take(self, rows: Tensor) -> _Flow:
        return _Flow(self.velocity, tuple(None if c is None else c[rows] for c in self.condition))

    @property
    def pushforward(self) -> Any:
        """v and J u, where the velocity has them."""
        push = getattr(self.velocity, "pushforward", None)
        return push and (lambda x, t, tangents: push(x, t, tangents, *self.condition))
