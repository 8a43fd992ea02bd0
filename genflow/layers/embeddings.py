"""Embeddings of time, of patches and of their 2D positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal(t: Tensor, dim: int, *, scale: float = 1000.0, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of t, cosines first, as SD3 feeds them to its timestep MLP.

    t: B, in [0, 1], taken in float32. Returns B x dim, float32: [cos(scale t w_i), sin(scale t w_i)] with
    w_i = max_period^(-2i/dim), i = 0 .. dim/2 - 1 (Ho et al. 2020, arXiv 2006.11239; order as in SD3).
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = (scale * t.float())[:, None] * torch.exp(-math.log(max_period) * i / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def sincos_2d(
    height: int, width: int, dim: int, *, sample_size: int, max_size: int | None = None, extent: float = 16.0
) -> Tensor:
    """2D sine-cosine positions of a centred height x width crop of SD3's position grid.

    The grid has max_size tokens a side; its central sample_size x sample_size crop spans [0, extent), whatever the
    resolution: coordinate(p) = (p - (max_size - sample_size)/2) * extent / sample_size (SD3, arXiv 2403.03206, sec.
    5.3.2; extent is 256/16 there). max_size matters only through the rounding of the crop, so any height and width will
    do. Half of the channels hold x, half y; each half is [sin | cos]. Returns height*width x dim, row by row, float32.
    """
    max_size = max_size or sample_size
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def axis(length: int) -> Tensor:
        p = torch.arange(length, dtype=torch.float64) + (max_size - length) // 2
        angle = torch.outer((p - (max_size - sample_size) / 2) * extent / sample_size, omega)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    x = axis(width).expand(height, width, -1)
    y = axis(height)[:, None].expand(height, width, -1)
    return torch.cat([x, y], dim=-1).reshape(height * width, dim).float()


class PatchEmbed(nn.Module):
    """Cut an image into p x p patches and project each: B x C x H x W -> B x (H/p W/p) x hidden.

    The same numbers as a convolution of kernel and stride p (`weight` has its shape), as one matrix product.
    """

    def __init__(self, channels: int, hidden: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(hidden, channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(patchify(x, self.patch_size), self.weight.flatten(1), self.bias)


def patchify(x: Tensor, p: int) -> Tensor:
    """B x C x H x W -> B x (H/p W/p) x (C p p), channel slowest, as a convolution kernel is laid out."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // p), c * p * p)


def unpatchify(tokens: Tensor, height: int, width: int, p: int) -> Tensor:
    """B x (H/p W/p) x (p p C), channel fastest (SD3's order) -> B x C x H x W; height and width in patches."""
    b, _, inner = tokens.shape
    x = tokens.reshape(b, height, width, p, p, inner // p**2).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, inner // p**2, height * p, width * p)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: how a timestep or a pooled text vector enters the conditioning."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.silu(self.fc1(x)))
