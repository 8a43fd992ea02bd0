"""Which weights a module has, as a short text: what was fitted to one module must not meet another."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


def identity(module: nn.Module) -> Tensor:
    """SHA-256 of the class's name and of all that the state dict holds: 32 uint8 on the CPU."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def short(value: Tensor) -> str:
    """The first digits of an identity, for people."""
    return bytes(value.tolist()).hex()[:12]


def same_text(a: Any, b: Any) -> bool:
    """Whether two text encoders prepare the same conditions."""
    told = ("max_tokens", "context_dim", "pooled_dim", "classes", "identity")
    return type(a) is type(b) and all(getattr(a, name, None) == getattr(b, name, None) for name in told)
