"""Fused CPU kernels (*.cpp), compiled with the machine's own C++ compiler the first time they are wanted.

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
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genflow.cachedir import cache_folder

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
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
                command = [
                    *compiler.split(),
                    *FLAGS.split(),
                    *(str(path) for path in SOURCES if path.suffix == ".cpp"),
                    "-o",
                    str(built),
                ]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
                os.replace(built, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())[:200]
        warnings.warn(f"the fused CPU kernels cannot be built, going on slower without them: {reason}", stacklevel=2)
        return None


@cache
def matrix_units() -> bool:
    """Whether this processor has matrix units for bf16 (AMX), and the kernels that use them could be built."""
    lib = library()
    return lib is not None and bool(lib.matrix_units())


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


class Forgotten:
    """Stands in for autograd's context where nothing is kept."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(...), without autograd's bookkeeping where no gradient can be asked for."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return function.apply(*arguments)
    return function.forward(Forgotten(), *arguments)


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
