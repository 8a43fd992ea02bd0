"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$GENFLOW_CACHE, or ~/.cache/genflow."""
    return Path(os.environ.get("GENFLOW_CACHE") or Path.home() / ".cache" / "genflow").expanduser()
