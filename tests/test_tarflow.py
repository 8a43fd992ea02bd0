"""Transformer autoregressive flows: the map, its inverse by windows, guidance and denoising."""

from __future__ import annotations

import math

import pytest
import torch

from genflow.errors import UserError
from genflow.flows.bijections.transformer import TransformerAutoregressive, certificate, guide, tweedie
from genflow.flows.models.tarflow import TarFlowConfig, measure_inverse
from tests.noise import shaken

SMALL = {"width": 32, "layers": 1, "heads": 2}
VECTOR, SEQUENCE, PICTURE = (6,), (5, 3), (2, 8, 12)


def randomise(bijection, std=0.1):
    torch.manual_seed(0)
    return shaken(bijection, std).double().eval()


def make(shape, **options):
    return randomise(TransformerAutoregressive(shape, **SMALL, **options))


def model(shape=PICTURE, **options):
    return randomise(TarFlowConfig(**{**SMALL, "blocks": 3, "shape": shape, "condition_dim": 0, **options}).build())


def data(shape, rows=3, seed=1):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [VECTOR, SEQUENCE, PICTURE])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_volume_is_autograds_and_the_jacobian_triangular_by_tokens(shape, reverse):
    bijection, x = make(shape, reverse=reverse, condition_dim=2), data(shape, rows=1)
    condition = data((2,), rows=1)
    n = x.numel()
    jacobian = torch.autograd.functional.jacobian(lambda a: bijection(a, condition)[0], x).reshape(n, n)
    torch.testing.assert_close(bijection(x, condition)[1][0], torch.linalg.slogdet(jacobian).logabsdet)
    places = torch.arange(n, dtype=torch.float64).view(1, *shape)
    token = torch.empty(n, dtype=torch.long)
    token[bijection._cut(places).flatten().long()] = torch.arange(bijection.tokens).repeat_interleave(bijection.dim)
    later = token[:, None] < token[None]  # dz_i / dx_j of a later token j
    assert not jacobian[later].any() and jacobian[token[:, None] > token[None]].ne(0).all()
    same = (token[:, None] == token[None]) & ~torch.eye(n, dtype=torch.bool)
    assert not jacobian[same].any()


def test_tokens_are_patches_row_by_row():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    bijection = TransformerAutoregressive((1, 4, 4), patch=2, **SMALL)
    assert bijection._cut(x)[0, 1].tolist() == [2, 3, 6, 7]
    assert torch.equal(bijection._join(bijection._cut(x)), x)
    assert (bijection.tokens, bijection.dim) == (4, 4)


def test_it_is_the_identity_at_first():
    x = data(VECTOR).float()
    z, ladj = TransformerAutoregressive(VECTOR, **SMALL)(x)
    assert torch.equal(z, x) and not ladj.any()
    z, ladj = TarFlowConfig(**SMALL, shape=PICTURE, condition_dim=0).build()(data(PICTURE).float())
    assert torch.equal(z, data(PICTURE).float()) and not ladj.any()


def test_scales_stay_within_the_limit():
    bijection = make(VECTOR, limit=1.5)
    with torch.no_grad():
        bijection.network.head.bias.fill_(1e3)
        _, ladj = bijection(data(VECTOR))
    torch.testing.assert_close(ladj, torch.full((3,), -6 * 1.5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [VECTOR, SEQUENCE, PICTURE])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("window", [1, 2, 4, 100])
@torch.no_grad()
def test_round_trips_by_any_window_and_the_first_tokens_are_right_at_once(shape, reverse, window):
    bijection, x = make(shape, reverse=reverse), data(shape)
    bijection.window = window
    z, ladj = bijection(x)
    for tolerance in (1e-3, None):
        bijection.tolerance = tolerance
        back, back_ladj = bijection.inverse(z)
        close = 1e-3 if tolerance else 1e-9
        assert certificate(bijection, back, z).shape == (3,) and (certificate(bijection, back, z) <= close).all()
        torch.testing.assert_close(back, x, atol=10 * close, rtol=0)
        torch.testing.assert_close(back_ladj, -ladj, atol=100 * close, rtol=0)
        torch.testing.assert_close(bijection.decode(z), back, atol=0, rtol=0)
        assert 1 <= bijection.sweeps <= bijection.tokens
    if window == 1:
        assert bijection.sweeps == bijection.tokens


@torch.no_grad()
def test_sweeps_are_few_where_tokens_hardly_depend_on_each_other():
    bijection, z = TransformerAutoregressive((64,), **SMALL).double(), data((64,))
    torch.manual_seed(0)
    bijection.network.head.weight.add_(1e-3 * torch.randn_like(bijection.network.head.weight))
    bijection.window, bijection.tolerance = 64, 1e-6
    x = bijection.decode(z)
    assert bijection.sweeps <= 6 and (certificate(bijection, x, z) <= 1e-6).all()


@torch.no_grad()
def test_what_cannot_settle_ends_all_the_same():
    bijection, z = make(VECTOR), data(VECTOR)
    bijection.window = 6
    z[1, 0] = math.nan
    x = bijection.decode(z)
    assert bijection.sweeps == 6 and x[[0, 2]].isfinite().all() and x[1].isnan().any()
    assert bijection.decode(z[:0]).shape == (0, 6)


@torch.no_grad()
def test_a_sample_is_its_own_alone_and_in_a_batch_within_the_tolerance():
    flow, z = model(), data(PICTURE, rows=4)
    for window, close in ((1, 1e-11), (6, 1e-4)):
        for block in flow:
            block.window, block.tolerance = window, 1e-6
        torch.testing.assert_close(flow.decode(z[2:3]), flow.decode(z)[2:3], atol=close, rtol=0)


def test_a_tarflow_is_its_blocks_with_directions_that_alternate():
    flow, x = model(blocks=4), data(PICTURE)
    assert [block.reverse for block in flow] == [False, True, False, True]
    assert {(block.tokens, block.dim) for block in flow} == {(6, 32)}
    z, total = flow(x)
    tokens, expected = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(3, 6, 32), 0
    for block in flow:
        tokens, ladj = block(tokens)
        expected = expected + ladj
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(z.flatten().sort().values, tokens.flatten().sort().values)
    with torch.no_grad():
        back, back_ladj = flow.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(back_ladj, -total)


@torch.no_grad()
def test_pictures_go_through_their_marginals_first_and_vectors_have_none():
    torch.manual_seed(0)
    flow = TarFlowConfig(**SMALL, shape=(2, 8, 8), condition_dim=0, marginals=True).build().double()
    level = (torch.rand(50, 2, 8, 8, dtype=torch.float64).pow(3) * 32).floor()
    x = (level + torch.rand_like(level)) / 16 - 1
    flow.initialise(x)
    z, ladj = flow(x)
    assert (z.mean((0, 2, 3)).abs() < 0.05).all() and ((z.std((0, 2, 3)) - 1).abs() < 0.05).all()
    torch.testing.assert_close(flow.inverse(z), (x, -ladj), atol=1e-5, rtol=1e-5)
    assert model((4,), marginals=True).marginals is None


@torch.no_grad()
def test_measured_windows_are_kept_and_change_nothing():
    flow, z = model(), data(PICTURE)
    before = flow.decode(z)
    plans = measure_inverse(flow, z, rounds=1)
    assert [plan.window for plan in plans] == [block.window for block in flow]
    assert all(plan.window in (1, 2, 4, 6) and 1 <= plan.sweeps <= 6 and plan.seconds > 0 for plan in plans)
    torch.testing.assert_close(flow.decode(z), before)


@pytest.mark.parametrize("rule", ["product", "linear"])
@torch.no_grad()
def test_guidance_of_one_is_none_and_another_follows_the_guided_gaussians(rule):
    bijection, z = make((3,), condition_dim=2), data((3,))
    bijection.window = 3
    condition, null = data((2,)), torch.zeros(1, 2, dtype=torch.float64)
    plain = bijection.inverse(z, condition)[0]
    assert torch.equal(bijection.decode(z, condition, null=null, guidance=1.0, rule=rule), plain)
    guided = bijection.decode(z, condition, null=null, guidance=3.0, rule=rule)
    assert not torch.allclose(guided, plain, atol=1e-2)
    x = torch.zeros_like(z)  # token after token, each from both passes over those before it
    for i in range(3):
        thetas = []
        for c in (condition, null.expand(3, 2)):
            y, _ = bijection(x, c)
            y1, _ = bijection(x + torch.eye(3, dtype=torch.float64)[i], c)
            thetas.append((x[:, i] - y[:, i] / (y1 - y)[:, i], -(y1 - y)[:, i].log()))  # z = (x - mu) exp(-alpha)
        mu, alpha = guide(thetas[0], thetas[1], 3.0, rule)
        x[:, i] = z[:, i] * alpha.exp() + mu
    torch.testing.assert_close(guided, x, atol=1e-9, rtol=0)
    flow = model((3,), condition_dim=2)
    plain = flow.inverse(z, condition)[0]
    assert torch.equal(flow.decode(z, condition, null=null), plain)
    assert not torch.allclose(flow.decode(z, condition, null=null, guidance=2.0), plain)


def test_guided_gaussians_by_hand():
    """N(1, 0.5^2) against N(0, 1), guidance 3: precisions 3 * 4 - 2 * 1 = 10, means 3 * 4 * 1 / 10."""
    conditional, null = (torch.tensor(1.0), torch.tensor(0.5).log()), (torch.tensor(0.0), torch.tensor(0.0))
    mu, alpha = guide(conditional, null, 3.0)
    torch.testing.assert_close(mu, torch.tensor(1.2))
    torch.testing.assert_close(alpha.exp(), torch.tensor(10.0).rsqrt())
    mu, alpha = guide(conditional, null, 3.0, "linear")
    torch.testing.assert_close(mu, torch.tensor(3.0))
    torch.testing.assert_close(alpha.exp(), torch.tensor(0.125))
    wide = torch.tensor(2.0).log()  # a conditional wider than the null one: the plain product would have no variance
    mu, alpha = guide((torch.tensor(1.0), wide), null, 9.0)
    torch.testing.assert_close((mu, alpha.exp()), (torch.tensor(9.0), torch.tensor(2.0)))


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_a_product_below_one_is_the_product_and_the_null_law_at_zero(std):
    conditional, null = (torch.tensor(1.0), torch.tensor(std).log()), (torch.tensor(0.0), torch.tensor(0.0))
    for guidance in (0.0, 0.25, 0.999):
        precision = torch.tensor(guidance / std**2 + 1 - guidance)
        mu, alpha = guide(conditional, null, guidance)
        torch.testing.assert_close(mu, guidance / std**2 / precision)
        torch.testing.assert_close(alpha.exp(), precision.rsqrt())


def test_tweedie_of_a_gaussian_is_the_posterior_mean():
    mean, std, sigma = 0.7, 1.5, 0.4
    y = data((4,))
    log_prob = lambda y: (-0.5 * (y - mean).square() / (std**2 + sigma**2)).sum(1)
    with torch.no_grad():
        x = tweedie(log_prob, y, sigma)
    torch.testing.assert_close(x, (std**2 * y + sigma**2 * mean) / (std**2 + sigma**2))
    assert not x.requires_grad and not y.requires_grad


def test_half_precision_inside_leaves_the_map_wide():
    flow, x = model().float(), data(PICTURE).float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        z, ladj = flow(x)
        back = flow.decode(z)
    assert z.dtype == ladj.dtype == back.dtype == torch.float32
    torch.testing.assert_close(z, flow(x)[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: TransformerAutoregressive((1, 6, 8), patch=4), "try 2"),
        (lambda: TransformerAutoregressive((1, 2, 3, 4)), "no sample's"),
        (lambda: TransformerAutoregressive((4,), limit=0.0), "limit"),
        (lambda: TransformerAutoregressive((4,), width=10, heads=3), "heads"),
        (lambda: TarFlowConfig(blocks=0), "blocks"),
        (lambda: TarFlowConfig(shape=(4,)).build(), "condition_dim"),
        (lambda: TarFlowConfig(shape=(1, 6, 6), condition_dim=0).build(), "try 3"),
        (lambda: make((4,)).decode(data((4,)), guidance=2.0), "guidance = 2.0 needs"),
        (lambda: make((4,), condition_dim=2)(data((4,))), "condition is missing"),
        (lambda: make((4,), condition_dim=2).inverse(data((4,))), "condition is missing"),
        (lambda: make((4,), condition_dim=2).inverse(data((4,)), data((2,), rows=6)), "3 x 2"),
        (lambda: guide((torch.zeros(1),) * 2, (torch.zeros(1),) * 2, 2.0, "lineal"), "linear"),
    ],
)
def test_bad_input_is_refused(build, says):
    with pytest.raises(UserError, match=says):
        build()
