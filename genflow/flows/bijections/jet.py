"""Jet's coupling: a vision transformer sees one half of a picture's tokens and scales and shifts the other half.

Kolesnikov, Pinto & Tschannen 2024 (arXiv 2412.15129).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from genflow.errors import UserError, nearest
from genflow.flows.bijections.base import Bijection, check_condition, per_sample
from genflow.functional import wide
from genflow.networks.vit import ViT
from genflow.registry import bijection_export

Division = Literal["channels", "checker", "rows", "columns"]


@bijection_export("vit_coupling")
class ViTCoupling(Bijection):
    """changed' = (changed + b) 2 sigmoid(u), kept' = kept; b and u from a ViT of the kept half (arXiv 2412.15129, eq. 2).

    The picture is cut into patches, the tokens. divide: "channels", half of the numbers of every token are kept, which
    ones is random but fixed, drawn from `seed`; or every other token is, in a checkerboard, in rows or in columns. flip:
    keep what would be changed. patch, width, depth, heads: of the ViT; attention: its backend. It starts as the identity.

    Raises UserError for a shape that is no picture's, or that the patch or the division does not divide.
    """

    kept: Tensor
    changed: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        condition_dim: int = 0,
        patch: int = 4,
        width: int = 128,
        depth: int = 2,
        heads: int | None = None,
        divide: Division = "channels",
        flip: bool = False,
        seed: int = 0,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.shape, self.condition_dim = tuple(shape), condition_dim
        kept, changed = _division(self.shape, patch, divide, seed)
        if flip:
            kept, changed = changed, kept
        # Where in the flat picture the numbers of each half lie: tokens x numbers of a token.
        self.register_buffer("kept", kept)
        self.register_buffer("changed", changed)
        # A kept token answers for a changed one; where one half has more tokens, the other is filled up.
        self.tokens = max(len(kept), len(changed))
        self.network = ViT(
            self.tokens,
            kept.shape[1],
            2 * changed.shape[1],
            width=width,
            depth=depth,
            heads=heads,
            condition_dim=condition_dim,
            attention=attention,
        )

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flat = self._flat(x)
        shift, log_scale = self._affine(flat, condition)
        changed = (_take(flat, self.changed) + shift) * log_scale.exp()
        return _put(flat, self.changed, changed).view_as(x), per_sample(log_scale)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flat = self._flat(z)
        shift, log_scale = self._affine(flat, condition)
        changed = _take(flat, self.changed) * (-log_scale).exp() - shift
        return _put(flat, self.changed, changed).view_as(z), -per_sample(log_scale)

    def _flat(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise UserError(f"vit_coupling: a sample of {tuple(x.shape[1:])}; this coupling is of {self.shape}")
        return wide(x).flatten(1)

    def _affine(self, flat: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """b and log 2 sigmoid(u), each B x tokens x numbers of the changed half, float32 or wider."""
        check_condition(condition, self.condition_dim, len(flat))
        kept = F.pad(_take(flat, self.kept), (0, 0, 0, self.tokens - len(self.kept)))
        output = self.network(kept.to(self.network.embed.weight.dtype), condition)[:, : len(self.changed)]
        shift, u = output.to(flat.dtype).chunk(2, dim=-1)
        return shift, math.log(2) + F.logsigmoid(u)


def _take(flat: Tensor, places: Tensor) -> Tensor:
    """B x D -> B x tokens x numbers."""
    return flat.index_select(1, places.flatten()).unflatten(1, places.shape)


def _put(flat: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """flat, B x D, with values, B x tokens x numbers, at their places."""
    return flat.to(values.dtype).index_copy(1, places.flatten(), values.flatten(1))


def _division(shape: tuple[int, ...], patch: int, divide: str, seed: int) -> tuple[Tensor, Tensor]:
    """The places in the flat picture of the kept and of the changed half, each tokens x numbers of a token."""
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"a ViT coupling is of pictures, (channels, height, width), not of {shape}")
    if divide not in get_args(Division):
        raise UserError(f"divide = {divide!r} is no division of tokens.{nearest(divide, get_args(Division))}")
    channels, height, width = shape
    if patch < 1 or height % patch or width % patch:
        near = max(p for p in range(1, max(patch, 1) + 1) if height % p == 0 == width % p)
        raise UserError(f"a picture of {height} x {width} does not divide into patches of {patch}; try {near}")
    h, w = height // patch, width // patch
    places = torch.arange(math.prod(shape)).view(channels, h, patch, w, patch)
    tokens = places.permute(1, 3, 0, 2, 4).reshape(h * w, -1)
    if divide == "channels":
        numbers = tokens.shape[1]
        if numbers < 2:
            raise UserError(
                f"the tokens of {shape} in patches of {patch} have one number; take patches of 2, or checker"
            )
        order = torch.randperm(numbers, generator=torch.Generator().manual_seed(seed))
        return tokens[:, order[: numbers // 2]], tokens[:, order[numbers // 2 :]]
    row, column = torch.arange(h)[:, None].expand(h, w), torch.arange(w).expand(h, w)
    odd = ({"checker": row + column, "rows": row, "columns": column}[divide] % 2 == 1).flatten()
    if not odd.any():
        raise UserError(f"{h} x {w} tokens cannot be divided into {divide}; take smaller patches, or channels")
    return tokens[~odd], tokens[odd]
