"""Pure maths on tensors: the straight path between data and noise, its time shift, and counter-based randomness.

Time runs from t = 0, data, to t = 1, noise: z_t = (1 - t) x + t eps, v = dz/dt = eps - x (Esser et al. 2024, arXiv
2403.03206). Wherever a time t meets a picture it may be a number, a tensor of B times, or anything that broadcasts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeVar

import numpy as np
import torch
from numpy.random import PCG64, Generator
from torch import Tensor

from genflow.errors import UserError
from genflow.registry import api_export

Time = float | Tensor
T = TypeVar("T", float, Tensor)


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device; what comes from the CPU does not wait for it. Of MPS it does, which reads what is freed by then."""
    within = torch.device(device).type
    return x.to(device, non_blocking=x.device.type == "cpu" and within != "mps")  # pytorch#189690


def wide(x: Tensor) -> Tensor:
    """x in float32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_levels(pictures: Tensor) -> None:
    """Raises UserError for pictures of whole numbers, as a file holds them."""
    if not pictures.is_floating_point():
        raise UserError(f"a picture holds numbers in [-1, 1], not {pictures.dtype}; scale levels as k / 127.5 - 1")


NARROW = {"mps"}  # kinds of device without float64


def double(x: Tensor) -> Tensor:
    """x in float64; on the CPU where its device has none."""
    return (x.cpu() if x.device.type in NARROW else x).double()


# ---------------------------------------------------------------------------------------------------- the straight path


def _like(t: Time, x: Tensor) -> Time:
    """B times as B x 1 x ... x 1, so that they broadcast over x; numbers as they are."""
    return t.view(-1, *[1] * (x.dim() - 1)) if isinstance(t, Tensor) and t.dim() == 1 else t


@api_export("interpolate")
def interpolate(x: Tensor, noise: Tensor, t: Time) -> Tensor:
    """The point at time t of the straight path: z_t = (1 - t) x + t noise."""
    t = _like(t, x)
    return (1 - t) * x + t * noise


@api_export("path_velocity")
def path_velocity(x: Tensor, noise: Tensor) -> Tensor:
    """The velocity of the straight path, the same at every time: v = noise - x."""
    return noise - x


@api_export("x_from_velocity")
def x_from_velocity(z: Tensor, v: Tensor, t: Time) -> Tensor:
    """The data end of the straight line through z_t with velocity v: x = z - t v."""
    return z - _like(t, z) * v


@api_export("noise_from_velocity")
def noise_from_velocity(z: Tensor, v: Tensor, t: Time) -> Tensor:
    """The noise end of the straight line through z_t with velocity v: eps = z + (1 - t) v."""
    return z + (1 - _like(t, z)) * v


@api_export("velocity_from_x")
def velocity_from_x(z: Tensor, x: Tensor, t: Time, t_min: float = 0.0) -> Tensor:
    """The velocity at z_t that leads to x: v = (z - x) / max(t, t_min) (JiT, arXiv 2511.13720, time turned)."""
    t = _like(t, z)
    return (z - x) / (t.clamp(min=t_min) if isinstance(t, Tensor) else max(t, t_min))


@api_export("velocity_from_noise")
def velocity_from_noise(z: Tensor, noise: Tensor, t: Time) -> Tensor:
    """The velocity at z_t that comes from noise: v = (eps - z) / (1 - t), for t < 1."""
    return (noise - z) / (1 - _like(t, z))


@api_export("score_from_velocity")
def score_from_velocity(z: Tensor, v: Tensor, t: Time) -> Tensor:
    """grad log p_t(z) = -eps / t = -(z + (1 - t) v) / t, for t > 0."""
    return -noise_from_velocity(z, v, t) / _like(t, z)


@api_export("log_snr")
def log_snr(t: T) -> T:
    """The log of the signal-to-noise ratio of amplitudes, log((1 - t) / t); infinite at the ends."""
    if isinstance(t, Tensor):
        return -torch.logit(t)
    return math.copysign(math.inf, 0.5 - t) if t in (0, 1) else math.log1p(-t) - math.log(t)


@api_export("renoise")
def renoise(z: Tensor, noise: Tensor, t: float, t_up: float) -> Tensor:
    """The forward transition of the path, from t up to t_up: z_t_up = k z_t + sqrt(t_up^2 - (k t)^2) noise.

    k = (1 - t_up) / (1 - t). A marginal of the path becomes the later one; t_up = t leaves z as it is. Raises UserError
    for times that are not 0 <= t <= t_up <= 1.
    """
    if not 0 <= t <= t_up <= 1:
        raise UserError(f"renoise from t = {t} to t_up = {t_up} is not upwards, 0 <= t <= t_up <= 1")
    keep = (1 - t_up) / (1 - t) if t < t_up else 1.0
    return keep * z + math.sqrt(t_up**2 - (keep * t) ** 2) * noise


# ----------------------------------------------------------------------------------------------------------- time shift


@api_export("shift_time")
def shift_time(t: T, shift: float) -> T:
    """shift t / (1 + (shift - 1) t) (SD3, eq. 23): moves log_snr by -log(shift), above 1 towards noise."""
    return shift * t / (shift * t + (1 - t))  # exact at both ends


@api_export("resolution_shift")
def resolution_shift(tokens: int, *, base: int = 256, top: int = 4096, low: float = 0.5, high: float = 1.15) -> float:
    """The shift for a picture of that many image tokens: exp(mu), mu linear from low at base tokens to high at top.

    FLUX's rule (black-forest-labs/flux, sampling.py); tokens are patches, after packing. mu is held at `high` beyond
    `top`, where FLUX goes on to shifts for which it was never trained.
    """
    mu = low + (high - low) * (tokens - base) / (top - base)
    return math.exp(min(mu, high))


# ----------------------------------------------------------------------------------------------------------- randomness

_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio
_MASK = 2**64 - 1


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), on int64 taken as unsigned: a bijection."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _splitmix(state: Tensor, count: int) -> Tensor:
    """The next outputs of splitmix64, as int64. state: B int64 -> B x count."""
    return mix(state[:, None] + torch.arange(1, count + 1, device=state.device) * _signed(_GAMMA))


@api_export("Rng")
@dataclass(frozen=True)
class Rng:
    """Counter-based randomness: row i is a function of (seed, step, stream, index[i]) alone, on one kind of device.

    So a sample does not depend on its batch mates, on the number of workers or of ranks, nor on what was drawn before.
    seed: 0 .. 2^63 - 1; step: any counter; stream: the name of what is drawn ("t", "noise", ...).
    """

    seed: int
    step: int = 0

    def bits(self, stream: str, index: Tensor) -> Tensor:
        """64 random bits for each index. index: B int64, on any device -> B int64 on the CPU."""
        name = f"{self.seed}/{self.step}/{stream}".encode()
        key = _signed(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little"))
        counter = index.to("cpu", torch.int64) * _signed(_GAMMA)
        return mix(mix(counter + key) ^ key)

    def uniform(self, stream: str, index: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers inside (0, 1), the ends excluded. index: B int64 -> B x *shape float64 on the CPU.

        Within a row they are the outputs of splitmix64, its state starting at the row's bits.
        """
        bits = self.bits(stream, index)
        if shape:
            bits = _splitmix(bits, math.prod(shape)).view(len(bits), *shape)
        return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52

    def normal(self, stream: str, index: Tensor, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers. index: B int64 -> B x *shape float32 on the device.

        Each row has a generator of its own. On the CPU NumPy's, since torch's keeps only 32 bits of a seed; elsewhere the
        numbers are others and made there, by Box and Muller (1958) from splitmix64, 32 bits each: up to 6.8.
        """
        if torch.device(device).type != "cpu":
            size = math.prod(shape)
            words = _splitmix(sent(self.bits(stream, index), device), -(-size // 2))
            radius = (-2 * ((_shift_right(words, 32).float() + 0.5) * 2.0**-32).log()).sqrt()
            angle = (words & 0xFFFFFFFF).float() * (math.pi * 2.0**-31)
            return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :size].view(len(index), *shape)
        rows = [
            Generator(PCG64(seed & _MASK)).standard_normal(tuple(shape), dtype=np.float32)
            for seed in self.bits(stream, index).tolist()
        ]
        return torch.from_numpy(np.stack(rows)) if rows else _nothing(shape)


def row_hash(rows: Tensor, stream: str) -> Tensor:
    """64 bits of each row: B x N -> B int64, on its device."""
    bits = rows.float().contiguous().view(torch.int32) if rows.is_floating_point() else rows
    factor = Rng(0).bits(stream, torch.arange(bits.shape[1], device="cpu")).to(bits.device) | 1
    return mix((bits.long() * factor).sum(1))


@api_export("noise_from_seeds")
def noise_from_seeds(seeds: Sequence[int], shape: Sequence[int], *, step: int = 0, stream: str = "noise") -> Tensor:
    """The noise of each seed's picture: B x *shape float32, row i a function of seeds[i], shape, step and stream only.

    step 0 of stream "noise" is where sampling starts; stochastic samplers draw others on the way. Raises UserError for
    what is no list, and for a seed that is not a whole number in 0 .. 2^63 - 1.
    """
    if isinstance(seeds, Tensor) or not isinstance(seeds, Collection):
        kind = type(seeds).__name__
        raise UserError(f"seeds are a list of whole numbers, one for each picture, such as [0, 1], not of type {kind}")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise UserError(f"seed {seed!r} is not a whole number")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed {seed} is out of range; the nearest valid one is {min(max(seed, 0), 2**63 - 1)}")
    zero = torch.zeros(1, dtype=torch.int64, device="cpu")
    return torch.cat([_nothing(shape), *(Rng(seed, step).normal(stream, zero, shape) for seed in seeds)])


def _nothing(shape: Sequence[int]) -> Tensor:
    return torch.empty(0, *shape, dtype=torch.float32, device="cpu")
