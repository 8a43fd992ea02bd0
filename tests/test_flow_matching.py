"""Flow matching on every path, with every prediction: the loss, the conversions, and a Gaussian whose optimum is known."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from genflow.conditions import Condition
from genflow.config import from_dict, to_dict
from genflow.errors import UserError
from genflow.flows.couplings import Independent, OptimalTransport, Paired, Sinkhorn
from genflow.flows.densities import Uniform
from genflow.flows.paths import CosinePath, LinearPath, PolynomialPath, VPPath
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.functional import Rng, noise_from_seeds
from genflow.registry import names, resolve, tag_of
from genflow.samplers import model_from
from genflow.text.none import NoTextConfig

PATHS = [LinearPath(), LinearPath(0.1), CosinePath(), VPPath(), PolynomialPath(2.0)]
PREDICTIONS = ["v", "x", "eps"]
BOTH = list(itertools.product(PATHS, PREDICTIONS))
MEAN, STD = 0.7, 0.4  # of the data, in every coordinate


@dataclass
class Batch:
    x: torch.Tensor
    condition: Condition
    position: torch.Tensor
    noise: torch.Tensor | None = None


class Optimal(nn.Module):
    """The best prediction for data N(MEAN, STD^2): E[x | x_s] and what follows from it; off by `wrong`."""

    def __init__(self, path, prediction, wrong=0.0):
        super().__init__()
        self.path, self.prediction, self.wrong = path.build(), prediction, wrong
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, context, pooled, *, context_mask=None):
        s = t.double().view(-1, *[1] * (x.dim() - 1))
        a, b = self.path.alpha(s), self.path.sigma(s)
        gain = a * STD**2 / (a**2 * STD**2 + b**2)
        clean = MEAN + gain * (x.double() - a * MEAN)
        noise = b / (a**2 * STD**2 + b**2) * (x.double() - a * MEAN)
        if self.prediction == "v":
            da, db = self.path.rates(s)
            return da * clean + db * noise + self.wrong + self.bias
        return (clean if self.prediction == "x" else noise) + self.wrong + self.bias


def velocity(z, t):
    """dz/dt of the straight path for that data, whatever was predicted."""
    return z.new_tensor(0.0) + ((t - (1 - t) * STD**2) * (z - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2) - MEAN)


def make(path=None, prediction="v", network=None, shape=(3,), **config):
    path = path or LinearPath()
    flow = RectifiedFlowConfig(path=path, prediction=prediction, density=Uniform(), **config)
    return flow.build(network or Optimal(path, prediction), NoTextConfig().build(), shape=shape).eval()


def make_batch(n=6, shape=(3,), **more):
    torch.manual_seed(2)
    return Batch(MEAN + STD * torch.randn(n, *shape), NoTextConfig().build().encode([""] * n), torch.arange(n), **more)


NONE = NoTextConfig().build().encode([""])


# ------------------------------------------------------------------------------------------------------------- the paths


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_path_runs_from_data_to_noise_at_the_rates_that_it_tells(path):
    built = path.build()
    s = torch.linspace(0, 1, 101, dtype=torch.float64)[1:-1].requires_grad_()
    a, b = built.alpha(s), built.sigma(s)
    assert (a.diff() < 0).all() and (b.diff() > 0).all()
    for value, rate in zip((a, b), built.rates(s), strict=True):
        (grad,) = torch.autograd.grad(value.sum(), s, retain_graph=True)
        torch.testing.assert_close(rate, grad)
    t = built.t_of_s(s.detach())
    torch.testing.assert_close(built.s_of_t(t), s.detach())
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(built.alpha(ends), torch.tensor([1.0, 0.0], dtype=torch.float64), atol=0.01, rtol=0)
    torch.testing.assert_close(built.sigma(ends)[1], ends[1], atol=1e-4, rtol=0)
    assert built.sigma(ends)[0] == pytest.approx(getattr(path, "sigma_min", 0.0))


def test_the_formulas_of_the_papers():
    s = torch.tensor([0.3], dtype=torch.float64)
    for path, alpha, sigma in (
        (LinearPath(0.1), 0.7, 0.1 + 0.9 * 0.3),
        (CosinePath(), math.cos(0.15 * math.pi), math.sin(0.15 * math.pi)),
        (PolynomialPath(3.0), 0.7**3, 1 - 0.7**3),
        (VPPath(), math.exp(-(0.1 * 0.3 + 19.9 * 0.09 / 2) / 2), None),
    ):
        built = path.build()
        assert float(built.alpha(s)) == pytest.approx(alpha)
        assert float(built.sigma(s)) == pytest.approx(math.sqrt(1 - alpha**2) if sigma is None else sigma)


def test_every_registered_path_and_coupling_is_a_config_that_survives_a_file():
    assert {tag_of(type(path)).names[0] for path in PATHS} <= set(names("path"))
    for kind, each in (("path", PATHS), ("coupling", [Independent(), Paired(), OptimalTransport(0.5), Sinkhorn(0.1)])):
        for value in each:
            config = RectifiedFlowConfig(**{kind: value})
            assert from_dict(RectifiedFlowConfig, {k: v for k, v in to_dict(config).items() if k != "name"}) == config
            assert isinstance(value, resolve(kind, tag_of(type(value)).names[0]))


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: LinearPath(-0.1), "sigma_min = -0.1"),
        (lambda: PolynomialPath(0.5), "power = 0.5"),
        (lambda: VPPath(beta_min=0.0), "beta_min = 0.0"),
    ],
)
def test_impossible_paths_are_refused(make_it, message):
    with pytest.raises(UserError, match=message):
        make_it()


# -------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(("path", "prediction"), BOTH, ids=repr)
def test_the_loss_is_the_formula(path, prediction):
    class Net(nn.Module):
        def forward(self, x, t, context, pooled, *, context_mask=None):
            return torch.sin(3 * x) + t[:, None]

    flow, batch, rng = make(path, prediction, Net(), t_min=0.3), make_batch(), Rng(3, 4)
    out = flow.loss(batch, rng)
    s, noise = rng.uniform("t", batch.position).float(), rng.normal("noise", batch.position, (3,))
    built = path.build()
    for i in range(6):
        a, b = built.alpha(s[i]), built.sigma(s[i])
        point = a * batch.x[i] + b * noise[i]
        output = torch.sin(3 * point) + s[i]
        if prediction == "v":
            da, db = built.rates(s[i])
            error = output - (da * batch.x[i] + db * noise[i])
        elif prediction == "eps":
            error = output - noise[i]
        else:
            error = (output - batch.x[i]) / max(b / (a + b), 0.3)
        torch.testing.assert_close(out.per_sample[i], (error**2).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.t, s)
    assert list(out.parts) == ["noise" if prediction == "eps" else "velocity"]


@pytest.mark.parametrize(("path", "prediction"), BOTH, ids=repr)
def test_the_least_loss_is_that_of_the_conditional_mean(path, prediction):
    """A shift of the optimal prediction costs its square, weighted; its slope at the optimum is zero."""
    batch = make_batch(4000, (1,))
    flow = make(path, prediction, shape=(1,))
    best = flow.loss(batch, Rng(0))
    worse = [
        make(path, prediction, Optimal(path, prediction, d), shape=(1,)).loss(batch, Rng(0)).loss for d in (0.3, -0.3)
    ]
    assert all(each > best.loss for each in worse)
    curvature = float((worse[0] + worse[1] - 2 * best.loss).detach()) / 0.3**2
    best.loss.backward()
    assert abs(float(flow.network.bias.grad)) < 0.15 * curvature


def test_validation_asks_for_the_same_prediction():
    for path, prediction in BOTH:
        best, worse = (make(path, prediction, Optimal(path, prediction, d)) for d in (0.0, 1.0))
        batch = make_batch(64)
        assert best.validate(batch)["validation_loss"] < worse.validate(batch)["validation_loss"]


# --------------------------------------------------------------------------------------- one velocity from every path


@pytest.mark.parametrize(("path", "prediction"), BOTH, ids=repr)
def test_every_path_and_prediction_gives_the_velocity_of_the_straight_path(path, prediction):
    flow = make(path, prediction)
    z = torch.randn(50, 3, dtype=torch.float64)
    t = torch.linspace(0.1, 0.94, 50, dtype=torch.float64)
    torch.testing.assert_close(flow.velocity(z, t, NONE.expand(50)), velocity(z, t[:, None]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("path", "prediction"), BOTH, ids=repr)
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dopri5", "euler_maruyama"])
def test_samples_have_the_mean_and_deviation_of_the_data(path, prediction, sampler):
    flow = make(path, prediction, shape=(400,))
    x = flow.sample([""], seeds=[0, 1], steps=60, sampler=sampler, guidance=1.0).x
    assert x.mean() == pytest.approx(MEAN, abs=0.12)
    assert x.std() == pytest.approx(STD, abs=0.06)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_velocity_models_of_all_paths_make_the_same_sample_of_a_seed(path):
    seeds = [3, 4, 5]
    exact = MEAN + STD * noise_from_seeds(seeds, (3,))  # the flow of a Gaussian is this line
    x = make(path).sample([""], seeds=seeds, steps=200, grid="uniform", guidance=1.0).x
    torch.testing.assert_close(x, exact, atol=0.1 if path == LinearPath(0.1) else 0.02, rtol=0)


def test_the_path_of_a_trained_flow_can_be_changed_after_the_fact():
    """One trained on the straight path is asked as a noise predictor of the VP path, and as a velocity of the cosine one."""
    flow = make()
    straight = flow.guided(flow.embed_prompts([""], 5))
    for path, prediction, kind in (
        (VPPath(), "eps", "eps"),
        (CosinePath(), "v", "velocity"),
        (LinearPath(0.1), "x", "x"),
    ):
        other, best = model_from(straight, path.build(), kind), Optimal(path, prediction)
        x, s = torch.randn(5, 3, dtype=torch.float64), torch.linspace(0.1, 0.8, 5, dtype=torch.float64)
        torch.testing.assert_close(other(x, s), best(x, s, None, None), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_encoding_is_undone_by_decoding_on_a_curved_path(prediction):
    flow, x = make(CosinePath(), prediction), make_batch().x
    errors = [(flow.decode(flow.encode(x, steps=n), steps=n) - x).abs().max() for n in (20, 80)]
    assert errors[1] < 0.02 and errors[1] < errors[0]


def test_sampling_starts_where_the_network_still_tells_of_the_picture():
    assert make().t_max == make(CosinePath(), "x").t_max == 1
    assert make(prediction="eps").t_max == 0.95 and make(prediction="eps", t_min=0.2).t_max == 0.8
    assert make(VPPath()).t_max == VPPath().build().t_max < 1
    flow = make(prediction="eps")
    assert flow.times(4, "uniform")[0] == 0.95 and flow.times(4, "uniform")[-1] == 0
    solution = flow.sample([""], seeds=[0], steps=4, record=True, guidance=1.0)
    torch.testing.assert_close(solution.trajectory.states[0], 0.95 * noise_from_seeds([0], (3,)))


# ------------------------------------------------------------------------------------------------------------- couplings


@pytest.mark.parametrize("coupling", [OptimalTransport(), Sinkhorn()], ids=repr)
def test_the_loss_and_the_validation_see_the_coupled_noise(coupling):
    batch, rng, seen = make_batch(16), Rng(0, 1), []

    class Net(nn.Module):
        def forward(self, x, t, context, pooled, *, context_mask=None):
            seen.append((x, t))
            return torch.zeros_like(x)

    make(network=Net(), coupling=coupling).loss(batch, rng)
    point, t = seen[0]
    noise = (point - (1 - t[:, None]) * batch.x) / t[:, None]
    expected = coupling(batch.x, rng.normal("noise", batch.position, (3,)))
    torch.testing.assert_close(noise, expected, rtol=1e-3, atol=1e-3)
    coupled = make(network=Net(), coupling=coupling).validate(batch)["validation_loss"]
    assert coupled < 0.9 * make(network=Net()).validate(batch)["validation_loss"]
    one = make_batch(1)
    assert make(network=Net(), coupling=coupling).validate(one) == make(network=Net()).validate(one)


def test_dropped_conditions_are_alike_to_the_coupling():
    seen = []

    class Spy(Independent):
        def __call__(self, x, noise, condition=None):
            seen.append(condition)
            return noise

    class Text(nn.Module):
        pooled_dim, trainable = 1, False

        def null(self):
            return Condition(torch.zeros(1, 0, 0), torch.zeros(1, 0, dtype=torch.bool), torch.full((1, 1), 9.0))

        def drop(self, condition, rng, position):
            return condition

        def forward(self, condition):
            return condition

    batch = make_batch(40)
    batch.condition = Condition(
        torch.zeros(40, 0, 0), torch.zeros(40, 0, dtype=torch.bool), torch.arange(40.0)[:, None]
    )
    config = RectifiedFlowConfig(coupling=Spy(), drop_condition=0.5)
    config.build(Optimal(LinearPath(), "v"), Text(), shape=(3,)).loss(batch, Rng(0))
    dropped = Rng(0).uniform("drop", batch.position) < 0.5
    assert torch.equal(seen[0].pooled[:, 0] == 9, dropped | (torch.arange(40) == 9))


def test_paired_takes_the_noise_of_the_batch_and_refuses_one_without():
    batch = make_batch(5, noise=torch.randn(5, 3))
    flow = make(coupling=Paired(), network=Optimal(LinearPath(), "v"))
    s = Rng(0).uniform("t", batch.position).float()[:, None]
    v = flow.network((1 - s) * batch.x + s * batch.noise, s[:, 0], None, None)
    torch.testing.assert_close(
        flow.loss(batch, Rng(0)).per_sample, (v - (batch.noise - batch.x)).square().mean(1).float()
    )
    for verb in (lambda b: flow.loss(b, Rng(0)), flow.validate):
        with pytest.raises(UserError, match="take data pairs, or coupling independent"):
            verb(make_batch())


@pytest.mark.parametrize("coupling", [OptimalTransport(), Sinkhorn(), Paired()], ids=repr)
def test_samplers_that_draw_noise_are_refused_where_noise_tells_of_the_data(coupling):
    flow = make(coupling=coupling)
    with pytest.raises(UserError, match="right for coupling independent alone"):
        flow.sample([""], seeds=[0], sampler="ancestral")
    flow.sample([""], seeds=[0], sampler="euler", steps=2, guidance=1.0)


def test_a_grid_of_x_prediction_falls_from_the_paths_last_time():
    flow = make(PolynomialPath(), "x")
    times = flow.times(4, "uniform")
    assert times[0] == flow.t_max < 1 and times[-2:] == [pytest.approx(flow.t_min), 0.0]


def test_a_network_of_the_noise_is_not_asked_beyond_where_it_tells_of_the_picture():
    flow, seen = make(prediction="eps", t_min=0.2), []
    flow.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    z = torch.randn(3, 3)
    ends = [flow.velocity(z, torch.full((3,), t), NONE) for t in (0.8, 0.9, 1.0)]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    assert float(torch.stack(seen).max()) == pytest.approx(0.8)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_is_asked_at_times_of_its_path_alone(path, prediction):
    flow, seen = make(path, prediction), []
    flow.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    for t in (0.0, 0.01, 0.5, 1.0):
        assert flow.velocity(torch.randn(2, 3), torch.full((2,), t), NONE).isfinite().all()
    first, last = flow.first, float(path.build().s_of_t(torch.tensor(flow.path.t_max).double()))
    assert all(first - 1e-6 <= float(s.min()) and float(s.max()) <= last + 1e-6 for s in seen)
