"""Neural spline flow: rational-quadratic splines in couplings or autoregressive, of vectors and of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from genflow.errors import UserError, check_least, nearest
from genflow.flows.bijections.autoregressive import MaskedAutoregressive
from genflow.flows.bijections.base import Bijection, Chain
from genflow.flows.bijections.coupling import SplineCoupling
from genflow.flows.bijections.elementwise import ActNorm
from genflow.flows.bijections.linear import InvertibleConv1x1
from genflow.flows.bijections.shapes import multi_scale
from genflow.networks.couplers import ResidualConvNet, ResidualMLP
from genflow.registry import network_export


@network_export("nsf")
@dataclass(frozen=True)
class NSFConfig:
    """RQ-NSF (Durkan et al. 2019, arXiv 1906.04032): `steps` of ActNorm, a learned linear map and a spline transform.

    Vectors: the steps. Pictures: `levels` of a squeeze, the steps and a split, as in Glow (sec. 5.3). kind: RQ-NSF (C),
    couplings, as fast one way as the other; or RQ-NSF (AR), for vectors, which samples number by number. bins, bound: of
    the splines, which are the identity beyond -bound .. bound. hidden, blocks: the width of the networks and their
    residual blocks. shape, condition_dim: of a sample and of what conditions it.
    """

    kind: Literal["coupling", "autoregressive"] = "coupling"
    steps: int = 4
    levels: int = 2
    bins: int = 8
    bound: float = 3.0
    hidden: int = 128
    blocks: int = 2
    shape: tuple[int, ...] | None = None
    condition_dim: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("coupling", "autoregressive"):
            raise UserError(f"kind {self.kind!r} of nsf is none.{nearest(self.kind, ('coupling', 'autoregressive'))}")
        check_least(self, steps=1, levels=1, hidden=1, blocks=1)

    @property
    def full_precision(self) -> bool:
        """Masked products in half precision would not invert."""
        return self.kind == "autoregressive"

    def build(self) -> Bijection:
        """The bijection; z has x's shape. Raises UserError for what it cannot serve."""
        if self.shape is None or self.condition_dim is None:
            raise UserError("nsf needs the shape of a sample and condition_dim; 0 is for no condition")
        if len(self.shape) == 1:
            return Chain(self._steps(self.shape))
        if self.kind == "autoregressive":
            raise UserError(
                f"an autoregressive nsf is for vectors, not for {self.shape}; take kind: coupling, or tarflow"
            )
        return multi_scale(self.shape, self.levels, self._steps, self.condition_dim)

    def _steps(self, shape: Sequence[int]) -> list[Bijection]:
        parts: list[Bijection] = []
        for _ in range(self.steps):
            parts += [ActNorm(shape), InvertibleConv1x1(shape), self._spline(shape)]
        return parts

    def _spline(self, shape: Sequence[int]) -> Bijection:
        if self.kind == "autoregressive":
            return MaskedAutoregressive(
                shape,
                condition_dim=self.condition_dim or 0,
                hidden=(self.hidden,) * (2 * self.blocks + 1),
                residual=True,
                univariate="spline",
                bins=self.bins,
                bound=self.bound,
            )
        network = ResidualMLP if len(shape) == 1 else ResidualConvNet
        return SplineCoupling(
            shape,
            condition_dim=self.condition_dim or 0,
            mask="halves",
            network=partial(network, hidden=self.hidden, blocks=self.blocks),
            bins=self.bins,
            bound=self.bound,
        )
