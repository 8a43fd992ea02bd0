"""genflow info [WHAT]"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import platform
from typing import Any

from genflow.errors import UserError, nearest
from genflow.registry import index, names, resolve, signature_of, tag_of

PLURAL = {
    "network": "networks (model)",
    "flow": "flows (flow)",
    "density": "timestep densities (flow.density)",
    "dataset": "data sets (data)",
    "text": "text encoders (text)",
    "optimizer": "optimisers (train.optimizer)",
    "sampler": "samplers (sample.sampler)",
    "grid": "time grids",
    "guidance": "guidance",
    "attention": "attention backends (model.attention)",
    "api": "Python",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", help="a kind (sampler), a name (heun), or: system")


def run(args: argparse.Namespace) -> int:
    what = args.what
    if what == "system":
        _system()
    elif what is None or what in PLURAL:
        for kind in PLURAL if what is None else [what]:
            _list(kind)
    else:
        kinds = [kind for kind in PLURAL if what in names(kind)]
        attrs = [(k, n) for k, group in index().items() for n, entry in group.items() if entry["attr"] == what]
        if not kinds and not attrs:
            every = [n for kind in PLURAL for n in names(kind)]
            raise UserError(f"nothing is called {what!r}.{nearest(what, [*PLURAL, 'system', *every])}")
        for kind, name in attrs or [(kind, what) for kind in kinds]:
            _explain(kind, name)
    return 0


def _list(kind: str) -> None:
    print(PLURAL[kind])
    for name in names(kind):
        entry = index().get(kind, {}).get(name)
        summary = entry["summary"] if entry else (inspect.getdoc(resolve(kind, name)) or "").partition("\n")[0]
        print(f"  {name:22}{summary}")
    print()


def _explain(kind: str, name: str) -> None:
    obj = resolve(kind, name)
    tag = tag_of(obj)
    print(f"{kind} {name}: {obj.__module__}.{obj.__qualname__}")
    if not dataclasses.is_dataclass(obj):
        print(f"{obj.__name__}{signature_of(obj)}")
    if tag is not None and len(tag.names) > 1:
        print(f"also: {', '.join(n for n in tag.names if n != name)}")
    print(f"\n{inspect.getdoc(obj)}\n")
    if dataclasses.is_dataclass(obj):
        for field in dataclasses.fields(obj):
            print(f"  {field.name:24}{_type(field.type):34}{_default(field)}")


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"= {field.default!r}"
    return "required" if field.default_factory is dataclasses.MISSING else f"= {field.default_factory()!r}"


def _system() -> None:
    import torch

    print(f"genflow on Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}")
    print(f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        print(f"cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}")
    if torch.backends.mps.is_available():
        print("mps: available")
    from genflow.attention.dispatch import Call
    from genflow.training.precision import DTYPES, matmul_tflops, refusal

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"\ntraining precision on {device.type}")
    for name, dtype in DTYPES.items():
        reason = refusal(name, device)
        rate = "" if reason or device.type != "cpu" else f"matrix products at {matmul_tflops(dtype):.2f} TFLOP/s"
        print(f"  {name:22}{reason or rate or 'yes'}")
    print("\nattention on this machine (a training call, head_dim 64)")
    call = Call(
        device.type, torch.float32 if device.type == "cpu" else torch.bfloat16, 64, False, frozenset({"backward"})
    )
    for name in names("attention"):
        reasons = resolve("attention", name)().refusals(call)
        print(f"  {name:22}{'; '.join(reasons) or 'yes'}")
