"""Evaluations at the edges: what is not finite, too few, too many, unreadable, or asked in vain."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import test_likelihood as toys
import test_medusa
import torch
import toy_tokens
from PIL import Image
from safetensors.torch import save_file

from genflow.cli.compare import _contestant
from genflow.data.images import ImageDataset
from genflow.data.vectors import VectorDataset
from genflow.errors import UserError
from genflow.evaluation import comparison, report
from genflow.evaluation.comparison import Contestant, compare
from genflow.evaluation.features import PixelFeatures, graph_features
from genflow.evaluation.few_steps import few_steps
from genflow.evaluation.neighbours import own_found
from genflow.evaluation.page import to_html
from genflow.evaluation.plan import Plan
from genflow.evaluation.plots import save_plot
from genflow.evaluation.reconstruction import reconstruction
from genflow.flows.autoencoder import AutoencoderFlowConfig
from genflow.networks.autoencoders import TinyAutoencoderConfig
from genflow.networks.quantizers import VQConfig
from genflow.text.none import NoTextConfig
from genflow.text.trained import LabelsConfig, LearnedTextConfig

NAMES = tuple(f"c{i}" for i in range(40))


@dataclass(frozen=True)
class Data:
    """Samples by split: vectors or uint8 pictures, each with a caption of `captions` in turn; `broken` cannot be read."""

    splits: dict[str, torch.Tensor]
    captions: tuple[str, ...] = ("",)
    broken: tuple[str, int] | None = None

    def build(self, split):
        if split not in self.splits:
            raise UserError(f"no split {split!r}")
        x = self.splits[split]
        captions = [self.captions[i % len(self.captions)] for i in range(len(x))]
        names = [f"{split} {i}" for i in range(len(x))]
        if x.dim() == 2:
            return VectorDataset(x, captions, names)
        images = [Image.fromarray(each.permute(1, 2, 0).squeeze(2).numpy()) for each in x]
        return ImageDataset(captions, names, lambda i: b"" if (split, i) == self.broken else images[i])


def vectors(**counts):
    generator = torch.Generator().manual_seed(0)
    splits = {split: torch.randn(n, 3, generator=generator) for split, n in counts.items()}
    return Data(splits, NAMES)


def pictures(shape=(3, 8, 8), *, captions=("dark", "light"), broken=None, **counts):
    generator = torch.Generator().manual_seed(0)
    levels = {s: torch.randint(256, (n, *shape), generator=generator, dtype=torch.uint8) for s, n in counts.items()}
    return Data(levels, captions, broken)


def measure(flow, data, *metrics, features=None, **plan):
    return report.evaluate(flow, data, Plan(metrics, **plan), name="toy", features=features or PixelFeatures())


def named(found):
    return {figure.name: figure.value for figure in found.figures}


def hearing():
    return toys.velocity_flow(text=LabelsConfig(NAMES, dim=3)).eval()


def autoencoder(shape=(1, 16, 16)):
    torch.manual_seed(0)
    network = TinyAutoencoderConfig(width=8, in_channels=shape[0], encoder_channels=4, latent_channels=4).build()
    flow = AutoencoderFlowConfig(VQConfig(vocabulary=32, channels=4)).build(
        network, NoTextConfig().build(), shape=shape
    )
    with torch.no_grad():
        flow.bottleneck.initialise(network.encode(torch.rand(16, *shape) * 2 - 1))
    return flow.eval()


# ---------------------------------------------------------------------------------------------------------- how many


def test_more_samples_than_the_training_samples_that_are_kept_are_measured(monkeypatch):
    monkeypatch.setattr(report, "MOST", 20)
    found = measure(hearing(), vectors(train=100, test=100), "fd", "nearest", n=30, sampling={"steps": 1})
    own = next(figure for figure in found.figures if figure.name.startswith("own found"))
    assert own.on.endswith("training samples is that of its prompt, 20 samples") and "FD" in named(found)


def test_of_one_sample_the_rest_is_measured():
    found = measure(hearing(), vectors(train=8, test=8), n=1, sampling={"steps": 1})
    assert (
        set(named(found)) >= {"nats", "loss"}
        and "1 samples and 8 training ones are too few" in found.left_out["nearest"]
    )
    with pytest.raises(UserError, match="nearest: 1 samples and 8 training ones are too few; 2 of each are the least"):
        measure(hearing(), vectors(train=8, test=8), "nearest", n=1)


def test_copying_is_left_out_with_a_remark_where_one_sample_is_held_out():
    found = measure(hearing(), vectors(train=8, test=1), "nearest", sampling={"steps": 1})
    assert (
        "copying" not in named(found) and "copying: left out, one sample of the test split is too few" in found.remarks
    )


@pytest.mark.parametrize(("held", "n"), [(1, None), (5, 1)])
def test_the_reconstruction_of_one_picture_has_no_distance(held, n):
    data = pictures((1, 16, 16), train=4, test=held)
    found = measure(autoencoder(), data, n=n)
    assert "too few; 2 are the least" in found.left_out["reconstruction"] and set(named(found)) == {"loss"}
    assert [each for each in found.remarks if "draws no pictures" in each] == [
        f"fd, kid, precision-recall, density-coverage, alignment, nearest: left out, {found.left_out['fd']}"
    ]
    with pytest.raises(UserError, match="reconstruction: one picture of the test split is too few"):
        measure(autoencoder(), data, "reconstruction", n=n)


# ------------------------------------------------------------------------------------------------- what hangs on a batch


def test_what_is_told_of_an_autoencoder_does_not_hang_on_the_batch_and_is_told_once():
    few, all_ = (named(measure(autoencoder(), pictures((1, 16, 16), train=9, test=9), batch=b)) for b in (4, 9))
    assert few == pytest.approx(all_, rel=1e-5)
    assert set(few) == {"loss", "PSNR, dB", "SSIM", "FD to reconstructions", "perplexity of codes"}


def test_straightness_does_not_hang_on_the_batch():
    flow, real = toys.velocity_flow().eval(), torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    each = [few_steps(flow, real, [""] * 300, range(300), counts=(1,), batch=b).straightness for b in (100, 256, 300)]
    assert each == pytest.approx([each[0]] * 3, rel=1e-6)


# ------------------------------------------------------------------------------------------------- what is not a figure


def broken_of(flow):
    with torch.no_grad():
        for p in flow.network.parameters():
            p.fill_(math.nan)
    return flow


def test_pictures_that_are_not_finite_have_no_figures():
    data = pictures((1, 16, 16), train=4, test=4)
    with pytest.raises(UserError, match="the model's pictures are not finite; is it trained"):
        measure(broken_of(autoencoder()), data, "reconstruction")
    flow = toys.velocity_flow(shape=(1, 8, 8)).eval()
    flow.sample = lambda prompts, seeds: SimpleNamespace(x=torch.full((len(seeds), 1, 8, 8), math.nan), nfe=1)
    with pytest.raises(UserError, match="the model's pictures are not finite; is it trained"):
        measure(flow, pictures((1, 8, 8), train=8, test=4), "fd")


def test_a_loss_that_is_not_finite_is_refused_as_a_likelihood_is():
    with pytest.raises(UserError, match="the loss of 4 held-out samples is nan; is the model trained"):
        measure(broken_of(autoencoder()), pictures((1, 16, 16), train=4, test=4), "loss")


@pytest.mark.parametrize("metric", ["loss", "likelihood"])
def test_a_picture_that_cannot_be_read_is_in_no_mean(metric):
    flow = toys.velocity_flow(shape=(1, 8, 8)).eval()
    with pytest.raises(UserError, match="test 2 cannot be read .*mend it, or take it out of the split"):
        measure(flow, pictures((1, 8, 8), train=4, test=4, broken=("test", 2)), metric)


def test_every_model_of_a_comparison_is_told_of_pictures_that_were_passed_over():
    data, reals = pictures((1, 8, 8), train=8, test=4, broken=("train", 2)), report.Reals()
    flow, plan = toys.velocity_flow(shape=(1, 8, 8)).eval(), Plan(("fd", "kid"), n=3, sampling={"steps": 1})
    about = {"name": "toy", "features": PixelFeatures(), "reals": reals}
    for _ in range(2):
        remarks = report.evaluate(flow, data, plan, **about).remarks
        assert [each for each in remarks if "passed over" in each] == [
            "1 picture of the train split cannot be read: passed over"
        ]


# ------------------------------------------------------------------------------------------------------ loss, likelihood


def test_the_loss_is_left_out_only_where_it_is_the_likelihood():
    data = pictures((3, 8, 8), train=4, test=4)
    keys = {mtp: named(measure(toy_tokens.model(grid=(4, 4), mtp=mtp).float(), data, n=2)) for mtp in (0, 1)}
    assert "loss" not in keys[0] and "loss" in keys[1] and "validation_mtp1" in keys[1]
    heads = named(measure(test_medusa.heads(toy_tokens.model(grid=(4, 4)), 2).float(), data, n=2))
    assert heads["loss"] == pytest.approx((heads["validation_head1"] + heads["validation_head2"]) / 2)
    assert "loss" not in named(measure(toys.scale_flow().eval(), vectors(train=8, test=8), n=2))


def test_options_of_likelihoods_are_refused_where_none_is_asked_for():
    for plan, option in (({"k": 7}, "k"), ({"likelihood": {"divergence": "nonsense"}}, "divergence")):
        with pytest.raises(UserError, match=f"{option} is of likelihoods, and none is asked for; add the metric"):
            measure(hearing(), vectors(train=8, test=8), "loss", **plan)


# --------------------------------------------------------------------------------------------------------------- drafts


def test_a_model_with_a_draft_of_another_text_encoder_is_measured_and_its_memory_too(monkeypatch):
    text = LearnedTextConfig(dim=5, layers=1, heads=1, max_tokens=6)
    flow, draft = toy_tokens.model(grid=(4, 4)).float(), toy_tokens.model(1, grid=(4, 4), text=text).float()
    sampling = {"decoder": "speculative", "draft": draft}
    found = measure(flow, pictures((3, 8, 8), train=8, test=8), "fd", n=4, sampling=sampling)
    assert found.counts["samples"] == 4
    monkeypatch.setattr(comparison, "load", lambda *_, **__: flow)
    comparison._drawing("tokens", True, torch.device("cpu"), sampling, 2, 0, "tokens").tasks["sample"]()


# --------------------------------------------------------------------------------------------------------------- compare


@pytest.fixture
def lone(monkeypatch):
    monkeypatch.setattr(comparison, "peak_memory", lambda *_: 12.5)


def contestant(name, flow):
    data = vectors(train=8, test=8)
    return Contestant(name, flow, name, True, data, {"name": "toy"}, PixelFeatures(), {"steps": 1})


def test_vectors_of_the_prompts_are_drawn_in_turn(lone, monkeypatch):
    drawn = []
    flow = hearing()
    sample = flow.sample
    monkeypatch.setattr(flow, "sample", lambda prompts, **how: drawn.append(prompts) or sample(prompts, **how))
    pair = [contestant("hears", flow), contestant("does not", toys.velocity_flow().eval())]
    found = compare(pair, Plan(("fd",), n=2), prompts=["c3", "c5"])
    assert drawn[-1][:3] == ["c3", "c5", "c3"] and not found.notices
    assert [entry.prompts for entry in found.entries] == [["c3", "c5"], [""]]


def test_prompts_that_cannot_be_drawn_are_told(lone):
    deaf = [contestant(name, toys.velocity_flow().eval()) for name in "ab"]
    found = compare(deaf, Plan(("fd",), n=2), prompts=["nothing here"])
    assert found.notices == ["None of these models hears a condition: the prompts were not drawn."]
    found = compare([contestant("a", hearing()), deaf[1]], Plan(("fd",), n=2), prompts=["c99"])
    assert "c99" in found.entries[0].no_pictures and not found.entries[0].pictures
    made = {"weights": "", "ema": True, "data": {}, "features": {}, "versions": {}, "device": "cpu", "threads": 1}
    assert "a: " + found.entries[0].no_pictures.partition("'")[0] in to_html(found, [made, made])


def test_the_memory_is_that_of_drawing_in_the_dtype_that_the_figures_are_in(lone, monkeypatch):
    seen = []
    flow = hearing()
    monkeypatch.setattr(flow, "sample", lambda *_, **__: seen.append(torch.is_autocast_enabled("cpu")))
    monkeypatch.setattr(comparison, "load", lambda *_, **__: flow)
    for dtype in ("fp32", "bf16"):
        comparison._drawing("m", True, torch.device("cpu"), {}, 2, 0, "m", dtype=dtype).tasks["sample"]()
    assert seen == [False, True]
    asked = []
    monkeypatch.setattr(comparison, "peak_memory", lambda draw, *_: asked.append(draw.keywords["dtype"]))
    pair = [
        contestant("velocity", toys.velocity_flow().eval()),
        replace(contestant("map", toys.scale_flow().eval()), sampling={}),
    ]
    compare(pair, Plan(("loss",), n=2, dtype="bf16"))
    assert asked == ["bf16", "fp32"]


def test_compare_refuses_a_dtype_that_the_device_cannot_do(monkeypatch):
    flow = hearing()
    monkeypatch.setattr("genflow.cli.compare.open_model", lambda asked: (flow, {}))
    monkeypatch.setattr("genflow.training.precision.refusal", lambda dtype, device: "this device has none")
    args = SimpleNamespace(batch=4, no_ema=False, device="cpu", dtype="bf16")
    with pytest.raises(UserError, match="--dtype bf16: this device has none"):
        _contestant(args, "run", "run")


# -------------------------------------------------------------------------------------------------------- feature graphs


def convolutions(folder, change=lambda graph, weights: None, channels=3):
    graph = [
        {"name": "input", "op": "input"},
        {"name": "a", "op": "conv_relu", "inputs": ["input"], "stride": 4, "padding": 1},
        {"name": "b", "op": "conv_relu", "inputs": ["a"], "stride": 1, "padding": 1},
    ]
    weights = {"a.weight": torch.randn(4, channels, 3, 3), "b.weight": torch.randn(4, 4, 3, 3)}
    weights |= {"a.bias": torch.zeros(4), "b.bias": torch.zeros(4)}
    change(graph, weights)
    (folder / "net.json").write_text(json.dumps({"graph": graph}))
    save_file(weights, folder / "net.safetensors")
    return folder / "net.json"


@pytest.mark.parametrize(
    "change",
    [
        lambda graph, weights: weights.pop("b.bias"),
        lambda graph, weights: graph[2].update(stride=None),
        lambda graph, weights: graph[2].pop("stride"),
        lambda graph, weights: graph[2].update(inputs=["c"]),
        lambda graph, weights: graph[2].update(op="gelu"),
        lambda graph, weights: weights.update({"b.weight": torch.randn(4, 5, 3, 3)}),
        lambda graph, weights: weights.update({"b.bias": torch.zeros(5)}),
        lambda graph, weights: weights.update({"a.weight": torch.tensor(1.0)}),
    ],
)
def test_a_graph_and_weights_that_do_not_fit_are_refused_when_they_are_read(tmp_path, change):
    with pytest.raises(UserError, match=r"net\.json: no feature network \(.*; copy both files again") as error:
        graph_features(convolutions(tmp_path, change))
    assert "\n" not in str(error.value)


def test_pictures_of_other_channels_than_the_features_are_refused_before_their_distance(tmp_path):
    same = SimpleNamespace(device=torch.device("cpu"), reconstruct=lambda x: x)
    pictures = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(UserError, match="features net read pictures of 1 channels, and these have 3"):
        reconstruction(same, pictures, graph_features(convolutions(tmp_path, channels=1)))


def test_a_plot_of_another_kind_and_a_gallery_of_none_are_refused(tmp_path):
    from matplotlib.figure import Figure as Picture

    with pytest.raises(UserError, match="a.foo: a plot is a .png or .svg"):
        save_plot(Picture(), tmp_path / "a.foo")
    with pytest.raises(UserError, match="a gallery of 0"):
        own_found(torch.randn(4, 3), torch.randn(4, 3), gallery=0)
