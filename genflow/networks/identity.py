"""Which weights a module has, as a short text: what was made with one module must not meet another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from genflow.registry import api_export


@api_export("identity")
def identity(module: nn.Module) -> str:
    """A SHA-256, in hexadecimal, of all that a module's state dict holds, floats as float32: the same wherever it is."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        value = value.detach().float() if value.is_floating_point() else value.detach()
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
