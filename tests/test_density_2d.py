"""Flows of two numbers: densities that integrate to one, and known densities learned to their entropy."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from genflow.errors import UserError
from genflow.flows.bijections.base import Bijection, Chain
from genflow.flows.bijections.elementwise import ActNorm
from genflow.flows.bijections.residual import ResidualBlock
from genflow.flows.normalizing import standard_normal
from genflow.registry import names, resolve
from tests.noise import shaken

F64 = torch.float64
OPTIONS = {  # every model config that serves vectors, in every kind that it has
    "realnvp": ("realnvp", {"steps": 4, "hidden": 32}),
    "nsf": ("nsf", {"steps": 2, "hidden": 24, "blocks": 1}),
    "nsf-autoregressive": ("nsf", {"kind": "autoregressive", "steps": 2, "hidden": 24, "blocks": 1}),
    "maf": ("maf", {"layers": 3, "hidden": (32, 32)}),
    "maf-spline": ("maf", {"layers": 2, "hidden": (32, 32), "univariate": "spline"}),
    "tarflow": ("tarflow", {"blocks": 2, "layers": 1, "width": 16}),
    "ffjord": ("ffjord", {"hidden": (16, 16), "solver": "rk4", "steps": 4, "divergence": "exact"}),
}
MODELS = [*OPTIONS, "residual"]
LEARNED = [m for m in MODELS if m not in ("tarflow", "ffjord")]  # those two take longer, and have tests of their own


def build(name, condition_dim=0):
    torch.manual_seed(0)
    if name == "residual":
        parts = [(ActNorm((2,)), ResidualBlock((2,), condition_dim=condition_dim, hidden=(24, 24))) for _ in range(3)]
        return Chain(part for pair in parts for part in pair)
    config, options = OPTIONS[name]
    return resolve("network", config)(**options, shape=(2,), condition_dim=condition_dim).build()


def log_prob(flow, x, condition=None):
    z, ladj = flow(x, condition)
    return standard_normal(z) + ladj


def mass(flow, condition=None, side=220, reach=1.6):
    """The integral over a box that holds every one of 2,000 samples, with room to spare, by midpoints."""
    rows = condition.expand(2000, -1) if condition is not None else None
    samples = flow.decode(torch.randn(2000, 2, dtype=F64), rows)
    low, high = samples.amin(0), samples.amax(0)
    middle, half = (low + high) / 2, (high - low) / 2 * reach
    ticks = (torch.arange(side, dtype=F64) + 0.5) / side * 2 - 1
    grid = middle + half * torch.cartesian_prod(ticks, ticks)
    rows = condition.expand(len(grid), -1) if condition is not None else None
    return (log_prob(flow, grid, rows).exp().mean() * 4 * half.prod()).item()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("condition_dim", [0, 2])
def test_the_density_integrates_to_one(name, condition_dim):
    flow = build(name, condition_dim).to(F64).eval()
    shaken(flow)
    with torch.no_grad():
        condition = torch.randn(1, condition_dim, dtype=F64) if condition_dim else None
        total = mass(flow, condition)
    print(f"{name}: {total:.5f}")
    assert abs(total - 1) < 1e-2


def test_a_density_that_is_none_does_not_integrate_to_one():
    class Wrong(Bijection):
        def forward(self, x, condition=None):
            z, ladj = flow(x)
            return z, 0.9 * ladj

        def inverse(self, z, condition=None):
            return flow.inverse(z)

    flow = build("maf").to(F64)
    shaken(flow, 0.15)
    with torch.no_grad():
        assert abs(mass(Wrong()) - 1) > 2e-2


def test_every_model_of_vectors_is_tested():
    tested = {config for config, _ in OPTIONS.values()}
    for name in names("network"):
        try:
            serves = isinstance(resolve("network", name)(shape=(2,), condition_dim=0).build(), Bijection)
        except (UserError, TypeError):
            continue
        assert not serves or name in tested, f"add {name} to OPTIONS"


def target():
    """Two correlated Gaussians that overlap a little."""
    means = torch.tensor([[-1.5, 0.5], [1.5, -0.5]])
    factors = torch.tensor([[[0.8, 0.0], [0.5, 0.4]], [[0.5, 0.0], [-0.6, 0.6]]])
    return MixtureSameFamily(Categorical(torch.tensor([0.4, 0.6])), MultivariateNormal(means, scale_tril=factors))


def excess(name, flow, truth, entropy=None, steps=200):
    """After training on fresh points: the cross-entropy less the entropy, the divergence from the truth, in nats."""
    torch.manual_seed(1)
    flow.initialise(truth.sample((2048,)))
    optimizer = torch.optim.Adam(flow.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-log_prob(flow, truth.sample((256,))).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x = truth.sample((20000,))
        found = -truth.log_prob(x).mean().item()
        more = (truth.log_prob(x) - log_prob(flow.eval(), x)).mean().item()
    print(f"{name}: entropy {entropy or found:.4f} nats, cross-entropy {found + more:.4f}, excess {more:.4f}")
    assert entropy is None or abs(found - entropy) < 0.03
    return more


@pytest.mark.parametrize("name", LEARNED)
def test_a_known_density_is_learned_to_its_entropy(name):
    assert -0.01 < excess(name, build(name), target()) < 0.08


def test_a_correlated_gaussian_is_learned_to_its_closed_form():
    factor = torch.tensor([[1.5, 0.0], [-0.9, 0.3]])
    truth = MultivariateNormal(torch.tensor([2.0, -1.0]), scale_tril=factor)
    flow = resolve("network", "maf")(layers=2, hidden=(16,), shape=(2,), condition_dim=0).build()
    entropy = 1 + math.log(2 * math.pi) + factor.diagonal().log().sum().item()
    assert -0.005 < excess("maf", flow, truth, entropy) < 0.01
