"""A discriminator of patches (Isola et al. 2017, arXiv 1611.07004), and the losses of the game."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Convolutions of 4 x 4, all but two of stride 2; one number for each patch: how real it looks."""

    def __init__(self, in_channels: int, *, width: int = 64, layers: int = 2) -> None:
        """layers: of stride 2; each doubles the width, up to eight times."""
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        now = width
        for layer in range(1, layers + 1):
            after = width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            # a norm of each picture by itself, so that no score hangs on batch mates
            parts += [nn.Conv2d(now, after, 4, stride, 1, bias=False), nn.GroupNorm(1, after), nn.LeakyReLU(0.2)]
            now = after
        self.layers = nn.Sequential(*parts, nn.Conv2d(now, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """B x in_channels x H x W in [-1, 1] -> B x 1 x h x w."""
        return self.layers(x)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss (Lim & Ye 2017, arXiv 1705.02894): mean relu(1 - real) / 2 + mean relu(1 + fake) / 2."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """|grad L_rec| / (|grad L_GAN| + 1e-6), gradients by the decoder's last layer (arXiv 2012.09841, eq. 7).

    At most 1e4, and not itself differentiated.
    """
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4).detach()
