"""Files written whole or not at all, and files of tensors as others can read them."""

from __future__ import annotations

import glob
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor


@contextmanager
def replacing(path: Path, *, flushed: bool = True) -> Iterator[Path]:
    """A name beside path for what is to be there: moved into place at the end, or gone where writing it failed.

    flushed: on the disk before that, so that a crash of the machine leaves the old file or the new one.
    """
    temporary = path.parent / f".{path.name[-40:]}.{os.getpid()}-{threading.get_ident()}.partial"
    try:
        yield temporary
        if flushed:
            flush(temporary)
        os.replace(temporary, path)
        if flushed:
            flush(path.parent)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):  # that of a full disk names no file
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def leftovers(path: Path) -> list[Path]:
    """What processes that were killed left beside a path, which they were `replacing`."""
    return list(path.parent.glob(f".{glob.escape(path.name[-40:])}.*.partial"))


def flush(path: Path) -> None:
    """Have a file's contents, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file that is open to whom any other new file here is: safetensors' own is its owner's alone (0.8)."""
    import safetensors.torch  # which a program that saves nothing does not wait for

    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    with suppress(OSError):  # some disks have no modes
        path.chmod(mode)
