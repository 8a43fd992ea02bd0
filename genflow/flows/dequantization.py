"""Dequantisation: pictures of whole grey levels become continuous, so that a density on them bounds a probability.

A picture k of D grey levels 0 .. levels - 1 becomes y = 2 (k + u) / levels - 1 in [-1, 1), u in (0, 1)^D drawn from
q(u | k). For any density p of y (Theis et al. 2016, arXiv 1511.01844; Ho et al. 2019, arXiv 1902.00275, eq. 12)

    log P(k) >= E_q[log p(y) - log q(u | k)] + D log(2 / levels).

Arithmetic is float32 whatever autocast says: a cell of 256 levels is 2^-7 wide, and bfloat16 has steps of 2^-8 at y = 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genflow.errors import UserError, check_least
from genflow.flows.bijections.base import per_sample
from genflow.functional import Rng
from genflow.registry import api_export, dequantization_export

GREYS = 256  # the levels of a picture in a file
OFF_GRID = 0.01  # of a level: how far float32 and a picture's scaling may carry a value from its grey level
BELOW_ONE = 1 - 2.0**-16  # the largest u with which float32 keeps k + u below k + 1 for every k < 256
MOST_LOG_SCALE = 2.0


@api_export("bits_per_dim")
def bits_per_dim(log_prob: Tensor, dims: int, levels: int = 256, scale: float = 2.0) -> Tensor:
    """Bits per dimension of a picture on its grey levels: -log_prob / (dims log 2) + log2(levels / scale).

    log_prob: a log density in nats of pictures whose levels fill an interval of length `scale`, less log q of their
    dequantisation. 256 levels in [-1, 1] (scale 2) add 7 bits, in [0, 1] (scale 1) 8 bits.
    """
    return -log_prob / (dims * math.log(2)) + math.log2(levels / scale)


@api_export("importance_weighted")
def importance_weighted(log_weights: Tensor) -> Tensor:
    """log (1/K) sum_k w_k, a lower bound that K tightens (Burda et al. 2016, arXiv 1509.00519, eq. 8). K x B -> B."""
    return torch.logsumexp(log_weights, dim=0) - math.log(len(log_weights))


class Dequantizer(nn.Module, ABC):
    """Pictures on 256 grey levels in [-1, 1] to continuous ones.

    levels: of the density's pictures: 2^n below 256 keep the top n bits. honest: whether a density of what it gives is a
    bound on the probability of pictures.
    """

    honest = True

    def __init__(self, shape: Sequence[int], levels: int) -> None:
        super().__init__()
        if len(shape) != 3:
            raise UserError(f"dequantisation is of pictures, C x H x W, not of samples of shape {tuple(shape)}")
        self.shape = tuple(shape)
        self.levels = levels
        self._seen = False

    def forward(self, x: Tensor, rng: Rng, position: Tensor) -> tuple[Tensor, Tensor]:
        """x: B x C x H x W in [-1, 1]; position: B, the counters of the noise, drawn from rng's stream "dequantize".

        Returns y, float32, and log q(u | x) in nats, B. Checks x as `check` does; on a GPU, where that waits for the
        device, only in evaluation and on the first batch of training.
        """
        if not (self._seen and self.training and x.is_cuda):
            self.check(x)
            self._seen = True
        with torch.autocast(x.device.type, enabled=False):
            k = self.cells(x)
            u, log_q = self.noise(k, rng, position)
            return 2 / self.levels * (k + u) - 1, log_q

    @abstractmethod
    def noise(self, k: Tensor, rng: Rng, position: Tensor) -> tuple[Tensor, Tensor]:
        """u and log q(u | k). k: B x C x H x W, float32."""

    def uniform(self, like: Tensor, rng: Rng, position: Tensor) -> Tensor:
        """Uniform numbers inside (0, 1) like `like`, float64 on the CPU: some devices have no such floats."""
        return rng.uniform("dequantize", position, like.shape[1:])

    def cells(self, x: Tensor) -> Tensor:
        """The grey level k of every value, 0 .. levels - 1, float32."""
        grey = (x.float() * 127.5 + 127.5).round()
        return grey if self.levels == GREYS else grey.div(GREYS // self.levels, rounding_mode="floor")

    def check(self, x: Tensor) -> None:
        """Raises UserError for pictures of another shape, outside [-1, 1], or not on the 256 grey levels."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.shape:
            wanted = " x ".join(str(n) for n in ("B", *self.shape))
            raise UserError(f"dequantisation takes pictures of {wanted}, not {' x '.join(str(n) for n in x.shape)}")
        if not x.numel():
            return
        grey = x.detach().float() * 127.5 + 127.5
        low, high, off = torch.stack([x.min().float(), x.max().float(), (grey - grey.round()).abs().max()]).tolist()
        if not (low >= -1 - 1e-4 and high <= 1 + 1e-4):
            raise UserError(
                f"pictures must be in [-1, 1], and these run from {low:.4g} to {high:.4g}; scale levels as k / 127.5 - 1"
            )
        if off > OFF_GRID:
            raise UserError(
                f"pictures must be on the 256 levels k / 127.5 - 1, and these lie up to {off:.2g} of a level beside them: "
                "already dequantised, or resized as floats? Give them as they are in the file, or round them to a level"
            )


@dequantization_export("uniform")
@dataclass(frozen=True)
class UniformDequantization:
    """Uniform noise within each cell, q(u) = 1 (Uria et al. 2013, arXiv 1306.0186): what most figures are quoted with.

    levels: a power of two up to 256; fewer than 256 keep the top bits, 32 gives Glow's five-bit pictures.
    """

    levels: int = 256

    def __post_init__(self) -> None:
        _check_levels(self.levels)

    def build(self, shape: Sequence[int]) -> Dequantizer:
        """shape: C x H x W of the pictures."""
        return UniformNoise(shape, self.levels)


class UniformNoise(Dequantizer):
    """u uniform in the cell."""

    def noise(self, k: Tensor, rng: Rng, position: Tensor) -> tuple[Tensor, Tensor]:
        return self.uniform(k, rng, position).float().to(k.device).clamp(max=BELOW_ONE), k.new_zeros(len(k))


@dequantization_export("variational")
@dataclass(frozen=True)
class VariationalDequantization:
    """Noise within each cell from a flow that sees the picture, trained with the density (Flow++, arXiv 1902.00275).

    u = sigmoid(f(logit(u0); k)), u0 uniform, f of `steps` affine couplings on checkerboards whose networks are
    convolutions `hidden` wide. f starts as the identity, and so q as the uniform noise. levels: as of `uniform`.
    """

    hidden: int = 64
    steps: int = 4
    levels: int = 256

    def __post_init__(self) -> None:
        _check_levels(self.levels)
        check_least(self, hidden=1, steps=1)

    def build(self, shape: Sequence[int]) -> Dequantizer:
        """shape: C x H x W of the pictures."""
        return VariationalNoise(shape, self)


class VariationalNoise(Dequantizer):
    """u from a conditional flow of the cell's noise."""

    checkers: Tensor

    def __init__(self, shape: Sequence[int], config: VariationalDequantization) -> None:
        super().__init__(shape, config.levels)
        channels, height, width = self.shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, config.hidden, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(config.hidden, config.hidden, 3, padding=1),
        )
        self.couplings = nn.ModuleList(_CouplingNetwork(channels, config.hidden) for _ in range(config.steps))
        checkers = (torch.arange(height)[:, None] + torch.arange(width)) % 2
        self.register_buffer("checkers", checkers.float(), persistent=False)

    def noise(self, k: Tensor, rng: Rng, position: Tensor) -> tuple[Tensor, Tensor]:
        u, log_q = self.warp(torch.logit(self.uniform(k, rng, position)).float().to(k.device), k)
        return u.clamp(max=BELOW_ONE), log_q

    def warp(self, v: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Logistic noise v to u = sigmoid(f(v; k)). Returns u and log q(u | k) = log l(v) - log |df/dv| - log l(f(v))."""
        dtype = next(self.features.parameters()).dtype  # float32, or wider in a wider flow
        v, k = v.to(dtype), k.to(dtype)
        log_q = per_sample(_log_logistic(v))
        features = self.features(2 / self.levels * (k + 0.5) - 1)
        for i, network in enumerate(self.couplings):
            kept = self.checkers if i % 2 else 1 - self.checkers
            shift, raw = network(kept * v, features)
            log_scale = (1 - kept) * MOST_LOG_SCALE * torch.tanh(raw / MOST_LOG_SCALE)
            v = v * log_scale.exp() + (1 - kept) * shift
            log_q = log_q - per_sample(log_scale)
        return torch.sigmoid(v), log_q - per_sample(_log_logistic(v))


class _CouplingNetwork(nn.Module):
    """Shift and raw log-scale of a coupling from its kept half and the picture's features; zero at first."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, hidden, 3, padding=1)
        self.middle = nn.Conv2d(hidden, hidden, 1)
        self.leave = nn.Conv2d(hidden, 2 * channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, kept: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        h = F.gelu(self.middle(F.gelu(self.enter(kept) + features)))
        shift, raw = self.leave(h).chunk(2, dim=1)
        return shift, raw


@dequantization_export("gaussian")
@dataclass(frozen=True)
class GaussianDequantization:
    """Normal noise around each cell's middle (TarFlow, arXiv 2412.06329): better samples, and no likelihood of pictures.

    sigma: its standard deviation, on the scale of y. The noise leaves the cell, so that the density is one of noisy
    pictures and bounds nothing about the clean ones.
    """

    sigma: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise UserError(f"sigma = {self.sigma} must be positive, such as 0.05")

    def build(self, shape: Sequence[int]) -> Dequantizer:
        """shape: C x H x W of the pictures."""
        return GaussianNoise(shape, self.sigma)


class GaussianNoise(Dequantizer):
    """y = the cell's middle + sigma n, u = 1/2 + 128 sigma n."""

    honest = False

    def __init__(self, shape: Sequence[int], sigma: float) -> None:
        super().__init__(shape, GREYS)
        self.sigma = sigma

    def noise(self, k: Tensor, rng: Rng, position: Tensor) -> tuple[Tensor, Tensor]:
        n = rng.normal("dequantize", position, k.shape[1:], device=k.device)
        return 0.5 + self.levels / 2 * self.sigma * n, k.new_zeros(len(k))


class LatentNoise(nn.Module):
    """y = x + sigma n, of latents, which lie on no levels."""

    levels: int | None = None
    honest = False

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor, rng: Rng, position: Tensor) -> tuple[Tensor, Tensor]:
        """As `Dequantizer.forward`: the same noise."""
        return x + self.sigma * rng.normal("dequantize", position, x.shape[1:], device=x.device), x.new_zeros(len(x))


def _log_logistic(v: Tensor) -> Tensor:
    """The log density of the standard logistic distribution, which is log of sigmoid's slope."""
    return F.logsigmoid(v) + F.logsigmoid(-v)


def _check_levels(levels: int) -> None:
    if not 2 <= levels <= GREYS or levels & (levels - 1):
        near = 2 ** min(max(round(math.log2(max(levels, 1))), 1), 8)
        raise UserError(f"levels = {levels} is not a power of two within 2 .. 256; try {near}")
