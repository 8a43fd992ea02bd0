"""TarFlow: transformer autoregressive blocks whose directions alternate (Zhai et al. 2024, arXiv 2412.06329)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from genflow.errors import UserError, check_least
from genflow.flows.bijections.base import Bijection, zero_ladj
from genflow.flows.bijections.marginals import Marginals
from genflow.flows.bijections.transformer import (
    Rule,
    TransformerAutoregressive,
    from_tokens,
    to_tokens,
    token_shape,
)
from genflow.registry import api_export, network_export


@network_export("tarflow")
@dataclass(frozen=True)
class TarFlowConfig:
    """A TarFlow of so many blocks, each a causal transformer of `layers` layers `width` wide (arXiv 2412.06329, fig. 2).

    patch: the side of a picture's patches; a vector's tokens are its numbers. heads: default one for each 64 of the width.
    limit: the most that each block scales by, in nats. marginals: pictures go first, unlike in the paper, through the
    histogram of each channel (bijections/marginals.py): for likelihoods of uniformly dequantised pictures, far fewer steps;
    not for Gaussian noise, since denoising needs a density with slopes. shape, condition_dim: of a sample and its condition.
    """

    patch: int = 4
    blocks: int = 4
    layers: int = 2
    width: int = 128
    heads: int | None = None
    limit: float = 4.0
    marginals: bool = False
    shape: tuple[int, ...] | None = None
    condition_dim: int | None = None

    def __post_init__(self) -> None:
        check_least(self, patch=1, blocks=1, layers=1, width=1)

    def build(self) -> TarFlow:
        """The bijection, the identity at first. Raises UserError for a picture that the patches do not divide."""
        if self.shape is None or self.condition_dim is None:
            raise UserError("tarflow needs the shape of a sample and condition_dim; 0 is for no condition")
        return TarFlow(self)


@api_export("TarFlow")
class TarFlow(Bijection):
    """The blocks of a TarFlow over the tokens of a sample, into which it is cut once."""

    keep_input = True
    guidable = True

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        assert config.shape is not None and config.condition_dim is not None
        self.shape, self.patch, self.condition_dim = tuple(config.shape), config.patch, config.condition_dim
        self.marginals = Marginals(self.shape) if config.marginals and len(self.shape) == 3 else None
        self.blocks = nn.ModuleList(
            TransformerAutoregressive(
                token_shape(self.shape, config.patch),
                condition_dim=config.condition_dim,
                width=config.width,
                layers=config.layers,
                heads=config.heads,
                reverse=i % 2 == 1,
                limit=config.limit,
            )
            for i in range(config.blocks)
        )

    def __iter__(self) -> Iterator[TransformerAutoregressive]:
        return iter(cast(Iterable[TransformerAutoregressive], self.blocks))

    def initialise(self, x: Tensor, condition: Tensor | None = None) -> None:
        """Count the marginals of pictures."""
        if self.marginals is not None:
            self.marginals.initialise(x)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = zero_ladj(x)
        if self.marginals is not None:
            x, total = self.marginals(x)
        tokens = to_tokens(x, self.shape, self.patch)
        for block in self:
            tokens, ladj = block(tokens, condition)
            total = total + ladj
        return from_tokens(tokens, self.shape, self.patch), total

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens, total = to_tokens(z, self.shape, self.patch), zero_ladj(z)
        for block in reversed(list(self)):
            tokens, ladj = block.inverse(tokens, condition)
            total = total + ladj
        x = from_tokens(tokens, self.shape, self.patch)
        if self.marginals is None:
            return x, total
        x, ladj = self.marginals.inverse(x)
        return x, total + ladj

    def decode(
        self,
        z: Tensor,
        condition: Tensor | None = None,
        *,
        null: Tensor | None = None,
        guidance: float = 1.0,
        rule: Rule = "product",
    ) -> Tensor:
        """Noise to data, guided in every block where guidance is not 1; see TransformerAutoregressive.decode."""
        tokens = to_tokens(z, self.shape, self.patch)
        for block in reversed(list(self)):
            tokens = block.decode(tokens, condition, null=null, guidance=guidance, rule=rule)
        x = from_tokens(tokens, self.shape, self.patch)
        return x if self.marginals is None else self.marginals.decode(x)


@dataclass(frozen=True)
class BlockPlan:
    """How a block is inverted fastest: window, the tokens solved at once; sweeps and seconds, as measured."""

    window: int
    sweeps: int
    seconds: float


@api_export("measure_inverse")
@torch.no_grad()
def measure_inverse(model: TarFlow, z: Tensor, condition: Tensor | None = None, *, rounds: int = 3) -> list[BlockPlan]:
    """Time the inverse of each block on z with windows of 1, 2, 4, ... and all tokens, and set each to its fastest.

    z: noise, as many rows as will be decoded at a time. Returns the plans in the order of the blocks. A few blocks take
    most of the sweeps, so that what is best differs (GS-Jacobi, arXiv 2505.12849).
    """
    plans: list[BlockPlan] = []
    z = to_tokens(z, model.shape, model.patch)
    for block in reversed(list(model)):
        windows = sorted({*(2**i for i in range(block.tokens.bit_length())), block.tokens})
        best: dict[int, BlockPlan] = {}
        for _ in range(rounds):  # in turn, so that what else the machine does falls on all of them
            for window in windows:
                block.window = window
                start = time.perf_counter()
                x = block.decode(z, condition)
                x.sum().item()  # waits for the device
                plan = BlockPlan(window, block.sweeps, time.perf_counter() - start)
                best[window] = min(plan, best.get(window, plan), key=lambda plan: plan.seconds)
        plans.append(min(best.values(), key=lambda plan: plan.seconds))
        block.window = plans[-1].window
        z = x
    return plans[::-1]
