"""Seeded noise, and modules with weights that do something: fresh ones are often the identity, which hides mistakes."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shaken(module: Module, by: float = 0.1) -> Module:
    """The module, normal noise of so much added to its parameters."""
    for p in module.parameters():
        p.add_(by * torch.randn_like(p))
    return module
