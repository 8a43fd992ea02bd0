"""What is in a data set of pictures: how many, how large, which kinds, which broken, which twice, and what captions say."""

from __future__ import annotations

import hashlib
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from genflow.data.images import ImageDataset, _reason, decode, orientation
from genflow.data.pictures import Picture, caption_grid, write_atomic
from genflow.errors import UserError
from genflow.registry import api_export

ASPECTS = ((9, 16), (2, 3), (3, 4), (4, 5), (1, 1), (5, 4), (4, 3), (3, 2), (16, 9))  # width : height, of the histogram
SHEET, CELL = 64, 96  # pictures on the contact sheet, and their side in pixels
SHOWN = 10  # of a list, in the text; inspect.json has all


@dataclass(frozen=True)
class _Seen:
    """One picture that was looked at; reason: why it cannot be used, else None."""

    reason: str | None = None
    size: tuple[int, int] = (0, 0)  # width, height, as it is shown
    format: str = ""
    traits: tuple[str, ...] = ()
    digest: str = ""  # of its pixels
    thumbnail: Image.Image | None = None


@api_export("Inspection")
@dataclass(frozen=True)
class Inspection:
    """What `inspect_data` found.

    pictures: in the data set; looked_at: so many of them; broken: (identifier, reason); formats, traits: how many are of
    each (JPEG, PNG, ...; animated, alpha, CMYK, 16-bit, rotated by EXIF, grey); width, height, aspect (of width to height),
    words, characters: (least, median, most); aspects: how many are nearest to each ratio; enlarged: smaller than the size
    that the data set asks for; duplicates: identifiers of pictures of the same pixels; captions: distinct ones; uncaptioned:
    empty ones; scripts: captions by the script that most of their letters are of.
    """

    pictures: int
    looked_at: int
    broken: list[tuple[str, str]]
    formats: dict[str, int]
    traits: dict[str, int]
    width: tuple[float, float, float]
    height: tuple[float, float, float]
    aspect: tuple[float, float, float]
    aspects: dict[str, int]
    enlarged: int
    duplicates: list[list[str]]
    captions: int
    uncaptioned: int
    words: tuple[float, float, float]
    characters: tuple[float, float, float]
    scripts: dict[str, int]

    def report(self) -> str:
        """For people."""
        seen = "" if self.looked_at == self.pictures else f", {self.looked_at} looked at"
        lines = [f"{self.pictures} pictures{seen}, {len(self.broken)} broken"]
        lines += [f"  {name}: {reason}" for name, reason in self.broken[:SHOWN]] + _more(self.broken)
        lines += [f"formats: {_counts(self.formats)}"] + [f"kinds: {_counts(self.traits)}"] * bool(self.traits)
        if self.looked_at > len(self.broken):
            for what in ("width", "height", "aspect"):
                lines.append(f"{what}: {_spread(getattr(self, what))}")
            most = max(self.aspects.values())
            lines += [
                f"  {name:>5} {count:>7} {'#' * round(40 * count / most)}" for name, count in self.aspects.items()
            ]
        if self.enlarged:
            lines.append(f"{self.enlarged} are smaller than the size asked for, and would be enlarged")
        copies = sum(len(group) - 1 for group in self.duplicates)
        lines.append(f"{copies} copies of other pictures" + ":" * bool(copies))
        lines += [f"  {' = '.join(group[:4])}" for group in self.duplicates[:SHOWN]] + _more(self.duplicates)
        lines.append(f"captions: {self.captions} distinct, {self.uncaptioned} empty")
        lines += [f"  {what}: {_spread(getattr(self, what))}" for what in ("words", "characters")]
        lines += [f"  scripts: {_counts(self.scripts)}"] * bool(self.scripts)
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Write inspect.json. Raises UserError where the disk refuses."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_atomic(folder / "inspect.json", lambda file: file.write(text.encode("utf-8", errors="replace")))


@api_export("inspect_data")
def inspect_data(
    dataset: ImageDataset, *, size: int | None = None, limit: int | None = None
) -> tuple[Inspection, Picture | None]:
    """Look at every picture of a data set, or at `limit` of them, evenly spread; what it holds, and a contact sheet.

    size: what the data set asks for where it has no buckets, to count the pictures below it. There is no sheet where no
    picture can be read. Raises UserError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit = {limit} leaves no picture to look at; the least is 1")
    chosen = _spread_out(len(dataset), limit or len(dataset))
    shown = set(_spread_out(len(chosen), min(SHEET, len(chosen))))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders let go of the interpreter
        look: Callable[[int], _Seen] = lambda place: _look(dataset, chosen[place], thumbnail=place in shown)
        seen = list(tqdm(pool.map(look, range(len(chosen))), total=len(chosen), desc="pictures", disable=None))
    names = [dataset.identifiers[i] for i in chosen]
    good = [one for one in seen if one.reason is None]
    same: dict[str, list[str]] = {}
    for name, one in zip(names, seen, strict=True):
        if one.reason is None:
            same.setdefault(one.digest, []).append(name)
    captions = dataset.captions
    found = Inspection(
        pictures=len(dataset),
        looked_at=len(chosen),
        broken=[(name, one.reason) for name, one in zip(names, seen, strict=True) if one.reason is not None],
        formats=_count(one.format for one in good),
        traits=_count(trait for one in good for trait in one.traits),
        width=_extent(one.size[0] for one in good),
        height=_extent(one.size[1] for one in good),
        aspect=_extent(one.size[0] / one.size[1] for one in good),
        aspects=_aspects(good),
        enlarged=sum(
            one.size[1] < height or one.size[0] < width
            for one, (height, width) in zip(seen, _asked(dataset, chosen, size or 0), strict=True)
            if one.reason is None
        ),
        duplicates=[group for group in same.values() if len(group) > 1],
        captions=len({c for c in captions if c.strip()}),
        uncaptioned=sum(not c.strip() for c in captions),
        words=_extent(len(c.split()) for c in captions),
        characters=_extent(len(c) for c in captions),
        scripts=_count(script for c in captions if (script := script_of(c))),
    )
    kept = [(one.thumbnail, captions[i]) for i, one in zip(chosen, seen, strict=True) if one.thumbnail is not None]
    return found, _sheet(kept) if kept else None


def _asked(dataset: ImageDataset, chosen: list[int], size: int) -> list[list[int]]:
    """Height and width that each of these pictures is brought to in training."""
    return [[size, size]] * len(chosen) if dataset.shapes is None else dataset.shapes[chosen].tolist()


def _look(dataset: ImageDataset, i: int, *, thumbnail: bool) -> _Seen:
    try:
        source = dataset.read(i)
        if isinstance(source, Path):
            source = source.read_bytes()
        image = decode(source)
        header = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
        traits = tuple(_traits(header))
    except Exception as error:  # PIL raises many kinds on bad data
        return _Seen(reason=_reason(error))
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()
    return _Seen(
        size=image.size,
        format=header.format or "pixels",
        traits=traits,
        digest=digest,
        thumbnail=ImageOps.pad(image.convert("RGB"), (CELL, CELL), color="white") if thumbnail else None,
    )


def _traits(header: Any) -> Iterator[str]:
    """What needs care in a picture that was opened and not yet read."""
    if getattr(header, "n_frames", 1) > 1:
        yield "animated"
    if header.mode == "CMYK":
        yield "CMYK"
    if header.mode.startswith(("I", "F")) or any(";16" in str(tile[3]) for tile in getattr(header, "tile", ())):
        yield "16-bit"
    if orientation(header) != 1:
        yield "rotated by EXIF"
    if header.has_transparency_data:
        yield "alpha"
    if header.mode in ("1", "L", "LA"):
        yield "grey"


def script_of(text: str) -> str | None:
    """The script that most letters of a text are of, by their Unicode names ("latin", "cjk"); None without letters."""
    names = Counter(unicodedata.name(c, "unknown").split()[0].lower() for c in text if c.isalpha())
    return names.most_common(1)[0][0].replace("hiragana", "kana").replace("katakana", "kana") if names else None


def _aspects(seen: Iterable[_Seen]) -> dict[str, int]:
    """How many are nearest, on a scale of ratios, to each of ASPECTS."""
    counts = dict.fromkeys((f"{w}:{h}" for w, h in ASPECTS), 0)
    for one in seen:
        ratio = one.size[0] / one.size[1]
        w, h = min(ASPECTS, key=lambda a: max(a[0] / a[1] / ratio, ratio * a[1] / a[0]))
        counts[f"{w}:{h}"] += 1
    return counts


def _sheet(pictures: Sequence[tuple[Image.Image, str]]) -> Picture:
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image, _ in pictures]
    x = torch.stack(pixels).view(-1, CELL, CELL, 3).permute(0, 3, 1, 2) / 127.5 - 1
    return caption_grid(x, [caption for _, caption in pictures], columns=8)


def _spread_out(n: int, count: int) -> list[int]:
    """`count` of the numbers below n, evenly spread; all of them where there are no more."""
    return [i * n // count for i in range(count)] if count < n else list(range(n))


def _extent(values: Iterable[float]) -> tuple[float, float, float]:
    values = sorted(values)
    return (values[0], median(values), values[-1]) if values else (0, 0, 0)


def _count(things: Iterable[str]) -> dict[str, int]:
    return dict(Counter(things).most_common())


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _spread(extent: tuple[float, float, float]) -> str:
    least, middle, most = extent
    return f"{least:.4g} to {most:.4g}, median {middle:.4g}"


def _more(things: Sequence[object]) -> list[str]:
    return [f"  and {len(things) - SHOWN} more (inspect.json)"] if len(things) > SHOWN else []
