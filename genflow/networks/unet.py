"""UNet: residual convolutions at falling and rising resolutions, with skips between them.

The backbone of DDPM (Ho et al. 2020, arXiv 2006.11239) as ADM has it (Dhariwal & Nichol 2021, arXiv 2105.05233): the time
scales and shifts each block's second norm, and the coarse levels attend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genflow.attention import attention
from genflow.config import Named
from genflow.errors import UserError, check_least
from genflow.layers.embeddings import MLPEmbedder, sinusoidal
from genflow.registry import api_export, network_export

GROUPS = 32  # of a GroupNorm, at most
HEAD = 64  # channels of an attention head


@network_export("unet")
@dataclass(frozen=True)
class UNetConfig:
    """A UNet with one level for each number of channel_mult, each of half the side of the one before.

    channels: of the first level, and in multiples of it, channel_mult, of each. blocks: residual blocks of a level on the
    way down, and one more on the way up. attention_size: levels of a side up to this one attend, and the middle; 0 for none.
    shape, (C, H, W), and pooled_dim (0: no condition) may be left out where a run's data and text encoder tell them.
    """

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention_size: int = 16
    dropout: float = 0.0
    shape: tuple[int, ...] | None = None
    pooled_dim: int | None = None
    attention: Annotated[str, Named("attention", also=("auto",))] = "auto"

    def __post_init__(self) -> None:
        check_least(self, channels=1, blocks=1, attention_size=0, pooled_dim=0)
        if self.channels % 2:
            raise UserError(f"channels = {self.channels} must be even; try {self.channels + 1}")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise UserError(f"channel_mult = {list(self.channel_mult)} must be one whole number or more, from 1 on")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout = {self.dropout} is not a part of the activations, 0 to 1; try 0.1")

    def build(self) -> UNet:
        """The network, freshly initialised. Raises UserError where the numbers do not fit each other."""
        return UNet(self)


@api_export("UNet")
class UNet(nn.Module):
    """A velocity (or picture, or noise) predictor of pictures. Its output is zero at first."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        if config.shape is None or config.pooled_dim is None:
            missing = "shape" if config.shape is None else "pooled_dim"
            raise UserError(f"unet: {missing} is not set, and no data set or text encoder is there to tell it")
        if len(config.shape) != 3:
            raise UserError(f"unet: it makes pictures, not vectors of {config.shape[0]} numbers; take mlp")
        self.config, self.multiple = config, 2 ** (len(config.channel_mult) - 1)
        in_channels, *size = config.shape
        self._check(*size)
        widths = [mult * config.channels for mult in config.channel_mult]
        attends = [max(size) // 2**level <= config.attention_size for level in range(len(widths))]
        self.time_embed = MLPEmbedder(config.channels, 4 * config.channels)
        self.pooled_embed = MLPEmbedder(config.pooled_dim, 4 * config.channels) if config.pooled_dim else None
        self.first = nn.Conv2d(in_channels, config.channels, 3, padding=1)

        def block(before: int, after: int, attend: bool) -> _Block:
            return _Block(before, after, 4 * config.channels, config, attend=attend)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = config.channels, [config.channels]
        for level, (after, attend) in enumerate(zip(widths, attends, strict=True)):
            if level:
                self.down.append(_Down(width))
                skips.append(width)
            for _ in range(config.blocks):
                self.down.append(block(width, after, attend))
                width = after
                skips.append(width)
        self.middle = nn.ModuleList([block(width, width, config.attention_size > 0), block(width, width, False)])
        for level, (after, attend) in reversed(list(enumerate(zip(widths, attends, strict=True)))):
            for _ in range(config.blocks + 1):
                self.up.append(block(width + skips.pop(), after, attend))
                width = after
            if level:
                self.up.append(_Up(width))
        self.norm = _norm(width)
        self.last = _zero(nn.Conv2d(width, in_channels, 3, padding=1))

    @property
    def blocks(self) -> Iterator[nn.Module]:
        """Every residual block and resampling, in order: what is compiled or checkpointed one by one."""
        for part in (self.down, self.middle, self.up):
            yield from part

    def _check(self, height: int, width: int) -> None:
        m = self.multiple
        if height % m or width % m:
            near = f"{max(round(height / m), 1) * m} x {max(round(width / m), 1) * m}"
            levels = len(self.config.channel_mult)
            raise UserError(
                f"unet: a picture of {height} x {width} cannot be halved for each of {levels} levels; try {near}, or "
                "a shorter channel_mult"
            )

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, *, context_mask: Tensor | None = None
    ) -> Tensor:
        """The prediction at time t.

        x: B x C x H x W, H and W multiples of 2^(levels - 1); t: B in [0, 1]; pooled: B x pooled_dim; tokens are not heard.
        Returns B x C x H x W. Raises UserError for another picture size.
        """
        self._check(*x.shape[-2:])
        c = self.time_embed(sinusoidal(t, self.config.channels).to(self.last.weight.dtype))
        if self.pooled_embed is not None:
            c = c + self.pooled_embed(pooled)
        c, x = F.silu(c), self.first(x)
        skips = [x]
        for part in self.down:
            x = part(x, c)
            skips.append(x)
        for part in self.middle:
            x = part(x, c)
        for part in self.up:
            x = part(x, c) if isinstance(part, _Up) else part(torch.cat([x, skips.pop()], dim=1), c)
        return self.last(F.silu(self.norm(x)))


class _Block(nn.Module):
    """Two convolutions beside a skip, the second's norm modulated by the conditioning; then, at some levels, attention."""

    def __init__(self, before: int, after: int, conditioning: int, config: UNetConfig, *, attend: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(before), _norm(after)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = _zero(nn.Conv2d(after, after, 3, padding=1))
        self.modulation = nn.Linear(conditioning, 2 * after)
        self.dropout = nn.Dropout(config.dropout)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        self.attention = _Attention(after, config.attention) if attend else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: B x before x H x W; c: B x conditioning. Returns B x after x H x W."""
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(c)[..., None, None].chunk(2, dim=1)
        y = torch.addcmul(shift, self.norm2(y), 1 + scale)
        y = self.conv2(self.dropout(F.silu(y)))
        return self.attention(self.skip(x) + y)


class _Attention(nn.Module):
    """x + attention of the pixels to each other."""

    def __init__(self, channels: int, backend: str) -> None:
        super().__init__()
        self.heads = max(channels // HEAD, 1)
        if channels % self.heads:
            raise UserError(f"unet: {channels} channels do not divide into heads of {HEAD}; take a multiple of {HEAD}")
        self.backend = backend
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4).unbind(1)
        o = attention(q, k, v, default=self.backend)
        return x + self.proj(o.transpose(2, 3).reshape(x.shape))


class _Down(nn.Conv2d):
    """Half the side, by a convolution of stride two."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class _Up(nn.Conv2d):
    """Twice the side, by repeated pixels and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _norm(channels: int) -> nn.GroupNorm:
    groups = min(GROUPS, channels)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


def _zero(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
