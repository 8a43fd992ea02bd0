"""Which arithmetic a run uses: what was asked is what runs, or it is refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from genflow.errors import UserError
from genflow.layers.modulation import Linear
from genflow.networks.couplers import ConvNet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def refusal(precision: str, device: torch.device) -> str | None:
    """Why the device cannot train in this precision, or None."""
    if precision == "fp16" and device.type == "cpu":
        return "fp16 training needs a GPU: on a CPU accelerate would silently run fp32; use bf16 or fp32"
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        return f"{name} has no bf16 arithmetic; use fp16 or fp32"
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
    rate = {name: matmul_tflops(DTYPES[name]) for name in ("bf16", "fp32")}
    # bf16 must pay for its casts, so it has to win clearly.
    best = "bf16" if rate["bf16"] > 1.3 * rate["fp32"] else "fp32"
    return best, f"auto: matrix products run at {rate['bf16']:.2f} TFLOP/s in bf16, {rate['fp32']:.2f} in fp32 here"


def matmul_tflops(dtype: torch.dtype, size: int = 1024) -> float:
    """Best of a few size^3 matrix products on this CPU, in TFLOP/s."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12


@contextmanager
def verified(model: nn.Module, precision: str) -> Iterator[None]:
    """Watch the linears inside one forward: raises UserError unless most of them computed in `precision`."""
    seen: list[torch.dtype] = []
    # Hooks inside a compiled block would make it compile twice.
    compiled = {m for block in model.modules() if block._compiled_call_impl is not None for m in block.modules()}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        for module in model.modules()
        if type(module) in (nn.Linear, Linear, nn.Conv2d, ConvNet) and module not in compiled
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    wrong = [dtype for dtype in seen if dtype != DTYPES[precision]]
    if not seen and precision != "fp32":
        raise UserError(f"train.precision={precision} was asked, but nothing in this network computes in it; take fp32")
    if len(wrong) > len(seen) / 2:
        raise UserError(f"train.precision={precision} was asked, but the network's linears computed in {set(wrong)}")
