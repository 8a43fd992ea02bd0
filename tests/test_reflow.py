"""Reflow: pairs that can be drawn again, straighter paths on them, and the distance that shows it."""

import json
import math

import pytest
import torch

from genflow.cli import main
from genflow.cli import reflow as command
from genflow.config import from_dict
from genflow.data.loading import StreamSampler, loader
from genflow.data.pairs import PairsConfig, write_pairs
from genflow.data.prepared import PreparedConditions
from genflow.errors import UserError
from genflow.evaluation.few_steps import FewSteps, plot_few_steps
from genflow.evaluation.frechet import frechet_distance
from genflow.flows.couplings import Independent, OptimalTransport, Paired
from genflow.flows.densities import Uniform
from genflow.flows.paths import CosinePath, VPPath
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.reflow import OneStep, draw_pairs, reflow_config, straightness
from genflow.flows.store import load
from genflow.functional import Rng, noise_from_seeds
from genflow.networks.velocity import MLPVelocityConfig
from genflow.samplers import Trajectory
from genflow.text.none import NoTextConfig
from genflow.training.config import RunConfig
from genflow.training.run import train

NONE = NoTextConfig().build()


def make(**config):
    torch.manual_seed(0)
    network = MLPVelocityConfig(hidden=32, depth=2, shape=(2,), pooled_dim=0).build()
    return RectifiedFlowConfig(density=Uniform(), **config).build(network, NONE, shape=(2,))


class Batch:
    def __init__(self, x, noise, step):
        self.x, self.noise = x, noise
        self.condition, self.position = NONE.encode([""] * len(x)), torch.arange(len(x)) + step * len(x)


def fit(flow, batch_of, steps=150):
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        flow.loss(batch_of(step), Rng(0, step)).loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
    return flow.eval()


def paths(flow, n=128):
    settings = {"sampler": "heun", "steps": 32, "grid": "uniform", "guidance": 1.0}
    return flow.sample([""], seeds=range(10**6, 10**6 + n), record=True, **settings).trajectory


def two_points(step, n=64):
    index = torch.arange(n) + step * n
    side = Rng(1).bits("side", index).remainder(2).float() * 2 - 1
    return torch.stack([side, torch.zeros(n)], 1) + 0.1 * Rng(1).normal("data", index, (2,))


@pytest.fixture(scope="module")
def flow():
    """Two clusters, whose paths cross."""
    return fit(make(), lambda step: Batch(two_points(step), None, step))


def test_straightness_falls_after_a_reflow_and_one_step_is_nearer(flow):
    noise, x = draw_pairs(flow, [""] * 1024, range(1024), batch=256, sampler="heun", steps=12, guidance=1.0)
    following = make(coupling=Paired(), drop_condition=0.0)
    following.load_state_dict(flow.state_dict())

    def batch_of(step):
        rows = Rng(2).bits("rows", torch.arange(256) + 256 * step).remainder(1024)
        return Batch(x[rows], noise[rows], step)

    fit(following, batch_of)
    before, after = (straightness(paths(each)).mean() for each in (flow, following))
    assert before > 0.05 and after < before / 4
    exact = paths(flow).states[-1]
    error = [
        (each.sample([""], seeds=range(10**6, 10**6 + 128), sampler="euler", steps=1, guidance=1.0).x - exact)
        .square()
        .mean()
        for each in (flow, following)
    ]
    assert error[1] < error[0] / 4


def test_optimal_transport_makes_straighter_paths_than_independent_noise(flow):
    coupled = fit(make(coupling=OptimalTransport()), lambda step: Batch(two_points(step), None, step))
    assert straightness(paths(coupled)).mean() < straightness(paths(flow)).mean() / 2


def test_straightness_of_known_paths():
    times = [1.0, 0.5, 0.25, 0.0]
    line = [torch.tensor([[0.0, 2.0]]) * t for t in times]
    assert straightness(Trajectory(times, line)) == 0
    bent = [torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([[1.0]])]  # speed 2, then 0; 1 on average
    for states in (bent, [x[:, 0] for x in bent]):
        torch.testing.assert_close(straightness(Trajectory([1.0, 0.5, 0.0], states)), torch.tensor([1.0]))
    angle = [t * math.pi / 2 for t in torch.linspace(1, 0, 1001).tolist()]
    arc = [torch.tensor([[math.cos(a), math.sin(a)]], dtype=torch.float64) for a in angle]
    expected = (math.pi**2 / 4 - 2) / 2  # |v|^2 - |chord|^2, over two coordinates
    found = straightness(Trajectory(torch.linspace(1, 0, 1001).tolist(), arc))
    assert float(found) == pytest.approx(expected, rel=1e-4)


# --------------------------------------------------------------------------------------------------------------- pairs


def test_a_pair_hangs_on_its_seed_alone(flow):
    settings = {"sampler": "heun", "steps": 3, "guidance": 1.0}
    noise, x = draw_pairs(flow, [""] * 5, range(7, 12), batch=2, **settings)
    assert torch.equal(noise, noise_from_seeds(range(7, 12), (2,)))
    for i in range(5):
        alone = draw_pairs(flow, [""], [7 + i], **settings)
        torch.testing.assert_close(alone[1][0], x[i])
    torch.testing.assert_close(
        flow.decode(noise, steps=200),
        draw_pairs(flow, [""] * 5, range(7, 12), steps=200, guidance=1.0)[1],
        atol=1e-3,
        rtol=0,
    )
    with pytest.raises(UserError, match="draws noise on the way"):
        draw_pairs(flow, [""], [0], sampler="ancestral")


def drawer(n=7, fail_at=None):
    drawn = []

    def draw(numbers):
        if fail_at is not None and numbers.start >= fail_at:
            raise KeyboardInterrupt
        drawn.append(numbers)
        x = torch.arange(n * 6.0).view(n, 6)[numbers.start : numbers.stop].view(-1, 1, 2, 3) / 50
        return -x, x

    return draw, drawn


def write(folder, draw, n=7, **about):
    write_pairs(folder, draw, captions=[f"caption {i}" for i in range(n)], shape=(1, 2, 3), about={"steps": 3, **about})


def test_pairs_are_read_as_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr("genflow.data.pairs.SHARD", 3)
    draw, drawn = drawer()
    write(tmp_path / "pairs", draw)
    assert drawn == [range(0, 3), range(3, 6), range(6, 7)]
    config = PairsConfig(str(tmp_path / "pairs"))
    data = config.build()
    assert config.shape == data.shape == (1, 2, 3) and len(data) == 7 and data.captions[4] == "caption 4"
    assert data.about == {"steps": 3}
    index = torch.tensor([6, 0, 4])
    assert torch.equal(data.rows[index], -data.noise[index])
    torch.testing.assert_close(data.rows[index][:, 0, 0, 0], index * 6 / 50)


def test_batches_keep_each_noise_with_its_sample(tmp_path):
    write(tmp_path, drawer()[0])
    data = PairsConfig(str(tmp_path)).build()
    conditions = PreparedConditions.prepare(data, NONE)
    batches = list(loader(data, conditions, StreamSampler(7, seed=0, batch_size=4, steps=3), shape=data.shape))
    for batch in batches:
        assert batch.x.shape == (4, 1, 2, 3) and torch.equal(batch.noise, -batch.x)
        torch.testing.assert_close(batch.x[:, 0, 0, 0], batch.index * 6 / 50)
        assert batch.to("meta").noise.is_meta


def test_drawing_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("genflow.data.pairs.SHARD", 3)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, drawer(fail_at=3)[0])
    with pytest.raises(UserError, match=r"shard-00001.safetensors is missing: the drawing was cut short"):
        PairsConfig(str(tmp_path)).build()
    draw, drawn = drawer()
    write(tmp_path, draw)
    assert drawn == [range(3, 6), range(6, 7)] and len(PairsConfig(str(tmp_path)).build()) == 7
    write(tmp_path, draw)
    assert len(drawn) == 2  # nothing again


def test_what_is_wrong_with_pairs_is_told(tmp_path):
    write(tmp_path, drawer()[0])
    with pytest.raises(UserError, match="drawn in another way"):
        write(tmp_path, drawer()[0], sampler="euler")
    with pytest.raises(UserError, match="no split 'test'"):
        PairsConfig(str(tmp_path)).build("test")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="has no pairs.json"):
        PairsConfig(str(tmp_path / "other")).build()
    (tmp_path / "shard-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        PairsConfig(str(tmp_path)).build()
    (tmp_path / "pairs.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        PairsConfig(str(tmp_path)).build()
    with pytest.raises(UserError, match="not finite"):
        write(tmp_path / "nan", lambda numbers: (torch.zeros(7, 1, 2, 3), torch.full((7, 1, 2, 3), torch.nan)))


# ------------------------------------------------------------------------------------------------------------ distance


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    torch.manual_seed(0)
    a = torch.randn(100_000, 3, dtype=torch.float64)
    b = 2 * torch.randn(100_000, 3, dtype=torch.float64) + torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    assert frechet_distance(a, b) == pytest.approx(2 + 3 * (2 - 1) ** 2, rel=0.02)
    assert frechet_distance(a, a) < 1e-9


@pytest.mark.parametrize("n", [200, 10])  # more and fewer samples than features
def test_the_frechet_distance_is_that_of_scipys_square_root(n):
    linalg = pytest.importorskip("scipy.linalg")
    torch.manual_seed(1)
    a, b = (torch.randn(n, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64) for _ in range(2))
    ca, cb = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    root = linalg.sqrtm(linalg.sqrtm(ca).real @ cb @ linalg.sqrtm(ca).real).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + ca.trace() + cb.trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4 if n < 20 else 1e-9)
    assert frechet_distance(b.float(), a.float()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "no covariance"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "widths 3 and 4"),
        (torch.full((5, 3), torch.inf), torch.zeros(5, 3), "not finite"),
    ],
)
def test_features_without_a_distance_are_refused(a, b, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(a, b)


# ------------------------------------------------------------------------------------------------------- the next run


def test_the_next_flow_learns_on_the_pairs_and_drops_nothing():
    config = RectifiedFlowConfig(drop_condition=0.3, path=CosinePath(), coupling=Independent(), prediction="x")
    following = reflow_config(config)
    assert following.coupling == Paired() and following.drop_condition == 0
    assert following.path == CosinePath() and following.density == config.density
    distilled = reflow_config(config, distill=True)
    assert distilled.density == OneStep() and (distilled.density(torch.rand(5)) == 1).all()
    for wrong, message in (({"prediction": "eps"}, "knows nothing"), ({"path": VPPath()}, "VPPath")):
        with pytest.raises(UserError, match=message):
            reflow_config(RectifiedFlowConfig(**wrong), distill=True)


def test_distances_within_a_decade_have_a_scale():
    found = FewSteps(0.5, {1: 800.0, 2: 400.0}, {1: torch.zeros(3, 2), 2: torch.zeros(3, 2)})
    figure = plot_few_steps({"before": found}, floor=200.0, features="pixels")
    figure.draw_without_rendering()
    told = {text.get_text() for text in figure.axes[1].yaxis.get_ticklabels(which="minor")}
    assert {"200", "400", "600"} <= told


def test_the_plot_shows_the_same_seeds_of_every_flow_and_says_what_is_measured():
    def found(by):
        examples = {k: torch.linspace(-1, 1, 3 * 8 * 8 * 3).view(3, 3, 8, 8) for k in (1, 2, 4)}
        return FewSteps(0.5 / by, {1: 8.0 / by, 2: 4.0 / by, 4: 3.0 / by}, examples)

    figure = plot_few_steps({"before": found(1), "after": found(4)}, floor=0.5, features="pixels")
    straight, far = figure.subfigs[0].axes
    assert [bar.get_height() for bar in straight.patches] == [0.5, 0.125]
    before, after, floor = far.lines
    assert list(before.get_ydata()) == [8, 4, 3] and list(after.get_ydata()) == [2, 1, 0.75]
    assert list(floor.get_ydata()) == [0.5, 0.5] and "pixels" in far.get_title(loc="left")
    grids = figure.subfigs[1].axes
    assert [axes.get_title(loc="left") for axes in grids] == ["before", "after"]
    assert all(axes.images[0].get_array().shape == (3 * 9, 3 * 9, 3) for axes in grids)
    points = FewSteps(0.5, {1: 8.0, 2: 4.0}, {1: torch.zeros(3, 2), 2: torch.zeros(3, 2)})
    assert not plot_few_steps({"before": points}, floor=0.5, features="coordinates").subfigs  # no pictures to look at


RUN = {
    "data": {"name": "toy2d", "kind": "gaussians8", "n": 300},
    "model": {"name": "mlp", "hidden": 16, "depth": 1},
    "text": {"name": "labels", "classes": [f"gaussian {k}" for k in range(8)], "dim": 8},
    "flow": {"name": "rectified", "density": "uniform"},
    "train": {
        "steps": 4,
        "batch_size": 8,
        "precision": "fp32",
        "preview_every": 0,
        "trackers": [],
        "validate_every": 2,
    },
    "sample": {"steps": 3, "guidance": 2.0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "first"
    train(from_dict(RunConfig, {**RUN, "out": str(folder)}))
    return folder


def call(*words):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_the_command_draws_trains_and_measures(run, tmp_path, capsys):
    out = tmp_path / "next"
    options = ["--pairs", 24, "--samples", 16, "--out", out, "--set", "train.steps=3"]
    assert call(run, *options) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("straightness", "1 step", "8 steps", "before", "after", "real to real"))
    written = json.loads((out / "reflow.json").read_text())
    assert set(written["after"]["distance"]) == {"1", "2", "4", "8"} and written["real_to_real"] > 0
    lines = (out / "reflow.md").read_text().splitlines()
    assert lines[0] == "|  | straightness | 1 step | 2 steps | 4 steps | 8 steps |"
    assert lines[3].startswith(
        f"| after | {written['after']['straightness']:.4g} | {written['after']['distance']['1']:.4g} |"
    )
    assert (out / "reflow.png").stat().st_size > 10_000
    about = PairsConfig(str(out / "pairs")).build()
    assert about.about["seeds"] == [0, 24] and about.about["settings"]["guidance"] == 2.0
    assert len(about.about["weights"]["sha256"]) == 64 and all(c.startswith("gaussian ") for c in about.captions)
    recipe = load(out).recipe
    assert recipe["flow"]["coupling"] == {"name": "paired"} and recipe["sample"]["guidance"] == 1.0
    assert main(["eval", str(out), "--metrics", "loss"]) == 2
    assert "samples with their own noise, which held-out ones have not" in capsys.readouterr().err
    assert call(run, *options) == 0  # all is there already
    with pytest.raises(UserError, match="drawn in another way"):
        call(run, *options, "--steps", 5)


def test_pairs_are_of_the_seeds_asked_for_and_both_rows_of_those_after(run, tmp_path, monkeypatch):
    import genflow.evaluation.few_steps as module
    from genflow.flows import reflow

    seen, few_steps, drawn = [], module.few_steps, []

    def spied(flow, real, prompts, seeds, **how):
        seen.append((prompts, seeds, how["guidance"]))
        return few_steps(flow, real, prompts, seeds, **how)

    def drawing(flow, prompts, seeds, **settings):
        drawn.extend(zip(seeds, prompts, strict=True))
        return draw_pairs(flow, prompts, seeds, **settings)

    monkeypatch.setattr(module, "few_steps", spied)
    monkeypatch.setattr(reflow, "draw_pairs", drawing)
    monkeypatch.setattr("genflow.data.pairs.SHARD", 3)
    how = ["--pairs", 8, "--samples", 4, "--seed", 5, "--guidance", 3, "--steps", 2, "--sampler", "heun", "--no-ema"]
    assert call(run, *how, "--out", tmp_path / "next", "--set", "train.steps=1") == 0
    pairs, every = PairsConfig(str(tmp_path / "next" / "pairs")).build(), torch.arange(8)
    assert pairs.about["seeds"] == [5, 13] and pairs.about["weights"]["file"] == "model.safetensors"
    assert torch.equal(pairs.noise[every], noise_from_seeds(range(5, 13), (2,)))
    flow = load(run, ema=False)
    settings = {**flow.recipe["sample"], "guidance": 3.0, "steps": 2, "sampler": "heun"}
    x = flow.sample(pairs.captions, seeds=range(5, 13), **settings).x
    torch.testing.assert_close(pairs.rows[every], x, rtol=1e-3, atol=1e-4)
    assert drawn == list(zip(range(5, 13), pairs.captions, strict=True))
    captions = from_dict(RunConfig, {**RUN, "out": "x"}).data.build("train").captions
    expected, of_another_seed = (command._prompts(captions, 8, seed) for seed in (5, 0))
    assert pairs.captions == expected != of_another_seed
    (prompts, seeds, guidance), after = seen
    assert seeds == [13, 14, 15, 16] and guidance == 3.0 and after == (prompts, seeds, 1.0)


def test_an_interrupted_reflow_says_how_to_go_on(run, tmp_path, monkeypatch, capsys):
    from genflow.training.signals import Interrupted

    def interrupted(config):
        raise Interrupted

    monkeypatch.setattr("genflow.training.run.train", interrupted)
    assert call(run, "--pairs", 8, "--samples", 4, "--out", tmp_path / "next") == 130
    assert "to go on, give the same command again" in capsys.readouterr().err


def test_the_next_run_has_a_folder_of_its_own_name(run, monkeypatch):
    class Found(Exception):
        pass

    def found(folder):
        raise Found(folder)

    monkeypatch.setattr(command, "writable", found)
    for words, name in (([], "first-reflow"), (["--distill"], "first-distilled"), (["--out", "here"], "^here")):
        with pytest.raises(Found, match=f"{name}$"):
            call(f"{run}/", *words)


def test_distances_are_to_half_of_the_real_samples_at_most(tmp_path, capsys):
    from argparse import Namespace

    from genflow.data.toy2d import Toy2DConfig

    data = Toy2DConfig("gaussians8", n=60).build("train")
    asked = Namespace(features=None, samples=1000, batch=7, seed=0, pairs=4)
    table = command._Table(asked, data, (2,))
    n = len(data) // 2
    assert table.n == n and table.seeds == list(range(4, 4 + n)) and table.real.shape == (n, 2)
    both = command._real(data, 2 * n, (2,))
    assert len({tuple(row) for row in both.tolist()}) == 2 * n  # no sample is in both halves
    assert table.floor == pytest.approx(frechet_distance(both[:n], both[n:]), rel=1e-6)
    rows = {"before": FewSteps(0.5, {1: 8.0, 2: 4.0}, {}), "after": FewSteps(0.25, {1: 2.0, 2: 0.0}, {})}
    rows = {name: FewSteps(row.straightness, row.distance, {1: torch.zeros(3, 2)}) for name, row in rows.items()}
    table.report(rows, tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("before / after"))
    assert line.split()[3:] == ["2.00", "x", "4.00", "x", "-"]


def test_the_next_run_starts_from_the_weights_of_the_last(run, tmp_path):
    call(
        run, "--pairs", 8, "--samples", 8, "--out", tmp_path / "next", "--set", "train.steps=1", "train.optimizer.lr=0"
    )
    first, following = load(run).state_dict(), load(tmp_path / "next", ema=False).state_dict()
    for name, value in first.items():
        torch.testing.assert_close(following[name], value)


def test_a_distilled_flow_samples_in_one_step(run, tmp_path):
    options = ["--pairs", 8, "--samples", 8, "--distill", "--out", tmp_path / "one", "--set", "train.steps=1"]
    assert call(run, *options) == 0
    flow = load(tmp_path / "one")
    again = ["--pairs", 8, "--samples", 8, "--out", tmp_path / "two", "--set", "train.steps=1"]
    assert call(tmp_path / "one", *again) == 0  # measured against the first run's data, not against pairs
    about = PairsConfig(str(tmp_path / "two" / "pairs")).build().about
    assert about["data"] == load(run).recipe["data"] and about["data"]["name"] == "toy2d"
    assert flow.config.density == OneStep() and flow.recipe["sample"]["steps"] == 1
    assert {"sampler": "euler", "grid": "uniform", "guidance": 1.0}.items() <= flow.recipe["sample"].items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", 0], "--pairs 0 is too few"),
        (["--samples", 1], "--samples 1 is too few"),
        (["--sampler", "ancestral"], "draws noise on the way"),
        (["--sampler", "dopri5", "--steps", 3], "--steps does nothing for sampler 'dopri5'"),
        (["--set", "train.stepz=3"], "train.steps|'steps'"),
        (["--set", "data.n=3"], "--set data.n=3: the pairs and the run go to --out; leave it out"),
        (["--seed", -1], "--seed -1 is below 0"),
    ],
    ids=str,
)
def test_impossible_reflows_are_refused(options, message, run, tmp_path):
    with pytest.raises(UserError, match=message):
        call(run, *options, "--out", tmp_path / "next")
