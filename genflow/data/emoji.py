"""The captioned emoji that come with the package: 32 pixels, three drawing styles, splits that test composition."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from genflow.data.images import ImageDataset
from genflow.errors import UserError, nearest
from genflow.registry import dataset_export

FILE = Path(__file__).parent / "embedded" / "emoji32.parquet"


@dataset_export("emoji")
@dataclass(frozen=True)
class EmojiConfig:
    """Noto and Fluent emoji, embedded (genflow/data/embedded/NOTICE), 32 pixels.

    styles: of noto, fluent3d, fluentflat; groups: of Unicode's (smileys-emotion, animals-nature, ...); empty means all.
    caption: "caption" is the thing ("otter"), "prompt" names the style too ("a Noto emoji of otter"). limit: the first
    so many of a fixed shuffled order. Splits: train, test_pair (things seen in other styles only), test_concept (things
    never seen).
    """

    size: int = 32
    styles: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    caption: Literal["caption", "prompt"] = "prompt"
    limit: int | None = None
    flip: bool = False

    channels: ClassVar[int] = 3

    def build(self, split: str = "train") -> ImageDataset:
        """The pictures of a split; "test" is test_pair. Raises UserError for an unknown split, style or group."""
        import pyarrow.parquet as pq

        if self.limit is not None and self.limit < 1:
            raise UserError(f"data emoji: limit={self.limit} leaves no picture; give 1 or more")
        rows = pq.read_table(FILE).to_pylist()
        split = "test_pair" if split == "test" else split
        for what, asked in (("split", (split,)), ("style", self.styles), ("group", self.groups)):
            known = {r[what] for r in rows}
            if wrong := [name for name in asked if name not in known]:
                raise UserError(f"data emoji: no {what} {wrong[0]!r}.{nearest(wrong[0], known)}")
        rows = [
            r
            for r in rows
            if r["split"] == split
            and (not self.styles or r["style"] in self.styles)
            and (not self.groups or r["group"] in self.groups)
        ]
        rows.sort(key=lambda r: hashlib.sha256(f"{r['style']} {r['hexcode']}".encode()).digest())
        rows = rows[: self.limit]
        if not rows:
            raise UserError(f"data emoji: no picture is left in split {split!r} with these styles, groups and limit")
        return ImageDataset(
            [r[self.caption] for r in rows],
            [f"{r['style']}/{r['hexcode']}" for r in rows],
            lambda i: rows[i]["image"],
            files=[FILE],
        )
