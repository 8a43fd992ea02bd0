"""Exponential moving average of the weights, with a power-function profile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genflow.training.optimizers import step_with_average
from genflow.training.sharding import as_shared, own


def power_gamma(width: float) -> float:
    """gamma of the power profile whose relative standard deviation is `width` (EDM2, arXiv 2312.02696, alg. 2)."""
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


class EMA:
    """A float32 (or wider) average of a model's trained parameters.

    After step n (counted from 1) the average moves by 1 - (1 - 1/n)^(gamma + 1): its memory is a fixed part of the run
    so far, `width` of it, so that it needs no warm-up (EDM2, eq. 127). It starts as a copy, shared out among processes as
    the parameters are.
    """

    def __init__(self, model: nn.Module, width: float) -> None:
        self.gamma = power_gamma(width)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.trained = [p for _, p in named]
        self.average = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for _, p in named]
        self.live = [own(p.detach()) for _, p in named]
        self.parts = [own(average) for average in self.average]

    def step(self, optimizer: Any, step: int) -> None:
        """optimizer.step(), which is step number `step`, counted from 1, and the weights that it leaves taken in.

        optimizer: torch's or accelerate's, of the same parameters. One pass over memory where the CPU's kernels serve.
        """
        bare, scaler = getattr(optimizer, "optimizer", optimizer), getattr(optimizer, "scaler", None)
        averages = dict(zip(self.trained, self.parts, strict=True))
        if scaler is not None or not step_with_average(bare, averages, self._weight(step)):
            optimizer.step()
            self.update(step)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 1."""
        live = [p.to(average.dtype) for p, average in zip(self.live, self.parts, strict=True)]
        torch._foreach_lerp_(self.parts, live, self._weight(step))

    def _weight(self, step: int) -> float:
        return 1 - (1 - 1 / step) ** (self.gamma + 1)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.average, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in zip(self.names, self.average, strict=True):
            average.copy_(as_shared(state[name], average))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the average inside, its own weights again after, whatever happens."""
        before = [p.clone() for p in self.live]
        with torch.no_grad():
            torch._foreach_copy_(self.live, self.parts)
            try:
                yield
            finally:
                torch._foreach_copy_(self.live, before)
