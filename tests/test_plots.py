"""Plots: files of the right size that show what they were given, and genflow plot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import genflow.config
from genflow.cli import main
from genflow.data.emoji import EmojiConfig
from genflow.errors import UserError
from genflow.evaluation.plots import (
    plot_errors,
    plot_grids,
    plot_strip,
    plot_training,
    plot_trajectories,
    save_plot,
)
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.store import save_model
from genflow.flows.tuned import save_tuned
from genflow.networks.mmdit import MMDiTConfig
from genflow.samplers.tuning import fixed_step
from genflow.text.trained import LearnedTextConfig

matplotlib = pytest.importorskip("matplotlib")


def words(figure):
    """All that is written in a figure."""
    from matplotlib.text import Text

    return " | ".join(text.get_text() for text in figure.findobj(Text) if text.get_text())


def metrics(n=40, **more):
    return [
        {"step": 10 * i, "loss": 2.0 / i, "loss_t0.000": 3.0 / i, "loss_t0.875": 1.0 / i, **more} for i in range(1, n)
    ]


def path(steps=4, batch=2, channels=3):
    times = [1 - i / steps for i in range(steps + 1)]
    return times, torch.rand(steps + 1, batch, channels, 6, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_saved_plot_is_whole_and_the_same_every_time(tmp_path, kind):
    files = [tmp_path / "new" / f"{name}.{kind}" for name in "ab"]
    for file in files:
        save_plot(plot_training(metrics()), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [f"a.{kind}", f"b.{kind}"]
    if kind == "png":
        with Image.open(files[0]) as image:
            assert image.size == (9 * 150, int(3.4 * 150)) and len(image.convert("RGB").getcolors(10**6)) > 20
    else:
        assert files[0].read_text().rstrip().endswith("</svg>")


def test_a_plot_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write"):
        save_plot(plot_training(metrics()), tmp_path / "file" / "a.png")


def test_training_shows_the_loss_its_validation_and_its_parts():
    figure = plot_training([*metrics(), {"step": 400, "validation_loss": 0.7}], title="of a run")
    left, right = figure.axes
    assert [line.get_label() for line in left.get_lines()][1:] == ["training, running median", "validation"]
    assert left.get_lines()[2].get_ydata().tolist() == [0.7]
    assert left.get_yscale() == right.get_yscale() == "log"
    assert [line.get_label() for line in right.get_lines()] == ["0 – 0.125", "0.875 – 1"]
    for word in ("Loss of a run", "optimiser step", "mean squared error", "t (0 = data)"):
        assert word in words(figure)


def test_a_loss_of_one_step_is_a_point():
    """It makes no line, and the plot of a short run would be empty."""
    one, many = (plot_training(metrics()[:n]).axes for n in (1, 2))
    assert {line.get_marker() for axes in one for line in axes.get_lines()[-1:]} == {"o"}
    assert {line.get_marker() for axes in many for line in axes.get_lines()[-1:]} <= {"", "None"}


def test_the_running_median_takes_no_notice_of_one_spike():
    lines = metrics(400)
    lines[200]["loss"] = 1e6
    raw, median = plot_training(lines).axes[0].get_lines()
    assert max(raw.get_ydata()) == 1e6 and max(median.get_ydata()) <= 2.0


@pytest.mark.parametrize("lines", [[], [{"step": 1}], [{"step": 1, "loss": None}]])
def test_no_loss_is_no_plot(lines):
    with pytest.raises(UserError, match="no loss to plot yet"):
        plot_training(lines)


def test_a_strip_has_the_states_and_what_they_foretell():
    times, states = path(steps=20)
    figure = plot_strip(times, states, -states, ["an otter", "a very long caption " * 9])
    cells = [axes for axes in figure.axes if axes.get_images()]
    assert len(cells) == 4 * 11  # of 21 times
    first, below = (torch.tensor(axes.get_images()[0].get_array()) for axes in (cells[0], cells[11]))
    torch.testing.assert_close(first, ((states[0, 0] + 1) / 2).permute(1, 2, 0))
    torch.testing.assert_close(below, 1 - first)
    text = words(figure)
    assert "an otter" in text and "t = 0.9" in text and "z − t v" in text and "…" in text


def test_a_caption_of_three_lines_leaves_the_words_beneath_it_alone():
    times, states = path()
    figure = plot_strip(times, states[:, :1], states[:, :1], ["a very long caption " * 9])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    caption = axes.texts[0].get_window_extent()
    assert axes.texts[0].get_text().count("\n") == 2 and not caption.overlaps(axes.yaxis.label.get_window_extent())


def test_the_name_of_a_long_run_stays_above_its_panel():
    left, right = plot_training(metrics(), title="of " + "a_long_name" * 9).axes
    left.figure.draw_without_rendering()
    assert not left._left_title.get_window_extent().overlaps(right._left_title.get_window_extent())


def test_a_strip_may_be_grey_but_not_of_latents():
    for channels in (1, 3):
        times, states = path(channels=channels)
        plot_strip(times, states, states, ["a", "b"])
    times, states = path(channels=4)
    with pytest.raises(UserError, match="these have 4"):
        plot_strip(times, states, states, ["a", "b"])


@pytest.mark.parametrize("channels", [3, 4])
def test_trajectories_show_how_far_they_bend(channels):
    times, _ = path(steps=8)
    noise, data, bend = torch.randn(3, 2, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(times).view(-1, 1, 1, 1, 1)
    straight = (1 - t) * data + t * noise
    bent = straight + t * (1 - t) * bend * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)  # only the second
    figure = plot_trajectories(times, bent, ["straight", "bent"], few=(times[::4], bent[::4]), title="euler, 2 steps")
    right = figure.axes[1]
    lines = {line.get_label(): line.get_ydata() for line in right.get_lines()}
    assert max(lines["straight"]) < 1e-6
    assert max(lines["bent"]) == pytest.approx(0.25 * bend[1].square().mean().sqrt().item(), rel=1e-5)
    assert "euler, 2 steps" in words(figure) and "component 1" in words(figure)


def test_trajectories_of_one_number_are_drawn():
    states = torch.randn(3, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    plot_trajectories([1.0, 0.5, 0.0], states, ["a", "b"], few=([1.0, 0.0], states[::2])).draw_without_rendering()


def test_a_straight_way_that_begins_below_one_is_straight():
    """A flow that predicts the noise begins at 1 - t_min."""
    times = [0.95, 0.6, 0.3, 0.0]
    data, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    states = torch.stack([(1 - t) * data + t * noise for t in times])
    (line,) = plot_trajectories(times, states, ["a"]).axes[1].get_lines()
    assert max(line.get_ydata()) < 1e-6


def test_a_legend_has_every_caption_and_there_is_none_without(recwarn):
    times, states = path()
    assert plot_trajectories(times, states, ["", ""]).axes[1].get_legend() is None and not recwarn
    legend = plot_trajectories(times, states, ["_a", "b" * 40]).axes[1].get_legend()
    assert [text.get_text().strip("\u200b") for text in legend.get_texts()] == ["_a", "b" * 27 + "…"]


def test_errors_are_lines_with_evaluations_and_decibels():
    curves = {"euler": [(4, 0.2), (8, 0.1)], "heun": [(3, 0.3), (7, 0.02)], "euler, equal steps": [(4, 0.4)]}
    figure = plot_errors(curves, tuned=[(8, 0.002)], floor=1e-4)
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.get_lines()] == ["euler, equal steps", "euler", "heun", "tuned"]
    assert axes.get_lines()[2].get_xdata().tolist() == [3, 7] and axes.get_lines()[0].get_linestyle() == "--"
    assert axes.get_ylim()[0] < 1e-4
    for word in ("network evaluations", "RMSE", "PSNR, dB", "the fine solve itself"):
        assert word in words(figure)


def test_grids_are_rows_of_dots():
    figure = plot_grids({"mine": [1.0, 0.5, 0.0], "tuned": [1.0, 0.9, 0.2, 0.0]}, marked=["tuned"], title="Mine")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["tuned", "mine"]
    assert left.get_lines()[1].get_xdata().tolist() == [1.0, 0.5, 0.0]
    assert right.get_lines()[1].get_xdata().tolist() == [0.0]  # log-SNR, without its infinite ends
    assert left.get_lines()[0].get_color() != left.get_lines()[1].get_color()
    assert "Mine" in words(figure)


def test_nobody_elses_plots_are_touched(tmp_path):
    code = (
        "import sys, matplotlib, pathlib; from genflow.evaluation.plots import plot_training, save_plot;"
        "before = matplotlib.rcParams['font.size'];"
        "save_plot(plot_training([{'step': 1, 'loss': 1.0}]), pathlib.Path(sys.argv[1]));"
        "sys.exit(matplotlib.rcParams['font.size'] != before or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")]).returncode == 0


def test_the_training_line_of_a_likelihood_is_without_penalties_as_its_validation():
    lines = [{"step": s, "loss": 9.0, "nll": 6.9, "mtp1": 7.0} for s in (1, 2)] + [{"step": 2, "validation_loss": 6.9}]
    (axes,) = plot_training(lines).axes
    assert {y for line in axes.get_lines() for y in line.get_ydata()} == {6.9}


def test_without_matplotlib_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot_training(metrics())


# -------------------------------------------------------------------------------------------------------------- command

TEXT = LearnedTextConfig(dim=8, heads=2, layers=1, max_tokens=8)
MODEL = MMDiTConfig(
    depth=1, hidden=16, heads=2, patch_size=8, in_channels=3, context_dim=8, pooled_dim=8, sample_size=2
)
FLOW = RectifiedFlowConfig(prediction="x")
EVERY = ["training", "strip", "trajectories", "error", "grid"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny model that never learned anything, and the metrics of a run."""
    folder = tmp_path_factory.mktemp("plots") / "model"
    torch.manual_seed(0)
    flow = FLOW.build(MODEL.build(), TEXT.build(), shape=(3, 16, 16))
    sections = {
        "model": ("mmdit", MODEL),
        "flow": ("rectified", FLOW),
        "text": ("learned", TEXT),
        "data": ("emoji", EmojiConfig(limit=5)),
    }
    config = {key: {"name": name, **genflow.config.to_dict(each)} for key, (name, each) in sections.items()}
    config |= {"sample": {"sampler": "euler", "steps": 3, "guidance": 1.0}, "shape": [3, 16, 16]}
    save_model(folder, config=config, state=flow.state_dict())
    save_tuned(folder, 2, {"sampler": "ab2", "grid": [1.0, 0.4, 0.0], "nfe": 2, "error": 0.5})
    lines = [json.dumps(line) for line in metrics()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9')  # as it is being written
    return folder


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr("genflow.cli.plot.BUDGETS", (2, 4))
    monkeypatch.setattr("genflow.cli.plot.FINE", 8)
    monkeypatch.setattr("genflow.samplers.tuning.FINE", 8)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_writes_every_plot(model, short, tmp_path, kind, capsys):
    arguments = ["plot", str(model), "--images", "2", "--format", kind, "--out", str(tmp_path), "--prompt", "a otter"]
    assert main(arguments) == 0
    assert sorted(p.stem for p in tmp_path.iterdir()) == sorted(EVERY)
    assert all(p.suffix == f".{kind}" and p.stat().st_size > 5000 for p in tmp_path.iterdir())
    told = capsys.readouterr()
    assert told.out.count("\n") == len(EVERY)
    count = len(fixed_step())  # a line each, where there is no terminal for a bar
    assert [line.split(",")[0] for line in told.err.splitlines() if line.startswith("error: ")] == [
        f"error: {i + 1} of {count} samplers" for i in range(count)
    ]


def test_plot_draws_what_it_is_asked_to(model, short, tmp_path):
    asked = ["plot", str(model), "--out", str(tmp_path), "--what", "strip", "--steps", "2", "--sampler", "heun"]
    assert main(asked) == 0  # with captions of the training data
    assert [p.name for p in tmp_path.iterdir()] == ["strip.png"]
    with Image.open(tmp_path / "strip.png") as image:
        assert image.width == pytest.approx((3 * 0.95 + 1.2) * 150, abs=1)
        assert image.height == pytest.approx((4 * 1.92 + 0.25) * 150, abs=1)


def test_errors_are_those_of_the_pictures_that_the_model_draws(model, tmp_path, monkeypatch):
    from genflow.cli import plot
    from genflow.evaluation import plots

    config = json.loads((model / "config.json").read_text())
    config["flow"] = {"name": "rectified", "prediction": "eps"}
    shutil.copytree(model, tmp_path / "eps")
    (tmp_path / "eps" / "config.json").write_text(json.dumps(config))
    (tmp_path / "eps" / "sampling.json").unlink()
    seen = {}
    monkeypatch.setattr(plots, "plot_errors", lambda curves, **more: seen.update(curves, **more))
    monkeypatch.setattr(plot, "BUDGETS", (40,))
    asked = ["plot", str(tmp_path / "eps"), "--images", "1", "--prompt", "a", "--what", "error", "--out", str(tmp_path)]
    monkeypatch.setattr(plots, "save_plot", lambda *_: None)
    assert main(asked) == 0
    ((_, error),) = seen["rk4"]
    assert error < 1e-2


def test_errors_of_every_sampler_are_those_of_the_picture_that_is_predicted(model, tmp_path, monkeypatch):
    """Below t_min the velocity of x-prediction does not lead to it, and some samplers would ask there."""
    from genflow.cli import plot
    from genflow.evaluation import plots

    seen = {}
    monkeypatch.setattr(plots, "plot_errors", lambda curves, **more: seen.update(curves))
    monkeypatch.setattr(plots, "save_plot", lambda *_: None)
    monkeypatch.setattr(plot, "BUDGETS", (80,))
    asked = ["plot", str(model), "--images", "1", "--prompt", "a", "--what", "error", "--out", str(tmp_path)]
    assert main(asked) == 0
    errors = {sampler: error for sampler, ((_, error),) in seen.items()}
    assert max(errors["midpoint"], errors["rk4"]) < 2 * errors["heun"]


def test_errors_are_on_the_models_own_grid_when_one_was_tuned_for_its_steps(model, tmp_path, monkeypatch):
    from genflow.cli import plot
    from genflow.evaluation import plots

    shutil.copytree(model, tmp_path / "shifted")
    config = json.loads((model / "config.json").read_text())
    config["sample"]["shift"] = 3.0
    (tmp_path / "shifted" / "config.json").write_text(json.dumps(config))
    seen = []
    monkeypatch.setattr(plots, "plot_errors", lambda curves, **more: seen.append((curves, more["title"])))
    monkeypatch.setattr(plots, "save_plot", lambda *_: None)
    monkeypatch.setattr(plot, "BUDGETS", (4,))
    asked = ["plot", str(tmp_path / "shifted"), "--images", "1", "--prompt", "a", "--what", "error"]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    save_tuned(tmp_path / "shifted", 3, {"sampler": "euler", "grid": [1.0, 0.5, 0.2, 0.0], "nfe": 3, "error": 0.5})
    assert main([*asked, "--out", str(tmp_path)]) == 0
    assert seen[0] == seen[1] and "shifted, shift 3" in seen[0][1]


def test_a_solve_of_few_steps_is_called_what_it_is(model, short, tmp_path):
    asked = ["plot", str(model), "--out", str(tmp_path), "--what", "trajectories", "--format", "svg", "--prompt", "a"]
    for sampler, told in {"ab2": "ab2, 3 steps", "dopri5": "dopri5, own steps"}.items():
        assert main([*asked, "--sampler", sampler]) == 0
        assert f"<!-- {told} -->" in (tmp_path / "trajectories.svg").read_text()


def test_steps_of_a_sampler_that_chooses_its_own_are_refused(model, short, tmp_path, capsys):
    asked = ["plot", str(model), "--out", str(tmp_path), "--sampler", "dopri5", "--steps", "3", "--prompt", "a"]
    assert main([*asked, "--what", "strip"]) == 2
    assert "--steps does nothing for sampler 'dopri5'" in capsys.readouterr().err
    assert main([*asked, "--what", "strip", "grid"]) == 0  # the grids are of so many steps


@pytest.mark.parametrize("sampler", ["euler_maruyama", "dopri5", "ab2"])
def test_a_strip_of_any_kind_of_sampler(model, short, tmp_path, sampler):
    asked = ["plot", str(model), "--out", str(tmp_path), "--what", "strip", "--sampler", sampler, "--prompt", "a"]
    assert main(asked) == 0 and (tmp_path / "strip.png").exists()


def test_a_model_without_metrics_has_all_other_plots(model, short, tmp_path, capsys):
    (model / "metrics.jsonl").rename(tmp_path / "kept")
    try:
        assert main(["plot", str(model), "--what", "training", "--out", str(tmp_path / "out")]) == 2
        assert "metrics.jsonl" in capsys.readouterr().err
        assert main(["plot", str(model), "--images", "1", "--prompt", "a", "--out", str(tmp_path / "out")]) == 0
        assert sorted(p.stem for p in (tmp_path / "out").iterdir()) == sorted(EVERY[1:])
    finally:
        (tmp_path / "kept").rename(model / "metrics.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images must be 1 or more"),
        (["--what", "strip", "--sampler", "hoin"], "no sampler is named 'hoin'"),
        (["--what", "training", "--seed", "0"], "--seed does nothing for training; leave it out"),
        (["--what", "training", "grid", "--no-ema"], "--no-ema does nothing for training, grid"),
        (["--what", "training", "grid", "--prompt", "a"], "--prompt does nothing for training, grid"),
        (["--what", "error", "--sampler", "heun"], "--sampler does nothing for error"),
        (["--what", "strip", "trajectories", "--images", "8"], "--images does nothing for strip, trajectories"),
        (["--what", "grid", "--steps", "0"], "nearest possible number is 1"),
        (["--shift", "much"], "--shift: 'much' is neither a number nor 'resolution'"),
    ],
)
def test_mistakes_cost_one_line(model, arguments, message, capsys):
    assert main(["plot", str(model), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_numbers_on_logarithmic_axes_are_plain():
    from matplotlib.figure import Figure

    from genflow.evaluation.plots import styled

    @styled
    def drawn():
        figure = Figure()
        figure.subplots().loglog([1e-4, 1.0, 100.0], [0.35, 0.4, 0.5])
        return figure

    figure = drawn()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    ticks = [axis.get_ticklabels(which=which) for axis in (axes.xaxis, axes.yaxis) for which in ("major", "minor")]
    labels = [text.get_text() for every in ticks for text in every]
    assert {"0.01", "1", "100"} <= {*labels} and not any("$" in label for label in labels)


def test_numbers_on_a_short_logarithmic_axis_are_told_apart():
    lines = [{"step": i, "loss": 0.9 + 0.01 * i, "loss_t0.000": 1.0} for i in range(1, 12)]
    figure = plot_training(lines)
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    told = [label.get_text() for label in axis.get_ticklabels(which="minor") if label.get_text()]
    assert len(told) > 2 and len({*told}) == len(told) and not any("e" in text for text in told)
