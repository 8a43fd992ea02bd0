"""What a batch's samples are read from: pictures, rows of numbers, latents."""

from __future__ import annotations

import mmap
import multiprocessing
from typing import Protocol

import torch
from torch import Tensor

from genflow.data.images import BadImage, ImageDataset, fit
from genflow.data.latents import LatentDataset
from genflow.data.pairs import PairsDataset
from genflow.data.vectors import VectorDataset
from genflow.errors import UserError

Samples = ImageDataset | VectorDataset | PairsDataset | LatentDataset
MEMORY = 512 * 2**20  # bytes of decoded pictures kept


class Source(Protocol):
    """Samples by number."""

    def alike(self, i: int, j: int) -> bool:
        """Whether two samples are of one shape."""

    def check(self, i: int) -> None:
        """Raises BadImage for a sample that cannot be read."""

    def batch(self, indices: list[int], turned: Tensor | None, like: int) -> dict[str, Tensor]:
        """The tensors of a batch by the names of its fields; those where turned is True mirrored.

        Those that are not of sample `like`'s shape are brought to it.
        """


def source_of(dataset: Samples, shape: tuple[int, ...], *, own_shapes: bool) -> Source:
    """Raises UserError for a shape that pictures cannot have."""
    if isinstance(dataset, LatentDataset):
        return Latents(dataset)
    if not isinstance(dataset, ImageDataset):
        return Numbers(dataset)
    channels, size, _ = shape
    if size < 1 or channels not in (1, 3):
        raise UserError(f"data: size={size} must be 1 or more, channels={channels} must be 1 or 3")
    return Pictures(dataset, size=size, channels=channels, own_shapes=own_shapes)


class Pictures:
    """Fitted pictures by index; those of a small data set are decoded once, for all worker processes together.

    own_shapes: each is fitted to its own shape (`ImageDataset.shapes`) where the data set has shapes, of size x size at
    most; else all to size x size.
    """

    def __init__(self, dataset: ImageDataset, *, size: int, channels: int, own_shapes: bool = False) -> None:
        self.dataset, self.size, self.channels = dataset, size, channels
        self.shapes = dataset.shapes if own_shapes else None
        self.bad: dict[int, str] = {}  # why
        n, each = len(dataset), channels * size**2
        self.keeps = 0 < n * each <= MEMORY
        if self.keeps:  # anonymous shared maps: forked processes see each other's work
            self.kept = torch.frombuffer(mmap.mmap(-1, n * each), dtype=torch.uint8).view(n, each)
            self.known = torch.frombuffer(mmap.mmap(-1, n), dtype=torch.bool)
            self.lock = multiprocessing.Lock()

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width that a picture is fitted to."""
        if self.shapes is None:
            return self.size, self.size
        height, width = self.shapes[index].tolist()
        return height, width

    def __getitem__(self, index: int) -> Tensor:
        """channels x *shape(index), uint8. Raises BadImage."""
        if index in self.bad:
            raise BadImage(self.bad[index])
        height, width = self.shape(index)
        length = self.channels * height * width
        if self.keeps:
            with self.lock:
                known = bool(self.known[index])
            if known:
                return self.kept[index, :length].view(self.channels, height, width)
        try:
            pixels = fit(self.dataset.image(index), (height, width), self.channels)
        except BadImage as error:
            self.bad[index] = str(error)
            raise
        if self.keeps:
            self.kept[index, :length] = pixels.view(-1)
            with self.lock:
                self.known[index] = True
        return pixels

    def alike(self, i: int, j: int) -> bool:
        return self.shape(i) == self.shape(j)

    def check(self, i: int) -> None:
        self[i]

    def batch(self, indices: list[int], turned: Tensor | None, like: int) -> dict[str, Tensor]:
        """x: B x C x H x W float32 in [-1, 1]."""
        shape = self.shape(like)
        rows = [
            self[i] if self.shape(i) == shape else fit(self.dataset.image(i), shape, self.channels) for i in indices
        ]
        pixels = torch.stack(rows)
        if turned is not None:
            pixels = torch.where(turned.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return {"x": pixels.float().div_(127.5).sub_(1)}


class _AllGood:
    """Samples of one shape, every one of which can be read."""

    def alike(self, i: int, j: int) -> bool:
        return True

    def check(self, i: int) -> None:
        pass


class Numbers(_AllGood):
    """The rows of a table of numbers, or of pairs."""

    def __init__(self, dataset: VectorDataset | PairsDataset) -> None:
        self.dataset = dataset

    def batch(self, indices: list[int], turned: Tensor | None, like: int) -> dict[str, Tensor]:
        """x: B x D, or B x *shape of pairs, float32, with their noise."""
        index = torch.tensor(indices)
        noise = {"noise": self.dataset.noise[index]} if isinstance(self.dataset, PairsDataset) else {}
        return {"x": self.dataset.rows[index].float(), **noise}


class Latents(_AllGood):
    """The posteriors of cached latents."""

    def __init__(self, dataset: LatentDataset) -> None:
        self.dataset = dataset

    def batch(self, indices: list[int], turned: Tensor | None, like: int) -> dict[str, Tensor]:
        """x: the means, spread: the standard deviations, both B x channels x h x w float32."""
        mirrored = [False] * len(indices) if turned is None else turned.tolist()
        mean, std = zip(*(self.dataset.posterior(i, m) for i, m in zip(indices, mirrored, strict=True)), strict=True)
        return {"x": torch.stack(mean), "spread": torch.stack(std)}
