"""No condition at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from genflow.conditions import Condition
from genflow.registry import text_export
from genflow.text.base import FrozenText


@text_export("none")
@dataclass(frozen=True)
class NoTextConfig:
    """No condition: captions are not heard, every sample is alike."""

    def build(self) -> NoText:
        return NoText()


class NoText(FrozenText):
    """Every prompt is the empty condition: no token, and a pooled vector of no numbers."""

    context_dim = pooled_dim = max_tokens = 0

    def encode(self, prompts: Sequence[str]) -> Condition:
        n = len(prompts)
        return Condition(torch.zeros(n, 0, 0), torch.zeros(n, 0, dtype=torch.bool), torch.zeros(n, 0))
