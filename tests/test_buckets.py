"""Aspect-ratio buckets: which shapes there are, who goes where, and a stream that ranks and restarts do not change."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genflow.data.buckets import Buckets, bucketed, digest
from genflow.data.folders import FolderConfig
from genflow.data.images import ImageDataset
from genflow.data.loading import StreamSampler, epoch_order, in_order, loader
from genflow.data.prepared import PreparedConditions
from genflow.errors import UserError
from genflow.text.trained import LearnedTextConfig

BUCKETS = Buckets(step=16)


def png(width: int, height: int, color: str = "red", exif: int = 1) -> bytes:
    out = io.BytesIO()
    tags = Image.Exif()
    tags[0x0112] = exif
    Image.new("RGB", (width, height), color).save(out, "PNG", exif=tags)
    return out.getvalue()


def dataset_of(pictures: list[bytes]) -> ImageDataset:
    names = [f"file{i}" for i in range(len(pictures))]
    return ImageDataset(["a caption"] * len(pictures), names, pictures.__getitem__)


def load_all(dataset: ImageDataset, batches, size: int = 64, **how) -> list:
    conditions = PreparedConditions.prepare(dataset, LearnedTextConfig(dim=8, heads=2).build())
    return list(loader(dataset, conditions, batches, shape=(3, size, size), own_shapes=True, **how))


# ----------------------------------------------------------------------------------------------------------- the shapes


@pytest.mark.parametrize(("size", "step", "ratio"), [(64, 16, 2.0), (512, 32, 2.0), (1024, 64, 4.0), (100, 8, 1.5)])
def test_shapes_are_of_about_one_area(size, step, ratio):
    shapes = Buckets(step=step, ratio=ratio).shapes(size)
    for height, width in shapes:
        assert height % step == width % step == 0
        assert height * width <= size * size < (height + step) * (width + step)
        assert max(height, width) <= ratio * min(height, width)
        assert (width, height) in shapes
    assert len(set(shapes)) == len(shapes)


def test_sdxl_s_shapes():
    shapes = Buckets(step=64, ratio=4.0).shapes(1024)
    assert {(1024, 1024), (1152, 896), (832, 1216), (768, 1344), (512, 2048)} <= set(shapes)


@pytest.mark.parametrize("name", ["step", "ratio", "upscale"])
def test_numbers_that_make_no_bucket_are_refused(name):
    with pytest.raises(UserError, match=name):
        Buckets(**{name: 0})


def test_one_shape_is_no_choice():
    with pytest.raises(UserError, match="step = 64 and ratio = 2 leave one shape of size 64; try step = 8"):
        Buckets().shapes(64)


def test_pictures_go_to_the_nearest_ratio_and_small_ones_are_left_out():
    sizes = torch.tensor([[640, 640], [1000, 500], [300, 550], [63, 64], [64, 64], [5, 4000]])
    shapes = BUCKETS.assign(sizes, 64).tolist()
    assert shapes == [[64, 64], [80, 48], [48, 80], [0, 0], [64, 64], [0, 0]]
    assert Buckets(step=16, upscale=1.1).assign(sizes, 64).tolist()[3] == [64, 64]


def test_a_picture_that_lies_goes_to_the_shape_of_one_that_stands_turned():
    sizes = torch.randint(64, 400, (200, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(BUCKETS.assign(sizes.flip(1), 64), BUCKETS.assign(sizes, 64).flip(1))


def test_a_data_set_says_what_it_leaves_out():
    pictures = [png(100, 100), png(20, 20), png(200, 100), png(100, 200, exif=6), b"broken", png(30, 90)]
    with pytest.warns(UserWarning, match="2 of 6 pictures are left out, as they would be enlarged by more than 1"):
        dataset = bucketed(dataset_of(pictures), BUCKETS, 64)
    assert dataset.identifiers == ["file0", "file2", "file3", "file4"]
    assert dataset.shapes.tolist() == [[64, 64], [48, 80], [48, 80], [48, 80]]  # file3 is shown lying
    unread = bucketed(dataset_of([png(200, 100), b"broken", b"torn"]), BUCKETS, 64)
    assert unread.shapes.tolist() == [[48, 80]] * 3  # the commonest of those that could be read
    with pytest.raises(UserError, match="all 1 pictures are smaller"):
        bucketed(dataset_of([png(20, 20)]), BUCKETS, 64)


def test_sizes_are_read_once_until_they_change(monkeypatch, tmp_path):
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path))
    pictures, read = [png(100, 100), png(200, 100)] * 30, []
    dataset = ImageDataset(["a"] * 60, [str(i) for i in range(60)], lambda i: read.append(i) or pictures[i])
    first = bucketed(dataset, BUCKETS, 64).shapes
    assert set(read) == set(range(60)) and len(read) == 61  # the first tells what kind they are
    read.clear()
    assert torch.equal(bucketed(dataset, BUCKETS, 64).shapes, first) and len(read) <= 21
    pictures.reverse()
    assert torch.equal(bucketed(dataset, BUCKETS, 64).shapes, first.flip(0))


def test_a_picture_that_has_changed_is_measured_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    for i in range(64):
        Image.new("RGB", (64, 48)).save(tmp_path / "pictures" / f"{i:03d}.png")
    config = FolderConfig(str(tmp_path / "pictures"), size=32, buckets=Buckets(step=8))
    assert len(config.build()) == 64
    Image.new("RGB", (9, 24)).save(tmp_path / "pictures" / "001.png")
    with pytest.warns(UserWarning, match="1 of 64 pictures are left out"):
        assert len(config.build()) == 63


def test_files_are_told_apart_by_their_length_and_both_their_ends(tmp_path):
    made = [b"0" * 2**18, b"1" + b"0" * (2**18 - 1), b"0" * (2**18 - 1) + b"1", b"0" * 2**17]
    for i, content in enumerate(made):
        (tmp_path / str(i)).write_bytes(content)
    assert len({digest(tmp_path / str(i)) for i in range(4)}) == 4


# ----------------------------------------------------------------------------------------------------------- the stream

BUCKET = torch.tensor(([0] * 13 + [1] * 3 + [2] * 8)[::-1])


def batches(**options) -> list[list[tuple[int, int]]]:
    return list(StreamSampler(24, bucket=BUCKET, **{"seed": 3, "batch_size": 4, "steps": 30, **options}))


def test_a_batch_has_one_bucket_and_every_epoch_every_sample():
    steps = batches(steps=60)
    for step in steps:
        assert len({int(BUCKET[i]) for i, _ in step}) == 1
    assert [p for step in steps for _, p in step] == list(range(240))
    seen = Counter(i for step in steps for i, _ in step)
    assert all(abs(seen[i] - 10) <= 1 for i in range(24)), seen


def test_the_samples_of_a_bucket_come_in_the_order_of_the_stream():
    steps = batches(steps=200)
    for b, n in enumerate((13, 3, 8)):
        came = [i for step in steps for i, _ in step if BUCKET[i] == b]
        for epoch in range(len(came) // n):
            order = epoch_order(24, 3, epoch)
            assert came[epoch * n : (epoch + 1) * n] == order[BUCKET[order] == b].tolist()


def test_without_buckets_it_is_the_plain_stream():
    plain = [pair for step in StreamSampler(24, seed=3, batch_size=4, steps=30) for pair in step]
    assert [i for i, _ in plain] == [int(epoch_order(24, 3, p // 24)[p % 24]) for _, p in plain]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_ranks_share_out_the_same_steps(world, accumulation):
    ranks = [batches(rank=r, world=world, accumulation=accumulation) for r in range(world)]
    for step, whole in enumerate(batches()):
        micro = [step * accumulation + a for a in range(accumulation)]
        assert [pair for m in micro for rank in ranks for pair in rank[m]] == whole


@pytest.mark.parametrize("start", [1, 2, 5, 6, 7, 12, 29])
def test_a_later_start_is_the_same_stream(start):
    assert batches(start_step=start) == batches()[start:]


@pytest.mark.parametrize("start", [1, 19, 20, 39])
def test_a_later_start_is_found_where_every_picture_has_a_bucket_of_its_own(start):
    one = {"bucket": torch.arange(20), "seed": 0, "batch_size": 4, "steps": 45}
    assert list(StreamSampler(20, start_step=start, **one)) == list(StreamSampler(20, **one))[start:]


def test_a_start_far_away_is_found_at_once():
    far = batches(start_step=10**9, steps=10**9 + 2)
    assert len(far) == 2 and far[0][0][1] == 4 * 10**9


def test_a_bucket_of_one_picture_fills_its_batch_over_epochs():
    bucket = torch.tensor([0] * 7 + [1])
    steps = list(StreamSampler(8, seed=0, batch_size=4, steps=16, bucket=bucket))
    alone = [s for s, step in enumerate(steps) if bucket[step[0][0]] == 1]
    assert len(alone) == 2 and [i for i, _ in steps[alone[0]]] == [7] * 4  # in its turn: 8 pictures of 64


# ---------------------------------------------------------------------------------------------------------- the batches


def test_batches_have_the_shapes_and_the_pictures():
    pictures = [png(100, 100, "red")] * 3 + [png(100, 200, "lime")] * 2 + [png(200, 100, "blue")] * 3
    dataset = bucketed(dataset_of(pictures), BUCKETS, 64)
    sampler = StreamSampler.over(dataset, seed=0, batch_size=2, steps=16)
    for plain, forked in zip(load_all(dataset, sampler), load_all(dataset, sampler, workers=1), strict=True):
        shapes = {tuple(dataset.shapes[i].tolist()) for i in plain.index}
        assert {plain.x.shape[2:]} == shapes and torch.equal(plain.x, forked.x)
        for x, i in zip(plain.x, plain.index, strict=True):
            assert int(x.mean((1, 2)).argmax()) == (0 if i < 3 else 1 if i < 5 else 2)
    counts = Counter(i for step in sampler for i, _ in step)
    assert set(counts) == set(range(8))


def test_a_broken_picture_is_replaced_by_one_of_its_shape_if_there_is_one():
    pictures = [png(100, 100), png(100, 200)[:120], png(100, 100), png(100, 200)]
    dataset = bucketed(dataset_of(pictures), BUCKETS, 64)
    (one,) = load_all(dataset, [[(1, 0)]])
    assert one.index.tolist() == [3] and one.x.shape[2:] == (80, 48) and one.bad[0][0] == "file1"
    pictures[3] = pictures[1]
    (one,) = load_all(dataset, [[(1, 0)]])
    assert one.index.tolist() == [2] and one.x.shape[2:] == (80, 48)
    (mixed,) = load_all(dataset, [[(2, 0), (1, 1)]])
    assert mixed.x.shape == (2, 3, 64, 64)


def test_the_first_samples_in_order_are_batches_of_one_shape():
    dataset = bucketed(dataset_of([png(100, 100), png(200, 100)] * 3), BUCKETS, 64)
    assert in_order(dataset, 5, 2) == [[(0, 0), (2, 2)], [(4, 4)], [(1, 1), (3, 3)]]
    plain = dataset_of([png(100, 100), png(200, 100)] * 3)
    assert in_order(plain, 5, 2) == [[(0, 0), (1, 1)], [(2, 2), (3, 3)], [(4, 4)]]


def test_without_own_shapes_a_bucketed_data_set_is_square():
    dataset = bucketed(dataset_of([png(100, 100), png(200, 100)]), BUCKETS, 64)
    conditions = PreparedConditions.prepare(dataset, LearnedTextConfig(dim=8, heads=2).build())
    (batch,) = loader(dataset, conditions, [[(0, 0), (1, 1)]], shape=(3, 64, 64))
    assert batch.x.shape == (2, 3, 64, 64)


# ---------------------------------------------------------------------------------------------------------------- a run


def save_pictures(folder: Path) -> Path:
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(12):
        size = (24, 24) if i % 3 else (36, 20)
        Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_a_run_on_buckets_resumes_to_the_same_weights(tmp_path):
    from genflow.training.run import train

    pictures = save_pictures(tmp_path / "pictures")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
data: {{name: folder, path: {pictures}, size: 16, flip: true, buckets: {{step: 4}}}}
text: {{name: learned, dim: 8, layers: 1, heads: 2, max_tokens: 4}}
model: {{name: mmdit, depth: 1, hidden: 16, heads: 2, patch_size: 4}}
train: {{batch_size: 4, warmup: 1, save_every: 3, preview_every: 0, trackers: [], precision: fp32, validate_every: 3,
        validation_split: train}}
"""
    )
    whole = train(config, [f"out={tmp_path / 'whole'}", "train.steps=6"])
    train(config, [f"out={tmp_path / 'parts'}", "train.steps=3"])
    parts = train(config, [f"out={tmp_path / 'parts'}", "train.steps=6"])
    file = "checkpoints/step-00000006/model.safetensors"
    assert (whole / file).read_bytes() == (parts / file).read_bytes()
    dataset = FolderConfig(str(pictures), size=16, buckets=Buckets(step=4)).build()
    assert len(dataset.shapes.unique(dim=0)) == 2


def test_a_model_of_one_shape_refuses_buckets(tmp_path, capsys):
    from genflow.cli import main

    pictures = save_pictures(tmp_path / "pictures")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{name: folder, path: {pictures}, size: 16, buckets: {{step: 4}}}}\nmodel: glow\nflow: normalizing\n"
    )
    for checkpointing in ("false", "true"):
        how = ["train.precision=fp32", f"train.checkpointing={checkpointing}", f"out={tmp_path / 'run'}"]
        assert main(["train", str(config), *how]) == 2
        assert "the model takes samples of one shape; leave buckets out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "model",
    [
        "{name: mmdit, depth: 1, hidden: 16, patch_size: 8}\nflow: rectified\ntext: learned\n",
        "{name: tiny_autoencoder, factor: 8, width: 8, blocks: 1}\nflow: autoencoder\n",
    ],
)
def test_buckets_that_the_network_does_not_divide_are_refused_before_the_first_step(tmp_path, capsys, model):
    from genflow.cli import main

    pictures, config = save_pictures(tmp_path / "pictures"), tmp_path / "run.yaml"
    config.write_text(f"data: {{name: folder, path: {pictures}, size: 16, buckets: {{step: 4}}}}\nmodel: {model}")
    assert main(["train", str(config), "train.precision=fp32", f"out={tmp_path / 'run'}"]) == 2
    assert re.search(r"one is \d+ x \d+, but the network takes multiples of 8; make", capsys.readouterr().err)


def test_pictures_that_the_network_does_not_divide_are_refused_before_the_run_begins(tmp_path):
    from genflow.training.run import train

    pictures, config = save_pictures(tmp_path / "pictures"), tmp_path / "run.yaml"
    model = "{name: mmdit, depth: 1, hidden: 16, patch_size: 8}\nflow: rectified\ntext: learned\n"
    config.write_text(f"data: {{name: folder, path: {pictures}, size: 30}}\nmodel: {model}")
    with pytest.raises(UserError, match="multiples of 8, not 30 x 30; try 32 x 32"):
        train(config, [f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_picture_without_a_head_goes_to_the_commonest_shape():
    pictures = [png(200, 100), b"broken", png(100, 100), png(100, 100), png(100, 100)]
    assert bucketed(dataset_of(pictures), BUCKETS, 64).shapes.tolist()[1] == [64, 64]
    pictures = [png(100, 100), b"broken", png(200, 100), png(200, 100), png(200, 100)]
    assert bucketed(dataset_of(pictures), BUCKETS, 64).shapes.tolist()[1] == [48, 80]
