"""Likelihoods of held-out data, and those of a velocity whose flow is known, against closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image
from torch import nn

from genflow.data.images import ImageDataset
from genflow.data.vectors import VectorDataset
from genflow.errors import UserError
from genflow.evaluation.likelihood import HeldOut, likelihood
from genflow.flows.base import Flow
from genflow.flows.bijections.base import Bijection, per_sample
from genflow.flows.dequantization import GaussianDequantization
from genflow.flows.normalizing import NormalizingFlowConfig
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.text.none import NoTextConfig
from genflow.text.trained import LabelsConfig

SHAPE = (1, 8, 8)
TIGHT = {"rtol": 1e-6, "atol": 1e-6}


class Velocity(nn.Module):
    """E[eps - x | z_t] where x ~ N(mean, s^2): its flow takes N(mean, s^2) to N(0, 1). The mean is the pooled vector's."""

    def __init__(self, s: float = 0.5) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(s, dtype=torch.float64))

    def forward(self, z, t, tokens, pooled, context_mask=None):
        t = t.to(z.dtype).view(-1, *[1] * (z.dim() - 1))
        mean = pooled.mean(1).view_as(t) if pooled.shape[1] else torch.zeros_like(t)
        v = (z - (1 - t) * mean) * (t - (1 - t) * self.s**2) / ((1 - t) ** 2 * self.s**2 + t**2)
        return v - mean


class Scale(Bijection):
    """z = x exp(a)"""

    def __init__(self, a: float = 0.5) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x, condition=None):
        return x * self.a.exp(), per_sample(self.a.expand(x.shape))

    def inverse(self, z, condition=None):
        return z * (-self.a).exp(), -per_sample(self.a.expand(z.shape))


@dataclass(frozen=True)
class Held:
    """A split "test" of the rows of x, vectors or pictures; `broken` cannot be read."""

    x: torch.Tensor
    captions: tuple[str, ...] = ()
    broken: int | None = None

    def build(self, split):
        if split != "test":
            raise UserError(f"no split {split!r}")
        names = [f"row {i}" for i in range(len(self.x))]
        captions = list(self.captions) or [""] * len(names)
        if self.x.dim() == 2:
            return VectorDataset(self.x, captions, names)
        grey = [Image.fromarray(each[0].numpy()) for each in self.x]
        return ImageDataset(captions, names, lambda i: b"no picture" if i == self.broken else grey[i])


def velocity_flow(shape=(3,), s=0.5, text=None):
    return RectifiedFlowConfig().build(Velocity(s), (text or NoTextConfig()).build(), shape=shape)


def scale_flow(shape=(3,), a=0.5, **config):
    return NormalizingFlowConfig(**config).build(Scale(a), NoTextConfig().build(), shape=shape)


def levels(n=6, low=0, high=256, seed=0):
    return torch.randint(low, high, (n, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def rows(n=7, dim=3):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(1))


def normal(x, s, mean=0.0):
    return (-0.5 * ((x - mean) / s) ** 2 - math.log(s * math.sqrt(2 * math.pi))).flatten(1).sum(1)


def cell_bits(k, s):
    """-log2 of the probability of the cells of grey levels k under N(0, s^2), per dimension."""
    middle, half = k.double() / 127.5 - 1, 1 / 255
    upper, lower = (torch.special.ndtr((middle + side * half) / s) for side in (1, -1))
    return -(upper - lower).log2().flatten(1).mean(1)


# --------------------------------------------------------------------------------------------------------- of a velocity


@pytest.mark.parametrize("s", [0.3, 1.0, 2.0])
def test_log_prob_is_the_density_that_the_velocity_transports(s):
    x = s * rows().double()
    torch.testing.assert_close(velocity_flow(s=s).log_prob(x, **TIGHT), normal(x, s), rtol=0, atol=1e-4)


def test_a_likelihood_is_of_the_eval_mode_and_leaves_the_mode_as_it_was():
    class Moody(Velocity):
        def forward(self, *args, **how):
            return super().forward(*args, **how) * (2 if self.training else 1)

    flow = RectifiedFlowConfig().build(Moody(), NoTextConfig().build(), shape=(3,)).train()
    found = flow.log_prob(rows())
    assert flow.training and torch.equal(found, flow.eval().log_prob(rows()))


def test_the_default_tolerances_are_as_good_as_they_say():
    x = 0.5 * rows()
    torch.testing.assert_close(velocity_flow().log_prob(x), normal(x, 0.5), rtol=0, atol=5e-3)


def test_the_condition_moves_the_density():
    flow = velocity_flow(text=LabelsConfig(("low", "high"), dim=4))
    condition = flow.text.encode(["low", "high"])
    mean = flow.embed(condition).pooled.double().mean(1, keepdim=True).detach()
    x = mean + 0.5 * rows(2).double()
    torch.testing.assert_close(flow.log_prob(x, condition, **TIGHT), normal(x, 0.5, mean), rtol=0, atol=1e-4)
    assert (flow.log_prob(x, condition) - flow.log_prob(x)).abs().min() > 1e-3


def test_a_gaussian_estimate_is_unbiased_and_rademacher_draws_are_exact_here():
    flow, x = velocity_flow(SHAPE), 0.5 * torch.randn(200, *SHAPE).double()
    exact = normal(x, 0.5)
    torch.testing.assert_close(flow.log_prob(x, **TIGHT), exact, rtol=0, atol=1e-3)
    error = flow.log_prob(x, divergence="hutchinson_gaussian", draws=2) - exact
    assert error.std() > 0.1 and error.mean().abs() < 4 * error.std() / math.sqrt(len(x))


def test_bits_per_dim_bound_the_exact_probabilities_of_the_cells_and_reach_them():
    s = 0.02
    flow, k = velocity_flow(SHAPE, s), levels(low=123, high=133)
    x, exact = k.float() / 127.5 - 1, cell_bits(k, s)
    one, many = (flow.bits_per_dim(x, k=draws, rtol=1e-5, atol=1e-5).double() for draws in (1, 16))
    assert one.mean() > many.mean()
    torch.testing.assert_close(many, exact, rtol=0, atol=0.01)


def test_bits_per_dim_of_a_density_that_is_flat_in_each_cell_are_exact_with_one_draw():
    k = levels(n=40)
    found = velocity_flow(SHAPE, 1.0).bits_per_dim(k.float() / 127.5 - 1, rtol=1e-5, atol=1e-5).double()
    assert abs((found - cell_bits(k, 1.0)).mean()) < 2e-4


def test_a_likelihood_is_the_same_alone_and_in_a_batch():
    flow, x = velocity_flow(SHAPE), levels().float() / 127.5 - 1
    position = torch.tensor([5, 3, 8, 0, 1, 9])
    together = flow.bits_per_dim(x, k=2, position=position)
    alone = [flow.bits_per_dim(x[[i]], k=2, position=position[[i]]) for i in range(len(x))]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-6, atol=0)
    assert not torch.equal(together, flow.bits_per_dim(x, k=2))
    data = Held(levels())
    one, all_ = (likelihood(flow, data, name="grey", k=2, batch=batch) for batch in (1, 64))
    assert one.mean == pytest.approx(all_.mean, rel=1e-6) and one.error == pytest.approx(all_.error, rel=1e-5)


def test_the_line_says_how_a_velocity_was_solved():
    found = likelihood(velocity_flow(), Held(0.5 * rows()), name="toy", divergence="hutch++", draws=2, rtol=1e-3)
    what = "toy test, 7 samples; unguided ODE, divergence hutch++, draws 2, rtol 0.001, atol 0.0001, float64"
    assert str(found).endswith(f"nats ({what})")
    pictures = likelihood(velocity_flow(SHAPE), Held(levels()), name="grey", k=2, rtol=1e-3, atol=1e-3)
    how = "uniform dequantisation, K = 2, unguided ODE, divergence hutchinson, draws 1, rtol 0.001, atol 0.001, float64"
    assert pictures.how == how and pictures.unit == "bits/dim"


# ------------------------------------------------------------------------------------------------------- of held-out data


def test_the_mean_and_its_standard_error_are_those_of_the_samples():
    x, flow = rows(), scale_flow(a=0.5)
    nats = -normal(x, math.exp(-0.5)).double()
    counted = []
    found = likelihood(flow, Held(x), name="toy", batch=3, progress=counted.append)
    assert found.mean == pytest.approx(float(nats.mean()), rel=1e-6)
    assert found.error == pytest.approx(float(nats.std()) / math.sqrt(7), rel=1e-5)
    assert (found.unit, found.n, found.data, found.split) == ("nats", 7, "toy", "test") and counted == [3, 3, 1]
    assert str(found) == f"{found.mean:.4f} +- {found.error:.4f} nats (toy test, 7 samples; exact, float32)"


def test_n_takes_the_first_samples_and_one_has_no_error():
    x, flow = rows(), scale_flow()
    few = likelihood(flow, Held(x), name="toy", n=2)
    assert few.mean == pytest.approx(-float(normal(x[:2], math.exp(-0.5)).mean()), rel=1e-6)
    one = likelihood(flow, Held(x), name="toy", n=1)
    assert math.isnan(one.error) and "+-" not in str(one) and "1 sample;" in str(one)
    assert likelihood(flow, Held(x), name="toy", n=100).n == 7


def test_pictures_have_bits_of_their_grey_levels():
    k = levels(low=0, high=256)
    flow = scale_flow(SHAPE, a=0.0)
    found = likelihood(flow, Held(k), name="grey", k=16)
    assert found.mean == pytest.approx(float(cell_bits_of_unit(k).mean()), abs=1e-4)
    assert str(found).startswith(f"{found.mean:.4f} +- ") and "bits/dim (grey test, 6 samples; uniform " in str(found)
    assert "K = 16, 256 levels" in found.how and "float32" in found.how
    assert likelihood(flow, Held(k), name="grey").mean > found.mean  # a looser bound


def cell_bits_of_unit(k):
    """As cell_bits, of N(0, 1) on the scale of a normalizing flow, [-1, 1) in 256 cells."""
    edge = k.double() / 128 - 1
    return -(torch.special.ndtr(edge + 1 / 128) - torch.special.ndtr(edge)).log2().flatten(1).mean(1)


def test_captions_are_heard():
    flow = velocity_flow(text=LabelsConfig(("low", "high"), dim=4))
    low, high = (likelihood(flow, Held(rows(4), (name,) * 4), name="toy") for name in ("low", "high"))
    assert low.mean != high.mean and "(toy test, 4 samples; given the captions, unguided ODE" in str(low)


class Nothing(Flow):
    shape = (3,)
    loss = validate = sample = None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"n": 0}, "n = 0 is too few; the least is 1"),
        ({"k": 0}, "k = 0 is too few; the least is 1"),
        ({"batch": -1}, "batch = -1 is too few; the least is 1"),
        ({"k": 2}, "k = 2: vectors are continuous"),
        ({"split": "nonsense"}, "no split 'nonsense'"),
        ({"rtol": 1e-3}, "rtol is for likelihoods of a velocity"),
        ({"data": Held(rows() / 0)}, "the likelihood of row 0 is inf; is the model trained?"),
        ({"data": Held(levels(), broken=2), "flow": scale_flow(SHAPE)}, "row 2 cannot be read"),
        (
            {"data": Held(levels()), "flow": scale_flow(SHAPE, dequantization=GaussianDequantization())},
            "with added noise",
        ),
        ({"flow": Nothing()}, "this flow offers no likelihood"),
        ({"flow": velocity_flow(), "divergence": "exat"}, "divergence 'exat' is unknown. Did you mean 'exact'?"),
        ({"flow": velocity_flow(), "draws": 2}, "the exact divergence has none to take"),
    ],
)
def test_what_has_no_likelihood_is_refused_in_one_line(how, message):
    how = {"flow": scale_flow(), "data": Held(rows()), "name": "toy", **how}
    with pytest.raises(UserError) as error:
        likelihood(how.pop("flow"), how.pop("data"), **how)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_vectors_have_no_bits_and_a_bijection_is_no_velocity():
    with pytest.raises(UserError, match="vectors have a density: log_prob"):
        velocity_flow().bits_per_dim(rows())
    with pytest.raises(UserError, match="k = 0 is not a whole number of 1 or more"):
        velocity_flow(SHAPE).bits_per_dim(levels().float() / 127.5 - 1, k=0)
    with pytest.raises(UserError, match="the model is a bijection; take flow normalizing"):
        RectifiedFlowConfig().build(Scale(), NoTextConfig().build(), shape=(3,))


def test_a_figure_is_a_value():
    found = HeldOut(1.0, 0.5, "nats", 3, "toy", "test", "exact, float32")
    assert found == replace(found) and str(found) == "1.0000 +- 0.5000 nats (toy test, 3 samples; exact, float32)"
