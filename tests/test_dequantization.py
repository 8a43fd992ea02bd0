"""Dequantisation: the bookkeeping of bits on distributions of known entropy, the noise, and what is refused."""

import itertools
import math

import pytest
import torch
from torch import nn

from genflow.errors import UserError
from genflow.flows.dequantization import (
    BELOW_ONE,
    GaussianDequantization,
    UniformDequantization,
    VariationalDequantization,
    bits_per_dim,
    importance_weighted,
)
from genflow.functional import Rng
from genflow.registry import resolve
from tests.noise import shaken

SHAPE = (1, 1, 3)  # three pixels


def grid(k):
    """Grey levels as pictures in [-1, 1]."""
    return torch.as_tensor(k, dtype=torch.float32) / 127.5 - 1


@pytest.fixture
def discrete():
    """Every picture of three pixels that have four grey levels each, and its probability; not a product."""
    greys = [0, 16, 128, 255]
    k = torch.tensor(list(itertools.product(greys, repeat=3)))
    weights = torch.rand(len(k), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4
    return k, weights / weights.sum()


# ----------------------------------------------------------------------------------------------------------- bookkeeping


@pytest.mark.parametrize("levels", [256, 32])
@pytest.mark.parametrize("scale", [2.0, 1.0])
def test_bits_per_dim_of_a_piecewise_constant_density_are_the_entropy(discrete, levels, scale):
    """p(y) = P(k) (levels / scale)^D in each cell: the bound is tight, whatever the noise."""
    k, probability = discrete
    cells = k // (256 // levels)
    table = {}
    for cell, p in zip(cells.tolist(), probability.tolist()):
        table[tuple(cell)] = table.get(tuple(cell), 0.0) + p
    entropy = -sum(p * math.log2(p) for p in table.values()) / 3

    module = UniformDequantization(levels).build(SHAPE)
    y, log_q = module(grid(k).view(-1, *SHAPE), Rng(0), torch.arange(len(k)))
    y = y if scale == 2 else (y + 1) / 2  # the same pictures in [0, 1]
    cell_of_y = ((y.double() + (1 if scale == 2 else 0)) * levels / scale).floor().long().flatten(1)
    mass = torch.tensor([table[tuple(cell)] for cell in cell_of_y.tolist()], dtype=torch.float64)
    log_p = mass.log() + 3 * math.log(levels / scale)
    bits = bits_per_dim(log_p - log_q, 3, levels, scale)
    assert (probability * bits).sum().item() == pytest.approx(entropy, abs=1e-12)


def test_a_uniform_density_costs_eight_bits_and_five():
    zero = torch.zeros(2)
    assert bits_per_dim(zero - 12 * math.log(2), 12).tolist() == [8, 8]  # density 1/2 on [-1, 1]: + 7
    assert bits_per_dim(zero, 12, scale=1.0).tolist() == [8, 8]  # density 1 on [0, 1]
    assert bits_per_dim(zero, 12, 32, 1.0).tolist() == [5, 5]


def log_normal(y, mean=0.1, std=0.003):
    """A density narrower than its cell, so that the bound is loose."""
    return (-0.5 * ((y - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))).flatten(1).sum(1)


def test_importance_weights_rise_with_their_number_to_the_probability():
    k, n = 140, 2000  # the cell of 0.1
    x = grid([[[[k]]]]).expand(n, 1, 1, 1)
    low, high = 2 * k / 256 - 1, 2 * (k + 1) / 256 - 1
    root = 0.003 * math.sqrt(2)
    exact = math.log(0.5 * (math.erf((high - 0.1) / root) - math.erf((low - 0.1) / root)))

    module = UniformDequantization().build((1, 1, 1))
    draws = torch.stack([log_normal(module(x, Rng(0, s), torch.arange(n))[0]) for s in range(64)])
    bounds = [(importance_weighted(draws[:K]).mean() + math.log(2 / 256)).item() for K in (1, 4, 16, 64)]
    assert bounds == sorted(bounds) and bounds[-1] < exact
    assert exact - bounds[0] > 0.1 and exact - bounds[-1] < 0.02
    assert importance_weighted(draws[:1]).equal(draws[0])
    everything = importance_weighted(draws.flatten()[:, None]).item() + math.log(2 / 256)
    assert everything == pytest.approx(exact, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------- noise


class Extremes(Rng):
    """The least and the largest uniform numbers that there are."""

    def uniform(self, stream, index, shape=()):
        return torch.full((len(index), *shape), 2.0**-53 if self.seed == 0 else 1 - 2.0**-53, dtype=torch.float64)


@pytest.mark.parametrize("levels", [256, 32, 2])
@pytest.mark.parametrize("rng", [Rng(0), Extremes(0), Extremes(1)])
def test_every_level_comes_back_from_its_cell(levels, rng):
    k = torch.arange(256)
    for config in (UniformDequantization(levels), VariationalDequantization(hidden=4, levels=levels)):
        module = shaken(config.build((1, 1, 1)))
        with torch.no_grad():
            y, _ = module(grid(k).view(-1, 1, 1, 1), rng, k)
        assert y.dtype == torch.float32 and y.min() >= -1 and y.max() < 1
        assert torch.equal(((y + 1) * (levels / 2)).floor().long().flatten(), k // (256 // levels))
        if rng == Rng(0) and levels == 256:  # and the nearest grey level of y * 256 / 255 is k
            assert torch.equal((y * 256 / 255 * 127.5 + 127.5).round().long().flatten(), k)


def test_cells_are_divided_by_256():
    y, _ = UniformDequantization().build((1, 1, 1))(grid([[[[255]]]]), Extremes(1), torch.tensor([0]))
    assert y.item() == 2 * (255 + BELOW_ONE) / 256 - 1


@pytest.mark.parametrize(
    "config", [UniformDequantization(), VariationalDequantization(hidden=4), GaussianDequantization()]
)
def test_noise_hangs_on_the_position_alone(config):
    module = shaken(config.build((3, 4, 4)))
    k = torch.randint(256, (5, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    x, position = grid(k), torch.tensor([3, 7, 0, 2**40, 9])
    with torch.no_grad():
        y, log_q = module(x, Rng(1, 2), position)
        alone, log_q_alone = module(x[1:2], Rng(1, 2), position[1:2])
        other, _ = module(x, Rng(1, 3), position)
    assert y.shape == x.shape and log_q.shape == (5,) and y.dtype == log_q.dtype == torch.float32
    torch.testing.assert_close(alone[0], y[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(log_q_alone[0], log_q[1], rtol=1e-5, atol=1e-5)
    assert (other != y).float().mean() > 0.99
    middle = x * 255 / 256
    assert (y - middle).abs().max() < (0.3 if isinstance(config, GaussianDequantization) else 1 / 256 + 1e-6)


@pytest.mark.parametrize("config", [UniformDequantization(), VariationalDequantization(hidden=4)])
def test_noise_is_float32_inside_autocast(config):
    module = shaken(config.build((3, 4, 4)))
    x, position = grid(torch.full((2, 3, 4, 4), 255)), torch.arange(2)
    with torch.no_grad():
        expected = module(x, Rng(0), position)
        with torch.autocast("cpu", torch.bfloat16):
            got = module(x, Rng(0), position)
    for a, b in zip(expected, got):
        assert torch.equal(a, b)


def test_gaussian_noise_has_its_sigma_and_makes_no_claim():
    module = GaussianDequantization(0.05).build((1, 32, 32))
    y, log_q = module(grid(torch.full((20, 1, 32, 32), 200)), Rng(0), torch.arange(20))
    assert y.std().item() == pytest.approx(0.05, rel=0.03)
    assert y.mean().item() == pytest.approx(grid(200).item() * 255 / 256, abs=2e-3)
    assert not module.honest and module.sigma == 0.05 and log_q.count_nonzero() == 0
    assert UniformDequantization().build(SHAPE).honest and VariationalDequantization().build(SHAPE).honest


# ----------------------------------------------------------------------------------------------------------- variational


def test_variational_noise_starts_as_the_uniform():
    k = grid(torch.randint(256, (4, 3, 4, 4), generator=torch.Generator().manual_seed(0)))
    y, log_q = VariationalDequantization().build((3, 4, 4))(k, Rng(0), torch.arange(4))
    torch.testing.assert_close(
        y, UniformDequantization().build((3, 4, 4))(k, Rng(0), torch.arange(4))[0], rtol=0, atol=1e-6
    )
    assert log_q.abs().max() < 1e-4


def test_log_q_is_the_jacobian_of_the_warp():
    module = shaken(VariationalDequantization(hidden=6, steps=3).build((2, 2, 2))).double()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(8, dtype=torch.float64, generator=generator)
    k = torch.randint(256, (1, 2, 2, 2), generator=generator).double()

    def flat(v):
        return module.warp(v.view(1, 2, 2, 2), k)[0].flatten()

    log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(flat, v))[1]
    base = -v - 2 * torch.log1p(torch.exp(-v))  # the logistic density
    _, log_q = module.warp(v.view(1, 2, 2, 2), k)
    assert log_q.item() == pytest.approx((base.sum() - log_det).item(), abs=1e-10)
    assert log_det.abs() > 0.1


def test_q_integrates_to_one_over_the_cell():
    """The integral of du = l(v) / q(u) dv over all logistic noise v, l its density, is the area of the cell."""
    module = shaken(VariationalDequantization(hidden=6).build((1, 1, 2))).double()
    axis = torch.linspace(-40, 40, 251, dtype=torch.float64)
    v = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        u, log_q = module.warp(v.view(-1, 1, 1, 2), torch.full((len(v), 1, 1, 2), 77.0).double())
    log_logistic = (-v - 2 * torch.log1p(torch.exp(-v))).sum(1)
    area = (log_logistic - log_q).exp() * 0.32**2
    assert area.sum().item() == pytest.approx(1, abs=1e-4)
    assert (area * (u.flatten(1) < 0.5).all(1)).sum().item() == pytest.approx(0.25, abs=0.02)
    assert log_q[log_logistic > -6].std() > 0.1  # and it is not the uniform one


def test_variational_noise_learns_where_the_density_is():
    """Trained on a density narrower than the cell, its bound comes nearer than that of uniform noise."""
    torch.manual_seed(0)
    x = grid(torch.full((64, 1, 1, 2), 140))
    module = VariationalDequantization(hidden=8, steps=2).build((1, 1, 2))
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
    bounds = []
    for step in range(100):
        y, log_q = module(x, Rng(0, step), torch.arange(64))
        bound = (log_normal(y, std=0.002, mean=2 * 140.5 / 256 - 1) - log_q).mean()
        optimizer.zero_grad()
        (-bound).backward()
        optimizer.step()
        bounds.append(bound.item())
    exact = 2 * math.log(256 / 2) + 2 * math.log(math.erf(1 / 256 / 0.002 / math.sqrt(2)))
    assert bounds[0] < exact - 0.3
    assert exact - 0.05 < sum(bounds[-20:]) / 20 < exact + 0.02


# --------------------------------------------------------------------------------------------------------------- refusals


def test_what_is_no_picture_of_grey_levels_is_refused():
    module = UniformDequantization().build((1, 2, 2))
    x = grid(torch.tensor([0, 7, 200, 255])).view(1, 1, 2, 2)
    module.check(x)
    module.check(x * (1 + 1e-6))
    for wrong, text in [
        ((x + 1) * 127.5, "from 0 to 255"),
        (x - 2, "from -3 to -1"),
        (x * float("nan"), "from nan to nan"),
        (x * 0.999, "0.13 of a level.*already dequantised"),
        ((x * 0.9).bfloat16(), "of a level"),
        (x[0], "B x 1 x 2 x 2, not 1 x 2 x 2"),
        (x.expand(1, 3, 2, 2), "not 1 x 3 x 2 x 2"),
    ]:
        with pytest.raises(UserError, match=text):
            module(wrong, Rng(0), torch.arange(len(wrong)))
    y, _ = module(x, Rng(0), torch.tensor([0]))
    with pytest.raises(UserError, match="already dequantised"):
        module(y, Rng(0), torch.tensor([0]))


def test_impossible_settings_name_the_nearest_right_one():
    for levels, near in [(0, 2), (31, 32), (512, 256), (200, 256)]:
        with pytest.raises(UserError, match=f"try {near}"):
            UniformDequantization(levels)
    with pytest.raises(UserError, match="power of two"):
        VariationalDequantization(levels=3)
    with pytest.raises(UserError, match="hidden = 0"):
        VariationalDequantization(hidden=0)
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="sigma"):
            GaussianDequantization(sigma)
    for config in (UniformDequantization(), VariationalDequantization(), GaussianDequantization()):
        with pytest.raises(UserError, match="of pictures"):
            config.build((7,))


def test_they_are_found_by_name():
    configs = (UniformDequantization, VariationalDequantization, GaussianDequantization)
    for name, config in zip(("uniform", "variational", "gaussian"), configs, strict=True):
        assert resolve("dequantization", name) is config
        assert isinstance(config().build(SHAPE), nn.Module)


def test_autocast_does_not_reach_the_noise():
    """A cell of 256 levels is as wide as a step of bfloat16."""
    x = grid(torch.randint(0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0)))
    for config in (UniformDequantization(), VariationalDequantization(hidden=8), GaussianDequantization()):
        module = shaken(config.build((1, 8, 8))).eval()
        y, log_q = module(x, Rng(0), torch.arange(4))
        with torch.autocast("cpu", torch.bfloat16):
            y_under, log_q_under = module(x, Rng(0), torch.arange(4))
        assert torch.equal(y, y_under) and torch.equal(log_q, log_q_under)
