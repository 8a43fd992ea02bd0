"""What is asked at the edges: other shapes, sizes, dtypes and settings than those a model or a sampler is for."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from genflow.errors import UserError
from genflow.flows.bijections.elementwise import ActNorm, Affine
from genflow.flows.bijections.linear import InvertibleConv1x1
from genflow.flows.densities import LogitNormal
from genflow.flows.divergence import modules_of
from genflow.flows.models.glow import GlowConfig
from genflow.flows.normalizing import NormalizingFlowConfig
from genflow.flows.paths import VPPath
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.reflow import draw_pairs
from genflow.flows.sampling import SolveConfig
from genflow.functional import Rng
from genflow.networks.mmdit import MMDiTConfig
from genflow.networks.token_transformer import TokenTransformerConfig
from genflow.networks.unet import UNetConfig
from genflow.networks.velocity import MLPVelocityConfig
from genflow.samplers import cfg, euler, psnr
from genflow.samplers.grids import log_snr_uniform
from genflow.text.none import NoTextConfig
from genflow.text.trained import LearnedTextConfig


def glow():
    torch.manual_seed(0)
    network = GlowConfig(shape=(3, 8, 8), levels=2, steps=1, hidden=8, condition_dim=0).build()
    return NormalizingFlowConfig().build(network, NoTextConfig().build(), shape=(3, 8, 8))


def rectified(**config):
    torch.manual_seed(0)
    text = LearnedTextConfig(dim=8, layers=1, heads=2, max_tokens=4).build()
    sizes = {"in_channels": 3, "patch_size": 2, "sample_size": 4, "depth": 1, "hidden": 16, "heads": 2}
    network = MMDiTConfig(**sizes, context_dim=text.context_dim, pooled_dim=text.pooled_dim)
    return RectifiedFlowConfig(**config).build(network.build(), text, shape=(3, 8, 8))


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 4, 16), (12, 4, 4), (192,)])
def test_a_density_is_of_its_own_shape_alone(shape):
    flow, x = glow(), torch.zeros(2, *shape)
    for verb in (flow.log_prob, flow.encode, flow.decode):
        with pytest.raises(UserError, match=r"the flow is of samples B x 3 x 8 x 8, not 2 x"):
            verb(x)


def test_bytes_are_no_pictures_to_a_flow():
    x, flow = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), rectified()
    batch = SimpleNamespace(x=x, condition=flow.text.encode(["", ""]), position=torch.arange(2))
    verbs = [glow().log_prob, glow().encode, flow.log_prob, flow.encode, lambda x: flow.loss(batch, Rng(0))]
    for verb in verbs:
        with pytest.raises(UserError, match=r"not torch.uint8; scale levels as k / 127.5 - 1"):
            verb(x)


def test_a_bijection_without_parameters_has_a_density():
    flow = NormalizingFlowConfig().build(Affine((3,), 2.0), NoTextConfig().build(), shape=(3,))
    normal = torch.distributions.Normal(0.0, 0.5)
    x = torch.randn(4, 3)
    assert_close(flow.log_prob(x), normal.log_prob(x).sum(1))


def test_float64_samples_meet_float32_weights():
    flow, x = glow(), torch.rand(2, 3, 8, 8) - 0.5
    assert_close(flow.log_prob(x.double()), flow.log_prob(x))
    assert flow.double().log_prob(x).dtype == torch.float64


@pytest.mark.parametrize("make", [ActNorm, InvertibleConv1x1, lambda shape: Affine(shape, 2.0)])
def test_volumes_are_those_of_the_picture_that_comes(make):
    torch.manual_seed(0)
    layer = make((2, 4, 4))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if isinstance(layer, ActNorm):
        layer.initialised.fill_(True)
    layer.double()
    x = torch.randn(1, 2, 3, 5, dtype=torch.float64)
    z, ladj = layer(x)
    jacobian = torch.autograd.functional.jacobian(lambda a: layer(a.view_as(x))[0].flatten(), x.flatten())
    assert_close(ladj, torch.linalg.slogdet(jacobian).logabsdet[None], rtol=1e-5, atol=1e-5)
    back, _ = layer.inverse(z)
    assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_a_network_behind_guidance_is_seen():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    velocity = cfg(lambda x, t: network(x), (), (), 1.0)
    assert network[1] in [module for _, module in modules_of(velocity)]
    flow = rectified()
    with pytest.raises(UserError, match="bfloat16"):
        flow.to(torch.bfloat16).log_prob(torch.zeros(1, 3, 8, 8), rtol=1e-4)


def test_samplers_that_go_by_what_the_network_says_take_no_cache():
    for sampler in ("dopri5", "speculative"):
        with pytest.raises(UserError, match=f"cache = 0.1: sampler '{sampler}'"):
            SolveConfig(sampler=sampler, cache=0.1)
    with pytest.raises(UserError, match="shift"):
        SolveConfig(grid="uniform", shift="resolution")


def test_pairs_have_the_size_that_was_asked_for():
    noise, made = draw_pairs(rectified(), [""], [1, 2, 3], batch=2, size=16, steps=2)
    assert noise.shape == made.shape == (3, 3, 16, 16)


def test_times_before_a_paths_first_are_not_trained():
    path = replace(VPPath(), s_min=0.2)
    flow = rectified(path=path, prediction="v")
    seen = []
    flow.network.forward = lambda x, s, *_, **__: (seen.append(s), x)[1]
    condition = flow.text.encode([""] * 64)
    flow.loss(SimpleNamespace(x=torch.zeros(64, 3, 8, 8), condition=condition, position=torch.arange(64)), Rng(0))
    assert float(seen[0].min()) == pytest.approx(0.2, rel=1e-5)
    assert rectified().first == 0


def test_a_batch_of_single_numbers_has_a_status_a_speed_and_a_ratio():
    solution = euler(lambda x, t: x, torch.randn(5), [1.0, 0.5, 0.0], record=True)
    assert solution.ok and solution.trajectory.speed.shape == (2, 5)
    assert psnr(torch.zeros(5), torch.ones(5)).shape == (5,)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="channels = 33 must be even; try 34"):
        UNetConfig(channels=33)
    with pytest.raises(UserError, match=r"size = 8.0 is neither"):
        rectified().sample([""], seeds=[0], size=8.0)
    with pytest.raises(UserError, match="the flow is of samples B x 3 x H x W, not 1 x 1 x 8 x 8"):
        rectified().encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match="not 0 < t_min"):
        log_snr_uniform(3, t_min=0.0)


def test_the_density_of_times_is_nothing_at_the_ends():
    t = torch.tensor([0.0, 0.5, 1.0])
    assert LogitNormal().pdf(t).tolist() == pytest.approx([0, 4 / math.sqrt(2 * math.pi), 0])


@pytest.mark.parametrize(
    ("config", "name"),
    [(UNetConfig, "pooled_dim"), (MLPVelocityConfig, "pooled_dim"), (TokenTransformerConfig, "context_dim")],
)
def test_a_condition_of_fewer_than_no_numbers_is_refused(config, name):
    with pytest.raises(UserError, match=f"^{name} = -1 is too few; the least is 0$"):
        config(**{name: -1})
