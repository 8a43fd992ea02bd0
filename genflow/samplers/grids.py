"""Time grids from noise to data: grid(steps, shift) -> steps + 1 falling times, from 1.0 to 0.0, both included.

Every grid is shifted once, after its own rule: t' = shift t / (1 + (shift - 1) t) (SD3, eq. 23). Two rules for the end:
a grid that falls to 0 by its own formula (uniform, shifted, cosine, beta), and one that is formed down to a smallest
time, from which one more step leads to 0 (karras, exponential, log_snr, double_shifted). A list of your own times does
as well wherever a grid is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

from genflow.errors import UserError
from genflow.functional import shift_time
from genflow.registry import grid_export

MOST = 100_000  # steps; a slip of the finger would fill the memory with times


def _check(steps: int, shift: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, Integral):
        raise UserError(f"steps = {steps!r} is not a whole number")
    if steps < 1:
        raise UserError(f"steps = {steps} is too few; the nearest possible number is 1")
    if steps > MOST:
        raise UserError(f"steps = {steps} is too many; the most is {MOST}")
    if not 0 < shift < math.inf:
        raise UserError(f"shift = {shift} must be positive; 1.0 is no shift")


def _smallest(t_min: float) -> float:
    if not 0 < t_min < 1:
        raise UserError(f"t_min = {t_min} is not between 0 and 1; try 0.001")
    return t_min


def _falling(steps: int, stop: float = 0.0) -> list[float]:
    """steps + 1 equally spaced numbers from 1 to stop."""
    return [(i + stop * (steps - i)) / steps for i in range(steps, -1, -1)]


def _then_zero(times: Sequence[float], shift: float) -> list[float]:
    """The first time made 1, the others shifted, and one last step to 0."""
    return [1.0, *(shift_time(t, shift) for t in times[1:]), 0.0]


@grid_export("uniform")
def uniform(steps: int, shift: float = 1.0) -> list[float]:
    """Equal steps. Raises UserError for any shift but 1."""
    if shift != 1:
        raise UserError(f"the uniform grid has no shift, but shift = {shift}; choose the grid 'shifted'")
    return shifted(steps)


@grid_export("shifted")
def shifted(steps: int, shift: float = 1.0) -> list[float]:
    """Equal steps, shifted once: t' = shift t / (1 + (shift - 1) t) (SD3, eq. 23)."""
    _check(steps, shift)
    return [shift_time(t, shift) for t in _falling(steps)]


@grid_export("double_shifted")
def double_shifted(steps: int, shift: float = 1.0, *, t_min: float | None = None) -> list[float]:
    """diffusers' and Stability's grid: from 1 to the *shifted* 1/1000 in steps - 1, shifted again, then 0.

    With shift 3 the last time before 0 is 0.0089, where one shift gives 0.0030. For samples as diffusers draws them
    (FlowMatchEulerDiscreteScheduler) and as the released SD3 code does. t_min: in place of that shifted 1/1000; 1/1000
    itself is diffusers' where the shift is by the picture's size.
    """
    _check(steps, shift)
    last = shift_time(1 / 1000, shift) if t_min is None else _smallest(t_min)
    return [shift_time(t, shift) for t in (_falling(steps - 1, last) if steps > 1 else [1.0])] + [0.0]


@grid_export("karras")
def karras(
    steps: int, shift: float = 1.0, *, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> list[float]:
    """Equal steps in sigma^(1/rho) of sigma = t / (1 - t), from sigma_max to sigma_min, then 0 (EDM, eq. 5).

    Karras et al. 2022, arXiv 2206.00364. The first time, sigma_max / (1 + sigma_max) = 0.988, becomes 1.
    """
    _check(steps, shift)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}: not 0 < sigma_min < sigma_max")
    if not 0 < rho < math.inf:
        raise UserError(f"rho = {rho} must be positive; 7.0 is EDM's")
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = [(top + (bottom - top) * i / max(steps - 1, 1)) ** rho for i in range(steps)]
    return _then_zero([sigma / (1 + sigma) for sigma in sigmas], shift)


@grid_export("exponential")
def exponential(steps: int, shift: float = 1.0, *, t_min: float = 0.001) -> list[float]:
    """Equal steps in log t from 1 to t_min, then 0: diffusers' `use_exponential_sigmas` for flows."""
    _check(steps, shift)
    _smallest(t_min)
    return _then_zero([t_min ** (i / max(steps - 1, 1)) for i in range(steps)], shift)


@grid_export("log_snr")
def log_snr_uniform(steps: int, shift: float = 1.0, *, t_min: float = 0.002, t_max: float = 0.998) -> list[float]:
    """Equal steps in the log-SNR log((1 - t) / t) from t_max to t_min, then 0 (DPM-Solver++, arXiv 2211.01095).

    The first time becomes 1. In sigma = t / (1 - t) this is k-diffusion's exponential grid.
    """
    _check(steps, shift)
    if not 0 < t_min < t_max < 1:
        raise UserError(f"t_min = {t_min}, t_max = {t_max}: not 0 < t_min < t_max < 1")
    top, bottom = math.log(t_max / (1 - t_max)), math.log(t_min / (1 - t_min))
    logits = [top + (bottom - top) * i / max(steps - 1, 1) for i in range(steps)]
    return _then_zero([1 / (1 + math.exp(-logit)) for logit in logits], shift)


@grid_export("cosine")
def cosine(steps: int, shift: float = 1.0) -> list[float]:
    """Equal steps along the cosine schedule: t = 1 - 1 / (1 + tan(pi u / 2)), u uniform (SD3, eq. 21)."""
    _check(steps, shift)
    angles = [math.pi / 2 * u for u in _falling(steps)]
    return [shift_time(math.sin(a) / (math.sin(a) + math.cos(a)), shift) for a in angles[:-1]] + [0.0]


@grid_export("beta")
def beta(steps: int, shift: float = 1.0, *, a: float = 0.6) -> list[float]:
    """Quantiles of the Beta(a, a) distribution at equal steps: closer at both ends for a < 1 (arXiv 2407.12173)."""
    _check(steps, shift)
    if not 0 < a < math.inf:
        raise UserError(f"a = {a} must be positive; 0.6 crowds the ends, 1.0 is uniform")
    times = [1.0, *(shift_time(_beta_quantile(u, a), shift) for u in _falling(steps)[1:-1]), 0.0]
    if not all(t > t_next for t, t_next in pairwise(times)):
        raise UserError(f"a = {a} crowds {steps} steps until times are equal; 0.6 is usual, 1.0 uniform")
    return times


def _beta_quantile(p: float, a: float) -> float:
    """The p-quantile of Beta(a, a), by bisection."""
    if p > 0.5:
        return 1 - _beta_quantile(1 - p, a)
    low, high = 0.0, 0.5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_cdf(middle, a) < p else (low, middle)
    return (low + high) / 2


def _beta_cdf(x: float, a: float) -> float:
    """The distribution function of Beta(a, a) for x <= 1/2: its power series (DLMF 8.17.8), x^a (1-x)^a / (a B) sum c_n."""
    front = math.exp(a * math.log(x * (1 - x)) - math.log(a) - 2 * math.lgamma(a) + math.lgamma(2 * a))
    total, term, n = 1.0, 1.0, 0
    while term > 1e-17 * total:
        term *= (2 * a + n) / (a + 1 + n) * x
        total += term
        n += 1
    return front * total
