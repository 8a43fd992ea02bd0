"""Compilation and activation checkpointing, applied to a plain network that has `blocks`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from genflow.errors import UserError


def _blocks(network: nn.Module, what: str) -> Iterable[nn.Module]:
    blocks = getattr(network, "blocks", None)
    if blocks is None:
        raise UserError(f"{what} works block by block, and {type(network).__name__} has no `blocks`")
    return blocks


def checkpoint_blocks(network: nn.Module) -> None:
    """Keep only each block's inputs for the backward and run its forward again there (arXiv 1604.06174)."""
    for block in _blocks(network, "train.checkpointing"):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def compile_blocks(network: nn.Module) -> None:
    """torch.compile each block in place: one graph serves all alike, and the state dict keeps its names."""
    for block in _blocks(network, "train.compile"):
        block.compile()
