"""Reading one picture, whatever it is, and refusing what is none."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MIN_SIDE = 8  # pixels: less is a tracking dot, not a picture
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


class BadImage(Exception):
    """A picture that cannot be used; its text says why."""


def decode(source: bytes | Path | Image.Image) -> Image.Image:
    """RGB or greyscale ("L") image: EXIF orientation applied, transparency laid on white, 16 bits brought to 8.

    Raises BadImage for what is corrupt, truncated, no picture, tiny or absurdly large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Path):
                source = source.read_bytes()
            image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
            image.load()
            image = ImageOps.exif_transpose(image)
    except OSError as error:
        raise BadImage("not a picture" if isinstance(error, UnidentifiedImageError) else _reason(error)) from error
    except Exception as error:  # PIL raises many kinds on bad data
        raise BadImage(_reason(error)) from error
    if min(image.size) < MIN_SIDE:
        raise BadImage(f"only {image.width} x {image.height} pixels")
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        sheet = Image.new("RGBA", rgba.size, "white")
        sheet.alpha_composite(rgba)
        image = sheet
    return image if image.mode == "L" else image.convert("RGB")


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, of 32 bits that hold 16 or 8, or of floats that reach 1, 255 or 65535."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode.startswith("I;16"):
        top = 65535
    else:
        top = next((t for t in (1, 255) if values.max() <= t and (t > 1 or image.mode == "F")), 65535)
    return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))


def fit(image: Image.Image, size: int, channels: int) -> Tensor:
    """Shorter side to `size`, centre crop: channels x size x size, uint8."""
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        reduce = image.width > size or image.height > size
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS if reduce else Image.Resampling.BICUBIC)
    array = np.array(image).reshape(size, size, channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


class ImageDataset:
    """Captioned pictures by number.

    captions: one each; identifiers: what a log calls each; read(i): the picture as `decode` takes it, or BadImage.
    """

    def __init__(
        self,
        captions: list[str],
        identifiers: list[str],
        read: Callable[[int], bytes | Path | Image.Image],
    ) -> None:
        self.captions = captions
        self.identifiers = identifiers
        self._read = read

    def __len__(self) -> int:
        return len(self.captions)

    def caption(self, i: int) -> str:
        return self.captions[i]

    def image(self, i: int) -> Image.Image:
        """Picture i. Raises BadImage."""
        return decode(self._read(i))
