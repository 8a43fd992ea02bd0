"""Nothing is kept beyond the weights that it was computed from, whichever optimiser changed them (versions.py)."""

from __future__ import annotations

import pytest
import torch

from genflow.flows.bijections.linear import InvertibleConv1x1
from genflow.networks.lipschitz import ContractedLinear
from genflow.training.ema import EMA
from genflow.training.optimizers import AdamWConfig
from genflow.versions import version

STEPS = {
    "plain": lambda module, lr: torch.optim.AdamW(module.parameters(), lr=lr, fused=False),
    "fused": lambda module, lr: torch.optim.AdamW(module.parameters(), lr=lr, fused=True),
    "fused sgd": lambda module, lr: torch.optim.SGD(module.parameters(), lr=lr, fused=True),
    "with the average": lambda module, lr: AdamWConfig(lr=lr).build(module),
}


def stepper(name: str, module: torch.nn.Module, lr: float):
    optimizer, average, count = STEPS[name](module, lr), EMA(module, 0.1), iter(range(1, 1000))

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        if name == "with the average":
            average.step(optimizer, next(count))
        else:
            optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("name", STEPS)
def test_every_step_counts(name):
    module = torch.nn.Linear(3, 3)
    step = stepper(name, module, 0.1)
    for _ in range(3):
        before = [version(p) for p in module.parameters()]
        step(module(torch.ones(1, 3)).sum())
        assert all(version(p) > old for p, old in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_a_contracted_layer_keeps_its_bound_through_training(name):
    layer = ContractedLinear(8, 8, 0.9).train()
    step = stepper(name, layer, 0.05)
    for _ in range(60):
        step((layer(torch.randn(32, 8)) - 5).square().mean())
    assert torch.linalg.matrix_norm(layer.normalised(), 2) < 0.901


@pytest.mark.parametrize("name", STEPS)
def test_an_inverse_is_that_of_the_weights_after_more_training(name):
    layer, x = InvertibleConv1x1((4,)), torch.randn(3, 4)
    step = stepper(name, layer, 0.1)
    for _ in range(2):
        layer.eval()
        with torch.no_grad():
            torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x, rtol=1e-4, atol=1e-4)
        layer.train()
        step(layer(x)[0].square().sum())
    layer.eval()
    with torch.no_grad():
        layer.inverse(x)
        layer.train()
        layer.lower.data.mul_(2)  # uncounted, as where FSDP gathers
        layer.eval()
        torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x, rtol=1e-4, atol=1e-4)
