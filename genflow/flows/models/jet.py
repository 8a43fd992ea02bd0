"""Jet: couplings by vision transformers, one after the other, and nothing else (arXiv 2412.15129)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

from genflow.errors import UserError, check_least
from genflow.flows.bijections.base import Chain
from genflow.flows.bijections.jet import Division, ViTCoupling
from genflow.registry import network_export

SPATIAL: tuple[tuple[Division, bool], ...] = tuple(
    (divide, flip) for divide in ("checker", "columns", "rows") for flip in (False, True)
)


@network_export("jet")
@dataclass(frozen=True)
class JetConfig:
    """A Jet of so many couplings, each with a ViT of `depth` blocks `width` wide (arXiv 2412.15129).

    The couplings divide the numbers of each token at random, and every `spatial_every`-th the tokens (0: none does): a
    checkerboard and its other half, then columns, then rows, as at ImageNet 64 in the paper. seed: of the random
    divisions, which a checkpoint holds. heads: default one for each 64 of the width; attention: the backend.

    shape, (C, H, W), and condition_dim may be left out where a run's data and text encoder tell them. build raises
    UserError for a shape that is no picture's, or that the patches do not divide.
    """

    patch: int = 4
    couplings: int = 8
    depth: int = 2
    width: int = 128
    heads: int | None = None
    spatial_every: int = 5
    seed: int = 0
    attention: str = "auto"
    shape: tuple[int, ...] | None = None
    condition_dim: int | None = None

    def __post_init__(self) -> None:
        check_least(self, patch=1, couplings=1, depth=1, width=1, spatial_every=0)

    def build(self) -> Chain:
        """The bijection, freshly initialised: the identity."""
        for name in ("shape", "condition_dim"):
            if getattr(self, name) is None:
                raise UserError(f"jet: {name} is not set, and no data set or text encoder is there to tell it")
        assert self.shape is not None and self.condition_dim is not None
        spatial = cycle(SPATIAL)
        couplings = []
        for i in range(1, self.couplings + 1):
            divide, flip = next(spatial) if self.spatial_every and i % self.spatial_every == 0 else ("channels", False)
            couplings.append(
                ViTCoupling(
                    self.shape,
                    condition_dim=self.condition_dim,
                    patch=self.patch,
                    width=self.width,
                    depth=self.depth,
                    heads=self.heads,
                    divide=divide,
                    flip=flip,
                    seed=self.seed * 1_000_003 + i,
                    attention=self.attention,
                )
            )
        return Chain(couplings)
