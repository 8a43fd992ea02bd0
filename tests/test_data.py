"""Data sets, the order of samples, and pictures that are none."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from genflow.data.emoji import EmojiConfig
from genflow.data.folders import FolderConfig
from genflow.data.images import BadImage, ImageDataset, decode, fit
from genflow.data.loading import PreparedConditions, StreamSampler, epoch_order, loader
from genflow.data.tables import HubConfig, ParquetConfig, WebDatasetConfig
from genflow.data.vision import CIFAR10Config, FashionMNISTConfig, MNISTConfig
from genflow.errors import UserError
from genflow.text.trained import LearnedTextConfig


def png(color: str | tuple = "red", size: tuple[int, int] = (16, 16), mode: str = "RGB", **save: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, "PNG", **save)
    return out.getvalue()


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
    for i in range(0, len(dataset), 500):
        assert dataset.image(i).size == (32, 32)


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
        ({"limit": 0}, "train", "no picture is left"),
    ],
)
def test_emoji_mistakes(options, split, message):
    with pytest.raises(UserError, match=message):
        EmojiConfig(**options).build(split)


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


def test_exif_orientation_is_obeyed():
    image = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif)
    assert decode(out.getvalue()).size == (10, 20)


@pytest.mark.parametrize("data", [b"", b"hello, I am text", png()[:45], png(size=(3, 40))])
def test_what_is_no_picture_is_bad(data):
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert str(caught.value)


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
    with pytest.raises(UserError, match="no subfolder 'val'"):
        FolderConfig(path=str(tmp_path)).build("val")


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
    with pytest.raises(UserError, match="does not exist. Did you mean 'pictures'"):
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
    table.write_text('{"url": "cats.png", "caption": "x"}\n')
    with pytest.raises(UserError, match="no file column; it has url, caption"):
        FolderConfig(path=str(tmp_path / "pictures")).build()


# -------------------------------------------------------------------------------------------------------------- tables


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"image": [png("red"), b"broken", png("blue")], "caption": ["r", "x", "b"], "part": ["train", "train", "test"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    dataset = ParquetConfig(path=str(tmp_path), split_column="part").build()
    assert dataset.captions == ["r", "x"] and dataset.image(0).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(BadImage):
        dataset.image(1)
    with pytest.raises(UserError, match="no row is of split 'tst'. Did you mean 'test'"):
        ParquetConfig(path=str(tmp_path), split_column="part").build("tst")
    with pytest.raises(UserError, match="no column 'capton'. Did you mean 'caption'"):
        ParquetConfig(path=str(tmp_path), caption="capton").build()


def test_webdataset(tmp_path):
    with tarfile.open(tmp_path / "shard-000.tar", "w") as tar:
        for i, color in enumerate(("red", "blue")):
            for suffix, data in (("png", png(color)), ("txt", color.encode())):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    dataset = WebDatasetConfig(path=str(tmp_path)).build()
    assert dataset.captions == ["red", "blue"] and dataset.image(1).getpixel((0, 0)) == (0, 0, 255)


def test_a_hub_that_cannot_be_reached_costs_one_line():
    with pytest.raises(UserError, match="nobody/no-such-data: cannot be loaded") as caught:
        HubConfig(repo="nobody/no-such-data").build()
    assert "\n" not in str(caught.value)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.mark.parametrize(("config", "folder", "label"), [(MNISTConfig, "MNIST", "3"), (FashionMNISTConfig, "FashionMNIST", "Dress")])
def test_mnist_and_fashion_mnist(tmp_path, config, folder, label):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 5), ("t10k", 2)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(np.full((n, 28, 28), 7, np.uint8)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.full(n, 3, np.uint8)))
    dataset = config(root=str(tmp_path)).build()
    assert len(dataset) == 5 and dataset.caption(0) == label and config.channels == 1
    assert len(config(root=str(tmp_path)).build("test")) == 2
    assert int(fit(dataset.image(0), 28, 1).float().mean()) == 7


def test_cifar10_missing_and_offline_costs_one_line(tmp_path, monkeypatch):
    import torchvision

    def refuse(*_args, **_kwargs):
        raise OSError("no network here")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", refuse)
    with pytest.raises(UserError, match="CIFAR10: not in .* and could not be fetched"):
        CIFAR10Config(root=str(tmp_path)).build()


# ----------------------------------------------------------------------------------------------------------- the stream


def stream(**options):
    base = {"seed": 3, "batch_size": 8, "steps": 6}
    return [pair for batch in StreamSampler(5, **{**base, **options}) for pair in batch]


def test_every_epoch_is_a_permutation_and_batches_cross_epochs():
    pairs = stream(steps=10)
    assert [p for _, p in pairs] == list(range(80))
    for epoch in range(16):
        assert sorted(i for i, p in pairs if p // 5 == epoch) == list(range(5))
    assert len({tuple(epoch_order(5, 3, e)) for e in range(20)}) > 10
    assert tuple(epoch_order(50, 3, 0)) != tuple(epoch_order(50, 4, 0))


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_ranks_and_micro_batches_share_out_the_same_steps(world, accumulation):
    per_rank = [
        list(StreamSampler(5, seed=3, batch_size=8, steps=6, rank=r, world=world, accumulation=accumulation))
        for r in range(world)
    ]
    whole = list(StreamSampler(5, seed=3, batch_size=8, steps=6))
    for step in range(6):
        parts = [pair for a in range(accumulation) for r in range(world) for pair in per_rank[r][step * accumulation + a]]
        assert parts == whole[step]


def test_a_later_start_is_the_same_stream():
    assert stream(start_step=4) == stream()[32:]
    assert len(StreamSampler(5, seed=3, batch_size=8, steps=6, start_step=4, accumulation=2)) == 4


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="does not divide"):
        StreamSampler(5, seed=0, batch_size=8, steps=1, world=3)


def dataset_of(pictures: list[bytes]) -> ImageDataset:
    captions = [f"caption {i % 3}" for i in range(len(pictures))]
    return ImageDataset(captions, [f"file{i}" for i in range(len(pictures))], pictures.__getitem__)


def load_all(dataset, *, workers=0, flip=False, steps=4, size=16):
    conditions = PreparedConditions.prepare(dataset, LearnedTextConfig(dim=8, heads=2).build())
    sampler = StreamSampler(len(dataset), seed=1, batch_size=4, steps=steps)
    return list(loader(dataset, conditions, sampler, size=size, channels=3, flip=flip, seed=1, workers=workers))


def test_batches_hold_what_they_say():
    colors = ["red", "lime", "blue", "black", "white"]
    batches = load_all(dataset_of([png(c) for c in colors]))
    assert len(batches) == 4
    rgb = {0: (1, -1, -1), 1: (-1, 1, -1), 2: (-1, -1, 1), 3: (-1, -1, -1), 4: (1, 1, 1)}
    text = LearnedTextConfig(dim=8, heads=2).build()
    for batch in batches:
        assert batch.image.dtype == torch.float32 and batch.image.shape == (4, 3, 16, 16)
        for row in range(4):
            i = int(batch.index[row])
            assert tuple(batch.image[row, :, 0, 0].tolist()) == rgb[i]
            assert batch.ids[row] == f"file{i}" and batch.captions[row] == f"caption {i % 3}"
            assert torch.equal(batch.condition.tokens[row], text.encode([f"caption {i % 3}"]).tokens[0])
    assert torch.cat([b.position for b in batches]).tolist() == list(range(16))


def test_workers_change_nothing():
    dataset = dataset_of([png((i * 20, 0, 0)) for i in range(7)])
    for a, b in zip(load_all(dataset, flip=True), load_all(dataset, workers=2, flip=True), strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.position, b.position) and a.ids == b.ids


def test_flips_depend_on_the_position_alone():
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 8, 16))
    out = io.BytesIO()
    image.save(out, "PNG")
    batches = load_all(dataset_of([out.getvalue()] * 3), flip=True, steps=50)
    left = torch.cat([b.image[:, 0, 0, 0] for b in batches])
    assert 60 < int((left > 0).sum()) < 140
    again = torch.cat([b.image[:, 0, 0, 0] for b in load_all(dataset_of([out.getvalue()] * 3), flip=True, steps=50)])
    assert torch.equal(left, again)


def test_bad_pictures_are_passed_over_and_named():
    pictures = [png("red"), b"text", png("blue")[:45], png("lime", size=(4, 4)), png("white")]
    batches = load_all(dataset_of(pictures))
    assert {i for b in batches for i in b.index.tolist()} == {0, 4}
    assert {name for b in batches for name, _ in b.bad} == {"file1", "file2", "file3"}
    for a, b in zip(batches, load_all(dataset_of(pictures), workers=1), strict=True):
        assert torch.equal(a.image, b.image) and a.bad == b.bad


def test_nothing_but_bad_pictures_is_an_error():
    with pytest.raises(UserError, match="none of the 2 pictures can be read; file"):
        load_all(dataset_of([b"a", b"b"]))


def test_a_folder_s_vanished_file_is_a_bad_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    dataset = FolderConfig(path=str(tmp_path)).build()
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match="No such file"):
        dataset.image(0)
