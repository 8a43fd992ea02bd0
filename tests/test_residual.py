"""Residual blocks: Lipschitz bounds that hold, the exact ladj and its unbiased estimate, the inverse as a fixed point."""

import contextlib
import copy

import pytest
import torch

from genflow.errors import UserError
from genflow.flows.bijections.base import Chain
from genflow.flows.bijections.memory import Reversible
from genflow.flows.bijections.residual import ResidualBlock
from genflow.flows.divergence import probing
from genflow.functional import Rng
from genflow.networks.lipschitz import ContractedConv2d, ContractedLinear, LipschitzNet, LipSwish
from tests.noise import shaken

F64 = torch.float64


def block(shape=(6,), noise=0.3, training=False, **options):
    return shaken(ResidualBlock(shape, **{"hidden": (24, 24), **options}), noise).to(F64).train(training)


def operator(layer):
    """The layer with its scaled weight as a matrix, transposed."""
    n = layer.direction.numel()
    basis = torch.eye(n, dtype=F64).view(n, *layer.direction.shape[1:])
    return layer.apply_weight(layer.normalised(), basis).detach().flatten(1)


# ------------------------------------------------------------------------------------------------------------ contractions


LAYERS = [
    lambda: ContractedLinear(12, 20, 0.9),
    lambda: ContractedConv2d(3, 8, 3, (6, 5), 0.9),
    lambda: ContractedConv2d(4, 9, 1, (4, 4), 0.9),
]


@pytest.mark.parametrize("build", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_the_spectral_norm_of_a_layer_is_its_bound(build, training):
    layer = shaken(build(), 0.3).to(F64).train(training)
    for _ in range(1 if not training else 60):  # in training the direction follows the weights step by step
        with torch.no_grad():
            layer.weight.mul_(1.0)
        layer.normalised()
    assert torch.linalg.matrix_norm(operator(layer), 2).item() == pytest.approx(0.9, rel=2e-3)


@pytest.mark.parametrize("build", LAYERS)
def test_a_layer_that_is_short_enough_stays_as_it_is(build):
    layer = build().to(F64)
    with torch.no_grad():
        layer.weight.mul_(0.01)
    torch.testing.assert_close(layer.normalised(), layer.weight)
    with torch.no_grad():
        layer.weight.zero_()
    (grad,) = torch.autograd.grad(layer(torch.randn(2, *layer.direction.shape[1:], dtype=F64)).sum(), layer.weight)
    assert grad.isfinite().all()


def test_gradients_pass_through_the_norm():
    layer = shaken(ContractedLinear(5, 4, 0.9), 0.5).to(F64).eval()
    x = torch.randn(3, 5, dtype=F64)

    def output(weight):
        with torch.no_grad():
            layer.weight.copy_(weight)
        return layer(x)

    weight = layer.weight.detach().clone()
    (grad,) = torch.autograd.grad(output(weight).sum(), layer.weight)
    expected = torch.zeros_like(weight)
    for i in range(weight.numel()):
        step = torch.zeros_like(weight)
        step.view(-1)[i] = 1e-6
        expected.view(-1)[i] = (output(weight + step).sum() - output(weight - step).sum()).detach() / 2e-6
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-5)


def test_evaluation_leaves_the_state_and_training_moves_it():
    layer = shaken(ContractedLinear(12, 20, 0.9), 0.3).to(F64)
    before = layer.direction.clone()
    x = torch.randn(2, 12, dtype=F64)
    first = layer.eval()(x)
    assert torch.equal(layer.direction, before) and torch.equal(layer(x), first)
    reloaded = ContractedLinear(12, 20, 0.9).to(F64).eval()
    reloaded.load_state_dict(layer.state_dict())
    assert torch.equal(reloaded(x), first)
    once = layer.train()(x)
    assert not torch.equal(layer.direction, before)
    assert torch.equal(layer(x), once)  # the same weights, the same map


def test_the_slope_of_lipswish_is_within_one():
    x = torch.linspace(-20, 20, 40001, dtype=F64, requires_grad=True)
    for raw in (0.5, 2.0, 6.0):
        act = LipSwish().to(F64)
        torch.nn.init.constant_(act.raw, raw)
        (slope,) = torch.autograd.grad(act(x).sum(), x)
        assert 0.99 < slope.abs().max() <= 1


@pytest.mark.parametrize("shape", [(5,), (2, 4, 4)])
def test_the_bound_holds_after_training_steps(shape):
    """Pushed for 60 steps towards a map far steeper than any contraction."""
    net = LipschitzNet(shape, hidden=(16, 16), lipschitz=0.8)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        x = torch.randn(32, *shape)
        optimizer.zero_grad()
        (net(x) - 5 * x.flip(1)).square().mean().backward()
        optimizer.step()
    net.eval().double()
    bounds = [torch.linalg.matrix_norm(operator(layer), 2).item() for layer in net.layers]
    assert torch.tensor(bounds).prod() <= 0.8 * 1.005
    x = torch.randn(200, *shape, dtype=F64)
    y = x + 0.01 * torch.randn_like(x)
    ratio = (net(x) - net(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert 0.3 < ratio.max() < 0.8  # it did learn to be steep


# --------------------------------------------------------------------------------------------------------------- the block


@pytest.mark.parametrize("shape", [(1,), (6,), (2, 3, 4)])
@pytest.mark.parametrize("condition_dim", [0, 3])
def test_round_trip_and_exact_volume(shape, condition_dim):
    made = block(shape, condition_dim=condition_dim)
    x = torch.randn(4, *shape, dtype=F64)
    c = torch.randn(4, condition_dim, dtype=F64) if condition_dim else None
    with torch.no_grad():
        z, ladj = made(x, c)
        back, back_ladj = made.inverse(z, c)
    torch.testing.assert_close(back, x, atol=1e-6, rtol=0)
    torch.testing.assert_close(back_ladj, -ladj, atol=1e-5, rtol=0)
    for i in range(4):
        each = torch.autograd.functional.jacobian(
            lambda a, i=i: made(a[None], None if c is None else c[i : i + 1])[0].flatten(), x[i]
        )
        expected = torch.linalg.slogdet(each.reshape(x[0].numel(), -1)).logabsdet
        torch.testing.assert_close(ladj[i], expected)


def test_it_starts_as_the_identity():
    x = torch.randn(3, 6)
    z, ladj = ResidualBlock((6,))(x)
    assert torch.equal(z, x) and ladj.abs().max() == 0


def test_the_exact_ladj_is_differentiated_through():
    made = block((3,), hidden=(8,), noise=0.5)
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    assert made.exact
    torch.autograd.gradcheck(lambda a: made(a)[1], x, atol=1e-6)


def test_it_says_whether_it_is_exact():
    vector, picture, large = ResidualBlock((64,)), ResidualBlock((3, 8, 8)), ResidualBlock((1, 28, 28), hidden=(4,))
    assert vector.exact and vector.eval().exact
    assert not picture.exact and picture.eval().exact
    assert not large.exact and not large.eval().exact
    assert ResidualBlock((1, 28, 28), hidden=(4,), exact=True).exact and not ResidualBlock((6,), exact=False).exact


def estimates(made, x, draws):
    """Values and parameter gradients of so many draws, one row of the batch each."""
    index = torch.arange(len(x))
    values, grads = [], []
    params = [p for name, p in made.named_parameters() if name != "network.layers.2.bias"]
    for seed in range(draws):
        with probing(Rng(seed), index):
            ladj = made(x)[1]
        values.append(ladj.detach())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(ladj.sum(), params)]))
    return torch.stack(values), torch.stack(grads)


def steep(**options):
    """A block whose Jacobian is close to its bound, near -0.8 on one half and 0.8 on the other: the series is long."""
    torch.manual_seed(1)
    made = ResidualBlock((4,), hidden=(16, 16), lipschitz=0.8, **options)
    optimizer = torch.optim.Adam(made.network.parameters(), lr=0.02)
    target = torch.tensor([-4.0, -4.0, 4.0, 4.0])
    for _ in range(80):
        x = torch.randn(64, 4)
        optimizer.zero_grad()
        (made.network(x) - target * x).square().mean().backward()
        optimizer.step()
    return made.to(F64).train()


def test_the_estimate_and_its_gradient_are_unbiased():
    made, exact = steep(exact=False), steep(exact=True)
    x = torch.randn(1, 4, dtype=F64).expand(16, 4)
    values, grads = estimates(made, x, 120)
    params = [p for name, p in exact.named_parameters() if name != "network.layers.2.bias"]
    truth = exact(x)[1]
    true_grad = torch.cat([g.flatten() for g in torch.autograd.grad(truth.sum(), params)])
    flat = values.flatten()
    error = (flat.mean() - truth[0]).abs() / (values.mean(1).std() / 120**0.5)
    assert flat.std() > 0.1 and error < 4
    z_scores = (grads.mean(0) - true_grad).abs() / (grads.std(0) / 120**0.5)
    alive = grads.std(0) > 1e-9
    assert alive.sum() > 100 and z_scores[alive].max() < 4.5 and z_scores[alive].square().mean() < 2


def test_a_series_cut_after_two_terms_would_show(monkeypatch):
    """So the check above can fail: without roulette the mean is off by many standard errors."""
    made, exact = steep(exact=False), steep(exact=True)
    draw = made._draw
    monkeypatch.setattr(made, "_draw", lambda x: (draw(x)[0], [1.0] * 2))
    x = torch.randn(1, 4, dtype=F64).expand(16, 4)
    values, _ = estimates(made, x, 30)
    truth = exact(x)[1][0]
    assert (values.mean() - truth).abs() > 4 * values.mean(1).std() / 30**0.5


def test_gradients_with_respect_to_the_input_are_unbiased_too():
    made, exact = steep(exact=False), steep(exact=True)
    x = torch.randn(4, dtype=F64).expand(1000, 4).clone().requires_grad_()
    rows = []
    for seed in range(20):
        with probing(Rng(seed), torch.arange(1000)):
            rows.append(torch.autograd.grad(made(x)[1].sum(), x)[0].mean(0))
    (expected,) = torch.autograd.grad(exact(x[:1])[1].sum(), x)
    rows = torch.stack(rows)
    assert ((rows.mean(0) - expected[0]).abs() < 4 * rows.std(0) / 20**0.5 + 1e-12).all()


def test_estimates_are_reproducible_and_new_for_new_weights():
    made, x = block((6,), training=True, exact=False), torch.randn(5, 6, dtype=F64)
    twin = copy.deepcopy(made)
    first = made(x)[1]
    assert torch.equal(made(x)[1], first) and torch.equal(twin(x)[1], first)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(1.0)
    second = made(x)[1]
    assert not torch.equal(second, first)
    resumed = ResidualBlock((6,), hidden=(24, 24), exact=False).to(F64)
    resumed.load_state_dict(made.state_dict())
    assert resumed.draws == made.draws == 2
    assert block((6,), exact=False, seed=1)(x)[1].shape == (5,)
    torch.testing.assert_close(made(x[[3, 0]])[1], made(x)[1][[3, 0]])  # a sample's signs hang on no place
    assert len(made._draw(x)[0].unique(dim=0)) > 1  # and are its own


def test_within_probing_the_signs_hang_on_the_counters_and_are_others_in_every_block():
    made, x = block((6,), training=True, exact=False), torch.randn(5, 6, dtype=F64)
    twin, counters = copy.deepcopy(made), torch.tensor([7, 1, 4, 9, 2])

    def ladjs(step=0, order=slice(None), same=False):
        with probing(Rng(0, step), counters[order]):
            return [each(x[:1].expand(5, 6) if same else x[order])[1].detach() for each in (made, twin, made)]

    one, other, again = ladjs()
    assert torch.equal(one, again) and not torch.isclose(one, other).any() and made.draws == 0
    torch.testing.assert_close(ladjs(order=[3, 0])[0], one[[3, 0]])
    assert not torch.isclose(ladjs(step=1)[0], one).any()
    assert len(ladjs(same=True)[0].unique()) == 5


def test_in_eval_mode_the_estimate_is_a_function_of_the_sample():
    made, x = block((6,), exact=False), torch.randn(5, 6, dtype=F64)
    with torch.no_grad():
        z, ladj = made(x)
        torch.testing.assert_close(made(x[2:3])[1], ladj[2:3])
        torch.testing.assert_close(made.inverse(z)[1], -ladj, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_an_invertible_checkpoint_repeats_the_draw(turned):
    torch.manual_seed(0)
    blocks = [block((6,), training=True, exact=False, seed=i) for i in range(2)]
    blocks = [each.inv for each in blocks] if turned else blocks
    chain, saved = Chain(blocks), Reversible(copy.deepcopy(blocks))
    x = torch.randn(5, 6, dtype=F64)
    for scope in (contextlib.nullcontext, lambda: probing(Rng(3), torch.arange(5))):
        found = []
        for flow in (chain, saved):
            with scope():
                z, ladj = flow(x)
            flow.zero_grad()
            (z.square().sum() - ladj.sum()).backward()
            found.append([p.grad for p in flow.parameters()])
        for plain, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain)


def test_the_inverse_is_differentiable():
    made = block((3,), noise=0.5)
    z = torch.randn(2, 3, dtype=F64, requires_grad=True)
    torch.autograd.gradcheck(lambda a: made.inverse(a), z, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_inverse_arrives_in_float32_whatever_the_scale(scale):
    made = block((6,)).float()
    x = scale * torch.randn(8, 6)
    with torch.no_grad():
        torch.testing.assert_close(made.decode(made(x)[0]), x, rtol=1e-4, atol=1e-4 * scale)


def test_the_inverse_is_within_the_tolerance_of_the_limit_not_of_its_last_move():
    class Shrinking(torch.nn.Linear):
        def forward(self, x, condition=None):
            return -0.9 * x

    made = ResidualBlock((1,), tolerance=1e-3)
    made.network = Shrinking(1, 1).to(F64)
    z = torch.linspace(-2, 2, 9, dtype=F64).view(-1, 1)
    torch.testing.assert_close(made.decode(z), 10 * z, rtol=0, atol=1e-3)


def test_autocast_does_not_touch_the_map():
    made = block((6,)).float()
    x = torch.randn(4, 6)
    with torch.no_grad():
        expected = made(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(made(x), expected, rtol=0, atol=0)
            torch.testing.assert_close(made.decode(expected[0]), x, rtol=1e-4, atol=1e-4)


def test_a_sweep_that_does_not_arrive_is_told():
    made = block((6,))
    made.max_sweeps = 2
    with pytest.raises(UserError, match="still moved by .* after 2 sweeps"):
        made.inverse(torch.randn(3, 6, dtype=F64))
    made.max_sweeps = 1000
    with pytest.raises(UserError, match="z is not finite"):
        made.decode(torch.full((1, 6), torch.nan, dtype=F64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lipschitz": 1.0}, "lipschitz = 1.0 is not within 0 .. 1"),
        ({"hidden": ()}, "hidden"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"shape": (4, 4)}, "no sample's"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        ResidualBlock(**{"shape": (4,), **options})
