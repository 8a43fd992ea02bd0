"""Bijections that map every element by itself: activation norm, fixed affine preprocessing, the logit of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from genflow.errors import UserError
from genflow.flows.bijections.base import Bijection, per_sample, zero_ladj
from genflow.functional import wide
from genflow.registry import bijection_export


@bijection_export("actnorm")
class ActNorm(Bijection):
    """z = exp(log_scale) x + shift, for each channel (Glow, arXiv 1807.03039, sec. 3.1); `initialise` standardises x.

    shape: (D,) or (C, H, W). Raises UserError for another.
    """

    initialised: Tensor
    floor = 1e-4  # of a channel's standard deviation; one below is constant and keeps its scale

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        channels, _ = channels_and_places(shape)
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialised", torch.tensor(False))

    @torch.no_grad()
    def initialise(self, x: Tensor, condition: Tensor | None = None) -> None:
        """Mean 0 and standard deviation 1 in every channel of x, the first time; later calls do nothing."""
        mean, log_std = self._moments(x)
        self._fit(-log_std, -mean * (-log_std).exp())

    @torch.no_grad()
    def initialise_inverse(self, z: Tensor, condition: Tensor | None = None) -> None:
        mean, log_std = self._moments(z)
        self._fit(log_std, mean)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = wide(x).movedim(1, -1).flatten(0, -2)
        std = values.std(0, correction=0)
        return values.mean(0), torch.where(std > self.floor, std, 1.0).log()

    def _fit(self, log_scale: Tensor, shift: Tensor) -> None:
        if not self.initialised:
            self.log_scale.copy_(log_scale)
            self.shift.copy_(shift)
            self.initialised.fill_(True)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = wide(x)
        z = torch.addcmul(over_channels(self.shift, x), x, over_channels(self.log_scale, x).exp())
        return z, self.ladj(x)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = wide(z)
        x = (z - over_channels(self.shift, z)) * (-over_channels(self.log_scale, z)).exp()
        return x, -self.ladj(z)

    def ladj(self, x: Tensor) -> Tensor:
        """H W sum log_scale, B."""
        return zero_ladj(x) + math.prod(x.shape[2:]) * wide(self.log_scale).sum()


@bijection_export("affine")
class Affine(Bijection):
    """z = scale x + shift, fixed: preprocessing. scale, shift: numbers, or one for each channel.

    Raises UserError for a scale of zero and for lists that do not fit.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, shape: Sequence[int], scale: float | Sequence[float] = 1.0, shift: float | Sequence[float] = 0.0
    ) -> None:
        super().__init__()
        channels, _ = channels_and_places(shape)
        for name, value in (("scale", scale), ("shift", shift)):
            numbers = torch.as_tensor(value, dtype=torch.float64)
            if numbers.dim() > 1 or numbers.numel() not in (1, channels):
                raise UserError(f"{name} of affine has shape {tuple(numbers.shape)}; give 1 number, or {channels}")
            if not numbers.isfinite().all() or (name == "scale" and (numbers == 0).any()):
                raise UserError(f"{name} = {value} of affine must be finite{' and not 0; try 1' * (name == 'scale')}")
            self.register_buffer(name, numbers.float().expand(channels).clone())

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = wide(x)
        return torch.addcmul(over_channels(self.shift, x), x, over_channels(self.scale, x)), self._ladj(x)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = wide(z)
        return (z - over_channels(self.shift, z)) / over_channels(self.scale, z), -self._ladj(z)

    def _ladj(self, x: Tensor) -> Tensor:
        return zero_ladj(x) + math.prod(x.shape[2:]) * self.scale.abs().log().sum()


@bijection_export("logit")
class Logit(Bijection):
    """logit(alpha + (1 - 2 alpha) (x + 1) / 2): [-1, 1] spread out (RealNVP, arXiv 1605.08803, sec. 4.1; 1705.07057).

    Beyond [-1, 1] it goes on along its tangents, so that it maps all numbers and knows no NaN. alpha: between 0 and 1/2.
    Raises UserError for another.
    """

    def __init__(self, shape: Sequence[int], alpha: float = 0.05) -> None:
        super().__init__()
        channels_and_places(shape)
        if not 0 < alpha < 0.5:
            raise UserError(f"alpha = {alpha} of logit is not between 0 and 0.5; try 0.05")
        self.alpha = alpha
        self.edge = math.log1p(-alpha) - math.log(alpha)  # the image of 1
        self.slope = (0.5 - alpha) / (alpha * (1 - alpha))  # there, and at -1

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = wide(x)
        inside = x.clamp(-1, 1)
        log_p, log_rest = ((self.alpha + (0.5 - self.alpha) * (1 + part)).log() for part in (inside, -inside))
        return log_p - log_rest + self.slope * (x - inside), per_sample(self._log_slope(log_p, log_rest))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = wide(z)
        inside = z.clamp(-self.edge, self.edge)
        x = (torch.sigmoid(inside) - 0.5) / (0.5 - self.alpha) + (z - inside) / self.slope
        return x, -per_sample(self._log_slope(logsigmoid(inside), logsigmoid(-inside)))

    def _log_slope(self, log_p: Tensor, log_rest: Tensor) -> Tensor:
        """Of logit(p), from log p and log(1 - p), which stay apart where p rounds to 1."""
        return math.log(0.5 - self.alpha) - log_p - log_rest


def over_channels(values: Tensor, x: Tensor) -> Tensor:
    """One number for each channel, C, so that it broadcasts over x, B x C x ..."""
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


def channels_and_places(shape: Sequence[int]) -> tuple[int, int]:
    """The channels of a sample and how many places each has: (C, H W), or (D, 1). Raises UserError for another shape."""
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise UserError(f"shape {tuple(shape)} is no sample's; give (features,) or (channels, height, width)")
    return shape[0], math.prod(shape[1:])
