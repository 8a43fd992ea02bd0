"""A velocity of vectors: a residual MLP that hears the time, and a condition where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from genflow.errors import UserError, check_least
from genflow.layers.embeddings import MLPEmbedder, sinusoidal
from genflow.layers.modulation import EPS
from genflow.registry import api_export, network_export

TIMES = 64  # features of the time
SLOW = {"scale": 32.0, "max_period": 64.0}  # their frequencies, 0.5 to 32: a vector's velocity is smooth in time


@network_export("mlp")
@dataclass(frozen=True)
class MLPVelocityConfig:
    """A residual MLP on vectors: `depth` blocks of width `hidden`, each modulated by the time and the pooled condition.

    shape, (D,), and pooled_dim (0: no condition) may be left out where a run's data and text encoder tell them.
    """

    hidden: int = 256
    depth: int = 4
    mlp_ratio: int = 2
    shape: tuple[int, ...] | None = None
    pooled_dim: int | None = None

    def __post_init__(self) -> None:
        check_least(self, hidden=1, depth=1, mlp_ratio=1, pooled_dim=0)

    def build(self) -> MLPVelocity:
        """The network, freshly initialised. Raises UserError for a shape that is not a vector's."""
        return MLPVelocity(self)


@api_export("MLPVelocity")
class MLPVelocity(nn.Module):
    """A predictor of vectors. Its output is zero at first."""

    def __init__(self, config: MLPVelocityConfig) -> None:
        super().__init__()
        if config.shape is None or config.pooled_dim is None:
            missing = "shape" if config.shape is None else "pooled_dim"
            raise UserError(f"mlp: {missing} is not set, and no data set or text encoder is there to tell it")
        if len(config.shape) != 1:
            shape = " x ".join(map(str, config.shape))
            raise UserError(f"mlp: it makes vectors, not samples of {shape}; take unet or mmdit for pictures")
        (dim,), hidden = config.shape, config.hidden
        self.config = config
        self.time_embed = MLPEmbedder(TIMES, hidden)
        self.pooled_embed = MLPEmbedder(config.pooled_dim, hidden) if config.pooled_dim else None
        self.first = nn.Linear(dim, hidden)
        self.blocks = nn.ModuleList(_Block(hidden, config.mlp_ratio * hidden) for _ in range(config.depth))
        self.last = nn.Linear(hidden, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, *, context_mask: Tensor | None = None
    ) -> Tensor:
        """The prediction at time t. x: B x D; t: B in [0, 1]; pooled: B x pooled_dim; tokens are not heard. B x D."""
        c = self.time_embed(sinusoidal(t, TIMES, **SLOW).to(self.last.weight.dtype))
        if self.pooled_embed is not None:
            c = c + self.pooled_embed(pooled)
        c, x = F.silu(c), self.first(x)
        for block in cast("list[_Block]", self.blocks):
            x = block(x, c)
        return self.last(F.silu(F.layer_norm(x, x.shape[-1:], eps=EPS)))


class _Block(nn.Module):
    """x + MLP(modulated norm of x)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(hidden, 2 * hidden)
        self.fc1 = nn.Linear(hidden, inner)
        self.fc2 = nn.Linear(inner, hidden)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x, c: B x hidden."""
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        y = shift + (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS)
        return x + self.fc2(F.silu(self.fc1(y)))
