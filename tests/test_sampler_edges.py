"""Edges of the samplers: rows that stopped on the way, states of one number, options of the wrong type, other defaults."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from genflow import registry
from genflow.cli.options import read_options
from genflow.errors import UserError
from genflow.flows.sampling import SolveConfig
from genflow.functional import Rng, noise_from_seeds
from genflow.samplers import APG, bound_sampler, euler, heun, shifted, uniform, unipc
from genflow.samplers.adaptive import dopri5
from genflow.samplers.editing import inpaint, rf_inversion
from genflow.samplers.fixed_point import fixed_point
from genflow.samplers.interpolation import slerp
from genflow.samplers.parallel import picard
from genflow.samplers.paths import Path, model_from, velocity_from
from genflow.samplers.speculative import speculative
from genflow.samplers.stochastic import euler_maruyama, restart
from genflow.samplers.tuning import tune


def falling(x, t):
    return -x


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_row_that_stopped_on_the_way_to_noise_is_reported():
    def wild(z, t):  # in the first row
        return torch.cat([torch.sin(40 * z[:1]) * 5, 0 * z[1:]])

    x, noise = draw(2, 1, 4, 4), draw(2, 1, 4, 4, seed=1)
    sampler = partial(dopri5, max_steps=5, compact=False)
    for back in (lambda z, t: 0 * z, wild):
        status = rf_inversion(wild, back, x, noise, [1.0, 0.0], gamma=0.0, eta=0.0, sampler=sampler).status
        assert status[0].startswith("stopped at t = 0.") and float(status[0].split()[4]) < 0.5 and status[1] == "ok"


def test_a_row_that_stopped_at_an_early_step_of_resampling_is_reported():
    def wild(z, t):  # before the second step
        return torch.where(t.view(-1, 1, 1, 1) > 0.5, torch.sin(60 * z) * 20, 0 * z)

    x, noise, mask = draw(2, 1, 4, 4), draw(2, 1, 4, 4, seed=1), torch.ones(1, 1, 4, 4)
    how = {"repeats": 2, "seeds": [0, 1], "sampler": partial(dopri5, max_steps=12)}
    assert not inpaint(wild, x, mask, noise, [1.0, 0.5, 0.0], **how).ok
    first = inpaint(lambda z, t: torch.sin(60 * z) * 20, x, mask, noise, [1.0, 0.5, 0.0], **how).status[0]
    assert first.startswith("stopped at t = 0.") and float(first.split()[4]) > 0.5
    assert inpaint(falling, x, mask, noise, [1.0, 0.5, 0.0], **how).ok


@pytest.mark.parametrize(
    ("sampler", "words", "message"),
    [
        ("unipc", "order=2.0", "order = 2.0 is not a whole number"),
        ("unipc", "variant=3", "variant = 3 is not a name"),
        ("unipc", "lower_order_final=maybe", "lower_order_final = 'maybe' is not true or false"),
        ("unipc", "lower_order_final=1", "lower_order_final = 1 is not true or false"),
        ("dopri5", "compact=maybe", "compact = 'maybe' is not true, false or null"),
        ("dopri5", "rtol=abc", "rtol = 'abc' is not a number"),
        ("restart", "interval=0.2", "interval = 0.2 is not two numbers"),
        ("restart", "interval=[0.1]", r"interval = \[0.1\] is not two numbers"),
        ("restart", 'interval=["a","b"]', "is not two numbers"),
        ("euler_maruyama", "diffusion=[1]", r"diffusion = \[1\] is not a name"),
    ],
)
def test_an_option_of_another_type_costs_one_line(sampler, words, message):
    with pytest.raises(UserError, match=message):
        bound_sampler(sampler, read_options("--option", [words]), [0])


@pytest.mark.parametrize(
    ("sampler", "lacking"),
    [
        (lambda velocity, x, grid: ..., "progress"),
        (lambda velocity, x, grid, progress=None: ..., "record"),
        (lambda velocity, x, grid, progress=None, record=False: ..., None),
        (lambda velocity, x, grid, **how: ..., None),
    ],
)
def test_a_sampler_that_takes_no_progress_or_record_costs_one_line(monkeypatch, sampler, lacking):
    monkeypatch.setitem(registry._live, ("sampler", "mine"), sampler)
    refused = pytest.raises(UserError, match=f"sampler mine does not take {lacking}=") if lacking else nullcontext()
    with refused:
        bound_sampler("mine", {}, [0])


@pytest.mark.parametrize(("text", "value"), [("False", False), ("false", False), ("True", True), ("null", None)])
def test_truth_is_read_as_in_json_and_as_in_python(text, value):
    assert read_options("--option", [f"compact={text}"]) == {"compact": value}
    bound_sampler("dopri5", {"compact": value}, ())


def test_an_option_of_truth_is_heard_from_the_command_line():
    options = read_options("--option", ["order=3", "lower_order_final=False"])
    v, x = lambda x, t: -x * t[:, None] ** 2, torch.ones(2, 3)
    ours = bound_sampler("unipc", options, ())(v, x, shifted(6)).x
    assert torch.equal(ours, unipc(v, x, shifted(6), order=3, lower_order_final=False).x)
    assert not torch.equal(ours, unipc(v, x, shifted(6), order=3).x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "unipc", "options": {"order": 7}}, "order = 7"),
        ({"sampler": "euler_maruyama", "options": {"diffusion": "sigam"}}, "Did you mean 'sigma'"),
        ({"sampler": "dopri5", "options": {"rtol": 1e-9}}, "rtol = 1e-09"),
        ({"sampler": "ancestral", "options": {"eta": 3}}, "eta = 3"),
        ({"sampler": "restart", "options": {"interval": [0.3, 0.1]}}, "restart interval"),
        ({"sampler": "picard", "options": {"window": 0}}, "window = 0"),
        ({"sampler": "dopri5", "guide": APG(momentum=-0.5)}, "guidance with momentum"),
    ],
)
def test_a_config_refuses_what_the_first_preview_would(settings, message):
    with pytest.raises(UserError, match=message):
        SolveConfig(**settings)


def test_restart_stays_within_its_grid():
    with pytest.raises(UserError, match=r"reaches above the grid, which starts at 0.15; try \(0.05, 0.15\)"):
        restart(falling, draw(2, 3), [0.15, 0.1, 0.0], seeds=[0, 1])
    seen = []

    def velocity(x, t):
        seen.append(float(t[0]))
        return -x

    restart(velocity, draw(2, 3), [0.15, 0.1, 0.0], seeds=[0, 1], interval=(0.05, 0.15))
    assert max(seen) == pytest.approx(0.15)


@pytest.mark.parametrize("first", [0.999, 0.9933071490757153, 0.0468])
def test_the_interval_that_restart_advises_is_one_that_it_takes(first):
    grid = [first, first / 2, 0.0]
    with pytest.raises(UserError, match="reaches above the grid") as refused:
        restart(falling, draw(2, 3), grid, seeds=[0, 1], interval=(0.0, 1.0))
    lo, hi = str(refused.value).partition("; try ")[2].strip("()").split(", ")
    restart(falling, draw(2, 3), grid, seeds=[0, 1], interval=(float(lo), float(hi)))


def test_speculative_guesses_at_no_step_without_noise():
    calls = []

    def velocity(x, t):
        calls.append(len(t))
        return -x

    solution = speculative(velocity, draw(2, 4), uniform(6), seeds=[0, 1], scale=0.0)
    assert solution.tested.tolist() == [0, 0] and solution.nfe == 6 and calls == [2] * 6
    assert torch.allclose(solution.x, euler(falling, draw(2, 4), uniform(6)).x)


def test_a_state_may_be_one_number():
    y = draw(4)
    column = y[:, None]
    for sampler in (picard, partial(speculative, seeds=[0, 1, 2, 3]), partial(picard, record=True)):
        torch.testing.assert_close(sampler(falling, y, uniform(4)).x, sampler(falling, column, uniform(4)).x[:, 0])
    torch.testing.assert_close(slerp(y, y.flip(0), 0.5), slerp(column, column.flip(0), 0.5)[:, 0])
    found = fixed_point(lambda x: x / 2 + 1, y)
    assert found.x == pytest.approx(torch.full((4,), 2.0), abs=1e-5) and found.change.shape == (4,)
    assert tune(lambda x, t: -x * t, y, steps=2, samplers=["euler"]).best.error < 1


def test_noise_and_solves_do_not_depend_on_the_defaults_of_torch():
    index, x = torch.arange(2), draw(3, 4)
    samplers = [heun, unipc, picard, *(partial(each, seeds=[0, 1, 2]) for each in (euler_maruyama, speculative))]
    there = [sampler(falling, x, uniform(4)).x for sampler in samplers]
    noise, even = noise_from_seeds([1], (2,)), Rng(0).uniform("a", index, (3,))
    with torch.device("meta"):
        assert torch.equal(noise_from_seeds([1], (2,)), noise) and torch.equal(Rng(0).uniform("a", index, (3,)), even)
        for sampler, expected in zip(samplers, there, strict=True):
            assert torch.equal(sampler(falling, x, uniform(4)).x, expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert noise_from_seeds([1], (2,)).dtype == noise_from_seeds([], (2,)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_of_another_path_takes_a_number_or_a_tensor_for_its_time():
    z, path = draw(3, 4), Path.vp()
    model = model_from(falling, path, "eps")
    alone = model(z, 0.5)
    assert torch.equal(alone, model(z, torch.full((3,), 0.5))) and alone.dtype == torch.float32
    back = velocity_from(model, path, "eps")(z, torch.full((3,), 0.4))
    torch.testing.assert_close(back, -z, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", [euler, heun, dopri5, unipc, picard])
@pytest.mark.parametrize("x", [np.ones((2, 3)), [[1.0, 2.0]]])
def test_a_beginning_that_is_no_tensor_is_told_so(sampler, x):
    with pytest.raises(UserError, match=f"begins at a {type(x).__name__}, not a tensor"):
        sampler(lambda x, t: -x, x, [1.0, 0.5, 0.0])


@pytest.mark.parametrize("sampler", [euler, heun, dopri5, unipc, picard])
@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(2, 3, dtype=torch.complex64)])
def test_a_beginning_that_is_no_batch_of_real_numbers_is_told_so(sampler, x):
    with pytest.raises(UserError, match=r"a solve begins at B x \.\.\. real numbers, not at torch"):
        sampler(lambda x, t: -x, x, [1.0, 0.5, 0.0])


@pytest.mark.parametrize("sampler", [euler, heun, dopri5, unipc, picard])
def test_a_velocity_that_returns_a_tuple_is_told_so(sampler):
    with pytest.raises(UserError, match=r"the velocity returned a tuple, not a tensor"):
        sampler(lambda x, t: (x,), torch.ones(2, 3), [1.0, 0.5, 0.0])


@pytest.mark.parametrize("sampler", [euler, heun, dopri5, unipc])
@pytest.mark.parametrize("written", ["x", "t"])
def test_a_velocity_that_writes_into_what_it_is_given_is_told_so(sampler, written):
    def velocity(x, t):
        answer = t[:, None] - x
        (x if written == "x" else t).mul_(1000)
        return answer

    with pytest.raises(UserError, match="the velocity wrote into the x or t that it was given"):
        sampler(velocity, torch.ones(2, 3), [1.0, 0.5, 0.0])


def test_a_whole_solve_is_one_graph_to_a_compiler():
    solve = lambda x: heun(lambda x, t: t[:, None] - x, x, [1.0, 0.5, 0.0]).x
    x = torch.ones(2, 3)
    torch.testing.assert_close(torch.compile(solve, backend="eager", fullgraph=True)(x), solve(x))


@pytest.mark.parametrize("sampler", [euler, dopri5, picard])
def test_a_trajectory_begins_where_the_solve_did_though_the_noise_is_written_to(sampler):
    noise = torch.randn(2, 3)
    solution, start = sampler(falling, noise, uniform(2), record=True), noise.clone()
    noise.zero_()
    assert torch.equal(solution.trajectory.states[0], start)


@pytest.mark.parametrize("solve", [dopri5, picard, lambda v, x, grid: fixed_point(lambda z: z / 2, x)])
def test_what_goes_by_the_numbers_of_a_row_tells_vmap_so(solve):
    with pytest.raises(UserError, match="waits for numbers of its rows, which vmap hides"):
        torch.func.vmap(lambda row: solve(falling, row[None], [1.0, 0.0]).x[0])(draw(3, 2))
