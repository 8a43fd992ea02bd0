"""What is true of every registered bijection; a new one is tested by being registered."""

from __future__ import annotations

import inspect
from functools import cache

import pytest
import torch

from genflow.errors import UserError
from genflow.flows.bijections.base import Bijection, Chain, Inverse
from genflow.registry import names, resolve
from tests.noise import shaken

SHAPES = [(6,), (2,), (4, 4, 4), (1, 8, 8), (3, 4, 4)]
P = 3  # width of the condition
COMPOSED = {"chain", "reversible"}  # of other bijections: tested below, and in their own files


def takes_condition(name: str) -> bool:
    return "condition_dim" in inspect.signature(resolve("bijection", name)).parameters


@cache
def cases() -> list[tuple[str, tuple[int, ...], int]]:
    found = []
    for name in names("bijection"):
        if name in COMPOSED:
            continue
        for shape in SHAPES:
            for condition_dim in (0, P) if takes_condition(name) else (0,):
                try:
                    make(name, shape, condition_dim, torch.float32)
                except UserError:
                    continue
                found.append((name, shape, condition_dim))
    return found


def make(name: str, shape: tuple[int, ...], condition_dim: int, dtype: torch.dtype) -> Bijection:
    """One with weights that do something."""
    torch.manual_seed(0)
    more = {"condition_dim": condition_dim} if condition_dim else {}
    bijection = resolve("bijection", name)(shape, **more).to(dtype)
    x, condition = data(shape, condition_dim, dtype, n=16)
    shaken(bijection)
    with torch.no_grad():
        bijection.initialise(x, condition)
    return bijection.eval()


def data(shape, condition_dim, dtype, n=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=g, dtype=torch.float64).tanh() * 0.9
    condition = torch.randn(n, condition_dim, generator=g, dtype=torch.float64).to(dtype) if condition_dim else None
    return x.to(dtype), condition


@pytest.fixture(params=cases(), ids=lambda c: f"{c[0]}-{'x'.join(map(str, c[1]))}{'-conditional' if c[2] else ''}")
def case(request):
    return request.param


def test_every_bijection_serves_some_shape_and_is_its_own_class():
    served = {name for name, _, _ in cases()}
    assert served == set(names("bijection")) - COMPOSED
    assert all(issubclass(resolve("bijection", name), Bijection) for name in served)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trips_both_ways_with_opposite_volumes(case, dtype):
    name, shape, condition_dim = case
    bijection = make(name, shape, condition_dim, dtype)
    x, condition = data(shape, condition_dim, dtype)
    close = bijection.inverse_error if dtype == torch.float64 else max(bijection.inverse_error, 2e-4)
    with torch.no_grad():
        z, ladj = bijection(x, condition)
        assert z.dtype == dtype and z[0].numel() == x[0].numel()
        assert ladj.shape == (len(x),) and ladj.dtype == dtype
        back, back_ladj = bijection.inverse(z, condition)
        torch.testing.assert_close(back, x, atol=close, rtol=close)
        torch.testing.assert_close(back_ladj, -ladj, atol=10 * close, rtol=10 * close)
        torch.testing.assert_close(bijection.decode(z, condition), back, atol=close, rtol=close)

        noise = torch.randn_like(z) * 0.5
        x, ladj = bijection.inverse(noise, condition)
        again, again_ladj = bijection(x, condition)
        torch.testing.assert_close(again, noise, atol=10 * close, rtol=10 * close)
        torch.testing.assert_close(again_ladj, -ladj, atol=10 * close, rtol=10 * close)


def test_ladj_is_the_log_determinant_of_the_jacobian(case):
    name, shape, condition_dim = case
    bijection = make(name, shape, condition_dim, torch.float64)
    x, condition = data(shape, condition_dim, torch.float64, n=1)
    jacobian = torch.autograd.functional.jacobian(lambda a: bijection(a, condition)[0].flatten(), x)
    expected = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet
    close = max(bijection.inverse_error, 1e-8)
    torch.testing.assert_close(bijection(x, condition)[1][0], expected, atol=10 * close, rtol=close)


def test_a_sample_is_the_same_alone_and_in_a_batch(case):
    name, shape, condition_dim = case
    bijection = make(name, shape, condition_dim, torch.float64)
    x, condition = data(shape, condition_dim, torch.float64)
    with torch.no_grad():
        z, ladj = bijection(x, condition)
        one, one_ladj = bijection(x[1:2], None if condition is None else condition[1:2])
    torch.testing.assert_close(one, z[1:2])
    torch.testing.assert_close(one_ladj, ladj[1:2])


def test_the_condition_matters_and_is_asked_for(case):
    name, shape, condition_dim = case
    bijection = make(name, shape, condition_dim, torch.float64)
    assert bijection.condition_dim == condition_dim
    x, condition = data(shape, condition_dim, torch.float64)
    if condition is not None:
        with torch.no_grad():
            assert not torch.equal(bijection(x, condition)[0], bijection(x, condition.flip(0))[0])
        with pytest.raises(UserError, match="condition"):
            bijection(x)
        with pytest.raises(UserError, match="condition"):
            bijection.inverse(x)


def test_gradients_reach_every_parameter_and_are_finite_at_extremes(case):
    name, shape, condition_dim = case
    bijection = make(name, shape, condition_dim, torch.float32).train()
    x, condition = data(shape, condition_dim, torch.float32)
    for scale in (1.0, 1.0 / 0.9):  # the second reaches the ends of [-1, 1]
        edges = (x * scale).clamp(-0.99999, 0.99999)
        edges[0], edges[1] = 0.0, 0.99999
        edges.requires_grad_()
        z, ladj = bijection(edges, condition)
        loss = z.square().sum() + ladj.sum()
        params = [p for p in bijection.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, [edges, *params], allow_unused=True)
        assert all(g is not None and g.isfinite().all() for g in grads)


def test_gradients_are_those_of_finite_differences(case):
    name, shape, condition_dim = case
    if len(shape) == 3 and shape != (4, 4, 4):
        pytest.skip("one shape of pictures is enough")
    bijection = make(name, shape, condition_dim, torch.float64).eval()
    x, condition = data(shape, condition_dim, torch.float64, n=1)
    torch.autograd.gradcheck(
        lambda a: bijection(a, condition), x.requires_grad_(), fast_mode=True, atol=1e-4, rtol=1e-3
    )


def test_the_inverse_turns_a_bijection_round(case):
    name, shape, condition_dim = case
    bijection = make(name, shape, condition_dim, torch.float64)
    x, condition = data(shape, condition_dim, torch.float64)
    turned = bijection.inv
    assert isinstance(turned, Inverse | Bijection) and turned.inv is bijection
    with torch.no_grad():
        z, ladj = bijection(x, condition)
        back, _ = turned(z, condition)
        torch.testing.assert_close(back, x, atol=bijection.inverse_error, rtol=bijection.inverse_error)
        again, again_ladj = turned.inverse(x, condition)
        torch.testing.assert_close(again, z)
        torch.testing.assert_close(again_ladj, ladj)


def test_a_chain_adds_volumes_and_inverts_in_reverse():
    shape = (6,)
    every = [make(name, s, 0, torch.float64) for name, s, c in cases() if s == shape and c == 0 and name != "logit"]
    chain = Chain(every).eval()
    x, _ = data(shape, 0, torch.float64)
    with torch.no_grad():
        z, ladj = chain(x)
        back, back_ladj = chain.inverse(z)
    torch.testing.assert_close(back, x, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(back_ladj, -ladj, atol=1e-3, rtol=1e-3)
    jacobian = torch.autograd.functional.jacobian(lambda a: chain(a[None])[0][0], x[0])
    torch.testing.assert_close(ladj[0], torch.linalg.slogdet(jacobian).logabsdet, atol=1e-3, rtol=1e-3)
