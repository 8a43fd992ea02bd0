"""CUDA graphs for sampling: a network's kernels are recorded once, and from then on launched all at once.

With few tokens and small batches a GPU is done with a kernel before Python has launched the next. Blocks compiled one by
one cannot take the compiler's own graphs (pytorch/pytorch#152887), so whole calls are recorded here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from genflow.errors import UserError

WARM_UP = 2  # calls before a recording: libraries choose their kernels, and the compiler compiles


def record(network: nn.Module, asked: str) -> None:
    """Have the network's calls without gradients replayed as CUDA graphs, in place, until it is moved or cast.

    Raises UserError, about what was asked, where it is not on a CUDA device; a call does where it cannot be recorded.
    """
    device = next(network.parameters()).device
    if device.type != "cuda":
        raise UserError(f"{asked} records CUDA graphs, and this is {device.type}; leave it out")
    name = "denoise" if hasattr(network, "denoise") else "forward"
    setattr(network, name, Recorded(getattr(network, name), asked))


class Recorded:
    """A function of tensors that is recorded at the first call of each kind, and replayed at the others.

    Calls are of one kind where their tensors have the same shapes and dtypes and all else is equal. Answers are copies.
    """

    def __init__(self, function: Callable[..., Any], asked: str) -> None:
        self.function, self.asked = function, asked
        self._kinds: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}
        self._pool: Any = None  # one for all: what a replay leaves there is copied before the next

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            return self.function(*arguments, **options)
        leaves, structure = tree_flatten((arguments, options))
        kind = (structure, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves))
        if kind not in self._kinds:
            self._kinds[kind] = self._recording(leaves, structure)
        graph, inputs, answer = self._kinds[kind]
        for held, x in zip(inputs, (x for x in leaves if isinstance(x, Tensor)), strict=True):
            held.copy_(x)
        graph.replay()
        return tree_map_only(Tensor, Tensor.clone, answer)

    def _recording(self, leaves: list[Any], structure: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        """A graph, the tensors that it reads, and those that it writes."""
        held = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        arguments, options = tree_unflatten(held, structure)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.function(*arguments, **options)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                answer = self.function(*arguments, **options)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.asked}: this model waits for the device ({reason}); leave it out") from error
        self._pool = graph.pool()
        return graph, [x for x in held if isinstance(x, Tensor)], answer
