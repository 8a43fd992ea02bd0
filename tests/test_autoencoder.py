"""Training autoencoders, and flows in the latents of trained ones."""

from __future__ import annotations

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from genflow.data.emoji import EmojiConfig
from genflow.errors import UserError
from genflow.evaluation.features import PixelFeatures, as_samples, graph_features
from genflow.evaluation.frechet import frechet_distance
from genflow.evaluation.plan import Plan
from genflow.evaluation.reals import read_real
from genflow.evaluation.report import evaluate
from genflow.flows.autoencoder import (
    AutoencoderFlowConfig,
    DiscriminatorConfig,
    PerceptualConfig,
)
from genflow.flows.fidelity import ssim
from genflow.flows.latent import LatentFlowConfig
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.store import find_model, load, save_model
from genflow.flows.trained import TrainedAutoencoderConfig, TrainedTokenizerConfig
from genflow.functional import Rng
from genflow.interop.autoencoder import KLNetworkConfig, autoencoder_to_diffusers
from genflow.interop.taef import load_taef
from genflow.networks.autoencoders import TinyAutoencoderConfig
from genflow.networks.bottlenecks import GaussianConfig, PlainConfig, gaussian_kl
from genflow.networks.discriminator import PatchDiscriminator, adaptive_weight, hinge
from genflow.networks.feature_graph import FeatureGraph, PerceptualDistance
from genflow.networks.quantizers import FSQConfig, VQConfig
from genflow.networks.unet import UNetConfig
from genflow.samplers import psnr
from genflow.text.none import NoTextConfig
from genflow.text.trained import LabelsConfig
from genflow.training.config import RunConfig, TrainConfig
from genflow.training.run import train


def flow_of(bottleneck=None, *, size=16, **config):
    bottleneck = bottleneck or GaussianConfig(4)
    built = bottleneck.build()
    network = TinyAutoencoderConfig(
        width=8, blocks=1, factor=4, in_channels=3, encoder_channels=built.reads, latent_channels=built.channels
    ).build()
    return AutoencoderFlowConfig(bottleneck, **config).build(network, NoTextConfig().build(), shape=(3, size, size))


def batch(rows=4, size=16, seed=0):
    x = torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return SimpleNamespace(x=x, condition=NoTextConfig().build().encode([""] * rows), position=torch.arange(rows))


def run_config(out, *, bottleneck=None, steps=2, size=16, clip=1.0, **flow):
    return RunConfig(
        data=EmojiConfig(size=size, limit=24),
        model=TinyAutoencoderConfig(width=8, blocks=1, factor=4),
        flow=AutoencoderFlowConfig(bottleneck or GaussianConfig(4), **flow),
        train=TrainConfig(
            steps=steps, batch_size=8, precision="fp32", clip=clip, trackers=(), save_every=2, preview_every=2
        ),
        out=str(out),
    )


# ---------------------------------------------------------------------------------------------------------------- formulas


def test_the_kl_of_a_gaussian_is_torchs():
    mean, std = torch.randn(3, 4, 2, 2), torch.rand(3, 4, 2, 2) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0, 1)).flatten(1).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, std), expected)


def test_the_gaussian_draws_from_its_posterior_by_position():
    gaussian = GaussianConfig(2).build()
    mean, logvar = torch.full((1, 2, 1, 1), 0.7), torch.full((1, 2, 1, 1), math.log(0.04))
    h = torch.cat([mean, logvar], 1).expand(4000, -1, -1, -1)
    z = gaussian(h, Rng(3), torch.arange(4000)).z
    assert abs(z.mean() - 0.7) < 0.01 and abs(z.std() - 0.2) < 0.01
    assert torch.equal(gaussian(h[:1], Rng(3), torch.tensor([77])).z, z[77:78])
    assert torch.equal(gaussian(h).z, h[:, :2])
    wild = torch.tensor([0.0, 0.0, -1e3, 1e3]).view(1, 4, 1, 1)
    torch.testing.assert_close(gaussian.moments(wild)[1].flatten().log(), torch.tensor([-15.0, 10.0]))


def test_latents_have_unit_variance_by_their_measured_scale_and_shift():
    plain = PlainConfig(3).build().train()
    for step in range(5):
        plain(torch.randn(64, 3, 4, 4) * 2.5 + 1.5, Rng(0, step), torch.arange(64))
    assert abs(plain.shift - 1.5) < 0.05 and abs(1 / plain.scale - 2.5) < 0.05
    plain(torch.randn(64, 3, 4, 4) * 9)  # not in training: without an rng nothing is measured
    assert abs(1 / plain.scale - 2.5) < 0.05
    still = PlainConfig(3).build()
    still(torch.full((64, 3, 4, 4), 0.1), Rng(0), torch.arange(64))
    assert still.scale.isfinite()


@pytest.mark.parametrize("config", [GaussianConfig(2), PlainConfig(4)])
def test_latents_are_measured_in_training_alone(config):
    bottleneck, h = config.build(), torch.randn(8, 4, 2, 2)
    for training in (False, True):
        bottleneck.train(training)(h, Rng(0), torch.arange(8))
        assert bottleneck.seen == training


def test_the_moments_of_latents_are_those_of_all_ranks(monkeypatch):
    told = {"is_initialized": lambda: True, "get_world_size": lambda: 2}
    told["all_reduce"] = lambda x: x.add_(torch.tensor([3.0, 10.0]))  # of another rank
    for name, answer in told.items():
        monkeypatch.setattr(torch.distributed, name, answer)
    plain = PlainConfig(1).build()
    plain(torch.ones(1, 1, 1, 1), Rng(0), torch.arange(1))
    assert plain.running.tolist() == [2, 5.5]


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_of_the_last_layer():
    last = torch.randn(3, 2, requires_grad=True)
    a, b = torch.randn(3, 2), torch.randn(3, 2)
    weight = adaptive_weight((a * last).sum(), (5 * b * last).sum(), last)
    torch.testing.assert_close(weight, a.norm() / ((5 * b).norm() + 1e-6))
    assert not weight.requires_grad
    assert adaptive_weight((a * last).sum(), (0 * last).sum(), last) == 1e4


def test_the_hinge_loss_is_zero_where_both_are_told_apart_by_a_margin():
    assert hinge(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])) == 0
    assert hinge(torch.tensor([0.0]), torch.tensor([0.5])) == pytest.approx((1 + 1.5) / 2)


def test_each_side_of_the_game_has_the_gradient_of_its_own_loss():
    flow = flow_of(PlainConfig(4), discriminator=DiscriminatorConfig(weight=0.7, width=4, layers=2))
    b = batch()
    flow.loss(b, Rng(0)).loss.backward()
    y = flow.network.decode(flow.bottleneck(flow.network.encode(b.x)).z)
    game = flow.discriminator
    own = torch.autograd.grad(hinge(game(b.x), game(y.detach())), list(game.parameters()))
    for p, expected in zip(game.parameters(), own, strict=True):
        torch.testing.assert_close(p.grad, expected)
    last = flow.network.last
    l1, fool = (y - b.x).abs().mean(), -game(y).mean()
    first, second = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (l1, fool))
    ratio = first.norm() / (second.norm() + 1e-6)
    torch.testing.assert_close(last.grad, first + 0.7 * ratio * second)


def test_the_discriminator_is_weighed_against_all_of_the_reconstruction():
    flow = flow_of(
        PlainConfig(4), perceptual=PerceptualConfig(weight=0.3), discriminator=DiscriminatorConfig(width=4, layers=2)
    )
    flow.perceptual = lambda x, y: (y - x).square().flatten(1).mean(1)
    b = batch()
    y = flow.network.decode(flow.bottleneck(flow.network.encode(b.x)).z)
    whole = (y - b.x).abs().mean() + 0.3 * (y - b.x).square().mean()
    expected = adaptive_weight(whole, -flow.discriminator(y).mean(), flow.network.last)
    torch.testing.assert_close(flow.loss(b, Rng(0)).parts["adaptive_weight"], expected)


def test_the_discriminator_doubles_its_width_at_each_layer_up_to_eight_times():
    layers = [m for m in PatchDiscriminator(3, width=2, layers=4).layers if isinstance(m, torch.nn.Conv2d)]
    sizes = [(layer.out_channels, layer.stride[0]) for layer in layers]
    assert sizes == [(2, 2), (4, 2), (8, 2), (16, 2), (16, 1), (1, 1)]


def test_following_the_decoders_gradient_looks_more_real_to_the_discriminator():
    torch.manual_seed(0)
    game = PatchDiscriminator(3, width=4, layers=2)
    y = torch.randn(2, 3, 16, 16, requires_grad=True)
    before = game(y).mean()
    (g,) = torch.autograd.grad(-before, y)
    assert game(y - 0.1 * g / g.norm()).mean() > before


def test_the_discriminator_is_heeded_from_its_start_only():
    flow = flow_of(discriminator=DiscriminatorConfig(start=5, width=4, layers=2))
    assert "adaptive_weight" not in flow.loss(batch(), Rng(0, 4)).parts
    assert "adaptive_weight" in flow.loss(batch(), Rng(0, 5)).parts


def test_the_loss_is_the_absolute_error_and_the_divergence_of_a_picture_by_its_numbers():
    flow = flow_of(GaussianConfig(4, kl=0.3))
    b = batch()
    out = flow.loss(b, Rng(2))
    mean, std = flow.bottleneck.moments(flow.network.encode(b.x))
    z = mean + std * Rng(2).normal("latent", b.position, mean.shape[1:])
    expected = (flow.network.decode(z) - b.x).abs().mean() + 0.3 * gaussian_kl(mean, std).mean() / b.x[0].numel()
    torch.testing.assert_close(out.loss, expected)
    assert set(out.parts) == {"l1", "kl"}


def test_ssim_is_its_formula_in_every_window():
    a = torch.rand(2, 3, 12, 11, dtype=torch.float64) * 2 - 1
    b = (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)
    bell = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    window = torch.tensor([[u * v for u in bell] for v in bell], dtype=torch.float64)
    window /= window.sum()
    each = []
    for top in (0, 1):
        x, y = a[..., top : top + 11, :] + 1, b[..., top : top + 11, :] + 1
        mean = lambda z: (z * window).sum((2, 3))
        mx, my = mean(x), mean(y)
        vx, vy, c = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        each.append((2 * mx * my + 4e-4) * (2 * c + 3.6e-3) / ((mx**2 + my**2 + 4e-4) * (vx + vy + 3.6e-3)))
    torch.testing.assert_close(ssim(a, b), torch.stack(each).mean((0, 2)).float())
    torch.testing.assert_close(ssim(a, a), torch.ones(2))
    torch.testing.assert_close(ssim(a / 2 + 0.5, b / 2 + 0.5, low=0.0, peak=1.0), ssim(a, b))
    dark, light = (torch.full((1, 1, 11, 11), grey / 127.5 - 1) for grey in (126, 130))
    assert float(ssim(dark, light)) == pytest.approx((2 * 126 * 130 + 2.55**2) / (126**2 + 130**2 + 2.55**2), abs=1e-5)
    with pytest.raises(UserError, match="smaller than its window"):
        ssim(a[..., :8], b[..., :8])


# --------------------------------------------------------------------------------------------------------- perceptual part


@pytest.fixture
def graph(tmp_path):
    """Two convolutions with a pool between them."""
    torch.manual_seed(0)
    ops = [
        {"op": "input", "name": "in"},
        {"op": "conv_relu", "name": "a", "inputs": ["in"], "stride": [1, 1], "padding": [1, 1]},
        {"op": "max_pool", "name": "p", "inputs": ["a"], "kernel": [2, 2], "stride": [2, 2]},
        {"op": "conv_relu", "name": "b", "inputs": ["p"], "stride": [1, 1], "padding": [0, 0]},
    ]
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"graph": ops}))
    shapes = {"a.weight": (4, 3, 3, 3), "a.bias": (4,), "b.weight": (5, 4, 3, 3), "b.bias": (5,)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, path.with_suffix(".safetensors"))
    return path


def test_the_perceptual_distance_is_of_unit_features_at_every_stage(graph):
    network = FeatureGraph(graph)
    assert network.stages == ["a", "b"]
    x, y = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    w = load_file(graph.with_suffix(".safetensors"))

    def stages(images):
        a = F.conv2d((images + 1) / 2, w["a.weight"], w["a.bias"], padding=1).relu()
        return a, F.conv2d(F.max_pool2d(a, 2), w["b.weight"], w["b.bias"]).relu()

    each = [
        (a / a.norm(dim=1, keepdim=True).clamp(min=1e-12) - b / b.norm(dim=1, keepdim=True).clamp(min=1e-12))
        .square()
        .sum(1)
        .mean((1, 2))
        for a, b in zip(stages(x), stages(y), strict=True)
    ]
    torch.testing.assert_close(PerceptualDistance(network, 16)(x, y), (each[0] + each[1]) / 2)


@pytest.mark.parametrize("sides", [(64, 64), (16, 64), (40, 24)])
def test_the_perceptual_distance_sees_every_pixel_of_larger_pictures(graph, sides):
    x, y = torch.rand(2, 1, 3, *sides, generator=torch.Generator().manual_seed(0)) * 2 - 1
    far = PerceptualDistance(FeatureGraph(graph), 16)
    (grad,) = torch.autograd.grad(far(x, y.requires_grad_()).sum(), y)
    assert (grad != 0).any(1).all()


def test_a_model_trained_with_perceptual_features_needs_no_file_of_them(graph, tmp_path):
    asked = PerceptualConfig(0.5, str(graph))
    run = train(run_config(tmp_path / "run", perceptual=asked))
    graph.unlink()
    assert load(run).reconstruct(batch().x).shape == (4, 3, 16, 16)


def test_features_that_are_not_there_are_said_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="perceptual: no features 'mixed4'.*or leave perceptual out"):
        train(run_config(tmp_path / "run", perceptual=PerceptualConfig()))


# -------------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(run_config(tmp_path_factory.mktemp("vae") / "vae"))


def test_a_run_leaves_previews_of_pictures_above_their_reconstructions(run):
    assert (run / "previews" / "step-00000002.png").is_file()
    x, captions, columns = load(run).preview(batch(rows=12))
    assert x.shape == (16, 3, 16, 16) and columns == 8
    assert torch.equal(x[:8], batch(rows=12).x[:8])
    assert captions[:8] == [""] * 8 and captions[8].endswith("dB")


def test_a_resumed_run_is_the_run(tmp_path):
    how = {"discriminator": DiscriminatorConfig(width=4, layers=2)}
    straight = train(run_config(tmp_path / "a", steps=4, **how))
    train(run_config(tmp_path / "b", steps=2, **how))
    resumed = train(run_config(tmp_path / "b", steps=4, **how))
    states = [load_file(find_model(run) / "model.safetensors") for run in (straight, resumed)]
    assert states[0].keys() == states[1].keys() and "bottleneck.running" in states[0]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_discriminator_that_is_not_heeded_yet_moves_nothing_of_the_autoencoder(tmp_path):
    """However large its own gradients are beside the bound on theirs."""
    wild = {"discriminator": DiscriminatorConfig(start=4, width=8, layers=2)}
    runs = [train(run_config(tmp_path / name, steps=4, clip=0.01, **how)) for name, how in (("a", {}), ("b", wild))]
    alone, beside = (load_file(find_model(run) / "model.safetensors") for run in runs)
    assert any(name.startswith("discriminator") for name in beside)
    assert all(torch.equal(value, beside[name]) for name, value in alone.items())


def test_encode_and_decode_are_latents_and_pictures(run):
    flow, x = load(run), batch().x
    z = flow.encode(x)
    assert z.shape == (4, 4, 4, 4)
    assert torch.equal(flow.decode(z), flow.reconstruct(x)) and flow.decode(z).abs().max() <= 1
    told = flow.validate(batch())
    assert next(iter(told)) == "validation_loss" and {"validation_psnr", "validation_ssim", "validation_kl"} < set(told)


def test_pictures_that_would_come_back_in_another_size_are_refused():
    flow = flow_of(FSQConfig((4, 4)))
    assert flow.reconstruct(torch.zeros(2, 3, 8, 20)).shape == (2, 3, 8, 20)
    for go in (flow.encode, flow.reconstruct, flow.codes):
        with pytest.raises(UserError, match="15 x 18 is no multiple of the model's factor 4; try 16 x 16"):
            go(torch.zeros(2, 3, 15, 18))
        for shape in ((2, 1, 16, 16), (3, 16, 16)):
            with pytest.raises(UserError, match="the model is of pictures of 3 channels, not of"):
                go(torch.zeros(shape))
        with pytest.raises(UserError, match="not torch.uint8; scale levels as k / 127.5 - 1"):
            go(torch.zeros(2, 3, 8, 20, dtype=torch.uint8))


@pytest.mark.parametrize("bottleneck", [GaussianConfig(4), FSQConfig((5, 4)), VQConfig(12, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_autoencoder_that_is_cast_still_encodes_and_decodes(bottleneck, dtype):
    flow, x = flow_of(bottleneck), batch().x
    z, y = flow.encode(x), flow.decode(flow.encode(x))
    flow.to(dtype)
    assert float(((flow.encode(x) - z).abs() < 0.05).float().mean()) > 0.9  # but for latents between two codes
    torch.testing.assert_close(flow.decode(z), y, rtol=0, atol=0.05)


def test_an_autoencoder_draws_nothing_and_has_no_likelihood(run):
    flow = load(run)
    with pytest.raises(UserError, match="nothing says which latents are likely"):
        flow.sample([""], seeds=[0])
    with pytest.raises(UserError, match="no likelihood of pictures"):
        flow.log_prob(batch().x)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"network": {"latent_channels": 8}},
            "the model gives 8 channels and reads 8, the bottleneck reads 8 and gives 4",
        ),
        ({"network": {"in_channels": 1}}, "pictures of 1 channels"),
        ({"shape": (3, 18, 16)}, "18 x 16 is no multiple of the model's factor 4"),
        ({"text": LabelsConfig(("a",), dim=2)}, "hears no text"),
        ({"config": {"discriminator": DiscriminatorConfig(layers=4)}}, "4 layers need pictures of 64 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    network = {"width": 8, "factor": 4, "in_channels": 3, "encoder_channels": 8, "latent_channels": 4}
    network = TinyAutoencoderConfig(**{**network, **change.get("network", {})}).build()
    text = change.get("text", NoTextConfig()).build()
    with pytest.raises(UserError, match=says):
        AutoencoderFlowConfig(GaussianConfig(4), **change.get("config", {})).build(
            network, text, shape=change.get("shape", (3, 16, 16))
        )


def test_a_network_that_encodes_nothing_is_refused(tmp_path):
    config = run_config(tmp_path / "run")
    with pytest.raises(UserError, match="UNet is no autoencoder; take model tiny_autoencoder"):
        train(RunConfig(**{**vars(config), "model": UNetConfig(channels=8, channel_mult=(1,), blocks=1)}))


# ----------------------------------------------------------------------------------------------------------- latents of runs


def latent_config(out, run, *, steps=2):
    return RunConfig(
        data=EmojiConfig(size=16, limit=24),
        model=UNetConfig(channels=8, channel_mult=(1,), blocks=1, attention_size=0),
        flow=LatentFlowConfig(TrainedAutoencoderConfig(str(run)), RectifiedFlowConfig()),
        train=TrainConfig(steps=steps, batch_size=8, precision="fp32", trackers=(), preview_every=0),
        out=str(out),
    )


def test_a_flow_of_a_trained_autoencoders_latents_sees_unit_variance_and_holds_it(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "vae")
    flow = load(train(latent_config(tmp_path / "latent", moved)))
    vae = load(run)
    assert flow.flow.shape == (4, 4, 4)  # the network's channels and size are the latents'
    for name, value in vae.network.state_dict().items():
        assert torch.equal(value, flow.autoencoder.network.state_dict()[name])
    x = batch(rows=64).x
    z = flow.to_latents(x)
    torch.testing.assert_close(z, (vae.encode(x) - vae.bottleneck.shift) * vae.bottleneck.scale)
    torch.testing.assert_close(flow.reconstruct(x), vae.reconstruct(x), atol=1e-5, rtol=0)
    shutil.rmtree(moved)
    assert load(tmp_path / "latent").sample([""], seeds=[0]).x.shape == (1, 3, 16, 16)
    recipe = json.loads((find_model(tmp_path / "latent") / "config.json").read_text())["flow"]["autoencoder"]
    assert recipe["recipe"]["model"]["name"] == "tiny_autoencoder" and len(recipe["sha256"]) == 64


def test_a_run_goes_on_without_the_autoencoders_folder_by_its_own_config(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "vae")
    out = train(latent_config(tmp_path / "latent", moved))
    shutil.rmtree(moved)
    train(out / "config.yaml", ["train.steps=3"])
    straight = train(latent_config(tmp_path / "straight", run, steps=3))
    mine, theirs = (load_file(find_model(each) / "model.safetensors") for each in (out, straight))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(UserError, match="does not exist"):
        train(out / "config.yaml")


def test_a_run_resumed_with_another_autoencoder_is_refused(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "vae")
    out = tmp_path / "latent"
    train(latent_config(out, moved))
    train(run_config(moved, steps=3))
    with pytest.raises(UserError, match=r"holds a run with flow\.autoencoder\.sha256=.*choose another `out`"):
        train(latent_config(out, moved, steps=4))
    with pytest.raises(UserError, match=r"has other weights \(.*than the config tells"):
        train(out / "config.yaml", ["train.steps=4"])


def test_runs_that_hold_no_such_part_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="has no tokens; take it as autoencoder"):
        TrainedTokenizerConfig(str(run)).build()
    other = train(latent_config(tmp_path / "latent", run))
    with pytest.raises(UserError, match="holds a LatentFlow; a trained autoencoder is one of flow autoencoder"):
        TrainedAutoencoderConfig(str(other)).build()
    with pytest.raises(UserError, match="does not exist"):
        TrainedAutoencoderConfig(str(tmp_path / "nothing")).build()


# ----------------------------------------------------------------------------------------------------- others' autoencoders


def test_weights_in_taesds_layout_are_read_with_their_configuration(tmp_path):
    config = TinyAutoencoderConfig(
        width=8, blocks=2, factor=4, wide=True, in_channels=3, encoder_channels=5, latent_channels=5
    )
    network = config.build()
    for half in ("encoder", "decoder"):
        state = {name: value.half() for name, value in getattr(network, half).state_dict().items()}
        save_file(state, tmp_path / f"tiny_{half}.safetensors")
    flow = load_taef(tmp_path, size=16)
    assert flow.network.config == config
    x = batch().x
    torch.testing.assert_close(flow.encode(x), network.encode(x), atol=5e-3, rtol=5e-3)
    flow.measure(x)
    z = (flow.encode(x) - flow.bottleneck.shift) * flow.bottleneck.scale
    assert abs(z.mean()) < 1e-4 and abs(z.std() - 1) < 1e-2
    save_model(tmp_path / "model", config=flow.recipe, state=flow.state_dict())
    held = TrainedAutoencoderConfig(str(tmp_path / "model")).build()
    assert torch.equal(held.posterior(x)[0], flow.encode(x)) and torch.equal(held.scale, flow.bottleneck.scale)
    (tmp_path / "tiny_decoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"no files are named \*_decoder.safetensors"):
        load_taef(tmp_path)


def test_taef2_gives_real_emoji_back():
    if "GENFLOW_TAEF2" not in os.environ:
        pytest.skip("GENFLOW_TAEF2 does not say where taef2_encoder.safetensors and taef2_decoder.safetensors are")
    x = as_samples(read_real(EmojiConfig(size=64).build("test_pair"), (3, 64, 64), most=8, hashed=0).x)[:8]
    assert psnr(load_taef(os.environ["GENFLOW_TAEF2"]).reconstruct(x), x).mean() > 28


def test_a_kl_autoencoder_is_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    built = KLNetworkConfig((8, 16), groups=4, in_channels=3, latent_channels=4).build()
    flow = AutoencoderFlowConfig(GaussianConfig(4)).build(built, NoTextConfig().build(), shape=(3, 16, 16)).eval()
    x = batch().x
    flow.measure(x)
    autoencoder_to_diffusers(flow).save_pretrained(tmp_path)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(flow.encode(x), theirs.encode(x).latent_dist.mean)
        torch.testing.assert_close(flow.reconstruct(x), theirs(x).sample.clamp(-1, 1))
    assert theirs.config.scaling_factor == pytest.approx(float(flow.bottleneck.scale))
    assert len(list(built.blocks)) == 2 * 2 + (1 + 1) + (2 + 2)
    flow.train().loss(batch(), Rng(0)).loss.backward()
    assert flow.network.last.grad.abs().sum() > 0


def test_a_kl_autoencoder_has_no_tokens():
    with pytest.raises(UserError, match="it gives means and variances, 8 channels, and the bottleneck reads 4"):
        KLNetworkConfig((32,), in_channels=3, encoder_channels=4, latent_channels=4).build()


# -------------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_measures_what_is_lost_on_the_way_there_and_back(run):
    flow, network = load(run), PixelFeatures()
    data = EmojiConfig(size=16, limit=24)
    found = evaluate(flow, data, Plan(("reconstruction",), n=6), name="emoji", features=network)
    values = {figure.name: figure.value for figure in found.figures}
    x = as_samples(read_real(data.build("test"), flow.shape, most=6, hashed=0).x[:6])
    y = ((flow.reconstruct(x) + 1) * 127.5).round() / 127.5 - 1
    assert values["PSNR, dB"] == pytest.approx(float(psnr(y, x).mean()), rel=1e-4)
    assert values["SSIM"] == pytest.approx(float(ssim(y, x).mean()), rel=1e-3)
    assert values["FD to reconstructions"] == pytest.approx(frechet_distance(x.flatten(1), y.flatten(1)), rel=1e-3)


def test_features_with_stages_also_tell_the_perceptual_distance(run, graph):
    flow, network = load(run), graph_features(graph)
    data = EmojiConfig(size=16, limit=24)
    found = evaluate(flow, data, Plan(("reconstruction",), n=6), name="emoji", features=network)
    values = {figure.name: figure.value for figure in found.figures}
    x = as_samples(read_real(data.build("test"), flow.shape, most=6, hashed=0).x[:6])
    y = ((flow.reconstruct(x) + 1) * 127.5).round() / 127.5 - 1
    wanted = PerceptualDistance(network.graph, 128)(y, x).mean()
    assert values["perceptual distance"] == pytest.approx(float(wanted), rel=1e-3)


def test_an_autoencoder_is_measured_by_what_it_can_honestly_have(run):
    found = evaluate(load(run), EmojiConfig(size=16, limit=24), Plan(n=6), name="emoji", features=PixelFeatures())
    assert found.metrics == ["loss", "reconstruction"]
    assert "draws no pictures" in found.left_out["fd"] and "no likelihood" in found.left_out["likelihood"]
    with pytest.raises(UserError, match="fd: an autoencoder draws no pictures"):
        evaluate(load(run), EmojiConfig(size=16), Plan(("fd",), n=6), name="emoji", features=PixelFeatures())


def test_a_flow_of_latents_can_be_asked_what_its_autoencoder_loses(run, tmp_path):
    flow = load(train(latent_config(tmp_path / "latent", run)))
    how = {"name": "emoji", "features": PixelFeatures()}
    found = evaluate(flow, EmojiConfig(size=16, limit=24), Plan(("reconstruction",), n=6), **how)
    own = evaluate(load(run), EmojiConfig(size=16, limit=24), Plan(("reconstruction",), n=6), **how)
    assert found.figures[0].value == pytest.approx(own.figures[0].value, rel=1e-4)
    assert "reconstruction" not in evaluate(flow, EmojiConfig(size=16, limit=24), Plan(n=2), **how).metrics
    with pytest.raises(UserError, match="reconstruction: a RectifiedFlow has no autoencoder"):
        evaluate(flow.flow, EmojiConfig(size=16, limit=24), Plan(("reconstruction",), n=6), **how)


def test_the_measured_scale_and_shift_follow_latents_that_move():
    plain = PlainConfig(1).build().train()
    for step in range(600):
        plain(torch.full((1, 1, 1, 1), float(step >= 300)), Rng(0, step), torch.arange(1))
    assert abs(plain.shift - (1 - 0.99**300)) < 0.01


def test_the_perceptual_distance_counts_by_its_weight(graph):
    flow, b = flow_of(PlainConfig(4), perceptual=PerceptualConfig(0.3, str(graph))), batch()
    flow.prepare_training()
    out = flow.loss(b, Rng(0))
    assert out.parts["perceptual"] > 0
    torch.testing.assert_close(out.loss.detach(), out.parts["l1"] + 0.3 * out.parts["perceptual"])


def test_validation_tells_the_loss_without_chance_and_the_figures_of_pictures_in_range():
    flow, b = flow_of(GaussianConfig(4, kl=0.3)), batch()
    with torch.no_grad():
        for p in flow.network.parameters():
            p.mul_(3)  # so that pictures leave -1 .. 1
        mean, std = flow.bottleneck.moments(flow.network.encode(b.x))
        y = flow.network.decode(mean)
    told = flow.validate(b)
    expected = (y - b.x).abs().mean() + 0.3 * gaussian_kl(mean, std).mean() / b.x[0].numel()
    torch.testing.assert_close(told["validation_loss"], expected)
    assert y.abs().max() > 1
    torch.testing.assert_close(told["validation_psnr"], psnr(y.clamp(-1, 1), b.x).mean())
    assert flow.reconstruct(b.x).abs().max() <= 1


def test_features_of_other_channels_than_the_pictures_are_refused(graph):
    network = TinyAutoencoderConfig(
        width=8, blocks=1, factor=4, in_channels=2, encoder_channels=4, latent_channels=4
    ).build()
    config = AutoencoderFlowConfig(PlainConfig(4), perceptual=PerceptualConfig(0.5, str(graph)))
    flow = config.build(network, NoTextConfig().build(), shape=(2, 16, 16))
    with pytest.raises(UserError, match="its features are of 3 channels, pictures have 2"):
        flow.prepare_training()


def test_a_trained_autoencoder_is_in_full_precision_inside_autocast(run):
    part = TrainedAutoencoderConfig(str(run)).build()
    x = batch().x
    z, _ = part.posterior(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = part.posterior(x)[0]
    assert torch.equal(inside, z)


def test_pictures_of_two_sizes_have_no_ssim():
    for a, b in (((3, 16, 16), (3, 16, 16)), ((2, 3, 16, 16), (2, 1, 16, 16))):
        with pytest.raises(UserError, match="ssim: pictures of .* give both as B x C x H x W of one size"):
            ssim(torch.zeros(a), torch.zeros(b))
