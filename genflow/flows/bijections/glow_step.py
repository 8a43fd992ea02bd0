"""One step of Glow, its two linear maps taken as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from genflow.errors import UserError, nearest
from genflow.flows.bijections.base import Bijection
from genflow.flows.bijections.coupling import AdditiveCoupling, AffineCoupling
from genflow.flows.bijections.elementwise import ActNorm
from genflow.flows.bijections.linear import InvertibleConv1x1, mix
from genflow.functional import wide
from genflow.layers.affine import affine_half, affine_half_inverse
from genflow.networks.couplers import MLP, ConvNet
from genflow.registry import bijection_export

COUPLINGS: dict[str, type[AffineCoupling] | type[AdditiveCoupling]] = {
    "affine": AffineCoupling,
    "additive": AdditiveCoupling,
}


@bijection_export("glow_step")
class GlowStep(Bijection):
    """ActNorm, invertible 1x1 convolution, coupling (Glow, arXiv 1807.03039, table 1 and fig. 2a).

    The same as these three in a chain; the first two are one affine map of the channels, W (exp(s) x + t), and the affine
    coupling of pictures takes one pass. hidden: the width of the coupling's network. Raises UserError for one channel.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        condition_dim: int = 0,
        hidden: int = 128,
        coupling: Literal["affine", "additive"] = "affine",
    ) -> None:
        super().__init__()
        if coupling not in COUPLINGS:
            raise UserError(f"coupling {coupling!r} is none.{nearest(coupling, COUPLINGS)}")
        self.condition_dim = condition_dim
        self.actnorm = ActNorm(shape)
        self.conv = InvertibleConv1x1(shape)
        network = partial(MLP, hidden=(hidden, hidden)) if len(shape) == 1 else partial(ConvNet, hidden=hidden)
        made = COUPLINGS[coupling](shape, condition_dim=condition_dim, mask="halves", network=network)
        self.coupling: AffineCoupling | AdditiveCoupling = made

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.conv.weight()
            y = mix(wide(x), weight * wide(self.actnorm.log_scale).exp(), weight @ wide(self.actnorm.shift))
        if isinstance(self.coupling, AffineCoupling) and y.dim() == 4:
            z, ladj = affine_half(y, self._network(y, condition), self.coupling.limit)
        else:
            z, ladj = self.coupling(y, condition)
        return z, ladj + self._linear_ladj(x)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = wide(z)
        if isinstance(self.coupling, AffineCoupling) and z.dim() == 4:
            y, ladj = affine_half_inverse(z, self._network(z, condition), self.coupling.limit)
        else:
            y, ladj = self.coupling.inverse(z, condition)
        scale = (-wide(self.actnorm.log_scale)).exp()
        x = mix(y, scale.unsqueeze(1) * self.conv.inverse_weight(), -scale * self.actnorm.shift)
        return x, ladj - self._linear_ladj(z)

    def _network(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """What the coupling's network says of the kept half."""
        return self.coupling.ask(x[:, : self.coupling.partition.kept], condition)

    def _linear_ladj(self, x: Tensor) -> Tensor:
        return math.prod(x.shape[2:]) * (wide(self.actnorm.log_scale).sum() + wide(self.conv.log_diagonal).sum())

    @torch.no_grad()
    def initialise(self, x: Tensor, condition: Tensor | None = None) -> None:
        self.actnorm.initialise(x, condition)

    @torch.no_grad()
    def initialise_inverse(self, z: Tensor, condition: Tensor | None = None) -> None:
        self.actnorm.initialise_inverse(self.conv.decode(self.coupling.decode(z, condition)), condition)
