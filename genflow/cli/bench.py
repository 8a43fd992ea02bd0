"""genflow bench WHAT"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genflow.errors import UserError

if TYPE_CHECKING:
    import torch

    from genflow.evaluation.bench import Contest, MatrixPeak, Result, Task

WHAT = {
    "train": "a training step of an MM-DiT: forward, backward and fused AdamW",
    "sample": "pictures from an MM-DiT with random weights",
    "attention": "every attention backend that can serve one call, and why the others cannot",
    "flows": "training, likelihood and sampling of Glow and of a neural spline flow",
}
ROUNDS = {"train": 7, "sample": 5, "attention": 15, "flows": 7}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    every = parser.add_subparsers(dest="what", required=True, metavar="WHAT", help=f"one of: {', '.join(WHAT)}")
    parsers = {what: every.add_parser(what, help=text, description=text) for what, text in WHAT.items()}
    for what in ("train", "sample"):
        of = parsers[what].add_argument_group("the network and its work")
        of.add_argument("--depth", type=_count, default=8, metavar="N", help="blocks (8)")
        of.add_argument("--width", type=_count, default=256, metavar="N", help="(256)")
        of.add_argument("--heads", type=_count, default=4, metavar="N", help="of attention (4)")
        of.add_argument("--tokens", type=_count, default=256, metavar="N", help="of the picture, a square (256)")
        of.add_argument("--text", type=_count, default=16, metavar="N", help="tokens of text (16)")
        batch = 32 if what == "train" else 8
        of.add_argument("--batch", type=_count, default=batch, metavar="N", help=f"pictures at once ({batch})")
        kinds = {"train": ["bf16", "fp8", "fp32"], "sample": ["bf16", "fp32"]}[what]
        of.add_argument("--precision", choices=kinds, default="bf16", help="(bf16)")
        of.add_argument(
            "--compile",
            nargs="?",
            const="both",
            choices=["both", "genflow", "peer"],
            help="torch.compile each block, on both sides or on one; a minute more",
        )
        of.add_argument("--graphs", action="store_true", help="genflow's network as CUDA graphs")
        if what == "train":
            of.add_argument(
                "--checkpointing", action="store_true", help="each block again in the backward, on both sides"
            )
        else:
            of.add_argument("--steps", type=_count, default=10, metavar="N", help="(10)")
            of.add_argument("--guidance", type=float, default=4.0, help="1 = none (4)")
            of.add_argument("--sampler", default="euler", metavar="NAME", help="see: genflow info sampler (euler)")
            of.add_argument("--option", nargs="+", metavar="KEY=VALUE", help="of the sampler, see: genflow info NAME")
    call = parsers["attention"].add_argument_group("the call")
    for name, number, text in (
        ("batch", 32, "samples"),
        ("heads", 4, "of each"),
        ("lq", 272, "queries of a head"),
        ("lk", None, "keys of a head"),
        ("head-dim", 64, "numbers in each of these"),
    ):
        text = f"{text} ({number or 'as many as queries'})"
        call.add_argument(f"--{name}", type=_count, default=number, metavar="N", help=text)
    call.add_argument("--precision", choices=["bf16", "fp16", "fp32"], default="bf16", help="(bf16)")
    call.add_argument(
        "--mask", default="none", metavar="KIND", help="see: genflow info Mask; several: causal+keys (none)"
    )
    call.add_argument(
        "--backend", nargs="+", metavar="NAME", help="these alone, see: genflow info attention (all that can)"
    )
    model = parsers["flows"].add_argument_group("the model")
    model.add_argument("--model", choices=["glow", "nsf"], help="one alone (both, or those that the peer has)")
    for name, text in (
        ("batch", "samples at once (32 of glow, 1024 of nsf)"),
        ("steps", "of each level, or couplings (8, 4)"),
        ("hidden", "width of the networks (128, 256)"),
        ("levels", "of glow (3)"),
        ("size", "of glow's pictures, a side (32)"),
    ):
        model.add_argument(f"--{name}", type=_count, metavar="N", help=text)
    for what, each in parsers.items():
        how = each.add_argument_group("how it is measured")
        if what != "attention":
            peers = "normflows (Glow), zuko (NSF)" if what == "flows" else "diffusers"
            how.add_argument("--against", metavar="PEER", help=f"time this library in turn: {peers}")
        how.add_argument("--rounds", type=_count, default=ROUNDS[what], metavar="N", help=f"({ROUNDS[what]})")
        how.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
        how.add_argument("--json", metavar="FILE", help="keep everything: machine, settings, every timing")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def run(args: argparse.Namespace) -> int:
    out = None if args.json is None else _writable(Path(args.json))

    from genflow.cli import bench_attention, bench_flows, bench_mmdit
    from genflow.evaluation.bench import machine, matrix_peak, measure
    from genflow.training.precision import float32_products

    args.device = _device(args)
    about = machine(args.device, *filter(None, [getattr(args, "against", None)]))
    print(_headline(about), flush=True)
    refused: dict[str, str] = {}
    if args.what == "attention":
        args.lk = args.lk or args.lq
        contests, refused = bench_attention.attending(args)
    else:
        make = {"train": bench_mmdit.training, "sample": bench_mmdit.sampling, "flows": bench_flows.flowing}
        contests = make[args.what](args)
    settings = {**vars(args), "device": str(args.device)}
    kept: dict[str, Any] = {"what": args.what, "settings": settings, "machine": about, "contests": []}
    for contest in contests:
        print(f"\n{contest.title}", flush=True)
        with _Progress(contest, args.rounds) as progress, float32_products("fp32"):
            progress.say("matrix products")
            counted = sum(task.flops is not None for task in contest.tasks)
            peak = matrix_peak(contest.dtype, args.device) if counted else None
            if peak is not None:
                progress.more(counted * len(peak.by_size) * (args.rounds + 2))
            result = measure(contest, args.rounds, args.device, peak=peak, say=progress.say)
            if peak is not None:  # again, for what disturbs a machine comes and goes
                progress.say("matrix products")
                peak = max(peak, matrix_peak(contest.dtype, args.device))
        _report(contest, result, peak)
        kept["contests"].append(_kept(contest, result, peak))
    if refused:
        print("\nwhat cannot serve")
        for name, reason in refused.items():
            print(f"  {name:22}{reason}")
        kept["refused"] = refused
    if out is not None:
        from genflow.data.pictures import write_atomic

        write_atomic(out, lambda file: file.write(json.dumps(kept, indent=1).encode() + b"\n"))
        print(f"\neverything is in {out}")
    return 0


def _device(args: argparse.Namespace) -> torch.device:
    """The device asked for, or the best there is. Raises UserError where it, or the precision on it, cannot be had."""
    import torch

    from genflow.training.precision import refusal

    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(args.device) if args.device else best
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        words = str(error).partition("\n")[0]
        raise UserError(
            f"--device {args.device}: {words.rstrip('.')}; here {best.type} is the best there is"
        ) from error
    if device.type == "meta":
        raise UserError(f"--device meta computes nothing; here {best.type} is the best there is")
    asked = getattr(args, "precision", "fp32")
    if args.what != "attention" and (reason := refusal(asked, device)):
        raise UserError(f"--precision {asked}: {reason}")
    return device


def _writable(path: Path) -> Path:
    """Raises UserError where the file cannot be written: said before the measuring, not after."""
    if path.is_dir():
        raise UserError(f"--json {path} is a folder; name a file, such as {path / 'bench.json'}")
    if path.exists() and not path.is_file():
        raise UserError(f"--json {path} is no regular file; name another")
    path = path.resolve()
    there = next(each for each in path.parents if os.path.exists(each))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--json {path}: nothing can be written in {there}; name another file")
    return path


class _Progress:
    """A bar over every piece of a contest, on a terminal."""

    def __init__(self, contest: Contest, rounds: int) -> None:
        from tqdm import tqdm

        runs = len(contest.tasks) * (len(contest.sides) * (rounds + 2) + len(contest.pairs))
        pieces = 2 + runs + len(contest.sides) * (2 if contest.memory else 1) + len(contest.also)
        self.bar = tqdm(total=pieces, unit="run", dynamic_ncols=True, leave=False, disable=None, file=sys.stderr)

    def __enter__(self) -> _Progress:
        return self

    def more(self, pieces: int) -> None:
        self.bar.total = (self.bar.total or 0) + pieces

    def say(self, what: str) -> None:
        self.bar.set_description(what)
        self.bar.update(1)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _headline(about: dict[str, Any]) -> str:
    where = f"{about['threads']} threads of {about['processor']} ({about['capability']})"
    if about["device"] != "cpu":
        where = about["device"]
    packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items())
    note = ""
    if about["busy"] is not None and about["busy"] > 0.1:
        note = f"\nother programs take {about['busy']:.0%} of the processor: ratios say more than rates"
    return f"{where}; {packages}{note}"


def _report(contest: Contest, result: Result, peak: MatrixPeak | None) -> None:
    """A table for each task: rates, what part of the peak they reach, memory, errors; then the ratios."""
    from genflow.evaluation.bench import ratio

    dtype = str(contest.dtype)[6:]
    if peak is not None:
        print(
            f"peak of matrix products in {dtype}: {peak.tflops:.2f} TFLOP/s ({peak.size} x {peak.size}); "
            "in turn: of what they reach in the same rounds"
        )
    for name, side in result.sides.items():
        if side.note or len({each.parameters for each in result.sides.values()}) > 1:
            print(f"  {name:24}{side.parameters:,} parameters{', ' * bool(side.note)}{side.note}")
    for task in contest.tasks:
        rows = {name: _row(contest, task, result, peak, name) for name in result.seconds[task.name]}
        print(f"{task.name:26}" + "".join(f"{head:>11}" for head in next(iter(rows.values()))))
        for name, row in rows.items():
            print(f"  {name:24}" + "".join(f"{cell:>11}" for cell in row.values()))
        for own, peer in contest.pairs:
            times = result.seconds[task.name]
            r = ratio(times[own], times[peer])
            words = f"  {own} / {peer}: {r.median:.2f} (pair by pair {r.least:.2f} to {r.most:.2f})"
            if task.name == contest.memory and own in result.memory:
                words += f"; memory {result.memory[own] / result.memory[peer]:.2f}"
            if (off := result.agreement.get(task.name, {}).get(peer)) is not None:
                words += f"; answers differ by {off:.1e}"
            print(words)
    _report_memory(contest, result)


def _row(contest: Contest, task: Task, result: Result, peak: MatrixPeak | None, name: str) -> dict[str, str]:
    """What one side did, by the heads of a table's columns."""
    side, seconds = result.sides[name], statistics.median(result.seconds[task.name][name])
    row = {f"{task.unit}/s": f"{task.count / seconds:.1f}", "ms": f"{1000 * seconds:.1f}"}
    if task.calls:
        row["calls/s"] = f"{task.calls / seconds:.1f}"
    if task.flops and peak is not None:
        rate = task.flops / seconds / 1e12
        row |= {"TFLOP/s": f"{rate:.3f}", "of peak": f"{rate / peak.tflops:.0%}"}
        row["in turn"] = f"{_of_products(result, task, name):.0%}"
    if task.name == contest.memory:
        row["peak MiB"] = f"{result.memory[name]:.0f}" if name in result.memory else "-"
    if task.name in side.error:
        row["error"] = f"{side.error[task.name]:.1e}"
    return row


def _of_products(result: Result, task: Task, name: str) -> float:
    """A side's operations a second, of those of square products in the same round: the median of all rounds."""
    assert task.flops
    rounds = zip(result.seconds[task.name][name], result.products[task.name], strict=True)
    return statistics.median(task.flops / seconds / 1e12 / products for seconds, products in rounds)


def _report_memory(contest: Contest, result: Result) -> None:
    """Of the sides whose memory alone was wanted, each beside every side that ran."""
    for name in contest.also:
        if name in result.memory:
            beside = (f"{side} takes {result.memory[side] / result.memory[name]:.2f} of it" for side in contest.sides)
            print(f"  memory of {name}: {result.memory[name]:.0f} MiB; {', '.join(beside)}")


def _kept(contest: Contest, result: Result, peak: MatrixPeak | None) -> dict[str, Any]:
    """Everything that a contest gave, for JSON."""
    from genflow.evaluation.bench import ratio

    tasks = {}
    for task in contest.tasks:
        times = result.seconds[task.name]
        tasks[task.name] = {
            "unit": task.unit,
            "count": task.count,
            "flops": task.flops,
            "calls": task.calls,
            "seconds": times,
            "products_tflops": result.products.get(task.name, []),
            "rate": {name: task.count / statistics.median(each) for name, each in times.items()},
            "ratios": {f"{a} / {b}": ratio(times[a], times[b])._asdict() for a, b in contest.pairs},
            "agreement": result.agreement.get(task.name, {}),
        }
    return {
        "title": contest.title,
        "peak": None if peak is None else {"dtype": str(contest.dtype)[6:], **peak._asdict()},
        "sides": {
            name: {
                "parameters": side.parameters,
                "note": side.note,
                "error": {k: _number(v) for k, v in side.error.items()},
            }
            for name, side in result.sides.items()
        },
        "tasks": tasks,
        "memory_mib": result.memory,
    }


def _number(x: float) -> float | None:
    """As JSON has them, which knows neither NaN nor infinity."""
    return x if math.isfinite(x) else None
