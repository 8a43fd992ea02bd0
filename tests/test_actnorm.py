"""Elementwise bijections: activation norm and its initialisation, fixed affine maps, the logit of pictures."""

from __future__ import annotations

import math

import pytest
import torch

from genflow.errors import UserError
from genflow.flows.bijections.base import Chain
from genflow.flows.bijections.elementwise import ActNorm, Affine, Logit
from genflow.flows.bijections.glow_step import GlowStep
from genflow.flows.bijections.linear import Permutation
from genflow.flows.bijections.shapes import Split, split_shape


@pytest.mark.parametrize("shape", [(3, 5, 4), (6,)])
def test_initialisation_standardises_every_channel(shape):
    x = torch.randn(64, *shape, dtype=torch.float64) * 7 + 3
    norm = ActNorm(shape).double()
    norm.initialise(x)
    z, ladj = norm(x)
    rows = z.movedim(1, -1).flatten(0, -2)
    assert rows.mean(0).abs().max() < 1e-12 and (rows.std(0, correction=0) - 1).abs().max() < 1e-12
    stds = x.movedim(1, -1).flatten(0, -2).std(0, correction=0)
    torch.testing.assert_close(ladj, (-stds.log().sum() * math.prod(shape[1:])).expand(64))


def test_initialisation_happens_once_and_a_copy_remembers_it():
    norm, x = ActNorm((3,)), torch.randn(8, 3)
    norm.initialise(x)
    first = norm.shift.clone()
    norm.initialise(x + 1)
    assert torch.equal(norm.shift, first)
    copy = ActNorm((3,))
    copy.load_state_dict(norm.state_dict())
    copy.initialise(x + 1)
    assert torch.equal(copy.shift, first)


@pytest.mark.parametrize("turn", ["around each", "around the chain"])
@pytest.mark.parametrize("shape", [(6,), (4, 4, 4)])
def test_turned_round_it_standardises_what_it_then_sees(shape, turn):
    parts = [Permutation(shape), ActNorm(shape), GlowStep(shape, hidden=4), Split(shape, ActNorm(split_shape(shape)))]
    parts = [part.double() for part in parts]
    turned = Chain(part.inv for part in reversed(parts)) if turn == "around each" else Chain(parts).inv
    x = torch.randn(64, *shape, dtype=torch.float64) * 7 + 3
    turned.initialise(x)
    rows = turned(x)[0].movedim(1, -1).flatten(0, -2)
    assert rows.mean(0).abs().max() < 1e-12 and (rows.std(0, correction=0) - 1).abs().max() < 1e-12
    assert parts[1].initialised and parts[2].actnorm.initialised and parts[3].inner.initialised


def test_using_it_does_not_initialise_it():
    norm, x = ActNorm((3,)), torch.randn(8, 3) + 5
    norm(x), norm.inverse(x)
    assert not norm.initialised and torch.equal(norm(x)[0], x)


@pytest.mark.parametrize("batch", [8, 1])
def test_constant_channels_keep_their_scale(batch):
    x = torch.randn(batch, 2, 4, 4)
    x[:, 1] = -1.0
    norm = ActNorm((2, 4, 4))
    norm.initialise(x)
    z, ladj = norm(x)
    assert z.isfinite().all() and ladj.isfinite().all()
    assert z[:, 1].abs().max() == 0 and norm.log_scale[1] == 0
    lone = ActNorm((2,))
    lone.initialise(torch.randn(1, 2))
    assert lone.log_scale.abs().max() == 0


def test_affine_is_what_it_says():
    x = torch.randn(5, 2, 3, 3)
    z, ladj = Affine((2, 3, 3), scale=[2.0, -0.5], shift=1.0)(x)
    torch.testing.assert_close(z, x * torch.tensor([2.0, -0.5]).view(2, 1, 1) + 1)
    assert ladj.abs().max() < 1e-6  # 9 log 2 + 9 log 1/2
    torch.testing.assert_close(Affine((4,), scale=3.0)(torch.zeros(2, 4))[1], torch.full((2,), 4 * math.log(3)))


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": [1.0, 2.0, 3.0]}, {"shift": math.inf}])
def test_affine_refuses(wrong):
    with pytest.raises(UserError, match="affine"):
        Affine((2,), **wrong)


def test_logit_of_the_ends_and_beyond():
    logit, x = Logit((1,), alpha=0.05), torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    z, ladj = logit(x)
    torch.testing.assert_close(z, torch.logit(torch.tensor([[0.05], [0.5], [0.95]], dtype=torch.float64)))
    torch.testing.assert_close(ladj[1], torch.tensor(0.45 * 4, dtype=torch.float64).log())
    far = torch.tensor([[-50.0], [2.0]], dtype=torch.float64)
    z, ladj = logit(far)
    back, other = logit.inverse(z)
    torch.testing.assert_close(back, far)
    torch.testing.assert_close(other, -ladj)
    slopes = torch.autograd.functional.jacobian(lambda a: logit(a)[0].sum(0), far).flatten()
    torch.testing.assert_close(slopes.log(), ladj)


@pytest.mark.parametrize("alpha", [1e-6, 1e-8, 1e-10])
def test_logit_is_exact_in_float32_where_one_less_alpha_rounds_to_one(alpha):
    logit, x = Logit((1,), alpha), torch.tensor([[-1.0], [-1 + 2**-9], [0.3], [1 - 2**-9], [1.0]])
    (z, ladj), exact = logit(x), logit(x.double())
    torch.testing.assert_close(exact[0][[0, -1], 0].tanh(), torch.tensor([-1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close((z.double(), ladj.double()), exact, rtol=1e-6, atol=1e-6)
    back, other = logit.inverse(exact[0].float())
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(other.double(), -exact[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0, math.nan])
def test_logit_refuses(alpha):
    with pytest.raises(UserError, match="0.05"):
        Logit((2,), alpha)


@pytest.mark.parametrize("make", [ActNorm, Affine, Logit])
@pytest.mark.parametrize("shape", [(), (3, 4), (0,)])
def test_shapes_that_are_no_sample_are_refused(make, shape):
    with pytest.raises(UserError, match="channels, height, width"):
        make(shape)


def test_reduced_precision_becomes_float32():
    x = torch.randn(2, 3).bfloat16()
    for bijection in (ActNorm((3,)), Affine((3,)), Logit((3,))):
        assert all(t.dtype == torch.float32 for t in (*bijection(x), *bijection.inverse(x)))
