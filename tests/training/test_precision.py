"""Precision: what was asked is what runs, or it is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from genflow.errors import UserError
from genflow.flows.store import newest_checkpoint
from genflow.training.checkpoint import GROUPS
from genflow.training.precision import (
    DTYPES,
    float32_products,
    matmul_tflops,
    precision_report,
    refusal,
    resolve_precision,
    verified,
)
from genflow.training.run import train
from tests.test_float8 import emulated


@pytest.mark.parametrize(("slow", "sizes"), [(False, [256, 1024]), (True, [256, 256])])
def test_a_rate_is_that_of_small_products_where_large_ones_would_take_long(monkeypatch, slow, sizes):
    tried = []

    def seconds(size, precision, device):
        tried.append(size)
        return size**3 / 1024**3 * (0.26 if slow else 0.24)

    monkeypatch.setattr("genflow.training.precision._product_seconds", seconds)
    rate = matmul_tflops("bf16", torch.device("cpu"))
    assert tried == sizes and rate == pytest.approx(2 * 1024**3 / (0.26 if slow else 0.24) / 1e12)


def test_what_the_device_cannot_do_is_refused():
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"train\.precision=fp16: fp16 training needs a GPU"):
        resolve_precision("fp16", cpu)
    assert refusal("bf16", cpu) is None
    assert resolve_precision("auto", cpu)[0] in ("fp32", "bf16")
    assert resolve_precision("bf16", cpu) == ("bf16", "as asked")


def test_the_precision_that_really_ran_is_checked():
    linear, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with verified(linear, "fp32"):
        linear(x)
    with pytest.raises(UserError, match="bf16 was asked"), verified(linear, "bf16"):
        linear(x)
    with verified(linear, "bf16"), torch.autocast("cpu", torch.bfloat16):
        linear(x)
    assert not linear._forward_hooks


def test_bf16_runs_in_bf16_with_float32_weights(tiny):
    run = train(tiny("train.precision=bf16"))
    for file in newest_checkpoint(run).glob("*.safetensors"):
        assert {v.dtype for key, v in load_file(file).items() if not key.startswith(GROUPS)} == {torch.float32}
    assert json.loads((newest_checkpoint(run) / "config.json").read_text())["train"]["precision"] == "bf16"


@emulated
def test_fp8_runs_in_fp8_where_it_is_not_refused(tiny, monkeypatch):
    products = []
    monkeypatch.setattr("genflow.training.precision.refusal", lambda precision, device: None)
    real = torch.nn.functional.scaled_mm
    monkeypatch.setattr("torch.nn.functional.scaled_mm", lambda *a, **k: products.append(a[0].dtype) or real(*a, **k))
    run = train(tiny("train.precision=fp8", "train.checkpointing=true"))
    # Of each of two blocks 4 linears of two streams, but one that has nothing after its keys and values; forward twice.
    assert products.count(torch.float8_e4m3fn) == 2 * products.count(torch.float8_e5m2) / 2 == 4 * 2 * 13
    for file in newest_checkpoint(run).glob("*.safetensors"):
        assert {v.dtype for key, v in load_file(file).items() if not key.startswith(GROUPS)} == {torch.float32}


@pytest.mark.parametrize(
    ("capability", "bf16", "lacks", "auto"),
    [
        ((7, 5), False, {"tf32", "bf16", "fp8"}, "fp16"),
        ((8, 0), True, {"fp8"}, "bf16"),
        ((8, 6), True, {"fp8"}, "bf16"),
        ((8, 9), True, set(), "bf16"),
    ],
)
def test_a_gpu_is_refused_what_it_has_not(monkeypatch, capability, bf16, lacks, auto):
    def supported(including_emulation=True):  # torch's own answer counts what would only be emulated
        return including_emulation or bf16

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    told = {name: refusal(name, torch.device("cuda")) for name in DTYPES}
    assert {name for name, reason in told.items() if reason} == lacks
    assert all(f"GPU has no {name}" in told[name].replace("TF32", "tf32") for name in lacks)
    assert resolve_precision("auto", torch.device("cuda"))[0] == auto
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert all(refusal(name, torch.device("cuda")) for name in ("tf32", "fp8"))


@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize("precision", ["tf32", "fp8"])
def test_what_only_nvidias_gpus_have_is_refused_elsewhere(device, precision):
    with pytest.raises(UserError, match=f"train.precision={precision}: .* NVIDIA's GPUs.* and this is {device}; use "):
        resolve_precision(precision, torch.device(device))


@pytest.mark.parametrize(("rate", "chosen"), [(1.5, "bf16"), (1.2, "fp32"), (0.5, "fp32")])
def test_bf16_has_to_win_clearly_on_a_cpu_and_is_not_tried_on_a_mac(monkeypatch, rate, chosen):
    rates = {("bf16", "cpu"): rate, ("fp32", "cpu"): 1.0}
    monkeypatch.setattr(
        "genflow.training.precision.matmul_tflops", lambda precision, device: rates[precision, device.type]
    )
    assert resolve_precision("auto", torch.device("cpu"))[0] == chosen
    assert resolve_precision("auto", torch.device("mps")) == ("fp32", "auto: the default on mps")
    told = precision_report(torch.device("cpu"))
    assert told["fp32"].startswith("1.00 TFLOP/s; ") and "needs a GPU" in told["fp16"]


def test_products_are_shortened_where_asked_and_only_inside(monkeypatch):
    def now():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    before = now()
    for precision in DTYPES:
        with pytest.raises(ZeroDivisionError), float32_products(precision):
            assert now() == (("high", True) if precision == "tf32" else ("highest", False))
            raise ZeroDivisionError
        assert now() == before


def test_each_run_of_a_process_has_its_own_precision(tiny, tmp_path, monkeypatch):
    from genflow.flows.rectified import RectifiedFlow

    loss, seen = RectifiedFlow.loss, []

    def spied(self, batch, rng):
        seen.append((torch.is_autocast_enabled("cpu"), torch.backends.cudnn.allow_tf32))
        return loss(self, batch, rng)

    monkeypatch.setattr(RectifiedFlow, "loss", spied)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for name, precision in enumerate(("fp32", "bf16", "fp32")):
        train(tiny("train.steps=1", f"train.precision={precision}", f"out={tmp_path / str(name)}"))
    assert seen == [(False, False), (True, False), (False, False)] and torch.backends.cudnn.allow_tf32


def test_most_of_the_trained_linears_decide():
    trained, x = [torch.nn.Linear(2, 2) for _ in range(3)], torch.ones(1, 2)
    frozen = [torch.nn.Linear(2, 2).requires_grad_(False) for _ in range(3)]
    model = torch.nn.ModuleList([*trained, *frozen])

    def forward(in_bf16):
        for i, linear in enumerate(model):
            with torch.autocast("cpu", torch.bfloat16, enabled=i < in_bf16):
                linear(x)

    with verified(model, "bf16"):
        forward(2)
    told = r"precision=bf16 was asked, but the network's linears computed in .*float32"
    with pytest.raises(UserError, match=told), verified(model, "bf16"):
        forward(1)
