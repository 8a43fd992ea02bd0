"""Settings of other people's JSON files, each of the type that it should have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genflow.config import _build, _wrap


def setting(kind: Any, source: Mapping[str, Any], key: str, where: str) -> Any:
    """source[key] as a kind, such as float or tuple[int, ...]. Raises UserError, which begins with `where`, for another."""
    return _build(kind, _wrap(source.get(key), where), key)
