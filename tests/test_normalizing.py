"""The verbs of a normalizing flow, on bijections simple enough to know the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.flows.bijections.base import Bijection, Chain, per_sample
from genflow.flows.bijections.continuous import CNF
from genflow.flows.dequantization import GaussianDequantization, UniformDequantization
from genflow.flows.models.tarflow import TarFlowConfig
from genflow.flows.normalizing import NormalizingFlowConfig
from genflow.functional import Rng
from genflow.text.none import NoTextConfig
from genflow.text.trained import LabelsConfig
from tests.noise import shaken

SHAPE = (1, 2, 2)


class Scale(Bijection):
    """z = (x - shift(condition)) exp(a)"""

    def __init__(self, a: float = 0.5, condition_dim: int = 0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))
        self.condition_dim = condition_dim
        self.began = None

    def shift(self, x, condition):
        return condition.mean(1).view(-1, *[1] * (x.dim() - 1)) if self.condition_dim else torch.zeros(())

    def forward(self, x, condition=None):
        return (x - self.shift(x, condition)) * self.a.exp(), per_sample(self.a.expand(x.shape))

    def inverse(self, z, condition=None):
        return z * (-self.a).exp() + self.shift(z, condition), -per_sample(self.a.expand(z.shape))

    def initialise(self, x, condition=None):
        self.began = x


@dataclass
class Batch:
    x: torch.Tensor
    condition: Condition
    position: torch.Tensor


def grid(n: int = 5, shape=SHAPE) -> torch.Tensor:
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(0)) / 127.5 - 1


def make(shape=SHAPE, *, a=0.5, condition_dim=0, **config):
    text = LabelsConfig(("cat", "dog"), dim=condition_dim).build() if condition_dim else NoTextConfig().build()
    return NormalizingFlowConfig(**config).build(Scale(a, condition_dim), text, shape=shape)


def batch_of(flow, x) -> Batch:
    prompts = ["cat" if flow.network.condition_dim else ""] * len(x)
    return Batch(x, flow.text.encode(prompts), torch.arange(len(x)))


def normal(z, std):
    return (-0.5 * (z / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))).flatten(1).sum(1)


def test_log_prob_is_the_density_of_the_base_through_the_map():
    flow, std = make(a=0.5), math.exp(-0.5) * 256 / 255
    x = grid()
    torch.testing.assert_close(flow.log_prob(x), normal(x, std))


def test_vectors_have_a_density_in_nats_and_no_bits():
    flow = make((3,), a=0.2)
    x = torch.randn(4, 3)
    torch.testing.assert_close(flow.log_prob(x), normal(x, math.exp(-0.2)))
    out = flow.loss(batch_of(flow, x), Rng(0))
    torch.testing.assert_close(out.loss, -normal(x, math.exp(-0.2)).mean())
    assert list(out.parts) == ["nll"] and out.t is None
    with pytest.raises(UserError, match="log_prob"):
        flow.bits_per_dim(x)


def test_bits_per_dim_are_those_of_the_cells_of_a_gaussian():
    """P(k) = the integral of the density over the cell, which K draws approach from above."""
    flow, x = make(a=1.0), grid(8)
    std = math.exp(-1.0)
    k = (x + 1) * 127.5
    low, high = (2 * k / 256 - 1) / std, (2 * (k + 1) / 256 - 1) / std
    exact = -(torch.special.ndtr(high.double()) - torch.special.ndtr(low.double())).log2().flatten(1).mean(1)
    one, many = flow.bits_per_dim(x), flow.bits_per_dim(x, k=400)
    torch.testing.assert_close(many.double(), exact, atol=2e-3, rtol=0)
    assert (one - exact).abs().mean() > (many - exact).abs().mean()
    with pytest.raises(UserError, match="k = 0"):
        flow.bits_per_dim(x, k=0)


def test_the_loss_is_bits_per_dim_of_new_noise_and_validation_of_the_same():
    flow, x = make(), grid()
    batch = batch_of(flow, x)
    out, again = flow.loss(batch, Rng(0, 1)), flow.loss(batch, Rng(0, 2))
    assert out.loss != again.loss and list(out.parts) == ["bits_per_dim"]
    torch.testing.assert_close(out.per_sample.mean(), out.loss.detach())
    assert flow.validate(batch) == flow.validate(batch)
    torch.testing.assert_close(flow.validate(batch)["validation_loss"], flow.bits_per_dim(x).mean())
    out.loss.backward()
    assert flow.network.a.grad != 0


def test_a_loss_does_not_depend_on_batch_mates():
    flow, x = make(), grid(4)
    batch = batch_of(flow, x)
    whole = flow.loss(batch, Rng(3)).per_sample
    one = flow.loss(Batch(x[2:3], batch.condition[[2]], batch.position[2:3]), Rng(3)).per_sample
    torch.testing.assert_close(one, whole[2:3])


def test_encode_and_decode_are_inverses_and_samples_are_the_inverse_of_seeds():
    flow, x = make(), grid()
    torch.testing.assert_close(flow.decode(flow.encode(x)), x)
    both = flow.sample([""], seeds=[3, 4])
    one = flow.sample([""], seeds=[4])
    assert torch.equal(both.x[1:], one.x) and both.nfe == 1 and both.x.abs().max() <= 1
    cold = make((3,)).sample([""], seeds=[3, 4], temperature=0.5).x
    torch.testing.assert_close(cold, 0.5 * make((3,)).sample([""], seeds=[3, 4]).x)


def test_the_condition_reaches_the_bijection_and_is_dropped_at_its_rate():
    flow = make((3,), condition_dim=4)
    cat, dog = flow.sample(["cat"], seeds=[0]).x, flow.sample(["dog"], seeds=[0]).x
    shift = flow.text.table.weight.mean(1)
    torch.testing.assert_close(dog - cat, (shift[1] - shift[0]).expand(1, 3))
    x = torch.randn(400, 3)
    dropped = make((3,), condition_dim=4, drop_condition=0.3)
    dropped.load_state_dict(flow.state_dict())
    batch = batch_of(dropped, x)
    kept = torch.isclose(flow.loss(batch, Rng(0)).per_sample, dropped.loss(batch, Rng(0)).per_sample)
    assert 0.6 < kept.float().mean() < 0.8
    assert torch.equal(flow.log_prob(x[:2]), flow.log_prob(x[:2], flow.text.encode([""])))


def test_every_inverse_of_a_tarflow_draws_the_same_and_certifies_it():
    torch.manual_seed(0)
    network = TarFlowConfig(patch=2, blocks=2, layers=1, width=16, heads=1, shape=(1, 4, 4), condition_dim=0).build()
    shaken(network)
    flow = NormalizingFlowConfig().build(network, NoTextConfig().build(), shape=(1, 4, 4))
    ways = {how: flow.sample([""], seeds=[0, 1], inverse=how) for how in ("sequential", "jacobi", "measured", "auto")}
    for how, solution in ways.items():
        torch.testing.assert_close(solution.x, ways["sequential"].x, atol=1e-3, rtol=0)
        assert 0 <= solution.certificate < 1e-3, how
    assert [block.window for block in network] == [None, None]
    for block in network:
        block.window = 2
    flow.sample([""], seeds=[0], inverse="jacobi")
    assert [block.window for block in network] == [2, 2]
    for wrong in (flow, make()):
        with pytest.raises(UserError, match="inverse"):
            wrong.sample([""], seeds=[0], inverse="jacoby" if wrong is flow else "jacobi")
    assert make().sample([""], seeds=[0]).certificate is None


def test_initialise_gives_the_bijection_dequantised_data():
    flow, x = make(), grid()
    batch = batch_of(flow, x)
    flow.initialise(batch.condition, lambda: batch)
    cells = (flow.network.began + 1) * 128
    assert torch.equal(cells.floor(), ((x + 1) * 127.5).round()) and not torch.equal(cells, cells.floor())


def test_noise_augmentation_has_no_likelihood_and_is_denoised():
    sigma = 0.1
    flow, x = make(a=1.0, dequantization=GaussianDequantization(sigma)), grid()
    batch = batch_of(flow, x)
    out = flow.loss(batch, Rng(0))
    y, _ = flow._continuous(x, Rng(0), batch.position)
    assert flow.unit == "nats/dim" and list(out.parts) == ["nll"]
    torch.testing.assert_close(out.loss, -flow._log_prob(y, None).mean() / math.prod(SHAPE))
    for verb in (flow.log_prob, flow.bits_per_dim):
        with pytest.raises(UserError, match="noise"):
            verb(x)
    with pytest.raises(UserError, match="noise"):
        flow.likelihood_note(1)
    noisy = make(a=1.0, dequantization=UniformDequantization()).sample([""], seeds=[1, 2]).x
    std = math.exp(-1.0)
    torch.testing.assert_close(flow.sample([""], seeds=[1, 2]).x, noisy * (1 - sigma**2 / std**2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: make(drop_condition=1.5), "drop_condition = 1.5"),
        (lambda: make(whiten=-1.0), "whiten = -1.0"),
        (lambda: make((3,), dequantization=UniformDequantization()), "vectors are continuous"),
        (lambda: NormalizingFlowConfig().build(nn.Linear(2, 2), NoTextConfig().build(), shape=(2,)), "no bijection"),
        (lambda: make().sample([""], seeds=[0], temperature=-1.0), "temperature = -1.0"),
        (lambda: make().sample([""], seeds=[0], guidance=2.0), "has no condition"),
        (lambda: make(condition_dim=4).sample(["cat"], seeds=[0], guidance=2.0), "cannot be guided"),
        (lambda: make().sample([""], seeds=[]), "no seeds"),
        (lambda: make().bits_per_dim(torch.full((1, *SHAPE), 1.5)), "run from 1.5"),
        (lambda: make().bits_per_dim(torch.full((1, *SHAPE), 0.5)), "256 levels"),
        (lambda: make(a=math.nan).sample([""], seeds=[0]), "NaN"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(act, message):
    with pytest.raises(UserError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_the_penalties_of_a_continuous_flow_are_in_the_loss():
    torch.manual_seed(0)
    cnf = CNF((2,), kinetic=0.5, jacobian=0.25, rtol=1e-4, atol=1e-4)
    for p in cnf.parameters():
        torch.nn.init.normal_(p, std=0.3)
    flow = NormalizingFlowConfig().build(cnf, NoTextConfig().build(), shape=(2,))
    out = flow.loss(batch_of(flow, torch.randn(6, 2)), Rng(0))
    assert set(out.parts) == {"nll", "kinetic", "jacobian"} and all(float(part) > 0 for part in out.parts.values())
    torch.testing.assert_close(out.loss.detach(), sum(out.parts.values()))
    torch.testing.assert_close(out.per_sample.mean(), out.parts["nll"])


class Falling(nn.Module):
    calls = 0

    def forward(self, x, t):
        self.calls += 1
        return -x


@pytest.mark.parametrize("how", [{}, {"solver": "rk4", "steps": 3}])
def test_a_sample_of_continuous_flows_tells_the_evaluations_of_their_velocities(how):
    velocity = Falling()
    network = Chain([CNF((2,), velocity, **how), CNF((2,), velocity, **how)])
    flow = NormalizingFlowConfig().build(network, NoTextConfig().build(), shape=(2,))
    for _ in range(2):
        velocity.calls = 0
        assert flow.sample([""], seeds=[3]).nfe == velocity.calls > 2
