"""A fixed linear map that makes the conditions of a data set easy to tell apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genflow.functional import double


class Whitening(nn.Module):
    """ZCA whitening with a ridge: (x - mean) C, C = (cov + ridge * mean variance)^(-1/2), fitted once to data.

    Sentence embeddings fill a narrow cone: "red apple" and "green apple" differ by little, and a network needs long to
    hear the difference. After whitening all directions that the data uses speak equally loud. Identity before `fit`.
    """

    def __init__(self, dim: int, ridge: float) -> None:
        super().__init__()
        self.ridge = ridge
        self.mean: Tensor
        self.matrix: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """x: N x dim, N >= 2."""
        x = double(x)
        centred = x - x.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        values = values.clamp(min=0)
        scale = (values + self.ridge * values.mean()).rsqrt()
        self.mean.copy_(x.mean(0))
        self.matrix.copy_(vectors * scale @ vectors.T)

    def forward(self, x: Tensor) -> Tensor:
        """x: B x dim. Never in bf16: what is told apart is a small part of x."""
        with torch.autocast(x.device.type, enabled=False):
            return (x - self.mean) @ self.matrix
