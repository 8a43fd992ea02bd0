"""Flows of other families in latents, and latents that no autocast rounds."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from genflow.errors import UserError
from genflow.flows.dequantization import GaussianDequantization, UniformDequantization
from genflow.flows.latent import LatentFlowConfig
from genflow.flows.models.tarflow import TarFlowConfig
from genflow.flows.normalizing import NormalizingFlowConfig, standard_normal
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.functional import Rng, noise_from_seeds
from genflow.interop.autoencoder import KLAutoencoderConfig
from genflow.networks.mmdit import MMDiTConfig
from genflow.text.none import NoTextConfig

VAE = KLAutoencoderConfig(channels=(32, 32), latent_channels=4, layers=1, scale=1.3, shift=0.1, middle_attention=False)


def tarflow(marginals=False, **config):
    torch.manual_seed(0)
    network = TarFlowConfig(
        patch=2, blocks=2, layers=1, width=32, shape=(4, 8, 8), condition_dim=0, marginals=marginals
    )
    flow = LatentFlowConfig(VAE, NormalizingFlowConfig(**config)).build(
        network.build(), NoTextConfig().build(), shape=(3, 16, 16)
    )
    for p in flow.flow.network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return flow


def batch(n=3):
    x = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return SimpleNamespace(x=x, condition=NoTextConfig().build().encode([""] * n), position=torch.arange(n))


def test_a_tarflow_of_latents_learns_their_density_in_nats():
    flow, given = tarflow(), batch()
    z = flow.to_latents(given.x)
    assert float((z * 127.5 + 127.5).frac().abs().max()) > 0.1  # on no grey levels
    u, ladj = flow.flow.network(z)
    told = flow.validate(given)["validation_loss"]
    assert_close(told, -(standard_normal(u) + ladj).mean())
    out = flow.loss(given, Rng(0))
    assert set(out.parts) == {"nll"}
    out.loss.backward()
    assert all(math.isfinite(float(p.grad.sum())) for p in flow.flow.network.parameters() if p.grad is not None)


def test_its_samples_are_pictures_of_latents_that_may_leave_the_range_of_pictures():
    flow = tarflow()
    z = flow.flow.sample([""], seeds=[0, 1, 2, 3], temperature=2.0).x
    assert z.shape == (4, 4, 8, 8) and float(z.abs().max()) > 1
    x = flow.sample([""], seeds=[0, 1, 2, 3], temperature=2.0).x
    assert_close(x, flow.to_pictures(z), rtol=1e-4, atol=1e-4)
    given = batch().x
    assert_close(flow.decode(flow.encode(given)), flow.reconstruct(given), rtol=1e-3, atol=1e-3)


def test_noise_that_is_added_to_latents_is_taken_off_by_tweedies_formula():
    sigma = 0.3
    flow, given = tarflow(dequantization=GaussianDequantization(sigma)), batch()
    z = flow.to_latents(given.x)
    noisy, log_q = flow.flow.dequantize(z, Rng(0), given.position)
    assert_close(noisy - z, sigma * Rng(0).normal("dequantize", given.position, z.shape[1:]), rtol=1e-4, atol=1e-6)
    assert float(log_q.abs().max()) == 0
    plain = tarflow()
    ours = flow.flow.sample([""], seeds=[5]).x
    theirs = plain.flow.sample([""], seeds=[5]).x.requires_grad_()
    u, ladj = plain.flow.network(theirs)
    (score,) = torch.autograd.grad((standard_normal(u) + ladj).sum(), theirs)
    assert_close(ours, (theirs + sigma**2 * score).detach(), rtol=1e-3, atol=1e-4)


def test_what_is_of_grey_levels_is_refused_in_latents():
    with pytest.raises(
        UserError, match="dequantization uniform is for pictures of grey levels; latents are continuous"
    ):
        tarflow(dequantization=UniformDequantization())
    with pytest.raises(UserError, match="take marginals: false"):
        tarflow(marginals=True)


def mmdit():
    network = MMDiTConfig(depth=1, hidden=16, heads=2, in_channels=4, sample_size=4, context_dim=8, pooled_dim=8)
    return LatentFlowConfig(VAE, RectifiedFlowConfig()).build(
        network.build(), NoTextConfig().build(), shape=(3, 16, 16)
    )


def test_a_size_that_the_networks_patches_do_not_divide_is_told_in_pixels():
    with pytest.raises(
        UserError, match="22 x 22 is no multiple of 4, the autoencoder's 2 x the network's 2; try 24 x 24"
    ):
        mmdit().sample([""], seeds=[0], steps=1, size=22)


def test_no_autocast_rounds_the_latents_that_training_sees():
    flow = mmdit()
    x = batch().x
    with torch.autocast("cpu", torch.bfloat16):
        under = flow.to_latents(x)
    assert under.dtype == torch.float32 and torch.equal(under, flow.to_latents(x))


def test_the_autoencoder_stays_frozen_and_in_eval_mode_in_training():
    flow = tarflow().train()
    assert flow.flow.training and not any(m.training for m in flow.autoencoder.modules())
    assert not any(p.requires_grad for p in flow.autoencoder.parameters())


def test_pictures_of_latents_stay_within_the_range_of_pictures():
    flow = tarflow()
    flow.autoencoder.decode = lambda z: z[:, :3]
    x = flow.to_pictures(torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1, 1).expand(3, 4, 8, 8))
    assert float(x.min()) == -1 and float(x.max()) == 1


def test_latents_of_a_velocity_may_leave_the_range_of_pictures():
    flow = LatentFlowConfig(VAE, RectifiedFlowConfig()).build(
        torch.nn.Conv2d(4, 4, 1), NoTextConfig().build(), shape=(3, 16, 16)
    )
    flow.flow.velocity_of = lambda predict, z, t: torch.zeros_like(z)
    z = flow.flow.sample([""], seeds=[0, 1], steps=2).x
    assert_close(z, noise_from_seeds([0, 1], (4, 8, 8)))
    assert float(z.abs().max()) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_latent_flow_that_is_cast_as_a_whole_still_goes_there_and_back(dtype):
    flow, x = tarflow(), batch().x
    z, y = flow.to_latents(x), flow.reconstruct(x)
    flow.to(dtype)
    for got, wanted in ((flow.to_latents(x), z), (flow.reconstruct(x), y)):
        assert got.dtype == torch.float32
        assert_close(got, wanted, rtol=0, atol=0.05)


def test_bytes_are_no_pictures_to_an_autoencoder():
    with pytest.raises(UserError, match="not torch.uint8; scale levels as k / 127.5 - 1"):
        tarflow().encode(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
