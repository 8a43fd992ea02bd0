"""What only a CUDA device can show: pytest -m gpu"""

from __future__ import annotations

import json

import pytest
import torch

from genflow.config import load
from genflow.flows.store import newest_checkpoint
from genflow.layers.float8 import Float8Product
from genflow.networks.mmdit import MMDiTConfig
from genflow.registry import names, resolve, tag_of
from genflow.samplers import cfg, uniform
from genflow.training.config import RunConfig
from genflow.training.precision import refusal
from genflow.training.run import train

pytestmark = pytest.mark.gpu
SIZES = {"in_channels": 4, "context_dim": 32, "pooled_dim": 16, "sample_size": 8, "depth": 3, "hidden": 128, "heads": 2}


def test_cpu_and_cuda_agree():
    model = MMDiTConfig(**SIZES).build().double()
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    inputs = [torch.randn(2, 4, 16, 16), torch.rand(2), torch.randn(2, 5, 32), torch.randn(2, 16)]
    inputs = [x.double() for x in inputs]
    expected = model(*inputs)
    got = model.cuda()(*(x.cuda() for x in inputs)).cpu()
    assert (
        got - expected
    ).abs().max() <= 1e-4 * expected.abs().max()  # times' features are float32, of up to 1000 radians


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_training_in_short_precision(tmp_path, precision):
    if reason := refusal(precision, torch.device("cuda")):
        pytest.skip(reason)
    text = (
        "data: {name: emoji, size: 16, limit: 30}\n"
        "text: {name: learned, dim: 16, heads: 2, layers: 1, max_tokens: 24}\n"
        "model: {name: mmdit, depth: 2, hidden: 64, heads: 2, patch_size: 8}\n"
        "train: {steps: 30, batch_size: 8, warmup: 1, optimizer: {name: adamw, lr: 3e-3}, "
        f"precision: {precision}, preview_every: 0, trackers: [], log_every: 5}}\n"
    )
    (tmp_path / "c.yaml").write_text(text)
    run = train(load(tmp_path / "c.yaml", [f"out={tmp_path / 'run'}"], schema=RunConfig))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert ("loss_scale" in lines[0]) == (precision == "fp16")
    assert newest_checkpoint(run).name == "step-00000030"


def test_products_in_8_bits_are_those_of_the_cpu():
    if reason := refusal("fp8", torch.device("cuda")):
        pytest.skip(reason)
    x, w, g = torch.randn(40, 64), torch.randn(48, 64), torch.randn(40, 48)
    found = {}
    for device in ("cpu", "cuda"):
        leaves = [a.to(device, copy=True).requires_grad_() for a in (x, w)]
        y = Float8Product.apply(*leaves)
        y.backward(g.to(device, y.dtype))
        found[device] = [a.detach().float().cpu() for a in (y, leaves[0].grad, leaves[1].grad)]
    for cpu, cuda in zip(found["cpu"], found["cuda"], strict=True):
        assert (cpu - cuda).norm() < 0.02 * cpu.norm()


ODE = [name for name in names("sampler") if tag_of(resolve("sampler", name)).metadata["family"] == "ode"]


@pytest.mark.parametrize("name", ODE)
def test_a_fixed_step_never_waits_for_the_device(name):
    cond, uncond = torch.ones(4, 1, device="cuda"), torch.zeros(1, 1, device="cuda")
    velocity = cfg(lambda x, t, c: x * t[:, None] + c, (cond,), (uncond,), 2.0, interval=(0.2, 0.8))
    x = torch.randn(4, 3, device="cuda")
    solve = resolve("sampler", name)
    expected = solve(velocity, x, uniform(12)).x
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = solve(velocity, x, uniform(12)).x
        plain = solve(lambda x, t: x * t[:, None], x, uniform(12)).x
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected) and plain.isfinite().all()
