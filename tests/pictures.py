"""Pictures as the bytes of their files, for tests of data."""

from __future__ import annotations

import io

from PIL import Image


def png(color: str | tuple | int = "red", size: tuple[int, int] = (16, 16), mode: str = "RGB", **save: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, "PNG", **save)
    return out.getvalue()
