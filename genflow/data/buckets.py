"""Aspect-ratio buckets: pictures of about one area in a few shapes, so that a batch has one shape and little is cut off.

As in SDXL (Podell et al. 2023, arXiv 2307.01952, sec. 2.3 and app. I).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile
from torch import Tensor
from tqdm import tqdm

from genflow.cachedir import cache_folder
from genflow.data.images import BadImage, ImageDataset, orientation
from genflow.data.pictures import write_atomic
from genflow.errors import UserError

TURNED = (5, 6, 7, 8)  # orientations that swap width and height
CHECKED = 16  # of the sizes that were kept, read again
ENDS = 2**16  # bytes


@dataclass(frozen=True)
class Buckets:
    """Which shapes pictures are brought to: sides are multiples of `step`, areas at most size x size.

    step: pixels; a multiple of the autoencoder's factor times the patch size. ratio: of the longer side to the shorter one,
    at most. upscale: a picture that would have to be enlarged by more than this factor is left out, with a count. Each
    picture goes to the shape whose ratio is nearest to its own, is brought to cover it and cut to its centre.

    Every picture is seen once an epoch. A batch of a shape that has fewer pictures than a batch fills up over several
    epochs: none is left out or cut further for that, but one may stand in it more than once.
    """

    step: int = 64
    ratio: float = 2.0
    upscale: float = 1.0

    def __post_init__(self) -> None:
        if self.step < 1:
            raise UserError(f"step = {self.step} is too few; try 64")
        if not 1 < self.ratio < math.inf:
            raise UserError(f"ratio = {self.ratio} must be more than 1, and finite; try 2")
        if not 1 <= self.upscale < math.inf:
            raise UserError(f"upscale = {self.upscale} must be 1 or more, and finite")

    def shapes(self, size: int) -> list[tuple[int, int]]:
        """Heights and widths, those of the largest area for either side. Raises UserError where there is but one."""
        step, area = self.step, size * size
        sides = range(step, int(size * self.ratio**0.5) + 1, step)
        pairs = {(side, area // side // step * step) for side in sides}
        pairs = {pair for p in pairs for pair in (p, p[::-1]) if max(pair) <= self.ratio * min(pair)}
        larger = {p for p in pairs if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in pairs)}
        if len(larger) < 2:
            only = "no shape" if not larger else "one shape"
            near = max(1, 2 ** int(math.log2(max(size / 8, 1))))
            more = " and ratio = 2" if self.ratio < 1.3 else ""  # (8 + 1) / (8 - 1): of the next shape but a square
            raise UserError(
                f"buckets: step = {step} and ratio = {self.ratio:g} leave {only} of size {size}; try step = {near}{more}"
            )
        return sorted(larger)

    def assign(self, sizes: Tensor, size: int) -> Tensor:
        """The shape for each picture, N x 2: height and width, or zeros for one that is too small. sizes: N x 2, alike."""
        shapes = torch.tensor(self.shapes(size))
        ratio = lambda s: (s[:, 0] / s[:, 1]).log()
        nearest = (ratio(sizes)[:, None] - ratio(shapes)[None]).abs().argmin(1)
        chosen = shapes[nearest]
        factor = (chosen / sizes).amax(1)
        return torch.where((factor <= self.upscale)[:, None], chosen, 0)


def bucketed(dataset: ImageDataset, buckets: Buckets | None, size: int) -> ImageDataset:
    """The data set with a shape for each picture, without those that are too small: a warning counts them.

    Reads the head of every picture, once; one without a readable head goes to the commonest shape, to be found bad when it
    is read. Raises UserError where no picture is left.
    """
    if buckets is None:
        return dataset
    sizes = _sizes(dataset)
    unread = sizes[:, 0] == 0
    shapes = buckets.assign(torch.where(unread[:, None], size, sizes), size)
    common, counts = shapes[~unread & (shapes[:, 0] > 0)].unique(dim=0, return_counts=True)
    if len(common):
        shapes[unread] = common[counts.argmax()]
    kept = torch.nonzero(shapes[:, 0]).flatten().tolist()
    left = len(dataset) - len(kept)
    if not kept:
        raise UserError(
            f"buckets: all {left} pictures are smaller than size {size} takes without enlarging by more than "
            f"{buckets.upscale:g}; lower data.size or raise data.buckets.upscale"
        )
    if left:
        warnings.warn(
            f"buckets: {left} of {len(dataset)} pictures are left out, as they would be enlarged by more than "
            f"{buckets.upscale:g}",
            stacklevel=2,
        )
    return dataset.select(kept, shapes=shapes[kept])


def stamps(dataset: ImageDataset) -> list[tuple[int, int]]:
    """Length and time of change of every picture, where pictures are files of their own; zeros of one that is not there."""
    found = []
    for i in range(len(dataset)):
        try:
            if not isinstance(path := dataset.read(i), Path):
                return []
            about = path.stat()
            found.append((about.st_size, about.st_mtime_ns))
        except (OSError, BadImage):
            found.append((0, 0))
    return found


def digests(dataset: ImageDataset) -> list[str]:
    """What tells the content of each of `dataset.files`, and survives a copy: of its length, its beginning and its end."""
    return [digest(name) for name in dataset.files]


def digest(name: str | Path) -> str:
    """Of one file. Raises OSError."""
    with open(name, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        content = hashlib.sha256(str(length).encode())
        for place in (0, max(length - ENDS, 0)):
            file.seek(place)
            content.update(file.read(ENDS))
    return content.hexdigest()


def _sizes(dataset: ImageDataset) -> Tensor:
    """Height and width of each picture as it is shown, N x 2; zeros where its head cannot be read.

    They are kept in the cache folder, by identifiers, captions and what tells files, and taken from there where a few of
    them still hold.
    """
    n = len(dataset)
    listing = json.dumps([dataset.identifiers, dataset.captions, stamps(dataset), digests(dataset)]).encode()
    file = cache_folder() / "sizes" / f"{hashlib.sha256(listing).hexdigest()[:24]}.json"
    kept: list[tuple[int, int]] | None
    try:
        kept = [(height, width) for height, width in json.loads(file.read_text())]
        if any(kept[i] != _size(dataset, i) for i in range(0, n, max(n // CHECKED, 1))):
            kept = None
    except (OSError, ValueError, TypeError, IndexError):
        kept = None
    if kept is None:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(partial(_size, dataset), range(n))
            kept = list(tqdm(found, total=n, desc="sizes", leave=False, disable=None))
        text = json.dumps(kept).encode()
        with contextlib.suppress(UserError):  # a disk that takes no more costs a second reading, not the run
            write_atomic(file, lambda out: out.write(text))
    return torch.tensor(kept)


def _size(dataset: ImageDataset, i: int) -> tuple[int, int]:
    """Height and width of a picture as it is shown, from its head; zeros where that cannot be read."""
    try:
        source = dataset.read(i)
        opened = io.BytesIO(source) if isinstance(source, bytes) else source
        image = opened if isinstance(opened, Image.Image) else Image.open(opened)
        turned = orientation(image) in TURNED
        width, height = image.size
        if isinstance(image, TiffImageFile):  # whose size some Pillows turn on opening, some on reading
            width, height = (image.tag_v2[tag] for tag in (IMAGEWIDTH, IMAGELENGTH))
        if isinstance(source, Path):
            image.close()
        return (width, height) if turned else (height, width)
    except Exception:  # PIL raises many kinds on bad data; the reader will say which
        return 0, 0
