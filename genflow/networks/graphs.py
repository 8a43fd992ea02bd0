"""CUDA graphs: a network's kernels are recorded once, and from then on launched all at once.

With few tokens and small batches a GPU is done with a kernel before Python has launched the next. Blocks compiled one by
one cannot take the compiler's own graphs (pytorch/pytorch#152887), so whole calls are recorded here: those of sampling,
without gradients, by `record`; those of training, with their backward, by `record_training`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from genflow.errors import UserError

# A thread that reads data may ask the device for memory meanwhile, where torch is new enough to let it.
NEW = "capture_error_mode" in signature(torch.cuda.make_graphed_callables).parameters
ANY_THREAD: dict[str, Any] = {"capture_error_mode": "thread_local"} if NEW else {}
WARM_UP = 2  # calls before a recording: libraries choose their kernels, and the compiler compiles


def record(network: nn.Module, asked: str) -> None:
    """Have the network's calls without gradients replayed as CUDA graphs, in place, until it is moved or cast.

    Raises UserError, about what was asked, where it is not on a CUDA device; a call does where it cannot be recorded.
    """
    check_device(next(network.parameters()).device, asked)
    name = "denoise" if hasattr(network, "denoise") else "forward"
    setattr(network, name, Recorded(getattr(network, name), asked))


def record_training(network: nn.Module, asked: str) -> None:
    """Have the network's calls with gradients, and their backward, replayed as CUDA graphs, in place.

    Others, and those of a network in evaluation, go on as before. Of one process alone. Raises UserError, about what was
    asked, where it is not on a CUDA device; a call does where it cannot be recorded, where its tensors are of other shapes
    than the first call's, or where the last call's backward has not begun.
    """
    check_device(next(network.parameters()).device, asked)
    network.forward = RecordedTraining(network, asked)  # type: ignore[method-assign]


def check_device(device: torch.device, asked: str) -> None:
    """Raises UserError, about what was asked, for a device that has no CUDA graphs."""
    if device.type != "cuda":
        raise UserError(f"{asked} records CUDA graphs, and this is {device.type}; leave it out")


def _kind(leaves: list[Any], structure: Any) -> Hashable:
    """Calls of one kind have tensors of the same shapes and dtypes, and all else equal."""
    return structure, *((x.shape, x.dtype, x.requires_grad) if isinstance(x, Tensor) else x for x in leaves)


@contextmanager
def _told(asked: str) -> Iterator[None]:
    """A recording that fails, in one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{asked}: this model cannot be recorded ({reason}); leave it out") from error


class Recorded:
    """A function of tensors, recorded at the first call of each kind and replayed at the others. Answers are copies."""

    def __init__(self, function: Callable[..., Any], asked: str) -> None:
        self.function, self.asked = function, asked
        self._kinds: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}
        self._pool: Any = None  # one for all: what a replay leaves there is copied before the next

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            return self.function(*arguments, **options)
        leaves, structure = tree_flatten((arguments, options))
        kind = _kind(leaves, structure)
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
        with _told(self.asked), torch.cuda.graph(graph, pool=self._pool):
            answer = self.function(*arguments, **options)
        self._pool = graph.pool()
        return graph, [x for x in held if isinstance(x, Tensor)], answer


class RecordedTraining:
    """A network's forward whose calls with gradients are recorded, backward and all, at the first of them."""

    def __init__(self, network: nn.Module, asked: str) -> None:
        self.network, self.forward, self.asked = network, network.forward, asked
        self._trained = [p for p in network.parameters() if p.requires_grad]
        self._kind: Hashable = None
        self._replay: Callable[..., Any] | None = None
        self._open = False  # a call whose backward is still to come, from what the next would overwrite
        self._apart: set[int] = set()  # where gradients are that no replay writes

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not (torch.is_grad_enabled() and self.network.training):
            return self.forward(*arguments, **options)
        if self._open:
            raise UserError(f"{self.asked}: this flow calls its network twice before one backward; leave it out")
        leaves, structure = tree_flatten((arguments, options))
        kind = _kind(leaves, structure)
        if self._replay is None:
            self._kind, self._replay = kind, self._recording(leaves, structure)
        if kind != self._kind:
            raise UserError(f"{self.asked}: a call of other shapes than the first; leave it out")
        self._set_gradients_apart()
        answer = self._replay(*(x for x in leaves if isinstance(x, Tensor)), *self._trained)
        for x in tree_leaves(answer):
            if isinstance(x, Tensor) and x.requires_grad:
                self._open = True
                x.register_hook(self._closed)
        return answer

    def _closed(self, _: Tensor) -> None:
        self._open = False

    def _set_gradients_apart(self) -> None:
        """Of micro-batches before: autograd keeps what a replay wrote, where the next one will (pytorch/pytorch#181723)."""
        grads = [(p, p.grad) for p in self._trained if p.grad is not None]
        held = [(p, grad) for p, grad in grads if grad.data_ptr() not in self._apart]
        own = [torch.empty_like(grad) for _, grad in held]
        if held:
            torch._foreach_copy_(own, [grad for _, grad in held])
        for (p, _), grad in zip(held, own, strict=True):
            p.grad = grad
        self._apart = {p.grad.data_ptr() for p, _ in grads if p.grad is not None}

    def _recording(self, leaves: list[Any], structure: Any) -> Callable[..., Any]:
        """The forward as a function of its tensors and of the trained parameters, which are where they are."""
        tensors = [x.detach().clone().requires_grad_(x.requires_grad) for x in leaves if isinstance(x, Tensor)]
        device = next(self.network.parameters()).device.type
        dtype, short = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        def call(*inputs: Tensor) -> Any:
            given = iter(inputs)
            own = [next(given) if isinstance(x, Tensor) else x for x in leaves]
            arguments, options = tree_unflatten(own, structure)
            # A cast that is kept would be that of one step.
            with torch.autocast(device, dtype, enabled=short, cache_enabled=False):
                return self.forward(*arguments, **options)

        # Outside of autocast, as a backward is, which is recorded with it (pytorch/pytorch#120930).
        with _told(self.asked), torch.autocast(device, enabled=False):
            return torch.cuda.make_graphed_callables(
                call, (*tensors, *self._trained), allow_unused_input=True, **ANY_THREAD
            )
