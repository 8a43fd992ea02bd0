"""The UNet, and the MLP of vectors: what a velocity network must keep to."""

import math

import pytest
import torch

from genflow.attention import attention_backend
from genflow.errors import UserError
from genflow.networks.unet import UNetConfig
from genflow.networks.velocity import MLPVelocityConfig
from genflow.training.apply import checkpointed
from genflow.training.config import fit_to
from tests.noise import shaken

UNET = {"channels": 8, "channel_mult": (1, 2), "blocks": 1, "attention_size": 4, "shape": (3, 8, 8)}
NETWORKS = {
    "unet": (UNetConfig(**UNET, pooled_dim=5), (3, 8, 8)),
    "unet without condition": (UNetConfig(**UNET, pooled_dim=0), (3, 8, 8)),
    "mlp": (MLPVelocityConfig(hidden=16, depth=2, shape=(3,), pooled_dim=5), (3,)),
    "mlp without condition": (MLPVelocityConfig(hidden=16, depth=2, shape=(3,), pooled_dim=0), (3,)),
}


def awake(config):
    """A network whose zeros are not zeros, so that every path through it shows."""
    torch.manual_seed(0)
    network = config.build()
    return shaken(network).double().eval()


def ask(network, x, t=0.3, pooled=None):
    n, width = len(x), network.config.pooled_dim
    time = t if isinstance(t, torch.Tensor) else torch.full((n,), t)
    pooled = torch.zeros(n, width) if pooled is None else pooled
    return network(x, time, torch.zeros(n, 0, 0, dtype=x.dtype), pooled.to(x.dtype), context_mask=None)


@pytest.fixture(params=NETWORKS, ids=str)
def case(request):
    config, shape = NETWORKS[request.param]
    return awake(config), torch.randn(4, *shape, dtype=torch.float64)


def test_the_answer_has_the_samples_shape_and_dtype_and_is_zero_at_first(case):
    network, x = case
    y = ask(network, x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.abs().min() > 0
    fresh = network.config.build()
    assert (ask(fresh, x.float()) == 0).all()


def test_time_and_condition_are_heard_and_rows_do_not_hear_each_other(case):
    network, x = case
    t, pooled = torch.linspace(0.1, 0.9, 4), torch.randn(4, network.config.pooled_dim)
    y = ask(network, x, t, pooled)
    for i in range(4):
        torch.testing.assert_close(ask(network, x[[i]], t[[i]], pooled[[i]])[0], y[i])
    assert (ask(network, x, t.flip(0), pooled) != y).any()
    assert network.config.pooled_dim == 0 or (ask(network, x, t, pooled.flip(0)) != y).any()


def test_gradients_reach_every_parameter(case):
    network, x = case
    pooled = torch.randn(4, network.config.pooled_dim)
    ask(network, x, pooled=pooled).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_velocity_has_two_derivatives(case):
    """What a likelihood and its training ask for."""
    network, x = case
    x.requires_grad_()
    with attention_backend("math"):
        (grad,) = torch.autograd.grad(ask(network, x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_recomputed_blocks_give_the_same_gradients(case):
    network, x = case
    ask(network, x).sum().backward()
    grads = [p.grad.clone() if p.grad is not None else None for p in network.parameters()]
    network.zero_grad()
    checkpointed(network)
    ask(network, x).sum().backward()
    for p, grad in zip(network.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None) and (grad is None or torch.equal(p.grad, grad))


def test_a_run_tells_the_shape_and_the_width_of_the_condition():
    class Text(torch.nn.Module):
        context_dim, pooled_dim, max_tokens = 7, 5, 3

    assert fit_to(UNetConfig(channels=8), Text(), (3, 8, 8)) == UNetConfig(channels=8, shape=(3, 8, 8), pooled_dim=5)
    assert fit_to(MLPVelocityConfig(), Text(), (3,)) == MLPVelocityConfig(shape=(3,), pooled_dim=5)


def test_the_levels_that_attend_are_those_up_to_the_size():
    def attending(**change):
        network = UNetConfig(**{**UNET, **change}, pooled_dim=0).build()
        return [name for name, _ in network.named_modules() if name.endswith("attention.qkv")]

    assert attending(attention_size=0) == []
    assert len(attending(attention_size=4)) == 1 + 1 + 2  # down, middle, up at the coarse level
    assert len(attending(attention_size=8)) == 2 + 1 + 4


def test_other_picture_sizes_than_the_trained_one_are_served():
    network = awake(UNetConfig(**UNET, pooled_dim=0))
    assert ask(network, torch.randn(2, 3, 12, 6, dtype=torch.float64)).shape == (2, 3, 12, 6)
    with pytest.raises(UserError, match=r"5 x 8 cannot be halved .* try 4 x 8"):
        ask(network, torch.randn(2, 3, 5, 8, dtype=torch.float64))


def test_the_unet_is_translation_equivariant_but_for_its_borders():
    network = awake(UNetConfig(**{**UNET, "attention_size": 0, "shape": (3, 32, 32)}, pooled_dim=0))
    for module in network.modules():  # group norms see the whole picture; the rest is local
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    x = torch.zeros(1, 3, 96, 96, dtype=torch.float64)
    x[..., 46:50, 46:50] = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    rolled = ask(network, x.roll((2, 4), (2, 3)))
    torch.testing.assert_close(rolled[..., 40:56, 40:56], ask(network, x).roll((2, 4), (2, 3))[..., 40:56, 40:56])


def test_the_default_size_is_that_of_the_papers_cifar_networks():
    with torch.device("meta"):
        network = UNetConfig(shape=(3, 32, 32), pooled_dim=0).build()
    assert 30e6 < sum(p.numel() for p in network.parameters()) < 60e6
    assert math.prod(network.first.weight.shape) == 128 * 3 * 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNetConfig().build(), "shape is not set"),
        (lambda: UNetConfig(shape=(3, 8, 8)).build(), "pooled_dim is not set"),
        (lambda: UNetConfig(shape=(2,), pooled_dim=0).build(), "take mlp"),
        (lambda: UNetConfig(shape=(3, 28, 28), pooled_dim=0).build(), "28 x 28 cannot be halved for each of 4 levels"),
        (lambda: UNetConfig(channels=0), "channels = 0"),
        (lambda: UNetConfig(channel_mult=()), "channel_mult"),
        (lambda: UNetConfig(dropout=1.0), "dropout"),
        (lambda: UNetConfig(channels=72, shape=(3, 8, 8), pooled_dim=0, channel_mult=(1, 25)).build(), "heads of 64"),
        (lambda: MLPVelocityConfig().build(), "shape is not set"),
        (lambda: MLPVelocityConfig(shape=(3, 8, 8), pooled_dim=0).build(), "take unet"),
        (lambda: MLPVelocityConfig(depth=0), "depth = 0"),
    ],
)
def test_impossible_networks_are_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_attention_backend_of_the_config_is_the_one_asked():
    with pytest.raises(UserError, match="attention backend 'xformers' cannot serve"):
        ask(awake(UNetConfig(**UNET, pooled_dim=0, attention="xformers")), torch.randn(1, 3, 8, 8, dtype=torch.float64))


def test_dropout_is_heard_in_training_alone():
    network, x = awake(UNetConfig(**UNET, pooled_dim=0, dropout=0.5)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(ask(network, x), ask(network, x))
    network.train()
    assert not torch.equal(ask(network, x), ask(network, x))


def test_the_levels_that_attend_go_by_the_longer_side():
    network = UNetConfig(**{**UNET, "shape": (3, 16, 4)}, pooled_dim=0).build()
    assert [name for name, _ in network.named_modules() if name.endswith("attention.qkv")] == ["middle.0.attention.qkv"]


def test_a_norm_has_the_most_groups_that_divide_its_channels():
    network = UNetConfig(channels=40, channel_mult=(1, 2), shape=(3, 8, 8), pooled_dim=0).build()
    assert network.down[0].norm1.num_groups == 20 and network.norm.num_groups == 20
