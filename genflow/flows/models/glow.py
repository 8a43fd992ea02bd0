"""Glow: a multi-scale flow of pictures, of invertible 1x1 convolutions and affine couplings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from genflow.errors import UserError, check_least
from genflow.flows.bijections.base import Bijection
from genflow.flows.bijections.glow_step import GlowStep
from genflow.flows.bijections.shapes import multi_scale
from genflow.registry import network_export


@network_export("glow")
@dataclass(frozen=True)
class GlowConfig:
    """Glow (Kingma & Dhariwal 2018, arXiv 1807.03039, fig. 2): `levels` of a squeeze, `steps` steps and a split.

    hidden: the width of the couplings' networks. coupling: affine, or additive, which keeps volumes. shape, condition_dim:
    of the pictures and of what conditions them; the couplings and the priors of the splits see the condition.
    """

    levels: int = 3
    steps: int = 8
    hidden: int = 128
    coupling: Literal["affine", "additive"] = "affine"
    shape: tuple[int, ...] | None = None
    condition_dim: int | None = None

    def __post_init__(self) -> None:
        check_least(self, levels=1, steps=1, hidden=1)

    def build(self) -> Bijection:
        """The bijection; z has x's shape. Raises UserError for vectors and for pictures that the levels do not halve."""
        if self.shape is None or self.condition_dim is None:
            raise UserError("glow needs the shape of its pictures and condition_dim; 0 is for no condition")
        if len(self.shape) != 3:
            raise UserError(f"glow is for pictures (channels, height, width), not for {self.shape}")
        condition_dim = self.condition_dim

        def steps(inside: tuple[int, ...]) -> list[Bijection]:
            how: dict[str, Any] = {"condition_dim": condition_dim, "hidden": self.hidden, "coupling": self.coupling}
            return [GlowStep(inside, **how) for _ in range(self.steps)]

        return multi_scale(self.shape, self.levels, steps, condition_dim)
