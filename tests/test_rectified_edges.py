"""Rectified flows at their edges: below t_min, on grids of one's own, under couplings, around latents, and of pairs."""

import math
import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.flows.couplings import Independent, OptimalTransport, Paired, Sinkhorn
from genflow.flows.latent import Autoencoder, LatentFlow, LatentFlowConfig
from genflow.flows.models.nsf import NSFConfig
from genflow.flows.normalizing import NormalizingFlowConfig
from genflow.flows.paths import CosinePath, LinearPath, PolynomialPath, VPPath
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.reflow import draw_pairs
from genflow.flows.sampling import InverseConfig
from genflow.functional import Rng
from genflow.text.base import TextEncoder
from genflow.text.none import NoTextConfig
from genflow.text.sd3 import SD3TextConfig
from genflow.text.trained import LabelsConfig, LearnedTextConfig

NONE = NoTextConfig().build()


class Exact(nn.Module):
    """The best prediction of samples of N(mean, std^2)."""

    def __init__(self, path=None, prediction="x", mean=0.0, std=0.05):
        super().__init__()
        self.path, self.prediction = (path or LinearPath()).build(), prediction
        self.mean, self.std = mean, std
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, context, pooled, *, context_mask=None):
        s = t.double().view(-1, *[1] * (x.dim() - 1))
        a, b = self.path.alpha(s), self.path.sigma(s)
        gain = (x.double() - a * self.mean) / (a**2 * self.std**2 + b**2)
        clean, noise = self.mean + a * self.std**2 * gain, b * gain
        if self.prediction != "v":
            return (clean if self.prediction == "x" else noise) + self.bias
        da, db = self.path.rates(s)
        return da * clean + db * noise + self.bias


def make(network=None, *, text=NONE, shape=(2,), **config):
    return RectifiedFlowConfig(**config).build(network or Exact(), text, shape=shape).eval()


@pytest.mark.parametrize("path", [LinearPath(), LinearPath(0.1), CosinePath(), VPPath(), PolynomialPath()])
def test_a_flow_survives_pickling(path):
    flow = make(Exact(path, "v"), path=path)
    again = pickle.loads(pickle.dumps(flow))
    assert torch.equal(again.sample([""], seeds=[3], steps=2).x, flow.sample([""], seeds=[3], steps=2).x)


# ---------------------------------------------------------------------------------------------------------- below t_min


def test_the_likelihood_of_x_prediction_is_of_the_clamped_velocity_as_it_says():
    flow, x = make(prediction="x"), torch.tensor([[0.0, 0.0], [0.03, -0.06]])
    z = flow.encode(x, steps=400)
    torch.testing.assert_close(flow.decode(z, steps=400), x, rtol=0, atol=1e-4)
    scale = z[1, 0] / x[1, 0]  # the map is linear: decode(z) = z / scale
    base = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
    found = flow.log_prob(x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, base + 2 * scale.log(), rtol=0, atol=5e-3)
    assert 1 / scale > 1.05 * flow.network.std  # which is not where `sample` ends
    assert "velocity clamped below t = 0.05" in flow.likelihood_note(1)
    assert "clamped" not in make(Exact(prediction="v"), prediction="v").likelihood_note(1)


def test_a_gradient_that_the_likelihood_has_not_is_refused():
    flow = make()
    with pytest.raises(UserError, match="has no gradient, but x asks for one"):
        flow.log_prob(torch.zeros(1, 2, requires_grad=True))
    assert not flow.log_prob(torch.zeros(1, 2)).requires_grad  # whatever its weights ask for


def test_the_likelihood_of_eps_prediction_is_of_decode_which_does_not_start_at_1():
    flow = make(Exact(prediction="eps", mean=0.7, std=0.4), prediction="eps")
    x = torch.tensor([[0.7, 0.7], [1.5, 0.9]])
    z = flow.encode(x, steps=400)
    scale = (z[1, 0] - z[0, 0]) / (x[1, 0] - x[0, 0])  # the map is affine
    base = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
    found = flow.log_prob(x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, base + 2 * scale.log(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("sigma_min", [0.0, 0.02, 0.2])
def test_the_last_step_of_x_prediction_starts_where_the_path_knows_the_picture(sigma_min):
    path = LinearPath(sigma_min)
    flow, same = (make(Exact(path, kind, 0.7, 0.4), prediction=kind, path=path) for kind in ("x", "v"))
    assert flow.t_min == max(0.05, sigma_min / (1 + sigma_min))
    assert flow.times(8)[-2] == pytest.approx(flow.t_min)
    x, other = (each.sample([""], seeds=range(64), steps=60, guidance=1.0).x for each in (flow, same))
    torch.testing.assert_close(x, other, rtol=0, atol=0.02)


# --------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize(
    ("grid", "config"),
    [([0.5, 0.0], {}), ([0.0, 0.5, 1.0], {}), ([1.0, 0.5, -0.1], {}), ([1.0, 0.5, 0.0], {"prediction": "eps"})],
)
def test_times_that_do_not_fall_from_noise_are_refused(grid, config):
    flow = make(**config)
    with pytest.raises(UserError, match=f"from t = {flow.t_max:g} down to 0, not {grid[0]} to {grid[-1]}"):
        flow.sample([""], seeds=[0], grid=grid)


def test_times_from_noise_are_taken_as_they_are():
    assert make().times(7, [1, 0.3, 0.1]) == [1.0, 0.3, 0.1]
    assert make(prediction="eps").times(7, [0.95, 0.0]) == [0.95, 0.0]


# ----------------------------------------------------------------------------------------------------------- couplings


class Hears(nn.Module):
    """Keeps the noise of the last call, for samples of zeros."""

    def forward(self, x, t, context, pooled, *, context_mask=None):
        self.noise = (x / t.view(-1, 1)).detach()
        return x * 0 + pooled.sum() * 0


def crossings(coupling, text):
    """How many samples of two classes, at -3 and 3, take noise that was another class's."""
    torch.manual_seed(0)
    label = torch.arange(32) % 2
    x = torch.randn(32, 2) * 0.1 + 6 * label[:, None] - 3
    rng, position, seen = Rng(3), torch.arange(32), []

    class Net(nn.Module):
        def forward(self, z, t, context, pooled, *, context_mask=None):
            seen.append((z - (1 - t[:, None]) * x) / t[:, None])
            return z * 0 + pooled.sum() * 0

    flow = make(Net(), text=text, coupling=coupling, drop_condition=0.0)
    flow.loss(SimpleNamespace(x=x, condition=text.encode(["ab"[i] for i in label]), position=position), rng)
    source = torch.cdist(seen[0], rng.normal("noise", position, (2,))).argmin(1)
    return int((label[source] != label).sum())


@pytest.mark.parametrize("kind", [OptimalTransport, Sinkhorn])
@pytest.mark.parametrize("text", [LabelsConfig(("a", "b"), 8), LearnedTextConfig(dim=16, layers=1, heads=2)])
def test_weight_hears_conditions_that_are_trained(kind, text):
    torch.manual_seed(1)
    free, weighed, grouped = (crossings(kind(weight=weight), text.build()) for weight in (0.0, 1e6, None))
    assert free > 4 and weighed == 0 and grouped == 0


@dataclass(frozen=True)
class Spy(Independent):
    seen: list

    def __call__(self, x, noise, condition=None):
        self.seen.append(condition)
        return noise


@pytest.mark.parametrize("text_mask", [False, True])
def test_captions_that_differ_in_their_padding_alone_are_alike_where_it_is_not_heard(text_mask):
    text, spy, n = SD3TextConfig(width=2048, pooled=2048, t5_tokens=2, drop=1.0).build(), Spy([]), 6
    null = text.null()
    mask = torch.arange(null.mask.shape[1]).expand(n, -1) <= torch.arange(n)[:, None]
    tokens, pooled = torch.randn(n, *null.tokens.shape[1:]), torch.randn(n, null.pooled.shape[1])
    condition = Condition(tokens, mask, pooled)
    flow = make(Hears(), text=text, coupling=spy, text_mask=text_mask, drop_condition=0.0)
    flow.loss(SimpleNamespace(x=torch.zeros(n, 2), condition=condition, position=torch.arange(n)), Rng(0))
    coupled = OptimalTransport()(torch.randn(n, 2), flow.network.noise, spy.seen[0])
    assert torch.equal(coupled, flow.network.noise) == text_mask


# --------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        ("abc", [0, 1, 2], "must be a list"),
        (["a"] * 5, range(8), "5 prompts for 8 seeds"),
        (["a"] * 6, range(4), "6 prompts for 4 seeds"),
        (["a"], [], "no seeds"),
    ],
)
def test_pairs_refuse_prompts_that_do_not_fit(prompts, seeds, message):
    with pytest.raises(UserError, match=message):
        draw_pairs(make(), prompts, seeds, batch=4, steps=2)


# ------------------------------------------------------------------------------------------------------------- latents


class Halves(Autoencoder):
    picture_channels, channels, factor, scale, shift = 3, 4, 2, 1.0, 0.0

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 3, 2, 2)

    def posterior(self, x):
        mean = self.down(x)
        return mean, torch.zeros_like(mean)

    def decode(self, z):
        return self.up(z)


def test_pairs_of_latents_are_refused():
    flow = LatentFlow(SimpleNamespace(), make(shape=(4, 4, 4)), Halves())
    with pytest.raises(UserError, match="only a rectified flow can be reflowed, and this is a LatentFlow"):
        draw_pairs(flow, [""], [0], steps=2)


class HalvesConfig:
    def build(self):
        return Halves()


class Frozen(nn.Module):
    """A frozen text encoder that owns parameters."""

    trainable, pooled_dim = False, 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


def latent(text=NONE):
    return LatentFlowConfig(HalvesConfig()).build(Exact(), text, shape=(3, 8, 8)).eval()


def test_a_latent_flow_around_a_frozen_encoder_loads_its_own_state():
    flow = latent(Frozen())
    state = flow.state_dict()
    assert not any("text" in key for key in state)
    flow.load_state_dict(state)
    nn.ModuleDict({"model": flow}).load_state_dict({f"model.{key}": value for key, value in state.items()})
    del state["flow.network.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"flow.network.bias"\. '):
        flow.load_state_dict(state)


@pytest.mark.parametrize("size", ["8", (8,), (8, 8, 8), 8.0, (8.0, 8.0)])
def test_a_latent_flow_refuses_sizes_as_a_flow_of_pictures_does(size):
    with pytest.raises(UserError, match="neither a side nor a height and a width"):
        latent().sample([""], seeds=[0], steps=2, size=size)
    assert latent().sample([""], seeds=[0], steps=2, size=[4, 6]).x.shape == (1, 3, 4, 6)


def test_a_latent_normalizing_flow_has_one_size():
    network = NSFConfig(steps=1, hidden=4, shape=(4,), condition_dim=0).build()
    inner = NormalizingFlowConfig().build(network, NONE, shape=(4,))
    inner.shape = (4, 4, 4)
    with pytest.raises(UserError, match="NormalizingFlow has one size"):
        LatentFlow(LatentFlowConfig(HalvesConfig()), inner, Halves()).sample([""], seeds=[0], size=8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 7, 7), "7 x 7 is no multiple"), ((1, 1, 8, 8), "pictures of 3 channels"), ((3, 8, 8), "3 channels")],
)
@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
def test_a_latent_flow_refuses_pictures_that_have_no_latents(verb, shape, message):
    with pytest.raises(UserError, match=message):
        getattr(latent(), verb)(torch.zeros(shape))


def test_latents_have_no_noise_of_their_own():
    with pytest.raises(UserError, match="take independent"):
        LatentFlowConfig(HalvesConfig(), RectifiedFlowConfig(coupling=Paired()))


# ------------------------------------------------------------------------------------------------------------ guidance


def test_a_bijection_is_not_guided_the_other_way():
    with pytest.raises(UserError, match="guidance = -0.5"):
        InverseConfig(guidance=-0.5)
    assert InverseConfig(guidance=0.0).guidance == 0


@pytest.mark.parametrize("prediction", ["v", "x", "eps"])
@pytest.mark.parametrize("answer", [lambda out: out[:, 0], lambda out: (out,)])
def test_a_network_that_answers_in_another_shape_is_not_trained(prediction, answer):
    """What broadcasts against the target would train, towards something else."""

    class Odd(Exact):
        def forward(self, *args, **how):
            return answer(super().forward(*args, **how))

    flow = make(Odd(prediction=prediction), shape=(1,), prediction=prediction)
    batch = SimpleNamespace(x=torch.randn(4, 1), condition=NONE.encode([""] * 4), position=torch.arange(4))
    with pytest.raises(UserError, match=r"returned (\(4,\)|a tuple)"):
        flow.loss(batch, Rng(0))


class Silent:
    """A coupling that does not say whether it is independent."""

    def __call__(self, x, noise, condition=None):
        return noise


def test_a_coupling_that_says_nothing_is_taken_for_dependent():
    flow = make(coupling=Silent())
    assert flow.sample([""], seeds=[3], steps=2).x.shape == (1, 2)
    with pytest.raises(UserError, match="'ancestral' draws noise"):
        flow.sample([""], seeds=[3], steps=2, sampler="ancestral")


class Letters(TextEncoder):
    """Frozen by its word alone: it is a plain module with parameters."""

    context_dim = pooled_dim = 2
    max_tokens, trainable = 1, False

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 2)

    def encode(self, prompts):
        pooled = self.table(torch.tensor([ord(f"{p} "[0]) for p in prompts]))
        return Condition(pooled[:, None], torch.ones(len(prompts), 1, dtype=torch.bool), pooled)

    def forward(self, condition):
        return condition


def test_a_frozen_text_encoder_is_not_trained_whatever_its_parameters_say():
    """Else they are averaged, and a checkpoint's average holds what its model does not."""
    flow = make(text=Letters())
    assert [name for name, p in flow.named_parameters() if p.requires_grad] == ["network.bias"]
    assert not flow.text.encode(["a"]).pooled.requires_grad
