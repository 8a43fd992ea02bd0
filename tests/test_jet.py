"""Jet: couplings by vision transformers: exact inverses, exact volumes, which half hears which, and what is refused."""

import pytest
import torch

from genflow.errors import UserError
from genflow.flows.bijections.base import Chain
from genflow.flows.bijections.jet import ViTCoupling
from genflow.flows.bijections.memory import reversible
from genflow.flows.models.jet import JetConfig
from genflow.networks.vit import ViT
from genflow.registry import resolve
from tests.noise import shaken

DIVISIONS = ["channels", "checker", "rows", "columns"]


def coupling(shape=(1, 4, 6), dtype=torch.float64, **options):
    return shaken(ViTCoupling(shape, patch=2, width=8, depth=1, **options)).to(dtype)


def pictures(shape, rows=3, dtype=torch.float64):
    return torch.randn(rows, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("shape", "divide"),  # 2 x 3 and 3 x 1 tokens: halves of unequal size
    [*(((1, 4, 6), d) for d in DIVISIONS), *(((3, 6, 2), d) for d in DIVISIONS if d != "columns")],
)
def test_round_trip_and_volume(shape, divide, flip):
    flow, x = coupling(shape, divide=divide, flip=flip, condition_dim=2), pictures(shape)
    condition = pictures((2,))
    z, ladj = flow(x, condition)
    back, back_ladj = flow.inverse(z, condition)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(back_ladj, -ladj, rtol=0, atol=1e-12)
    assert (z != x).any(0).any() and ladj.abs().min() > 1e-3
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda a, i=i: flow(a[None], condition[i : i + 1])[0][0], x[i])
        log_det = torch.linalg.slogdet(jacobian.view(x[i].numel(), -1))[1]
        torch.testing.assert_close(log_det, ladj[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("divide", DIVISIONS)
def test_each_half_is_kept_once(divide):
    x = pictures((1, 4, 6))
    changed = [
        (coupling(divide=divide, flip=flip)(x)[0] != x).all(0) for flip in (False, True)
    ]  # numbers that change in every row
    assert (changed[0] ^ changed[1]).all()
    cells = changed[0][0].view(2, 2, 3, 2).transpose(1, 2).flatten(2)  # rows x columns of tokens x numbers
    if divide == "channels":
        assert (cells.sum(-1) == 2).all() and (cells == cells[0, 0]).all()
    else:
        rows = {"checker": [[0, 1, 0], [1, 0, 1]], "rows": [[0, 0, 0], [1, 1, 1]], "columns": [[0, 1, 0], [0, 1, 0]]}
        assert torch.equal(cells, torch.tensor(rows[divide]).bool()[..., None].expand(2, 3, 4))


def test_it_starts_as_the_identity_and_the_scale_is_twice_a_sigmoid():
    x = pictures((3, 8, 8), dtype=torch.float32)
    for divide in DIVISIONS:
        z, ladj = ViTCoupling((3, 8, 8), divide=divide)(x)
        assert torch.equal(z, x) and ladj.count_nonzero() == 0
    flow = coupling(divide="checker")
    flow.network.head.weight.data.zero_()
    flow.network.head.bias.data[:4] = 0.5  # b
    flow.network.head.bias.data[4:] = 1.0  # u
    x = pictures((1, 4, 6))
    z, ladj = flow(x)
    moved = z != x
    scale = 2 / (1 + torch.exp(torch.tensor(-1.0, dtype=torch.float64)))
    torch.testing.assert_close(z[moved], (x[moved] + 0.5) * scale)
    torch.testing.assert_close(ladj, (12 * scale.log()).expand(3))


def test_extreme_scales_have_finite_logs_and_gradients():
    flow = coupling(dtype=torch.float32)
    x = pictures((1, 4, 6), dtype=torch.float32).requires_grad_()
    for u in (-60.0, 300.0):
        flow.network.head.bias.data[2:] = u
        z, ladj = flow(x)
        (gradient,) = torch.autograd.grad(z.sum() + ladj.sum(), x)
        assert z.isfinite().all() and ladj.isfinite().all() and gradient.isfinite().all()
        assert flow.inverse(z)[0].isfinite().all()


def test_the_condition_is_heard_and_must_be_there():
    flow, x = coupling(condition_dim=2), pictures((1, 4, 6))
    zero, one = flow(x, torch.zeros(3, 2).double())[0], flow(x, torch.ones(3, 2).double())[0]
    assert (zero != one).any()
    alone = flow(x[1:2], torch.ones(1, 2).double())[0]
    torch.testing.assert_close(alone[0], one[1], rtol=0, atol=1e-12)
    with pytest.raises(UserError, match="condition is missing"):
        flow(x)
    with pytest.raises(UserError, match="needs 3 x 2"):
        flow(x, torch.zeros(3, 5))


def test_the_map_is_float32_where_the_network_is_bfloat16():
    flow, x = coupling(dtype=torch.float32), pictures((1, 4, 6), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z, ladj = flow(x)
        back, _ = flow.inverse(z)
    assert z.dtype == ladj.dtype == torch.float32
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- model


def jet(**changes):
    options = {"patch": 2, "couplings": 7, "depth": 1, "width": 8, "spatial_every": 2, "shape": (1, 4, 4)}
    return JetConfig(**{**options, "condition_dim": 2, **changes})


def test_a_jet_inverts_and_counts_its_volume():
    flow, x, condition = shaken(jet().build()).double(), pictures((1, 4, 4)), pictures((2,))
    z, ladj = flow(x, condition)
    back, back_ladj = flow.inverse(z, condition)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(back_ladj, -ladj, rtol=0, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda a: flow(a[None], condition[:1])[0][0], x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian.view(16, 16))[1], ladj[0], rtol=0, atol=1e-10)
    assert (jacobian.abs() > 1e-12).double().mean() > 0.95  # nearly every number hears every other
    assert isinstance(flow, Chain) and (jet().build()(x.float(), condition.float())[0] == x.float()).all()


def test_every_few_couplings_divide_the_tokens():
    def spatial(config):
        return [b.kept.shape[1] == 4 for b in config.build()]  # all four numbers of a token are kept

    assert spatial(jet()) == [False, True] * 3 + [False]
    assert spatial(jet(spatial_every=0)) == [False] * 7
    assert spatial(jet(spatial_every=1)) == [True] * 7
    flips = [b.kept[0, 0].item() for b in jet(spatial_every=1).build()][:6]
    assert flips == [0, 2, 0, 2, 0, 8]  # checker, columns, rows: each from one side and then the other
    assert JetConfig().spatial_every == 5  # four in channels for each in space, as in the paper


def test_the_random_divisions_are_part_of_a_checkpoint():
    flow, other = shaken(jet().build()), shaken(jet(seed=1).build())
    assert any(not torch.equal(a.kept, b.kept) for a, b in zip(flow, other))
    assert torch.equal(next(iter(flow)).kept, next(iter(jet().build())).kept)
    assert not torch.equal(*(list(flow)[i].kept for i in (0, 2)))
    other.load_state_dict(flow.state_dict())
    x, condition = pictures((1, 4, 4), dtype=torch.float32), pictures((2,), dtype=torch.float32)
    assert torch.equal(flow(x, condition)[0], other(x, condition)[0])


def test_a_jet_trains_and_under_the_invertible_checkpoint_alike():
    flow = shaken(jet().build()).double()
    x, condition = pictures((1, 4, 4), rows=6), pictures((2,), rows=6)
    found = []
    for model in (flow, reversible(flow)):
        model.zero_grad()
        z, ladj = model(x, condition)
        (0.5 * z.square().flatten(1).sum(1) - ladj).mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    flow = jet(condition_dim=0).build()
    x = (pictures((1, 4, 4), rows=64, dtype=torch.float32) * 0.3).cumsum(-1)
    optimizer, losses = torch.optim.Adam(flow.parameters(), lr=1e-2), []
    for _ in range(30):
        z, ladj = flow(x)
        loss = (0.5 * z.square().flatten(1).sum(1) - ladj).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 3


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_is_refused_with_the_nearest_that_can():
    for shape, options, text in [
        ((7,), {}, "of pictures"),
        ((1, 28, 28), {"patch": 3}, "patches of 3; try 2"),
        ((1, 7, 7), {"patch": 4}, "try 1"),
        ((1, 4, 4), {"patch": 0}, "try 1"),
        ((1, 4, 4), {"patch": 1}, "one number"),
        ((1, 4, 4), {"divide": "row"}, "mean 'rows'"),
        ((1, 4, 8), {"divide": "rows"}, "1 x 2 tokens cannot be divided into rows"),
        ((1, 4, 4), {"divide": "checker"}, "cannot be divided"),
        ((1, 4, 4), {"width": 12, "heads": 5}, "try 10"),
        ((1, 4, 4), {"depth": 0}, "depth = 0"),
    ]:
        with pytest.raises(UserError, match=text):
            ViTCoupling(shape, **options)
    ViTCoupling((1, 28, 28), divide="checker", width=8, depth=1)  # 49 tokens: 25 and 24
    for name in ("shape", "condition_dim"):
        with pytest.raises(UserError, match=f"{name} is not set"):
            jet(**{name: None}).build()
    with pytest.raises(UserError, match="couplings = 0"):
        JetConfig(couplings=0)


def test_they_are_found_by_name():
    assert resolve("bijection", "vit_coupling") is ViTCoupling and resolve("network", "jet") is JetConfig


def test_a_vit_knows_where_its_tokens_are_and_starts_at_zero():
    vit = ViT(5, 3, 2, width=8, depth=2, heads=2)
    x = torch.randn(2, 5, 3)
    assert vit(x).shape == (2, 5, 2) and vit(x).count_nonzero() == 0
    shaken(vit)
    out, turned = vit(x), vit(x.flip(1)).flip(1)
    assert (out - turned).abs().max() > 1e-2
    vit.positions.data.zero_()
    torch.testing.assert_close(vit(x), vit(x.flip(1)).flip(1), rtol=0, atol=1e-5)
    assert (vit(x)[:, 0] - vit(torch.cat([x[:, :1], 2 * x[:, 1:]], 1))[:, 0]).abs().max() > 1e-4  # attention


@pytest.mark.parametrize("tokens", [(5, 1), (1, 5), (5, 4)])
def test_a_vit_refuses_another_number_of_tokens_than_it_has_positions_for(tokens):
    has, given = tokens
    with pytest.raises(UserError, match=f"vit: there are {given} tokens, .* positions for {has}"):
        ViT(has, 3, 2, width=8, depth=1)(torch.randn(2, given, 3))


def test_a_transformer_of_conditions_refuses_to_go_without():
    vit = ViT(5, 3, 2, width=8, depth=1, condition_dim=4)
    with pytest.raises(UserError, match="vit: a condition is missing: this network needs B x 4"):
        vit(torch.randn(2, 5, 3))
