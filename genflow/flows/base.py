"""The verbs that every flow has, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
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

    x: B x C x H x W in [-1, 1], or B x D; condition: B rows, prepared; position: B int64, the counters of its randomness.
    """

    x: Tensor
    condition: Condition
    position: Tensor


@dataclass(frozen=True)
class LossOutput:
    """loss: the scalar to descend; parts: what it is made of, by name, detached; per_sample: B, detached.

    t: B, the times at which it was asked, for flows that have times.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    per_sample: Tensor
    t: Tensor | None = None


@api_export("Flow")
class Flow(nn.Module, ABC):
    """A transport between noise and data: the one interface that training, sampling and evaluation know.

    shape: of the samples it was made for, (C, H, W) or (D,); recipe: the config it was loaded with, if it was; bounded:
    whether its samples of shape (C, H, W) are pictures in [-1, 1], and not latents.
    """

    shape: tuple[int, ...]
    bounded: bool = True
    recipe: dict[str, Any] | None = None
    no_density: ClassVar[str] = "this flow offers no likelihood"
    no_inverse: ClassVar[str] = "this flow has no inverse"

    def take_latents(self) -> None:
        """From now on its samples are latents. Raises UserError for what in it is of pictures alone."""
        self.bounded = False

    @property
    def unit(self) -> str:
        """Of what evaluation says of its likelihood: of `bits_per_dim`, or of -log_prob where it is another one."""
        return "bits/dim" if len(self.shape) == 3 else "nats"

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def sides(self) -> list[list[nn.Parameter]]:
        """The trained parameters by the loss that they follow: of a game, each player's own. Each side is clipped alone."""
        return [[p for p in self.parameters() if p.requires_grad]]

    def forward(self, batch: Batch, rng: Rng) -> LossOutput:
        """The loss, as a forward, so that wrappers of modules (DDP and its like) see it."""
        return self.loss(batch, rng)

    def prepare_training(self) -> None:
        """Read what only training needs. Raises UserError where it is not there."""

    def initialise(self, table: Condition, first: Callable[[], Batch]) -> None:
        """Fit what depends on the training data before the first step of a run from nothing, alike on every rank.

        table: the prepared conditions of the data; first: reads the first batch of the run, of all ranks together.
        """

    @abstractmethod
    def loss(self, batch: Batch, rng: Rng) -> LossOutput:
        """The training loss of a batch, its randomness from rng at batch.position."""

    @abstractmethod
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """What a held-out batch tells, by name: "validation_loss" first, the same questions at every call."""

    @abstractmethod
    def sample(self, prompts: Sequence[str] | Condition, *, seeds: Sequence[int]) -> Solution:
        """One sample per seed, B x *shape float32 (pictures in [-1, 1]); the same alone as in any batch."""

    def log_prob(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """Log density in nats, B. Raises UserError, with the reason, where it would not be honest."""
        raise UserError(f"log_prob: {self.no_density}")

    def bits_per_dim(
        self, x: Tensor, condition: Condition | None = None, *, k: int = 1, position: Tensor | None = None
    ) -> Tensor:
        """-log2 P per dimension of pictures on their grey levels, B. Raises UserError where it would not be honest.

        k: draws of the dequantisation's noise; position: B, its counters.
        """
        raise UserError(f"bits_per_dim: {self.no_density}")

    def likelihood_note(self, k: int, **how: Any) -> str:
        """How the likelihoods of this flow are counted, to stand beside every figure."""
        raise UserError(f"likelihood: {self.no_density}")

    def encode(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """Data to noise. Raises UserError where there is no such map."""
        raise UserError(f"encode: {self.no_inverse}")

    def decode(self, z: Tensor, condition: Condition | None = None) -> Tensor:
        """Noise to data, the inverse of encode. Raises UserError where there is no such map."""
        raise UserError(f"decode: {self.no_inverse}")


def dtype_of(network: nn.Module) -> torch.dtype:
    """In which a network computes."""
    return next((p.dtype for p in network.parameters()), torch.float32)


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
