"""The average of the weights, and AdamW's step that takes them in."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from genflow.errors import UserError
from genflow.native import library as native
from genflow.training import optimizers
from genflow.training.ema import EMA, power_gamma
from genflow.training.optimizers import AdamW8bitConfig, AdamWConfig


def test_ema_has_the_power_profile_of_its_width():
    # The weight of step n in the average after N steps is proportional to n^gamma; its relative std is the width asked.
    width, steps = 0.1, 2000
    model = torch.nn.Linear(1, steps, bias=False)
    model.weight.data.zero_()
    ema = EMA(model, width)
    for step in range(1, steps + 1):
        model.weight.data.zero_()
        model.weight.data[step - 1] = 1
        ema.update(step)
    weights = ema.average[0].flatten().double()
    n = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    assert math.isclose(float(weights.sum()), 1, rel_tol=1e-4)
    mean = float((weights * n).sum())
    assert math.isclose(math.sqrt(float((weights * (n - mean) ** 2).sum())), width, rel_tol=0.01)
    assert math.isclose(mean, (power_gamma(width) + 1) / (power_gamma(width) + 2), rel_tol=1e-3)


@pytest.fixture
def small():
    """A model whose tensors are smaller and larger than what a thread takes at a time, its optimiser and its average."""
    model = torch.nn.Sequential(torch.nn.Linear(129, 257), torch.nn.Linear(257, 3))
    optimizer = AdamWConfig(lr=0.03, betas=(0.9, 0.95), weight_decay=0.1).build(model)
    return model, optimizer, EMA(model, 0.1)


def stepped(small, together: bool, steps: int = 6):
    model, optimizer, ema = small
    noise = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=noise)
        if together:
            ema.step(optimizer, step)
        else:
            optimizer.step()
            ema.update(step)
    return [*model.parameters(), *ema.average, *(x for state in optimizer.state.values() for x in state.values())]


@pytest.mark.skipif(native.library() is None, reason="needs the kernels")
@pytest.mark.parametrize("eps", [1e-8, 0])
def test_adamw_and_average_in_one_pass_are_the_two_passes(small, monkeypatch, eps):
    passes = []
    for group in small[1].param_groups:
        group["eps"] = eps
    kernel = optimizers.call
    monkeypatch.setattr(optimizers, "call", lambda *args: passes.append(args) or kernel(*args))
    start = copy.deepcopy(small[0].state_dict())
    one = [x.clone() for x in stepped(small, together=True)]
    assert len(passes) == 10  # matrices and vectors, of each step after the first, which makes the optimiser's state
    small[0].load_state_dict(start)
    small[1].state.clear()
    small[2].load_state_dict(start)
    for mine, plain in zip(one, stepped(small, together=False), strict=True):
        torch.testing.assert_close(mine, plain, rtol=2e-6, atol=2e-7)


@pytest.mark.skipif(native.library() is None, reason="needs the kernels")
def test_one_pass_takes_the_settings_of_each_group(small):
    model, optimizer, ema = small
    own = [
        {"lr": 0.03, "betas": (0.9, 0.95), "eps": 0.5, "weight_decay": 0.1},
        {"lr": 0.3, "betas": (0.5, 0.8), "eps": 0.02, "weight_decay": 0.4},
    ]
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    plain = copy.deepcopy(model)
    groups = [[p for p in plain.parameters() if (p.ndim < 2) == vectors] for vectors in (False, True)]
    two = torch.optim.AdamW([{"params": ps, **settings} for ps, settings in zip(groups, own, strict=True)])
    for one, step in zip((optimizer, two), (lambda n: ema.step(optimizer, n), lambda _: two.step()), strict=True):
        noise = torch.Generator().manual_seed(1)
        for n in range(1, 5):
            for p in (p for group in one.param_groups for p in group["params"]):
                p.grad = torch.randn(p.shape, generator=noise)
            step(n)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("kind", [AdamWConfig, AdamW8bitConfig])
def test_the_optimiser_is_of_what_is_trained_and_as_the_config_says(kind):
    if kind is AdamW8bitConfig:
        pytest.importorskip("bitsandbytes")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    groups = kind(lr=0.02, betas=(0.7, 0.8), eps=0.03, weight_decay=0.1).build(model).param_groups
    assert [[id(p) for p in group["params"]] for group in groups] == [[id(model[1].weight)], [id(model[1].bias)]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0]
    for group in groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.02, (0.7, 0.8), 0.03)


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_settings_that_are_no_finite_numbers_of_0_or_more_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name} = {value} must be a finite number of 0 or more; the default is"):
        AdamWConfig(**{name: value})


@pytest.mark.parametrize("eps", [0, 1e-50])
def test_an_eps_that_is_none_in_float32_is_refused(eps):
    with pytest.raises(
        UserError, match=f"eps = {eps} leaves 0 / 0 of a weight without a gradient; the default is 1e-08"
    ):
        AdamWConfig(eps=eps)


@pytest.mark.parametrize(
    "why",
    [
        "amsgrad",
        "maximize",
        "without a gradient",
        "without one before",
        "another optimiser",
        "double",
        "a scaler",
        "no kernels",
        "strides",
        "a hook",
    ],
)
def test_two_passes_where_one_cannot_serve(small, monkeypatch, why):
    model, optimizer, ema = small
    monkeypatch.setattr(optimizers, "call", lambda *args: pytest.fail("the kernel ran"))
    if why == "double":
        model.double()
        ema = EMA(model, 0.1)
    if why == "strides":
        model[0].weight.data = model[0].weight.data.t().contiguous().t()
        ema = EMA(model, 0.1)
    if why == "another optimiser":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if why == "no kernels":
        monkeypatch.setattr(optimizers, "library", lambda: None)
    if why == "a hook":
        optimizer.register_step_post_hook(lambda *_: model[0].weight.data.clamp_(-0.1, 0.1))
    for group in optimizer.param_groups:
        group |= {why: True} if why in group else {}
    given = SimpleNamespace(optimizer=optimizer, step=optimizer.step, scaler="one") if why == "a scaler" else optimizer
    for step in (1, 2, 3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if why == "without a gradient" or (why == "without one before" and step == 2):
            model[0].bias.grad = None
        before = [(p.detach().clone(), a.clone()) for p, a in zip(model.parameters(), ema.average, strict=True)]
        ema.step(given, step)
        weight = 1 - (1 - 1 / step) ** (ema.gamma + 1)
        for p, average, (was, old) in zip(model.parameters(), ema.average, before, strict=True):
            assert (p.grad is None) == torch.equal(p, was)
            torch.testing.assert_close(average, torch.lerp(old, p.detach(), weight))


def test_ema_swaps_in_and_out_even_on_errors():
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, 0.1)
    own = model.weight.detach().clone()
    ema.average[0].zero_()
    with pytest.raises(RuntimeError), ema.swapped():
        assert not model.weight.any()
        raise RuntimeError
    assert torch.equal(model.weight, own)


def test_ema_is_of_what_is_trained_in_float32_or_wider_and_takes_in_what_was_saved():
    model = torch.nn.ModuleList(
        [torch.nn.Linear(2, 2).bfloat16(), torch.nn.Linear(2, 2).double(), torch.nn.Linear(2, 2)]
    )
    model[2].weight.requires_grad_(False)
    ema = EMA(model, 0.1)
    found = {name: average.dtype for name, average in ema.state_dict().items()}
    short, wide = (
        dict.fromkeys(("0.weight", "0.bias"), torch.float32),
        dict.fromkeys(("1.weight", "1.bias"), torch.float64),
    )
    assert found == {**short, **wide, "2.bias": torch.float32}
    saved = {name: torch.full_like(average, 7) for name, average in ema.state_dict().items()}
    ema.load_state_dict(saved)
    for average in saved.values():
        average.zero_()  # it keeps nothing of what it has read
    assert all((average == 7).all() for average in ema.state_dict().values())
    with ema.swapped():
        assert all((p == 7).all() for p in model.parameters() if p.requires_grad)
    ema.update(2)
    weight = 1 - 0.5 ** (ema.gamma + 1)
    for name, average in ema.state_dict().items():
        expected = torch.lerp(torch.full_like(average, 7), model.get_parameter(name).to(average.dtype), weight)
        torch.testing.assert_close(average, expected)
