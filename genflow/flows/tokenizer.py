"""Tokenizers: pictures to a grid of discrete codes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from genflow.registry import api_export


@api_export("Tokenizer")
class Tokenizer(nn.Module, ABC):
    """Pictures to codes 0 .. vocabulary - 1, one for each factor x factor pixels, and back; in float32."""

    picture_channels: int
    factor: int
    vocabulary: int

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """B x C x H x W in [-1, 1], multiples of factor -> B x h x w int64."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """B x h x w int64 -> B x C x h factor x w factor, which may leave [-1, 1]."""
