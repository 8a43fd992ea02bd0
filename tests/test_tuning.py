"""Learnt time grids: on velocities known in closed form, in files, and through genflow tune."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

import genflow.config
from genflow.cli import main
from genflow.cli.tune import _print_table, psnr
from genflow.data.emoji import EmojiConfig
from genflow.errors import UserError
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.store import load, save_model
from genflow.flows.tuned import save_tuned, tuned
from genflow.functional import noise_from_seeds
from genflow.networks.mmdit import MMDiTConfig
from genflow.samplers import Conditioned, euler, log_snr_uniform, shifted, uniform
from genflow.samplers.tuning import (
    PLANNED,
    Candidate,
    Tuning,
    _cheapest,
    evaluations,
    fine_solve,
    fine_times,
    fit_grid,
    fixed_step,
    hand_made,
    plan,
    steps_within,
    tune,
)
from genflow.text.trained import LearnedTextConfig

MEANS = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
STD = 0.3


def mixture(z, t, means=MEANS):
    """The velocity of equal Gaussians of one spread around some means: E[noise - data | z]."""
    t = t.view(-1, 1)
    variance = (1 - t) ** 2 * STD**2 + t**2
    gaps = z.unsqueeze(1) - (1 - t).unsqueeze(1) * means
    weights = torch.softmax(-gaps.square().sum(2) / (2 * variance), 1).unsqueeze(2)
    gap, mean = (weights * gaps).sum(1), (weights * means).sum(1)
    return (t - (1 - t) * STD**2) / variance * gap - mean


@pytest.fixture
def noise():
    return torch.randn(48, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# ----------------------------------------------------------------------------------------------------------------- tune


def test_the_learnt_grid_beats_every_hand_made_one_on_rows_it_has_not_seen(noise):
    tuning = tune(mixture, noise, steps=6, samplers=["euler", "ab2"])
    hand = [c for c in tuning.candidates if not c.learnt]
    assert {c.sampler for c in hand} == {"euler", "ab2"} and len(hand) == 2 * len(hand_made(6))
    assert tuning.wins and tuning.best.held_out < 0.8 * min(c.held_out for c in hand)
    assert tuning.best.error < 0.8 * min(c.error for c in hand)
    assert tuning.reference_error < 0.1 * tuning.best.held_out
    assert tuning.candidates == sorted(tuning.candidates, key=lambda c: c.error)
    assert tuning.best.name == "tuned" and tuning.hand_made.held_out == min(c.held_out for c in hand)


def test_the_errors_are_those_of_the_grid_that_is_returned(noise):
    best = tune(mixture, noise, steps=4, samplers=["euler"], fitted=30).best
    gap = euler(mixture, noise, best.grid).x - fine_solve(mixture, noise)[0]
    assert best.error == pytest.approx(gap[:30].square().mean().sqrt().item(), rel=1e-6)
    assert best.held_out == pytest.approx(gap[30:].square().mean().sqrt().item(), rel=1e-6)
    assert best.nfe == 4


def test_grids_begin_where_the_samples_of_a_model_do(noise):
    tuning = tune(mixture, 0.9 * noise[:6], steps=3, samplers=["euler"], first=0.9)
    assert {c.grid[0] for c in tuning.candidates} == {0.9} and tuning.best.name == "tuned"
    assert all(a > b for a, b in itertools.pairwise(tuning.best.grid)) and tuning.best.grid[-1] == 0
    gap = euler(mixture, 0.9 * noise[:4], tuning.best.grid).x - fine_solve(mixture, 0.9 * noise[:4], first=0.9)[0]
    assert tuning.best.error == pytest.approx(gap.square().mean().sqrt().item(), rel=1e-6)
    assert fine_times(32, 0.1, 0.9)[0] == 0.9 and all(grid[0] == 0.9 for grid in hand_made(6, 0.1, 0.9).values())


def test_the_picture_taken_at_a_last_time_is_what_is_reached_for(noise):
    def clamped(z, t):  # data = 0.5, as x-prediction gives it below t_min = 0.3
        return (z - 0.5) / t.clamp(min=0.3).view(-1, 1)

    tuning = tune(clamped, noise[:6], steps=3, samplers=["euler"], last=0.3)
    planned = [c for c in tuning.candidates if c.name.startswith("planned")]
    assert planned and min(c.grid[-2] for c in planned) >= 0.3  # all below is one step
    assert tuning.best.error < 1e-9  # the end of the fine solve from there is the data
    far = euler(clamped, noise[:4], uniform(3)).x - 0.5
    uniform_one = next(c for c in tuning.candidates if c.name == "uniform")
    assert uniform_one.error == pytest.approx(far.square().mean().sqrt().item(), rel=1e-6)


def test_the_best_three_solvers_are_fitted_from_both_kinds_of_grids(noise):
    lines, solvers = [], ["euler", "heun", "midpoint", "rk4"]
    tuning = tune(mixture, noise[:6], steps=3, samplers=solvers, say=lines.append)
    given = [c for c in tuning.candidates if c.name != "tuned"]
    leaders = sorted(solvers, key=lambda name: min(c.error for c in given if c.sampler == name))[:3]
    fitted = {c.sampler: c for c in tuning.candidates if c.name == "tuned"}
    assert set(fitted) == set(leaders)
    for name in solvers:
        least = min(c.error for c in given if c.sampler == name)
        assert f"{name}: RMSE {least:.3g} on the best of them" in lines
    for name, found in fitted.items():
        own = [c for c in given if c.sampler == name]
        assert found.error <= min(c.error for c in own)
        for learnt in (False, True):
            start = min((c for c in own if c.learnt == learnt), key=lambda c: c.error).name
            assert any(line.startswith(f"{name}, fitted from {start}: ") for line in lines)


def test_a_grid_that_meets_a_nan_is_the_worst_and_no_end_of_the_search(noise):
    def holed(z, t):  # at one time only
        return torch.where((t - 0.37).abs().view(-1, 1) < 1e-9, math.nan, mixture(z, t))

    grids = {"through the hole": [1, 0.37, 0], "beside it": [1, 0.5, 0]}
    tuning = tune(holed, noise[:6], steps=2, samplers=["euler"], grids=grids)
    assert tuning.candidates[-1].name == "through the hole" and tuning.candidates[-1].error == math.inf
    assert tuning.best.error < math.inf and tuning.hand_made.name == "beside it"


def test_hand_made_grids_are_compared_on_the_rows_held_out():
    rows = [("tuned", 0.1, 0.3, True), ("nearest", 0.2, 0.9, False), ("safest", 0.4, 0.3, False)]
    tuning = Tuning([Candidate("euler", n, [1.0, 0.5, 0.0], 2, e, h, learnt) for n, e, h, learnt in rows], 0.0)
    assert tuning.best.name == "tuned" and tuning.hand_made.name == "safest" and tuning.wins


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_learnt_grid_falls_from_exactly_one_to_exactly_zero(steps, noise):
    grid = tune(mixture, noise[:6], steps=steps, samplers=["euler"]).best.grid
    assert len(grid) == steps + 1 and grid[0] == 1.0 and grid[-1] == 0.0
    assert all(a > b for a, b in itertools.pairwise(grid))


def test_the_same_question_has_the_same_answer(noise):
    first, second = (tune(mixture, noise[:12], steps=4, samplers=["ab2"]) for _ in range(2))
    assert first == second


def test_the_rows_held_out_have_no_say(noise):
    other = torch.cat([noise[:8], noise[20:24]])
    grids = [tune(mixture, rows, steps=3, samplers=["euler"], fitted=8).best.grid for rows in (noise[:12], other)]
    assert grids[0] == grids[1]


def test_rows_with_conditions_of_their_own_are_taken_apart(noise):
    conditions = torch.randn(9, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sizes = set()

    def network(z, t, means):
        sizes.add(len(z))
        return mixture(z, t, means)

    def together(z, t):  # as before, but it cannot be taken apart
        return mixture(z, t, conditions)

    apart = tune(Conditioned(network, (conditions,)), noise[:9], steps=3, samplers=["euler"])
    assert sizes == {9, 6}  # all to judge, two thirds to fit
    assert apart.best.grid == pytest.approx(tune(together, noise[:9], steps=3, samplers=["euler"]).best.grid, abs=1e-9)


def test_by_default_all_solvers_cost_the_same(noise):
    lines = []
    tuning = tune(mixture, noise[:4], steps=3, say=lines.append)
    assert {c.nfe for c in tuning.candidates} == {3}
    assert {"euler", "ab2", "ipndm"} <= {c.sampler for c in tuning.candidates}
    assert "fine solve" in lines[0] and any("fitted from" in line for line in lines)
    heun = tune(mixture, noise[:4], steps=3, samplers=["heun"])
    assert {c.nfe for c in heun.candidates} == {5}


def test_given_references_and_grids_are_used(noise):
    tuning = tune(
        mixture, noise[:4], steps=2, samplers=["euler"], reference=torch.zeros(4, 6), grids={"mine": [1, 0.3, 0]}
    )
    mine = next(c for c in tuning.candidates if c.name == "mine")
    end = euler(mixture, noise[:4], [1.0, 0.3, 0.0]).x
    assert mine.error == pytest.approx(end[:2].square().mean().sqrt().item())
    assert not [c for c in tuning.candidates if c.name == "uniform"] and tuning.reference_error == 0


def test_where_nothing_is_left_to_learn_hand_made_grids_are_not_beaten(noise):
    tuning = tune(mixture, noise[:4], steps=1, samplers=["euler"])
    assert tuning.wins and tuning.best.held_out == tuning.hand_made.held_out


def test_a_hand_made_grid_that_is_better_on_other_rows_is_told(noise):
    data = MEANS[:1].expand(4, 6)
    reference = torch.cat([data[:3], euler(mixture, noise[3:4], [1, 0.9, 0]).x])  # a last row made for one grid
    grids = {"uniform": uniform(2), "early": [1, 0.9, 0]}
    tuning = tune(mixture, noise[:4], steps=2, samplers=["euler"], fitted=3, reference=reference, grids=grids)
    assert not tuning.wins and tuning.hand_made.name == "early"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "nearest possible number is 1"),
        ({"steps": 2, "samplers": ["hoin"]}, "no sampler is named 'hoin'"),
        ({"steps": 2, "samplers": ["dopri5"]}, r"dopri5 is not an ODE solver of fixed steps\. Choose from: .*heun"),
        ({"steps": 2, "fitted": 4}, "leave none to check"),
        ({"steps": 2, "fitted": 0}, "0 of them to fit"),
        ({"steps": 2, "last": 1.0}, "last = 1.0"),
        ({"steps": 2, "grids": {"mine": [0.5, 0.9, 0]}}, "must fall"),
        (
            {"steps": 2, "grids": {"mine": uniform(5)}},
            "grid 'mine' has 5 steps from 1.0 to 0.0; 2 steps from 1.0 to 0.0 are",
        ),
        ({"steps": 2, "grids": {"mine": [1, 0.5, 0.1]}}, "2 steps from 1.0 to 0.1"),
        ({"steps": 2, "grids": {"mine": [0, 0.5, 1]}}, "2 steps from 0.0 to 1.0"),
        ({"steps": 2, "grids": {"mine": uniform(2)}, "first": 0.9}, "2 steps from 0.9 to 0.0 are tuned"),
        ({"steps": 100, "grids": {}}, "grids is empty"),
        ({"steps": 2, "reference": torch.zeros(3, 6)}, r"reference is \(3, 6\), and noise \(4, 6\)"),
    ],
)
def test_impossible_tunings_are_refused(arguments, message, noise):
    with pytest.raises(UserError, match=message):
        tune(mixture, noise[:4], **arguments)


def test_a_velocity_of_nan_is_no_endless_search(noise):
    with pytest.raises(UserError, match="finite"):
        tune(lambda z, t: z * math.nan, noise[:4], steps=3, samplers=["euler"])


# ------------------------------------------------------------------------------------------------------------ its parts


def test_a_fit_finds_a_known_grid():
    target = torch.tensor([0.9, 0.35, 0.3, 0.02], dtype=torch.float64)
    found = fit_grid(lambda grid: torch.tensor(grid[1:-1], dtype=torch.float64) - target, uniform(5))
    assert found[1:-1] == pytest.approx(target.tolist(), abs=2e-3)


def test_a_fit_is_never_worse_than_its_start():
    best = shifted(4, 2.0)

    def miss(grid):  # a kink at the start: no direction is better
        return torch.tensor([abs(a - b) ** 0.5 for a, b in zip(grid, best, strict=True)])

    assert fit_grid(miss, best) == best


def test_a_fit_that_nothing_moves_leaves_the_grid():
    assert fit_grid(lambda grid: torch.ones(2), uniform(3)) == uniform(3)


def test_a_fit_ends_where_all_around_is_nan():
    def miss(grid):
        assert all(a > b for a, b in itertools.pairwise(grid))
        return torch.tensor([1.0 if grid == uniform(3) else math.nan])

    assert fit_grid(miss, uniform(3)) == uniform(3)


def test_the_weight_of_a_plan_is_on_the_errors_before():
    costs = torch.full((4, 4), math.inf, dtype=torch.float64)
    costs[0, 1], costs[1, 3] = 1.0, 0.0  # the error early
    costs[0, 2], costs[2, 3] = 0.0, 0.9  # and late
    assert _cheapest(costs, 2, 0.8) == [0, 1, 3] and _cheapest(costs, 2, 1.0) == [0, 2, 3]
    costs[2, 3] = 1.1
    assert _cheapest(costs, 2, 1.0) == [0, 1, 3] and _cheapest(costs, 2, 1.2) == [0, 2, 3]


def test_the_cheapest_way_is_the_cheapest_of_all():
    costs = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)).double().triu(1)
    costs = torch.where(costs > 0, costs, math.inf)
    for weight in (0.8, 1.0, 1.3):

        def total(way, weight=weight):
            legs = [costs[a, b].item() for a, b in itertools.pairwise(way)]
            return sum(leg * weight ** (len(legs) - 1 - i) for i, leg in enumerate(legs))

        ways = [(0, *middle, 7) for middle in itertools.combinations(range(1, 7), 3)]
        assert tuple(_cheapest(costs, 4, weight)) == min(ways, key=total)


def test_a_plan_has_a_step_begin_where_the_way_turns(noise):
    def turning(z, t):
        return torch.where(t > 0.3, 1.0, -1.0).view(-1, 1).expand_as(z)

    for grid in plan(turning, noise, 2, rows=48).values():
        assert grid == [1.0, pytest.approx(0.3, abs=0.03), 0.0]
    for grid in plan(mixture, noise, 5, rows=48).values():
        assert len(grid) == 6 and grid[0] == 1.0 and grid[-1] == 0.0
    for steps in (len(fine_times(PLANNED, 0.0)) - 1, len(fine_times(PLANNED, 0.0)), 200):
        assert plan(mixture, noise, steps, rows=48) == {}  # no fewer than the fine trajectory has


def test_a_fine_solve_knows_its_own_error(noise):
    x, told = fine_solve(mixture, noise, steps=64)
    error = (x - fine_solve(mixture, noise, steps=1024)[0]).square().mean().sqrt().item()
    assert 0.3 * told < error < 3 * told


def test_the_error_of_a_fine_solve_is_told_where_it_is_known(noise):
    x, told = fine_solve(lambda z, t: -z, noise, steps=32)
    assert (x - math.e * noise).square().mean().sqrt().item() == pytest.approx(told, rel=0.35)


def test_fine_times_are_three_quarters_equal_and_a_quarter_in_log_snr():
    assert fine_times(64, 0.0) == sorted({*uniform(48), *log_snr_uniform(16)}, reverse=True)
    with pytest.raises(UserError, match=r"last = -0.1 is not within 0 .. 1.0"):
        fine_times(64, -0.1)


def test_a_fine_solve_may_take_the_prediction_at_its_last_time(noise):
    def clamped(z, t):  # data = 0.5, as x-prediction gives it: (z - x) / max(t, 0.1)
        return (z - 0.5) / t.clamp(min=0.1).view(-1, 1)

    assert fine_solve(clamped, noise)[0].sub(0.5).abs().max() > 0.03
    assert fine_solve(clamped, noise, last=0.1)[0].sub(0.5).abs().max() < 1e-9
    assert fine_times(32, 0.1)[-2:] == [0.1, 0.0] and fine_times(32, 0.0)[-1] == 0.0


def test_evaluations_are_those_of_the_solver():
    assert [evaluations(name, 5) for name in ("euler", "ab3", "heun", "midpoint", "rk4")] == [5, 5, 9, 10, 20]
    assert [steps_within(name, 9) for name in ("euler", "heun", "midpoint", "rk4")] == [9, 5, 4, 2]
    assert steps_within("rk4", 3) is None and steps_within("rk4", 500) == 125
    assert {"euler", "heun", "ab2"} <= set(fixed_step()) and "dopri5" not in fixed_step()


def test_hand_made_grids_are_all_different():
    grids = hand_made(6)
    assert len({tuple(grid) for grid in grids.values()}) == len(grids)
    assert {"uniform", "karras", "shifted 2.0"} <= set(grids) and "shifted" not in grids
    ended = hand_made(6, last=0.1)
    assert ended["uniform, last 0.1"] == pytest.approx([1, 0.82, 0.64, 0.46, 0.28, 0.1, 0])
    assert hand_made(6, 0.1, 0.9)["uniform, last 0.1"] == pytest.approx([0.9, 0.74, 0.58, 0.42, 0.26, 0.1, 0])
    assert hand_made(1, 0.1) == {"uniform": [1.0, 0.0]}
    for grid in ended.values():
        assert len(grid) == 7 and grid[0] == pytest.approx(1) and grid[-1] == 0


# --------------------------------------------------------------------------------------------- in files and by command

TEXT = LearnedTextConfig(dim=8, heads=2, layers=1, max_tokens=8)
MODEL = MMDiTConfig(
    depth=1, hidden=16, heads=2, patch_size=8, in_channels=3, context_dim=8, pooled_dim=8, sample_size=2
)
FLOW = RectifiedFlowConfig(prediction="x")


@pytest.fixture
def model(tmp_path):
    """A folder with a tiny model that never learned anything."""
    torch.manual_seed(0)
    flow = FLOW.build(MODEL.build(), TEXT.build(), shape=(3, 16, 16))
    for p in flow.network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    sections = {
        "model": ("mmdit", MODEL),
        "flow": ("rectified", FLOW),
        "text": ("learned", TEXT),
        "data": ("emoji", EmojiConfig(limit=5)),
    }
    config = {key: {"name": name, **genflow.config.to_dict(each)} for key, (name, each) in sections.items()}
    config |= {"sample": {"sampler": "euler", "steps": 3, "guidance": 1.5, "shift": 3.0}, "shape": [3, 16, 16]}
    save_model(tmp_path / "model", config=config, state=flow.state_dict())
    return tmp_path / "model"


FOUND = {"sampler": "ab2", "grid": [1.0, 0.4, 0.0], "nfe": 2, "error": 0.5}


def test_what_was_learnt_is_kept_by_steps(model):
    assert tuned(model, 2) is None
    save_tuned(model, 2, FOUND)
    save_tuned(model, 1, {**FOUND, "grid": [1.0, 0.0]})
    save_tuned(model, 2, {**FOUND, "sampler": "euler"})
    assert tuned(model, 2) == {**FOUND, "sampler": "euler"} and tuned(str(model), 1)["grid"] == [1.0, 0.0]
    assert tuned(model, 3) is None
    assert sorted(p.name for p in model.iterdir()) == ["config.json", "model.safetensors", "sampling.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"2": 3}',
        '{"2": {"sampler": "ab2"}}',
        '{"2": {"sampler": "ab2", "grid": [1, 0]}}',
        '{"2": {"sampler": 1, "grid": [1, 0.5, 0]}}',
        '{"2": {"sampler": "ab2", "grid": [1, 2, 0]}}',
        '{"two": {"sampler": "ab2", "grid": [1, 0.5, 0]}}',
    ],
)
def test_a_damaged_file_is_told_in_one_line(model, text):
    (model / "sampling.json").write_text(text)
    with pytest.raises(UserError, match=r"sampling\.json is damaged.*tune again") as error:
        tuned(model, 2)
    assert "\n" not in str(error.value)


def test_a_grid_of_numpy_is_kept_as_numbers(model):
    save_tuned(model, 2, {**FOUND, "grid": np.array([1, 0.5, 0], dtype=np.float32)})
    assert tuned(model, 2) == {**FOUND, "grid": [1.0, 0.5, 0.0]}


def test_only_models_have_learnt_grids(tmp_path, model):
    with pytest.raises(UserError, match="does not exist"):
        save_tuned(tmp_path / "nowhere", 2, FOUND)
    with pytest.raises(UserError, match="damaged"):
        save_tuned(model, 5, FOUND)
    assert not (model / "sampling.json").exists()


def test_tune_learns_a_grid_and_keeps_it(model, capsys):
    arguments = ["tune", str(model), "--samplers", "euler", "ab2", "--images", "4"]
    assert main([*arguments, "--steps", "3"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "RMSE" in out and "PSNR" in out and f"saved in {model / 'sampling.json'}" in lines[-1]
    assert sum("*" in line for line in lines) == 1 and "fine solve" in err
    found = tuned(model, 3)
    assert found["sampler"] in ("euler", "ab2") and len(found["grid"]) == 4 and found["nfe"] == 3
    assert found["under"]["guidance"] == 1.5 and found["images"] == 4
    assert main([*arguments, "--steps", "2", "--prompt", "a", "--prompt", "b", "--guidance", "1"]) == 0
    assert tuned(model, 2)["under"]["guidance"] == 1 and tuned(model, 3) == found


@pytest.fixture
def asked(monkeypatch):
    """What `genflow tune` asks `tune`, whose answer is that a hand-made grid is better."""
    found = {}

    def answered(velocity, noise, **how):
        found.update(velocity=velocity, noise=noise, **how)
        rows = [("tuned", 0.1, 0.4, True), ("hand", 0.3, 0.2, False)]
        return Tuning([Candidate("euler", n, [1.0, 0.5, 0.0], 2, e, h, learnt) for n, e, h, learnt in rows], 0.0)

    monkeypatch.setattr("genflow.samplers.tuning.tune", answered)
    return found


def test_every_third_picture_checks_what_the_others_fit(model, asked, capsys):
    how = ["--steps", "2", "--images", "6", "--seed", "7", "--prompt", "a", "--prompt", "b", "--samplers", "ab2"]
    assert main(["tune", str(model), *how]) == 0
    flow, seeds = load(model), [7, 8, 10, 11, 9, 12]
    assert torch.equal(asked["noise"], noise_from_seeds(seeds, (3, 16, 16))) and asked["fitted"] == 4
    assert (asked["steps"], asked["samplers"], asked["first"], asked["last"]) == (2, ["ab2"], 1.0, flow.config.t_min)
    own = {"shifted 3.0": flow.times(2, "shifted", 3.0)}
    assert asked["grids"] == {**hand_made(2, flow.config.t_min, 1.0), **own}
    with torch.no_grad():
        condition = flow.embed(flow.text.encode(["ab"[(seed - 7) % 2] for seed in seeds]))
        expected = flow.guided(condition, guidance=1.5)(asked["noise"], torch.full((6,), 0.5))
        torch.testing.assert_close(asked["velocity"](asked["noise"], torch.full((6,), 0.5)), expected)
    found = tuned(model, 2)
    assert (found["name"], found["error"], found["images"]) == ("hand", 0.2, 6)
    assert "the fitted grid does not hold: euler on hand is better" in capsys.readouterr().out


def test_captions_are_taken_from_all_over_the_training_data(model, asked, monkeypatch):
    from genflow.cli import tune as command

    texts = []
    monkeypatch.setattr(command, "captions", lambda flow, run: [f"caption {i}" for i in range(9)])
    monkeypatch.setattr(command, "embed", lambda flow, prompts: texts.extend(prompts) or flow.embed(flow.text.null()))
    assert main(["tune", str(model), "--steps", "2", "--images", "4"]) == 0
    assert texts == [f"caption {i}" for i in (0, 2, 6, 4)]


def test_the_table_has_the_best_held_out_grid_of_each_kind_and_solver(capsys):
    rows = [
        ("tuned", 0.2, 0.03, True),
        ("planned 0.8", 0.3, 0.05, True),
        ("near", 0.1, 0.09, False),
        ("far", 0.4, 0.07, False),
    ]
    found = Tuning([Candidate("euler", n, [1.0, 0.5, 0.0], 2, e, h, learnt) for n, e, h, learnt in rows], 0.0)
    _print_table(found, found.best, pictures=True)
    lines = capsys.readouterr().out.splitlines()[2:5]
    assert [line.split()[1] for line in lines] == ["tuned", "planned", "far"]
    assert [line.endswith("*") for line in lines] == [name == "tuned" for name in ("tuned", "planned", "far")]
    assert psnr(0.2) == pytest.approx(20) and psnr(0) == math.inf  # of a range of 2


@pytest.fixture
def quieter(tmp_path):
    """A folder with a model whose samples begin at 0.95."""
    flow = RectifiedFlowConfig(prediction="eps")
    torch.manual_seed(0)
    state = flow.build(MODEL.build(), TEXT.build(), shape=(3, 16, 16)).state_dict()
    config = {"model": genflow.config.to_dict(MODEL), "flow": genflow.config.to_dict(flow), "shape": [3, 16, 16]}
    save_model(tmp_path, config={**config, "text": genflow.config.to_dict(TEXT)}, state=state)
    return tmp_path


def test_a_model_that_samples_from_less_noise_is_tuned_so(quieter):
    how = ["--steps", "2", "--images", "3", "--prompt", "a", "--samplers", "euler"]
    assert main(["tune", str(quieter), *how]) == 0
    assert tuned(quieter, 2)["grid"][0] == 0.95


def test_it_begins_at_that_noise_in_every_hand_made_grid_and_ends_at_0(quieter, asked):
    assert main(["tune", str(quieter), "--steps", "2", "--images", "3", "--prompt", "a"]) == 0
    assert (asked["first"], asked["last"], asked["grids"]) == (0.95, 0.0, hand_made(2, 0.0, 0.95))
    assert torch.equal(asked["noise"], 0.95 * noise_from_seeds([0, 1, 2], (3, 16, 16)))


def test_vectors_have_no_decibels(capsys):
    rows = [("tuned", 0.1, 0.3, True), ("uniform", 0.3, 0.4, False)]
    found = Tuning([Candidate("euler", n, [1.0, 0.5, 0.0], 2, e, h, learnt) for n, e, h, learnt in rows], 0.0)
    _print_table(found, found.best, pictures=False)
    assert "held-out vectors" in (out := capsys.readouterr().out) and "PSNR" not in out


def test_sample_draws_with_what_was_learnt(model, tmp_path, capsys):
    from genflow.data.pictures import read_settings

    save_tuned(model, 2, FOUND)
    assert main(["sample", str(model), "--prompt", "a", "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    settings = read_settings(tmp_path / "out" / "grid.png")
    assert settings["sampler"] == "ab2" and settings["grid"] == [1.0, 0.4, 0.0] and settings["nfe"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "nearest possible number is 1"),
        (["--steps", "2", "--images", "1"], "--images must be 3 or more"),
        (["--steps", "2", "--samplers", "eulr"], "no sampler is named 'eulr'. Did you mean 'euler'?"),
        (["--steps", "2", "--samplers", "tsit5"], "not an ODE solver of fixed steps"),
    ],
)
def test_mistakes_cost_one_line(model, arguments, message, capsys):
    assert main(["tune", str(model), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("genflow: ")


def test_a_model_whose_data_are_gone_needs_prompts(model, capsys):
    config = json.loads((model / "config.json").read_text())
    config["data"] = {"name": "emoji", "styles": ["nothing"]}
    (model / "config.json").write_text(json.dumps(config))
    assert main(["tune", str(model), "--steps", "2", "--images", "3"]) == 2
    assert '--prompt "..."' in capsys.readouterr().err


def test_a_grid_is_tuned_under_another_default_device():
    noise = torch.randn(6, 3)
    with torch.device("meta"):
        found = tune(lambda x, t: torch.tanh(x), noise, steps=2)
    assert found.best.grid == tune(lambda x, t: torch.tanh(x), noise, steps=2).best.grid
