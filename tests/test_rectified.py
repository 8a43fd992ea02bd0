"""Rectified flow: its loss, its conversions, its sampling, with a tiny network and a tiny text encoder."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from genflow.cli import options
from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.flows.densities import LogitNormal, Mixed, Uniform
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.functional import Rng, noise_from_seeds, resolution_shift
from genflow.registry import names, resolve
from genflow.samplers import euler, heun, shifted
from genflow.samplers.editing import image_to_image
from genflow.samplers.guides import APG

SHAPE = (2, 4, 4)


class TinyNet(nn.Module):
    """An MM-DiT's signature; dropout shows whether it is in eval mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.text = nn.Linear(4, 2)
        self.pooled = nn.Linear(3, 2)
        self.dropout = nn.Dropout(0.5)
        self.calls = []

    def forward(self, x, t, context, pooled, *, context_mask=None):
        assert t.shape == (len(x),)
        self.calls.append((len(x), x.dtype, t.dtype, context_mask is not None))
        weight = (
            torch.ones_like(context[..., :1]) if context_mask is None else context_mask[..., None].to(context.dtype)
        )
        words = self.text((context * weight).sum(1) / weight.sum(1)) + self.pooled(pooled)
        scale = (1 + t.to(x.dtype)).view(-1, 1, 1, 1)
        return self.dropout(torch.tanh(self.conv(x))) * scale + words[..., None, None]


class TinyText(nn.Module):
    """Three tokens of width four from the length and letters of a prompt; trained ones pass through a linear layer."""

    pooled_dim = 3

    def __init__(self, trainable=False):
        super().__init__()
        self.trainable = trainable
        self.linear = nn.Linear(4, 4)

    def encode(self, prompts):
        rows = [torch.linspace(-1, 1, 12) * (sum(map(ord, p)) % 17 - 8) / 8 for p in prompts]
        mask = torch.tensor([[True, len(p) > 3, False] for p in prompts])
        tokens = torch.stack(rows).view(-1, 3, 4)
        return Condition(tokens, mask, tokens.mean(1)[:, :3])

    def null(self):
        return self.encode([""])

    def drop(self, condition, rng, position):
        return condition

    def forward(self, condition):
        return dataclasses.replace(condition, tokens=self.linear(condition.tokens)) if self.trainable else condition


@dataclass
class Batch:
    x: torch.Tensor
    condition: Condition
    position: torch.Tensor


def make(*, network=None, text=None, **config):
    return RectifiedFlowConfig(**config).build(network or TinyNet(), text or TinyText(), shape=SHAPE)


def make_batch(n=6, start=0):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(n, *SHAPE, generator=generator) * 2 - 1
    return Batch(image, TinyText().encode([f"prompt {i}" for i in range(n)]), torch.arange(start, start + n))


@pytest.fixture
def flow():
    return make().eval()


# ----------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_loss_is_the_formula(prediction):
    flow, batch, rng = (
        make(prediction=prediction, density=Uniform(), t_min=0.3, drop_condition=0.5).eval(),
        make_batch(),
        Rng(3, 4),
    )
    out = flow.loss(batch, rng)
    u, noise = rng.uniform("t", batch.position).float(), rng.normal("noise", batch.position, SHAPE)
    kept = rng.uniform("drop", batch.position) >= 0.5
    assert 0 < kept.sum() < 6 and (u < 0.3).any()
    expected = []
    for i in range(6):
        x, t = batch.x[i], u[i]
        z = (1 - t) * x + t * noise[i]
        c = batch.condition[[i]] if kept[i] else TinyText().null()
        output = flow.network(z[None], t[None], c.tokens, c.pooled)[0]
        if prediction == "v":
            error = output - (noise[i] - x)
        else:
            error = (output - x) / max(t, 0.3)
        expected.append((error**2).mean())
    expected = torch.stack(expected)
    torch.testing.assert_close(out.per_sample, expected.detach())
    torch.testing.assert_close(out.loss, expected.mean())
    torch.testing.assert_close(out.t, u)
    assert out.loss.requires_grad and not out.per_sample.requires_grad and out.loss.dtype == torch.float32
    assert not out.t.requires_grad and all(not part.requires_grad for part in out.parts.values())


def test_the_perfect_network_has_no_loss_in_both_predictions():
    """Constant data: x is known, and so is the velocity. The clamp at t_min leaves no floor under the loss."""
    batch = make_batch()
    batch.x[:] = 0.25

    class KnowsX(nn.Module):
        def forward(self, x, t, context, pooled, *, context_mask=None):
            return torch.full_like(x, 0.25)

    class KnowsV(nn.Module):
        def forward(self, x, t, context, pooled, *, context_mask=None):
            return (x - 0.25) / t.view(-1, 1, 1, 1)

    for network, prediction in ((KnowsX(), "x"), (KnowsV(), "v")):
        assert (
            make(network=network, prediction=prediction, density=Uniform(), t_min=0.4).loss(batch, Rng(0)).loss < 1e-8
        )
        x = make(network=network, prediction=prediction).sample(["a"], seeds=[0, 1], steps=20).x
        torch.testing.assert_close(x, torch.full_like(x, 0.25), atol=1e-5, rtol=0)


def test_loss_of_a_sample_does_not_depend_on_its_batch(flow):
    batch, rng = make_batch(), Rng(1, 2)
    together = flow.loss(batch, rng)
    for i in range(6):
        alone = flow.loss(Batch(batch.x[[i]], batch.condition[[i]], batch.position[[i]]), rng)
        torch.testing.assert_close(alone.per_sample[0], together.per_sample[i])
        assert alone.t[0] == together.t[i]
    assert not torch.equal(flow.loss(batch, Rng(1, 3)).t, together.t)
    assert not torch.equal(flow.loss(make_batch(start=6), rng).t, together.t)
    assert torch.equal(flow(batch, rng).loss, together.loss)  # forward is the loss: what DDP wraps


def test_times_follow_the_density_of_the_config():
    batch = make_batch(512)
    t = make(density=LogitNormal(1.0, 0.5)).loss(batch, Rng(0)).t
    assert torch.logit(t).mean() == pytest.approx(1.0, abs=0.1)
    assert torch.logit(t).std() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_conditions_are_dropped_at_their_rate(rate):
    flow, batch, seen = make(drop_condition=rate).eval(), make_batch(400), []
    batch.condition = TinyText().encode(["something"]).expand(400)
    flow.text.forward = lambda condition: seen.append(condition) or condition
    flow.loss(batch, Rng(0))
    null = TinyText().null()
    dropped = (seen[0].tokens == null.tokens).flatten(1).all(1)
    assert torch.equal(dropped, (seen[0].mask == null.mask).all(1))
    assert torch.equal(dropped, (seen[0].pooled == null.pooled).all(1))
    assert dropped.float().mean() == pytest.approx(rate, abs=0.07)


def test_gradients_reach_the_network_and_a_trained_encoder():
    for trainable in (False, True):
        flow = make(text=TinyText(trainable))
        flow.loss(make_batch(), Rng(0)).loss.backward()
        assert flow.network.conv.weight.grad.abs().max() > 0
        assert (flow.text.linear.weight.grad is not None) == trainable


@pytest.mark.parametrize(
    "change",
    [
        {"density": Uniform()},
        {"density": Mixed(LogitNormal(), 0.5)},
        {"prediction": "x"},
        {"drop_condition": 0.9},
        {"text_mask": True},
    ],
    ids=str,
)
def test_every_setting_changes_the_loss(change, flow):
    base, other = flow.loss(make_batch(), Rng(0)).loss, make(**change).eval().loss(make_batch(), Rng(0)).loss
    assert base != other


def test_t_min_changes_the_loss_of_x_prediction():
    losses = {
        t_min: make(prediction="x", t_min=t_min, density=Uniform()).eval().loss(make_batch(), Rng(0)).loss
        for t_min in (0.05, 0.5)
    }
    assert losses[0.05] != losses[0.5]


def test_whitening_is_identity_until_fitted_and_then_used_everywhere(flow):
    whitened, batch = make(whiten=0.1).eval(), make_batch()
    pictures = [f.sample(["prompt 1"], seeds=[1], steps=2, guidance=2.0).x for f in (flow, whitened)]
    assert torch.equal(*pictures)
    whitened.initialise(batch.condition, lambda: batch)
    assert whitened.loss(batch, Rng(0)).loss != flow.loss(batch, Rng(0)).loss
    assert whitened.validate(batch) != flow.validate(batch)
    assert not torch.equal(whitened.sample(["prompt 1"], seeds=[1], steps=2, guidance=2.0).x, pictures[0])
    again = make(whiten=0.1).eval()
    again.load_state_dict(whitened.state_dict())
    assert torch.equal(again.encode(batch.x), whitened.encode(batch.x))


def test_validation_loss_asks_the_same_questions_every_time():
    flow, batch = make(drop_condition=1.0), make_batch()  # dropped conditions would show
    flow.train()
    flow.network.conv.eval()
    first = flow.validate(batch, levels=5)
    assert len(first) == 6 and not any(value.requires_grad for value in first.values())
    assert flow.validate(batch, levels=5) == first  # dropout is off
    assert flow.network.dropout.training and flow.training and not flow.network.conv.training  # and all is as it was
    assert len(flow.validate(batch)) == 9

    flow.eval()
    noise = Rng(0).normal("noise", batch.position, SHAPE)
    mean, *levels = first.values()
    torch.testing.assert_close(mean, torch.stack(levels).mean())
    for level, t in zip(levels, (0.1, 0.3, 0.5, 0.7, 0.9), strict=True):
        z = (1 - t) * batch.x + t * noise
        v = flow.velocity(z, torch.full((6,), t), batch.condition)
        torch.testing.assert_close(level, ((v - (noise - batch.x)) ** 2).mean().detach())


# ------------------------------------------------------------------------------------------------------------- sampling


def test_sample_is_the_solve(flow):
    prompts, seeds = ["red", "a blue square"], [7, 2**63 - 1]
    condition = TinyText().encode(prompts)
    with torch.no_grad():
        expected = heun(lambda z, t: flow.velocity(z, t, condition), noise_from_seeds(seeds, SHAPE), shifted(6, 2.0))
    seen = []
    solution = flow.sample(
        prompts, seeds=seeds, steps=6, shift=2.0, progress=lambda done, total: seen.append((done, total))
    )
    torch.testing.assert_close(solution.x, expected.x.clamp(-1, 1))
    assert solution.nfe == expected.nfe == 11
    assert seen == [(i, 6) for i in range(1, 7)]
    assert solution.x.dtype == torch.float32 and solution.x.abs().max() <= 1
    torch.testing.assert_close(flow.sample(condition, seeds=seeds, steps=6, shift=2.0).x, solution.x)


def test_guidance_moves_away_from_the_empty_caption(flow):
    condition, null = TinyText().encode(["a blue square"]), TinyText().null()

    def velocity(z, t):
        c, u = flow.velocity(z, t, condition), flow.velocity(z, t, null)
        return u + 3.0 * (c - u)

    with torch.no_grad():
        expected = euler(velocity, noise_from_seeds([5], SHAPE), shifted(4)).x.clamp(-1, 1)
    flow.network.calls.clear()
    solution = flow.sample(["a blue square"], seeds=[5], steps=4, sampler="euler", guidance=3.0)
    torch.testing.assert_close(solution.x, expected)
    assert solution.nfe == 4 and [n for n, *_ in flow.network.calls] == [2, 2, 2, 2]
    flow.network.calls.clear()
    flow.sample(["a blue square"], seeds=[5], steps=4, sampler="euler", guidance=3.0, interval=(0.4, 0.8))
    assert [n for n, *_ in flow.network.calls] == [1, 2, 2, 1]


def test_a_guide_is_a_name_a_section_or_an_object(flow):
    options = {"prompts": ["a blue square"], "seeds": [5], "steps": 4, "guidance": 3.0}
    pictures = [
        flow.sample(**options, guide=guide, rescale=0.5).x
        for guide in ({"name": "apg", "eta": 0.5, "momentum": -0.5}, APG(eta=0.5, momentum=-0.5))
    ]
    assert torch.equal(*pictures)
    assert not torch.equal(pictures[0], flow.sample(**options, guide="apg", rescale=0.5).x)
    assert torch.equal(flow.sample(**options, guide="apg").x, flow.sample(**options, guide=APG()).x)


def test_a_weaker_model_guides(flow):
    """v_w + scale (v - v_w), each model under the prompt as its own encoder has it."""
    network = TinyNet()
    with torch.no_grad():
        network.conv.weight.mul_(0.5)
    weak = make(network=network, text=TinyText(trainable=True), whiten=0.1).train()
    condition = TinyText().encode(["a blue square"])

    def velocity(z, t):
        v, w = flow.velocity(z, t, condition), weak.velocity(z, t, weak.embed(condition))
        return w + 2.0 * (v - w)

    weak.eval()
    with torch.no_grad():
        expected = euler(velocity, noise_from_seeds([5], SHAPE), shifted(4)).x.clamp(-1, 1)
    weak.train()
    flow.network.calls.clear()
    weak.network.calls.clear()
    options = {"seeds": [5], "steps": 4, "sampler": "euler", "weak": weak}
    solution = flow.sample(["a blue square"], guidance=2.0, **options)
    torch.testing.assert_close(solution.x, expected)
    assert solution.nfe == 4 and [n for n, *_ in flow.network.calls + weak.network.calls] == [1] * 8
    assert weak.training and weak.network.dropout.training
    flow.network.calls.clear()
    weak.network.calls.clear()
    flow.sample(["a blue square"], guidance=2.0, interval=(0.4, 0.8), **options)
    assert [n for n, *_ in flow.network.calls] == [1] * 4 and [n for n, *_ in weak.network.calls] == [1] * 2


def test_a_network_that_gives_nan_is_told_in_one_line(flow):
    forward = flow.network.forward

    def broken(x, t, *args, **options):
        v = forward(x, t, *args, **options)
        return torch.where((t < 0.5).view(-1, 1, 1, 1) & (torch.arange(len(x)) == 1).view(-1, 1, 1, 1), math.nan, v)

    flow.network.forward = broken
    with pytest.raises(UserError, match=r"not finite \(NaN or inf\) from step 4 of 4 on; samples 1 of 3") as error:
        flow.sample(["a dog"], seeds=[1, 2, 3], steps=4, sampler="euler")
    assert "\n" not in str(error.value)


def test_a_seed_gives_the_same_picture_alone_and_among_64(flow):
    seeds = list(range(64))
    options = {"steps": 5, "guidance": 2.0}
    batch = flow.sample([f"prompt {s}" for s in seeds], seeds=seeds, **options).x
    for seed in (0, 7, 63):
        alone = flow.sample([f"prompt {seed}"], seeds=[seed], **options).x[0]
        torch.testing.assert_close(alone, batch[seed], rtol=0, atol=2e-6)
    again = flow.sample([f"prompt {s}" for s in seeds], seeds=seeds, **options).x
    assert torch.equal(again, batch)
    one_prompt = flow.sample(["prompt 7"], seeds=[3, 7], **options).x
    torch.testing.assert_close(one_prompt[1], batch[7], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "euler"},
        {"steps": 9},
        {"guidance": 2.0},
        {"shift": 2.0},
        {"shift": 2.0, "grid": "double_shifted"},
        {"guidance": 2.0, "interval": (0.2, 0.6)},
        {"guidance": 2.0, "guide": "apg"},
        {"guidance": 2.0, "guide": "cfg_zero"},
        {"guidance": 2.0, "rescale": 0.7},
        {"seeds": [9]},
        {"prompts": ["other words"]},
    ],
    ids=str,
)
def test_every_option_changes_the_picture(change, flow):
    options = {"prompts": ["a dog"], "seeds": [1], "steps": 5}
    pictures = [flow.sample(**{**options, **part}).x for part in ({}, change, dict(list(change.items())[:1]))]
    assert not torch.allclose(pictures[1], pictures[0])
    if len(change) > 1:
        assert not torch.allclose(pictures[1], pictures[2])


@pytest.mark.parametrize("grid", ["shifted", "karras", "beta", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 7, 60])
def test_x_prediction_ends_in_the_predicted_picture(grid, steps):
    """However many steps: below t_min the clamped velocity would leave noise behind."""

    class Knows(TinyNet):
        def forward(self, x, t, context, pooled, *, context_mask=None):
            return torch.full_like(x, 0.3)

    flow = make(network=Knows(), prediction="x", t_min=0.05)
    times = flow.times(steps, grid)
    assert len(times) == steps + 1 and times[0] == 1 and times[-1] == 0
    assert steps == 1 or times[-2] == pytest.approx(0.05)
    x = flow.sample(["a"], seeds=[1], sampler="euler", steps=steps, grid=grid).x
    torch.testing.assert_close(x, torch.full_like(x, 0.3), rtol=0, atol=1e-5)
    assert make(prediction="v").times(steps, grid) == resolve("grid", grid)(steps)
    assert flow.times(steps, [1.0, 0.02, 0.0]) == [1.0, 0.02, 0.0]


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("sampler", names("sampler"))
def test_x_prediction_ends_in_the_predicted_picture_whatever_the_sampler(sampler, steps):
    """Samplers that ask within or after their last step would follow the clamped velocity instead."""

    class Knows(TinyNet):
        def forward(self, x, t, context, pooled, *, context_mask=None):
            return torch.full_like(x, 0.3)

    flow = make(network=Knows(), prediction="x", t_min=0.05)
    solution = flow.sample(["a"], seeds=[1, 2], sampler=sampler, steps=steps, record=True)
    torch.testing.assert_close(solution.x, torch.full_like(solution.x, 0.3), rtol=0, atol=3e-3)  # picard: its tolerance
    path = solution.trajectory
    assert path.times[0] == 1 and path.times[-1] == 0 and path.nfe[-1] == solution.nfe
    assert solution.statistics is None or solution.statistics.evaluations.max() == solution.nfe
    assert len(path.times) == len(path.states) == len(path.nfe) and torch.equal(path.states[-1], solution.x)
    settings = {"sampler": sampler, "guidance": 2.0}
    velocity, noise = options.guided(flow, options.embed(flow, ["a"]), settings), torch.randn(2, *flow.shape)
    solve, grid = options.solver(flow, settings, [1, 2]), flow.times(steps)
    edited = image_to_image(velocity, 0.1 * noise, noise, grid, 1.0 if steps == 1 else 0.6, sampler=solve)
    torch.testing.assert_close(edited.x, torch.full_like(edited.x, 0.3), rtol=0, atol=3e-3)


def test_the_shift_of_a_picture_s_size(flow):
    assert flow.times(4, shift="resolution") == flow.times(4, shift=resolution_shift(math.prod(flow.shape[1:])))
    assert flow.times(4, shift="resolution", size=(64, 64)) == flow.times(4, shift=resolution_shift(4096))
    flow.network.patch_size = 2  # 32 x 32 tokens
    assert flow.times(4, shift="resolution", size=(64, 64)) == flow.times(4, shift=resolution_shift(1024))


def test_size_and_text_mask_and_modes():
    flow = make(text_mask=True)
    flow.train()
    x = flow.sample(["a dog"], seeds=[1, 2], steps=2, size=(6, 8)).x
    assert x.shape == (2, 2, 6, 8) and flow.network.dropout.training
    assert flow.sample(["a dog"], seeds=[1], steps=2, size=8).x.shape == (1, 2, 8, 8)
    assert all(masked for *_, masked in flow.network.calls)
    assert not torch.equal(flow.sample(["a dog"], seeds=[1]).x, make().sample(["a dog"], seeds=[1]).x)


def test_a_bfloat16_network_keeps_a_float32_state():
    flow = make(network=TinyNet().bfloat16()).eval()
    x = flow.sample(["a dog"], seeds=[1], steps=4, guidance=2.0).x
    assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())
    assert {(x_dtype, t_dtype) for _, x_dtype, t_dtype, _ in flow.network.calls} == {(torch.bfloat16, torch.float32)}
    assert flow.loss(make_batch(), Rng(0)).loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "nearest possible number is 1"),
        ({"seeds": [-1]}, "nearest valid one is 0"),
        ({"seeds": [2**63]}, str(2**63 - 1)),
        ({"seeds": []}, "one seed for each picture"),
        ({"guidance": math.nan}, "finite"),
        ({"interval": (0.9, 0.1)}, "0.1, 0.9"),
        ({"shift": -1.0}, "1.0 is no shift"),
        ({"sampler": "huen"}, "heun"),
        ({"grid": "shift"}, "shifted"),
        ({"prompts": "a dog"}, "list of strings"),
        ({"prompts": ["a", "b", "c"], "seeds": [1, 2]}, "3 prompts for 2 seeds"),
        ({"size": 0}, "4 x 4"),
        ({"guide": "agp"}, "sample: guide: no guidance is named 'agp'. Did you mean 'apg'"),
        ({"guide": {"name": "apg", "etta": 1.0}}, "unknown key 'etta' in guide. Did you mean 'eta'"),
        ({"guide": {"name": "apg", "momentum": 2.0}}, "guide: momentum = 2.0 is not between -1 and 1"),
        ({"guide": 5}, "apg, cfg, cfg_zero"),
        ({"rescale": 2.0}, "try 1.0"),
        ({"weak": "runs/weak"}, "rectified flow of .2, 4, 4., not a str"),
    ],
    ids=str,
)
def test_impossible_samples_are_refused(options, message, flow):
    with pytest.raises(UserError, match=message) as error:
        flow.sample(**{"prompts": ["a"], "seeds": [1], **options})
    assert "\n" not in str(error.value)
    assert not flow.network.calls


# ---------------------------------------------------------------------------------------------------------- other verbs


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_encode_and_decode_are_inverses(prediction):
    flow = make(prediction=prediction, t_min=0.2).eval()
    x, condition = make_batch().x, make_batch().condition
    z = flow.encode(x, condition, steps=20)
    assert (z - x).abs().mean() > 0.05 and not torch.equal(flow.encode(x, steps=20), z)
    for c in (condition, None):
        errors = [(flow.decode(flow.encode(x, c, steps=n), c, steps=n) - x).abs().max() for n in (20, 40)]
        assert errors[0] < (0.003 if prediction == "v" else 0.2)
        assert 3 < errors[0] / errors[1] < 6  # second order


def test_encode_wants_one_condition_or_one_for_each_picture(flow):
    batch = make_batch()
    one = flow.encode(batch.x, batch.condition[[0]], steps=2)
    assert torch.equal(one, flow.encode(batch.x, batch.condition[[0] * 6], steps=2))
    for verb in (flow.encode, flow.decode):
        with pytest.raises(UserError, match="2 conditions for 6 pictures"):
            verb(batch.x, batch.condition[[0, 1]])
        with pytest.raises(UserError, match=r"the condition is a list, not prepared; flow\.text\.encode"):
            verb(batch.x, ["cat"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"drop_condition": 1.1}, "1.0"),
        ({"drop_condition": -1}, "0.0"),
        ({"t_min": 0.0}, "0.05"),
        ({"whiten": -1.0}, "0.1"),
    ],
)
def test_impossible_configs_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        RectifiedFlowConfig(**config)


def test_a_frozen_encoder_stays_out_of_the_state():
    frozen, trained = make(), make(text=TinyText(True))
    assert all(key.startswith("network.") for key in frozen.state_dict())
    assert "text.linear.weight" in trained.state_dict()
    other = make()
    with torch.no_grad():
        other.network.conv.weight.add_(1)
    frozen.load_state_dict(other.state_dict())  # strict
    assert torch.equal(frozen.network.conv.weight, other.network.conv.weight)
    state = other.state_dict()
    del state["network.conv.weight"]
    with pytest.raises(RuntimeError, match=r"conv\.weight"):
        frozen.load_state_dict(state)


def test_noise_of_a_flow_that_begins_below_one_is_of_its_first_time():
    flow = make(prediction="eps")
    seen = []
    velocity, flow.velocity = (
        flow.velocity,
        lambda z, t, c: seen.append((float(z.std()), float(t.max()))) or velocity(z, t, c),
    )
    z = torch.randn(64, *flow.shape)
    flow.decode(z, steps=2)
    std, first = seen[0]
    assert (
        first == pytest.approx(flow.t_max)
        and flow.t_max < 1
        and std == pytest.approx(flow.t_max * float(z.std()), rel=1e-5)
    )
    seen.clear()
    noise = flow.encode(flow.decode(z, steps=100), steps=100)
    assert max(t for _, t in seen) <= flow.t_max + 1e-6
    assert (noise - z).square().mean().sqrt() < 0.05


def test_a_weaker_model_guides_by_the_guide_and_rescale_that_are_asked_for(flow):
    network = TinyNet()
    with torch.no_grad():
        network.conv.weight.mul_(0.5)
    options = {"seeds": [5], "steps": 4, "guidance": 3.0, "weak": make(network=network)}
    plain, other, scaled = (flow.sample(["a"], **options, **how).x for how in ({}, {"guide": "apg"}, {"rescale": 0.5}))
    assert not torch.equal(plain, other) and not torch.equal(plain, scaled)


def test_a_weaker_model_of_other_samples_is_refused(flow):
    weak = RectifiedFlowConfig().build(TinyNet(), TinyText(), shape=(3, 4, 4))
    with pytest.raises(UserError, match=r"rectified flow of .2, 4, 4., not a RectifiedFlow of .3, 4, 4."):
        flow.sample(["a"], seeds=[1], weak=weak)
