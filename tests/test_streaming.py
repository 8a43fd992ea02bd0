"""WebDataset shards in place: what is in them, and a shuffled stream that ranks, workers and restarts do not change."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from genflow.data import streaming
from genflow.data.buckets import Buckets
from genflow.data.images import BadImage
from genflow.data.loading import StreamSampler, loader
from genflow.data.prepared import PreparedConditions
from genflow.data.streaming import WebDatasetConfig, stream_order
from genflow.errors import UserError
from genflow.text.trained import LearnedTextConfig
from tests.pictures import png


def write(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture()
def shards(tmp_path) -> Path:
    """Five shards of 7, 6, 5, 4, 3 samples; sample i of all is of grey i."""
    folder, i = tmp_path / "shards", 0
    folder.mkdir()
    for number, count in enumerate((7, 6, 5, 4, 3)):
        samples = []
        for _ in range(count):
            samples.append((f"{i:05d}", {"png": png((i, i, i)), "txt": f"caption {i}".encode()}))
            i += 1
        write(folder / f"shard-{number}.tar", samples)
    return folder


# --------------------------------------------------------------------------------------------------- what is in them


def test_pictures_and_captions_are_where_the_shard_has_them(shards):
    dataset = WebDatasetConfig(str(shards)).build()
    assert len(dataset) == 25
    for i in (0, 6, 7, 24):
        assert dataset.image(i).getpixel((0, 0)) == (i, i, i)
        assert dataset.captions[i] == f"caption {i}" and dataset.identifiers[i] == f"webdataset[{i:05d}]"


def test_shards_are_named_by_numbers_in_braces(shards):
    for i in range(5):
        (shards / f"shard-{i}.tar").rename(shards / f"shard-{i:03d}.tar")
    assert len(WebDatasetConfig(f"{shards}/shard-{{001..003}}.tar").build()) == 6 + 5 + 4
    with pytest.raises(UserError, match="shard-005.tar does not exist"):
        WebDatasetConfig(f"{shards}/shard-{{000..005}}.tar").build()


def test_json_captions_folders_and_broken_pictures(tmp_path):
    samples = [
        ("part/x.1", {"jpg": png("red"), "json": json.dumps({"caption": "one"}).encode()}),
        ("part/y", {"jpg": b"junk", "json": json.dumps({"text": "two"}).encode()}),
        ("part/z", {"json": b"no json"}),
    ]
    write(tmp_path / "a.tar", [("part/x", samples[0][1]), *samples[1:]])
    dataset = WebDatasetConfig(str(tmp_path / "*.tar")).build()
    assert dataset.captions == ["one", "two", ""]
    assert dataset.identifiers == ["webdataset[part/x]", "webdataset[part/y]", "webdataset[part/z]"]
    with pytest.raises(BadImage, match="not a picture"):
        dataset.image(1)
    with pytest.raises(BadImage, match="it has no .jpg"):
        dataset.image(2)


def test_extensions_can_be_chosen(tmp_path):
    members = {"seg.png": png("blue"), "png": png("red"), "txt": b"text", "cls": b"3"}
    write(tmp_path / "a.tar", [("x", members)])
    plain = WebDatasetConfig(str(tmp_path)).build()
    assert plain.captions == ["text"] and plain.image(0).getpixel((0, 0)) == (255, 0, 0)
    chosen = WebDatasetConfig(str(tmp_path), image="seg.png", caption="cls").build()
    assert chosen.captions == ["3"] and chosen.image(0).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(UserError, match="no sample has a .pmg. Did you mean 'png'"):
        WebDatasetConfig(str(tmp_path), image="pmg").build()


def test_captions_come_from_any_extension_that_is_asked_for(tmp_path):
    members = {"png": png(), "txt": b"a file", "prompt": b"a  cat", "meta.json": b'{"text": "a dog"}'}
    write(tmp_path / "a.tar", [("x", members), ("y", {"png": png()})])
    assert WebDatasetConfig(str(tmp_path), caption="prompt").build().captions == ["a cat", ""]
    assert WebDatasetConfig(str(tmp_path), caption="meta.json").build().captions == ["a dog", ""]


def test_samples_with_captions_of_several_kinds_keep_them(tmp_path):
    dog, cat = {"png": png(), "txt": b"a dog"}, {"png": png(), "json": b'{"caption": "a cat"}'}
    write(tmp_path / "a.tar", [("x", dog), ("y", cat)])
    assert WebDatasetConfig(str(tmp_path)).build().captions == ["a dog", "a cat"]
    assert WebDatasetConfig(str(tmp_path), caption="txt").build().captions == ["a dog", ""]


@pytest.mark.parametrize(("extension", "text"), [("txt", "a cat"), ("json", '{"caption": "a cat"}'), ("note", "a cat")])
def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path, extension, text):
    write(tmp_path / "a.tar", [("x", {"png": png(), extension: text.encode("utf-8-sig")})])
    assert WebDatasetConfig(str(tmp_path), caption=extension).build().captions == ["a cat"]


def test_a_shard_is_scanned_once_until_it_changes(shards, monkeypatch):
    WebDatasetConfig(str(shards)).build()
    scanned = []
    plain = streaming._scan
    monkeypatch.setattr(streaming, "_scan", lambda shard: scanned.append(shard) or plain(shard))
    assert WebDatasetConfig(str(shards)).build().image(3).getpixel((0, 0)) == (3, 3, 3) and not scanned
    write(shards / "shard-4.tar", [("new", {"png": png("red"), "txt": b"new"})])
    assert WebDatasetConfig(str(shards)).build().captions[-1] == "new"
    assert [Path(s).name for s in scanned] == ["shard-4.tar"]


def test_a_shard_is_open_while_it_is_read_whoever_forgets_it(shards, monkeypatch):
    """Threads that open one at once keep but one of its files."""
    monkeypatch.setattr("genflow.data.streaming.OPEN", 0)
    assert WebDatasetConfig(str(shards)).build().image(3).getpixel((0, 0)) == (3, 3, 3)


def test_more_shards_than_may_be_open(shards, monkeypatch):
    monkeypatch.setattr(streaming, "OPEN", 2)
    dataset = WebDatasetConfig(str(shards)).build()
    for i in torch.randperm(25).tolist():
        assert dataset.image(i).getpixel((0, 0)) == (i, i, i)


@pytest.mark.parametrize(
    ("options", "split", "message"),
    [
        ({}, "test", "shards have no split 'test'"),
        ({"path": "*.zip"}, "train", r"no \.tar files in"),
        ({"buffer": -1}, "train", "buffer = -1 is too few"),
    ],
)
def test_mistakes(shards, options, split, message):
    with pytest.raises(UserError, match=message):
        WebDatasetConfig(**{"path": str(shards), **options}).build(split)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "cannot be loaded"),
        (lambda whole: whole[: whole.rindex(b"IEND")], "cannot be loaded"),  # within the last member
        (lambda whole: b"junk" * 1000, "cannot be loaded"),
        (lambda whole: b"\0" * 10240, "holds no samples"),
    ],
)
def test_a_damaged_shard_costs_one_line(tmp_path, content, message):
    whole = write(tmp_path / "whole.tar", [("x", {"txt": b"a" * 4000, "png": png()})]).read_bytes()
    (tmp_path / "bad.tar").write_bytes(content(whole))
    with pytest.raises(UserError, match=message) as caught:
        WebDatasetConfig(str(tmp_path / "bad.tar")).build()
    assert "\n" not in str(caught.value)


def test_samples_without_pictures_or_captions_say_what_they_have(tmp_path):
    with pytest.raises(UserError, match="no image in its samples; they have txt"):
        WebDatasetConfig(str(write(tmp_path / "a.tar", [("x", {"txt": b"x"})]))).build()
    with pytest.raises(UserError, match="no caption in its samples; they have png"):
        WebDatasetConfig(str(write(tmp_path / "b.tar", [("x", {"png": png()})]))).build()


# --------------------------------------------------------------------------------------------------------- the stream


def test_an_epoch_takes_shard_after_shard_within_its_window():
    counts, buffer = [40, 30, 20, 10, 25], 8
    shard = torch.arange(5).repeat_interleave(torch.tensor(counts))
    orders = [stream_order(counts, buffer, 0, epoch) for epoch in range(6)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(125))
        sequence = list(dict.fromkeys(shard[order].tolist()))
        turn = torch.cat([torch.nonzero(shard == s).flatten() for s in sequence])
        assert (order.argsort() - turn.argsort()).abs().max() <= buffer
        assert order.tolist() != turn.tolist()
    assert len({tuple(dict.fromkeys(shard[o].tolist())) for o in orders}) > 3
    assert not torch.equal(stream_order(counts, buffer, 0, 1), stream_order(counts, buffer, 1, 1))


def test_the_order_is_frozen():
    """A run must be resumable by a later version."""
    assert stream_order([4, 2, 3], 3, 0, 1).tolist() == [1, 2, 0, 3, 4, 5, 6, 8, 7]


def steps(dataset, **how):
    return list(StreamSampler.over(dataset, **{"seed": 5, "batch_size": 4, "steps": 20, **how}))


@pytest.mark.parametrize("buckets", [None, Buckets(step=4, upscale=2.0)])
def test_ranks_and_restarts_see_one_stream(shards, buckets):
    write(shards / "wide.tar", [(f"wide{i}", {"png": png("red", (40, 20)), "txt": b"wide"}) for i in range(3)])
    dataset = WebDatasetConfig(str(shards), size=16, buffer=6, buckets=buckets).build()
    whole = steps(dataset)
    assert whole != steps(WebDatasetConfig(str(shards), size=16, buckets=buckets).build())
    ranks = [steps(dataset, rank=r, world=2) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    assert steps(dataset, start_step=7) == whole[7:]
    if buckets is None:
        first = [i for step in whole[:7] for i, _ in step]
        assert first == stream_order([7, 6, 5, 4, 3, 3], 6, 5, 0).tolist()


def test_batches_come_from_the_shards_with_or_without_workers(shards):
    dataset = WebDatasetConfig(str(shards), size=16, buffer=6).build()
    conditions = PreparedConditions.prepare(dataset, LearnedTextConfig(dim=8, heads=2).build())
    batches = [
        list(loader(dataset, conditions, steps(dataset), shape=(3, 16, 16), workers=workers)) for workers in (0, 2)
    ]
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.x, b.x) and a.captions == b.captions
        assert torch.allclose((a.x[:, 0, 0, 0] + 1) * 127.5, a.index.float(), atol=1e-3)
        assert a.captions == [f"caption {i}" for i in a.index.tolist()]


def test_a_picture_of_another_kind_does_not_stand_in_for_the_one_asked_for(tmp_path):
    samples = [("a", {"jpg": png("red"), "png": png("blue"), "txt": b"a"}), ("b", {"png": png("blue"), "txt": b"b"})]
    path = str(write(tmp_path / "x.tar", samples))
    assert WebDatasetConfig(path).build().image(1).getpixel((0, 0)) == (0, 0, 255)
    chosen = WebDatasetConfig(path, image="jpg").build()
    assert chosen.image(0).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(BadImage, match=r"it has no \.jpg"):
        chosen.image(1)


def test_captions_longer_than_a_megabyte_are_not_read(tmp_path):
    samples = [(key, {"png": png(), "txt": b"x" * n}) for key, n in (("a", 2**20), ("b", 2**20 + 1))]
    assert [len(c) for c in WebDatasetConfig(str(write(tmp_path / "x.tar", samples))).build().captions] == [2**20, 0]


def test_extensions_are_found_in_any_case(tmp_path):
    path = write(tmp_path / "x.tar", [("a", {"PNG": png("blue"), "Txt": b"one"})])
    dataset = WebDatasetConfig(str(path)).build()
    assert dataset.image(0).getpixel((0, 0)) == (0, 0, 255) and dataset.captions == ["one"]


def test_captions_may_begin_late(tmp_path):
    bare = [(f"{i:03d}", {"png": png()}) for i in range(120)]
    path = str(write(tmp_path / "x.tar", [*bare, ("200", {"png": png(), "txt": b"late"})]))
    for caption in (None, "txt"):
        assert WebDatasetConfig(path, caption=caption).build().captions == [""] * 120 + ["late"]


def test_what_a_mac_lays_beside_files_is_no_sample(tmp_path):
    path = write(tmp_path / "x.tar", [("._0", {"png": b"about"}), ("0", {"png": png(), "txt": b"a"})])
    assert WebDatasetConfig(str(path)).build().identifiers == ["webdataset[0]"]


def test_members_of_a_sample_may_stand_apart(tmp_path):
    """As in tar cf x.tar *.png *.txt; but what comes twice is of two samples."""
    names = ("a", "b", "a")
    pictures = [(key, {"png": png(colour)}) for key, colour in zip(names, ("red", "blue", "lime"), strict=True)]
    texts = [("b", {"txt": b"blue"}), ("a", {"txt": b"lime"})]
    dataset = WebDatasetConfig(str(write(tmp_path / "x.tar", [*pictures, *texts]))).build()
    assert dataset.captions == ["", "blue", "lime"] and dataset.image(1).getpixel((0, 0)) == (0, 0, 255)
