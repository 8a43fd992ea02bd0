"""What is in a data set: `genflow data inspect`, on pictures of every kind that needs care."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genflow.cli import main
from genflow.data.folders import FolderConfig
from genflow.data.images import decode
from genflow.data.inspect import ASPECTS, inspect_data, script_of
from genflow.errors import UserError


def encoded(image: Image.Image, kind: str, **save: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **save)
    return out.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (16, 12), c) for c in ("red", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


def rotated() -> bytes:
    """Stored 16 x 12 with the left half red; shown it is 12 x 16 with the upper half red."""
    image = Image.new("RGB", (16, 12), "blue")
    image.paste("red", (0, 0, 8, 12))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    return encoded(image, "PNG", exif=exif)


def alpha() -> bytes:
    image = Image.new("RGBA", (12, 12), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 6, 12))
    return encoded(image, "PNG")


def deep() -> bytes:
    return encoded(Image.fromarray(np.full((12, 12), 32768, dtype=np.uint16)), "PNG")


def deep_tiff() -> bytes:
    """A grey gradient of 16 bits as a TIFF."""
    return encoded(Image.fromarray(np.tile(np.arange(16, dtype=np.uint16) * 4369, (16, 1))), "TIFF")


KINDS = {
    "a.gif": animated("GIF"),
    "b.webp": animated("WEBP"),
    "c.jpg": encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95),
    "d.png": deep(),
    "e.tif": deep_tiff(),
    "f.png": rotated(),
    "g.png": alpha(),
    "h.png": encoded(Image.new("L", (16, 16), 128), "PNG"),
}


@pytest.fixture()
def folder(tmp_path) -> Path:
    for name, data in KINDS.items():
        (tmp_path / name).write_bytes(data)
    captions = ["a red square", "", "красный квадрат", "赤い四角", "مربع", "a red square", "1 2 3", "grey"]
    for name, caption in zip(KINDS, captions, strict=True):
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    (tmp_path / "broken.png").write_bytes(KINDS["g.png"][:40])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "twin.png").write_bytes(encoded(Image.new("L", (16, 16), 128), "PNG", compress_level=0))
    Image.new("RGB", (64, 36), "teal").save(tmp_path / "wide.jpg")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "size", "pixels"),
    [
        ("a.gif", (16, 12), {(3, 3): (255, 0, 0)}),
        ("b.webp", (16, 12), {(3, 3): (255, 0, 0)}),
        ("c.jpg", (16, 16), {(8, 8): (255, 0, 0)}),
        ("d.png", (12, 12), {(5, 5): 128}),
        ("e.tif", (16, 16), {(0, 0): 0, (5, 3): 85, (15, 3): 255}),
        ("f.png", (12, 16), {(6, 2): (255, 0, 0), (6, 13): (0, 0, 255)}),
        ("g.png", (12, 12), {(2, 6): (255, 0, 0), (10, 6): (255, 255, 255)}),
    ],
)
def test_every_kind_is_read_as_it_is_shown(name, size, pixels):
    image = decode(KINDS[name])
    assert image.size == size
    for place, value in pixels.items():
        assert np.abs(np.subtract(image.getpixel(place), value)).max() <= 2


def test_everything_is_counted(folder):
    found, sheet = inspect_data(FolderConfig(str(folder)).build(), size=16)
    assert (found.pictures, found.looked_at) == (12, 12)
    assert dict(found.broken).keys() == {"broken.png", "text.jpg"}
    assert dict(found.broken)["text.jpg"] == "not a picture"
    assert found.formats == {"PNG": 5, "JPEG": 2, "GIF": 1, "WEBP": 1, "TIFF": 1}
    assert found.traits == {"animated": 2, "CMYK": 1, "16-bit": 2, "rotated by EXIF": 1, "alpha": 1, "grey": 2}
    assert found.width == (12, 16, 64) and found.height == (12, 16, 36)
    assert found.aspects == {f"{w}:{h}": 0 for w, h in ASPECTS} | {"1:1": 6, "4:3": 2, "3:4": 1, "16:9": 1}
    assert found.enlarged == 5  # four of 12 pixels a side at least, and the turned one
    assert found.duplicates == [["a.gif", "b.webp"], ["h.png", "twin.png"]]  # by pixels: the files differ
    assert (found.captions, found.uncaptioned) == (6, 5)
    assert found.words[2] == 3 and found.characters[2] == 15
    assert found.scripts == {"latin": 3, "cyrillic": 1, "cjk": 1, "arabic": 1}
    assert sheet is not None and sheet.image.width == 8 * 102 + 6


def test_a_part_is_spread_over_the_whole(folder):
    found, _ = inspect_data(FolderConfig(str(folder)).build(), limit=3)
    assert found.looked_at == 3 and found.formats == {"PNG": 2, "GIF": 1}
    with pytest.raises(UserError, match="the least is 1"):
        inspect_data(FolderConfig(str(folder)).build(), limit=0)


@pytest.mark.parametrize(
    ("text", "script"), [("ein Haus", "latin"), ("дом house!", "latin"), ("家", "cjk"), ("いえ", "kana"), ("42", None)]
)
def test_the_script_of_a_caption(text, script):
    assert script_of(text) == script


def test_a_stride_is_no_depth(tmp_path):
    Image.new("RGB", (53, 20)).save(tmp_path / "a.bmp")  # rows of 160 bytes
    Image.new("I;16", (20, 20)).save(tmp_path / "b.png")
    found, _ = inspect_data(FolderConfig(str(tmp_path)).build())
    assert found.traits["16-bit"] == 1


def test_the_command_prints_and_writes(folder, tmp_path, capsys):
    assert main(["data", "inspect", str(folder), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "12 pictures, 2 broken\n  broken.png: " in printed and "  h.png = twin.png" in printed
    about = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert about["traits"]["animated"] == 2 and about["scripts"]["cjk"] == 1
    with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
        assert sheet.format == "PNG"


def test_the_command_takes_configs_parquet_and_shards(folder, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = [KINDS["a.gif"], KINDS["g.png"]]
    pq.write_table(pa.table({"image": data, "caption": ["one", "two"]}), tmp_path / "some.parquet")
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for i, content in enumerate(data):
            for name, part in ((f"{i}.png", content), (f"{i}.txt", b"a caption")):
                info = tarfile.TarInfo(name)
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    (tmp_path / "run.yaml").write_text(f"data: {{name: folder, path: {folder}}}\nmodel: mlp\n")
    for source in ("some.parquet", "some.tar"):
        assert main(["data", "inspect", str(tmp_path / source)]) == 0
        assert "2 pictures, 0 broken" in capsys.readouterr().out
    assert main(["data", "inspect", str(tmp_path / "run.yaml"), "data.size=16"]) == 0
    assert "5 are smaller than the size asked for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["{folder}", "data.size=3"], "overrides are for a config"),
        (["{folder}", "--split", "test"], "no subfolder 'test'"),
    ],
)
def test_mistakes_cost_one_line(folder, capsys, arguments, message):
    assert main(["data", "inspect", *(a.format(folder=folder) for a in arguments)]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_vectors_are_no_pictures(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("data: {name: toy2d}\nmodel: mlp\n")
    code = main(["data", "inspect", str(tmp_path / "run.yaml")])
    assert code == 2 and "holds no pictures" in capsys.readouterr().err
