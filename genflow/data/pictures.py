"""Pictures for people: PNG files that say how they were made, and captioned grids."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from genflow.errors import UserError
from genflow.functional import check_levels
from genflow.registry import api_export
from genflow.saving import replacing

METADATA = "genflow"  # the PNG text field


@dataclass(frozen=True)
class Picture:
    """A PIL image and the settings that made it."""

    image: Image.Image
    settings: Mapping[str, object]

    def save_atomic(self, path: Path) -> None:
        """Write a PNG, whole or not at all. Raises UserError where the disk refuses."""
        info = PngInfo()
        if self.settings:
            info.add_itxt(METADATA, json.dumps(self.settings, ensure_ascii=False))
        write_atomic(path, lambda file: self.image.save(file, "PNG", pnginfo=info))


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """A file, whole or not at all. Raises UserError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, flushed=False) as temporary, temporary.open("wb") as file:
            write(file)
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}") from error


@api_export("to_picture")
def to_picture(x: Tensor, settings: Mapping[str, object] | None = None) -> Picture:
    """x: C x H x W in [-1, 1], C = 1 or 3. Returns an 8-bit picture. Raises UserError for what is none."""
    if x.dim() != 3 or x.shape[0] not in (1, 3):
        size = " x ".join(map(str, x.shape))
        raise UserError(f"a picture is 1 or 3 x H x W, not {size}; of a batch give one, x[0], or all to caption_grid")
    check_levels(x)
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    if pixels.shape[0] == 1:
        pixels = pixels.expand(3, -1, -1)
    return Picture(Image.fromarray(pixels.permute(1, 2, 0).numpy()), settings or {})


@api_export("read_settings")
def read_settings(path: str | Path) -> dict[str, object]:
    """The settings written into a PNG by genflow. Raises UserError where there are none."""
    try:
        with Image.open(path) as image:
            settings = json.loads(getattr(image, "text", {}).get(METADATA, "null"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or 'not a picture'}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its genflow settings are damaged ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: this picture carries no genflow settings")
    return settings


def font_for(captions: Sequence[str]) -> Any:
    """Pillow's own font, or for words beyond ASCII, of which it has next to none, matplotlib's.

    Neither has Chinese, Japanese or Korean letters: they are drawn as boxes.
    """
    if all(map(str.isascii, captions)):
        return ImageFont.load_default(11)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 10)


@api_export("caption_grid")
def caption_grid(
    images: Tensor,
    captions: Sequence[str],
    *,
    columns: int | None = None,
    cell: int = 96,
    settings: Mapping[str, object] | None = None,
) -> Picture:
    """A grid of pictures, each over its caption.

    images: B x C x H x W in [-1, 1]; small ones are enlarged to about `cell` pixels. columns: by default, a square.
    Raises UserError for other than one caption for each.
    """
    if len(captions) != len(images):
        raise UserError(f'{len(captions)} captions for {len(images)} pictures; give one for each, or ""')
    columns = columns or min(8, max(1, round(len(images) ** 0.5)))
    height, width = images.shape[-2:]
    zoom = max(1, cell // max(height, width))
    w, h, font = width * zoom, height * zoom, font_for(captions)
    chars, line = max(w // 6, 4), 13
    lines = [textwrap.wrap(c.replace("\0", " "), chars, max_lines=2, placeholder="…") for c in captions]
    text_height = line * max((len(each) for each in lines), default=0) + 4
    rows = -(-len(images) // columns)
    pad = 6
    sheet = Image.new("RGB", (columns * (w + pad) + pad, rows * (h + text_height + pad) + pad), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (x, caption) in enumerate(zip(images, lines, strict=True)):
        left, top = pad + i % columns * (w + pad), pad + i // columns * (h + text_height + pad)
        sheet.paste(to_picture(x).image.resize((w, h), Image.Resampling.NEAREST), (left, top))
        for j, part in enumerate(caption):
            draw.text((left + w / 2, top + h + 2 + j * line), part, fill="black", font=font, anchor="ma")
    return Picture(sheet, settings or {})
