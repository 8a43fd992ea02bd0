"""The interface of text encoders."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from genflow.conditions import Condition
from genflow.functional import Rng
from genflow.registry import api_export


@api_export("TextEncoder")
class TextEncoder(nn.Module, ABC):
    """Prompts to conditions, in two steps: `encode` prepares (and may cache), the forward embeds.

    A frozen encoder prepares embeddings and its forward is the identity; one that is trained prepares token ids and
    embeds them in its forward, with gradients. Every condition has max_tokens tokens, so any two fit into one batch.
    """

    context_dim: int  # of a token's embedding
    pooled_dim: int
    max_tokens: int
    trainable: bool

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prepared conditions, one per prompt, on the CPU. A prompt that is too long is cut, with a warning."""

    @abstractmethod
    def forward(self, condition: Condition) -> Condition:
        """Prepared to embedded: tokens B x max_tokens x context_dim, pooled B x pooled_dim."""

    def fingerprint(self) -> str | None:
        """What prepared conditions hang on, as a digest, the same on every machine; None where preparing costs nothing."""
        return None

    def null(self) -> Condition:
        """The prepared condition of guidance's other branch and of dropped captions: the empty prompt. One row."""
        return self.encode([""])

    def keep_pooled(self) -> None:
        """Train nothing that the pooled vector alone hangs on: for a model that reads the tokens only."""

    def drop(self, condition: Condition, rng: Rng, position: Tensor) -> Condition:
        """Prepared conditions, B rows, with what the encoder hides of them in training by its own rule: here, nothing.

        Randomness comes from rng at position (B), as in a flow's loss.
        """
        return condition


class FrozenText(TextEncoder):
    """An encoder that prepares embeddings; its forward gives them back."""

    trainable = False
    _null: Condition | None = None

    def forward(self, condition: Condition) -> Condition:
        return condition

    def null(self) -> Condition:
        if self._null is None:
            with torch.inference_mode(False):  # it is kept, and may be asked for derivatives later
                self._null = self.encode([""])
        return self._null


_CUT: ContextVar[dict[str, list[str]] | None] = ContextVar("cut", default=None)  # prompts by their limit


def warn_cut(cut: Sequence[str], limit: str) -> None:
    """One line for all the prompts of a call that were too long, or of all calls within `cuts_told_at_once`."""
    if (gathered := _CUT.get()) is not None:
        gathered.setdefault(limit, []).extend(cut)
    elif cut:
        which = f"prompt cut to {limit}" if len(cut) == 1 else f"{len(cut)} prompts cut to {limit}, the first"
        warnings.warn(f"{which}: {cut[0][:40]!r}...", stacklevel=3)


@contextmanager
def cuts_told_at_once() -> Iterator[None]:
    """Prompts that are encoded piece by piece are one call for what is said of those that were too long."""
    token = _CUT.set({})
    try:
        yield
    finally:
        gathered = _CUT.get() or {}
        _CUT.reset(token)
        for limit, cut in gathered.items():
            warn_cut(cut, limit)


def same_text(a: nn.Module, b: nn.Module) -> bool:
    """Whether two text encoders prepare the same conditions."""
    told = ("max_tokens", "context_dim", "pooled_dim", "classes", "identity")
    if type(a) is not type(b) or any(getattr(a, name, None) != getattr(b, name, None) for name in told):
        return False
    return not isinstance(a, TextEncoder) or not isinstance(b, TextEncoder) or a.fingerprint() == b.fingerprint()
