"""Fused CPU kernels (*.cpp), compiled with the machine's own C++ compiler the first time they are wanted.

On other devices, in float64, or where there is no compiler, callers take the plain formula instead; the answers are the
same up to rounding. To torch.compile each is an operator of its own. GENFLOW_KERNELS=0 in the environment keeps them off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from genflow.cachedir import cache_folder

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
# Sums may be reordered, so that they vectorise; NaN and inf keep their meaning.
FLAGS = "-O3 -march=native -fopenmp -fPIC -shared -std=c++17 -fno-math-errno -fno-trapping-math -fno-signed-zeros"
FLAGS += " -fassociative-math -freciprocal-math"
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += " -mprefer-vector-width=512"
END = b"genflow's kernels end here"  # a library cut short, which lacks it, would end the process that loads it
SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}
OPERATORS = torch.library.Library("genflow", "FRAGMENT")
P = ParamSpec("P")
R = TypeVar("R")


def assume_constant(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.assume_constant_result, which would import the compiler: a second at every start."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.disable, once there is a compiler: to ask for it imports it, a second at every start."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return run(*args, **kwargs)

    return call


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, said once, where they cannot be had."""
    if os.environ.get("GENFLOW_KERNELS") == "0" or platform.system() != "Linux":
        return None
    try:
        here = [each for name in ("g++", "clang++") if (each := shutil.which(name))]
        compiler = shlex.split(os.environ.get("CXX", "")) or here[:1]
        if not compiler:
            warnings.warn("no C++ compiler found: CPU training runs without the fused kernels, slower", stacklevel=2)
            return None
        source = b"".join(path.read_bytes() for path in SOURCES)
        key = hashlib.sha256(source + FLAGS.encode() + shlex.join(compiler).encode() + _processor()).hexdigest()[:16]
        path = cache_folder() / "kernels" / f"{key}.so"
        with suppress(OSError):  # none is there yet, or a damaged one
            return _load(path)
        _build(compiler, path)
        return _load(path)
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: of CXX's quotes, of no home
        if isinstance(error, subprocess.SubprocessError):
            error.cmd = compiler[0]  # type: ignore[attr-defined]  # whose flags would fill the line
        told = isinstance(error, subprocess.CalledProcessError) and error.stderr.decode(errors="replace")
        reason = " ".join((told or str(error)).split())[:200]
        warnings.warn(f"the fused CPU kernels cannot be built, going on slower without them: {reason}", stacklevel=2)
        return None


def _load(path: Path) -> ctypes.CDLL:
    with path.open("rb") as file:
        file.seek(-len(END), os.SEEK_END)
        if file.read() != END:
            raise OSError(f"{path} is cut short")
    return ctypes.CDLL(str(path))


def _processor() -> bytes:
    """What code built here is for: a cache folder may be shared between machines."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    features = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")  # of x86, of ARM
    return platform.machine().encode() + features


def _build(compiler: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        sources = [str(path) for path in SOURCES if path.suffix == ".cpp"]
        command = [*compiler, *FLAGS.split(), *sources, "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        with built.open("ab") as file:
            file.write(END)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine may leave the name on an unfinished file
        os.replace(built, path)


@assume_constant
def matrix_units() -> bool:
    """Whether this processor multiplies bf16, on matrix units (AMX) or vectors (AVX-512 BF16), by kernels that are built."""
    lib = library()
    return lib is not None and bool(lib.matrix_units())


@assume_constant
def transformed() -> bool:
    """Whether one of torch.func's transforms is on: vmap, grad, jvp and their like."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@assume_constant
def untransformed() -> bool:
    """Whether tensors are numbers in memory here, now: no vmap, jvp and their like, trace, fake mode or export is on."""
    return (
        not transformed()
        and (torch._C._len_torch_dispatch_stack() == 0 or torch.compiler.is_compiling())
        and not torch.jit.is_tracing()
        and not torch.compiler.is_exporting()
    )


@assume_constant
def _at_hand() -> bool:
    return untransformed() and library() is not None


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can serve a call on these activations."""
    first = tensors[0]
    return (
        first.is_cpu
        and first.dtype in SUFFIX
        and all(t.dtype == first.dtype for t in tensors)
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != first.dtype)
        and _at_hand()
    )


def by_formula(*grads: Tensor) -> bool:
    """Whether a backward is to go by the plain formula: for double backward, and of many cotangents at once."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return not untransformed() or any(map(torch._C._functorch.is_legacy_batchedtensor, grads))


class Forgotten:
    """Stands in for autograd's context where nothing is kept."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(...), without autograd's bookkeeping where no gradient can be asked for."""
    if torch.compiler.is_compiling():  # of views, as the compiler takes no tensor twice
        return function.apply(*(a.view_as(a) if isinstance(a, Tensor) else a for a in arguments))
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return function.apply(*arguments)
    return function.forward(Forgotten(), *arguments)


def operator(kernel: Callable[P, R]) -> Callable[P, R]:
    """The function, which torch.compile takes for one operator, genflow::NAME, that it does not look into.

    Its parameters are annotated, and the tensors that it returns are new. Their shapes the compiler learns from the same
    code, where `call` does nothing. Eager calls pass by torch.library, which would cost them tens of microseconds.
    """
    name = kernel.__name__
    OPERATORS.define(name + torch.library.infer_schema(kernel, mutates_args=()))
    OPERATORS.impl(name, kernel, "CPU")
    torch.library.register_fake(f"genflow::{name}", kernel, lib=OPERATORS)
    opaque = getattr(torch.ops.genflow, name)

    @wraps(kernel)
    def chosen(*arguments: P.args, **options: P.kwargs) -> R:
        return (opaque if torch.compiler.is_compiling() else kernel)(*arguments, **options)

    return chosen


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Run the kernel of this name for numbers of dtype.

    arguments: tensors or None, lists of tensors, numbers, tuples of integers.
    """
    if any(type(a) is FakeTensor or (type(a) is list and FakeTensor in map(type, a)) for a in arguments):
        return
    converted = [
        ctypes.c_long(a)
        if isinstance(a, int)
        else ctypes.c_float(a)
        if isinstance(a, float)
        else (ctypes.c_long * len(a))(*a)
        if isinstance(a, tuple)
        else (ctypes.c_void_p * len(a))(*(t.data_ptr() for t in a))
        if isinstance(a, list)
        else ctypes.c_void_p(None if a is None else a.data_ptr())
        for a in arguments
    ]
    lib = library()
    assert lib is not None
    function = getattr(lib, name + SUFFIX[dtype])  # kept by lib, where lib[name] would look it up anew
    function.restype = None
    function(*converted)
