"""Locks on files, by which processes of one or of several machines take turns."""

from __future__ import annotations

import os
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not a system with such locks
    fcntl = None  # type: ignore[assignment]


def lock(file: IO[Any], *, wait: bool) -> bool | None:
    """Whether this process now holds an open file, until it is closed; None where there are no locks.

    wait: until no other process holds it. Its worker processes do not hold it.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        register_after_fork(file, _close)  # a worker's copy would hold it on when we are gone
        return True
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None


def still_at(file: IO[Any], path: Path) -> bool:
    """Whether an open file is the one that a path names: another process may have removed it, and made a new one."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _close(file: IO[Any]) -> None:
    file.close()
