"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path

from genflow.errors import UserError


def cache_folder() -> Path:
    """$GENFLOW_CACHE, or ~/.cache/genflow. Raises UserError for a home that is not there."""
    path = Path(os.environ.get("GENFLOW_CACHE") or "~/.cache/genflow")
    try:
        return path.expanduser()
    except RuntimeError as error:  # no such user, or no home
        raise UserError(f"the cache folder {path} cannot be found ({error}); set GENFLOW_CACHE to another") from error
