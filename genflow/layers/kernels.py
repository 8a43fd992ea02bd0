"""Fused CPU kernels (*kernels.cpp), compiled with the machine's own C++ compiler the first time they are wanted.

On other devices, in float64, under torch.compile, or where there is no compiler, callers take the plain formula instead;
the answers are the same up to rounding. GENFLOW_KERNELS=0 in the environment keeps them off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genflow.cachedir import cache_folder

SOURCES = [Path(__file__).with_name(name) for name in ("kernels.cpp", "flow_kernels.cpp", "kernels.h")]
# Sums may be reordered, so that they vectorise; NaN and inf keep their meaning.
FLAGS = "-O3 -march=native -fopenmp -fPIC -shared -std=c++17 -fno-math-errno -fno-trapping-math -fno-signed-zeros"
FLAGS += " -fassociative-math -freciprocal-math"
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += " -mprefer-vector-width=512"
SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, said once, where they cannot be had."""
    if os.environ.get("GENFLOW_KERNELS") == "0" or platform.system() != "Linux":
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        warnings.warn("no C++ compiler found: CPU training runs without the fused kernels, slower", stacklevel=2)
        return None
    # Built for this processor: a cache folder may be shared between machines.
    features = hashlib.sha256(Path("/proc/cpuinfo").read_bytes().partition(b"flags")[2].partition(b"\n")[0]).digest()
    source = b"".join(path.read_bytes() for path in SOURCES)
    key = hashlib.sha256(source + FLAGS.encode() + compiler.encode() + features).hexdigest()[:16]
    path = cache_folder() / "kernels" / f"{key}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = Path(folder) / path.name
                command = [*compiler.split(), *FLAGS.split(), *map(str, SOURCES[:-1]), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
                os.replace(built, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())[:200]
        warnings.warn(f"the fused CPU kernels cannot be built, going on slower without them: {reason}", stacklevel=2)
        return None


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can serve a call on these activations."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in SUFFIX
        and all(t.dtype == first.dtype for t in tensors)
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != first.dtype)
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.peek_interpreter_stack()  # vmap, jvp and their like
        and library() is not None
    )


class _Forgotten:
    """Stands in for autograd's context where nothing is kept."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(...), without autograd's bookkeeping where no gradient can be asked for."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return function.apply(*arguments)
    return function.forward(_Forgotten(), *arguments)


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    converted = [
        ctypes.c_void_p(a.data_ptr())
        if isinstance(a, Tensor)
        else ctypes.c_float(a)
        if isinstance(a, float)
        else ctypes.c_long(a)
        for a in arguments
    ]
    lib = library()
    assert lib is not None
    function = getattr(lib, name + SUFFIX[dtype])  # kept by lib, where lib[name] would look it up anew
    function.restype = None
    function(*converted)


def _rows(vector: Tensor) -> tuple[Tensor, int]:
    """B x 1 x H with a contiguous last axis, and its stride over B."""
    vector = vector if vector.stride(-1) == 1 else vector.contiguous()
    return vector, vector.stride(0)


def as_float(parameter: Tensor) -> Tensor:
    return parameter.detach().float().contiguous()


def again(
    plain: Callable[..., Any], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated themselves, through the plain formula: for double backward."""
    outputs = plain(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)


class ModulatedNorm(torch.autograd.Function):
    """(1 + scale) LN(x) + shift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float, plain: Callable) -> Tensor:
        x = x.contiguous()
        (shift, stride), (scale, scale_stride) = _rows(shift), _rows(scale)
        if stride != scale_stride:
            shift, scale, stride = shift.contiguous(), scale.contiguous(), x.shape[-1]
        B, L, H = x.shape
        y, mean, rstd = (
            torch.empty_like(x),
            x.new_empty(B, L, dtype=torch.float32),
            x.new_empty(B, L, dtype=torch.float32),
        )
        call("norm_forward", x.dtype, x, shift, scale, stride, y, mean, rstd, B, L, H, eps)
        ctx.save_for_backward(x, shift, scale, mean, rstd)
        ctx.plain = plain
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        x, shift, scale, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *again(ctx.plain, (x, shift, scale), (g,)), None, None
        B, L, H = x.shape
        dx, dshift, dscale = torch.empty_like(x), x.new_empty(B, 1, H), x.new_empty(B, 1, H)
        stride = _rows(scale)[1]
        call("norm_backward", x.dtype, g.contiguous(), x, scale, stride, mean, rstd, dx, dshift, dscale, B, L, H)
        return dx, dshift, dscale, None, None


class GatedResidual(torch.autograd.Function):
    """x + gate (y + bias)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor, bias: Tensor, plain: Callable) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        gate, stride = _rows(gate)
        out = torch.empty_like(x)
        call("gate_forward", x.dtype, x, gate, stride, y, as_float(bias), out, *x.shape)
        ctx.save_for_backward(gate, y, bias)
        ctx.plain = plain
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        gate, y, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            more = again(lambda *inputs: ctx.plain(torch.zeros_like(y), *inputs), (gate, y, bias), (g,))
            return g, *more, None
        g = g.contiguous()
        dy, dgate = torch.empty_like(y), torch.empty_like(gate, memory_format=torch.contiguous_format)
        dbias = torch.empty(len(y), len(bias))
        call("gate_backward", y.dtype, g, gate, _rows(gate)[1], y, as_float(bias), dy, dgate, dbias, *y.shape)
        return g, dgate, dy, dbias.sum(0).to(bias.dtype), None


class GELU(torch.autograd.Function):
    """GELU of x + bias, tanh form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, plain: Callable) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        call("gelu_forward", x.dtype, x, as_float(bias), y, x.shape[0] * x.shape[1], x.shape[2])
        ctx.save_for_backward(x, bias)
        ctx.plain = plain
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        x, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *again(ctx.plain, (x, bias), (g,)), None
        dx, dbias = torch.empty_like(x), torch.zeros(len(x), len(bias))
        call("gelu_backward", x.dtype, g.contiguous(), x, as_float(bias), dx, dbias, *x.shape)
        return dx, dbias.sum(0).to(bias.dtype), None


class JointHeads(torch.autograd.Function):
    """The q, k, v of several streams, normed per head, side by side in one sequence: each B x heads x L x D.

    tensors: the n streams, B x L x 3 hidden; then for each its bias, and its q and k norm weights, which are empty where
    there is no norm.
    """

    @staticmethod
    def forward(ctx: Any, heads: int, eps: float, plain: Callable, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = len(tensors) // 4
        streams = [t.contiguous() for t in tensors[:n]]
        weights = [as_float(w) for w in tensors[n:]]
        first = streams[0]
        B, D, J = first.shape[0], first.shape[2] // (3 * heads), sum(s.shape[1] for s in streams)
        q, k, v = (first.new_empty(B, heads, J, D) for _ in range(3))
        scales, at = [], 0
        for i, stream in enumerate(streams):
            bias, wq, wk = weights[3 * i : 3 * i + 3]
            L = stream.shape[1]
            rq, rk = (stream.new_empty(B, L, heads, dtype=torch.float32) for _ in range(2))
            normed = int(wq.numel() > 0)
            call(
                "heads_forward", first.dtype, stream, bias, wq, wk, q, k, v, rq, rk, B, L, heads, D, J, at, eps, normed
            )
            scales += [rq, rk]
            at += L
        ctx.save_for_backward(*streams, *tensors[n:], *scales)
        ctx.heads, ctx.plain, ctx.n = heads, plain, n
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:  # type: ignore[override]
        n, heads, saved = ctx.n, ctx.heads, ctx.saved_tensors
        streams, originals, scales = saved[:n], saved[n : 4 * n], saved[4 * n :]
        if torch.is_grad_enabled():
            return None, None, None, *again(ctx.plain, saved[: 4 * n], grads)
        dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in grads)
        strides = (ctypes.c_long * 9)(*(s for g in (dq, dk, dv) for s in g.stride()[:3]))
        address = ctypes.addressof(strides)
        out_streams, out_weights, at = [], [], 0
        for i, stream in enumerate(streams):
            own = originals[3 * i : 3 * i + 3]
            bias, wq, wk = (as_float(w) for w in own)
            B, L, D = stream.shape[0], stream.shape[1], dq.shape[-1]
            dx = torch.empty_like(stream)
            dbias, dwq, dwk = (torch.zeros(B, w.numel()) for w in own)
            rq, rk = scales[2 * i], scales[2 * i + 1]
            normed = int(wq.numel() > 0)
            call(
                "heads_backward", stream.dtype, dq, dk, dv, address, stream, bias, wq, wk, rq, rk, dx,
                dbias, dwq, dwk, B, L, heads, D, at, normed,
            )  # fmt: skip
            out_streams.append(dx)
            out_weights += [d.sum(0).to(w.dtype) for d, w in zip((dbias, dwq, dwk), own, strict=True)]
            at += L
        return None, None, None, *out_streams, *out_weights
