"""MAF: masked autoregressive flow, of vectors and of pictures read number by number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from genflow.errors import UserError, check_least
from genflow.flows.bijections.autoregressive import MaskedAutoregressive, Univariate
from genflow.flows.bijections.base import Bijection, Chain
from genflow.flows.bijections.elementwise import ActNorm
from genflow.registry import network_export


@network_export("maf")
@dataclass(frozen=True)
class MAFConfig:
    """MAF (Papamakarios et al. 2017, arXiv 1705.07057): autoregressive layers of alternating order, ActNorm before each.

    The paper normalises by the batch where ActNorm stands. hidden, residual: of the MADE in every layer. univariate:
    affine, or spline with bins and bound. shape, condition_dim: of a sample and of what conditions it.
    """

    full_precision: ClassVar[bool] = True  # masked products in half precision would not invert

    layers: int = 5
    hidden: tuple[int, ...] = (128, 128)
    residual: bool = False
    univariate: Univariate = "affine"
    bins: int = 8
    bound: float = 3.0
    shape: tuple[int, ...] | None = None
    condition_dim: int | None = None

    def __post_init__(self) -> None:
        check_least(self, layers=1)

    def build(self) -> Bijection:
        """The bijection; z has x's shape. Raises UserError for a shape that is no sample's."""
        if self.shape is None or self.condition_dim is None:
            raise UserError("maf needs the shape of a sample and condition_dim; 0 is for no condition")
        parts: list[Bijection] = []
        for i in range(self.layers):
            layer = MaskedAutoregressive(
                self.shape,
                condition_dim=self.condition_dim,
                hidden=self.hidden,
                residual=self.residual,
                univariate=self.univariate,
                bins=self.bins,
                bound=self.bound,
                reverse=i % 2 == 1,
            )
            parts += [ActNorm(self.shape), layer]
        return Chain(parts)
