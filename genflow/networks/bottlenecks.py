"""Bottlenecks of autoencoders: what stands between the encoder's output and the decoder's input, and what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genflow.errors import UserError
from genflow.functional import Rng
from genflow.registry import genflow_export

MEMORY = 0.01  # weight of a batch in the running moments of latents, once a hundred have been seen


@dataclass(frozen=True)
class Squeezed:
    """z: B x channels x h x w, for the decoder; penalty: B, weighted, of a whole picture; told: what a log says of it."""

    z: Tensor
    penalty: Tensor
    told: dict[str, Tensor]


class Bottleneck(nn.Module, ABC):
    """reads: channels of the encoder's output; channels: of z. All in float32."""

    reads: int
    channels: int

    @abstractmethod
    def forward(self, h: Tensor, rng: Rng | None = None, position: Tensor | None = None) -> Squeezed:
        """h: B x reads x h x w. In training, randomness from rng at position; without an rng there is none."""

    def initialise(self, h: Tensor) -> None:
        """Fit what depends on the training data before the first step. h: of the first batch of all ranks."""


# ------------------------------------------------------------------------------------------------------------ continuous


class Continuous(Bottleneck):
    """Latents that are numbers. Their mean and mean square over the training data are kept, running, as buffers."""

    running: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.tensor([0.0, 1.0]))
        self.register_buffer("seen", torch.tensor(0.0))

    @abstractmethod
    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x)."""

    @property
    def shift(self) -> Tensor:
        """The mean of all latents."""
        return self.running[0]

    @property
    def scale(self) -> Tensor:
        """One over their standard deviation: (z - shift) * scale has variance 1."""
        return (self.running[1] - self.running[0] ** 2).clamp(min=1e-12).rsqrt()

    @torch.no_grad()
    def note(self, z: Tensor) -> None:
        """Take a batch of latents into the running moments, together with those of the other ranks."""
        now = mean_over_ranks(torch.stack([z.mean(), z.square().mean()]))
        self.running.lerp_(now, (1 / (self.seen + 1)).clamp(min=MEMORY))
        self.seen += 1


@genflow_export("gaussian", kind="bottleneck")
@dataclass(frozen=True)
class GaussianConfig:
    """A normal posterior of each latent (Kingma & Welling 2014, arXiv 1312.6114), as in latent diffusion.

    kl: weight of the divergence from the standard normal, in nats a picture, beside the sum of its absolute errors (1e-6 in
    arXiv 2112.10752, app. G: it only keeps the latents from growing).
    """

    channels: int = 16
    kl: float = 1e-6

    def __post_init__(self) -> None:
        check_channels(self.channels)
        if not 0 <= self.kl < float("inf"):
            raise UserError(f"kl = {self.kl} must be 0 or more, and finite; 1e-6 is usual")

    def build(self) -> Gaussian:
        return Gaussian(self)


class Gaussian(Continuous):
    """The encoder gives a mean and a log-variance, clamped to -30 .. 20, of every latent."""

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__()
        self.weight = config.kl
        self.reads, self.channels = 2 * config.channels, config.channels

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = h.chunk(2, dim=1)
        return mean, (logvar.clamp(-30, 20) / 2).exp()

    def forward(self, h: Tensor, rng: Rng | None = None, position: Tensor | None = None) -> Squeezed:
        """Draws, in training, by position: stream "latent"."""
        mean, std = z, _ = self.moments(h)
        if rng is not None and position is not None:
            z = mean + std * rng.normal("latent", position, mean.shape[1:], device=mean.device)
        if self.training and rng is not None:
            self.note(z)
        kl = gaussian_kl(mean, std)
        return Squeezed(z, self.weight * kl, {"kl": kl.detach().mean()})


def gaussian_kl(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) = sum (mean^2 + std^2 - 1 - log std^2) / 2, in nats. B x ... -> B."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(1)


@genflow_export("plain", kind="bottleneck")
@dataclass(frozen=True)
class PlainConfig:
    """The latents as the encoder gives them, without noise or penalty."""

    channels: int = 16

    def __post_init__(self) -> None:
        check_channels(self.channels)

    def build(self) -> Plain:
        return Plain(self)


class Plain(Continuous):
    """The identity."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.reads = self.channels = config.channels

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h, torch.zeros_like(h)

    def forward(self, h: Tensor, rng: Rng | None = None, position: Tensor | None = None) -> Squeezed:
        if self.training and rng is not None:
            self.note(h)
        return Squeezed(h, h.new_zeros(len(h)), {})


def check_channels(channels: int) -> None:
    """Raises UserError for a number of channels that is none."""
    if channels < 1:
        raise UserError(f"channels = {channels} is too few; 4, 8, 16 and 32 are usual")


# ----------------------------------------------------------------------------------------------------------------- ranks


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's x, on all ranks; of a lone process, x."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of every rank's x, on all ranks; of a lone process, x."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return sum_over_ranks(x) / ranks


def of_first_rank(x: Tensor) -> Tensor:
    """The main process's x, on all ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(x, 0)
    return x
