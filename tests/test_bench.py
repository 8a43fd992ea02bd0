"""genflow bench: operations beside torch's own counter, sides in turn, memory, what is printed and kept. Never a time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from genflow.attention import attention
from genflow.cli import bench as cli_bench
from genflow.cli import bench_attention, bench_flows, bench_mmdit, main
from genflow.errors import UserError
from genflow.evaluation import bench
from genflow.evaluation.bench import (
    Contest,
    Side,
    Task,
    alternate,
    difference,
    matrix_peak,
    measure,
    peak_memory,
    ratio,
)
from genflow.evaluation.flops import attention_flops, mmdit_flops, mmdit_training_flops
from genflow.interop import peers
from genflow.networks.mmdit import MMDiTConfig
from tests.test_float8 import emulated

CPU = torch.device("cpu")
TINY = (
    "--depth",
    "1",
    "--width",
    "16",
    "--heads",
    "2",
    "--tokens",
    "4",
    "--text",
    "3",
    "--batch",
    "2",
    "--rounds",
    "1",
)
linux = pytest.mark.skipif(platform.system() != "Linux", reason="memory is read from /proc")


# -------------------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize(
    "changes", [{}, {"mlp_ratio": 3, "qk_norm": False}, {"dual_attention_layers": (0, 2), "depth": 3}]
)
def test_operations_of_an_mmdit_are_those_that_torch_counts(changes):
    sizes = {
        "depth": 2,
        "hidden": 16,
        "heads": 2,
        "patch_size": 2,
        "in_channels": 3,
        "context_dim": 12,
        "pooled_dim": 10,
    }
    config = MMDiTConfig(**{**sizes, "sample_size": 4, "attention": "math", **changes})
    network = config.build().double()
    batch, text = 3, 5
    inputs = torch.randn(batch, 3, 8, 8), torch.rand(batch), torch.randn(batch, text, 12), torch.randn(batch, 10)
    x, t, context, pooled = (a.double() for a in inputs)
    with FlopCounterMode(display=False) as forward:
        v = network(x, t, context, pooled)
    with FlopCounterMode(display=False) as backward:
        v.square().mean().backward()
    assert forward.get_total_flops() == batch * mmdit_flops(config, 16, text)
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == batch * mmdit_training_flops(config, 16, text)


def test_operations_of_attention_are_those_that_torch_counts():
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    with FlopCounterMode(display=False) as counter:
        o = attention(q, k, v, backend="math")
        assert counter.get_total_flops() == 2 * attention_flops(5 * 7, 3, 4)
        o.sum().backward()
    assert counter.get_total_flops() == 2 * attention_flops(5 * 7, 3, 4, backward=True)


# --------------------------------------------------------------------------------------------------------------- measuring


def test_sides_run_in_turn_and_the_first_rounds_do_not_count():
    order: list[str] = []
    seconds = alternate({name: partial(order.append, name) for name in "ab"}, 3, CPU, warm=2)
    assert "".join(order) == "ab" * 5
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_taken_pair_by_pair():
    # The machine was ten times slower in the second pair, and of the medians alone one would say 1.5.
    assert ratio([1.0, 10.0, 2.0], [2.0, 20.0, 3.0]) == (2.0, 1.5, 2.0)


def test_the_peak_of_matrix_products_is_the_best_of_the_sizes_tried():
    peak = matrix_peak(torch.float32, CPU, seconds=0)
    assert peak.by_size == {512: peak.tflops} and peak.size == 512 and peak.tflops > 0


def test_what_a_task_reaches_of_square_products_is_taken_round_by_round():
    peak = matrix_peak(torch.float32, CPU, seconds=0)
    squares = bench.square_products(peak, torch.float32, CPU, seconds=3 * 2 * peak.size**3 / peak.tflops / 1e12)
    ((multiply, flops),) = squares.values()
    assert flops == 3 * 2 * peak.size**3 and multiply() is None
    # The machine was ten times slower in the second round; against the best peak one would say 1/12.
    task = Task("work", "works", 1, flops=2 * 10**12)
    result = bench.Result({"work": {"a": [4.0, 40.0]}}, {}, {}, {}, {"work": [1.0, 0.1]})
    assert cli_bench._of_products(result, task, "a") == pytest.approx(0.5)


def test_the_fastest_size_of_products_is_what_a_round_has(monkeypatch):
    squares = {1: (lambda: time.sleep(0.02), 1e10), 2: (lambda: None, 2e10)}
    monkeypatch.setattr(bench, "square_products", lambda *_: squares)
    side = Side({"adding": lambda: None})
    contest = Contest("sums", ("ours",), lambda name: side, (Task("adding", "sums", 1, flops=1),), torch.float32)
    result = measure(contest, 3, CPU, peak=bench.MatrixPeak(1.0, 1, {1: 1.0}))
    assert [*result.seconds["adding"]] == ["ours"] and len(result.products["adding"]) == 3
    assert min(result.products["adding"]) > 1e10 / 0.02 / 1e12


def answering(answers: dict[str, float], name: str) -> Side:
    value = torch.full((3,), answers[name])
    return Side({"adding": lambda: value + 1}, answers={"adding": lambda: value})


@pytest.mark.parametrize(("theirs", "fits"), [(1.0, True), (1.04, True), (1.2, False), (float("nan"), False)])
def test_times_are_not_believed_where_the_answers_differ(theirs, fits):
    answers = {"ours": 1.0, "theirs": theirs}
    tasks = (Task("adding", "sums", 1),)
    contest = Contest("sums", tuple(answers), partial(answering, answers), tasks, torch.float32, (("ours", "theirs"),))
    if fits:
        result = measure(contest, 2, CPU)
        assert result.agreement["adding"]["theirs"] == pytest.approx((theirs - 1) / theirs)
        assert len(result.seconds["adding"]["ours"]) == 2
    else:
        with pytest.raises(UserError, match="ours and theirs give different answers"):
            measure(contest, 2, CPU)


def hungry(name: str) -> Side:
    """A task that takes as many MiB as its name says, gives them back, and so again."""
    if name == "deadly":
        os._exit(9)
    return Side({"eating": lambda: torch.ones(int(name) * 2**18)}, weights=10 * 2**20)


@linux
def test_memory_is_the_peak_of_a_process_of_its_own():
    assert peak_memory(hungry, "80", "eating", CPU) == pytest.approx(90, abs=5)  # with the weights


@linux
def test_a_side_that_dies_for_want_of_memory_is_told_in_one_line():
    with pytest.raises(UserError, match="deadly died while its memory was measured"):
        peak_memory(hungry, "deadly", "eating", CPU)


# ------------------------------------------------------------------------------------------------------------ the contests


def arguments(what: str, *words: str):
    """The parsed arguments of a command, as its contests take them."""
    import argparse

    from genflow.cli import bench as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([what, *words])
    args.device = CPU
    return args


def test_network_calls_of_sampling_count_both_branches_of_every_evaluation():
    args = arguments("sample", *TINY, "--sampler", "midpoint", "--steps", "3")
    (contest,) = bench_mmdit.sampling(args)
    assert contest.tasks[0].calls == 2 * 2 * (2 * 3)  # pictures, branches, evaluations
    assert contest.tasks[0].flops == 24 * mmdit_flops(bench_mmdit.mmdit_config(args), 4, 3)
    (contest,) = bench_mmdit.sampling(arguments("sample", *TINY, "--guidance", "1", "--steps", "3"))
    assert contest.tasks[0].calls == 2 * 3 and "euler, 3 steps, guidance 1" in contest.title
    (contest,) = bench_mmdit.sampling(arguments("sample", *TINY, "--sampler", "bosh3", "--option", "rtol=0.1"))
    assert "bosh3, own steps, guidance 4" in contest.title


def test_what_is_sampled_and_trained_depends_on_the_whole_network():
    args = arguments("sample", *TINY, "--precision", "fp32", "--steps", "2")
    drawn = bench_mmdit.sampling_side(args, "genflow").answers["sampling"]()
    args.guidance = 1.0
    plain = bench_mmdit.sampling_side(args, "genflow").answers["sampling"]()
    assert difference(drawn, plain) > 0.1  # zero-initialised gates would hide everything
    velocity = bench_mmdit.training_side(arguments("train", *TINY), "genflow").answers["training"]()
    assert velocity.float().std() > 1e-2


@pytest.mark.parametrize("mask", ["none", "causal", "keys", "segments", "tree", "dense", "causal+keys"])
def test_every_mask_can_be_timed_and_its_operations_are_those_of_the_pairs_it_shows(mask):
    words = ("--batch", "2", "--heads", "2", "--lq", "9", "--head-dim", "8", "--precision", "fp32", "--mask", mask)
    args = arguments("attention", *words)
    args.lk = 9
    (contest,), refused = bench_attention.attending(args)
    assert {"sdpa", "math", "tiled"} <= {*contest.sides} and "runs on cuda" in refused["sdpa_cudnn"]
    segments = 3 * 3 + 3 * 2 * 2
    pairs = {"none": 2 * 81, "causal": 2 * 45, "segments": 2 * segments, "keys": 9 * ((9 - 37 % 5) + (9 - 74 % 5))}
    if mask in pairs:
        assert contest.tasks[0].flops == attention_flops(pairs[mask], 2, 8)
    side = contest.build("tiled")
    assert all(0 < error < 1e-5 for error in side.error.values()) and len(side.error) == 2
    assert side.tasks["forward and backward"]()[0].isfinite().all()


def test_zukos_flow_has_the_weights_of_ours_and_masked_ones():
    pytest.importorskip("zuko")
    (contest,) = bench_flows.flowing(arguments("flows", "--against", "zuko", "--hidden", "8", "--batch", "4"))
    ours, theirs = contest.build("genflow couplings"), contest.build("zuko")
    masked = int(theirs.note.split()[0].replace(",", ""))
    assert theirs.parameters == ours.parameters + masked


# ---------------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def quick(monkeypatch):
    """Neither processes nor large matrices."""
    monkeypatch.setattr(bench, "peak_memory", lambda build, name, task, device: 100.0 + len(name))
    monkeypatch.setattr(bench, "matrix_peak", partial(matrix_peak, seconds=0))


def test_training_beside_diffusers_is_printed_and_kept(quick, capsys, tmp_path):
    pytest.importorskip("diffusers")
    file = tmp_path / "new" / "train.json"
    words = ("--against", "diffusers", "--checkpointing", "--json", str(file))
    assert main(["bench", "train", *TINY, *words]) == 0
    out = capsys.readouterr().out
    assert "genflow / diffusers:" in out and "of peak" in out and "answers differ by" in out
    assert "memory of diffusers, no checkpoints: 125 MiB" in out
    kept = json.loads(file.read_text())
    (contest,) = kept["contests"]
    training = contest["tasks"]["training"]
    assert kept["settings"]["tokens"] == 4 and kept["machine"]["packages"]["diffusers"]
    assert {*training["seconds"]} == {"genflow", "diffusers"} and len(training["seconds"]["genflow"]) == 1
    assert contest["sides"]["genflow"]["parameters"] == contest["sides"]["diffusers"]["parameters"]
    assert training["agreement"]["diffusers"] < 0.05
    assert "in turn" in out and len(training["products_tflops"]) == 1


@emulated
def test_training_in_8_bits_stands_beside_bf16_and_is_refused_where_it_cannot_be(quick, capsys, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    words = ["bench", "train", *TINY, "--precision", "fp8", "--json", str(tmp_path / "train.json")]
    assert main(words) == 2
    assert "--precision fp8: fp8 is arithmetic of NVIDIA's GPUs" in capsys.readouterr().err
    monkeypatch.setattr("genflow.training.precision.refusal", lambda precision, device: None)
    assert main([*words, "--against", "diffusers", "--width", "32"]) == 0
    (contest,) = json.loads((tmp_path / "train.json").read_text())["contests"]
    assert 0.005 < contest["tasks"]["training"]["agreement"]["diffusers"] < 0.2


def test_sampling_gives_the_latents_of_the_pipeline_of_diffusers(quick, capsys, tmp_path):
    pytest.importorskip("diffusers")
    file = tmp_path / "sample.json"
    words = ("--against", "diffusers", "--precision", "fp32", "--steps", "3", "--json", str(file))
    assert main(["bench", "sample", *TINY, *words]) == 0
    (contest,) = json.loads(file.read_text())["contests"]
    assert contest["tasks"]["sampling"]["agreement"]["diffusers"] < 1e-5
    assert contest["tasks"]["sampling"]["calls"] == 12


def test_attention_lists_who_served_and_why_the_others_could_not(quick, capsys):
    assert main(["bench", "attention", "--batch", "1", "--heads", "1", "--lq", "8", "--rounds", "1"]) == 0
    captured = capsys.readouterr()
    assert "forward and backward" in captured.out and "what cannot serve" in captured.out
    assert "flex, backward" in captured.out and captured.err == ""


def test_gradients_that_are_zero_or_not_numbers_are_told_and_kept_as_json(quick, capsys, tmp_path, monkeypatch):
    words = [
        "bench",
        "attention",
        "--batch",
        "1",
        "--heads",
        "1",
        "--lq",
        "4",
        "--head-dim",
        "8",
        "--precision",
        "fp32",
    ]
    kept = tmp_path / "a.json"

    def errors(*more):
        assert main([*words, "--backend", "sdpa", "--json", str(kept), *more]) == 0
        return json.loads(kept.read_text())["contests"][0]["sides"]["sdpa"]["error"]["forward and backward"]

    assert errors("--lk", "1") < 1e-6  # the true gradient of q is 0

    def spoilt(q, k, v, mask, *, backend):  # the gradient of k alone is not a number
        o = attention(q, k, v, mask, backend=backend)
        return o if k.dtype == torch.float64 else o + (0 * k).sum().sqrt()

    monkeypatch.setattr(bench_attention, "attention", spoilt)
    assert errors() is None


@pytest.mark.parametrize(("model", "peer"), [("glow", "normflows"), ("nsf", "zuko"), ("glow", None), ("nsf", None)])
def test_flows_are_trained_sampled_and_asked_for_likelihoods(quick, capsys, model, peer):
    words = ["--model", model, "--batch", "2", "--steps", "1", "--hidden", "4", "--rounds", "1"]
    words += ["--levels", "2", "--size", "8"] if model == "glow" else []
    if peer:
        pytest.importorskip(peer)
        words += ["--against", peer]
    assert main(["bench", "flows", *words]) == 0
    captured = capsys.readouterr()
    for task in ("training", "likelihood", "sampling"):
        assert f"\n{task}  " in captured.out
    assert (f"/ {peer}" in captured.out) == bool(peer) and captured.err == ""


def test_help_costs_no_torch():
    code = (
        "import sys; from genflow.cli import main\ntry: main(['bench', 'train', '--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "--checkpointing" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "WHAT"),
        (["trian"], "'trian' (choose from 'train'"),
        (["train", "--against", "difusers"], "Did you mean 'diffusers'?"),
        (["train", "--against", "zuko"], "no counterpart of train is known there. Choose from: diffusers."),
        (["flows", "--against", "normflow"], "no counterpart of glow or nsf is known there. Did you mean 'normflows'?"),
        (["flows", "--model", "nsf", "--against", "normflows"], "no counterpart of nsf"),
        (["attention", "--against", "xformers"], "--against"),
        (["train", "--tokens", "60"], "--tokens 60 is no square of a picture's sides; try 64"),
        (["train", "--batch", "0"], "'0' is not a number of 1 or more"),
        (["train", "--device", "abacus"], "--device abacus"),
        (["train", "--json", "."], "name a file, such as bench.json"),
        (["train", "--device", "meta"], "--device meta computes nothing"),
        (["train", "--json", "/dev/null"], "--json /dev/null is no regular file"),
        (["attention", "--mask", "casual"], "Did you mean 'causal'?"),
        (["attention", "--backend", "spda"], "--backend 'spda' is unknown. Did you mean 'sdpa'?"),
        (["attention", "--backend", "varlen", "--device", "cpu"], "none can serve; varlen runs on cuda, not on cpu"),
        (["flows", "--steps", "3"], "--steps is of one model; add --model glow or --model nsf"),
        (["flows", "--model", "nsf", "--levels", "3"], "--levels is of glow"),
        (["sample", "--against", "diffusers", "--sampler", "heun"], "leave --sampler and --option out"),
        (["sample", "--against", "diffusers", "--guidance", "0.9"], "diffusers guides above 1 only"),
        (["train", "--device", "cpu", "--graphs"], "--graphs records CUDA graphs, and this is cpu"),
        (["sample", *TINY, "--device", "cpu", "--graphs"], "--graphs records CUDA graphs, and this is cpu"),
        (["sample", *TINY, "--sampler", "huen"], "Did you mean 'heun'?"),
    ],
)
def test_mistakes_cost_one_line_and_exit_code_2(words, message, capsys):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("genflow: ") and error.count("\n") == 1


@pytest.mark.parametrize(("what", "peer"), [("train", "diffusers"), ("flows", "zuko"), ("flows", "normflows")])
def test_a_peer_that_is_not_installed_is_told_what_to_install(what, peer, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, peer, None)
    assert main(["bench", what, "--against", peer]) == 2
    error = capsys.readouterr().err
    assert f"pip install {peer}" in error and error.count("\n") == 1


def test_every_peer_has_a_work():
    for work, known in peers.PEERS.items():
        assert known and work in ("train", "sample", *bench_flows.DEFAULTS)
