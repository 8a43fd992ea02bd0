"""The order of a run's samples, and batches of them: functions of a seed and a counter, nothing else."""

from __future__ import annotations

import mmap
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from genflow.conditions import Condition
from genflow.data.images import BadImage, ImageDataset, fit
from genflow.data.pairs import PairsDataset, Rows
from genflow.data.prepared import PreparedConditions
from genflow.data.vectors import VectorDataset
from genflow.errors import UserError
from genflow.functional import Rng
from genflow.registry import api_export

Samples = ImageDataset | VectorDataset | PairsDataset
MEMORY = 512 * 2**20  # bytes of decoded pictures kept


@dataclass(frozen=True)
class Batch:
    """B samples.

    x: B x C x H x W float32 in [-1, 1], or B x D for vectors; condition: B rows, prepared; position: B int64, the place in
    the endless stream of samples, which all randomness hangs on; index: B int64, the row in the data set; ids and captions:
    B; bad: (identifier, reason) of the pictures that could not be read and were passed over; noise: as x, where the data
    set holds the noise that each sample belongs to.
    """

    x: Tensor
    condition: Condition
    position: Tensor
    index: Tensor
    ids: list[str]
    captions: list[str]
    bad: list[tuple[str, str]]
    noise: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """On a device; position and index, which only count, stay on the CPU."""
        x = self.x.to(device, non_blocking=True)
        noise = None if self.noise is None else self.noise.to(device, non_blocking=True)
        return replace(self, x=x, noise=noise, condition=self.condition.to(device))

    def pin_memory(self) -> Batch:
        c = self.condition
        condition = Condition(c.tokens.pin_memory(), c.mask.pin_memory(), c.pooled.pin_memory())
        noise = None if self.noise is None else self.noise.pin_memory()
        return replace(self, x=self.x.pin_memory(), noise=noise, condition=condition)


@api_export("StreamSampler")
class StreamSampler(Sampler[list[tuple[int, int]]]):
    """One rank's micro-batches of (index, position).

    The stream of samples is endless: position p is place p mod n of epoch p // n, whose order is a permutation drawn
    from (seed, epoch). Step s takes positions s*batch_size to (s+1)*batch_size; micro-batch a of rank r is a contiguous
    part of them. So neither ranks, accumulation, workers nor a restart change what a step sees.
    """

    def __init__(
        self,
        n: int,
        *,
        seed: int,
        batch_size: int,
        steps: int,
        start_step: int = 0,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if n < 1 or batch_size < 1:
            raise UserError(f"a batch of {batch_size} out of {n} pictures: both must be 1 or more")
        if batch_size % (world * accumulation):
            raise UserError(f"a batch of {batch_size} does not divide by {world} ranks x {accumulation} micro-batches")
        self.n, self.seed, self.batch_size, self.steps, self.start_step = n, seed, batch_size, steps, start_step
        self.accumulation, self.rank, self.world = accumulation, rank, world

    def __len__(self) -> int:
        return max(self.steps - self.start_step, 0) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = lru_cache(maxsize=2)(lambda epoch: epoch_order(self.n, self.seed, epoch))
        micro = self.batch_size // (self.world * self.accumulation)
        for step in range(self.start_step, self.steps):
            for a in range(self.accumulation):
                first = step * self.batch_size + (a * self.world + self.rank) * micro
                yield [(int(order(p // self.n)[p % self.n]), p) for p in range(first, first + micro)]


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The permutation of n samples in an epoch: a function of (seed, epoch)."""
    return Rng(seed, epoch).bits("order", torch.arange(n)).argsort(stable=True)


class _Pictures:
    """Fitted pictures by index; those of a small data set are decoded once, for all worker processes together."""

    def __init__(self, dataset: ImageDataset, *, size: int, channels: int) -> None:
        self.dataset, self.size, self.channels = dataset, size, channels
        self.bad: dict[int, BadImage] = {}
        n, each = len(dataset), channels * size**2
        self.keeps = 0 < n * each <= MEMORY
        if self.keeps:  # anonymous shared maps: forked processes see each other's work
            self.kept = torch.frombuffer(mmap.mmap(-1, n * each), dtype=torch.uint8).view(n, channels, size, size)
            self.known = torch.frombuffer(mmap.mmap(-1, n), dtype=torch.bool)
            self.lock = multiprocessing.Lock()

    def __getitem__(self, index: int) -> Tensor:
        """channels x size x size, uint8. Raises BadImage."""
        if index in self.bad:
            raise self.bad[index]
        if self.keeps:
            with self.lock:
                known = bool(self.known[index])
            if known:
                return self.kept[index]
        try:
            pixels = fit(self.dataset.image(index), self.size, self.channels)
        except BadImage as error:
            self.bad[index] = error
            raise
        if self.keeps:
            self.kept[index] = pixels
            with self.lock:
                self.known[index] = True
        return pixels

    def batch(self, indices: list[int], turned: Tensor | None) -> Tensor:
        """B x C x H x W float32 in [-1, 1]; those where turned is True mirrored."""
        pixels = torch.stack([self[i] for i in indices])
        if turned is not None:
            pixels = torch.where(turned.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return pixels.float().div_(127.5).sub_(1)


class _Rows:
    """The rows of a table of numbers, or of pairs, which are all good."""

    def __init__(self, rows: Tensor | Rows) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]

    def batch(self, indices: list[int], turned: Tensor | None) -> Tensor:
        """B x D, or B x *shape of pairs, float32."""
        return self.rows[torch.tensor(indices)].float()


class _Batches(Dataset[Batch | UserError]):
    """The batch of a list of (index, position); a bad picture is replaced by the next good one."""

    def __init__(
        self, dataset: Samples, conditions: PreparedConditions, source: _Pictures | _Rows, *, flip: bool, seed: int
    ) -> None:
        self.dataset, self.conditions, self.source, self.flip, self.seed = dataset, conditions, source, flip, seed

    def __getitem__(self, keys: list[tuple[int, int]]) -> Batch | UserError:
        bad: list[tuple[str, str]] = []
        try:
            good = [self._good(index, bad) for index, _ in keys]
        except UserError as error:
            return error  # raised by the reader: what a worker raises comes with its traceback
        index, position = torch.tensor(good), torch.tensor([p for _, p in keys])
        turned = Rng(self.seed).uniform("flip", position) < 0.5 if self.flip else None
        return Batch(
            x=self.source.batch(good, turned),
            condition=self.conditions[index],
            position=position,
            index=index,
            ids=[self.dataset.identifiers[i] for i in good],
            captions=[self.dataset.captions[i] for i in good],
            bad=bad,
            noise=self.dataset.noise[index] if isinstance(self.dataset, PairsDataset) else None,
        )

    def _good(self, index: int, bad: list[tuple[str, str]]) -> int:
        """The first index from this one on whose picture can be read; those passed over are added to bad."""
        n = len(self.dataset)
        for i in ((index + offset) % n for offset in range(n)):
            try:
                self.source[i]
                return i
            except BadImage as error:
                bad.append((self.dataset.identifiers[i], str(error)))
        raise UserError(f"none of the {n} pictures can be read; {bad[-n][0]}: {bad[-n][1]}")


@api_export("loader")
def loader(
    dataset: Samples,
    conditions: PreparedConditions,
    batches: Iterable[list[tuple[int, int]]],
    *,
    shape: Sequence[int],
    flip: bool = False,
    seed: int = 0,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches in the order of `batches` (a StreamSampler), read by `workers` processes (0: by this one).

    shape: of a sample, (C, H, H) for pictures, which are fitted to it, or (D,) for vectors. Raises UserError where no
    picture at all can be read, and for workers where processes cannot be forked.
    """
    source: _Pictures | _Rows
    if isinstance(dataset, ImageDataset):
        channels, size, _ = shape
        if size < 1 or channels not in (1, 3):
            raise UserError(f"data: size={size} must be 1 or more, channels={channels} must be 1 or 3")
        source = _Pictures(dataset, size=size, channels=channels)
    else:
        source = _Rows(dataset.rows)
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        raise UserError(f"workers={workers}: this system cannot fork processes; set 0")
    reader = DataLoader(
        _Batches(dataset, conditions, source, flip=flip, seed=seed),
        batch_size=None,  # an item is a batch already
        sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # data sets close over open files and memory
        worker_init_fn=_ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
    )
    return _raising(reader)


def _raising(reader: Iterable[Batch | UserError]) -> Iterator[Batch]:
    for batch in reader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _as_it_is(item: Any) -> Any:
    return item


def _ignore_interrupts(_worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one decides, finishing its step with our batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
