"""A small convolutional autoencoder, without norms or attention: for two cores, and for previews.

The shape of TAESD (Ollin Boer Bohan, github.com/madebyollin/taesd), whose weights it takes (interop/taef.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genflow.errors import UserError, check_least
from genflow.registry import network_export

SOFT = 3.0  # latents are bent to -3 .. 3 before the decoder


class EncoderDecoder(nn.Module, ABC):
    """What the flow autoencoder takes as its model.

    in_channels: of pictures; encoder_channels: of what `encode` gives; latent_channels: of what `decode` reads; factor: how
    many pixels a latent's side is.
    """

    in_channels: int
    encoder_channels: int
    latent_channels: int
    factor: int

    @property
    @abstractmethod
    def last(self) -> nn.Parameter:
        """The weight of the decoder's last layer, in which losses are weighed against each other."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """B x in_channels x H x W in [-1, 1] -> B x encoder_channels x H/factor x W/factor."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """B x latent_channels x h x w -> B x in_channels x h factor x w factor."""

    def tiled(self, tile: int) -> Callable[[Tensor], Tensor]:
        """`decode` by tiles of tile x tile pixels. Raises UserError where this cannot be done."""
        raise UserError(f"tile: a {type(self).__name__} decodes pictures as a whole; leave tile out")


@network_export("tiny_autoencoder")
@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """A convolutional autoencoder of few weights.

    width: of every layer; blocks: of three convolutions at each size but the first, which has one; factor: pixels of a
    latent's side; wide: the blocks of the smallest size also see all places, by a group norm. in_channels,
    encoder_channels and latent_channels may be left out where a run's data and bottleneck tell them.
    """

    width: int = 64
    blocks: int = 3
    factor: Literal[2, 4, 8] = 8
    wide: bool = False
    in_channels: int | None = None
    encoder_channels: int | None = None
    latent_channels: int | None = None

    def __post_init__(self) -> None:
        check_least(self, width=1, blocks=1, in_channels=1, encoder_channels=1, latent_channels=1)

    def build(self) -> TinyAutoencoder:
        """The network, freshly initialised. Raises UserError where the number of channels is not known."""
        return TinyAutoencoder(self)


class TinyAutoencoder(EncoderDecoder):
    """Convolutions of stride 2 and blocks; the decoder is the encoder's mirror, with doubled pixels."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        channels = config.in_channels, config.encoder_channels, config.latent_channels
        names = "in_channels", "encoder_channels", "latent_channels"
        for name, value in zip(names, channels, strict=True):
            if value is None:
                raise UserError(
                    f"tiny_autoencoder: {name} is not set, and no data set or bottleneck is there to tell it"
                )
            setattr(self, name, value)
        self.config, self.factor = config, config.factor
        width, levels = config.width, config.factor.bit_length() - 1
        down: list[nn.Module] = [_conv(self.in_channels, width), _Block(width)]
        up: list[nn.Module] = [_Bend(), _conv(self.latent_channels, width), nn.ReLU()]
        for level in range(levels):
            down += [_conv(width, width, stride=2, bias=False), *_blocks(config, smallest=level == levels - 1)]
            up += [*_blocks(config, smallest=level == 0), nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
        self.encoder = nn.Sequential(*down, _conv(width, self.encoder_channels))
        last = _conv(width, self.in_channels)
        nn.init.constant_(last.bias, 0.5)  # type: ignore[arg-type]  # grey: latents need not first tell how bright all pictures are
        self.decoder = nn.Sequential(*up, _Block(width), last)

    @property
    def blocks(self) -> Iterator[nn.Module]:
        """Every block, in order: what is compiled or checkpointed one by one."""
        for part in (*self.encoder, *self.decoder):
            if isinstance(part, _Block):
                yield part

    @property
    def last(self) -> nn.Parameter:
        return self.decoder[-1].weight  # type: ignore[return-value]

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(((x + 1) / 2).contiguous(memory_format=torch.channels_last))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z.contiguous(memory_format=torch.channels_last)) * 2 - 1


class _Bend(nn.Module):
    """3 tanh(z / 3)."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z / SOFT) * SOFT


class _Block(nn.Module):
    """relu(x + three convolutions of x), where it is wide after x + what a group norm over all places makes of x."""

    def __init__(self, width: int, *, wide: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))
        self.pool: nn.Sequential | None = None
        if wide:
            into, out = (nn.Conv2d(a, b, 1, bias=False) for a, b in ((width, 4 * width), (4 * width, width)))
            self.pool = nn.Sequential(into, nn.GroupNorm(4, 4 * width), nn.ReLU(), out)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(x + self.conv(x))


def _blocks(config: TinyAutoencoderConfig, *, smallest: bool) -> list[nn.Module]:
    return [_Block(config.width, wide=config.wide and smallest) for _ in range(config.blocks)]


def _conv(before: int, after: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, stride=stride, bias=bias)
