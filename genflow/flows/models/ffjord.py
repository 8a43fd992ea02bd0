"""FFJORD: continuous normalizing flows of free-form networks, trained by maximum likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from genflow.errors import UserError, check_least
from genflow.flows.bijections.base import Bijection, Chain
from genflow.flows.bijections.continuous import CNF
from genflow.networks.ode_nets import ConcatSquash
from genflow.registry import network_export


@network_export("ffjord")
@dataclass(frozen=True)
class FFJORDConfig:
    """Free-form continuous flow (Grathwohl et al. 2018, arXiv 1810.01367), regularised as RNODE (arXiv 2002.02798).

    shape, condition_dim: of the data and its condition, filled in from them. blocks: flows one after another. network:
    concatsquash layers, "mlp" for vectors, "conv" for pictures; none is by the shape. activation: none is tanh for vectors,
    softplus for pictures. solver, rtol, atol, steps, divergence, draws, gradient, kinetic, jacobian: as of `CNF`.
    """

    full_precision: ClassVar[bool] = True  # half precision is below the tolerance of a solve

    shape: tuple[int, ...] | None = None
    condition_dim: int | None = None
    blocks: int = 1
    hidden: tuple[int, ...] = (64, 64, 64)
    network: Literal["mlp", "conv"] | None = None
    activation: Literal["tanh", "softplus"] | None = None
    solver: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int | None = None
    divergence: Literal["exact", "hutchinson", "hutchinson_gaussian", "hutch++"] = "hutchinson"
    draws: int = 1
    gradient: Literal["checkpoint", "adjoint", "interpolated"] = "checkpoint"
    kinetic: float = 0.0
    jacobian: float = 0.0

    def build(self) -> Bijection:
        """The flow. Raises UserError for fields that are missing or do not fit."""
        if self.shape is None or self.condition_dim is None:
            raise UserError("ffjord: shape and condition_dim are not set; the data and the text give them, or you do")
        check_least(self, blocks=1)
        fits = "conv" if len(self.shape) == 3 else "mlp"
        if self.network not in (None, fits):
            raise UserError(f"ffjord: network {self.network!r} does not take samples of {self.shape}; {fits!r} does")
        activation = self.activation or ("softplus" if fits == "conv" else "tanh")
        return Chain(
            CNF(
                self.shape,
                ConcatSquash(self.shape, self.condition_dim, hidden=self.hidden, activation=activation),
                condition_dim=self.condition_dim,
                solver=self.solver,
                rtol=self.rtol,
                atol=self.atol,
                steps=self.steps,
                divergence=self.divergence,
                draws=self.draws,
                gradient=self.gradient,
                kinetic=self.kinetic,
                jacobian=self.jacobian,
                seed=block,
            )
            for block in range(self.blocks)
        )
