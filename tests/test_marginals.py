"""The marginals of pictures by their histograms."""

from __future__ import annotations

import math

import pytest
import torch

from genflow.errors import UserError
from genflow.flows.bijections.marginals import TAIL, Marginals


def grey(rows=64, seed=0):
    """Pictures of two channels: mostly black, and uniform over four levels of 8."""
    g = torch.Generator().manual_seed(seed)
    black = torch.where(torch.rand(rows, 6, 6, generator=g) < 0.8, 0.0, torch.randint(8, (rows, 6, 6), generator=g))
    four = torch.randint(2, 6, (rows, 6, 6), generator=g)
    levels = torch.stack([black, four], 1)
    return ((levels + torch.rand(levels.shape, generator=g)) / 4 - 1).double()


def fitted(cells=8):
    marginals = Marginals((2, 6, 6), cells=cells).double()
    marginals.initialise(grey())
    return marginals


def test_the_inverse_has_its_slope_in_the_middle_too():
    """dx/dz = exp(ladj / numbers) at z = 0, where all numbers of a channel are alike."""
    marginals, z = fitted(), torch.zeros(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    x, ladj = marginals.inverse(z)
    (slope,) = torch.autograd.grad(x.sum(), z)
    torch.testing.assert_close(slope.log().sum(), ladj[0])


def test_the_marginal_of_each_channel_becomes_a_standard_normal():
    z, _ = fitted()(grey(rows=200, seed=1))
    quantiles = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98], dtype=torch.float64)
    for channel in z.unbind(1):
        torch.testing.assert_close(channel.quantile(quantiles), torch.special.ndtri(quantiles), atol=0.15, rtol=0)


def test_its_density_is_the_histogram():
    """Black is in 0.8 + 0.2 / 8 of the cells; a cell of [-1, 1] is a quarter wide."""
    marginals, x = fitted(), grey(rows=1)
    z, ladj = marginals(x)
    log_density = -0.5 * (z.square() + math.log(2 * math.pi)).sum((1, 2, 3)) + ladj
    black, rest = (x[:, 0] < -0.75).sum(), (x[:, 0] >= -0.75).sum()
    expected = black * math.log(0.825 * 4) + rest * math.log(0.025 * 4) + 36 * math.log(0.25 * 4)
    torch.testing.assert_close(log_density[0], expected.double(), rtol=0.05, atol=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trips_across_cells_and_far_beyond_them(dtype):
    marginals = fitted().to(dtype)
    x = torch.linspace(-1.9, 1.9, 720).view(10, 2, 6, 6).to(dtype)
    z, ladj = marginals(x)
    back, back_ladj = marginals.inverse(z)
    assert z.isfinite().all() and ladj.isfinite().all() and z.dtype == dtype
    close = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(back, x, atol=close, rtol=0)
    torch.testing.assert_close(back_ladj, -ladj, atol=1e3 * close, rtol=0)
    edges = torch.linspace(-1, 1, 9, dtype=dtype).view(9, 1, 1, 1).expand(9, 2, 6, 6)  # in one cell or the next
    torch.testing.assert_close(marginals.decode(marginals(edges)[0]), edges, atol=close, rtol=0)
    rising = marginals(torch.linspace(-2, 2, 500, dtype=dtype).view(-1, 1, 1, 1).expand(-1, 2, -1, -1))[0]
    assert (rising.diff(dim=0) > 0).all()


def test_the_tails_are_exponential():
    marginals = Marginals((1, 1, 1), cells=4).double()  # all cells and both tails alike: 1 / 6
    z, ladj = marginals(torch.tensor([-1 - TAIL, 1 + TAIL], dtype=torch.float64).view(2, 1, 1, 1))
    expected = torch.special.ndtri(torch.tensor(math.exp(-1) / 6, dtype=torch.float64))
    torch.testing.assert_close(z.flatten(), torch.stack([expected, -expected]))
    density = math.log(math.exp(-1) / 6 / TAIL)
    torch.testing.assert_close(
        ladj - 0.5 * (z.flatten().square() + math.log(2 * math.pi)), torch.full((2,), density).double()
    )


def test_it_is_kept_with_the_weights():
    marginals, other = fitted(), Marginals((2, 6, 6), cells=8).double()
    other.load_state_dict(marginals.state_dict())
    x = grey(seed=2)
    assert torch.equal(other(x)[0], marginals(x)[0]) and not list(marginals.parameters())


@pytest.mark.parametrize(("shape", "options", "says"), [((6,), {}, "pictures"), ((1, 2, 2), {"cells": 0}, "cells = 0")])
def test_bad_input_is_refused(shape, options, says):
    with pytest.raises(UserError, match=says):
        Marginals(shape, **options)
