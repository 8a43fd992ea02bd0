"""Files of tensors as others can read them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import safetensors.torch
from torch import Tensor


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file that is open to whom any other new file here is: safetensors' own is its owner's alone (0.8)."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    with suppress(OSError):  # some disks have no modes
        path.chmod(mode)
