"""Where a model of pictures is edited: in the pictures themselves, or in the latents of its autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Canvas:
    """model: as it was opened; flow: the one that has the velocity, itself or a latent flow's flow of latents."""

    model: Any
    flow: Any

    @staticmethod
    def of(model: Any) -> Canvas | None:
        """None for a model without a velocity."""
        from genflow.flows.latent import velocity_flow

        return Canvas(model, flow) if (flow := velocity_flow(model)) is not None else None

    @property
    def latent(self) -> bool:
        return self.flow is not self.model

    def lay(self, x: Tensor) -> Tensor:
        """Pictures, B x C x H x W in [-1, 1], as the flow has them."""
        return self.model.to_latents(x) if self.latent else x

    def lay_mask(self, mask: Tensor) -> Tensor:
        """1 x 1 x H x W bool over pictures, over what the flow has: a latent is drawn anew where any of its pixels is."""
        import torch.nn.functional as F

        return F.adaptive_max_pool2d(mask.float(), self.flow.shape[1:]) > 0 if self.latent else mask

    def show(self, z: Tensor) -> Tensor:
        """The pictures, in [-1, 1], of what the flow has made."""
        import torch

        if not self.latent:
            return z.clamp(-1, 1)
        return torch.cat([self.model.to_pictures(each[None]) for each in z])  # a decoder's activations are large
