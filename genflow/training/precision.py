"""Which arithmetic a run uses: what was asked is what runs, or it is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genflow.errors import UserError
from genflow.layers.float8 import product
from genflow.layers.modulation import Linear
from genflow.networks.couplers import ConvNet

# What weights and pictures meet in inside of products; weights, optimiser and averages are float32 in all of them.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES["fp8"] = torch.bfloat16  # what such products give, and the rest of the network is in
PATIENCE = 0.25  # seconds for one product whose rate is measured
WHAT = {
    "fp32": "float32 products, not shortened",
    "tf32": "float32 whose products take 10 bits of each factor",
    "bf16": "products in bfloat16",
    "fp16": "products in float16, with a loss scale that follows overflows",
    "fp8": "products of transformer blocks in 8 bits, the rest in bfloat16",
}


def refusal(precision: str, device: torch.device) -> str | None:
    """Why the device cannot train in this precision, or None."""
    cuda = device.type == "cuda"
    if precision == "fp16" and device.type == "cpu":
        return "fp16 training needs a GPU: on a CPU accelerate would silently run fp32; use bf16 or fp32"
    if precision == "tf32" and not cuda:
        return f"TF32 is arithmetic of NVIDIA's GPUs, and this is {device.type}; use fp32"
    if precision == "tf32" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return f"{torch.cuda.get_device_name(device)} has no TF32 arithmetic; use fp32"
    if precision == "fp8" and (not cuda or torch.version.hip):
        return f"fp8 is arithmetic of NVIDIA's GPUs from compute capability 8.9 on, and this is {device.type}; use bf16"
    if precision == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has no fp8 arithmetic; use bf16"
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic; use fp16 or fp32"
    return None


def resolve_precision(asked: str, device: torch.device) -> tuple[Any, str]:
    """The precision to run and why. "auto": bf16 on a GPU that has it, else fp16; on a CPU the faster of bf16 and fp32.

    Raises UserError where the device cannot do what was asked.
    """
    if asked != "auto":
        if reason := refusal(asked, device):
            raise UserError(f"train.precision={asked}: {reason}")
        return asked, "as asked"
    if device.type == "cuda":
        return ("fp16", "auto: the GPU has no bf16") if refusal("bf16", device) else ("bf16", "auto: the GPU has bf16")
    if device.type != "cpu":
        return "fp32", f"auto: the default on {device.type}"
    rate = {name: matmul_tflops(name, device) for name in ("bf16", "fp32")}
    # bf16 must pay for its casts, so it has to win clearly.
    best = "bf16" if rate["bf16"] > 1.3 * rate["fp32"] else "fp32"
    return best, f"auto: matrix products run at {rate['bf16']:.2f} TFLOP/s in bf16, {rate['fp32']:.2f} in fp32 here"


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside, products of float32 matrices are TF32 where that was asked, and float32 in full where not.

    torch itself takes TF32 for convolutions unless told otherwise. What was set before holds again after.
    """
    # Not torch.backends.*.fp32_precision: torch's compiler reads these (2.14), and refuses a mixture.
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    short = precision == "tf32"
    try:
        torch.set_float32_matmul_precision("high" if short else "highest")
        torch.backends.cudnn.allow_tf32 = short
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def matmul_tflops(precision: str, device: torch.device) -> float:
    """Best of a few products of square matrices on the device, in TFLOP/s: small ones, where large ones would take long."""
    size = 1024 if device.type == "cpu" else 8192
    with float32_products(precision):
        if device.type == "cpu" and 64 * _product_seconds(256, precision, device) > PATIENCE:
            size = 256  # such as of bf16, on a processor that has none
        return 2 * size**3 / _product_seconds(size, precision, device) / 1e12


def _product_seconds(size: int, precision: str, device: torch.device) -> float:
    """The least of a few."""
    a, b = (torch.ones(size, size, dtype=DTYPES[precision], device=device) for _ in range(2))
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.mm
    if precision == "fp8":
        a, b, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
        multiply = partial(product, a_scale=one, b_scale=one, fast=True)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(a, b)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def precision_report(device: torch.device) -> dict[str, str]:
    """For each precision: how fast the device multiplies matrices in it, or why it cannot train in it."""
    return {
        name: refusal(name, device) or f"{matmul_tflops(name, device):.2f} TFLOP/s; {what}"
        for name, what in WHAT.items()
    }


@contextmanager
def verified(model: nn.Module, precision: str) -> Iterator[None]:
    """Watch the trained linears inside one forward: raises UserError unless most of them computed in `precision`."""
    seen: list[torch.dtype] = []
    # Hooks inside a compiled block would make it compile twice.
    compiled = {m for block in model.modules() if block._compiled_call_impl is not None for m in block.modules()}
    trained = [
        module
        for module in model.modules()
        if type(module) in (nn.Linear, Linear, nn.Conv2d, ConvNet) and any(p.requires_grad for p in module.parameters())
    ]
    watched = [module for module in trained if module not in compiled]
    hooks = [module.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype)) for module in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    wrong = [dtype for dtype in seen if dtype != DTYPES[precision]]
    if not seen and len(watched) == len(trained) and DTYPES[precision] != torch.float32:
        raise UserError(f"train.precision={precision} was asked, but nothing in this network computes in it; take fp32")
    if len(wrong) > len(seen) / 2:
        raise UserError(f"train.precision={precision} was asked, but the network's linears computed in {set(wrong)}")
