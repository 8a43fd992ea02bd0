"""Couplings: permutations, their cost, and that they never tell of the condition."""

import itertools

import pytest
import torch

from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.flows.couplings import (
    Independent,
    OptimalTransport,
    Paired,
    Sinkhorn,
    _gumbel,
    equal_rows,
    greedy_permutation,
    optimal_assignment,
    sinkhorn_log_plan,
    transport_cost,
)

TRANSPORTS = [OptimalTransport(), Sinkhorn(), OptimalTransport(weight=0.5), Sinkhorn(weight=0.5)]


def pairs(n=32, shape=(5,), dtype=torch.float32):
    torch.manual_seed(n)
    return 0.5 * torch.randn(n, *shape, dtype=dtype) + 1, torch.randn(n, *shape, dtype=dtype)


def classes(n, k=3):
    torch.manual_seed(1)
    label = torch.randint(k, (n,))
    return label, Condition(label[:, None], torch.ones(n, 1, dtype=torch.bool), torch.zeros(n, 0))


def distance(x, noise):
    return float((x.double() - noise.double()).square().sum())


def order(noise, coupled):
    """Which row each coupled row was; fails where one is dropped or doubled."""
    same = (coupled.flatten(1)[:, None] == noise.flatten(1)).all(-1)
    assert (same.sum(0) == 1).all() and (same.sum(1) == 1).all()
    return same.int().argmax(1)


@pytest.mark.parametrize("coupling", TRANSPORTS, ids=repr)
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(("n", "shape"), [(2, (1,)), (7, (3, 2, 2)), (64, (2,))], ids=str)
def test_no_noise_is_dropped_or_doubled(coupling, conditional, n, shape):
    x, noise = pairs(n, shape)
    order(noise, coupling(x, noise, classes(n)[1] if conditional else None))


@pytest.mark.parametrize("n", [2, 5, 7])
def test_optimal_transport_is_the_best_of_all_permutations(n):
    x, noise = pairs(n)
    best = min(distance(x, noise[list(p)]) for p in itertools.permutations(range(n)))
    assert distance(x, OptimalTransport()(x, noise)) == pytest.approx(best, rel=1e-6)


def test_optimal_transport_costs_no_more_than_pots_exact_plan():
    ot = pytest.importorskip("ot")
    x, noise = pairs(64, (3, 4, 4), torch.float64)
    cost = torch.cdist(x.flatten(1), noise.flatten(1)).square()
    exact = float(ot.emd2([], [], cost.numpy())) * 64
    assert distance(x, OptimalTransport()(x, noise)) <= exact * (1 + 1e-9)


def test_optimal_transport_in_one_dimension_sorts():
    x, noise = pairs(50, (1,))
    coupled = OptimalTransport()(x, noise)
    assert torch.equal(coupled[x.flatten().argsort()].flatten(), noise.flatten().sort().values)


@pytest.mark.parametrize("dim", [1, 2, 50])
def test_optimal_transport_of_samples_far_from_zero_is_as_of_those_around_it(dim):
    x, noise = pairs(64, (dim,))
    x = (64 * x).round() / 64  # so that what is added rounds nothing
    assert torch.equal(OptimalTransport()(x + 2**17, noise), OptimalTransport()(x, noise))


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8)], ids=str)
@pytest.mark.parametrize("conditional", [False, True])
def test_sinkhorn_goes_from_the_optimum_to_independence_with_epsilon(shape, conditional):
    x, noise = pairs(128, shape)
    condition = classes(128)[1] if conditional else None
    before, best = distance(x, noise), distance(x, OptimalTransport()(x, noise, condition))
    gains = [
        (before - distance(x, Sinkhorn(epsilon=e)(x, noise, condition))) / (before - best) for e in (0.05, 1.0, 30.0)
    ]
    assert 0.9 < gains[0] <= 1 + 1e-9 and 0.25 < gains[1] < 0.75 and abs(gains[2]) < 0.25


def test_sinkhorn_draws_from_its_plan():
    """Two samples and two draws of noise: the chance of the exchange is known. Other noise is another draw."""
    x = torch.tensor([[-1.0], [1.0]])
    cost, group = transport_cost(x, x)
    chance = float(sinkhorn_log_plan(cost, group, 1.0, 100).exp()[0, 1])
    assert 0.05 < chance < 0.95
    exchanged = 0
    for i in range(300):
        shift = torch.full_like(x, i / 1024)  # changes no plan
        exchanged += int(order(x + shift, Sinkhorn(epsilon=1.0, iterations=30)(x, x + shift))[0] == 1)
    assert exchanged / 300 == pytest.approx(chance, abs=0.07)
    assert torch.equal(Sinkhorn(epsilon=1.0)(x, x), Sinkhorn(epsilon=1.0)(x, x))


def test_no_number_that_sinkhorn_draws_with_outweighs_every_plan():
    noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(13))  # in whose hash 24 bits in a row are ones
    assert _gumbel(noise).isfinite().all()


def test_sinkhorns_plan_has_equal_weights_and_nothing_across_groups():
    x, noise = pairs(24)
    cost, group = transport_cost(x, noise, classes(24)[1])
    plan = sinkhorn_log_plan(cost, group, 0.5, 200).exp()
    torch.testing.assert_close(plan.sum(0), torch.ones(24))
    torch.testing.assert_close(plan.sum(1), torch.ones(24), atol=1e-3, rtol=0)
    assert (plan[group[:, None] != group] == 0).all()


def test_sinkhorns_plan_of_a_group_does_not_hang_on_the_others():
    """Epsilon is in spreads of the cost over the pairs that may be joined."""
    cost = torch.randn(8, 8, dtype=torch.float64)
    alone = sinkhorn_log_plan(cost, torch.zeros(8, dtype=torch.int64), 0.5, 50)
    groups = torch.arange(3).repeat_interleave(8)
    together = sinkhorn_log_plan(torch.block_diag(cost, cost, cost), groups, 0.5, 50)
    torch.testing.assert_close(together[8:16, 8:16], alone)


def test_rounding_is_the_greedy_matching_and_leaves_no_row_out():
    torch.manual_seed(0)
    log_plan, group = torch.randn(20, 20), torch.zeros(20, dtype=torch.int64)
    left, greedy = log_plan.clone(), torch.full((20,), -1)
    for _ in range(20):
        row, column = divmod(int(left.argmax()), 20)
        greedy[row] = column
        left[row], left[:, column] = -torch.inf, -torch.inf
    assert torch.equal(greedy_permutation(log_plan, group), greedy)
    chain = -(torch.arange(40)[:, None] + torch.arange(40)).float()  # one pair a round: most are left to the end
    group = torch.arange(40) % 3
    permutation = greedy_permutation(chain.masked_fill(group[:, None] != group, -torch.inf), group)
    assert torch.equal(permutation.sort().values, torch.arange(40)) and torch.equal(group[permutation], group)


@pytest.mark.parametrize("coupling", [OptimalTransport(), Sinkhorn()], ids=repr)
def test_noise_never_crosses_conditions(coupling):
    x, noise = pairs(48)
    x = x + 10 * classes(48)[0][:, None]  # the classes stand apart, so that transport would like to sort them
    label, condition = classes(48)
    chosen = order(noise, coupling(x, noise, condition))
    assert torch.equal(label[chosen], label) and not torch.equal(chosen, torch.arange(48))
    assert not torch.equal(label[order(noise, coupling(x, noise))], label)


@pytest.mark.parametrize("coupling", [OptimalTransport(), Sinkhorn()], ids=repr)
def test_conditions_that_are_all_different_leave_the_noise_alone(coupling):
    x, noise = pairs(16)
    condition = Condition(torch.randn(16, 2, 3), torch.ones(16, 2, dtype=torch.bool), torch.randn(16, 4))
    assert torch.equal(coupling(x, noise, condition), noise)


@pytest.mark.parametrize("kind", [OptimalTransport, Sinkhorn])
def test_the_weight_goes_from_deaf_to_strict(kind):
    x, noise = pairs(48)
    label, _ = classes(48)
    condition = Condition(torch.zeros(48, 0, 0), torch.zeros(48, 0, dtype=torch.bool), torch.eye(3)[label])
    x = x + 10 * label[:, None]
    assert torch.equal(kind(weight=0.0)(x, noise, condition), kind()(x, noise))
    crossed = [
        int((label[order(noise, kind(weight=weight)(x, noise, condition))] != label).sum()) for weight in (0, 5.0, 1e3)
    ]
    assert crossed[0] > crossed[1] > crossed[2] == 0


def test_every_part_of_a_condition_makes_it_another():
    tokens, mask, pooled = torch.zeros(4, 2, 3), torch.ones(4, 2, dtype=torch.bool), torch.zeros(4, 2)
    assert equal_rows(Condition(tokens, mask, pooled)).tolist() == [0, 0, 0, 0]
    tokens[1, 1, 2], mask[2, 0], pooled[3, 1] = 1e-30, False, -1.0
    assert equal_rows(Condition(tokens, mask, pooled)).tolist() == [0, 1, 2, 3]
    assert equal_rows(Condition(torch.tensor([[1, 2], [2, 1], [1, 2]]), mask[:3, :1], pooled[:3, :0])).tolist() == [
        0,
        1,
        2,
    ]
    assert equal_rows(Condition(torch.tensor([[1, 2], [2, 1], [1, 2]]), mask[:3, 1:], pooled[:3, :0])).tolist() == [
        0,
        1,
        0,
    ]


def test_the_same_numbers_as_a_64_bit_assignment_under_autocast():
    x, noise = pairs(32, (100,))
    with torch.autocast("cpu", torch.bfloat16):
        coupled = OptimalTransport()(x, noise)
    cost, group = transport_cost(x.double(), noise.double())
    assert torch.equal(order(noise, coupled), optimal_assignment(cost, group))


def test_independent_and_paired_leave_the_noise_alone():
    x, noise = pairs(1)
    assert Independent()(x, noise) is noise and Paired()(x, noise) is noise
    assert Independent.independent and not any(c.independent for c in (Paired, OptimalTransport, Sinkhorn))


@pytest.mark.parametrize("coupling", TRANSPORTS, ids=repr)
def test_what_cannot_be_coupled_is_refused(coupling):
    with pytest.raises(UserError, match="batch of 1 .* take coupling independent"):
        coupling(*pairs(1))
    with pytest.raises(UserError, match=r"\(4, 5\) and noise of \(3, 5\)"):
        coupling(pairs(4)[0], pairs(3)[1])


def test_numbers_that_are_not_finite_and_impossible_settings_are_refused():
    x, noise = pairs(4)
    x[1, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        OptimalTransport()(x, noise)
    for wrong in ({"epsilon": 0.0}, {"iterations": 0}, {"weight": -1.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Sinkhorn(**wrong)


def test_the_cost_is_the_mean_squared_difference_and_the_weight_is_of_one_less_the_cosine():
    x, noise = pairs(6, (5,), torch.float64)
    pooled = torch.randn(6, 4, dtype=torch.float64) * torch.arange(1, 7)[:, None]
    condition = Condition(torch.zeros(6, 1), torch.ones(6, 1, dtype=torch.bool), pooled)
    cost, group = transport_cost(x, noise, condition, 0.5)
    cosine = torch.cosine_similarity(pooled[:, None], pooled[None], dim=2)
    off = torch.cdist(x, noise).square() / 5 + 0.5 * (1 - cosine) - cost
    off = off - off.mean(1, keepdim=True)  # what hangs on a row or a column alone changes no assignment;
    off = off - off.mean(0)  # of the cosines, the row's and the column's own part is 0.5
    torch.testing.assert_close(off, torch.zeros_like(off), rtol=0, atol=1e-12)
    assert (group == 0).all()


@pytest.mark.parametrize("coupling", [OptimalTransport(), Sinkhorn()])
def test_noise_is_coupled_under_another_default_device(coupling):
    x, noise = pairs()
    with torch.device("meta"):
        elsewhere = coupling(x, noise, None)
    assert torch.equal(elsewhere, coupling(x, noise, None))
