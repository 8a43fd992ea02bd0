"""Plots of flows in the plane: what is drawn is what was given, and genflow plot of points."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import genflow.config
from genflow.cli import main
from genflow.data.loading import epoch_order
from genflow.data.pairs import PairsConfig, write_pairs
from genflow.data.points import RAMP
from genflow.data.toy2d import Toy2DConfig
from genflow.data.vectors import TableConfig, VectorDataset
from genflow.errors import UserError
from genflow.evaluation import plots2d
from genflow.evaluation.plots import plot_training, save_plot
from genflow.evaluation.plots2d import (
    plot_density_2d,
    plot_field_2d,
    plot_samples_2d,
    plot_trajectories_2d,
    plot_warp_2d,
    point_animation,
)
from genflow.flows.couplings import Paired
from genflow.flows.models.nsf import NSFConfig
from genflow.flows.normalizing import NormalizingFlowConfig
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.store import load, save_model
from genflow.functional import noise_from_seeds
from genflow.networks.velocity import MLPVelocityConfig
from genflow.text.none import NoTextConfig
from genflow.text.trained import LabelsConfig
from tests.noise import shaken

matplotlib = pytest.importorskip("matplotlib")
SQUARE = (-4.0, 4.0, -4.0, 4.0)


def words(figure):
    from matplotlib.text import Text

    return " | ".join(text.get_text() for text in figure.findobj(Text) if text.get_text())


def normal(x):
    return -x.double().square().sum(1) / 2 - math.log(2 * math.pi)


def gaussian(x, t):
    """The velocity of data that are one point, (1, 2): v = (x - data) / t."""
    return (x - x.new_tensor([1.0, 2.0])) / t[:, None].clamp(min=1e-3)


# -------------------------------------------------------------------------------------------------------------- figures


def test_densities_are_images_in_one_scale_and_say_what_they_hold():
    points = torch.randn(30_000, 2) * 0.5
    figure = plot_density_2d(
        {"data": points, "model": normal, "half": lambda x: normal(x) - math.log(2)}, extent=SQUARE
    )
    panels = [axes for axes in figure.axes if axes.get_images()]
    images = [axes.get_images()[0] for axes in panels]
    assert [axes.get_title(loc="left") for axes in panels] == ["data", "model", "half"]
    assert len({(i.norm.vmin, i.norm.vmax, i.norm.gamma) for i in images}) == 1
    arrays = [np.asarray(image.get_array()) for image in images]
    assert arrays[0].shape == (128, 128) and arrays[1].shape == (200, 200)
    assert arrays[0].mean() * 64 == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(arrays[2], arrays[1] / 2, rtol=1e-6)
    assert arrays[1].max() == pytest.approx(1 / (2 * math.pi), rel=1e-3)
    for image, axes in zip(images, panels, strict=True):
        assert tuple(image.get_extent()) == SQUARE and axes.get_aspect() == 1
    assert matplotlib.colors.to_hex(images[0].cmap(1.0)) == RAMP[-1]
    for word in ("30,000 points", "∫ = 1.000", "∫ = 0.500", "density"):
        assert word in words(figure)


def test_a_density_alone_needs_an_extent():
    with pytest.raises(UserError, match="give points beside it, or an extent"):
        plot_density_2d({"model": normal})


def test_a_point_of_a_density_lies_where_it_should():
    """The image's first row is its top: a density in the upper right corner is drawn there."""
    figure = plot_density_2d({"corner": lambda x: normal((x - 2) / 0.3)}, extent=SQUARE, resolution=40)
    array = np.asarray(figure.axes[0].get_images()[0].get_array())
    row, column = np.unravel_index(array.argmax(), array.shape)
    assert row < 12 and column > 28 and figure.axes[0].get_images()[0].origin == "upper"


def test_samples_have_the_colour_of_their_caption_in_every_panel():
    captions = [f"gaussian {i % 3}" for i in range(300)]
    points = torch.randn(300, 2)
    figure = plot_samples_2d({"data": (points, captions), "samples": (points[:3], captions[2::-1])})
    data, samples = (axes.collections[0] for axes in figure.axes[:2])
    np.testing.assert_allclose(data.get_offsets(), points)
    assert len(np.unique(data.get_facecolors(), axis=0)) == 3
    np.testing.assert_array_equal(samples.get_facecolors(), data.get_facecolors()[2::-1])
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["gaussian 0", "gaussian 1", "gaussian 2"]


def test_a_caption_with_an_underscore_or_too_long_has_its_place_in_the_legend():
    figure = plot_samples_2d({"samples": (torch.randn(4, 2), ["_a", "b" * 40, "", "_a"])})
    said = [text.get_text().strip("\u200b") for text in figure.legends[0].get_texts()]
    assert said == ["no caption", "_a", "b" * 27 + "…"]


def test_many_captions_have_no_legend_and_none_no_colours():
    many = plot_samples_2d({"samples": (torch.randn(40, 2), [str(i) for i in range(40)])})
    assert not many.legends and len(np.unique(many.axes[0].collections[0].get_facecolors(), axis=0)) == 40
    none = plot_samples_2d({"samples": (torch.randn(40, 2), [""] * 40)})
    assert not none.legends and len(np.unique(none.axes[0].collections[0].get_facecolors(), axis=0)) == 1


def test_trajectories_are_lines_from_noise_to_data_coloured_by_time():
    times = [1.0, 0.6, 0.3, 0.0]
    states = torch.randn(4, 5, 2)
    figure = plot_trajectories_2d(times, states, data=torch.randn(50, 2))
    axes, bar = figure.axes
    dots, lines = axes.collections
    assert len(dots.get_offsets()) == 50
    segments = np.array(lines.get_segments())
    assert segments.shape == (15, 2, 2)
    np.testing.assert_allclose(segments[:5, 0], states[0])
    np.testing.assert_allclose(segments[10:, 1], states[3])
    np.testing.assert_allclose(lines.get_array(), np.repeat([0.8, 0.45, 0.15], 5))
    begin, end = axes.get_lines()
    np.testing.assert_allclose(begin.get_xydata(), states[0])
    np.testing.assert_allclose(end.get_xydata(), states[-1])
    assert begin.get_markerfacecolor() == "white" != end.get_markerfacecolor()
    assert axes.get_aspect() == 1 and "1 = noise" in bar.get_ylabel()


def test_a_field_points_the_way_that_samples_go():
    figure = plot_field_2d(gaussian, [1.0, 0.5], extent=SQUARE, arrows=9, points=[torch.randn(7, 2)] * 2)
    for axes, t in zip(figure.axes[:2], (1.0, 0.5), strict=True):
        dots, quiver = axes.collections
        assert len(dots.get_offsets()) == 7 and axes.get_title(loc="left") == f"t = {t:.3g}"
        places = np.array(quiver.get_offsets())
        arrows = np.stack([quiver.U, quiver.V], 1)
        towards = np.array([1.0, 2.0]) - places
        cosine = (arrows * towards).sum(1) / np.linalg.norm(arrows, axis=1) / np.linalg.norm(towards, axis=1)
        assert cosine.min() > 0.999 and len(arrows) == 81
        np.testing.assert_allclose(quiver.get_array(), np.linalg.norm(towards, axis=1) / t, rtol=1e-5)
        assert np.linalg.norm(arrows, axis=1).max() < 1.4 * 8 / 9  # no arrow hides its neighbours
    assert figure.axes[0].collections[1].get_clim() == figure.axes[1].collections[1].get_clim()


def test_a_field_at_rest_has_arrows_of_no_length():
    figure = plot_field_2d(lambda x, t: torch.zeros_like(x), [0.5], extent=SQUARE, arrows=3)
    quiver = figure.axes[0].collections[0]
    assert not quiver.U.any() and not quiver.Umask  # the mask holds what is not finite


def test_a_warp_bends_every_line_of_the_grid():
    seen = []

    def transform(z):
        seen.append(z)
        return torch.stack([z[:, 0] * 2, z[:, 1] + z[:, 0] ** 2], 1)

    figure = plot_warp_2d(transform, lines=5, titles=("noise", "data"))
    before, after = (axes.collections[0] for axes in figure.axes)
    straight, bent = np.array(before.get_segments()), np.array(after.get_segments())
    assert straight.shape == bent.shape == (10, 241, 2) and len(seen) == 1
    np.testing.assert_allclose(bent[..., 0], straight[..., 0] * 2, rtol=1e-6)
    np.testing.assert_allclose(bent[..., 1], straight[..., 1] + straight[..., 0] ** 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(before.get_colors(), after.get_colors())
    assert np.ptp(straight[:5, :, 1], 1).max() == np.ptp(straight[5:, :, 0], 1).max() == 0  # across, then up
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["noise", "data"]


def test_plots_are_drawn_and_fit_into_their_file(tmp_path):
    save_plot(plot_density_2d({"data": torch.randn(2000, 2), "model": normal}), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1.7 * image.height
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    for half in np.split(pixels[:, : pixels.shape[1] // 2 * 2], 2, axis=1):  # ink in both panels
        assert (half.sum(2) < 400).mean() > 0.02
    assert (pixels[:, -3:] > 200).all()  # nothing is cut off at the edge


# ------------------------------------------------------------------------------------------------------------- animation


def frames(path):
    with Image.open(path) as image:
        for i in range(image.n_frames):
            image.seek(i)
            yield np.asarray(image.convert("RGB"), dtype=int), image.info["duration"]


def test_an_animation_moves_points_from_the_first_state_to_the_last(tmp_path):
    cloud = torch.randn(4000, 2) * 0.2
    states = torch.stack([cloud + torch.tensor([x, 0.0]) for x in (-2.0, 0.0, 2.0)])
    point_animation([1.0, 0.2, 0.0], states, extent=SQUARE, frames=11, side=100).save_atomic(tmp_path / "new" / "a.gif")
    shown = list(frames(tmp_path / "new" / "a.gif"))
    assert len(shown) == 11 and shown[-1][1] > 10 * shown[0][1]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.gif"]
    middles = []
    for pixels, _ in shown:
        dark = 765 - pixels[25:90].sum(2)
        middles.append((dark * np.arange(100)).sum() / dark.sum() * 8 / 100 - 4)
    expected = [np.interp(-t, [-1, -0.2, 0], [-2, 0, 2]) for t in np.linspace(1, 0, 11)]
    np.testing.assert_allclose(middles, expected, atol=0.1)
    done = [(pixels[-1].sum(1) < 600).sum() for pixels, _ in shown]  # the line along the bottom
    np.testing.assert_allclose(done, np.linspace(0, 100, 11), atol=2)
    assert len(np.unique(shown[5][0].reshape(-1, 3), axis=0)) > 5


def test_an_animation_writes_where_it_is():
    states = torch.randn(3, 50, 2)
    with pytest.raises(UserError, match="two states and two frames"):
        point_animation([1.0], states[:1])
    up, down = (
        point_animation(at, states, frames=3, label="{:.1f}", side=64) for at in ([2.0, 1.0, 0.0], [0.0, 1.0, 2.0])
    )
    assert [frame.tobytes() for frame in up.frames] != [frame.tobytes() for frame in down.frames]
    assert np.array_equal(np.asarray(up.frames[1]), np.asarray(down.frames[1]))  # both are at 1.0


# --------------------------------------------------------------------------------------------------------------- command

DATA = Toy2DConfig(n=500)
LABELS = LabelsConfig(classes=("moon 0", "moon 1"), dim=4)
VELOCITY = MLPVelocityConfig(hidden=8, depth=1, shape=(2,), pooled_dim=4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_titles_and_ticks_are_whole(count):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = plot_samples_2d({f"panel {i}": (torch.randn(500, 2), [""] * 500) for i in range(count)})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        box = axes.get_tightbbox(canvas.get_renderer())
        assert box.xmin >= 0 and box.ymin >= 0 and box.xmax <= figure.bbox.xmax and box.ymax <= figure.bbox.ymax


SPLINES = NSFConfig(steps=2, hidden=8, blocks=1, shape=(2,), condition_dim=0)


def saved(folder, model, flow, text, *, data=DATA, kind="toy2d", sample=None):
    """A folder with a small model that has learned nothing. model, flow, text: registered names and configs."""
    shape = list(model[1].shape)
    built = flow[1].build(model[1].build(), text[1].build(), shape=shape)
    shaken(built)
    sections = {"model": model, "flow": flow, "text": text, "data": (kind, data)}
    config = {key: {"name": name, **genflow.config.to_dict(each)} for key, (name, each) in sections.items()}
    save_model(folder, config={**config, "sample": sample or {}, "shape": shape}, state=built.state_dict())
    return folder


def shuffled():
    """The data as they are drawn."""
    data, order = DATA.build(), epoch_order(500, 0, 0)
    return VectorDataset(data.rows[order], [data.captions[i] for i in order.tolist()], data.identifiers)


@pytest.fixture(scope="module")
def velocity_model(tmp_path_factory):
    how = {"sampler": "euler", "steps": 4, "guidance": 2.0}
    folder = tmp_path_factory.mktemp("models") / "velocity"
    return saved(folder, ("mlp", VELOCITY), ("rectified", RectifiedFlowConfig()), ("labels", LABELS), sample=how)


@pytest.fixture(scope="module")
def map_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "map"
    return saved(folder, ("nsf", SPLINES), ("normalizing", NormalizingFlowConfig()), ("none", NoTextConfig()))


@pytest.fixture
def small(monkeypatch):
    for name, value in {"POINTS": 240, "DOTS": 60, "WAYS": 20, "RESOLUTION": 30}.items():
        monkeypatch.setattr(f"genflow.cli.plot2d.{name}", value)


@pytest.fixture
def drawn(monkeypatch):
    """What the figures were made of: the arguments of each, by function."""
    seen = {}
    for name in ("plot_density_2d", "plot_samples_2d", "plot_trajectories_2d", "plot_field_2d", "point_animation"):
        real = getattr(plots2d, name)

        def noted(*args, real=real, name=name, **options):
            seen[name] = (args, options)
            return real(*args, **options)

        monkeypatch.setattr(plots2d, name, noted)
    return seen


def test_plot_writes_every_plot_of_a_velocity(velocity_model, small, drawn, tmp_path, capsys):
    assert main(["plot", str(velocity_model), "--out", str(tmp_path), "--format", "svg"]) == 0
    names = ["density", "field", "samples", "trajectories", "warp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(f"{n}.svg" for n in names), "animation.gif"])
    out = capsys.readouterr().out
    assert out.count("\n") == 6 and "animation.gif: points on their way" in out
    (times, states), options = drawn["plot_trajectories_2d"]
    assert times == [1.0, 0.75, 0.5, 0.25, 0.0] and states.shape == (5, 20, 2) and len(options["data"]) == 60
    panels = drawn["plot_samples_2d"][0][0]
    assert list(panels) == ["data", "samples"] and panels["samples"][1] == shuffled().captions[:60]
    assert next(iter(drawn["plot_field_2d"][1]["points"])).shape == (60, 2)


def test_samples_are_the_models_own_unguided_and_where_its_solve_ends(velocity_model, small, drawn, tmp_path):
    what = ["--what", "density", "animation", "--seed", "7"]
    assert main(["plot", str(velocity_model), "--out", str(tmp_path), *what]) == 0
    flow = load(velocity_model)
    captions = shuffled().captions[:240]
    x = flow.sample(captions, seeds=range(7, 247), sampler="euler", steps=4, guidance=1.0).x
    torch.testing.assert_close(drawn["plot_density_2d"][0][0]["samples"], x)
    torch.testing.assert_close(drawn["point_animation"][0][1][-1], x)
    assert main(["plot", str(velocity_model), "--out", str(tmp_path), *what, "--guidance", "3"]) == 0
    assert (drawn["plot_density_2d"][0][0]["samples"] - x).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("which", "how"), [("velocity_model", ["--guidance", "3"]), ("map_model", ["--temperature", "0.5"])]
)
def test_other_samples_than_the_density_is_of_stand_without_it(which, how, request, small, drawn, tmp_path, capsys):
    asked = ["plot", str(request.getfixturevalue(which)), "--out", str(tmp_path), "--what", "density"]
    assert main([*asked, *how]) == 0
    assert "model density" not in drawn["plot_density_2d"][0][0]
    assert f"no density: it is known at {how[0][2:]} 1 alone" in capsys.readouterr().err


def test_a_field_has_the_points_of_its_own_caption_and_says_of_which(velocity_model, small, drawn, tmp_path):
    asked = ["plot", str(velocity_model), "--out", str(tmp_path), "--what", "field", "--format", "svg", "--seed", "3"]
    assert main([*asked, "--prompt", "moon 1", "--prompt", "moon 0", "--steps", "1"]) == 0
    x = load(velocity_model).sample(["moon 1"], seeds=range(3, 63), sampler="euler", steps=1, guidance=1.0).x
    (_, times), noise = drawn["plot_field_2d"][0], noise_from_seeds(range(3, 63), (2,))
    for t, points in zip(times, drawn["plot_field_2d"][1]["points"], strict=True):
        torch.testing.assert_close(points, torch.lerp(x, noise, t))
    assert "of moon 1" in (tmp_path / "field.svg").read_text()


def test_a_field_is_asked_where_samples_go(tmp_path, small, drawn):
    flow = RectifiedFlowConfig(prediction="eps")
    folder = saved(tmp_path / "eps", ("mlp", VELOCITY), ("rectified", flow), ("labels", LABELS))
    assert main(["plot", str(folder), "--out", str(tmp_path), "--what", "field"]) == 0
    assert drawn["plot_field_2d"][0][1] == [0.95, 0.75, 0.5, 0.25, 0.05]


def test_a_sorted_table_is_drawn_with_all_its_captions(tmp_path, small, drawn):
    rows = [f"{10 * k + 0.01 * i},{i % 7},moon {k}" for k in range(2) for i in range(150)]
    (tmp_path / "sorted.csv").write_text("\n".join(["x,y,which", *rows]))
    data, flow = TableConfig(str(tmp_path / "sorted.csv"), label="which"), ("rectified", RectifiedFlowConfig())
    folder = saved(tmp_path / "model", ("mlp", VELOCITY), flow, ("labels", LABELS), data=data, kind="table")
    assert main(["plot", str(folder), "--out", str(tmp_path), "--what", "samples", "trajectories"]) == 0
    for points, captions in drawn["plot_samples_2d"][0][0].values():
        assert {*captions} == {"moon 0", "moon 1"} and len(points) == len(captions)
    points, captions = drawn["plot_samples_2d"][0][0]["data"]
    which = torch.tensor([caption == "moon 1" for caption in captions])
    assert points[which, 0].min() > points[~which, 0].max()
    assert drawn["plot_trajectories_2d"][1]["data"][:, 0].max() > 0.5


def test_prompts_choose_what_is_drawn(velocity_model, small, drawn, tmp_path):
    asked = ["plot", str(velocity_model), "--out", str(tmp_path), "--what", "density", "--prompt", "moon 1"]
    assert main(asked) == 0
    panels = drawn["plot_density_2d"][0][0]
    data = DATA.build()
    assert len(panels["data"]) == data.captions.count("moon 1") and "true density" not in panels
    flow = load(velocity_model)
    x = flow.sample(["moon 1"], seeds=range(240), sampler="euler", steps=4, guidance=1.0).x
    torch.testing.assert_close(panels["samples"], x)


def test_plot_writes_every_plot_of_a_map(map_model, small, drawn, tmp_path):
    assert main(["plot", str(map_model), "--out", str(tmp_path)]) == 0
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["animation", "density", "samples", "warp"]
    flow, data = load(map_model), DATA.build()
    panels = drawn["plot_density_2d"][0][0]
    assert list(panels) == ["data", "true density", "samples", "model density"]
    rows = data.rows[:20]
    torch.testing.assert_close(panels["model density"](rows).float(), flow.log_prob(rows).detach())
    assert torch.equal(panels["true density"](rows), data.log_prob(rows))
    (places, states), options = drawn["point_animation"]
    assert len(states) == len(places) == 7 and places[0] == 6.0 and places[-1] == 0.0 and "depth" in options["label"]
    torch.testing.assert_close(states[0], noise_from_seeds(range(240), (2,)))
    torch.testing.assert_close(states[-1], flow.decode(states[0]))


def test_the_density_under_several_conditions_is_their_average(tmp_path, small, drawn):
    splines = dataclasses.replace(SPLINES, condition_dim=4)
    flow = ("normalizing", NormalizingFlowConfig())
    model = saved(tmp_path / "model", ("nsf", splines), flow, ("labels", LABELS))
    prompts = ["--prompt", "moon 0", "--prompt", "moon 1", "--prompt", "moon 1"]
    assert main(["plot", str(model), "--what", "density", "--out", str(tmp_path), *prompts]) == 0
    ours = drawn["plot_density_2d"][0][0]["model density"]
    flow, rows = load(model), DATA.build().rows[:20]
    p = [flow.log_prob(rows, flow.text.encode([f"moon {k}"])).detach().double().exp() for k in (0, 1)]
    assert (p[0] - p[1]).abs().max() > 1e-3
    torch.testing.assert_close(ours(rows).exp(), p[0] / 3 + p[1] * 2 / 3, rtol=1e-4, atol=1e-8)


def test_a_model_whose_data_are_gone_is_drawn_without_them(tmp_path, small, drawn, capsys):
    gone = Toy2DConfig(kind="picture", picture=str(tmp_path / "gone.png"))
    flow = ("normalizing", NormalizingFlowConfig())
    model = saved(tmp_path / "model", ("nsf", SPLINES), flow, ("none", NoTextConfig()), data=gone)
    assert main(["plot", str(model), "--what", "density", "samples", "--out", str(tmp_path)]) == 0
    assert list(drawn["plot_density_2d"][0][0]) == ["samples", "model density"]
    error = capsys.readouterr().err
    assert "without the data" in error and "gone.png" in error and error.count("\n") == 1


def test_beside_a_reflowed_model_lie_the_data_it_began_with(tmp_path, small, drawn):
    about = {"data": genflow.config.to_dict(DATA)}
    rows = torch.zeros(3, 2)
    write_pairs(tmp_path / "pairs", lambda _: (rows, rows + 1), captions=["moon 0"] * 3, shape=(2,), about=about)
    pairs, flow = PairsConfig(str(tmp_path / "pairs")), ("rectified", RectifiedFlowConfig(coupling=Paired()))
    model = saved(tmp_path / "model", ("mlp", VELOCITY), flow, ("labels", LABELS), data=pairs)
    asked = ["plot", str(model), "--what", "samples", "trajectories", "--steps", "2", "--out", str(tmp_path)]
    assert main(asked) == 0
    assert torch.equal(drawn["plot_samples_2d"][0][0]["data"][0], shuffled().rows[:60])


def test_plots_of_another_kind_of_model_are_refused(velocity_model, map_model, tmp_path, capsys):
    wide = dataclasses.replace(SPLINES, shape=(3,))
    flow = ("normalizing", NormalizingFlowConfig())
    table = saved(tmp_path / "table", ("nsf", wide), flow, ("none", NoTextConfig()))
    for model, name, message in (
        (velocity_model, "strip", "it makes points in the plane, and strip is of pictures"),
        (map_model, "field", "a NormalizingFlow has no velocity"),
        (map_model, "trajectories", "a NormalizingFlow has no velocity"),
        (table, "density", "it makes vectors of 3 numbers, and density is of points in the plane"),
        (map_model, "training", "metrics.jsonl"),
    ):
        assert main(["plot", str(model), "--what", name, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["plot", str(table), "--out", str(tmp_path / "out")]) == 2
    assert "it has no metrics.jsonl, and a NormalizingFlow of vectors has no plots" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for options, message in (
        (["--prompt", "moon 1"], "hears no condition"),
        (["--steps", "3"], "--steps does nothing for a NormalizingFlow"),
        (["--what", "animation", "--format", "svg"], "--format does nothing for animation; leave it out"),
    ):
        assert main(["plot", str(map_model), "--what", "density", *options, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_a_likelihood_run_has_a_loss_without_times(map_model, tmp_path, capsys):
    lines = [json.dumps({"step": i, "loss": 1 - i / 10}) for i in range(1, 30)]  # nats, below zero, too
    (map_model / "metrics.jsonl").write_text("\n".join(lines))
    try:
        assert main(["plot", str(map_model), "--what", "training", "--out", str(tmp_path)]) == 0
    finally:
        (map_model / "metrics.jsonl").unlink()
    figure = plot_training([json.loads(line) for line in lines])
    (axes,) = figure.axes
    assert axes.get_yscale() == "linear" and "negative log-likelihood" in axes.get_ylabel()
