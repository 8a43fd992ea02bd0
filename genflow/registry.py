"""One public name per thing, the same in Python, YAML and the CLI.

A decorator tags an object with its kind and name and returns it unchanged. `public.json` beside this file lists all of
genflow's: it is the index by which names resolve without importing everything, and the golden file of the public API.
`python -m genflow.registry --update` writes it anew.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

from genflow.errors import UserError, nearest

T = TypeVar("T")
INDEX = Path(__file__).with_name("public.json")
PLUGINS = "genflow.plugins"  # the entry point group of third parties; each names a module that exports by decorators


@dataclass(frozen=True)
class Tag:
    """What a decorator wrote on an object. names[0] is canonical, the others are aliases."""

    kind: str
    names: tuple[str, ...]
    place: str  # module:line
    metadata: dict[str, Any] = field(default_factory=dict)


_live: dict[tuple[str, str], Any] = {}
_importing = RLock()


def tag_of(obj: Any) -> Tag | None:
    """The tag of an object itself; a subclass does not inherit its parent's."""
    return getattr(obj, "__dict__", {}).get("__genflow__")


def genflow_export(*names: str, kind: str, **metadata: Any) -> Callable[[T], T]:
    """Give an object its public name. Raises UserError, naming both places, where another thing has it."""

    if not names:
        raise TypeError("an export needs a name")

    def decorate(obj: T) -> T:
        caller = sys._getframe(1)
        tag = Tag(kind, names, f"{caller.f_globals['__name__']}:{caller.f_lineno}", metadata)
        for name in names:
            if (other := _live.get((kind, name))) is not None:
                before = tag_of(other)
                if before is not None and not _same(other, obj):
                    raise UserError(f"two things are called {kind} {name!r}: {before.place} and {tag.place}")
            elif not _ours(obj) and (entry := index().get(kind, {}).get(name)):
                raise UserError(f"two things are called {kind} {name!r}: {entry['module']} and {tag.place}")
        obj.__genflow__ = tag  # type: ignore[attr-defined]
        for name in names:
            _live[kind, name] = obj
        return obj

    return decorate


def _same(a: Any, b: Any) -> bool:
    """Whether b is a, perhaps from its module's reload; a partial, which has no name of its own, is none but itself."""
    return a is b or (hasattr(a, "__qualname__") and (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__))


def _ours(obj: Any) -> bool:
    return obj.__module__.startswith("genflow.")


api_export = partial(genflow_export, kind="api")
network_export = partial(genflow_export, kind="network")
flow_export = partial(genflow_export, kind="flow")
bijection_export = partial(genflow_export, kind="bijection")
dequantization_export = partial(genflow_export, kind="dequantization")
path_export = partial(genflow_export, kind="path")
coupling_export = partial(genflow_export, kind="coupling")
density_export = partial(genflow_export, kind="density")
sampler_export = partial(genflow_export, kind="sampler")
grid_export = partial(genflow_export, kind="grid")
guidance_export = partial(genflow_export, kind="guidance")
attention_export = partial(genflow_export, kind="attention")
text_export = partial(genflow_export, kind="text")
decoder_export = partial(genflow_export, kind="decoder")
dataset_export = partial(genflow_export, kind="dataset")
optimizer_export = partial(genflow_export, kind="optimizer")


@cache
def index() -> dict[str, dict[str, dict[str, Any]]]:
    """public.json: kind -> name -> {module, attr, signature, summary}."""
    return json.loads(INDEX.read_text(encoding="utf-8"))


def imported(module: str) -> Any:
    """A module, for one thread at a time: two that enter a room by two of its files find each other's half imported."""
    with _importing:
        return importlib.import_module(module)


@cache
def _load_plugins() -> None:
    for entry in entry_points(group=PLUGINS):
        try:
            entry.load()
        except Exception as error:
            print(f"genflow: plugin {entry.name} ({entry.value}) does not load: {error}", file=sys.stderr)


def names(kind: str) -> list[str]:
    """Every name of a kind: genflow's own, those exported since, and plugins'."""
    _load_plugins()
    return sorted({*index().get(kind, {}), *(name for k, name in _live if k == kind)})


def resolve(kind: str, name: str) -> Any:
    """The object of that kind and name. Raises UserError with the nearest name where there is none."""
    if (kind, name) not in _live:
        if entry := index().get(kind, {}).get(name):
            imported(entry["module"])
        else:
            _load_plugins()
    if (kind, name) not in _live:
        raise UserError(f"no {kind} is named {name!r}.{nearest(name, names(kind))}")
    return _live[kind, name]


@dataclass(frozen=True)
class _Verbatim:
    """Text that a signature shows without quotes."""

    text: str

    def __repr__(self) -> str:
        return self.text


def signature_of(obj: Any) -> str:
    """The signature as text: names, annotations as written and defaults, the same on every Python."""
    try:
        signature = inspect.signature(obj)
    except (TypeError, ValueError):
        return ""
    factories = {f.name: f.default_factory for f in fields(obj)} if is_dataclass(obj) else {}
    parameters = [
        p.replace(
            annotation=_annotation(p.annotation),
            default=p.empty if p.default is p.empty else _default(p.default, factories.get(p.name, MISSING)),
        )
        for p in signature.parameters.values()
    ]
    returns = inspect.Signature.empty if isinstance(obj, type) else _annotation(signature.return_annotation)
    return str(inspect.Signature(parameters, return_annotation=returns))


def _annotation(annotation: Any) -> Any:
    return _Verbatim(annotation) if isinstance(annotation, str) else annotation


def _default(value: Any, factory: Any) -> _Verbatim:
    if factory is not MISSING:
        return _Verbatim(f"{factory.__name__}()")
    plain = isinstance(value, str | int | float | bool | tuple | list | frozenset | type(None))
    return _Verbatim(repr(value) if plain else "...")


def describe() -> dict[str, dict[str, dict[str, Any]]]:
    """What public.json should hold, from importing every module of genflow."""
    import genflow

    for module in pkgutil.walk_packages(genflow.__path__, "genflow."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (kind, name), obj in sorted(_live.items(), key=lambda item: item[0]):
        if not _ours(obj):
            continue
        tag = tag_of(obj)
        assert tag is not None
        found.setdefault(kind, {})[name] = {
            "module": obj.__module__,
            "attr": obj.__qualname__,
            "signature": signature_of(obj),
            "summary": (inspect.getdoc(obj) or "").partition("\n")[0],
            **tag.metadata,
        }
    return found


def main() -> None:
    """Write public.json (with --update) or say whether it is as the code has it."""
    current = json.dumps(describe(), indent=1, ensure_ascii=False) + "\n"
    if "--update" in sys.argv:
        INDEX.write_text(current, encoding="utf-8")
    elif current != INDEX.read_text(encoding="utf-8"):
        sys.exit("genflow/public.json is not what the code exports: python -m genflow.registry --update")


if __name__ == "__main__":
    from genflow.registry import main as _main  # the imported module, which holds the registrations

    _main()
