"""RealNVP: affine couplings whose halves alternate, multi-scale for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from genflow.errors import UserError, check_least
from genflow.flows.bijections.base import Bijection, Chain
from genflow.flows.bijections.coupling import AffineCoupling, Coupler, Mask
from genflow.flows.bijections.elementwise import ActNorm, Logit
from genflow.flows.bijections.shapes import Split, Squeeze, check_divisible, split_shape
from genflow.networks.couplers import MLP, ResidualConvNet
from genflow.registry import network_export


@network_export("realnvp")
@dataclass(frozen=True)
class RealNVPConfig:
    """RealNVP (Dinh et al. 2017, arXiv 1605.08803), with ActNorm where the paper normalises by the batch.

    Pictures, after a logit: `levels` of 3 couplings on checkerboards, a squeeze, 3 couplings of channels and a split; the
    last level is 4 couplings on checkerboards (sec. 3.6, 4.1). Vectors: `steps` couplings of halves. hidden, blocks: the
    width of the couplings' networks and their residual blocks, or hidden layers for vectors. logit: its alpha; none leaves
    pictures as they are. shape, condition_dim: of a sample and of what conditions it.
    """

    levels: int = 2
    steps: int = 8
    hidden: int = 64
    blocks: int = 2
    logit: float | None = 0.05
    shape: tuple[int, ...] | None = None
    condition_dim: int | None = None

    def __post_init__(self) -> None:
        check_least(self, levels=1, steps=1, hidden=1, blocks=1)

    def build(self) -> Bijection:
        """The bijection; z has x's shape. Raises UserError for what it cannot serve."""
        if self.shape is None or self.condition_dim is None:
            raise UserError("realnvp needs the shape of a sample and condition_dim; 0 is for no condition")
        if len(self.shape) == 1:
            network = partial(MLP, hidden=(self.hidden,) * self.blocks)
            return Chain(self._couplings(self.steps, self.shape, "halves", network))
        check_divisible(self.shape[1:], 2 ** (self.levels - 1), f"realnvp of {self.levels} levels")
        first = [] if self.logit is None else [Logit(self.shape, self.logit)]
        return Chain([*first, self._level(self.levels, self.shape)])

    def _level(self, levels: int, shape: Sequence[int]) -> Bijection:
        """Checkerboards; but for the last level, channels of the squeezed picture, and a split with the rest inside."""
        network = partial(ResidualConvNet, hidden=self.hidden, blocks=self.blocks)
        boards = self._couplings(3 if levels > 1 else 4, shape, "checkerboard", network)
        if levels == 1:
            return Chain(boards)
        squeeze = Squeeze(shape)
        inside = squeeze.output_shape
        channels = self._couplings(3, inside, "halves", network)
        split = Split(inside, self._level(levels - 1, split_shape(inside)), self.condition_dim or 0)
        return Chain([*boards, squeeze, *channels, split, squeeze.inv])

    def _couplings(self, steps: int, shape: Sequence[int], mask: Mask, network: Coupler) -> list[Bijection]:
        """ActNorm and a coupling, the halves changing places every step."""
        parts: list[Bijection] = []
        for i in range(steps):
            coupling = AffineCoupling(
                shape, condition_dim=self.condition_dim or 0, mask=mask, flip=i % 2 == 1, network=network
            )
            parts += [ActNorm(shape), coupling]
        return parts
