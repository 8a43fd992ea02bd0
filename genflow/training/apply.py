"""Compilation and activation checkpointing, applied to a plain network that has `blocks`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from genflow.errors import UserError
from genflow.flows.bijections.base import Bijection
from genflow.flows.bijections.memory import reversible


def _blocks(network: nn.Module, what: str) -> Iterable[nn.Module]:
    blocks = getattr(network, "blocks", None)
    if blocks is None:
        raise UserError(f"{what} works block by block, and {type(network).__name__} has no `blocks`")
    return blocks


def checkpointed(network: nn.Module) -> nn.Module:
    """The network with less kept for the backward, and computed again there.

    Of a network of blocks each block's inputs are kept (Chen et al. 2016, arXiv 1604.06174); of another bijection only its
    output (flows/bijections/memory.py).
    """
    if isinstance(network, Bijection) and not hasattr(network, "blocks"):
        return reversible(network)
    for block in _blocks(network, "train.checkpointing"):
        block.forward = _computed_again(block.forward)  # type: ignore[method-assign]
    return network


def _computed_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(*arguments: Any, **options: Any) -> Any:  # torch.compile passes over a partial of torch's own
        return checkpoint(forward, *arguments, use_reentrant=False, **options)

    return checkpointed


def compile_blocks(network: nn.Module) -> None:
    """torch.compile each block in place: one graph serves all alike, and the state dict keeps its names."""
    for block in _blocks(network, "train.compile"):
        block.compile()
