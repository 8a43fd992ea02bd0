"""Compilation, activation checkpointing, CUDA graphs and products in 8 bits, applied to a plain network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from genflow.attention.backends import many_graphs
from genflow.data.latents import LatentDataset
from genflow.data.loading import of_one_shape
from genflow.errors import UserError
from genflow.flows.bijections.base import Bijection
from genflow.flows.latent import sides_of
from genflow.layers.float8 import MULTIPLE
from genflow.layers.modulation import Linear
from genflow.networks.autoencoders import EncoderDecoder
from genflow.networks.graphs import record_training


def _blocks(network: nn.Module, what: str) -> Iterable[nn.Module]:
    blocks = getattr(network, "blocks", None)
    if blocks is None:
        raise UserError(f"{what} works block by block, and {type(network).__name__} has no `blocks`")
    return blocks


def check_shapes(dataset: Any, flow: nn.Module, network: nn.Module, shape: Sequence[int]) -> None:
    """Raises UserError for a data set with a shape that the network does not take. shape: of samples that are all alike."""
    if isinstance(network, Bijection):
        if of_one_shape(dataset):
            return
        raise UserError("data.buckets: the model takes samples of one shape; leave buckets out")
    factor = getattr(getattr(flow, "autoencoder", None), "factor", 1)
    least = factor * sides_of(network)
    if of_one_shape(dataset):
        if any(side % least for side in shape[1:]):
            near = " x ".join(str(max(round(side / least), 1) * least) for side in shape[1:])
            raise UserError(
                f"the network takes pictures in multiples of {least}, not {shape[1]} x {shape[2]}; try {near}"
            )
        return
    shapes = dataset.shapes * (factor if isinstance(dataset, LatentDataset) else 1)
    if wrong := [shape for shape in shapes.unique(dim=0).tolist() if any(side % least for side in shape)]:
        raise UserError(
            f"data.buckets: one is {wrong[0][0]} x {wrong[0][1]}, but the network takes multiples of {least}; "
            "make data.buckets.step one"
        )


def checkpointed(network: nn.Module) -> nn.Module:
    """The network with less kept for the backward, and computed again there.

    Of a network of blocks each block's inputs are kept (Chen et al. 2016, arXiv 1604.06174); of another bijection only its
    output (flows/bijections/memory.py).
    """
    if isinstance(network, Bijection) and not hasattr(network, "blocks"):
        from genflow.flows.bijections.memory import reversible  # which imports the compiler: a second at every start

        return reversible(network)
    for block in _blocks(network, "train.checkpointing"):
        block.forward = _computed_again(block.forward)  # type: ignore[method-assign]
    return network


def _computed_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(*arguments: Any, **options: Any) -> Any:  # torch.compile passes over a partial of torch's own
        return checkpoint(forward, *arguments, use_reentrant=False, **options)

    return checkpointed


def compile_blocks(network: nn.Module, asked: str = "train.compile") -> None:
    """torch.compile each block in place: one graph serves all alike, and the state dict keeps its names.

    Raises UserError, about what was asked, for a network that has no blocks.
    """
    for block in _blocks(network, asked):
        block.compile(**many_graphs())


def record_steps(network: nn.Module, *, processes: int, one_shape: bool) -> None:
    """Have the network's forward and backward in training replayed as CUDA graphs (networks/graphs.py).

    Raises UserError where it is not on a CUDA device, and for several processes, samples of several shapes, and networks
    that are more than a function of tensors.
    """
    if processes > 1:
        raise UserError(f"train.graphs is for one process, and these are {processes}; leave it out")
    if not one_shape:
        raise UserError("train.graphs is for samples of one shape; leave it or data.buckets out")
    if isinstance(network, Bijection | EncoderDecoder):
        raise UserError(f"train.graphs: a {type(network).__name__} is more than one function of tensors; leave it out")
    record_training(network, "train.graphs")


def train_in_float8(network: nn.Module) -> None:
    """Let the linears of a transformer's blocks train in 8 bits (layers/float8.py), those whose sizes allow it.

    Embedders, modulations and the last layer keep their bf16. Raises UserError where no linear is left.
    """
    able = [m for m in network.modules() if isinstance(m, Linear) and not any(n % MULTIPLE for n in m.weight.shape)]
    if not able:
        raise UserError(
            f"train.precision=fp8: a {type(network).__name__} has no transformer blocks of widths that are multiples of "
            f"{MULTIPLE}; take bf16"
        )
    for module in able:
        module.float8 = True
