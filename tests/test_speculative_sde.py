"""Speculative sampling of an SDE: exact step by step, whatever stands, and what reflection promises."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest

import genflow.samplers.speculative as module
from genflow.errors import UserError
from genflow.registry import resolve, tag_of
from genflow.samplers import uniform
from genflow.samplers.speculative import reflected, speculative
from genflow.samplers.stochastic import euler_maruyama

GRID, ROWS = uniform(8), 700


def linear(x, t):
    """The exact velocity for data ~ N(0.5, 0.3^2)."""
    t = t.view(-1, *[1] * (x.dim() - 1))
    return (t - (1 - t) * 0.09) / ((1 - t) ** 2 * 0.09 + t**2) * (x - (1 - t) * 0.5) - 0.5


def noise(rows=ROWS, dims=3):
    return torch.randn(rows, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def innovations(trajectory, k):
    """(x_{k+1} - m_p(x_k)) / s: standard normal and independent of x_k where the sampler is right."""
    x, t, t_next = trajectory.states[k], trajectory.times[k], trajectory.times[k + 1]
    h = t - t_next
    w = min(2 * t, t_next**2 / h)
    v = linear(x, torch.full((len(x),), t, dtype=x.dtype))
    mean = x - h * (v + w / (2 * t) * (x + (1 - t) * v))
    return (trajectory.states[k + 1] - mean) / math.sqrt(w * h)


@pytest.mark.parametrize("delta", [0.0, 0.3, 1.0, 3.0])
def test_reflection_is_exact_and_stands_as_often_as_two_gaussians_overlap(delta):
    n, g = 40_000, torch.Generator().manual_seed(0)
    z = torch.randn(n, 4, dtype=torch.float64, generator=g)
    u = torch.rand(n, dtype=torch.float64, generator=g)
    out, stands = reflected(z, torch.tensor([0.6, 0.0, -0.8, 0.0]).double().expand(n, 4) * delta, u)
    for axis in (torch.tensor([0.6, 0, -0.8, 0]), torch.tensor([0, 1.0, 0, 0]), torch.tensor([0.8, 0, 0.6, 0])):
        assert kstest((out @ axis.double()).numpy(), "norm").pvalue > 1e-3
    expected = math.erfc(delta / 2 / math.sqrt(2))  # 2 Phi(-delta / 2)
    assert float(stands.double().mean()) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / n))


def worst(trajectory):
    """Of all steps but the last: the least p of their innovations' law, and z of their correlation with what came before."""
    each, p, z = [innovations(trajectory, k) for k in range(len(trajectory.times) - 2)], [], []
    for k, new in enumerate(each):
        p.append(kstest(new.flatten().numpy(), "norm").pvalue)
        for old in (trajectory.states[k], *each[max(k - 1, 0) : k]):
            z.append(float((new * (old - old.mean(0)) / old.std(0)).mean()) * math.sqrt(new.numel()))
    return min(p), max(map(abs, z))


@pytest.mark.parametrize("window", [1, 2, 5])
def test_every_step_draws_from_the_targets_own_law(window):
    out = speculative(linear, noise(), GRID, seeds=range(ROWS), window=window, record=True)
    assert window == 1 or 0.2 < float(out.held.sum()) / float(out.tested.sum()) < 0.95
    p, z = worst(out.trajectory)
    assert p > 1e-4 and z < 4


def test_forgetting_to_reflect_is_noticed(monkeypatch):
    def wrong(z, delta, u):
        out, stands = reflected(z, delta, u)
        return torch.where(stands[:, None], out, z), stands

    monkeypatch.setattr(module, "reflected", wrong)
    assert worst(speculative(linear, noise(), GRID, seeds=range(ROWS), window=5, record=True).trajectory)[1] > 6


def test_a_window_of_one_is_euler_maruyama():
    x = noise(50)
    a = speculative(linear, x, GRID, seeds=range(50), window=1)
    b = euler_maruyama(linear, x, GRID, seeds=range(50))
    torch.testing.assert_close(a.x, b.x)
    assert a.nfe == a.sweeps == b.nfe == 8


def test_fewer_calls_in_a_row_and_every_evaluation_is_counted():
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return linear(x, t)

    grid = uniform(60)
    out = speculative(counted, noise(20), grid, seeds=range(20), window=6)
    assert out.sweeps == len(calls) < 45
    assert 60 <= out.nfe <= 6 * out.sweeps and sum(calls) <= out.nfe * 20


def test_where_the_picture_is_known_every_guess_stands():
    """Data of one point: 8 steps are one, four, and three, whose guesses are three and two; the last step has no noise."""
    calls = []

    def known(z, t):
        calls.append(len(z))
        return (z - 0.5) / t.view(-1, 1)

    out = speculative(known, noise(20), GRID, seeds=range(20), window=4)
    assert calls == [20, 80, 60] and out.sweeps == 3 and out.nfe == 8
    assert out.tested.tolist() == out.held.tolist() == [5] * 20
    torch.testing.assert_close(out.x, torch.full_like(out.x, 0.5))


def test_each_picture_pays_for_its_own_evaluations_only():
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return linear(x, t)

    together = speculative(counted, noise(5), uniform(20), seeds=range(5), window=4)
    paid = sum(calls)
    alone = [speculative(linear, x, uniform(20), seeds=[i], window=4) for i, x in enumerate(noise(5).split(1))]
    assert paid == sum(each.nfe for each in alone) and together.nfe == max(each.nfe for each in alone)
    assert together.tested.tolist() == [int(each.tested) for each in alone]


def test_progress_is_that_of_the_slowest_row():
    seen = []
    speculative(linear, noise(20), GRID, seeds=range(20), window=4, progress=lambda *each: seen.append(each))
    done = [each for each, _ in seen]
    assert done == sorted(done) and {of for _, of in seen} == {8} and done.index(8) == len(done) - 1


def test_noise_is_kept_only_until_its_step_is_settled(monkeypatch):
    kept = []

    class Watched(module._Noise):
        def forget(self, at):
            super().forget(at)
            kept.append(len(self.kept))

    monkeypatch.setattr(module, "_Noise", Watched)
    speculative(linear, noise(2), uniform(30), seeds=range(2), window=3)
    assert len(kept) > 10 and max(kept) <= 2 * 3 and kept[-1] == 0


def test_every_step_of_every_row_is_judged_by_a_number_of_its_own():
    judge = module._Noise([5, 6], noise(2))
    seen = torch.stack([judge.uniform(torch.tensor([k, k])) for k in range(6)])
    assert len(seen.unique()) == 12 and seen.min() > 0 and seen.max() < 1
    assert torch.equal(judge.uniform(torch.tensor([4, 1])), torch.stack([seen[4, 0], seen[1, 1]]))


@pytest.mark.parametrize("diffusion", ["constant", "sbdm", "decreasing", "bump"])
def test_the_diffusion_is_that_of_euler_maruyama(diffusion):
    how = {"seeds": range(4), "diffusion": diffusion, "scale": 0.7}
    ours, theirs = speculative(linear, noise(4), GRID, window=1, **how), euler_maruyama(linear, noise(4), GRID, **how)
    torch.testing.assert_close(ours.x, theirs.x)


@pytest.mark.parametrize("grid", [GRID, uniform(24)[:-2]], ids=["to a step without noise", "to one with noise"])
def test_a_row_is_the_same_alone_as_in_any_batch(grid):
    x = noise(6)
    together = speculative(linear, x, grid, seeds=range(6), window=5)
    for i in range(6):
        alone = speculative(linear, x[i : i + 1], grid, seeds=[i], window=5)
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-12, atol=1e-12)
        assert int(alone.held[0]) == int(together.held[i])


def test_without_noise_it_is_euler_and_nothing_is_guessed():
    x = noise(5)
    out = speculative(linear, x, GRID, seeds=range(5), scale=0.0, window=4)
    torch.testing.assert_close(out.x, euler_maruyama(linear, x, GRID, seeds=range(5), scale=0.0).x)
    assert int(out.held.sum()) == 0


def test_conditions_by_the_row_are_taken_along():
    shift = torch.arange(6, dtype=torch.float64)

    class Conditioned:
        def __init__(self, rows):
            self.rows = rows

        def __call__(self, x, t):
            return linear(x - shift[self.rows, None] * (1 - t[:, None]), t) - shift[self.rows, None]

        def take(self, rows):
            return Conditioned(self.rows[rows])

    out = speculative(Conditioned(torch.arange(6)), noise(6), uniform(40), seeds=range(6), window=4)
    torch.testing.assert_close(out.x.mean(1), shift + 0.5, rtol=0, atol=0.8)


def test_it_is_registered_as_an_sde_and_refuses_what_cannot_be():
    assert tag_of(resolve("sampler", "speculative")).metadata["family"] == "sde"
    for options, says in (
        ({"window": 0}, "window = 0 is not a whole number of 1 or more"),
        ({"window": 2.5}, "window = 2.5 is not"),
        ({"window": True}, "window = True is not"),
        ({"diffusion": "none"}, "no diffusion is named 'none'"),
        ({"seeds": [0]}, "1 seeds for 3 pictures"),
        ({"grid": [0.0, 1.0]}, "goes from noise to data"),
    ):
        how = {"grid": GRID, "seeds": range(3), **options}
        with pytest.raises(UserError, match=says):
            speculative(linear, noise(3), how.pop("grid"), **how)
