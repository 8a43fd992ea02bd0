"""genflow compare: one page of several models, whose figures are those of its JSON, and which needs nothing from outside."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from genflow.cli import main
from genflow.cli.compare import _names
from genflow.config import from_dict, to_dict
from genflow.errors import UserError
from genflow.evaluation import comparison as room
from genflow.evaluation.comparison import Cell, Comparison, Contestant, Point, as_json, compare
from genflow.evaluation.comparison_plots import plot_learning, plot_quality
from genflow.evaluation.features import PixelFeatures
from genflow.evaluation.page import tag, to_html, to_markdown
from genflow.evaluation.plan import Evaluation, Plan
from genflow.flows.base import Flow
from genflow.flows.rectified import RectifiedFlow
from genflow.flows.store import load, save_model
from genflow.samplers import Solution
from genflow.training.config import RunConfig, fit_to, shape_of

PICS = {"name": "folder", "path": "pics", "size": 8}
LABELS = {"name": "labels", "classes": ["dark", "light"], "dim": 4}
UNET = {"name": "unet", "channels": 8, "channel_mult": [1], "blocks": 1, "attention_size": 0}
SOLVE = {"sampler": "euler", "steps": 2, "guidance": 1.0}
RUNS = {
    "glow": {"data": PICS, "model": {"name": "glow", "levels": 1, "steps": 1, "hidden": 8}, "flow": "normalizing"},
    "tarflow": {
        "data": PICS,
        "model": {"name": "tarflow", "patch": 4, "blocks": 2, "layers": 1, "width": 16},
        "text": LABELS,
        "flow": {"name": "normalizing", "dequantization": "gaussian"},
    },
    "unet": {"data": PICS, "model": UNET, "flow": "rectified", "sample": SOLVE},
    "plane": {
        "data": {"name": "toy2d", "kind": "moons", "n": 400},
        "model": {"name": "ffjord", "hidden": [8]},
        "flow": "normalizing",
    },
}
VOID = {"area", "br", "img", "link", "meta", "input", "hr"}


def built(section: dict, folder: Path) -> Path:
    """A model folder of an untrained flow, with a short metrics.jsonl."""
    torch.manual_seed(0)
    config = from_dict(RunConfig, section)
    text, shape = config.text.build(), shape_of(config.data)
    model = fit_to(config.model, text, shape, config.flow)
    flow = config.flow.build(model.build(), text, shape=shape)
    about = {**to_dict(config), "model": to_dict(RunConfig(config.data, model))["model"], "shape": list(shape)}
    save_model(folder, config=about, state=flow.state_dict())
    times = {"loss_t0.000": 1.0} if "unet" in folder.name else {}
    lines = [{"step": i, "loss": 5.0 / i, "validation_loss": 6.0 / i, **times} for i in range(1, 9)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    draw = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for split, (name, low) in product(("train", "test"), (("dark", 0), ("light", 128))):
            Path("pics", split, name).mkdir(parents=True)
            for i in range(8):
                grey = draw.integers(low, low + 128, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(grey).save(f"pics/{split}/{name}/{i}.png")
        for name, section in RUNS.items():
            built(section, Path(name))
    return folder


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch):
    monkeypatch.setattr(room, "peak_memory", lambda *_: 12.5)


@pytest.fixture(scope="module")
def pages(where):
    """compare.json and compare.html of three families on one data set, and of two data sets, in all."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setattr(room, "peak_memory", lambda *_: 12.5)
        for name, runs in {"one": ["glow", "unet", "tarflow"], "two": ["unet", "plane"]}.items():
            how = ["-n", "8", "--steps", "1", "2", "3", "--features", "pixels", "--out", name]
            assert main(["compare", *runs, *how]) == 0
            found[name] = (json.loads(Path(name, "compare.json").read_text()), Path(name, "compare.html").read_text())
    return found


class Page(HTMLParser):
    """The elements of a page; fails where they do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name, attrs):
        self.elements.append((name, dict(attrs)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attrs):
        self.elements.append((name, dict(attrs)))

    def handle_endtag(self, name):
        assert self.open.pop() == name


@pytest.mark.parametrize("which", ["one", "two"])
def test_the_page_is_whole_and_needs_nothing_from_outside(which, pages):
    text = pages[which][1]
    page = Page(text)
    assert "http" not in text and "@import" not in text and "<script" not in text
    names = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(names) == len(set(names)) and {"summary", "quality", "training"} <= set(names)
    for name, attrs in page.elements:
        for key in ("src", "href", "xlink:href"):
            if key in attrs:
                assert attrs[key].startswith("data:image/png;base64," if name == "img" else "#")
                assert name == "img" or attrs[key][1:] in names
        for target in re.findall(r"url\(#([^)]*)\)", str(attrs)):
            assert target in names
    assert sum(name == "svg" for name, _ in page.elements) == 2
    assert all(attrs.get("alt") for name, attrs in page.elements if name == "img")


@pytest.mark.parametrize("which", ["one", "two"])
def test_the_figures_of_the_page_are_those_of_the_json(which, pages):
    found, text = pages[which]
    shown = {}
    for _, attrs in Page(text).elements:
        if "data-value" in attrs:
            shown[attrs["data-run"], attrs["data-figure"]] = (float(attrs["data-value"]), attrs.get("class") == "best")
    told = {
        (run["name"], name): (cell["value"], run["name"] in found["best"][name])
        for run in found["runs"]
        for name, cell in run["figures"].items()
        if " at t = " not in name
    }
    assert shown == told and {"FD", "seconds", "parameters", "memory", "NFE"} <= {name for _, name in told}


def test_each_has_what_it_can_honestly_have_and_says_why_not(pages):
    runs = {run["name"]: run for run in pages["one"][0]["runs"]}
    assert "bits/dim" in runs["glow"]["figures"] and "bits/dim" not in runs["tarflow"]["figures"]
    assert "trained on pictures with added noise" in runs["tarflow"]["left_out"]["likelihood"]
    assert "must be named" in runs["unet"]["left_out"]["likelihood"]
    assert "trained on pictures with added noise" in pages["one"][1]
    assert runs["tarflow"]["prompts"][:2] != ["", ""] and set(runs["glow"]["prompts"]) == {""}


def test_a_velocity_has_a_curve_and_a_normalizing_flow_one_point(pages):
    curves = {run["name"]: [(p["steps"], p["nfe"]) for p in run["curve"]] for run in pages["one"][0]["runs"]}
    assert curves == {"glow": [(None, 1)], "tarflow": [(None, 1)], "unet": [(1, 1), (2, 2), (3, 3)]}
    unet = pages["one"][0]["runs"][1]
    assert [p["fd"] for p in unet["curve"] if p["steps"] == 2] == [unet["figures"]["FD"]["value"]]


def test_what_made_the_figures_stands_beside_them(pages):
    found, text = pages["one"]
    for run in found["runs"]:
        assert len(run["made"]["weights"]["sha256"]) == 64 and run["made"]["weights"]["sha256"] in text
        assert run["made"]["features"]["name"] == "pixels" and run["made"]["counts"]["samples"] == 8
    assert "emoji" not in text and "8 samples, 8 of folder train" in text


def test_different_data_are_said_first_and_nothing_of_them_is_best(pages):
    found, text = pages["two"]
    assert not pages["one"][0]["notices"] and found["notices"]
    assert text.index("of different data") < text.index("Summary")
    assert "folder (pics, size 8" in found["notices"][0]
    assert found["best"]["FD"] == [] and found["best"]["parameters"] and pages["one"][0]["best"]["FD"]


def test_a_model_that_cannot_be_measured_is_named(where, monkeypatch, capsys):
    def refused(*_args, **_more):
        raise UserError("there is nothing to measure")

    monkeypatch.chdir(where)
    monkeypatch.setattr(room, "evaluate", refused)
    assert main(["compare", "glow", "unet", "-n", "8", "--features", "pixels", "--out", "c"]) == 2
    assert "glow: there is nothing to measure" in capsys.readouterr().err


def test_the_numbers_are_those_of_eval(where, pages, monkeypatch):
    monkeypatch.chdir(where)
    assert main(["eval", "unet", "-n", "8", "--metrics", "fd", "loss", "--features", "pixels", "--out", "e"]) == 0
    told = {each["name"]: each["value"] for each in json.loads(Path("e/figures.json").read_text())["figures"]}
    run = pages["one"][0]["runs"][1]
    assert told == {name: run["figures"][name]["value"] for name in told}


def test_samples_alone_are_drawn_in_the_dtype_asked_for(where, monkeypatch, capsys):
    monkeypatch.chdir(where)
    seen = []

    def watch(verb):
        real = getattr(RectifiedFlow, verb)

        def watched(*a, **k):
            seen.append((verb, torch.is_autocast_enabled("cpu")))
            return real(*a, **k)

        monkeypatch.setattr(RectifiedFlow, verb, watched)

    watch("sample"), watch("validate")
    how = ["-n", "8", "--metrics", "fd", "loss", "--features", "pixels"]
    for dtype in ("fp32", "bf16"):
        assert main(["eval", "unet", *how, "--dtype", dtype, "--out", dtype]) == 0
        assert json.loads(Path(dtype, "figures.json").read_text())["plan"]["dtype"] == dtype
        assert set(seen) == {("sample", dtype == "bf16"), ("validate", False)}
        seen.clear()
    seen.clear()
    few = ["-n", "4", "--metrics", "fd", "--features", "pixels", "--steps", "2", "--dtype", "bf16", "--out", "short"]
    assert main(["compare", "unet", "tarflow", *few]) == 0
    assert ("sample", True) in seen
    rows = [run["figures"]["seconds"]["on"] for run in json.loads(Path("short/compare.json").read_text())["runs"]]
    assert " in bf16, " in rows[0] and " in fp32, " in rows[1]
    with pytest.raises(UserError, match="no dtype 'half' to sample in; choose fp32 or bf16"):
        Plan(dtype="half")
    assert main(["eval", "--again", "bf16/figures.json"]) == 0 and ("sample", True) in seen
    assert main(["eval", "tarflow", *how, "--dtype", "bf16"]) == 2
    assert "--dtype is for models of a velocity; tarflow is a NormalizingFlow" in capsys.readouterr().err


def test_metrics_and_prompts_are_those_asked_for(where, monkeypatch):
    monkeypatch.chdir(where)
    how = ["--metrics", "loss", "--prompts", "dark", "light", "light", "--seed", "5", "--out", "asked"]
    assert main(["compare", "unet", "tarflow", *how]) == 0
    unet, tarflow = json.loads(Path("asked/compare.json").read_text())["runs"]
    assert tarflow["prompts"] == ["dark", "light", "light"] and unet["prompts"] == [""] * 3
    assert not unet["curve"] and "FD" not in unet["figures"] and "loss" in unet["figures"]
    text = Path("asked/compare.html").read_text()
    assert "Seeds 5 to 7" in text and 'id="quality"' not in text and ">light</th>" in text


def test_a_prompt_that_a_model_does_not_know_costs_its_row_alone(where, monkeypatch):
    monkeypatch.chdir(where)
    assert main(["compare", "unet", "tarflow", "--metrics", "loss", "--prompts", "a cat", "--out", "unknown"]) == 0
    assert "cat" in json.loads(Path("unknown/compare.json").read_text())["runs"][1]["prompts"][0]
    assert re.search(r"<td colspan=\"1\">[^<]*a cat", Path("unknown/compare.html").read_text())


def test_pictures_of_a_prompt_and_seed_are_those_that_sample_draws(where, monkeypatch):
    monkeypatch.chdir(where)
    flow = load("tarflow")
    who = Contestant("t", flow, "tarflow", True, None, {"name": "folder"}, PixelFeatures(), {"guidance": 1.0})
    prompts, pictures, real, why = room._shown(who, Plan(seed=3), ["light", "dark"], None)
    x = flow.sample(["light", "dark"], seeds=[3, 4]).x
    expected = ((x[1].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).byte().numpy()
    assert np.array_equal(np.asarray(pictures[1]), expected) and (prompts, real, why) == (["light", "dark"], [], "")


def test_the_memory_is_that_of_drawing_a_batch_of_the_stored_model(where, monkeypatch):
    monkeypatch.chdir(where)
    side = room._drawing("unet", True, torch.device("cpu"), SOLVE, 3, 7, "unet")
    side.tasks["sample"]()
    assert side.parameters == sum(p.numel() for p in load("unet").parameters())


class TokenLike(Flow):
    """A flow of nothing but the verbs, whose likelihood is of tokens."""

    unit = "nats of tokens"

    def __init__(self) -> None:
        super().__init__()
        self.shape = (1, 4, 4)
        self.text = SimpleNamespace(max_tokens=0, encode=None)
        self.network = torch.nn.Linear(1, 1)
        self.config = SimpleNamespace(sampling=Plan)

    def loss(self, batch, rng): ...

    def validate(self, batch): ...

    def sample(self, prompts, *, seeds):
        return Solution(torch.zeros(len(seeds), *self.shape), 16)


def entry(name: str, flow: Flow, *, identity: str = "data", **values: float) -> room.Entry:
    who = Contestant(name, flow, name, True, None, {"name": "toy"}, PixelFeatures(), {})
    found = Evaluation([], [], {}, None, [], {}, 16, {})
    row = {column: Cell(value) for column, value in values.items()}
    picture = [Image.new("RGB", (4, 4))]
    return room.Entry(who, found, row, [Point(None, 16, 0.1, values.get("FD", 1.0))], identity, "", [""], picture, [])


def test_a_family_that_came_later_has_its_place_through_the_verbs_alone():
    entries = [entry(n, TokenLike(), FD=v, **{"nats of tokens": 30 * v}) for n, v in (("a", 2.0), ("b", 1.0))]
    both = Comparison(entries, Plan(), [])
    page = to_html(both, [{}, {}])
    Page(page)
    assert "TokenLike of Linear" in page and 'data-figure="nats of tokens"' in page
    assert both.best("FD") == {"b"} and both.best("nats of tokens") == set()  # tokenizers differ
    assert as_json(both, [{}, {}])["runs"][0]["figures"]["nats of tokens"]["value"] == 60


def test_the_best_is_marked_only_where_figures_compare():
    flows = [entry("a", TokenLike(), FD=2.0, coverage=0.5, copying=0.1), entry("b", TokenLike(), FD=1.0, coverage=0.5)]
    same = Comparison(flows, Plan(), [])
    assert (same.best("FD"), same.best("coverage"), same.best("copying")) == ({"b"}, set(), set())
    other = Comparison([flows[0], entry("b", TokenLike(), identity="other", FD=1.0, seconds=1.0)], Plan(), [])
    assert other.best("FD") == set() and not other.same_data


def test_likelihoods_of_other_splits_and_of_fewer_grey_levels_have_no_best(where, monkeypatch):
    monkeypatch.chdir(where)
    validated = {"train": {"validation_split": "train"}}
    coarse = {"flow": {"name": "normalizing", "dequantization": {"name": "uniform", "levels": 32}}}
    built({**RUNS["glow"], **validated}, Path("other-split")), built({**RUNS["glow"], **coarse}, Path("coarse"))
    how = ["-n", "8", "--metrics", "likelihood", "fd", "--features", "pixels", "--out", "held-out"]
    found = []
    for runs in (["glow", "other-split"], ["glow", "coarse"], ["glow", "other-split", "--split", "test"]):
        assert main(["compare", *runs, *how]) == 0
        found.append(json.loads(Path("held-out/compare.json").read_text()))
    for each, said in zip(found, ("(glow: test; other-split: train)", "coarse: test of 32 grey levels"), strict=False):
        assert each["best"]["bits/dim"] == [] and said in each["notices"][0]
    assert found[1]["best"]["FD"] and not found[2]["notices"]


def test_likelihoods_given_the_captions_and_without_have_no_best():
    heard, deaf, deafer = TokenLike(), TokenLike(), TokenLike()
    heard.text.max_tokens = 1
    entries = [entry(n, f, nats=v, FD=v) for n, f, v in (("a", heard, 1.0), ("b", deaf, 2.0), ("c", deafer, 3.0))]
    assert Comparison(entries, Plan(), []).best("nats") == set() and Comparison(entries, Plan(), []).best("FD") == {"a"}
    assert Comparison(entries[1:], Plan(), []).best("nats") == {"b"}
    assert "(a: test given the captions; b and c: test)" in room._notices(entries, Plan())[0]


def test_a_plot_says_a_name_as_it_is_whatever_its_colours_are_called():
    runs = [entry("black cats", TokenLike(), FD=2.0), entry("#000000 of 2", TokenLike(), FD=1.0)]
    page = to_html(Comparison(runs, Plan(), []), [{}, {}])
    assert ">black cats</text>" in page and ">#000000 of 2</text>" in page and "fill: var(--ink)" in page


def learning(lines, flow, *, names=("a", "b"), **more):
    """The plot of the losses of runs that tell the same."""
    runs = [entry(name, flow) for name in names]
    runs = [replace(each, who=replace(each.who, lines=lines)) for each in runs]
    figure = plot_learning(Comparison(runs, Plan(), []))
    figure.draw_without_rendering()
    return figure


def test_a_loss_is_called_what_it_is():
    told = [{"step": i, "loss": 1.0 / i, "l1": 1.0} for i in (1, 2)]
    assert learning(told, TokenLike()).axes[0].get_ylabel() == "error there and back, and penalties"
    told, flow = [{"step": i, "loss": 1.0 / i, "loss_t0.000": 1.0} for i in (1, 2)], TokenLike()
    flow.guided = None
    for prediction, what in {"eps": "noise", "x": "velocity"}.items():
        flow.config = SimpleNamespace(prediction=prediction)
        assert learning(told, flow).axes[0].get_ylabel() == f"squared error of the {what}"


def test_a_loss_that_hardly_moves_has_a_scale():
    axis = learning([{"step": i, "loss": 0.9 + 0.02 * i} for i in range(9)], TokenLike()).axes[0].yaxis
    low, high = axis.get_view_interval()
    assert sum(low <= tick <= high for tick in axis.get_majorticklocs()) > 2


@pytest.mark.parametrize("names", [[f"{'a-long-name/' * 8}{i}" for i in range(3)], [f"run {i}" for i in range(24)]])
def test_a_legend_lies_in_its_panel_with_every_name_whole(names):
    (axes,) = (figure := learning([{"step": i, "loss": 1.0 / i} for i in (1, 2)], TokenLike(), names=names)).axes
    box, legend = axes.get_window_extent(), axes.get_legend()
    within = legend.get_window_extent()
    assert box.x0 <= within.x0 and within.x1 <= box.x1 and box.y0 <= within.y0 and within.y1 <= box.y1
    assert [text.get_text().replace("\n", "") for text in legend.get_texts()] == names and figure.get_figheight() >= 3.6


def test_more_runs_than_colours_are_told_apart_in_every_plot():
    names, told = (
        [f"run {i}" for i in range(24)],
        [{"step": i, "loss": 1.0 / i, "validation_loss": 2.0} for i in (1, 2)],
    )
    (losses,) = learning(told, TokenLike(), names=names).axes
    points = [room.Point(i, i, 0.1 * i, 1.0 / i) for i in (1, 2)]
    curves = plot_quality(Comparison([replace(entry(name, TokenLike()), curve=points) for name in names], Plan(), []))
    for axes, marked in ((losses, False), (losses, True), *((each, True) for each in curves.axes)):
        lines = [line for line in axes.lines if (line.get_marker() != "None") == marked]
        looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
        assert len(lines) == len(looks) == len(names), axes.get_xlabel()


def test_names_in_the_page_are_escaped():
    page = to_html(
        Comparison([entry("<b>&", TokenLike(), FD=1.0), entry("b", TokenLike())], Plan(), ["1 < 2"]), [{}, {}]
    )
    Page(page)
    assert "<b>&<" not in page and "&lt;b&gt;&amp;" in page and "1 &lt; 2" in page
    assert tag("a", "x", title='"') == '<a title="&quot;">x</a>'


def test_figures_that_read_alike_are_marked_alike():
    def told(*values):
        entries = [entry(name, TokenLike(), memory=value) for name, value in zip("abc", values, strict=False)]
        return next(line for line in to_markdown(Comparison(entries, Plan(), [])).splitlines() if "memory" in line)

    assert told(100.1, 100.2) == "| memory | 100 MiB | 100 MiB |"
    assert told(100.1, 100.2, 200.0) == "| memory | **100 MiB** | **100 MiB** | 200 MiB |"


def test_the_markdown_is_a_table_with_the_best_in_bold():
    lines = to_markdown(
        Comparison([entry("a", TokenLike(), FD=2.0), entry("b", TokenLike(), FD=1.0)], Plan(), ["Read."])
    ).splitlines()
    assert lines[0] == "> Read." and "| FD | 2.0000 | **1.0000** |" in lines
    assert "standard error" in lines[-1]


def test_runs_are_named_by_the_shortest_ends_that_tell_them_apart():
    assert _names(["x/a", "y/b/"]) == ["a", "b"] and _names(["x/a", "y/a"]) == ["x/a", "y/a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unet"], "unet alone is no comparison; name two runs or more"),
        (["unet", "./unet"], "unet is named twice"),
        (["unet", "nowhere"], "nowhere does not exist"),
        (["unet", "glow", "--steps", "0"], "--steps 0 is too few"),
        (["unet", "glow", "--metrics", "fid"], "no metric 'fid'. Did you mean 'fd'?"),
        (["unet", "glow", "--batch", "0"], "batch = 0 is too few"),
        (["unet", "glow", "--split", "tset"], "tset"),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(arguments, message, where, monkeypatch, capsys):
    monkeypatch.chdir(where)
    assert main(["compare", *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told and "\n" not in told


def test_one_model_or_two_of_one_name_are_no_comparison():
    who = Contestant("a", TokenLike(), "a", True, None, {"name": "toy"}, PixelFeatures(), {})
    for few in ([who], [who, who]):
        with pytest.raises(UserError, match="two models or more, each of a name of its own"):
            compare(few, Plan(), bar=lambda *_: nullcontext(lambda _: None))


def test_a_real_browser_shows_the_page_in_light_and_in_dark(pages, where):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        papers = []
        for scheme in ("light", "dark"):
            page, told = browser.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 800}), []
            page.on("console", lambda message, told=told: told.append(message.text))
            page.on("request", lambda request, told=told: told.append(request.url))
            page.goto((where / "one" / "compare.html").as_uri())
            assert [url for url in told if not url.startswith(("file:", "data:"))] == []
            assert page.locator("#summary tbody tr").count() >= 8 and page.locator("svg").count() == 2
            broken = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
            assert broken == 0 and page.locator("svg").first.bounding_box()["width"] > 500
            papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            ink = page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill")
            assert ink != papers[-1]
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert papers[0] == "rgb(255, 255, 255)" != papers[1]
        browser.close()
