"""The real samples of a split, in a fixed order, as the model's shape has them; and which of them two splits share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genflow.data.images import BadImage, ImageDataset, fit
from genflow.data.loading import epoch_order
from genflow.errors import UserError
from genflow.registry import api_export

MOST = 15_000  # samples kept in memory, and whose features are had
MEMORY = 2**30  # bytes of pictures kept
HASHED = 100_000  # samples whose hash is taken


@api_export("RealSamples")
@dataclass(frozen=True)
class RealSamples:
    """The first samples of a split in the order of its first shuffle, which every evaluation shares.

    x: N x C x H x W uint8, or N x D float32; captions, identifiers: N; hashes: of the N and perhaps more, by identifier;
    total: in the split; bad: how many could not be read and were passed over.
    """

    x: Tensor
    captions: list[str]
    identifiers: list[str]
    hashes: dict[str, bytes]
    total: int
    bad: int

    def __len__(self) -> int:
        return len(self.x)


@api_export("read_real")
def read_real(
    dataset: Any,
    shape: Sequence[int],
    *,
    most: int = MOST,
    hashed: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> RealSamples:
    """Read up to `most` samples of a data set, fitted to a shape, and take the hash of `hashed` ones at least.

    Fewer are kept where they would take more than a GiB. progress: told how many are read since. Raises UserError where
    none can be read.
    """
    most = max(min(most, len(dataset), MEMORY // (torch.Size(shape).numel() or 1)), 1)
    kept: list[Tensor] = []
    rows: list[int] = []
    hashes: dict[str, bytes] = {}
    bad = 0
    for row in epoch_order(len(dataset), 0, 0).tolist():
        if len(kept) >= most and len(hashes) >= hashed:
            break
        try:
            x = _sample(dataset, row, shape)
        except BadImage:
            bad += 1
            continue
        hashes[dataset.identifiers[row]] = hashlib.blake2b(x.numpy().tobytes(), digest_size=16).digest()
        if len(kept) < most:
            kept.append(x)
            rows.append(row)
        progress(1)
    if not kept:
        raise UserError(f"none of the {len(dataset)} samples can be read, so there is nothing to compare with")
    captions, identifiers = ([names[row] for row in rows] for names in (dataset.captions, dataset.identifiers))
    return RealSamples(torch.stack(kept), captions, identifiers, hashes, len(dataset), bad)


def _sample(dataset: Any, row: int, shape: Sequence[int]) -> Tensor:
    if isinstance(dataset, ImageDataset):
        return fit(dataset.image(row), shape[1], shape[0])
    return dataset.rows[row].float()


@api_export("overlap")
def overlap(held_out: RealSamples, training: RealSamples) -> list[str]:
    """The identifiers of held-out samples whose very pixels (numbers) are among the training ones'."""
    known = set(training.hashes.values())
    return [name for name, digest in held_out.hashes.items() if digest in known]
