"""Measuring speed: several sides do the same work in turn; medians, ratios pair by pair, memory, and the machine's peak."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genflow.errors import UserError
from genflow.native.allocator import keep_freed_memory
from genflow.native.library import library
from genflow.registry import names, resolve

MIB = 2**20


@dataclass(frozen=True)
class Side:
    """One of those that are compared.

    tasks: what it can do, by name; answers: by the same names, the result of a task, which the sides must share; parameters:
    their number; weights: their bytes; note: anything a reader should know; error: by task, how wrong its result is.
    """

    tasks: Mapping[str, Callable[[], object]]
    answers: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    parameters: int | None = None
    weights: int = 0
    note: str = ""
    error: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(module: nn.Module, tasks: Mapping[str, Callable[[], object]], **more: Any) -> Side:
        """That of a module."""
        parameters = list(module.parameters())
        return Side(
            tasks, parameters=sum(p.numel() for p in parameters), weights=sum(p.nbytes for p in parameters), **more
        )


@dataclass(frozen=True)
class Task:
    """name: as in Side.tasks; unit, count: what one run makes, 32 images; flops, calls: of one run, where they are known.

    calls: of a network on one sample.
    """

    name: str
    unit: str
    count: int
    flops: int | None = None
    calls: int | None = None


@dataclass(frozen=True)
class Contest:
    """Sides that do the same work.

    build: a side by its name, seeded; it can be pickled. dtype: of the matrix products, whose peak is the measure. pairs:
    (ours, the peer's), whose ratio is wanted. memory: the task whose peak memory is wanted; also: sides of which nothing
    else is wanted. tolerance: by how much answers of a pair may differ, in root mean square to that of the peer's.
    """

    title: str
    sides: tuple[str, ...]
    build: Callable[[str], Side]
    tasks: tuple[Task, ...]
    dtype: torch.dtype
    pairs: tuple[tuple[str, str], ...] = ()
    memory: str | None = None
    also: tuple[str, ...] = ()
    tolerance: float = 0.05


class Ratio(NamedTuple):
    """Of two sides' seconds, pair by pair."""

    median: float
    least: float
    most: float


class MatrixPeak(NamedTuple):
    """The fastest that square matrix products ran, in TFLOP/s, their size, and the best of each size tried."""

    tflops: float
    size: int
    by_size: dict[int, float]


@dataclass(frozen=True)
class Result:
    """What a contest gave.

    seconds: by task and side, every run; memory: MiB by side; agreement: by task and peer; products: by task, TFLOP/s of
    square products in each round, of the size that was the fastest in it.
    """

    seconds: dict[str, dict[str, list[float]]]
    memory: dict[str, float]
    agreement: dict[str, dict[str, float]]
    sides: dict[str, Side]
    products: dict[str, list[float]] = field(default_factory=dict)


def measure(
    contest: Contest,
    rounds: int,
    device: torch.device,
    *,
    peak: MatrixPeak | None = None,
    say: Callable[[str], object] = lambda what: None,
) -> Result:
    """Memory first, then every task of all sides in turn. say: called with what is being done, before each piece of it.

    peak: products of its sizes take their turn beside tasks whose flops are known, for a machine's pace may change.
    Raises UserError where answers that should be one differ, or a side's process dies.
    """
    memory: dict[str, float] = {}
    for name in (*contest.sides, *contest.also) if contest.memory else ():
        say(f"memory of {name}")
        if (found := peak_memory(contest.build, name, contest.memory or "", device)) is not None:
            memory[name] = found
    sides = {}
    for name in contest.sides:
        say(f"building {name}")
        sides[name] = contest.build(name)
    agreement: dict[str, dict[str, float]] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    products: dict[str, list[float]] = {}
    for task in contest.tasks:
        for own, peer in contest.pairs:
            if task.name in sides[own].answers and task.name in sides[peer].answers:
                say(f"{task.name}: do they agree?")
                off = difference(sides[own].answers[task.name](), sides[peer].answers[task.name]())
                if not off <= contest.tolerance:
                    raise UserError(
                        f"{task.name}: {own} and {peer} give different answers (by {off:.2g} of their size, more than "
                        f"{contest.tolerance:g}), so that their times say nothing; with other settings they may agree"
                    )
                agreement.setdefault(task.name, {})[peer] = off
        runs = {name: side.tasks[task.name] for name, side in sides.items() if task.name in side.tasks}
        if peak is None or not task.flops:
            seconds[task.name] = alternate(runs, rounds, device, say=partial(_say, say, task.name))
            continue
        squares = square_products(peak, contest.dtype, device)
        sizes = {f"matrix products of {size}": run for size, (run, _) in squares.items()}
        timed = alternate({**sizes, **runs}, rounds, device, say=partial(_say, say, task.name))
        rates = [
            [flops / t / 1e12 for t in timed.pop(n)] for n, (_, flops) in zip(sizes, squares.values(), strict=True)
        ]
        products[task.name] = [max(each) for each in zip(*rates, strict=True)]
        seconds[task.name] = timed
    return Result(seconds, memory, agreement, sides, products)


def _say(say: Callable[[str], object], task: str, name: str) -> None:
    say(f"{task}: {name}")


def alternate(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warm: int = 2,
    say: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of every run, by side: all sides once, then all again; `warm` rounds before the first that counts."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(-warm, rounds):
        for name, run in runs.items():
            say(name)
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(own: Iterable[float], peer: Iterable[float]) -> Ratio:
    """How many times faster `own` is than `peer`: of each pair that ran one after the other."""
    pairs = [theirs / ours for ours, theirs in zip(own, peer, strict=True)]
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))


def difference(own: Tensor, peer: Tensor) -> float:
    """Root mean square of own - peer, over that of peer."""
    own, peer = own.detach().cpu().double(), peer.detach().cpu().double()
    return float((own - peer).square().mean().sqrt() / peer.square().mean().sqrt())


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(build: Callable[[str], Side], name: str, task: str, device: torch.device) -> float | None:
    """MiB at the peak of three runs of a side's task: weights, gradients, optimiser and activations, without libraries.

    In a new process, for a process keeps what others made it ask for. None where a device or a system does not tell. Raises
    UserError where that process dies.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and platform.system() != "Linux"):
        return None
    end_at_once = (signal.SIGINT, signal.SIG_DFL)  # of Ctrl-C this process says enough
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=signal.signal, initargs=end_at_once) as pool:
        try:
            return pool.submit(_peak_memory, build, name, task, device).result()
        except BrokenProcessPool:
            raise UserError(
                f"{name} died while its memory was measured, most likely for want of it; ask for less"
            ) from None


def _peak_memory(build: Callable[[str], Side], name: str, task: str, device: torch.device) -> float | None:
    keep_freed_memory()
    for each in names("attention"):  # what genflow loads at the first call is code, as what peers import before it
        resolve("attention", each)
    library()
    side = build(name)
    run = side.tasks[task]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        gc.collect()
        with suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # what building left behind would be taken again, unseen
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
            before = _status("VmHWM") - _status("RssFile")
        except (OSError, StopIteration):  # else the peak of building would hide as much of what follows
            return None
    for _ in range(3):
        run()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    # What was read of files meanwhile is code: of libraries that the first run loads.
    return _status("VmHWM") - _status("RssFile") - before + side.weights / MIB


def _status(name: str) -> float:
    """MiB of this process: at its most (VmHWM), or now of files (RssFile). Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def matrix_peak(dtype: torch.dtype, device: torch.device, *, seconds: float = 2.0) -> MatrixPeak:
    """The best of square matrix products of several sizes, each twice the last, for about so many seconds."""
    best: dict[int, float] = {}
    size, largest = (512, 8192) if device.type == "cpu" else (2048, 16384)
    end = time.perf_counter() + seconds
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        products = {"as stored": partial(torch.mm, a, b), "as a linear's weight": partial(torch.mm, a, b.mT)}
        one = min(t for each in alternate(products, 1, device, warm=1).values() for t in each)
        times = alternate(products, 3 + int(seconds / 16 / one), device, warm=0).values()  # many where they are short
        best[size] = 2 * size**3 / min(one, *(t for each in times for t in each)) / 1e12
        size *= 2
        if size > largest or time.perf_counter() + 8 * 10 * one > end:
            break
    size = max(best, key=lambda each: best[each])
    return MatrixPeak(best[size], size, best)


def square_products(
    peak: MatrixPeak, dtype: torch.dtype, device: torch.device, *, seconds: float = 0.1
) -> dict[int, tuple[Callable[[], object], float]]:
    """By each size that was tried for the peak: products for about so many seconds at the peak, and their operations."""

    def multiply(a: Tensor, b: Tensor, times: int) -> None:
        for _ in range(times):
            torch.mm(a, b.mT)

    found: dict[int, tuple[Callable[[], object], float]] = {}
    for size in peak.by_size:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        one = 2 * size**3
        times = max(1, round(seconds * peak.tflops * 1e12 / one))
        found[size] = partial(multiply, a, b, times), times * one
    return found


def machine(device: torch.device, *libraries: str) -> dict[str, Any]:
    """What figures hang on: the processor, the card, threads, versions, what else the machine is doing."""
    packages = {}
    for name in ("genflow", "torch", *libraries):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "?"
    packages["torch"] = torch.__version__
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "busy": _busy(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "packages": packages,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("GENFLOW_", "OMP_", "MKL_"))},
    }


def _busy() -> float | None:
    """What part of the processor's time others take, while this process waits. None where a system does not tell."""
    try:
        idle, total = _ticks()
        time.sleep(0.3)
        idle_after, total_after = _ticks()
    except OSError:
        return None
    return 1 - (idle_after - idle) / max(total_after - total, 1)


def _ticks() -> tuple[int, int]:
    """Of all cores together: idle, and all. Linux."""
    ticks = [int(number) for number in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
