"""The FFJORD model: what it builds, that it learns, and what it refuses."""

import math

import pytest
import torch

from genflow.errors import UserError
from genflow.flows.bijections.base import Bijection
from genflow.flows.divergence import probing
from genflow.flows.models.ffjord import FFJORDConfig
from genflow.flows.normalizing import NormalizingFlowConfig, standard_normal
from genflow.functional import Rng
from genflow.networks.ode_nets import ConcatSquash, _to_one_channel
from genflow.text.none import NoTextConfig
from tests.noise import shaken


@pytest.mark.parametrize("shape, condition_dim", [((3,), 0), ((3,), 2), ((2, 4, 4), 0), ((1, 4, 4), 2)])
def test_it_is_a_bijection_of_its_shape(shape, condition_dim):
    torch.manual_seed(0)
    model = FFJORDConfig(shape, condition_dim, blocks=2, hidden=(6, 6), divergence="exact").build()
    assert isinstance(model, Bijection) and model.condition_dim == condition_dim
    shaken(model, 0.2)
    with torch.no_grad():
        x, condition = torch.randn(3, *shape), torch.randn(3, condition_dim) if condition_dim else None
        z, ladj = model(x, condition)
        back, ladj_back = model.inverse(z, condition)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ladj_back, -ladj, rtol=1e-3, atol=1e-3)
    assert ladj.abs().min() > 1e-4


def test_its_blocks_draw_their_own_noise():
    torch.manual_seed(0)
    model = FFJORDConfig((4,), 0, blocks=2).build()
    first, second = model
    second.load_state_dict(first.state_dict())
    shaken(first, 0.3)
    with torch.no_grad():
        second.load_state_dict(first.state_dict())
        x = torch.randn(3, 4)
        assert not torch.equal(first(x)[1], second(x)[1])


def test_rounding_in_a_block_does_not_choose_the_noise_of_the_next():
    torch.manual_seed(0)
    model = FFJORDConfig((4,), 0, blocks=3, rtol=1e-3, atol=1e-3).build()
    flow = NormalizingFlowConfig().build(model, NoTextConfig().build(), shape=(4,))
    shaken(model, 0.3)
    with torch.no_grad():
        x = torch.randn(32, 4)
        together, alone = flow.log_prob(x), torch.cat([flow.log_prob(row) for row in x.split(1)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-3)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_it_learns_a_gaussian(divergence):
    """Its nats fall to the entropy of the data."""
    torch.manual_seed(0)
    std = torch.tensor([0.3, 0.8])
    entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum().item()
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    model = FFJORDConfig((2,), 0, hidden=(16,), divergence=divergence, kinetic=0.001, **tolerance).build()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for step in range(40):
        x = 1 + std * torch.randn(256, 2)
        with probing(Rng(0, step), torch.arange(256)) as penalties:
            z, ladj = model(x)
        nll = -(standard_normal(z) + ladj).mean()
        (nll + penalties["kinetic"].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert nll.item() < entropy + 0.15


def test_pictures_take_softplus_and_vectors_tanh_unless_told():
    activation = lambda **fields: (
        next(iter(FFJORDConfig(condition_dim=0, hidden=(4,), **fields).build())).velocity.activation
    )
    assert activation(shape=(1, 4, 4)) == "softplus" and activation(shape=(3,)) == "tanh"
    assert activation(shape=(3,), activation="softplus") == "softplus"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shape": None}, "not set"),
        ({"condition_dim": None}, "not set"),
        ({"blocks": 0}, "blocks"),
        ({"network": "conv"}, "'mlp' does"),
        ({"shape": (1, 4, 4), "network": "mlp"}, "'conv' does"),
        ({"solver": "rk4"}, "give steps"),
        ({"hidden": ()}, "hidden"),
        ({"shape": (4, 4)}, "neither"),
    ],
)
def test_impossible_models_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        FFJORDConfig(**{"shape": (3,), "condition_dim": 0, **fields}).build()


def test_a_convolution_to_one_channel_is_a_convolution_with_all_its_derivatives():
    rows, weight = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(1, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(_to_one_channel(rows, weight), torch.nn.functional.conv2d(rows, weight, padding=1))
    rows, weight = rows.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(_to_one_channel, (rows, weight))
    assert torch.autograd.gradgradcheck(_to_one_channel, (rows[:1, :, :3, :3].detach().requires_grad_(), weight))


def test_a_network_is_the_same_with_and_without_a_backward():
    net = ConcatSquash((2, 6, 6), hidden=(4, 4), activation="softplus").double()
    for parameter in net.parameters():
        parameter.data.normal_()
    x, t = torch.randn(3, 2, 6, 6, dtype=torch.float64) * 9, torch.rand(3, dtype=torch.float64)
    with torch.no_grad():
        alone = net(x, t)
    torch.testing.assert_close(net(x, t), alone)
