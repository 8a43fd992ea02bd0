"""The models nsf and realnvp: vectors and pictures, densities, training, bad input."""

import math
from functools import partial

import pytest
import torch

from genflow.errors import UserError
from genflow.flows.models.nsf import NSFConfig
from genflow.flows.models.realnvp import RealNVPConfig
from genflow.registry import resolve
from tests.noise import shaken

AR = partial(NSFConfig, kind="autoregressive")
MODELS = pytest.mark.parametrize("config", [NSFConfig, RealNVPConfig])


def fitted(config, shape, condition_dim=0, scale=0.05, **fields):
    """A model in float64, fitted to a batch, its weights doing something."""
    model = config(shape=shape, condition_dim=condition_dim, hidden=16, **fields).build().double()
    shaken(model, scale)
    model.initialise(*data(shape, condition_dim, 32))
    return model


def data(shape, condition_dim=0, rows=3):
    x = torch.rand(rows, *shape, dtype=torch.float64) * 2 - 1
    return x, torch.randn(rows, condition_dim, dtype=torch.float64) if condition_dim else None


def log_prob(model, x, condition=None):
    z, ladj = model(x, condition)
    return ladj - 0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)


@MODELS
@pytest.mark.parametrize("shape", [(2,), (5,), (1, 8, 4), (3, 4, 4)])
@pytest.mark.parametrize("condition_dim", [0, 3])
def test_it_goes_back_with_the_volume_of_its_jacobian(config, shape, condition_dim):
    model = fitted(config, shape, condition_dim)
    assert model.condition_dim == condition_dim
    x, condition = data(shape, condition_dim)
    z, ladj = model(x, condition)
    assert z.shape == x.shape and ladj.shape == (3,)
    back, back_ladj = model.inverse(z, condition)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(back_ladj, -ladj, rtol=0, atol=1e-8)
    first = None if condition is None else condition[:1]
    jacobian = torch.autograd.functional.jacobian(lambda a: model(a, first)[0], x[:1])
    expected = torch.linalg.slogdet(jacobian.view(x[0].numel(), x[0].numel())).logabsdet
    torch.testing.assert_close(ladj[0], expected, rtol=0, atol=1e-8)


@MODELS
@pytest.mark.parametrize("shape", [(6,), (1, 8, 8)])
def test_every_number_hangs_on_every_other(config, shape):
    model = fitted(config, shape, scale=0.2)
    x, _ = data(shape, rows=1)
    jacobian = torch.autograd.functional.jacobian(lambda a: model(a)[0], x).view(x.numel(), x.numel())
    assert (jacobian != 0).double().mean() > 0.9


@MODELS
def test_a_new_model_sends_a_batch_to_mean_zero_and_variance_one(config):
    model = config(shape=(3,), condition_dim=0).build()
    x = torch.randn(500, 3) * 7 + 100
    model.initialise(x)
    z, _ = model(x)
    assert z.mean().abs() < 0.1 and (z.std() - 1).abs() < 0.1


@MODELS
def test_its_density_integrates_to_one(config):
    model = fitted(config, (2,), scale=0.1)
    line = torch.linspace(-8, 8, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        total = log_prob(model, grid).exp().sum() * (line[1] - line[0]) ** 2
    assert abs(total - 1) < 2e-3


@MODELS
def test_it_learns_a_known_density_to_its_entropy(config):
    def banana(rows):
        x = torch.randn(rows, 2)
        return torch.stack([x[:, 0], 0.3 * x[:, 1] + x[:, 0].square() / 2], 1)

    entropy = math.log(2 * math.pi * math.e) + math.log(0.3)
    model = config(steps=3 if config is NSFConfig else 6, shape=(2,), condition_dim=0, hidden=32).build()
    model.initialise(banana(512))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with torch.no_grad():
        before = -log_prob(model, banana(4000)).mean()
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 120)
        loss = -log_prob(model, banana(256)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        nll = -log_prob(model, banana(4000)).mean()
        samples, _ = model.inverse(torch.randn(4000, 2))
    assert before > entropy + 0.5 and abs(nll - entropy) < 0.1, (before, nll, entropy)
    rest = samples[:, 1] - samples[:, 0].square() / 2
    assert abs(rest.median()) < 0.1 and abs(rest.abs().median() - 0.3 * 0.6745) < 0.05


@MODELS
@pytest.mark.parametrize("shape", [(4,), (1, 4, 4)])
def test_training_stays_finite_around_bf16_networks_and_outliers(config, shape):
    model = config(shape=shape, condition_dim=2, hidden=16).build()
    x, condition = data(shape, 2, 32)
    x, condition = x.float(), condition.float()
    model.initialise(x, condition)
    x[0] *= 1e4
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = -log_prob(model, x, condition).mean()
        assert loss.dtype == torch.float32 and loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()


@pytest.mark.parametrize("condition_dim", [0, 3])
def test_the_autoregressive_kind_goes_back_with_the_volume_of_its_jacobian(condition_dim):
    model = fitted(AR, (3,), condition_dim)
    x, condition = data((3,), condition_dim)
    z, ladj = model(x, condition)
    torch.testing.assert_close(model.inverse(z, condition)[0], x, rtol=0, atol=1e-9)
    first = None if condition is None else condition[:1]
    jacobian = torch.autograd.functional.jacobian(lambda a: model(a, first)[0], x[:1]).view(3, 3)
    torch.testing.assert_close(ladj[0], torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-8)
    assert AR(shape=(1,), condition_dim=0).build()(torch.randn(2, 1))[0].shape == (2, 1)


def test_they_are_found_by_name():
    assert resolve("network", "nsf") is NSFConfig and resolve("network", "realnvp") is RealNVPConfig


@MODELS
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": None, "condition_dim": 0}, "needs the shape of a sample and condition_dim"),
        ({"shape": (2,), "condition_dim": None}, "needs the shape of a sample and condition_dim"),
        ({"shape": (1,), "condition_dim": 0}, "1 feature"),
        ({"shape": (1, 6, 7), "condition_dim": 0}, "6 x 7 is not"),
        ({"shape": (4, 4), "condition_dim": 0}, r"\(4, 4\)"),
        ({"steps": 0}, "steps = 0"),
        ({"hidden": -1}, "hidden = -1"),
    ],
)
def test_what_cannot_be_is_refused(config, fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields).build()


def test_a_kind_or_a_spline_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="Did you mean 'coupling'"):
        NSFConfig(kind="couplings")
    with pytest.raises(UserError, match="for vectors, not for .* kind: coupling"):
        AR(shape=(1, 4, 4), condition_dim=0).build()
    with pytest.raises(UserError, match="bins = 1"):
        NSFConfig(bins=1, shape=(2,), condition_dim=0).build()
    with pytest.raises(UserError, match="bound = -1"):
        NSFConfig(bound=-1.0, shape=(2,), condition_dim=0).build()
