"""Data sets, the order of samples, and pictures that are none."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genflow.data.emoji import EmojiConfig
from genflow.data.folders import FolderConfig
from genflow.data.images import BadImage, decode, fit
from genflow.errors import UserError
from tests.pictures import png

# ---------------------------------------------------------------------------------------------------------- the emoji


def test_embedded_emoji_are_licensed_split_and_32_pixels():
    import pyarrow.parquet as pq

    from genflow.data import emoji

    rows = pq.read_table(emoji.FILE).to_pylist()
    assert emoji.FILE.stat().st_size < 6e6
    assert {r["licence"] for r in rows} == {"Apache-2.0", "MIT"}
    assert not [r for r in rows if "skin tone" in r["caption"]]
    counts = Counter(r["split"] for r in rows)
    assert set(counts) == {"train", "test_pair", "test_concept"} and counts["train"] > 4000
    concepts = {s: {r["hexcode"] for r in rows if r["split"] == s} for s in counts}
    assert not concepts["test_concept"] & concepts["train"]
    dataset = EmojiConfig().build()
    assert len(dataset) == counts["train"]
    assert all(dataset.image(i).size == (32, 32) for i in range(len(dataset)))
    assert len(set(dataset.identifiers)) == len(dataset)
    notice = (emoji.FILE.parent / "NOTICE").read_text()
    assert "Google LLC" in notice and "Copyright (c) Microsoft Corporation" in notice
    assert "Apache License" in (emoji.FILE.parent / "LICENSE-Apache-2.0").read_text()


def test_emoji_options_choose():
    noto = EmojiConfig(styles=("noto",), groups=("food-drink",), caption="caption").build()
    assert {i.partition("/")[0] for i in noto.identifiers} == {"noto"}
    assert "pizza" in noto.captions
    few = EmojiConfig(limit=40).build()
    assert few.captions == EmojiConfig(limit=50).build().captions[:40]
    assert len({i.partition("/")[0] for i in few.identifiers}) == 3
    assert all(c.startswith(("a ", "an ")) for c in few.captions)
    assert len(EmojiConfig().build("test")) == len(EmojiConfig().build("test_pair"))


@pytest.mark.parametrize(
    ("options", "split", "message"),
    [
        ({"styles": ("noot",)}, "train", "no style 'noot'. Did you mean 'noto'"),
        ({"groups": ("food",)}, "train", "no group 'food'. Did you mean 'food-drink'"),
        ({}, "tset_pair", "no split 'tset_pair'. Did you mean 'test_pair'"),
        ({"limit": 0}, "train", "limit=0 leaves no picture"),
        ({"styles": ("fluentflat",), "groups": ("flags",)}, "test_pair", "no picture is left"),
    ],
)
def test_emoji_mistakes(options, split, message):
    with pytest.raises(UserError, match=message):
        EmojiConfig(**options).build(split)


def test_a_limit_mixes_groups():
    first = EmojiConfig(limit=200).build().identifiers
    groups = {i: g for g in ("food-drink", "objects", "flags") for i in EmojiConfig(groups=(g,)).build().identifiers}
    share = Counter(groups[i] for i in first if i in groups)
    for group, n in Counter(groups.values()).items():
        expected = 200 * n / len(EmojiConfig().build())
        assert abs(share[group] - expected) < 4 * expected**0.5


def test_the_embedded_set_is_built_from_what_may_be_embedded(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    script = Path(__file__).parents[1] / "scripts" / "build_emoji.py"
    spec = importlib.util.spec_from_file_location("build_emoji", script)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    licences = ["MIT", "CC-BY-4.0", "Apache-2.0", "MIT"]
    columns = {name: ["x"] * 4 for name in build.COLUMNS} | {"licence": licences, "tone": ["", "", "", "dark"]}
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 32, 64))
    out = io.BytesIO()
    half.save(out, "PNG")
    pq.write_table(pa.table({"image": [out.getvalue()] * 4, **columns}), tmp_path / "source.parquet")
    files = []
    for target in (tmp_path / "a.parquet", tmp_path / "b.parquet"):
        monkeypatch.setattr("sys.argv", ["build_emoji.py", str(tmp_path / "source.parquet"), "--target", str(target)])
        build.main()
        files.append(target.read_bytes())
    assert files[0] == files[1]
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [r["licence"] for r in rows] == ["MIT", "Apache-2.0"]
    small = Image.open(io.BytesIO(rows[0]["image"])).convert("RGB")
    assert small.size == (32, 32)
    assert small.getpixel((15, 0)) == (255, 0, 0) and small.getpixel((16, 0)) == (255, 255, 255)


# ------------------------------------------------------------------------------------------------------------ pictures


def test_decode_brings_everything_to_8_bit_on_white():
    clear = decode(png((255, 0, 0, 0), mode="RGBA"))
    assert clear.mode == "RGB" and clear.getpixel((3, 3)) == (255, 255, 255)
    half = decode(png((0, 0, 0, 128), mode="RGBA"))
    assert abs(half.getpixel((3, 3))[0] - 127) <= 1
    deep = io.BytesIO()
    Image.fromarray(np.full((16, 16), 32768, dtype=np.uint16)).save(deep, "PNG")
    assert abs(np.asarray(decode(deep.getvalue())).mean() - 127.5) < 1
    out = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(out, "JPEG")
    assert decode(out.getvalue()).getpixel((8, 8))[0] > 200
    palette = io.BytesIO()
    indexed = Image.new("P", (16, 16), 3)
    indexed.putpalette([0] * 768)
    indexed.save(palette, "PNG", transparency=3)
    assert decode(palette.getvalue()).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        (np.array([0, 100, 200], np.uint16), "PNG"),  # dark, yet of 16 bits
        (np.array([0, 30000, 65535], np.uint16), "PNG"),
        (np.array([0, 30000, 65535], np.int32), "TIFF"),
        (np.array([0, 0.5, 1], np.float32), "TIFF"),
    ],
)
def test_deep_greys_keep_their_brightness(values, suffix):
    out = io.BytesIO()
    Image.fromarray(np.tile(values.repeat(8), (8, 1))).save(out, suffix)
    top = 1 if values.dtype == np.float32 else 65535
    got = decode(out.getvalue())
    assert got.mode == "L"
    assert np.allclose(np.asarray(got)[0, ::8], values / top * 255, atol=0.51)


def test_transparent_greys_lie_on_white():
    assert decode(png((0, 0), mode="LA")).getpixel((3, 3)) == (255, 255, 255)
    assert decode(png(7, mode="L", transparency=7)).getpixel((3, 3)) == (255, 255, 255)


def test_exif_orientation_is_obeyed():
    image = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif)
    assert decode(out.getvalue()).size == (10, 20)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a picture"),
        (b"hello, I am text", "not a picture"),
        (png()[:45], "truncated|broken"),
        (png(size=(3, 40)), "only 3 x 40 pixels"),
    ],
)
def test_what_is_no_picture_is_bad(tmp_path, data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data)
    (tmp_path / "text.jpg").write_bytes(data)
    with pytest.raises(BadImage, match=reason):
        decode(tmp_path / "text.jpg")


def test_a_decompression_bomb_is_bad(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="exceeds"):
        decode(png(size=(64, 64)))


def test_fit_crops_the_middle():
    image = Image.new("RGB", (30, 10), "blue")
    image.paste("red", (10, 0, 20, 10))
    got = fit(image, 10, 3)
    assert got.shape == (3, 10, 10) and got.dtype == torch.uint8
    assert (got[0] == 255).all() and (got[2] == 0).all()
    assert fit(image, 10, 1).shape == (1, 10, 10)


# ------------------------------------------------------------------------------------------------------------- folders


def test_folder_with_captions_beside(tmp_path):
    for name, color in (("a", "red"), ("b", "blue")):
        (tmp_path / f"{name}.png").write_bytes(png(color))
        (tmp_path / f"{name}.txt").write_text(f" a {color}\nsquare ")
    dataset = FolderConfig(path=str(tmp_path)).build()
    assert dataset.captions == ["a red square", "a blue square"]
    assert dataset.image(0).getpixel((0, 0)) == (255, 0, 0)


def test_folder_of_class_folders_and_splits(tmp_path):
    for split, n in (("train", 2), ("test", 1)):
        for name in ("red_fox", "owl"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                (tmp_path / split / name / f"{i}.png").write_bytes(png())
    assert FolderConfig(path=str(tmp_path)).build().captions == ["owl"] * 2 + ["red fox"] * 2
    assert len(FolderConfig(path=str(tmp_path)).build("test")) == 2
    with pytest.raises(UserError, match=r"no subfolder 'tst' for that split\. Did you mean 'test'"):
        FolderConfig(path=str(tmp_path)).build("tst")
    (tmp_path / "test").rename(tmp_path / "val")
    with pytest.raises(UserError, match=r"no subfolder 'test' for that split\. Did you mean 'val'"):
        FolderConfig(path=str(tmp_path)).build("test")


def test_folder_with_a_table(tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "text": "a square"}) + "\n")
    assert FolderConfig(path=str(tmp_path)).build().captions == ["a square"]
    (tmp_path / "metadata.jsonl").unlink()
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "caption"], ["x.png", "one, two"]])
    assert FolderConfig(path=str(tmp_path)).build().captions == ["one, two"]


def test_folder_mistakes(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match=r"does not exist\. Did you mean 'pictures'"):
        FolderConfig(path=str(tmp_path / "picturs")).build()
    with pytest.raises(UserError, match="holds no pictures"):
        FolderConfig(path=str(tmp_path / "pictures")).build()
    (tmp_path / "pictures" / "a.txt").write_text("caption")
    with pytest.raises(UserError, match=r"1 \.txt files are there, but no pictures"):
        FolderConfig(path=str(tmp_path / "pictures")).build()
    table = tmp_path / "pictures" / "metadata.jsonl"
    table.write_text('{"file_name": "cat.png", "caption": "x"}\n')
    with pytest.raises(UserError, match="none of its 1 pictures exists"):
        FolderConfig(path=str(tmp_path / "pictures")).build()
    (tmp_path / "pictures" / "cats.png").write_bytes(png())
    table.write_text('{"file_name": "cats.png", "caption": "x"}\n{"file_name": "cat.png", "caption": "x"}\n')
    with pytest.raises(UserError, match=r"row 2 names cat.png, which does not exist. Did you mean 'cats.png'"):
        FolderConfig(path=str(tmp_path / "pictures")).build()
    table.write_text("{nonsense\n")
    with pytest.raises(UserError, match=r"metadata.jsonl:1: not JSON"):
        FolderConfig(path=str(tmp_path / "pictures")).build()
    table.write_text('["cats.png", "x"]\n')
    with pytest.raises(UserError, match=r"metadata.jsonl:1: not an object"):
        FolderConfig(path=str(tmp_path / "pictures")).build()
    table.write_text('{"file_name": "cats.png", "caption": "x"}\n{"caption": "x"}\n')
    with pytest.raises(UserError, match="row 2 names nothing"):
        FolderConfig(path=str(tmp_path / "pictures")).build()
    with pytest.raises(UserError, match="is a file, not a folder"):
        FolderConfig(path=str(table)).build()
    with pytest.raises(UserError, match="too long"):
        FolderConfig(path="x" * 5000).build()
    table.write_text('{"url": "cats.png", "caption": "x"}\n')
    with pytest.raises(UserError, match="no file column; it has url, caption"):
        FolderConfig(path=str(tmp_path / "pictures")).build()


def test_a_folder_s_vanished_file_is_a_bad_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    dataset = FolderConfig(path=str(tmp_path)).build()
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match="No such file"):
        dataset.image(0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps({"file_name": "x" * 5000, "caption": "c"}), "none of its 1 pictures exists"),
        (json.dumps({"file_name": "x\0", "caption": "c"}), "none of its 1 pictures exists"),
        ("[" * 100_000, "metadata.jsonl:1: not JSON"),
    ],
)
def test_absurd_tables_cost_one_short_line(tmp_path, line, message):
    table = tmp_path / "metadata.jsonl"
    table.write_text(line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        FolderConfig(path=str(tmp_path)).build()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    if "file_name" in line:  # and so beside a picture that is there
        (tmp_path / "a.png").write_bytes(png())
        table.write_text('{"file_name": "a.png", "caption": "c"}\n' + line + "\n")
        with pytest.raises(UserError, match="row 2 names x") as caught:
            FolderConfig(path=str(tmp_path)).build()
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_brings_the_picture_upright(orientation):
    """Marked in the corner that is to be at the top left, and turned as a camera would lay it down."""
    laid = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.T,
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].T,
        8: lambda x: np.rot90(x, -1),
    }
    upright = np.zeros((12, 20), dtype=np.uint8)
    upright[:4, :8], upright[8:, :4] = 255, 128
    image, exif = Image.fromarray(np.ascontiguousarray(laid[orientation](upright))), Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(out.getvalue())), upright)


def test_names_in_capitals_and_tables_with_a_byte_order_mark_are_read(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "A.PNG")
    Image.new("RGB", (16, 16)).save(tmp_path / "b.jfif")  # as browsers on Windows name a JPEG
    assert FolderConfig(str(tmp_path), size=16).build().identifiers == ["A.PNG", "b.jfif"]
    (tmp_path / "metadata.csv").write_text("file_name,text\nA.PNG,a cat\n", encoding="utf-8-sig")
    assert FolderConfig(str(tmp_path), size=16).build().captions == ["a cat"]


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a cat", encoding="utf-8-sig")
    assert FolderConfig(str(tmp_path)).build().captions == ["a cat"]


def test_a_caption_with_commas_is_not_cut_at_the_first(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,a cat, asleep\n")
    with pytest.raises(
        UserError, match=r"metadata\.csv: row 1 has more cells than the header; put a caption with commas"
    ):
        FolderConfig(str(tmp_path)).build()
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,a cat,\n")
    assert FolderConfig(str(tmp_path)).build().captions == ["a cat"]


@pytest.mark.parametrize("cell", ['"a cat', '"a cat\na.png,"a dog"'])
def test_a_quote_left_open_does_not_swallow_the_rows_behind_it(tmp_path, cell):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text(f"file_name,caption\na.png,{cell}\na.png,a pig\n")
    with pytest.raises(UserError, match=r"metadata\.csv:[34]: not comma-separated"):
        FolderConfig(str(tmp_path)).build()
    (tmp_path / "metadata.csv").write_text('file_name,caption\na.png,"a ""cat"""\na.png,12" disc\n')
    assert FolderConfig(str(tmp_path)).build().captions == ['a "cat"', '12" disc']


def test_blanks_behind_a_closing_quote_are_of_no_cell(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    told = {'"a cat" ': "a cat", '"a ""cat"" , or two,\n\tsay"\t ': 'a "cat" , or two,\n\tsay', '12" ': '12" '}
    rows = "".join(f'a.png,{cell}\r\n"a.png" ,{cell}\n' for cell in told)
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        file.write(f'"file_name" ,"caption" \n{rows}')
    assert FolderConfig(str(tmp_path)).build().captions == [caption for caption in told.values() for _ in range(2)]


def test_linked_folders_are_looked_into_and_not_in_circles(tmp_path):
    (folder := tmp_path / "set").mkdir()
    for place in (folder / "dogs", tmp_path / "elsewhere"):
        place.mkdir()
        (place / "a.png").write_bytes(png())
    (folder / "cats").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(folder)
    dataset = FolderConfig(str(folder)).build()
    assert dataset.identifiers == ["cats/a.png", "dogs/a.png"] and dataset.captions == ["cats", "dogs"]


def test_a_folder_that_may_not_be_read_costs_one_line(tmp_path, monkeypatch):
    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(UserError, match=r"data folder: .*metadata\.jsonl: Permission denied"):
        FolderConfig(str(tmp_path)).build()


def test_fit_averages_what_it_shrinks():
    x = np.zeros((32, 32, 3), dtype=np.uint8)
    x[::2] = 255
    got = fit(Image.fromarray(x), 8, 3)
    assert got.min() > 100 and got.max() < 155
