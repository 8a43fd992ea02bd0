"""Guidance against the papers' formulas, written out sample by sample, and against diffusers' guiders."""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import pytest
import torch

from genflow.config import Choice, from_dict, to_dict
from genflow.errors import UserError
from genflow.functional import velocity_from_x, x_from_velocity
from genflow.registry import names, resolve
from genflow.samplers import cfg, euler, heun, picard, reversed, rk4, uniform
from genflow.samplers.guidance import Conditioned, autoguidance
from genflow.samplers.guides import APG, CFG, CFGZero, Guide

GUIDES = [CFG(), CFGZero(), CFGZero(zero_init=0.3), APG(), APG(eta=0.4, threshold=1.5)]


def conditional(x, t, c):
    """A velocity that moves every channel by its condition, by another amount for each, and mixes them."""
    mixed = torch.tanh(x.flip(1)) * c.view(-1, x.shape[1], 1, 1)
    return x * t.view(-1, 1, 1, 1) + mixed + c.view(-1, x.shape[1], 1, 1)


def weaker(x, t):
    return torch.sin(3 * x) + t.view(-1, 1, 1, 1)


def counted(velocity):
    calls = []

    def wrapped(x, t, *cond):
        calls.append((len(x), float(t[0])))
        return velocity(x, t, *cond)

    return wrapped, calls


@pytest.fixture
def x():
    return torch.randn(3, 6, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def c():
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def u():
    return torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def pair(x, c, u):
    """v_c and v_u at x, and the time."""
    t = torch.full((3,), 0.6, dtype=torch.float64)
    return conditional(x, t, c), conditional(x, t, u.expand(3, 6)), 0.6


def same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-12, "atol": 1e-12}))


class Timed:
    """A conditional velocity that takes one time for all rows as a number."""

    def __init__(self):
        self.times = []

    def __call__(self, x, t, c):
        return conditional(x, t, c)

    def at(self, x, time, c):
        self.times.append(time)
        return conditional(x, x.new_full((len(x),), time), c)


# ------------------------------------------------------------------------------------------------------------------ cfg


def test_guidance_is_the_formula_on_all_channels_in_one_doubled_call(x, c, u, pair):
    velocity, calls = counted(conditional)
    v = cfg(velocity, (c,), (u,), 4.0).at(x, 0.6)
    v_c, v_u, _ = pair
    assert calls == [(6, 0.6)]
    same(v, v_u + 4.0 * (v_c - v_u))
    moved = (v - v_c).abs().amin(dim=(0, 2, 3))
    assert moved.shape == (6,) and (moved > 1e-3).all()


def test_outside_the_interval_there_is_one_plain_call(x, c, u):
    velocity, calls = counted(conditional)
    guided = cfg(velocity, (c,), (u,), 3.0, interval=(0.25, 0.75))
    solution = heun(guided, x, uniform(8))
    assert solution.nfe == 15 == len(calls)
    for rows, t in calls:
        assert rows == (6 if 0.25 <= t <= 0.75 else 3), t
    assert torch.equal(guided.at(x, 0.9), conditional(x, torch.full((3,), 0.9, dtype=x.dtype), c))


def test_a_conditional_velocity_may_take_the_time_as_a_number(x, c, u):
    grid, timed = [0.9, 0.6, 0.1, 0.0], Timed()
    for interval in ((0.0, 1.0), (0.5, 0.7)):
        expected = euler(cfg(conditional, (c,), (u,), 3.0, interval=interval), x, grid).x
        same(euler(cfg(timed, (c,), (u,), 3.0, interval=interval), x, grid).x, expected)
    same(euler(Conditioned(timed, (c,)), x, grid).x, euler(Conditioned(conditional, (c,)), x, grid).x)
    assert timed.times == 3 * grid[:3]
    rows = torch.full((3,), 0.6, dtype=x.dtype)
    same(cfg(timed, (c,), (u,), 3.0)(x, rows), cfg(conditional, (c,), (u,), 3.0)(x, rows))  # of each row, as ever
    assert len(timed.times) == 9


def test_scale_one_is_one_plain_call_and_zero_is_the_unconditional(x, c, u, pair):
    velocity, calls = counted(conditional)
    v_c, v_u, t = pair
    plain = cfg(velocity, (c,), (u,), 1.0, guide=CFGZero(0.9), rescale=1.0)
    assert torch.equal(plain.at(x, t), v_c) and torch.equal(plain(x, torch.full((3,), t, dtype=x.dtype)), v_c)
    assert calls == [(3, 0.6)] * 2
    same(cfg(velocity, (c,), (u,), 0.0).at(x, t), v_u)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("guide", GUIDES, ids=repr)
def test_called_with_tensors_every_row_decides(guide, rescale, x, c, u):
    options = {"interval": (0.25, 0.95), "guide": guide, "rescale": rescale}
    for t in ([0.1, 0.5, 0.9], [0.6, 0.96, 1.0], [0.0, 0.25, 0.8]):
        together = cfg(conditional, (c,), (u,), 3.0, **options)(x, torch.tensor(t, dtype=x.dtype))
        for i in range(3):
            alone = cfg(conditional, (c[i : i + 1],), (u,), 3.0, **options)
            same(together[i : i + 1], alone.at(x[i : i + 1], t[i]))


def test_the_ends_of_interval_and_zero_init_are_the_same_for_rows_of_their_own_times(x, c, u):
    guided = cfg(conditional, (c,), (u,), 3.0, interval=(0.25, 0.75))
    ends = guided(x, torch.tensor([0.25, 0.75, 0.75], dtype=x.dtype))
    same(ends, torch.cat([guided.at(x, 0.25)[:1], guided.at(x, 0.75)[1:]]))
    late = cfg(conditional, (c,), (u,), 3.0, guide=CFGZero(0.25))
    same(late(x, torch.full((3,), 0.75, dtype=x.dtype)), late.at(x, 0.75))
    assert late.at(x, 0.75).abs().min() > 0 and late.edges[0] > 0.75  # it stands still above, not there


# --------------------------------------------------------------------------------------------------------------- guides


def test_cfg_zero_is_the_formula(x, pair):
    v_c, v_u, t = pair
    v = CFGZero()(v_c, v_u, x, t, 4.0)
    for i in range(3):
        s = (v_c[i] * v_u[i]).sum() / (v_u[i] ** 2).sum()
        same(v[i], s * v_u[i] + 4.0 * (v_c[i] - s * v_u[i]))
    same(CFGZero()(v_c, 2.5 * v_c, x, t, 7.0), v_c)  # what is only longer or shorter is not pushed away from
    same(CFGZero()(v_c, 0 * v_u, x, t, 2.0), 2 * v_c)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("guide", [APG(), APG(0.3), APG(-0.5, 1.0), APG(1.0, 2.0), APG(0.0, 100.0)], ids=repr)
def test_apg_is_the_formula_in_data_predictions(guide, per_row, x, pair):
    v_c, v_u, t = pair
    v = guide(v_c, v_u, x, torch.full((3,), t, dtype=x.dtype) if per_row else t, 5.0)
    shortened = 0
    for i in range(3):
        x_c, x_u = x[i] - t * v_c[i], x[i] - t * v_u[i]
        d = x_c - x_u
        if guide.threshold is not None and d.norm() > guide.threshold:
            d, shortened = d * guide.threshold / d.norm(), shortened + 1
        along = x_c / x_c.norm()
        parallel = (d * along).sum() * along
        across = d - parallel
        assert abs((across * x_c).sum()) < 1e-12 and parallel.norm() > 1e-3
        same(v[i], (x[i] - (x_c + 4.0 * (across + guide.eta * parallel))) / t)
    assert shortened == (3 if guide.threshold in (1.0, 2.0) else 0)  # each case is one that it says


def test_apg_with_all_of_the_parallel_part_is_cfg(x, pair):
    v_c, v_u, t = pair
    same(APG(eta=1.0)(v_c, v_u, x, t, 3.0), CFG()(v_c, v_u, x, t, 3.0))


@pytest.mark.parametrize("guide", GUIDES, ids=repr)
def test_scale_one_is_the_identity(guide, x, pair):
    v_c, v_u, t = pair
    same(guide(v_c, v_u, x, t, 1.0), v_c)


@pytest.mark.parametrize("guide", GUIDES, ids=repr)
def test_guides_stay_finite_where_they_divide_by_nothing(guide, x, c, u):
    zeros = torch.zeros_like(x)
    for v_c, v_u, state, t in ((zeros, zeros, zeros, 0.5), (x, zeros, 0.5 * x, 0.5), (x, x, x, 1.0), (x, -x, x, 0.0)):
        assert guide(v_c, v_u, state, t, 3.0).isfinite().all()
    for rescale in (0.0, 1.0):
        assert heun(cfg(conditional, (c,), (u,), 3.0, guide=guide, rescale=rescale), x, uniform(3)[::-1]).ok
        flat = cfg(lambda x, t, c: c.view(-1, 1, 1, 1).expand_as(x), (c[:, :1],), (u[:, :1],), 3.0, rescale=rescale)
        assert flat.at(x, 0.5).isfinite().all()  # no spread to bring back


@pytest.mark.parametrize("guide", GUIDES, ids=repr)
def test_rescale_brings_the_spread_of_each_sample_back(guide, x, c, u, pair):
    v_c, _, t = pair
    plain, half, full = (cfg(conditional, (c,), (u,), 6.0, guide=guide, rescale=r).at(x, t) for r in (0.0, 0.5, 1.0))
    for i in range(3):
        assert not math.isclose(plain[i].std(), v_c[i].std(), rel_tol=0.05)
        same(full[i], plain[i] * v_c[i].std() / plain[i].std())
        same(half[i], (plain[i] + full[i]) / 2)


def test_a_guided_picture_does_not_depend_on_its_batch(x, c, u):
    for guide in [*GUIDES, APG(momentum=-0.6, threshold=2.0)]:
        for sampler in (euler, heun):
            options = {"interval": (0.1, 0.98), "guide": guide, "rescale": 0.6}
            batch = sampler(cfg(conditional, (c,), (u,), 3.0, **options), x, uniform(6)).x
            for i in range(3):
                alone = cfg(conditional, (c[i : i + 1],), (u,), 3.0, **options)
                same(sampler(alone, x[i : i + 1], uniform(6)).x[0], batch[i])


def test_statistics_are_float32_whatever_the_network(x, c, u):
    def network(x, t, c):
        return conditional(x.bfloat16(), t.bfloat16(), c.bfloat16())

    for guide in GUIDES:
        v = cfg(network, (c.float(),), (u.float(),), 3.0, guide=guide, rescale=0.5)
        assert v.at(x.float(), 0.5).dtype == v(x.float(), torch.rand(3)).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- diffusers


def test_cfg_rescale_and_cfg_zero_are_those_of_diffusers(x, c, u, pair):
    guiders = pytest.importorskip("diffusers.guiders")
    v_c, v_u, t = pair
    for rescale in (0.0, 0.7):
        theirs = guiders.ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=rescale).forward(v_c, v_u).pred
        same(cfg(conditional, (c,), (u,), 5.0, rescale=rescale).at(x, t), theirs)
        star = guiders.ClassifierFreeZeroStarGuidance(5.0, zero_init_steps=0, guidance_rescale=rescale)
        star._step = 0
        ours = cfg(conditional, (c,), (u,), 5.0, guide=CFGZero(), rescale=rescale).at(x, t)
        same(ours, star.forward(v_c, v_u).pred, rtol=1e-6, atol=1e-6)  # they compute s in float32


@pytest.mark.parametrize(("eta", "threshold", "momentum"), [(1.0, 0.0, None), (0.0, 1.2, None), (0.3, 1.2, -0.75)])
def test_apg_is_that_of_diffusers_along_a_solve(eta, threshold, momentum, x, c, u):
    guiders = pytest.importorskip("diffusers.guiders")
    theirs = guiders.AdaptiveProjectedGuidance(
        4.0,  # theirs, in the form of the paper, counts from 0 where ours counts from 1
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=threshold,
        eta=eta,
        use_original_formulation=True,
    )
    if momentum is not None:
        momentum_module = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
        theirs.momentum_buffer = momentum_module.MomentumBuffer(momentum)

    def guided(x, t):  # on data predictions, as the paper has it
        x_c, x_u = (x_from_velocity(x, conditional(x, t, cond.expand(3, 6)), t) for cond in (c, u))
        return velocity_from_x(x, theirs.forward(x_c, x_u).pred, t)

    guide = APG(eta, threshold or None, momentum or 0.0)
    same(euler(cfg(conditional, (c,), (u,), 5.0, guide=guide), x, uniform(7)).x, euler(guided, x, uniform(7)).x)


# ------------------------------------------------------------------------------------------------------- CFG-Zero*, APG


@pytest.mark.parametrize(("steps", "still"), [(50, 2), (25, 1), (10, 1), (100, 4)])
def test_zero_init_stands_still_for_its_part_of_the_steps_at_no_cost(steps, still, x, c, u):
    velocity, calls = counted(conditional)
    solution = euler(cfg(velocity, (c,), (u,), 3.0, guide=CFGZero(0.04)), x, uniform(steps), record=True)
    moved = [not torch.equal(a, x) for a in solution.trajectory.states[1:]]
    assert moved == [False] * still + [True] * (steps - still) and len(calls) == steps - still
    at_once = cfg(conditional, (c,), (u,), 3.0, guide=CFGZero(0.0)).at(x, 1.0)
    assert at_once.abs().min() > 0


def differences(x, c, u, t):
    """x_c - x_u: the difference of the data predictions."""
    time = torch.full((3,), t, dtype=x.dtype)
    return -t * (conditional(x, time, c) - conditional(x, time, u.expand(3, 6)))


def test_momentum_sums_the_differences_of_data_predictions(x, c, u):
    guide, beta, total = APG(eta=1.0, momentum=-0.6), -0.6, 0
    grid = [0.8 * t for t in uniform(6)]  # the first of the differences is 0.8 of that of the velocities
    states = euler(cfg(conditional, (c,), (u,), 3.0, guide=guide), x, grid, record=True).trajectory.states
    for (z, z_next), (t, t_next) in zip(pairwise(states), pairwise(grid), strict=True):
        total = differences(z, c, u, t) + beta * total
        v_c = conditional(z, torch.full((3,), t, dtype=z.dtype), c)
        same(z_next, z + (t_next - t) * (v_c - 2.0 * total / t))


def test_momentum_begins_anew_with_every_solve_and_batch(x, c, u):
    guided = cfg(conditional, (c,), (u,), 3.0, guide=APG(momentum=-0.6))
    memoryless = cfg(conditional, (c,), (u,), 3.0, guide=APG())
    first = heun(guided, x, uniform(5)).x
    assert not torch.allclose(first, heun(memoryless, x, uniform(5)).x)
    assert torch.equal(heun(guided, x, uniform(5)).x, first)
    euler(guided, x, [1.0, 0.6, 0.3])  # one that ends early, and is left
    assert torch.equal(heun(guided, x, uniform(5)).x, first)
    euler(guided, x, [1.0, 0.9])
    one_prompt = cfg(conditional, (c[:1],), (u,), 3.0, guide=APG(momentum=-0.6))
    alone = euler(one_prompt, x[:1], [0.5, 0.2, 0.0]).x
    euler(one_prompt, x, [1.0, 0.8, 0.6])
    assert torch.equal(euler(one_prompt, x[:1], [0.5, 0.2, 0.0]).x, alone)  # another batch, though time goes on falling
    guided.at(x, 0.9)
    same(guided.take(torch.arange(3)).at(x, 0.5), memoryless.at(x, 0.5))


def test_momentum_begins_anew_at_the_interval(x, c, u):
    options = {"interval": (0.3, 0.7)}
    guided = cfg(conditional, (c,), (u,), 3.0, guide=APG(momentum=-0.6), **options)
    plain = cfg(conditional, (c,), (u,), 3.0, guide=APG(), **options)
    same(guided.at(x, 0.6), plain.at(x, 0.6))
    assert not torch.allclose(guided.at(x, 0.5), plain.at(x, 0.5))
    guided.at(x, 0.2)
    same(guided.at(x, 0.4), plain.at(x, 0.4))
    assert not torch.allclose(guided.at(x, 0.35), plain.at(x, 0.35))
    same(guided.at(x, 0.45), plain.at(x, 0.45))  # and where time goes back up, as in Restart


def test_under_heun_each_time_of_the_grid_counts_once(x, c, u):
    """The trial evaluation at t' is replaced by the one of the next step, which begins there."""
    beta, grid = -0.6, uniform(4)

    def moved(z, t, total):
        v_c = conditional(z, torch.full((3,), t, dtype=z.dtype), c)
        return v_c - 2.0 * total / t

    z, past = x, 0
    for t, t_next in pairwise(grid):
        here = differences(z, c, u, t) + beta * past
        v = moved(z, t, here)
        if t_next != 0:
            trial = z + (t_next - t) * v
            v = (v + moved(trial, t_next, differences(trial, c, u, t_next) + beta * here)) / 2
        z, past = z + (t_next - t) * v, here
    same(heun(cfg(conditional, (c,), (u,), 3.0, guide=APG(eta=1.0, momentum=beta)), x, grid).x, z)


def test_momentum_is_finite_at_time_zero(x, c, u):
    """There the data prediction is x, whatever was remembered: the difference stands alone."""
    guided = cfg(conditional, (c,), (u,), 3.0, guide=APG(momentum=-0.6))
    assert rk4(guided, x, uniform(3)).ok
    guided.at(x, 0.5)
    same(guided.at(x, 0.0), cfg(conditional, (c,), (u,), 3.0, guide=APG()).at(x, 0.0))


def test_momentum_is_refused_where_rows_have_times_of_their_own(x, c, u):
    guided = cfg(conditional, (c,), (u,), 3.0, guide=APG(momentum=-0.5))
    with pytest.raises(UserError, match=r"momentum = -0.5 .* 'heun'.* momentum = 0"):
        guided(x, torch.rand(3, dtype=x.dtype))


# --------------------------------------------------------------------------------------------------------- autoguidance


@pytest.mark.parametrize("guide", GUIDES, ids=repr)
def test_autoguidance_moves_away_from_the_weaker_model(guide, x, c):
    strong = Conditioned(conditional, (c,))
    guided = autoguidance(strong, weaker, 2.5, guide=guide, rescale=0.3)
    t = torch.full((3,), 0.6, dtype=x.dtype)
    v_c, v_w = strong(x, t), weaker(x, t)
    if guide == CFG():
        same(autoguidance(strong, weaker, 2.5).at(x, 0.6), v_w + 2.5 * (v_c - v_w))
    expected = guide(v_c, v_w, x, 0.6, 2.5)
    for i in range(3):
        same(guided.at(x, 0.6)[i], expected[i] * (0.7 + 0.3 * v_c[i].std() / expected[i].std()))
    same(guided(x, t), guided.at(x, 0.6))


def test_autoguidance_calls_each_network_inside_the_interval_and_one_outside(x, c):
    (strong, calls), (weak, weak_calls) = counted(conditional), counted(weaker)
    guided = autoguidance(Conditioned(strong, (c,)), weak, 2.0, interval=(0.25, 0.75))
    assert euler(guided, x, uniform(8)).nfe == 8
    assert calls == [(3, t) for t in uniform(8)[:-1]]
    assert weak_calls == [(3, t) for t in uniform(8)[:-1] if 0.25 <= t <= 0.75]
    weak_calls.clear()
    plain = autoguidance(Conditioned(strong, (c,)), weak, 1.0).at(x, 0.5)
    assert torch.equal(plain, conditional(x, torch.full((3,), 0.5, dtype=x.dtype), c)) and not weak_calls


def test_wrappers_nest(x, c, u):
    """Classifier-free guidance early, autoguidance of all that late; in the other convention of time."""
    inner = cfg(conditional, (c,), (u,), 3.0, interval=(0.5, 0.9))
    outer = autoguidance(inner, reversed(reversed(weaker)), 2.0, interval=(0.2, 0.6), guide=CFGZero(0.0))
    assert outer.edges == pytest.approx((0.2, 0.5, 0.6, 0.9), abs=1e-5)
    back = reversed(outer)
    assert back.edges == tuple(1 - e for e in outer.edges)
    for t in (0.1, 0.3, 0.55, 0.8, 0.95):
        time = torch.full((3,), t, dtype=x.dtype)
        v_c, v_u = conditional(x, time, c), conditional(x, time, u.expand(3, 6))
        v = v_u + 3.0 * (v_c - v_u) if 0.5 <= t <= 0.9 else v_c
        if 0.2 <= t <= 0.6:
            v = CFGZero()(v, weaker(x, time), x, t, 2.0)
        same(outer.at(x, t), v)
        same(outer(x, time), v)
        same(back.at(x, 1 - t), -v)


@pytest.mark.parametrize("interval", [(0.2, 0.8), (0.1, 0.3), (0.7, 0.9)])
@pytest.mark.parametrize("sampler", [euler, partial(picard, tolerance=0)], ids=["euler", "picard"])
def test_the_ends_of_an_interval_belong_to_it_whatever_the_rounding_of_times(sampler, interval):
    """1 - 0.8 is a little less than 0.2: in the other convention of time guidance acts at as many times."""
    one, none, x = torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 2)
    guided = cfg(lambda x, t, c: c.expand_as(x), (one,), (none,), 3.0, interval=interval)
    way = 1 + 0.2 * len([t for t in range(10) if 10 * interval[0] <= t <= 10 * interval[1]])
    torch.testing.assert_close(sampler(guided, x, uniform(10)).x, torch.full((1, 2), -way))
    torch.testing.assert_close(sampler(reversed(guided), x, uniform(10)).x, torch.full((1, 2), way))


@pytest.mark.parametrize("guide", GUIDES, ids=repr)
def test_a_network_of_the_other_convention_is_guided_in_our_time(guide, x, c, u):
    def other(x, t, c):
        return -conditional(x, 1 - t, c)

    how = {"interval": (0.25, 0.9), "guide": guide}
    ours, theirs = (cfg(v, (c,), (u,), 3.0, **how) for v in (conditional, reversed(other)))
    same(euler(theirs, x, uniform(8)).x, euler(ours, x, uniform(8)).x)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=x.dtype)
    same(theirs(x, t), ours(x, t))
    same(
        euler(Conditioned(reversed(other), (c,)), x, uniform(4)).x,
        euler(Conditioned(conditional, (c,)), x, uniform(4)).x,
    )


def test_conditions_of_another_number_of_rows_are_refused(x, c, u):
    for guided in (cfg(conditional, (c[:2],), (u,), 2.0), cfg(conditional, (c,), (c[:2],), 2.0)):
        with pytest.raises(UserError, match="a condition has 2 rows for a batch of 3; give 3 or one"):
            euler(guided, x, uniform(2))


def test_what_a_wrapped_network_answers_is_looked_at(x, c, u):
    wrappers = [
        lambda v: cfg(lambda x, t, c: v(x, t), (c,), (u,), 2.0),
        lambda v: autoguidance(lambda x, t: -x, v, 2.0),
        reversed,
    ]
    for wrap in wrappers:
        with pytest.raises(UserError, match="the velocity returned a tuple, not a tensor"):
            euler(wrap(lambda x, t: (x,)), x, uniform(2))
        with pytest.raises(UserError, match="they must be alike"):  # and not spread over the others
            euler(wrap(lambda x, t: x[:, :1]), x, uniform(2))


# --------------------------------------------------------------------------------------------------------- the contract


def test_edges_are_where_the_velocity_jumps(c, u):
    def edges(scale=2.0, **options):
        return cfg(conditional, (c,), (u,), scale, **options).edges

    assert edges() == () and edges(1.0, interval=(0.2, 0.8), guide=CFGZero()) == ()
    just = partial(pytest.approx, abs=1e-5)
    assert edges(interval=(0.2, 0.8)) == just((0.2, 0.8)) and edges(interval=(0.0, 0.8)) == just((0.8,))
    assert edges(interval=(0.2, 0.8))[0] < 0.2 and edges(interval=(0.2, 0.8))[1] > 0.8  # the ends belong to it
    assert edges(guide=CFGZero(0.04)) == just((0.96,)) and edges(guide=CFGZero(0.0)) == ()
    assert edges(interval=(0.1, 0.9), guide=CFGZero(0.04)) == just((0.1, 0.9))  # it would begin outside the interval
    assert edges(interval=(0.1, 0.9), guide=CFGZero(0.5)) == just((0.1, 0.5, 0.9))


@pytest.mark.parametrize("guide", [*GUIDES, APG(momentum=-0.5)], ids=repr)
def test_take_is_the_velocity_of_some_rows(guide, x, c, u):
    rows = torch.tensor([2, 0, 2, 1, 2])
    options = {"guide": guide, "rescale": 0.4, "interval": (0.1, 0.9)}
    for guided in (
        cfg(conditional, (c,), (u,), 3.0, **options),
        cfg(conditional, (c,), (c.flip(0),), 3.0, **options),
        cfg(conditional, (c[:1],), (u,), 3.0, **options),
        autoguidance(Conditioned(conditional, (c,)), Conditioned(conditional, (u,)), 3.0, **options),
        autoguidance(Conditioned(conditional, (u,)), Conditioned(conditional, (c,)), 3.0, **options),
        reversed(cfg(conditional, (c,), (u,), 3.0, **options)),
    ):
        for t in (0.5, 0.95):
            same(guided.take(rows).at(x[rows], t), guided.at(x, t)[rows])
            if not guide.momentum:
                times = torch.full((5,), t, dtype=x.dtype)
                same(guided.take(rows)(x[rows], times), guided.at(x, t)[rows])


def test_take_is_only_there_where_the_velocity_says_how(c):
    known = Conditioned(conditional, (c,))
    assert hasattr(reversed(known), "take") and hasattr(autoguidance(known, known, 2.0), "take")
    for unknown in (reversed(weaker), autoguidance(known, weaker, 2.0), autoguidance(weaker, known, 2.0)):
        assert not hasattr(unknown, "take")
    assert hasattr(autoguidance(known, Conditioned(weaker, ()), 2.0), "take")


def test_nothing_waits_for_the_device(x, c, u, monkeypatch):
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "nonzero"):
        monkeypatch.setattr(
            torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} waits for the device")
        )
    options = {"interval": (0.25, 0.75), "rescale": 0.5}
    for guide in [*GUIDES, APG(momentum=-0.5, threshold=1.0)]:
        guided = cfg(conditional, (c,), (u,), 3.0, guide=guide, **options)
        heun(guided, x, uniform(4))
        heun(autoguidance(Conditioned(conditional, (c,)), weaker, 3.0, guide=guide, **options), x, uniform(4))
        if not guide.momentum:
            guided.take(torch.tensor([1, 1]))(x[:2], torch.full((2,), 0.5, dtype=x.dtype))


def test_gradients_flow_through_guidance(x, c, u):
    for guide in [*GUIDES, APG(momentum=-0.5, threshold=1.0)]:
        z = x.clone().requires_grad_()
        euler(cfg(conditional, (c,), (u,), 3.0, guide=guide, rescale=0.5), z, uniform(3)).x.sum().backward()
        assert z.grad.isfinite().all() and z.grad.abs().sum() > 0
        same_twice = x.clone().requires_grad_()
        guide(same_twice, same_twice, x, 0.5, 3.0).sum().backward()
        assert same_twice.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------- names, errors


@dataclass(frozen=True)
class Holder:
    guide: Annotated[Any, Choice("guidance")]


@pytest.mark.parametrize("guide", [*GUIDES, APG(threshold=15.0, momentum=-0.5)], ids=repr)
def test_a_guide_has_one_name_in_python_and_in_configs(guide):
    section = to_dict(Holder(guide))
    assert resolve("guidance", section["guide"]["name"]) is type(guide) and isinstance(guide, Guide)
    assert from_dict(Holder, section).guide == guide


def test_every_registered_guide_is_tested_here():
    assert {*names("guidance")} == {to_dict(guide)["name"] for guide in GUIDES}


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"scale": math.nan}, "1.0 is no guidance"),
        ({"scale": math.inf}, "finite"),
        ({"interval": (0.8, 0.2)}, r"try \(0.2, 0.8\)"),
        ({"interval": (-0.5, 0.5)}, r"try \(0.0, 0.5\)"),
        ({"interval": (0.5, 0.5)}, r"try \(0.0, 1.0\)"),
        ({"interval": (0.5, 1.5)}, r"try \(0.5, 1.0\)"),
        ({"rescale": 1.5}, "rescale = 1.5 is not within 0 .. 1; try 1.0"),
        ({"rescale": -0.1}, "try 0.0"),
        ({"rescale": math.nan}, "rescale = nan"),
    ],
    ids=str,
)
def test_impossible_guidance_is_refused(options, near, c, u):
    options = {"scale": 2.0, **options}
    for make in (lambda **o: cfg(conditional, (c,), (u,), **o), lambda **o: autoguidance(weaker, weaker, **o)):
        with pytest.raises(UserError, match=near):
            make(**options)


@pytest.mark.parametrize(
    ("make", "near"),
    [
        (lambda: CFGZero(1.0), "zero_init = 1.0 .* try 0.04"),
        (lambda: CFGZero(-0.1), "0.04"),
        (lambda: APG(math.nan), "eta = nan"),
        (lambda: APG(threshold=0.0), "threshold = 0.0 must be positive"),
        (lambda: APG(threshold=math.inf), "or none"),
        (lambda: APG(momentum=-1.0), "momentum = -1.0 is not between -1 and 1; try -0.5"),
    ],
)
def test_impossible_options_of_a_guide_are_refused(make, near):
    with pytest.raises(UserError, match=near):
        make()


def test_one_tensor_is_no_tuple_of_conditions():
    for make in (
        lambda c: cfg(lambda x, t, c: x, c, (c,), 2.0),
        lambda c: cfg(lambda x, t, c: x, (c,), c, 2.0),
        lambda c: Conditioned(lambda x, t, c: x, c),
    ):
        with pytest.raises(UserError, match="a tuple of tensors"):
            make(torch.zeros(2, 3))


def test_pairs_that_are_none_are_refused():
    c = torch.zeros(2, 3)
    with pytest.raises(UserError, match="cond has 2 tensors and uncond 1; they must be alike"):
        cfg(conditional, (c, c), (c,), 2.0)
    with pytest.raises(UserError, match=r"B x \(3,\) in cond and B x \(4,\) in uncond, .* pad them alike"):
        cfg(conditional, (c,), (torch.zeros(1, 4),), 2.0)
    with pytest.raises(UserError, match=r"guidance interval = \(0.0, 0.5, 1.0\) is not two times"):
        cfg(conditional, (c,), (c,), 2.0, interval=(0.0, 0.5, 1.0))


def test_conditions_that_are_written_to_are_heard(x, c, u):
    guided = cfg(conditional, (c,), (u,), 3.0)
    for change in (lambda: None, lambda: c.add_(1), lambda: u.mul_(2)):
        change()
        same(guided.at(x, 0.6), cfg(conditional, (c.clone(),), (u.clone(),), 3.0).at(x, 0.6))


def test_conditions_of_inference_mode_are_guided_by(x, c, u):
    with torch.inference_mode():
        inside, t = c.clone(), 0.6
    same(cfg(conditional, (inside,), (u,), 3.0).at(x, t), cfg(conditional, (c,), (u,), 3.0).at(x, t))


def test_conditions_of_inference_mode_that_are_written_to_are_heard(x, c, u):
    with torch.inference_mode():
        inside = c.clone()
        guided = cfg(conditional, (inside,), (u,), 3.0)
        guided.at(x, 0.6)
        inside.add_(1)
        same(guided.at(x, 0.6), cfg(conditional, (c + 1,), (u,), 3.0).at(x, 0.6))


def test_a_guided_velocity_serves_after_it_was_exported(x, c, u):
    class Sampled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.guided = cfg(conditional, (c,), (u,), 3.0)

        def forward(self, x):
            return euler(self.guided, x, uniform(2)).x

    sampled = Sampled()
    exported = torch.export.export(sampled, (x,), strict=False).module()
    same(sampled(x), euler(cfg(conditional, (c,), (u,), 3.0), x, uniform(2)).x)
    same(exported(x), sampled(x))


def test_conditions_that_ask_for_gradients_later_have_them(x, c, u):
    guided = cfg(conditional, (c,), (u,), 3.0)
    guided.at(x, 0.6)
    c.requires_grad_()
    guided.at(x, 0.6).sum().backward()
    assert c.grad.abs().min() > 0


def test_what_is_no_guide_and_no_condition_is_refused(x, c, u):
    with pytest.raises(UserError, match=r"guide = 'apg' is not a Guide; give one made, such as genflow.APG\(\)"):
        cfg(conditional, (c,), (u,), 2.0, guide="apg")
    with pytest.raises(UserError, match="is not a Guide; give one made"):
        autoguidance(weaker, weaker, 2.0, guide=APG)
    with pytest.raises(UserError, match="a tuple of tensors, such as .*, not one with a NoneType in it"):
        cfg(conditional, (c,), (None,), 2.0)
    with pytest.raises(UserError, match="a tuple of tensors, such as .*, not of type dict"):
        Conditioned(conditional, {"c": c})


def test_conditions_have_gradients_also_after_a_call_without(x, c, u):
    guided = cfg(conditional, (c.requires_grad_(),), (u,), 3.0)
    with torch.no_grad():
        guided.at(x, 0.6)
    guided.at(x, 0.6).sum().backward()
    assert c.grad.abs().min() > 0


def test_the_edges_of_both_networks_are_told(x, c, u):
    inner = [cfg(conditional, (c,), (u,), 2.0, interval=each) for each in ((0.2, 0.8), (0.3, 0.9))]
    assert autoguidance(*inner, 2.0).edges == tuple(sorted({*inner[0].edges, *inner[1].edges}))
    assert len(autoguidance(*inner, 2.0).edges) == 4
