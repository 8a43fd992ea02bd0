"""Bijections of the multi-scale architecture: squeeze, and a split that holds the rest of the flow (RealNVP, Glow)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from genflow.errors import UserError
from genflow.flows.bijections.base import Bijection, Chain, check_condition, per_sample, zero_ladj
from genflow.flows.bijections.elementwise import channels_and_places
from genflow.functional import wide
from genflow.networks.couplers import zeroed
from genflow.registry import bijection_export


def _check(x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises UserError unless x is B x shape: as many numbers of another shape would be reshaped in silence."""
    if tuple(x.shape[1:]) != shape:
        wanted, got = (" x ".join(map(str, of)) for of in (("B", *shape), x.shape))
        raise UserError(f"the squeeze is of samples {wanted}, not {got}")


@bijection_export("squeeze")
class Squeeze(Bijection):
    """C x H x W to C f^2 x H/f x W/f, every f x f square a column of channels (RealNVP, arXiv 1605.08803, sec. 3.6).

    shape: of x; output_shape: of z. Raises UserError for vectors, for sizes that the factor does not divide, and for
    samples of another shape.
    """

    def __init__(self, shape: Sequence[int], factor: int = 2) -> None:
        super().__init__()
        channels_and_places(shape)
        if factor < 1:
            raise UserError(f"factor = {factor} of squeeze is below 1; try 2")
        if len(shape) == 1:
            raise UserError(f"squeeze is for pictures (channels, height, width), not for vectors of {shape[0]} numbers")
        channels, *size = shape
        check_divisible(size, factor, "a squeeze")
        self.factor = factor
        self.shape = tuple(shape)
        self.output_shape = (channels * factor**2, size[0] // factor, size[1] // factor)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _check(x, self.shape)
        B, (C, H, W), f = len(x), self.output_shape, self.factor
        z = wide(x).reshape(B, C // f**2, H, f, W, f).permute(0, 2, 4, 1, 3, 5)  # channels last in memory
        return z.reshape(B, H, W, C).permute(0, 3, 1, 2), zero_ladj(x)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _check(z, self.output_shape)
        B, (C, H, W), f = len(z), self.output_shape, self.factor
        x = wide(z).reshape(B, C // f**2, f, f, H, W).permute(0, 4, 2, 5, 3, 1)
        return x.reshape(B, H * f, W * f, C // f**2).permute(0, 3, 1, 2), zero_ladj(z)


@bijection_export("split")
class Split(Bijection):
    """x = (x1, x2), half of the channels each, to (inner(x1), (x2 - mu) / sigma), with mu and sigma a layer's of x1.

    So x2 leaves the flow with the Gaussian prior N(mu(x1, condition), sigma(x1, condition)^2) (Glow, arXiv 1807.03039,
    app. A), written as a map: z has x's shape, and a standard normal base. The layer is a 3x3 convolution, or linear for
    vectors; it starts at zero, mu = 0 and sigma = 1, and |log sigma| stays below `limit`.

    inner: the rest of the flow, of x1's shape, `inner_shape`; none leaves x1. Raises UserError for one channel.
    """

    limit = 4.0
    keep_input = True  # an invertible checkpoint walks the inner flow by itself

    def __init__(self, shape: Sequence[int], inner: Bijection | None = None, condition_dim: int = 0) -> None:
        super().__init__()
        channels, _ = channels_and_places(shape)
        if channels < 2:
            raise UserError(f"1 channel of {tuple(shape)} cannot be split; squeeze first")
        self.inner_shape = split_shape(shape)
        kept, left = self.inner_shape[0], channels - self.inner_shape[0]
        self.sizes = (kept, left)
        self.inner = inner
        self.condition_dim = max(condition_dim, 0 if inner is None else inner.condition_dim)
        if len(shape) == 1:
            self.prior: nn.Linear | nn.Conv2d = zeroed(nn.Linear(kept, 2 * left))
        else:
            self.prior = zeroed(nn.Conv2d(kept, 2 * left, 3, padding=1))
        self.condition = zeroed(nn.Linear(condition_dim, 2 * left, bias=False)) if condition_dim else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, x2 = wide(x).split(self.sizes, 1)
        mean, log_sigma = self._moments(x1, condition)
        ladj = -per_sample(log_sigma)
        if self.inner is not None:
            x1, inner_ladj = self.inner(x1, condition)
            ladj = ladj + inner_ladj
        return torch.cat([x1, (x2 - mean) * (-log_sigma).exp()], 1), ladj

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, z2 = wide(z).split(self.sizes, 1)
        ladj = zero_ladj(z)
        if self.inner is not None:
            x1, ladj = self.inner.inverse(x1, condition)
        mean, log_sigma = self._moments(x1, condition)
        return torch.cat([x1, torch.addcmul(mean, z2, log_sigma.exp())], 1), ladj + per_sample(log_sigma)

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        x1, z2 = wide(z).split(self.sizes, 1)
        if self.inner is not None:
            x1 = self.inner.decode(x1, condition)
        mean, log_sigma = self._moments(x1, condition)
        return torch.cat([x1, torch.addcmul(mean, z2, log_sigma.exp())], 1)

    def initialise(self, x: Tensor, condition: Tensor | None = None) -> None:
        if self.inner is not None:
            self.inner.initialise(x[:, : self.sizes[0]], condition)

    def initialise_inverse(self, z: Tensor, condition: Tensor | None = None) -> None:
        if self.inner is not None:
            self.inner.initialise_inverse(z[:, : self.sizes[0]], condition)

    def _moments(self, x1: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """mu and log sigma, B x left x ..., in x1's dtype."""
        check_condition(condition, self.condition_dim, len(x1))
        output = self.prior(x1.to(self.prior.weight.dtype)).to(x1.dtype)
        if self.condition is not None and condition is not None:
            added = self.condition(condition.to(self.condition.weight.dtype)).to(x1.dtype)
            output = output + added.view(*added.shape, *[1] * (x1.dim() - 2))
        mean, raw = output.chunk(2, 1)
        return mean, self.limit * torch.tanh(raw / self.limit)


def multi_scale(
    shape: Sequence[int],
    levels: int,
    steps: Callable[[tuple[int, ...]], list[Bijection]],
    condition_dim: int,
) -> Chain:
    """Squeeze, steps, split with the next level inside, and back to x's shape (Glow, arXiv 1807.03039, fig. 2b).

    steps: builds those of a level, from the squeezed shape. Raises UserError for sizes that the levels do not halve.
    """
    check_divisible(shape[1:], 2**levels, f"a flow of {levels} levels")
    squeeze = Squeeze(shape)
    inside = squeeze.output_shape
    parts = steps(inside)
    if levels > 1:
        parts = [
            *parts,
            Split(inside, multi_scale(split_shape(inside), levels - 1, steps, condition_dim), condition_dim),
        ]
    return Chain([squeeze, *parts, squeeze.inv])


def split_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what a split keeps for its inner bijection."""
    return ((shape[0] + 1) // 2, *shape[1:])


def check_divisible(size: Sequence[int], factor: int, what: str) -> None:
    """Raises UserError, naming the nearest sizes, unless factor divides height and width."""
    if any(side % factor for side in size):
        below, above = (
            [max(1, rounded(side / factor)) * factor for side in size] for rounded in (math.floor, math.ceil)
        )
        near = " or ".join(dict.fromkeys(f"{h} x {w}" for h, w in (below, above)))
        raise UserError(f"{what} divides pictures by {factor}, which {size[0]} x {size[1]} is not; the nearest: {near}")
