"""Bijections and normalizing flows at their edges: no samples, outliers, other shapes and dtypes, foreign weights."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call, vmap

from genflow.errors import UserError
from genflow.flows.bijections.autoregressive import MaskedAutoregressive
from genflow.flows.bijections.base import Bijection, Chain, per_sample
from genflow.flows.bijections.elementwise import ActNorm
from genflow.flows.bijections.jet import ViTCoupling
from genflow.flows.bijections.linear import InvertibleConv1x1
from genflow.flows.bijections.marginals import Marginals
from genflow.flows.bijections.residual import ResidualBlock
from genflow.flows.bijections.shapes import Squeeze
from genflow.flows.bijections.transformer import guide
from genflow.flows.dequantization import VariationalDequantization
from genflow.flows.models.ffjord import FFJORDConfig
from genflow.flows.models.glow import GlowConfig
from genflow.flows.models.nsf import NSFConfig
from genflow.flows.models.realnvp import RealNVPConfig
from genflow.flows.models.tarflow import TarFlowConfig
from genflow.flows.normalizing import NormalizingFlowConfig
from genflow.functional import Rng
from genflow.networks.lipschitz import ContractedLinear
from genflow.networks.quantizers import VQConfig
from genflow.text.none import NoTextConfig
from tests.noise import shaken

PICTURES = (1, 4, 4)


def normalizing(model, **config):
    network = replace(model, shape=PICTURES, condition_dim=0).build()
    return NormalizingFlowConfig(**config).build(network, NoTextConfig().build(), shape=PICTURES)


@pytest.mark.parametrize(
    "model",
    [
        GlowConfig(levels=1, steps=1, hidden=8),
        TarFlowConfig(blocks=1, layers=1, width=16, heads=1, patch=2, marginals=True),
        FFJORDConfig(hidden=(4,)),
    ],
)
@pytest.mark.parametrize("dequantization", [None, VariationalDequantization(hidden=4, steps=1)])
def test_no_samples_go_through_every_verb(model, dequantization):
    flow, x = normalizing(model, dequantization=dequantization), torch.zeros(0, *PICTURES)
    assert flow.log_prob(x).shape == flow.bits_per_dim(x).shape == (0,)
    assert flow.encode(x).shape == flow.decode(x).shape == x.shape


@pytest.mark.parametrize(
    "model",
    [
        GlowConfig(levels=1, steps=1, hidden=8),
        RealNVPConfig(levels=1, hidden=8),
        NSFConfig(levels=1, steps=1, hidden=8),
        FFJORDConfig(hidden=(4,), divergence="exact"),
    ],
)
@pytest.mark.parametrize("dequantization", [None, VariationalDequantization(hidden=4, steps=1)])
def test_a_flow_of_wide_weights_goes_through_every_verb(model, dequantization):
    torch.manual_seed(0)
    flow = shaken(normalizing(model, dequantization=dequantization), 0.1)
    wide, x = copy.deepcopy(flow).double(), torch.randint(0, 256, (3, *PICTURES)) / 127.5 - 1
    batch = SimpleNamespace(x=x, condition=flow.text.encode([""] * 3), position=torch.arange(3))
    for verb in (
        lambda each: each.loss(batch, Rng(0)).loss,
        lambda each: each.validate(batch)["validation_loss"],
        lambda each: each.bits_per_dim(x, k=2),
        lambda each: each.sample([""], seeds=[0, 1]).x,
    ):
        torch.testing.assert_close(verb(wide).float(), verb(flow), rtol=0, atol=1e-3)


def test_samples_that_are_not_finite_are_told_where_there_are_marginals():
    flow = normalizing(TarFlowConfig(blocks=1, layers=1, width=16, heads=1, patch=2, marginals=True))
    with torch.no_grad():
        for p in flow.parameters():
            p.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        flow.sample([""], seeds=[0, 1])


def test_sampling_leaves_the_inverse_of_a_tarflow_as_it_was():
    torch.manual_seed(0)
    flow = normalizing(TarFlowConfig(blocks=2, layers=1, width=16, heads=1, patch=1)).eval()
    z = torch.randn(3, *PICTURES)
    shaken(flow.network, 0.3)
    before = flow.decode(z)
    for inverse in ("jacobi", "measured", "measured"):
        flow.sample([""], seeds=[0], inverse=inverse)
        assert torch.equal(flow.decode(z), before)


class Heard(Bijection):
    """The identity, that keeps the condition that it was given."""

    condition_dim = 2

    def forward(self, x, condition=None):
        self.condition = condition
        return x, per_sample(torch.zeros_like(x))

    inverse = forward


def test_a_normalizing_flow_hides_what_its_text_encoder_hides_in_training():
    text = NoTextConfig().build()
    text.drop = lambda condition, rng, position: replace(
        condition, pooled=condition.pooled * (rng.uniform("drop_part", position) < 0.5)[:, None]
    )
    flow = NormalizingFlowConfig().build(Heard(), text, shape=(3,))
    position = torch.arange(8)
    condition = replace(text.encode([""] * 8), pooled=torch.ones(8, 2))
    flow.loss(SimpleNamespace(x=torch.zeros(8, 3), condition=condition, position=position), Rng(4))
    assert torch.equal(flow.network.condition[:, 0] == 1, Rng(4).uniform("drop_part", position) < 0.5)


# ------------------------------------------------------------------------------------------------------------- bijections


def test_an_outlier_does_not_spoil_the_inverses_of_its_mates():
    torch.manual_seed(0)
    made = shaken(ResidualBlock((2,), hidden=(16,)).eval(), 2.0)
    x = torch.randn(4, 2)
    with torch.no_grad():
        z = made(x)[0]
        alone = made.decode(z)
        beside = made.decode(torch.cat([z, torch.full((1, 2), 1e6)]))
    torch.testing.assert_close(alone, x, rtol=0, atol=5e-6)
    torch.testing.assert_close(beside[:4], alone, rtol=0, atol=2e-7)


def test_the_weights_of_a_1x1_convolution_are_never_those_of_before():
    torch.manual_seed(0)
    made, x = InvertibleConv1x1((64,)).eval(), torch.eye(64)
    base = {name: p.detach() for name, p in made.named_parameters()}
    with torch.no_grad():
        for i in range(30):
            weights = {name: p * (1 + 0.1 * i) for name, p in base.items()}
            z = functional_call(made, weights, (x,))[0]
            fresh = copy.deepcopy(made)
            fresh._cached = {}
            assert torch.equal(z, functional_call(fresh, weights, (x,))[0])
            del weights, z, fresh
        stacked = {name: torch.stack([p, 2 * p]) for name, p in base.items()}
        each = vmap(lambda weights: functional_call(made, weights, (x,))[0])(stacked)
        torch.testing.assert_close(each[0], made(x)[0])
    with torch.inference_mode():
        made = InvertibleConv1x1((3,)).eval()
        assert made.inverse(made(torch.eye(3))[0])[0].allclose(torch.eye(3), atol=1e-5)


@pytest.mark.parametrize("make", [lambda: InvertibleConv1x1((4,)), lambda: ContractedLinear(4, 4, 0.9)])
@torch.no_grad()
def test_a_copy_in_the_memory_of_the_original_has_its_own_weights(make):
    torch.manual_seed(0)
    made, x = copy.deepcopy(make()).eval(), torch.eye(4)  # a copy too, lest the counts of changes tell them apart
    made(x)
    copied = copy.deepcopy(made)
    for mine, its in zip([*copied.parameters(), *copied.buffers()], [*made.parameters(), *made.buffers()], strict=True):
        mine.data = its.data
    changed = next(copied.parameters())
    changed.data.mul_(-3)  # uncounted, as where freed memory was filled anew
    fresh = make().eval()
    fresh.load_state_dict(copied.state_dict())
    torch.testing.assert_close(copied(x), fresh(x))


@pytest.mark.parametrize("make", [lambda: InvertibleConv1x1((4,)), lambda: ContractedLinear(4, 4, 0.9)])
@torch.no_grad()
def test_an_average_of_weights_kept_by_data_is_what_answers(make):
    torch.manual_seed(0)
    average, model, x = make().eval(), make(), torch.eye(4)
    average(x)
    for mine, its in zip(average.parameters(), model.parameters(), strict=True):
        mine.data.mul_(0.5).add_(its.data, alpha=0.5)
    fresh = make().eval()
    fresh.load_state_dict(average.state_dict())
    torch.testing.assert_close(average(x), fresh(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "model",
    [
        GlowConfig(levels=2, steps=1, hidden=8, shape=(3, 4, 4)),
        GlowConfig(levels=1, steps=1, hidden=8, coupling="additive", shape=(3, 4, 4)),
        RealNVPConfig(levels=2, hidden=8, shape=(3, 4, 4)),
        NSFConfig(steps=1, hidden=8, shape=(4,)),
    ],
)
def test_half_weights_are_a_map_in_float32_of_networks_in_half_precision(model, dtype):
    torch.manual_seed(0)
    half = shaken(replace(model, condition_dim=2).build(), 0.1).to(dtype)
    exact, x, condition = copy.deepcopy(half).float(), torch.rand(3, *model.shape), torch.randn(3, 2)
    z, ladj = half(x, condition)
    assert z.dtype == ladj.dtype == torch.float32
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(z, exact(x, condition)[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(half.inverse(z, condition)[0], x, rtol=tolerance, atol=tolerance)


def test_linear_maps_of_half_weights_round_nothing():
    torch.manual_seed(0)
    half = shaken(Chain([ActNorm((12, 4, 4)), InvertibleConv1x1((12, 4, 4))])).half()
    exact, x = copy.deepcopy(half).float(), torch.rand(3, 12, 4, 4)
    torch.testing.assert_close(half(x), exact(x))
    torch.testing.assert_close(half.inverse(x), exact.inverse(x))


@pytest.mark.parametrize("bound", [math.inf, 0.0, math.nan])
def test_a_spline_without_bounds_is_refused(bound):
    with pytest.raises(UserError, match=r"bound = .* must be positive and finite"):
        MaskedAutoregressive((3,), univariate="spline", bound=bound)


@pytest.mark.parametrize("far", [9.0, 12.0, 1e4])
def test_marginals_have_a_density_however_far_away(far):
    made = Marginals((1, 1, 2))
    x = torch.tensor([far, -far]).view(1, 1, 1, 2).requires_grad_()
    z, ladj = made(x)
    log_prob = (-0.5 * (z.square() + math.log(2 * math.pi))).sum() + ladj[0]
    expected = 2 * (-math.log(258) - math.log(0.1) - (far - 1) / 0.1)  # one of 258 cells, and its tail
    assert log_prob.item() == pytest.approx(expected, rel=1e-5)
    (grad,) = torch.autograd.grad(log_prob, x)
    torch.testing.assert_close(grad.flatten(), torch.tensor([-10.0, 10.0]))


def test_a_vit_coupling_takes_half_precision_and_refuses_other_pictures():
    torch.manual_seed(0)
    made, x = shaken(ViTCoupling((2, 4, 4), width=16, depth=1, heads=1, patch=2), 0.3), torch.rand(3, 2, 4, 4)
    half = x.bfloat16()
    z, ladj = made(half)
    assert z.dtype == ladj.dtype == torch.float32
    torch.testing.assert_close(z, made(half.float())[0])
    assert made.bfloat16()(x)[0].dtype == torch.float32
    for way in (made, made.inverse):
        with pytest.raises(UserError, match=r"a sample of \(2, 4, 6\); this coupling is of \(2, 4, 4\)"):
            way(torch.rand(3, 2, 4, 6))


def test_a_codebook_of_a_single_number_is_finite():
    codes = VQConfig(vocabulary=4, channels=1).build()
    codes.initialise(torch.full((1, 1, 1, 1), 0.7))
    torch.testing.assert_close(codes.codebook, torch.full((4, 1), 0.7))


def test_a_product_is_not_guided_below_zero():
    a, b = ((torch.zeros(1, 2), torch.tensor([[s, 0.0]])) for s in (-1.0, 0.5))
    with pytest.raises(UserError, match="guidance = -1.0: rule product needs 0 or more; take linear"):
        guide(a, b, -1.0)
    assert all(x.isfinite().all() for x in guide(a, b, 0.0))


def test_what_is_fitted_to_the_first_batch_is_fitted_under_another_default_device():
    marginals, codes = Marginals(PICTURES), VQConfig(vocabulary=8, channels=4).build()
    with torch.device("meta"):
        marginals.initialise(torch.zeros(2, *PICTURES, device="cpu"))
        codes.initialise(torch.ones(5, 4, 2, 2, device="cpu"))
    assert marginals.mass.std() > 0 and (codes.codebook - 1).abs().max() < 0.1


@pytest.mark.parametrize("wrong", [(3, 8, 4), (3, 6, 6)])
def test_a_squeeze_refuses_samples_of_another_shape(wrong):
    squeeze = Squeeze((3, 4, 8))
    with pytest.raises(UserError, match="samples B x 3 x 4 x 8, not 2 x"):
        squeeze(torch.zeros(2, *wrong))
    with pytest.raises(UserError, match="samples B x 12 x 2 x 4, not 2 x"):
        squeeze.inverse(torch.zeros(2, 12, 4, 2))
