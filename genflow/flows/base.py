"""The verbs that every flow has, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.functional import Rng
from genflow.registry import api_export
from genflow.samplers import Solution


class Batch(Protocol):
    """What a loss reads of a batch.

    image: B x C x H x W in [-1, 1]; condition: B rows, prepared; position: B int64, the counters of its randomness.
    """

    image: Tensor
    condition: Condition
    position: Tensor


@dataclass(frozen=True)
class LossOutput:
    """loss: the scalar to descend; parts: what it is made of, by name, detached; per_sample and t: B, detached."""

    loss: Tensor
    parts: dict[str, Tensor]
    per_sample: Tensor
    t: Tensor


@api_export("Flow")
class Flow(nn.Module, ABC):
    """A transport between noise and data: the one interface that training, sampling and evaluation know.

    image_shape: C x H x W of the pictures it was made for; recipe: the config it was loaded with, if it was.
    """

    image_shape: tuple[int, int, int]
    recipe: dict[str, Any] | None = None
    no_density: ClassVar[str] = "this flow offers no likelihood"
    no_inverse: ClassVar[str] = "this flow has no inverse"

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def forward(self, batch: Batch, rng: Rng) -> LossOutput:
        """The loss, as a forward, so that wrappers of modules (DDP and its like) see it."""
        return self.loss(batch, rng)

    def initialise(self, condition: Condition) -> None:
        """Fit what depends on the training data before the first step. condition: its prepared conditions."""

    @abstractmethod
    def loss(self, batch: Batch, rng: Rng) -> LossOutput:
        """The training loss of a batch, its randomness from rng at batch.position."""

    @abstractmethod
    def sample(self, prompts: Sequence[str] | Condition, *, seeds: Sequence[int]) -> Solution:
        """One picture per seed, B x C x H x W float32 in [-1, 1]; the same alone as in any batch."""

    def log_prob(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """Nats per picture, B. Raises UserError, with the reason, where it would not be honest."""
        raise UserError(f"log_prob: {self.no_density}")

    def encode(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """Pictures to noise. Raises UserError where there is no such map."""
        raise UserError(f"encode: {self.no_inverse}")

    def decode(self, z: Tensor, condition: Condition | None = None) -> Tensor:
        """Noise to pictures, the inverse of encode. Raises UserError where there is no such map."""
        raise UserError(f"decode: {self.no_inverse}")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the module and all below it are in eval mode; after, each is as it was."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
