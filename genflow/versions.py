"""By which weights a result was computed. torch counts changes in place, but not those of its fused optimisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place, by any optimiser too. Raises RuntimeError for an inference tensor."""
    return tensor._version


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place. Changes that go by `.data` are counted nowhere."""
    return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)


def count_step(optimizer: Optimizer, *_: Any) -> None:
    """Note that every parameter of the optimiser has changed: after each step that goes through `Optimizer.step`."""
    if not torch.compiler.is_compiling():
        increment_version([p for group in optimizer.param_groups for p in group["params"]])


register_optimizer_step_post_hook(count_step)
