"""genflow: normalizing, continuous and rectified flows of images.

Every public name of the package is here, loaded when first used: genflow.MMDiT, genflow.heun, genflow.load, ...
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def _public() -> dict[str, str]:
    """Python name -> module, from the index of the registry."""
    from genflow.registry import index

    return {e["attr"]: e["module"] for kind in index().values() for e in kind.values() if "." not in e["attr"]}


def __getattr__(name: str) -> Any:
    import importlib

    if name.startswith("_") or (module := _public().get(name)) is None:
        raise AttributeError(f"module 'genflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_public()})
