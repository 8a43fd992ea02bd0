"""The captions of a data set, encoded once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from genflow.cachedir import cache_folder
from genflow.conditions import Condition
from genflow.data.latents import LatentDataset, Texts
from genflow.errors import UserError
from genflow.registry import api_export
from genflow.text import TextEncoder, cuts_told_at_once


class Captioned(Protocol):
    """A data set, as far as its captions."""

    captions: list[str]


CHUNK = 4096  # captions encoded at a time, or fewer of them
MEMORY = 2**30  # bytes of those; and of one of a table's tensors, beyond which it lies on disk


@api_export("PreparedConditions")
@dataclass(frozen=True)
class PreparedConditions:
    """Every caption of a data set, encoded once: rows of distinct captions and, for each sample, its row."""

    table: Condition | Texts
    row: Tensor

    @staticmethod
    def prepare(dataset: Captioned, text: TextEncoder) -> PreparedConditions:
        """Encode a data set's captions, on the CPU, or take them from a cache of latents that has them.

        Raises UserError for captions that the encoder refuses, and for a cache of another encoder.
        """
        if isinstance(dataset, LatentDataset) and (cached := dataset.conditions(text)) is not None:
            return PreparedConditions(*cached)
        distinct = list(dict.fromkeys(dataset.captions))
        where = {caption: i for i, caption in enumerate(distinct)}
        with cuts_told_at_once():
            table = _encode(distinct, text)
        return PreparedConditions(table, torch.tensor([where[c] for c in dataset.captions]))

    def __getitem__(self, index: Tensor) -> Condition:
        """The conditions of the samples of those numbers."""
        return self.table[self.row[index]]


def _encode(captions: Sequence[str], text: TextEncoder) -> Condition:
    """Chunk by chunk, so that only the result needs room, on disk if it is large."""
    row = text.null()
    like = (row.tokens, row.mask, row.pooled)
    each = sum(a.numel() * a.element_size() for a in like)
    chunk = max(1, min(CHUNK, MEMORY // max(1, each)))
    if len(captions) <= chunk:
        return text.encode(captions)
    table = Condition(*(_room(len(captions), a) for a in like))
    for start in tqdm(range(0, len(captions), chunk), desc="captions", leave=False, disable=None):
        rows = slice(start, start + chunk)
        part = text.encode(captions[rows])
        table.tokens[rows], table.mask[rows], table.pooled[rows] = part.tokens, part.mask, part.pooled
    return table


def _room(rows: int, like: Tensor) -> Tensor:
    """An empty tensor of so many rows: in memory, or, where it is large, mapped from a file already unlinked."""
    shape = (rows, *like.shape[1:])
    numel = rows * like[0].numel()
    size = numel * like.element_size()
    if size <= MEMORY:
        return torch.empty(shape, dtype=like.dtype)
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_folder(), prefix="captions-") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found now, not by a fault later
            else:
                file.truncate(size)
            return torch.from_file(file.name, shared=True, size=numel, dtype=like.dtype).view(shape)
    except OSError as error:
        what = f"{size / 2**30:.1f} GiB of encoded captions"
        raise UserError(f"no room for {what} in {cache_folder()}: {error.strerror}") from error
