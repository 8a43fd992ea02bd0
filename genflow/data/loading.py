"""The order of a run's samples, and batches of them: functions of a seed and a counter, nothing else."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import signal
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from genflow.conditions import Condition
from genflow.data.images import BadImage
from genflow.data.prepared import PreparedConditions
from genflow.data.sources import Samples, Source, source_of
from genflow.errors import UserError
from genflow.functional import Rng, sent
from genflow.registry import api_export


@dataclass(frozen=True)
class Batch:
    """B samples.

    x: B x C x H x W float32 in [-1, 1], or B x D for vectors; condition: B rows, prepared; position: B int64, the place in
    the endless stream of samples, which all randomness hangs on; index: B int64, the row in the data set; ids and captions:
    B; bad: (identifier, reason) of the pictures that could not be read and were passed over; noise: as x, where the data
    set holds the noise that each sample belongs to. Of cached latents x is the means of the posteriors, as the autoencoder
    gives them, and spread their standard deviations.
    """

    x: Tensor
    condition: Condition
    position: Tensor
    index: Tensor
    ids: list[str]
    captions: list[str]
    bad: list[tuple[str, str]]
    noise: Tensor | None = None
    spread: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """On a device; position and index, which only count, stay on the CPU."""
        return self._each(lambda a: sent(a, device))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        c = self.condition
        condition = Condition(change(c.tokens), change(c.mask), change(c.pooled))
        noise, spread = (None if a is None else change(a) for a in (self.noise, self.spread))
        return replace(self, x=change(self.x), noise=noise, spread=spread, condition=condition)


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The permutation of n samples in an epoch: a function of (seed, epoch)."""
    return Rng(seed, epoch).bits("order", torch.arange(n)).argsort(stable=True)


@api_export("StreamSampler")
class StreamSampler(Sampler[list[tuple[int, int]]]):
    """One rank's micro-batches of (index, position).

    The stream of samples is endless: epoch after epoch, the order of each a permutation drawn from (seed, epoch). Each next
    batch_size of them are the batch of a step, and step s has positions s*batch_size to (s+1)*batch_size; micro-batch a
    of rank r is a contiguous part of them. So neither ranks, accumulation, workers nor a restart change what a step sees.

    Where samples have buckets, each bucket's samples gather in the order of the stream, and a batch is complete, and its
    step comes, when the bucket has batch_size of them. What is left at the end of an epoch waits for the next one.
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
        bucket: Tensor | None = None,
        order: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        """n: samples; bucket: N int64, the bucket of each; order(seed, epoch): the order of an epoch (`epoch_order`)."""
        if n < 1 or batch_size < 1:
            raise UserError(f"a batch of {batch_size} out of {n} pictures: both must be 1 or more")
        if batch_size % (world * accumulation):
            raise UserError(f"a batch of {batch_size} does not divide by {world} ranks x {accumulation} micro-batches")
        self.n, self.seed, self.batch_size, self.steps, self.start_step = n, seed, batch_size, steps, start_step
        self.accumulation, self.rank, self.world = accumulation, rank, world
        self.order = order or partial(epoch_order, n)
        self.bucket = torch.zeros(n, dtype=torch.int64) if bucket is None else bucket
        self.counts = self.bucket.bincount().tolist()

    @staticmethod
    def over(dataset: Samples, **how: Any) -> StreamSampler:
        """Of a data set, in its own order, each batch of one of its shapes. how: as of the class."""
        shapes: Tensor | None = getattr(dataset, "shapes", None)
        bucket = None if shapes is None else shapes.unique(dim=0, return_inverse=True)[1]
        return StreamSampler(len(dataset), bucket=bucket, order=getattr(dataset, "order", None), **how)

    def __len__(self) -> int:
        return max(self.steps - self.start_step, 0) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        gathered = lru_cache(maxsize=4)(self._gathered)
        micro = self.batch_size // (self.world * self.accumulation)
        which = self._complete()
        for step in range(self.start_step, self.steps):
            bucket, number = next(which)
            for a in range(self.accumulation):
                first = (a * self.world + self.rank) * micro
                keys = []
                for place in range(first, first + micro):
                    epoch, i = divmod(number * self.batch_size + place, self.counts[bucket])
                    keys.append((int(gathered(epoch)[bucket][i]), step * self.batch_size + place))
                yield keys

    def _gathered(self, epoch: int) -> list[Tensor]:
        """The samples of each bucket, in the order of an epoch."""
        order = self.order(self.seed, epoch)
        return list(order[self.bucket[order].argsort(stable=True)].split(self.counts))

    def _complete(self) -> Iterator[tuple[int, int]]:
        """(bucket, number of its batch) of each step from start_step on, by the places in the stream that complete them."""
        size = self.batch_size
        before: Callable[[int], int] = lambda epoch: sum(epoch * n // size for n in self.counts)
        most = (self.start_step + len(self.counts)) * size // self.n + 2
        first = bisect_right(range(most), self.start_step, key=before) - 1
        for epoch in itertools.count(first):
            if before(epoch + 1) == before(epoch):
                continue
            buckets = self.bucket[self.order(self.seed, epoch)]
            done = []
            for b, n in enumerate(self.counts):
                places = torch.nonzero(buckets == b).flatten()
                numbers = range(epoch * n // size, (epoch + 1) * n // size)
                done += [(int(places[(m + 1) * size - 1 - epoch * n]), b, m) for m in numbers]
            done.sort()
            for _, b, m in done[self.start_step - before(epoch) if epoch == first else 0 :]:
                yield b, m


def of_one_shape(dataset: Samples) -> bool:
    """Whether all batches of a data set are of one shape."""
    shapes: Tensor | None = getattr(dataset, "shapes", None)
    return shapes is None or bool((shapes == shapes[:1]).all())


def in_order(dataset: Samples, count: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """The first `count` samples in batches of (index, position), each of one shape; a sample's position is its index."""
    shapes: Tensor | None = getattr(dataset, "shapes", None)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in range(count):
        groups.setdefault(() if shapes is None else tuple(shapes[i].tolist()), []).append(i)
    return [[(i, i) for i in g[j : j + batch_size]] for g in groups.values() for j in range(0, len(g), batch_size)]


class _Batches(Dataset[Batch | UserError]):
    """The batch of a list of (index, position); a bad picture is replaced by the next good one."""

    def __init__(
        self, dataset: Samples, conditions: PreparedConditions, source: Source, *, flip: bool, seed: int
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
            condition=self.conditions[index],
            position=position,
            index=index,
            ids=[self.dataset.identifiers[i] for i in good],
            captions=[self.dataset.captions[i] for i in good],
            bad=bad,
            **self.source.batch(good, turned, like=keys[0][0]),
        )

    def _good(self, index: int, bad: list[tuple[str, str]]) -> int:
        """The first index from this one on whose picture can be read, of its shape if any can.

        Those passed over are added to bad.
        """
        n = len(self.dataset)
        for alike in (True, False):
            for i in ((index + offset) % n for offset in range(n)):
                if self.source.alike(i, index) is alike:
                    try:
                        self.source.check(i)
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
    own_shapes: bool = False,
    flip: bool = False,
    seed: int = 0,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches in the order of `batches` (a StreamSampler), read by `workers` processes (0: by this one).

    shape: of a sample, (C, H, H) for pictures, which are fitted to it, or (D,) for vectors. own_shapes: pictures of a data
    set with buckets are fitted to their own shapes, alike within each batch (`StreamSampler.over`, `in_order`). Raises
    UserError where no picture at all can be read, and for workers where processes cannot be forked.
    """
    source = source_of(dataset, tuple(shape), own_shapes=own_shapes)
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        raise UserError(f"workers={workers}: this system cannot fork processes; set 0")
    reader = DataLoader(
        _Batches(dataset, conditions, source, flip=flip, seed=seed),
        batch_size=None,  # an item is a batch already
        sampler=batches,
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


@contextlib.contextmanager
def lost_workers_told() -> Iterator[None]:
    """Turns torch's error of a worker that was killed, raised wherever the main process is by then, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        words = str(error).strip()
        if not words.startswith("DataLoader worker") or "shared memory" in words:
            raise
        raise UserError(
            f"{words.removesuffix('.')}. If it was for want of memory, fewer train.workers take less. Start the run again: "
            "it goes on from its newest checkpoint"
        ) from error


def _ignore_interrupts(_worker: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach every process; the main one decides, finishing its step with our batches."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
