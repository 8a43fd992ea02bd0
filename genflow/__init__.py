"""genflow: normalizing, continuous and rectified flows of images.

Every public name of the package is here, loaded when first used: genflow.MMDiT, genflow.heun, genflow.load, ...; and so
are its rooms: genflow.registry, genflow.functional, ...
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def _public() -> dict[str, str]:
    """Python name -> module, from the index of the registry."""
    from genflow.registry import index

    return {e["attr"]: e["module"] for kind in index().values() for e in kind.values() if "." not in e["attr"]}


def __getattr__(name: str) -> Any:
    from importlib.util import find_spec

    if not name.startswith("_"):
        from genflow.registry import imported

        if (module := _public().get(name)) is not None:
            value = globals()[name] = getattr(imported(module), name)
            return value
        if find_spec(f"genflow.{name}") is not None:
            return imported(f"genflow.{name}")
    raise AttributeError(f"module 'genflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_public()})
