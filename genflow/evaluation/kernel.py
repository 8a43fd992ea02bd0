"""The kernel distance (KID) of two sets of features, which has no bias however few the samples.

Binkowski et al. 2018, Demystifying MMD GANs (arXiv 1801.01401).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.evaluation.features import checked
from genflow.functional import Rng
from genflow.registry import api_export

SUBSETS, SIZE = 100, 1000  # as published
ROWS = 2048  # of a kernel matrix at a time


@api_export("KernelDistance")
@dataclass(frozen=True)
class KernelDistance:
    """mean: of the squared MMD over subsets; spread: its standard deviation over them; subset: their size."""

    mean: float
    spread: float
    subset: int


@api_export("kernel_distance")
@torch.no_grad()
def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = SUBSETS, subset: int | None = None, seed: int = 0
) -> KernelDistance:
    """The squared MMD of N x D and M x D features under the kernel k(x, y) = (x.y / D + 1)^3, in float64.

    The unbiased estimate (eq. 4, u-statistics in a and in b) of each of `subsets` pairs of subsets, drawn without
    replacement from `seed`; it may be negative. subset: their size, by default 1000, or half of the fewer, but 2 at least,
    where that is less; of sets of 2 all subsets are one, and the spread 0. Raises UserError for fewer than two in a subset,
    or more than there are.
    """
    checked(a, b)
    few = min(len(a), len(b))
    size = min(SIZE, max(few // 2, 2)) if subset is None else subset
    if not 2 <= size <= few or subsets < 1:
        raise UserError(f"{subsets} subsets of {size} out of {few} features: take 1 or more of 2 to {few}")
    a, b = a.cpu().double(), b.cpu().double()
    in_a, in_b = (_members(len(x), subsets, size, seed, name) for name, x in (("a", a), ("b", b)))
    own = _sums(a, a, in_a, in_a) - in_a @ _kernel_diagonal(a) + _sums(b, b, in_b, in_b) - in_b @ _kernel_diagonal(b)
    each = own / (size * (size - 1)) - 2 * _sums(a, b, in_a, in_b) / size**2
    return KernelDistance(float(each.mean()), float(each.std()) if subsets > 1 else math.nan, size)


def _members(n: int, subsets: int, size: int, seed: int, stream: str) -> Tensor:
    """subsets x n, 1 where a sample is in a subset."""
    chosen = torch.zeros(subsets, n, dtype=torch.float64)
    for i in range(subsets):
        chosen[i, Rng(seed, i).bits(stream, torch.arange(n)).argsort()[:size]] = 1
    return chosen


def _kernel_diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def _sums(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """For each pair of subsets, the sum of the kernel over it."""
    total = torch.zeros(len(in_x), dtype=torch.float64)
    for rows in torch.arange(len(x)).split(ROWS):
        kernel = (x[rows] @ y.T / x.shape[1] + 1) ** 3
        total += ((in_x[:, rows] @ kernel) * in_y).sum(1)
    return total
