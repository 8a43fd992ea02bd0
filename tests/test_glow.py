"""Glow: its step against the three bijections it is made of, the model against normflows', and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from genflow.errors import UserError
from genflow.flows.bijections.base import Chain
from genflow.flows.bijections.coupling import AdditiveCoupling, AffineCoupling
from genflow.flows.bijections.glow_step import GlowStep
from genflow.flows.bijections.shapes import Split
from genflow.flows.models.glow import GlowConfig
from tests.noise import shaken


def rows(n: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "condition_dim"), [((6, 4, 4), 3), ((4, 4, 4), 0), ((5,), 3)])
@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_a_step_is_actnorm_then_convolution_then_coupling(shape, condition_dim, coupling, dtype):
    torch.manual_seed(0)
    step = shaken(GlowStep(shape, condition_dim=condition_dim, hidden=8, coupling=coupling)).to(dtype)
    chain = Chain([step.actnorm, step.conv, step.coupling])
    assert isinstance(step.coupling, {"affine": AffineCoupling, "additive": AdditiveCoupling}[coupling])
    x = rows(3, *shape, dtype=dtype).requires_grad_()
    condition = rows(3, condition_dim, dtype=dtype) if condition_dim else None
    ours, theirs = step(x, condition), chain(x, condition)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(step.inverse(x, condition), chain.inverse(x, condition))
    with torch.no_grad():
        torch.testing.assert_close(step.inverse(x, condition), chain.inverse(x, condition))
    gradients = [
        torch.autograd.grad(z.square().sum() - ladj.sum(), [x, *step.parameters()], allow_unused=True)
        for z, ladj in (ours, theirs)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-7, atol=1e-4)


def test_a_step_is_of_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        step = GlowStep((4, 4, 4), hidden=8)
        assert {p.dtype for p in [*step.parameters(), step.conv.sign]} == {torch.float64}
        torch.testing.assert_close(step.inverse(step(x := rows(3, 4, 4, 4))[0])[0], x)
    finally:
        torch.set_default_dtype(torch.float32)


def test_only_the_network_of_a_step_computes_in_bf16():
    step, x = shaken(GlowStep((4, 4, 4), hidden=16)), rows(3, 4, 4, 4, dtype=torch.float32)
    plain, _ = step(x)
    with torch.autocast("cpu", torch.bfloat16):
        z, ladj = step(x)
        back, _ = step.inverse(z)
    assert z.dtype == ladj.dtype == torch.float32
    assert torch.equal(z[:, :2], plain[:, :2]) and 0 < (z - plain).abs().max() < 0.05
    torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)


def test_initialisation_standardises_the_input_of_every_step():
    torch.manual_seed(1)
    glow = GlowConfig(levels=2, steps=2, hidden=8, shape=(3, 8, 8), condition_dim=0).build()
    x = rows(32, 3, 8, 8, dtype=torch.float32) * 4 + 2
    steps = [m for m in glow.modules() if isinstance(m, GlowStep)]
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        step.register_forward_hook(lambda m, args, _out: seen.__setitem__(id(m), m.actnorm(args[0])[0]))
        for step in steps
    ]
    glow.initialise(x)
    glow(x)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4 and all(step.actnorm.initialised for step in steps)
    for normed in seen.values():
        assert normed.mean((0, 2, 3)).abs().max() < 1e-4
        assert (normed.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("levels", "shape", "condition_dim"), [(3, (3, 8, 8), 0), (2, (1, 8, 4), 3), (1, (2, 2, 2), 3)]
)
def test_glow_is_a_bijection_with_its_volume(levels, shape, condition_dim):
    torch.manual_seed(2)
    config = GlowConfig(levels=levels, steps=2, hidden=8, shape=shape, condition_dim=condition_dim)
    glow = shaken(config.build()).double().eval()
    assert glow.condition_dim == condition_dim
    x, condition = rows(3, *shape), rows(3, condition_dim) if condition_dim else None
    with torch.no_grad():
        z, ladj = glow(x, condition)
        back, inverse_ladj = glow.inverse(z, condition)
        assert z.shape == x.shape and ladj.shape == (3,)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(inverse_ladj, -ladj)
        torch.testing.assert_close(glow.decode(z, condition), x)
    one = None if condition is None else condition[:1]
    jacobian = torch.autograd.functional.jacobian(lambda a: glow(a, one)[0], x[:1])
    size = math.prod(shape)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian.view(size, size))[1], ladj[0])


def test_couplings_and_priors_hear_the_condition():
    torch.manual_seed(3)
    glow = shaken(GlowConfig(levels=2, steps=1, hidden=8, shape=(3, 4, 4), condition_dim=2).build()).double()
    x, condition = rows(2, 3, 4, 4), rows(2, 2)
    z, _ = glow(x, condition)
    z.sum().backward()
    split = next(m for m in glow.modules() if isinstance(m, Split))
    heard = [split.condition, *(m.coupling.network.condition for m in glow.modules() if isinstance(m, GlowStep))]
    assert len(heard) == 3 and all(layer.weight.grad.abs().max() > 0 for layer in heard)
    with pytest.raises(UserError, match="condition is missing"):
        glow(x)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"shape": (1, 28, 28)}, "24 x 24 or 32 x 32"),
        ({"shape": (3, 32, 20)}, "32 x 16 or 32 x 24"),
        ({"shape": (8,)}, "for pictures"),
        ({"shape": None}, "needs the shape"),
        ({"condition_dim": None}, "condition_dim"),
        ({"levels": 0}, "levels = 0"),
        ({"coupling": "afine"}, "affine"),
    ],
)
def test_glow_refuses(wrong, words):
    with pytest.raises(UserError, match=words):
        GlowConfig(**{"shape": (3, 32, 32), "condition_dim": 0, "steps": 1, **wrong}).build()


def test_28_x_28_can_be_halved_twice():
    glow = GlowConfig(levels=2, steps=1, hidden=4, shape=(1, 28, 28), condition_dim=0).build()
    assert glow(torch.zeros(1, 1, 28, 28))[0].shape == (1, 1, 28, 28)


class Theirs(nn.Module):
    """Our network as normflows' coupling wants it: its map is (x - shift) exp(-scale), and the two are interleaved."""

    def __init__(self, step: GlowStep, network: nn.Module) -> None:
        super().__init__()
        self.network, self.bounded = network, step.coupling._bounded

    def forward(self, x):
        shift, log_scale = self.bounded(self.network(x).unflatten(1, (2, -1)))
        return torch.stack([-shift * (-log_scale).exp(), -log_scale], 2).flatten(1, 2)


def to_normflows(step: GlowStep, channels: int, hidden: int) -> nn.Module:
    nf = pytest.importorskip("normflows")
    block = nf.flows.GlowBlock(channels, hidden, scale_map="exp", split_mode="channel", scale=True)
    coupling, conv, norm = block.flows
    net = coupling.flows[1].param_map.net
    with torch.no_grad():
        ours = step.coupling.network
        for mine, theirs in ((ours.first, net[0]), (ours.middle, net[2]), (ours.last, net[4])):
            theirs.load_state_dict(mine.state_dict())
        norm.s.copy_(-step.actnorm.log_scale.view_as(norm.s))
        norm.t.copy_((-step.actnorm.shift * (-step.actnorm.log_scale).exp()).view_as(norm.t))
        norm.data_dep_init_done.fill_(1.0)
        conv.P.copy_(torch.eye(channels)[step.conv.order])
        conv.L.copy_(step.conv.lower)
        conv.U.copy_(step.conv.upper)
        conv.log_S.copy_(step.conv.log_diagonal)
        conv.sign_S.copy_(step.conv.sign)
    coupling.flows[1].param_map = Theirs(step, coupling.flows[1].param_map)
    return block


@pytest.mark.filterwarnings("ignore")
def test_log_prob_and_samples_are_those_of_normflows_with_the_same_weights():
    nf = pytest.importorskip("normflows")
    torch.manual_seed(4)
    levels, hidden, shape = 2, 8, (3, 8, 8)
    glow = shaken(GlowConfig(levels=levels, steps=2, hidden=hidden, shape=shape, condition_dim=0).build())
    for split in (m for m in glow.modules() if isinstance(m, Split)):
        for p in split.prior.parameters():
            nn.init.zeros_(p)  # normflows' priors do not see the kept half
    steps = [m for m in glow.modules() if isinstance(m, GlowStep)]
    flows, bases = [], []
    for level in range(levels):  # theirs count from the noise
        own = steps[2 * (levels - 1 - level) :][:2]
        channels = len(own[0].conv.sign)
        flows.append([*(to_normflows(step, channels, hidden) for step in reversed(own)), nf.flows.Squeeze()])
        latent = channels // (2 if level else 1)
        side = 8 // 2 ** (levels - level)
        bases.append(nf.distributions.DiagGaussian((latent, side, side), trainable=False))
    peer = nf.MultiscaleFlow(bases, flows, [nf.flows.Merge()], class_cond=False).double()
    glow = glow.double().eval()
    x = rows(4, *shape)
    with torch.no_grad():
        z, ladj = glow(x)
        ours = ladj - 0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
        torch.testing.assert_close(ours, peer.log_prob(x, None))
        back, _ = peer.forward_and_log_det(peer.inverse_and_log_det(x)[0])
        torch.testing.assert_close(glow.decode(z), back)


def test_a_few_steps_of_training_raise_the_likelihood():
    torch.manual_seed(6)
    glow = GlowConfig(levels=2, steps=1, hidden=16, shape=(1, 4, 4), condition_dim=0).build()
    x = rows(64, 1, 4, 4, dtype=torch.float32)
    x = 0.3 * torch.cumsum(x, 3)  # neighbours hang together
    glow.initialise(x)
    optimizer = torch.optim.Adam(glow.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        z, ladj = glow(x)
        loss = (0.5 * z.square().flatten(1).sum(1) - ladj).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 5
