"""The C library's allocator, set for work that frees and takes large tensors all the time."""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # numbers of glibc's mallopt(3)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for the next tensor, until it ends. Elsewhere than on glibc: nothing.

    glibc gives large blocks back to the system at once, which hands them out again page by page, zeroed: a tenth of a
    training step on a CPU.
    """
    if platform.system() == "Linux":
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(MMAP_MAX, 0)
            mallopt(TRIM_THRESHOLD, -1)
