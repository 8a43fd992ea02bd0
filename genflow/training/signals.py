"""Signals that ask a run to stop: its step is finished and saved first."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupted(Exception):
    """A signal asked the run to stop; it has been saved."""


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that a step can finish and be saved; a second one acts at once."""
    caught: list[int] = []
    old: dict[int, Any] = {}
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield caught
        return

    def handler(number: int, _frame: Any) -> None:
        caught.append(number)
        if os.environ.get("RANK", "0") == "0":  # past Python's own buffers, which it may have interrupted
            with contextlib.suppress(OSError):  # Ctrl-C ends the `tee` that was listening, too
                os.write(2, b"stopping after this step; the same again stops at once\n")
        for other, previous in old.items():
            signal.signal(other, previous)

    for each in (signal.SIGINT, signal.SIGTERM):
        old[each] = signal.signal(each, handler)
    try:
        yield caught
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
