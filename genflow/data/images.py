"""Reading one picture, whatever it is, and refusing what is none."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by orientation
MIN_SIDE = 8  # pixels: less is a tracking dot, not a picture
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


class BadImage(Exception):
    """A picture that cannot be used; its text says why."""


def decode(source: bytes | Path | Image.Image) -> Image.Image:
    """RGB or greyscale ("L") image: EXIF orientation applied, colours by their ICC profile brought to sRGB, transparency
    laid on white, 16 bits brought to 8.

    Of an animation the first frame. Raises BadImage for what is corrupt, truncated, no picture, tiny or absurdly large.
    """
    try:
        if isinstance(source, Path):
            source = source.read_bytes()
        image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
        image.load()
        if min(image.size) < MIN_SIDE:
            raise BadImage(f"only {image.width} x {image.height} pixels")
        turn = TURNS.get(orientation(image))
        return _plain(image if turn is None else image.transpose(turn))
    except BadImage:
        raise
    except OSError as error:
        raise BadImage("not a picture" if isinstance(error, UnidentifiedImageError) else _reason(error)) from error
    except Exception as error:  # PIL raises many kinds on bad data
        raise BadImage(_reason(error)) from error


def orientation(image: Image.Image) -> int:
    """By its EXIF data; 1, upright, where they cannot be read."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # PIL raises many kinds on bad data
        return 1


def _plain(image: Image.Image) -> Image.Image:
    """RGB or "L", whatever the mode. Raises ValueError for one that has no way there."""
    if image.mode.startswith(("I", "F")):
        profile, image = image.info.get("icc_profile"), _to_8_bits(image)
        image.info["icc_profile"] = profile
    image = _in_srgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        sheet = Image.new("RGBA", rgba.size, "white")
        sheet.alpha_composite(rgba)
        image = sheet
    return image if image.mode == "L" else image.convert("RGB")


def _in_srgb(image: Image.Image) -> Image.Image:
    """The colours, or the greys, that its ICC profile means; those of a profile that cannot be read stay as they are."""
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("P", "RGB"):  # a transform would forget which colour is transparent
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if profile and image.mode in ("L", "LA") and image.has_transparency_data:
        grey, alpha = image.convert("LA").split()
        grey.info["icc_profile"] = profile
        return Image.merge("LA", (_in_srgb(grey), alpha))
    if not profile or image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        return image
    try:
        transform = _to_srgb(profile, image.mode)
        moved = None if transform is None else ImageCms.applyTransform(image, transform)
        return moved.convert("L") if moved and image.mode == "L" else moved or image
    except (OSError, ImageCms.PyCMSError):
        return image


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None for a profile that is sRGB but for rounding, whatever its name: linear light is called sRGB too."""
    theirs, after = ImageCms.ImageCmsProfile(io.BytesIO(profile)), "RGB" if mode in ("L", "CMYK") else mode
    transform = ImageCms.buildTransform(theirs, ImageCms.createProfile("sRGB"), mode, after)
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    colours = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)).convert(mode)
    moved = ImageChops.difference(transform.apply(colours).convert("RGB"), colours.convert("RGB"))
    return transform if np.asarray(moved).max() > 2 else None


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, of 32 bits that hold 16 or 8, or of floats that reach 1, 255 or 65535."""
    values = np.asarray(image, dtype=np.float64)
    highest = values[np.isfinite(values)].max(initial=0)
    floats = image.mode == "F"
    likely = (1, 255) if floats else (255,) * (image.mode == "I")
    top = next((t for t in likely if highest <= (1.5 * t if floats else t)), 65535)  # resampling overshoots
    values = np.where(values == image.info.get("transparency"), top, np.nan_to_num(values, posinf=top, neginf=0))
    return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))


def fit(image: Image.Image, size: int | tuple[int, int], channels: int) -> Tensor:
    """Brought to cover `size`, a side or height and width, and cut to its centre: channels x height x width, uint8."""
    height, width = (size, size) if isinstance(size, int) else size
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        reduce = image.width > width or image.height > height
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS if reduce else Image.Resampling.BICUBIC)
    array = np.array(image).reshape(height, width, channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


class ImageDataset:
    """Captioned pictures by number.

    captions: one each; identifiers: what a log calls each; read(i): the picture as `decode` takes it, or BadImage. shapes:
    N x 2, the height and width that each is brought to in training (data/buckets.py), where they are not all of one size.
    order(seed, epoch): the order of an epoch, where it is not any permutation (data/streaming.py). files: that
    pictures lie in, where they are not files of their own.
    """

    def __init__(
        self,
        captions: list[str],
        identifiers: list[str],
        read: Callable[[int], bytes | Path | Image.Image],
        *,
        shapes: Tensor | None = None,
        order: Callable[[int, int], Tensor] | None = None,
        files: Sequence[str | Path] = (),
    ) -> None:
        self.captions = captions
        self.identifiers = identifiers
        self.read = read
        self.shapes = shapes
        self.order = order
        self.files = files

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, i: int) -> Image.Image:
        """Picture i. Raises BadImage."""
        return decode(self.read(i))

    def select(self, rows: list[int], *, shapes: Tensor | None = None) -> ImageDataset:
        """Some of the pictures. rows: increasing; shapes: of those."""
        order, place = self.order, torch.full((len(self),), -1)
        place[rows] = torch.arange(len(rows))
        return ImageDataset(
            [self.captions[i] for i in rows],
            [self.identifiers[i] for i in rows],
            lambda i: self.read(rows[i]),
            shapes=shapes,
            order=order and (lambda seed, epoch: (kept := place[order(seed, epoch)])[kept >= 0]),
            files=self.files,
        )
