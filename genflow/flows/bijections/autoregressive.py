"""Masked autoregressive bijections: every number of a sample is mapped as those before it say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from genflow.errors import UserError, nearest
from genflow.flows.bijections.base import Bijection, Inverse, check_condition, per_sample
from genflow.flows.bijections.elementwise import channels_and_places
from genflow.flows.bijections.jacobian import first_only, jacobian
from genflow.flows.bijections.splines import rational_quadratic, rational_quadratic_inverse, spline_parameters
from genflow.functional import wide
from genflow.native.library import transformed, uncompiled
from genflow.networks.made import MADE
from genflow.registry import bijection_export

Univariate = Literal["affine", "spline"]


@bijection_export("masked_autoregressive")
class MaskedAutoregressive(Bijection):
    """z_i = g(x_i; MADE(x_<i, condition)) (MAF, Papamakarios et al. 2017, arXiv 1705.07057, eq. 4-5).

    forward is one pass of the network; inverse goes number by number, D steps that together cost the multiplications of
    one pass (`MADE.ancestral`), or D passes under torch.func's transforms. With gradients, first ones only, it takes
    the whole Jacobian besides: call it without where none are wanted. Pictures are read channel by channel, row by row.

    univariate: "affine", x_i exp(s) + t with s = limit tanh(u / limit), or "spline", the rational-quadratic ones of Neural
    Spline Flows (arXiv 1906.04032). bins, bound: of the splines, which are the identity beyond -bound .. bound. hidden,
    residual: of the MADE. reverse: from the last number to the first. Raises UserError for a shape that is no sample's.
    """

    keep_input = True  # the inverse is slow
    limit = 3.0  # nats: scales within 0.05 .. 20

    def __init__(
        self,
        shape: Sequence[int],
        *,
        condition_dim: int = 0,
        hidden: Sequence[int] = (64, 64),
        residual: bool = False,
        univariate: Univariate = "affine",
        bins: int = 8,
        bound: float = 3.0,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        channels_and_places(shape)
        if univariate not in ("affine", "spline"):
            raise UserError(f"univariate {univariate!r} is none.{nearest(univariate, ('affine', 'spline'))}")
        if not 0 < bound < math.inf:
            raise UserError(f"bound = {bound} must be positive and finite, such as 3")
        self.condition_dim, self.univariate, self.bound = condition_dim, univariate, bound
        self.network = MADE(
            features := math.prod(shape),
            2 if univariate == "affine" else spline_parameters(bins),
            condition_dim,
            hidden=hidden,
            order=range(features)[:: -1 if reverse else 1],
            residual=residual,
        )

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flat = wide(x).flatten(1)
        # Never in bf16: there the slices of the inverse would not be the same numbers.
        with torch.autocast(x.device.type, enabled=False):
            parameters = self.network(flat.to(self._dtype), self._condition(condition, len(x))).to(flat.dtype)
        z, log = self._map(flat, parameters)
        return z.view(x.shape), per_sample(log)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.decode(z, condition)
        if torch.is_grad_enabled() and not transformed():
            x = self._differentiable(x, z, condition)
        return x, -self(x, condition)[1]

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        flat = wide(z).flatten(1)
        if transformed():
            return self._plainly(flat, condition).view(z.shape)

        def choose(i: int, parameters: Tensor) -> Tensor:
            x, _ = self._unmap(flat[:, i : i + 1], parameters.to(flat.dtype).unsqueeze(2))
            return x.squeeze(1)

        with torch.autocast(z.device.type, enabled=False):
            x = self.network.ancestral(choose, len(z), self._condition(condition, len(z)))
        return x.to(flat.dtype).reshape(z.shape)

    def _plainly(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """x of z, B x D each, by D passes, which any transform of torch.func goes through."""
        x, given = torch.zeros_like(z), self._condition(condition, len(z))
        for feature in self.network.sequence.unsqueeze(1):
            with torch.autocast(z.device.type, enabled=False):
                found, _ = self._unmap(z, self.network(x.to(self._dtype), given).to(z.dtype))
            x = torch.where(torch.arange(z.shape[1], device=z.device) == feature, found, x)
        return x

    @uncompiled
    def _differentiable(self, x: Tensor, z: Tensor, condition: Tensor | None) -> Tensor:
        """x = f^-1(z) with its gradients, by the implicit function theorem: dx = (df/dx)^-1 (dz - df at a fixed x)."""
        x = x.detach().requires_grad_()
        found, _ = self(x, condition)
        return _ImplicitStep.apply(x.detach(), wide(z) - found, jacobian(found, x).detach())

    @property
    def _dtype(self) -> torch.dtype:
        return self.network.last.weight.dtype

    def _condition(self, condition: Tensor | None, rows: int) -> Tensor | None:
        check_condition(condition, self.condition_dim, rows)
        return condition.to(self._dtype) if self.condition_dim and condition is not None else None

    def _map(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """z and log dz/dx, B x d. parameters: B x n x d."""
        if self.univariate == "spline":
            return rational_quadratic(x, parameters, bound=self.bound)
        shift, log_scale = self._bounded(parameters)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def _unmap(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        if self.univariate == "spline":
            return rational_quadratic_inverse(z, parameters, bound=self.bound)
        shift, log_scale = self._bounded(parameters)
        return (z - shift) * (-log_scale).exp(), -log_scale

    def _bounded(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, u = parameters.unbind(1)
        return shift, self.limit * torch.tanh(u / self.limit)


class _ImplicitStep(torch.autograd.Function):
    """x, with the gradients of x + jacobian^-1 step, where step is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, jacobian: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(jacobian)
        return x.clone()

    @staticmethod
    @first_only("the inverse of an autoregressive layer")
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        (jacobian,) = ctx.saved_tensors
        step = torch.linalg.solve(jacobian.mT, grad.reshape(*jacobian.shape[:2], 1))
        return None, step.view(grad.shape), None


@bijection_export("inverse_autoregressive")
class InverseAutoregressive(Inverse):
    """A masked autoregressive bijection turned round (IAF, Kingma et al. 2016, arXiv 1606.04934, eq. 10): it samples in one
    pass and goes from data to noise number by number. Options as of masked_autoregressive."""

    def __init__(
        self,
        shape: Sequence[int],
        *,
        condition_dim: int = 0,
        hidden: Sequence[int] = (64, 64),
        residual: bool = False,
        univariate: Univariate = "affine",
        bins: int = 8,
        bound: float = 3.0,
        reverse: bool = False,
    ) -> None:
        super().__init__(
            MaskedAutoregressive(
                shape,
                condition_dim=condition_dim,
                hidden=hidden,
                residual=residual,
                univariate=univariate,
                bins=bins,
                bound=bound,
                reverse=reverse,
            )
        )
        self.keep_input = False  # its inverse is the quick way

    @property
    def inv(self) -> Bijection:
        return Inverse(self)
