"""genflow info [WHAT]"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import platform
from typing import TYPE_CHECKING, Any

from genflow.errors import UserError, nearest
from genflow.registry import index, names, resolve, signature_of, tag_of

if TYPE_CHECKING:
    from genflow.attention import Call

PLURAL = {
    "network": "networks (model)",
    "flow": "flows (flow)",
    "path": "paths from data to noise (flow.path)",
    "coupling": "couplings of data and noise (flow.coupling)",
    "density": "timestep densities (flow.density)",
    "bijection": "bijections",
    "dequantization": "dequantizations (flow.dequantization)",
    "autoencoder": "autoencoders of latent flows (flow.autoencoder)",
    "bottleneck": "bottlenecks of autoencoders (flow.bottleneck)",
    "tokenizer": "tokenizers of pictures (flow.tokenizer)",
    "dataset": "data sets (data)",
    "text": "text encoders (text)",
    "optimizer": "optimisers (train.optimizer)",
    "sampler": "samplers (sample.sampler)",
    "grid": "time grids",
    "guidance": "guidance",
    "decoder": "decoders of tokens (sample.decoder)",
    "attention": "attention backends (model.attention)",
    "api": "Python",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", help="a kind (sampler), a name (heun), or: system, precision")


def run(args: argparse.Namespace) -> int:
    what = {"data": "dataset", "model": "network"}.get(args.what, args.what)  # as a config's sections are called
    if what == "system":
        _system()
    elif what == "precision":
        _precision()
    elif what is None or what in PLURAL:
        for kind in PLURAL if what is None else [what]:
            _list(kind)
        if what == "attention":
            _attention()
    else:
        kinds = [kind for kind in PLURAL if what in names(kind)]
        attrs = [(k, n) for k, group in index().items() for n, entry in group.items() if entry["attr"] == what]
        found = list(dict.fromkeys([*((kind, what) for kind in kinds), *attrs]))
        if not found:
            every = {*PLURAL, "system", "precision", *(n for kind in PLURAL for n in names(kind))}
            near = hint if (hint := nearest(what, every)).startswith(" Did") else f" Kinds: {', '.join(PLURAL)}."
            raise UserError(f"nothing is called {what!r}.{near}")
        for kind, name in found:
            _explain(kind, name)
    return 0


def _list(kind: str) -> None:
    print(PLURAL[kind])
    for name in names(kind):
        entry = index().get(kind, {}).get(name)
        about = entry or getattr(tag_of(resolve(kind, name)), "metadata", {})
        summary = entry["summary"] if entry else (inspect.getdoc(resolve(kind, name)) or "").partition("\n")[0]
        kept = "" if "lossless" not in about else "lossless  " if about["lossless"] else "LOSSY     "
        print(f"  {name:21} {kept}{summary.removeprefix('Lossy: ')}")
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
        for field in (f for f in dataclasses.fields(obj) if f.init):
            print(f"  {field.name:23} {_type(field.type):33} {_default(field)}")


def _type(annotation: Any) -> str:
    words = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return words.removeprefix("Annotated[").partition(",")[0] if words.startswith("Annotated[") else words


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

    call = _training_call()
    print(f"\nattention: {_choice(call)} ({_words(call)}); genflow info attention says more")
    print("training precision: genflow info precision")


def _precision() -> None:
    """For each device: the precisions of train.precision, how fast it multiplies in each, and why not in the others."""
    import torch

    from genflow.training.precision import precision_report, resolve_precision

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        print(f"{device} ({name}), train.precision" if device.type != "mps" else "mps, train.precision")
        chosen, why = resolve_precision("auto", device)
        print(f"  {'auto':22}{chosen} ({why.removeprefix('auto: ')})")
        for precision, told in precision_report(device).items():
            print(f"  {precision:22}{told}")
        print()
    print("weights, optimiser and averages are float32 in all of them")


def _training_call() -> Call:
    """What one attention call of a typical training step asks on this machine."""
    import torch

    from genflow.attention import Call

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    return Call("cuda" if cuda else "cpu", dtype, 64, "none", 272, 272, frozenset({"backward"}))


def _words(call: Call) -> str:
    return f"{str(call.dtype)[6:]} on {call.device}, head_dim {call.head_dim}, {', '.join(call.needs)}"


def _choice(call: Call) -> str:
    """The backend that serves a call where nothing but the environment says which."""
    from genflow.attention import choose
    from genflow.attention.dispatch import environment

    try:
        return choose(environment(), call).name
    except UserError:
        return f"none: {environment()} cannot"


def _attention() -> None:
    """For a typical call: what this machine would use, why not the others, and what each backend can do here."""
    from genflow.attention import attention_report
    from genflow.attention.dispatch import NEEDS, VARIABLE, environment
    from genflow.attention.masks import KINDS

    call = _training_call()
    kinds = (*KINDS, "causal+keys", "causal+segments")
    by = "" if environment() == "auto" else f", as the environment says: {VARIABLE}={environment()}"
    print(f"a training call on this machine: {_words(call)}\n\nthe choice, by mask{by}")
    chosen = [_choice(call._replace(mask=kind)) for kind in kinds]
    for backend in dict.fromkeys(chosen):
        print(f"  {backend:22}{', '.join(kind for kind, name in zip(kinds, chosen) if name == backend)}")
    print("\nthe others, without a mask")
    for name, reasons in attention_report(call).items():
        print(f"  {name:22}{'; '.join(reasons) or 'could serve'}" if name != chosen[0] else f"  {name:22}chosen")
    print("\nwhat each can do for such tensors: masks; needs")
    forward = call._replace(needs=frozenset())
    for name in names("attention"):
        refused = resolve("attention", name)().refusals
        masks = [kind for kind in kinds if not refused(forward._replace(mask=kind))]
        needs = [need.replace("_", " ") for need in NEEDS if not refused(call._replace(needs=frozenset({need})))]
        able = f"{'all' if len(masks) == len(kinds) else ', '.join(masks)}; {', '.join(needs) or 'forward only'}"
        print(f"  {name:22}{able if masks else 'nothing'}")
