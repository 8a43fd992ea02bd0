"""The C library's allocator, set for work that frees and takes large tensors all the time."""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # numbers of glibc's mallopt(3)
LARGEST = 2**25  # bytes of a block that is kept, the most that can be asked for


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for the next tensor, until it ends; but for blocks beyond LARGEST.

    Elsewhere than on glibc it does nothing.

    glibc gives large blocks back to the system at once, which hands them out again page by page, zeroed: a tenth of a
    training step on a CPU.
    """
    if platform.system() == "Linux":
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(MMAP_THRESHOLD, LARGEST)
            mallopt(TRIM_THRESHOLD, -1)
