"""Monotone rational-quadratic splines with linear tails, element by element (Durkan et al. 2019, arXiv 1906.04032)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from genflow.errors import UserError

MIN_BIN = 1e-3  # the least width and height of a bin, as a part of the whole interval
MIN_SLOPE = 1e-3
Pair = tuple[Tensor, Tensor]
_UNIT = math.log(math.expm1(1 - MIN_SLOPE))  # softplus(_UNIT) + MIN_SLOPE = 1


def spline_parameters(bins: int) -> int:
    """How many numbers make one spline of K bins: K widths, K heights, K - 1 slopes at the inner knots."""
    if not 1 < bins < 1 / MIN_BIN:
        raise UserError(f"bins = {bins} is out of range; a spline has 2 .. {round(1 / MIN_BIN) - 1} bins, such as 8")
    return 3 * bins - 1


def rational_quadratic(x: Tensor, parameters: Tensor, *, bound: float = 3.0) -> tuple[Tensor, Tensor]:
    """The spline of [-bound, bound] onto itself, the identity outside. Returns y and log dy/dx, shaped like x.

    x: B x ...; parameters: B x (3K - 1) x ..., or one row for all: along axis 1, K unnormalised widths, K heights and
    K - 1 slopes of the inner knots. All zeros is the identity; the slope at both ends is 1. Widths and heights are
    softmaxes that leave each bin at least 1/1000 of the interval; slopes are softplus, at least 1/1000. In float32 or wider.

    With xi the place in the bin, 0 to 1, s the bin's mean slope and d0, d1 the slopes at its ends (eq. 4, 5):

        y     = y_k + h_k (s xi^2 + d0 xi (1 - xi)) / D,    D = s + (d0 + d1 - 2s) xi (1 - xi)
        dy/dx = s^2 (d1 xi^2 + 2s xi (1 - xi) + d0 (1 - xi)^2) / D^2
    """
    x, parameters = _wide(x, parameters)
    (left, width), (low, height), d0, d1 = _bin(x, parameters, bound, axis=0)
    s = height / width
    xi = (_place(x, bound) - left).div(width).clamp(0, 1)
    part, log_slope = _within(xi, s, d0, d1)
    return _with_tails(x, low + height * part, log_slope, bound)


def rational_quadratic_inverse(y: Tensor, parameters: Tensor, *, bound: float = 3.0) -> tuple[Tensor, Tensor]:
    """The inverse of `rational_quadratic`. Returns x and log dx/dy, shaped like y."""
    y, parameters = _wide(y, parameters)
    (low, height), (left, width), d0, d1 = _bin(y, parameters, bound, axis=1)
    s = height / width
    theta = (_place(y, bound) - low).div(height).clamp(0, 1)
    xi = _root(theta, s, d0, d1)
    _, log_slope = _within(xi, s, d0, d1)
    return _with_tails(y, left + width * xi, -log_slope, bound)


def _wide(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, parameters.dtype), torch.float32)
    return x.to(dtype), parameters.to(dtype)


def _place(x: Tensor, bound: float) -> Tensor:
    """-bound .. bound to 0 .. 1, what is beyond to the ends."""
    return (x.clamp(-bound, bound) + bound) / (2 * bound)


def _bin(x: Tensor, parameters: Tensor, bound: float, axis: int) -> tuple[Pair, Pair, Tensor, Tensor]:
    """What x needs to know of its bin, in an interval of length 1: (start, length) along the axis on which x lies (0: of
    the domain, 1: of the codomain), (start, length) along the other, and the slopes at the bin's ends."""
    bins = (parameters.shape[1] + 1) // 3
    ends, slopes = parameters.split([2 * bins, bins - 1], dim=1)
    lengths = ends.unflatten(1, (2, bins)).softmax(2)  # of both axes, before each bin gets its least
    least, most = MIN_BIN, 1 - bins * MIN_BIN
    with torch.no_grad():
        knots = lengths[:, axis, :-1].cumsum(1).mul_(most)
        knots += least * torch.arange(1, bins, device=x.device, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))
        below = (knots <= _place(x, bound).unsqueeze(1)).to(x.dtype)
        k = below.sum(1, keepdim=True)
        index = k.long()
    length = least + most * _pick(lengths.transpose(1, 2), index.unsqueeze(2).expand(-1, -1, 2, *x.shape[1:]))
    start = least * k + most * (lengths[:, :, :-1] * below.unsqueeze(1)).sum(2)
    d0 = MIN_SLOPE + F.softplus(_pick(slopes, (index - 1).clamp(min=0)) + _UNIT)
    d1 = MIN_SLOPE + F.softplus(_pick(slopes, index.clamp(max=bins - 2)) + _UNIT)
    k = k.squeeze(1)
    d0, d1 = torch.where(k > 0, d0, 1.0), torch.where(k < bins - 1, d1, 1.0)
    other = 1 - axis
    return (start[:, axis], length[:, axis]), (start[:, other], length[:, other]), d0, d1


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """table: B x n x ..., or what expands to it; index: B x 1 x ... -> B x ..."""
    return table.expand(len(index), -1, *index.shape[2:]).gather(1, index).squeeze(1)


def _within(xi: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """The height reached at xi, as part of the bin's, and the log of the slope there."""
    rest = 1 - xi
    both = xi * rest
    denominator = s * (1 - 2 * both) + (d0 + d1) * both
    part = (s * xi.square() + d0 * both) / denominator
    slope = d1 * xi.square() + 2 * s * both + d0 * rest.square()
    return part, (slope * (s / denominator).square()).log()


def _root(theta: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    """The xi at which `_within` reaches theta: the root of the quadratic of eq. 6-8, without its cancellations.

    With e = d0 (1 - theta) - d1 theta the discriminant is e^2 + 4 s^2 theta (1 - theta), and with m = |e| + its root

        xi = 2 s theta / (2 s theta + m)    for e >= 0,        xi = m / (m + 2 s (1 - theta))    for e < 0.
    """
    rest = 1 - theta
    e = d0 * rest - d1 * theta
    up, down = 2 * s * theta, 2 * s * rest
    m = e.abs() + (e.square() + up * down).sqrt()
    return torch.where(e >= 0, up / (up + m), m / (m + down))


def _with_tails(x: Tensor, place: Tensor, log_slope: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """place: in an interval of length 1. Outside of it everything above was computed for the nearest end, finitely."""
    inside = x.abs() < bound
    return torch.where(inside, (2 * place - 1) * bound, x), torch.where(inside, log_slope, 0.0)
