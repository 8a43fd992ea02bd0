"""Every timestep density against its formula: draws, pdf and cdf must tell the same story."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from genflow.errors import UserError
from genflow.flows.densities import CosMap, LogitNormal, Mixed, Mode, Shifted, Uniform
from genflow.functional import Rng

DENSITIES = [
    Uniform(),
    LogitNormal(),
    LogitNormal(0.5, 0.6),
    LogitNormal(-1.0, 1.5),
    Mode(1.29),
    Mode(-0.8),
    Mode(0.0),
    CosMap(),
    Shifted(LogitNormal(), 3.0),
    Shifted(Uniform(), 0.5),
    Shifted(Mode(1.0), 2.0),
    Mixed(LogitNormal(0.5, 0.6), 0.2),
    Mixed(Shifted(CosMap(), 3.0), 0.05),
    Shifted(Mixed(LogitNormal(), 0.3), 3.0),
    Mixed(Uniform(), 1.0),
    Mixed(LogitNormal(), 0.0),
]
T = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


def formula_pdf(density, t: float) -> float:
    """The densities as the paper prints them, written down again without genflow."""
    if isinstance(density, Uniform):
        return 1.0
    if isinstance(density, LogitNormal):
        return stats.norm.pdf(math.log(t / (1 - t)), density.mean, density.std) / (t * (1 - t))
    if isinstance(density, CosMap):
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t * t)
    if isinstance(density, Mode):
        from scipy.optimize import brentq

        s = density.scale
        u = brentq(lambda u: 1 - u - s * (math.cos(math.pi * u / 2) ** 2 - 1 + u) - t, 0, 1, xtol=1e-14)
        return 1 / abs(-1 - s * (1 - math.pi / 2 * math.sin(math.pi * u)))
    if isinstance(density, Shifted):
        a = density.shift
        return formula_pdf(density.base, t / (a - (a - 1) * t)) * a / (a - (a - 1) * t) ** 2
    return density.weight + (1 - density.weight) * formula_pdf(density.base, t)


@pytest.mark.parametrize("density", DENSITIES, ids=repr)
def test_pdf_is_the_formula_and_cdf_its_integral(density):
    expected = [formula_pdf(density, t) for t in T.tolist()]
    np.testing.assert_allclose(density.pdf(T), expected, rtol=1e-9)
    for low, high in ((0.02, 0.3), (0.3, 0.8), (0.8, 0.98)):
        ends = density.cdf(torch.tensor([low, high], dtype=torch.float64))
        mass, _ = integrate.quad(lambda t: formula_pdf(density, t), low, high, epsabs=1e-11)
        assert (ends[1] - ends[0]).item() == pytest.approx(mass, abs=1e-8)


@pytest.mark.parametrize("density", DENSITIES, ids=repr)
def test_draws_follow_the_cdf(density):
    t = density(Rng(0).uniform("t", torch.arange(20_000)))
    assert t.dtype == torch.float64 and t.min() >= 0 and t.max() <= 1
    result = stats.kstest(t.numpy(), lambda a: density.cdf(torch.from_numpy(a)).numpy())
    assert result.pvalue > 1e-3
    wrong = Shifted(density, 1.3)  # which the test must be able to tell apart
    assert stats.kstest(t.numpy(), lambda a: wrong.cdf(torch.from_numpy(a)).numpy()).pvalue < 1e-6


def test_shifting_a_logit_normal_moves_its_mean_by_log_shift():
    u = Rng(0).uniform("t", torch.arange(1000))
    shifted, moved = Shifted(LogitNormal(0.3, 0.7), 3.0), LogitNormal(0.3 + math.log(3), 0.7)
    torch.testing.assert_close(shifted(u), moved(u), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(shifted.pdf(T), moved.pdf(T), rtol=1e-10, atol=0)
    torch.testing.assert_close(shifted.cdf(T), moved.cdf(T), rtol=1e-10, atol=0)


def test_positive_means_are_towards_noise():
    u = Rng(0).uniform("t", torch.arange(100_000))
    for mean in (-0.5, 0.5):
        assert torch.logit(LogitNormal(mean, 1.0)(u)).mean().item() == pytest.approx(mean, abs=0.02)


def test_limits_of_mode():
    assert torch.allclose(Mode(0.0)(T), 1 - T)
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for scale in (-1.0, 2 / (math.pi - 2)):
        t = Mode(scale)(u)
        assert t[0] == 1 and t[-1].abs() < 1e-12 and (t.diff() <= 1e-12).all()


@pytest.mark.parametrize(
    ("make", "near"),
    [
        (lambda: Mode(2.0), "1.7519"),
        (lambda: Mode(-1.5), "-1.0"),
        (lambda: LogitNormal(0.0, 0.0), "std"),
        (lambda: Shifted(Uniform(), 0.0), "shift"),
        (lambda: Mixed(Uniform(), 1.5), "1.0"),
        (lambda: Mixed(Uniform(), math.nan), "weight"),
    ],
)
def test_impossible_parameters_are_refused(make, near):
    with pytest.raises(UserError, match=near):
        make()
