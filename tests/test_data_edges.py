"""Data as people have them: odd folders, tables and pictures, files that change, and that others write."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import TiffImageFile
from test_streaming import write

from genflow.cli import main
from genflow.data import latents_cache, prepared
from genflow.data.buckets import Buckets, _size, bucketed, digests
from genflow.data.folders import FolderConfig
from genflow.data.images import BadImage, ImageDataset, decode
from genflow.data.inspect import inspect_data
from genflow.data.loading import StreamSampler, loader
from genflow.data.locks import lock
from genflow.data.pairs import PairsConfig, write_pairs
from genflow.data.prepared import PreparedConditions
from genflow.data.sources import Pictures
from genflow.data.streaming import WebDatasetConfig
from genflow.data.tables import HubConfig, ParquetConfig
from genflow.data.vectors import TableConfig
from genflow.data.vision import MNISTConfig
from genflow.errors import UserError
from genflow.text.none import NoText
from genflow.text.trained import LearnedTextConfig


def encoded(size: tuple[int, int] = (16, 16), grey: int = 0, kind: str = "PNG", **save: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (grey,) * 3).save(out, kind, **save)
    return out.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def dataset_of(pictures: list[bytes]) -> ImageDataset:
    return ImageDataset(["a"] * len(pictures), [f"file{i}" for i in range(len(pictures))], pictures.__getitem__)


def folder_of(root: Path, *names: str, **texts: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded())
    for name, text in texts.items():
        (root / name.replace("_", ".")).write_text(text)
    return root


def write_parquet(file: Path, pictures: list[bytes], captions: list) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pictures, "caption": captions}), file)
    return file


# ------------------------------------------------------------------------------------------- which pictures, which split


def test_train_is_not_what_lies_in_the_folders_of_other_splits_nor_in_hidden_ones(tmp_path):
    folder_of(tmp_path, "cats/a.png", "Test/b.png", "val/dogs/c.png", "cats/.ipynb_checkpoints/a.png", ".cache/d.png")
    assert FolderConfig(str(tmp_path)).build().identifiers == ["cats/a.png"]
    assert FolderConfig(str(tmp_path)).build("val").captions == ["dogs"]
    (tmp_path / "cats" / "a.png").unlink()
    with pytest.raises(UserError, match="holds no pictures outside Test, val"):
        FolderConfig(str(tmp_path)).build()


@pytest.mark.parametrize("train", ["train/a.png", "a.png"])
def test_a_table_beside_the_folders_of_splits_is_shared_out(tmp_path, train):
    folder_of(tmp_path, train, "test/b.png", metadata_csv=f"file_name,text\n{train},a cat\ntest/b.png,a dog\n")
    assert FolderConfig(str(tmp_path)).build().captions == ["a cat"]
    assert FolderConfig(str(tmp_path)).build("test").captions == ["a dog"]


def test_parquet_files_named_after_splits_are_those_of_the_split(tmp_path):
    for name in ("train-00000-of-00001", "test-00000-of-00001", "more", "validation"):
        write_parquet(tmp_path / f"{name}.parquet", [encoded()], [name])
    for split, captions in {
        "train": ["more", "train-00000-of-00001"],
        "test": ["test-00000-of-00001"],
        "validation": ["validation"],
    }.items():
        assert ParquetConfig(str(tmp_path)).build(split).captions == captions
    assert len(ParquetConfig(str(tmp_path / "validation.parquet")).build()) == 1  # asked for by its name
    with pytest.raises(UserError, match="no column 'split' for split 'dev'"):
        ParquetConfig(str(tmp_path)).build("dev")


def test_the_hub_s_other_names_of_files_tell_their_split_too(tmp_path):
    test = [
        "birds_test",
        "test-00000-of-00002-9f7b2c1d0a3e4b55",
        "test-00001-of-00002-0a2b4c6d8e0f1a3b",
        "test_1",
        "Test2",
    ]
    train = ["attest", "train-00000-of-00001-b42a775f407cee45", "train_dev"]
    for name in (*test, *train):
        write_parquet(tmp_path / f"{name}.parquet", [encoded()], [name])
    assert set(ParquetConfig(str(tmp_path)).build().captions) == set(train)
    assert set(ParquetConfig(str(tmp_path)).build("test").captions) == set(test)


def test_a_broken_picture_in_a_column_that_is_not_asked_for_stops_nothing(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as Pictures

    features = Features({"image": Pictures(), "mask": Pictures(), "caption": Value("string")})
    cell = lambda content: [{"bytes": content, "path": None}]
    rows = Dataset.from_dict({"image": cell(encoded()), "mask": cell(b"none"), "caption": ["x"]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    assert ParquetConfig(str(tmp_path)).build().image(0).size == (16, 16)


def test_what_keeps_parquet_files_from_going_together_is_told(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_parquet(tmp_path / "a.parquet", [encoded()], ["x"])
    pq.write_table(pa.table({"image": [encoded()], "caption": ["y"], "artist": ["z"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="artist.* column names don't match"):
        ParquetConfig(str(tmp_path)).build()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_captions_are_read_as_their_mark_says(tmp_path, encoding):
    text = ("\ufeff" * (encoding == "utf-16-be") + "a café").encode(encoding)
    folder_of(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(text)
    write_parquet(tmp_path / "a.parquet", [encoded()], [text])
    write(tmp_path / "a.tar", [("x", {"png": encoded(), "txt": text}), ("y", {"png": encoded(), "note": text})])
    every = (FolderConfig, ParquetConfig, WebDatasetConfig)
    assert [config(str(tmp_path)).build().captions[0] for config in every] == ["a café"] * 3
    assert WebDatasetConfig(str(tmp_path), caption="note").build().captions == ["", "a café"]


def test_a_name_with_brackets_is_no_pattern_where_it_is_there(tmp_path):
    write_parquet(tmp_path / "v[1]" / "a.parquet", [encoded()], ["x"])
    write(tmp_path / "v[1]" / "a.tar", [("x", {"png": encoded(), "txt": b"y"})])
    assert ParquetConfig(str(tmp_path / "v[1]")).build().captions == ["x"]
    assert WebDatasetConfig(str(tmp_path / "v[1]")).build().captions == ["y"]


@pytest.mark.parametrize(
    ("rows", "captions"),
    [
        ([{"label": 0}, {"label": 1}], ["0", "1"]),
        ([{"text": ["a cat", "a kitten"]}, {"text": []}], ["a cat", ""]),
        ([{"text": float("nan")}, {"text": None}], ["", ""]),
        ([{"caption": "one"}, {"text": "two"}], ["one", "two"]),
    ],
)
def test_captions_of_a_table_that_are_no_plain_text(tmp_path, rows, captions):
    folder_of(tmp_path, "0.png", "1.png")
    lines = [json.dumps({"file_name": f"{i}.png", **row}) for i, row in enumerate(rows)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert FolderConfig(str(tmp_path)).build().captions == captions


def test_a_missing_class_label_is_no_caption(tmp_path):
    import datasets

    features = datasets.Features(
        {"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    datasets.Dataset.from_dict({"image": [encoded()] * 3, "label": [1, None, 0]}, features).to_parquet(
        str(tmp_path / "a.parquet")
    )
    assert ParquetConfig(str(tmp_path)).build().captions == ["dog", "", "cat"]


def test_a_shard_holds_pictures_of_several_kinds(tmp_path):
    samples = [(kind, {kind: encoded(kind=name)}) for kind, name in (("jpg", "JPEG"), ("png", "PNG"), ("jpeg", "JPEG"))]
    write(tmp_path / "a.tar", [(key, {**members, "txt": b"x"}) for key, members in samples])
    dataset = WebDatasetConfig(str(tmp_path)).build()
    assert [dataset.image(i).size for i in range(3)] == [(16, 16)] * 3
    with pytest.raises(BadImage, match=r"it has no \.jpg"):
        WebDatasetConfig(str(tmp_path), image="jpg").build().image(1)


def test_pictures_of_a_shard_that_vanished_are_bad(tmp_path):
    write(tmp_path / "a.tar", [("x", {"png": encoded(), "txt": b"x"})])
    dataset = WebDatasetConfig(str(tmp_path)).build()
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadImage, match="No such file"):
        dataset.image(0)


def test_a_home_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_pairs(
        tmp_path / "p", lambda r: (torch.zeros(len(r), 2), torch.ones(len(r), 2)), captions=["a"], shape=(2,), about={}
    )
    assert PairsConfig("~/p").shape == (2,) and len(PairsConfig("~/p").build()) == 1


def test_one_process_fetches_a_data_set(tmp_path, monkeypatch):
    from torchvision import datasets

    def build(root: str, *, train: bool, download: bool):
        if download:
            with open(Path(root, ".MNIST.lock"), "a") as file:
                raise OSError(f"held: {lock(file, wait=False) is False}\n{'of a mirror, ' * 20}and of the last")
        raise RuntimeError("not there")

    monkeypatch.setattr(datasets, "MNIST", build)
    with pytest.raises(UserError, match=r"\(held: True of a mirror, .* and of the last\); set root"):
        MNISTConfig(root=str(tmp_path / "new")).build()


# -------------------------------------------------------------------------------------------------------------- buckets


def test_ranks_and_unreadable_pictures_do_not_change_the_shape_of_a_step():
    pictures = [encoded((96, 48))] * 6 + [encoded((48, 96))] * 6
    pictures[3] = pictures[9] = b"broken"
    pictures[10] = encoded((48, 96))[:60]  # whose head can be read
    dataset = bucketed(dataset_of(pictures), Buckets(step=8), 32)
    assert dataset.shapes.unique(dim=0).tolist() == [[24, 40], [40, 24]]
    conditions = PreparedConditions.prepare(dataset, NoText())

    def steps(**how: int) -> list[list[tuple[int, ...]]]:
        sampler = StreamSampler.over(dataset, seed=0, batch_size=4, steps=12, **how)
        batches = list(loader(dataset, conditions, sampler, shape=(3, 32, 32), own_shapes=True))
        return [batch.x.shape[2:] for batch in batches][:: how.get("accumulation", 1)]

    assert steps() == steps(world=2) == steps(world=2, rank=1) == steps(accumulation=4)


def test_a_batch_has_the_shape_that_was_asked_for_whatever_stands_in_it():
    dataset = bucketed(dataset_of([encoded((96, 48)), encoded((48, 96))[:60]]), Buckets(step=8), 32)
    conditions = PreparedConditions.prepare(dataset, NoText())
    (batch,) = loader(dataset, conditions, [[(1, 0)]], shape=(3, 32, 32), own_shapes=True)
    assert batch.index.tolist() == [0] and batch.x.shape[2:] == (40, 24)


@pytest.mark.parametrize("swaps", [True, False])
def test_a_turned_tiff_is_measured_as_it_is_shown(monkeypatch, swaps):
    data = encoded((96, 48), kind="TIFF", exif=turned())
    assert decode(data).size == (48, 96)
    size = (48, 96) if swaps else (96, 48)  # on opening, as one Pillow or another has it
    monkeypatch.setattr(TiffImageFile, "size", property(lambda _: size))
    assert _size(dataset_of([data]), 0) == (96, 48)


def test_a_ratio_that_leaves_one_shape_is_told():
    with pytest.raises(UserError, match=r"ratio = 1\.0 must be more than 1"):
        Buckets(ratio=1.0)
    with pytest.raises(UserError, match="try step = 8 and ratio = 2"):
        Buckets(step=8, ratio=1.05).shapes(64)
    assert len(Buckets(step=8, ratio=2.0).shapes(64)) > 1


@pytest.mark.parametrize("kind", [ParquetConfig, WebDatasetConfig, HubConfig])
def test_pictures_that_change_within_a_file_change_what_is_told_of_it(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path / "cache"))

    def written(where: str, pictures: list[bytes]) -> ImageDataset:
        folder = tmp_path / where
        write_parquet(folder / "train.parquet", pictures, ["x"] * len(pictures))
        if kind is WebDatasetConfig:
            (folder / "train.parquet").unlink()
            write(folder / "a.tar", [(f"{i:02d}", {"png": p, "txt": b"x"}) for i, p in enumerate(pictures)])
        return kind(str(folder), size=32, buckets=Buckets(step=8)).build()

    before = written("a", [encoded((64, 64))] * 40)
    told = digests(before)
    changed = [encoded((64, 64)), encoded((128, 64)), *[encoded((64, 64))] * 38]  # of those not looked at again
    after = written("a", changed)
    assert before.shapes[1].tolist() == [32, 32] and after.shapes[1].tolist() == [24, 40]
    assert len(digests(after)) == 1 and told != digests(written("b", changed)) == digests(after)
    assert digests(after.select([1])) == digests(after)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_why_a_picture_is_bad_is_kept_and_not_what_it_was_read_from():
    pictures = Pictures(dataset_of([b"broken"]), size=8, channels=3)
    depths = []
    for _ in range(3):
        with pytest.raises(BadImage, match="not a picture") as caught:
            pictures.check(0)
        depths.append(len(caught.traceback))
    assert depths[1] == depths[2] and pictures.bad == {0: "not a picture"}


def test_bad_exif_data_turn_nothing(monkeypatch):
    def getexif(_):
        raise SyntaxError("not a TIFF file")

    data = encoded((20, 10), kind="JPEG", exif=turned())
    assert decode(data).size == (10, 20)
    monkeypatch.setattr(Image.Image, "getexif", getexif)
    assert decode(data).size == (20, 10) and _size(dataset_of([data]), 0) == (10, 20)


@pytest.mark.parametrize("top", [1, 255])
@pytest.mark.parametrize("odd", [1.0001, 1.3, np.inf, np.nan])
def test_one_odd_pixel_does_not_darken_a_picture_of_floats(top, odd):
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16) * top
    values[0, 0] = odd * top
    out = io.BytesIO()
    Image.fromarray(values).save(out, "TIFF")
    got = np.asarray(decode(out.getvalue()))
    assert abs(got.mean() - 127.5) < 2 and got[0, 0] == (0 if np.isnan(odd) else 255)


def test_a_see_through_grey_of_16_bits_lies_on_white():
    out = io.BytesIO()
    Image.fromarray(np.array([[30000, 20000]] * 16, np.uint16).repeat(8, 1)).save(out, "PNG", transparency=30000)
    got = decode(out.getvalue())
    assert got.getpixel((0, 0)) == 255 and got.getpixel((15, 0)) == 78


def test_reading_a_large_picture_leaves_the_filters_of_warnings_alone(monkeypatch):
    data = encoded((40, 40))
    image, before, seen = Image.open(io.BytesIO(data)), list(warnings.filters), []
    load = image.load
    monkeypatch.setattr(image, "load", lambda: seen.append(list(warnings.filters)) or load())
    decode(image)  # the filters are of all threads
    assert seen and all(filters == before for filters in seen)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # up to twice that, Pillow only warns
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(BadImage, match="40 x 40 pixels, more than 1000"):
        decode(data)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File")
@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_an_animation_cut_short_is_broken_and_stops_no_inspection(kind):
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (24, 24, 3), dtype=np.uint8)) for i in range(4)]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    whole = out.getvalue()
    cuts = [whole[:n] for n in range(len(whole) // 3, len(whole), 97)]
    found, _ = inspect_data(dataset_of([whole, *cuts]))
    assert found.looked_at == len(cuts) + 1 and "file0" not in dict(found.broken)


def test_pictures_count_as_enlarged_by_what_was_asked_for(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(encoded((48, 96)))
    assert main(["data", "inspect", str(tmp_path)]) == 0 and "enlarged" not in capsys.readouterr().out
    config = FolderConfig(str(tmp_path), size=64)
    assert inspect_data(config.build(), size=64)[0].enlarged == 1
    dataset = FolderConfig(str(tmp_path), size=64, buckets=Buckets(step=8)).build()
    assert inspect_data(dataset, size=64)[0].enlarged == 0
    dataset = FolderConfig(str(tmp_path), size=128, buckets=Buckets(step=8, upscale=4.0)).build()
    assert inspect_data(dataset, size=128)[0].enlarged == 1


# ------------------------------------------------------------------------------------------------------ tables of numbers


def test_a_first_line_with_a_number_in_it_is_a_row(tmp_path):
    (tmp_path / "a.csv").write_text("5.1,3.5,setosa\n4.9,3.0,setosa\n7,3.2,versicolor\n")
    table = TableConfig(str(tmp_path / "a.csv"), test=0, label="2").build()
    assert table.columns == ["0", "1"] and table.captions == ["setosa", "setosa", "versicolor"]
    (tmp_path / "b.csv").write_text("1.0,,3\n4,5,6\n7,8,10\n")
    assert len(TableConfig(str(tmp_path / "b.csv"), test=0, columns=("0", "2")).build()) == 3


@pytest.mark.parametrize(("label", "captions"), [([b"x", b"y"], ["x", "y"]), ([1.0, float("nan")], ["1.0", ""])])
def test_a_table_of_pandas_has_its_labels_and_no_index(tmp_path, label, captions):
    import pandas

    pandas.DataFrame({"a": [1.0, 2], "l": label}, index=[5, 6]).to_parquet(tmp_path / "a.parquet")
    table = TableConfig(str(tmp_path / "a.parquet"), test=0, label="l").build()
    assert table.columns == ["a"] and table.captions == captions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, 2.0], [2.0, 3.0]], r"row 1 holds array\(\[1\., 2\.\]\), no finite number"),
        (np.array([1, 2], "datetime64[ns]"), r"is of datetime64\[ns\], no real numbers"),
        (np.array([1e200, 2e200]), "has a standard deviation of inf, out of float32's reach"),
        (np.array([1e-200, 2e-200]), "has a standard deviation of 0, out of float32's reach"),
    ],
)
def test_columns_that_are_no_numbers_to_learn_are_refused(tmp_path, values, message):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": values}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        TableConfig(str(tmp_path / "a.parquet"), test=0).build()


def test_complex_numbers_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6).reshape(3, 2) * (1 + 1j))
    with pytest.raises(UserError, match="column '0' of .* is of complex128, no real numbers"):
        TableConfig(str(tmp_path / "a.npy"), test=0).build()


# --------------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("locks", [True, False])
def test_what_another_process_is_writing_is_left_to_it_unless_a_lock_tells_that_it_is_dead(
    tmp_path, monkeypatch, locks
):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr("fcntl.flock", refused)
    partial = tmp_path / ".latents-00000.safetensors.1.partial"
    partial.write_text("half a shard")
    with latents_cache._ours(tmp_path / "latents-00000.safetensors") as ours:
        latents_cache._write(tmp_path / "latents-00000.safetensors", {"mean": torch.zeros(1)}, rows=[], moments=[])
    assert ours and partial.exists() is not locks


def test_captions_are_encoded_as_many_at_a_time_as_memory_takes(monkeypatch):
    text, calls = LearnedTextConfig(dim=8, heads=2).build(), []
    row = text.null()
    each = sum(a.numel() * a.element_size() for a in (row.tokens, row.mask, row.pooled))
    encode = text.encode
    monkeypatch.setattr(text, "encode", lambda captions: calls.append(len(captions)) or encode(captions))
    monkeypatch.setattr(prepared, "MEMORY", 3 * each)
    captions = [f"caption {i}" for i in range(8)]
    table = PreparedConditions.prepare(ImageDataset(captions, captions, lambda _: b""), text).table
    assert max(calls) == 3 and torch.equal(table.tokens, encode(captions).tokens)


def icc_profile(name: str, *, grey: bool = False) -> bytes:
    """Of a display whose red and green are sRGB's green and red, at a gamma of 2.2; or of grey whose light is linear."""
    fixed = lambda *values: b"".join(struct.pack(">i", round(v * 65536)) for v in values)
    xyz = lambda *values: b"XYZ \0\0\0\0" + fixed(*values)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, 563) + b"\0\0"
    text, white = name.encode() + b"\0", (0.9642, 1.0, 0.8249)
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 78,
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz(*white),
        b"rXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"gXYZ": xyz(0.4360, 0.2225, 0.0139),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7141),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
        b"kTRC": b"curv\0\0\0\0" + struct.pack(">I", 0),
    }
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    size = 132 + 12 * len(tags) + len(data)
    head = struct.pack(
        ">I4xI12s12x4s28x", size, 0x02400000, b"mntr" + (b"GRAY" if grey else b"RGB ") + b"XYZ ", b"acsp"
    ) + fixed(*white)
    return head.ljust(128, b"\0") + table + data


@pytest.mark.parametrize(
    ("mode", "colour", "profile", "seen"),
    [
        ("RGB", (255, 0, 0), icc_profile("swapped"), (0, 255, 0)),
        ("RGB", (255, 0, 0), icc_profile("sRGB in name"), (0, 255, 0)),
        ("RGB", (12, 123, 231), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), (12, 123, 231)),
        ("RGB", (255, 0, 0), b"broken", (255, 0, 0)),
        ("RGBA", (255, 0, 0, 128), icc_profile("swapped"), (127, 255, 127)),
        ("L", 100, icc_profile("swapped"), 100),
        ("L", 100, icc_profile("linear", grey=True), 168),
        ("LA", (100, 255), icc_profile("linear", grey=True), (168, 168, 168)),
        ("I;16", 25700, icc_profile("linear", grey=True), 168),
    ],
)
def test_colours_are_those_that_the_icc_profile_means(mode, colour, profile, seen):
    out = io.BytesIO()
    Image.new(mode, (16, 16), colour).save(out, "PNG", icc_profile=profile)
    assert decode(out.getvalue()).getpixel((3, 3)) == seen


@pytest.mark.parametrize(("mode", "clear"), [("RGB", (255, 0, 0)), ("P", 0), ("L", 76)])
def test_a_transparent_colour_stays_so_under_an_icc_profile(mode, clear):
    out = io.BytesIO()
    picture = Image.new("RGB", (16, 16), (255, 0, 0)).convert(mode, palette=Image.Palette.ADAPTIVE, colors=2)
    picture.save(out, "PNG", icc_profile=icc_profile("swapped", grey=mode == "L"), transparency=clear)
    assert decode(out.getvalue()).getpixel((3, 3)) == (255, 255, 255)


def test_a_link_to_where_none_may_look_hides_no_picture(tmp_path, monkeypatch):
    folder_of(tmp_path, *(f"train/{i}.png" for i in range(9)))
    stat = os.stat

    def refuse(path, *args, **how):
        if str(path).endswith("4.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **how)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(UserError, match=r"4\.png: Permission denied"):
        FolderConfig(str(tmp_path)).build()


def test_hidden_files_are_no_shards(tmp_path):
    write(tmp_path / "a.tar", [("1", {"png": encoded(), "txt": b"one"})])
    (tmp_path / "._a.tar").write_bytes(b"\0\5\x16\7" * 99)  # as a Mac leaves it on other disks
    assert WebDatasetConfig(str(tmp_path)).build().captions == ["one"]
