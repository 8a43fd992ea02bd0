"""The order of a run's samples, their batches, and what stands in for pictures that cannot be read."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal

import pytest
import torch
from PIL import Image

from genflow.data import prepared, sources
from genflow.data.images import BadImage, ImageDataset
from genflow.data.loading import StreamSampler, epoch_order, loader
from genflow.data.prepared import PreparedConditions
from genflow.errors import UserError
from genflow.text.trained import LearnedTextConfig
from tests.pictures import png

# ----------------------------------------------------------------------------------------------------------- the stream


def stream(**options):
    base = {"seed": 3, "batch_size": 8, "steps": 6}
    return [pair for batch in StreamSampler(5, **{**base, **options}) for pair in batch]


def test_every_epoch_is_a_permutation_and_batches_cross_epochs():
    pairs = stream(steps=10)
    assert [p for _, p in pairs] == list(range(80))
    for epoch in range(16):
        assert sorted(i for i, p in pairs if p // 5 == epoch) == list(range(5))
    assert len({tuple(epoch_order(5, 3, e).tolist()) for e in range(20)}) > 10
    assert epoch_order(50, 3, 0).tolist() != epoch_order(50, 4, 0).tolist()


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_ranks_and_micro_batches_share_out_the_same_steps(world, accumulation):
    per_rank = [
        list(StreamSampler(5, seed=3, batch_size=8, steps=6, rank=r, world=world, accumulation=accumulation))
        for r in range(world)
    ]
    whole = list(StreamSampler(5, seed=3, batch_size=8, steps=6))
    for step in range(6):
        micro = [step * accumulation + a for a in range(accumulation)]
        assert [pair for m in micro for rank in per_rank for pair in rank[m]] == whole[step]


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
    return list(loader(dataset, conditions, sampler, shape=(3, size, size), flip=flip, seed=1, workers=workers))


def test_batches_hold_what_they_say():
    colors = ["red", "lime", "blue", "black", "white"]
    batches = load_all(dataset_of([png(c) for c in colors]))
    assert len(batches) == 4
    rgb = {0: (1, -1, -1), 1: (-1, 1, -1), 2: (-1, -1, 1), 3: (-1, -1, -1), 4: (1, 1, 1)}
    text = LearnedTextConfig(dim=8, heads=2).build()
    for batch in batches:
        assert batch.x.dtype == torch.float32 and batch.x.shape == (4, 3, 16, 16)
        for row in range(4):
            i = int(batch.index[row])
            assert tuple(batch.x[row, :, 0, 0].tolist()) == rgb[i]
            assert batch.ids[row] == f"file{i}" and batch.captions[row] == f"caption {i % 3}"
            assert torch.equal(batch.condition.tokens[row], text.encode([f"caption {i % 3}"]).tokens[0])
    assert torch.cat([b.position for b in batches]).tolist() == list(range(16))


def test_an_order_says_nothing_of_the_next():
    n = 2000
    a, b = epoch_order(n, 0, 0).double(), epoch_order(n, 0, 1).double()
    for x, y in ((a, b), (a, torch.arange(n)), (a[1:], a[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < 4 / n**0.5


def test_the_order_is_frozen():
    """A run must be resumable by a later version."""
    assert epoch_order(8, 0, 0).tolist() == [7, 6, 5, 4, 3, 0, 1, 2]


def test_nothing_to_batch_is_refused():
    with pytest.raises(UserError, match="out of 0 pictures"):
        StreamSampler(0, seed=0, batch_size=8, steps=1)
    with pytest.raises(UserError, match="a batch of 0"):
        StreamSampler(8, seed=0, batch_size=0, steps=1)
    with pytest.raises(UserError, match="size=0 must be 1 or more"):
        load_all(dataset_of([png()]), size=0)


def test_workers_change_nothing():
    dataset = dataset_of([png((i * 20, 0, 0)) for i in range(7)])
    for a, b in zip(load_all(dataset, flip=True), load_all(dataset, workers=2, flip=True), strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.position, b.position) and a.ids == b.ids


def test_flips_depend_on_the_position_alone():
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 8, 16))
    out = io.BytesIO()
    image.save(out, "PNG")
    dataset = dataset_of([out.getvalue()] * 3)
    batches = load_all(dataset, flip=True, steps=50)
    turned = torch.cat([b.x[:, 0, 0, 0] for b in batches]) > 0
    index = torch.cat([b.index for b in batches])
    for i in range(3):
        assert 0.25 < turned[index == i].float().mean() < 0.75
    conditions = PreparedConditions.prepare(dataset, LearnedTextConfig(dim=8, heads=2).build())
    for one in loader(dataset, conditions, [[(2, p)] for p in range(200)], shape=(3, 16, 16), flip=True, seed=1):
        assert bool(one.x[0, 0, 0, 0] > 0) == bool(turned[one.position[0]])
    assert not any((b.x[:, 0, 0, 0] > 0).any() for b in load_all(dataset))


def test_bad_pictures_are_passed_over_and_named():
    pictures = [png("red"), b"text", png("blue")[:45], png("lime", size=(4, 4)), png("white")]
    batches = load_all(dataset_of(pictures))
    assert {i for b in batches for i in b.index.tolist()} == {0, 4}
    assert {name for b in batches for name, _ in b.bad} == {"file1", "file2", "file3"}
    for a, b in zip(batches, load_all(dataset_of(pictures), workers=1), strict=True):
        assert torch.equal(a.x, b.x) and a.bad == b.bad


def test_nothing_but_bad_pictures_is_an_error():
    with pytest.raises(UserError, match="none of the 2 pictures can be read; file"):
        load_all(dataset_of([b"a", b"b"]))


def test_a_worker_s_error_is_one_line():
    with pytest.raises(UserError, match="none of the 2 pictures can be read; file") as caught:
        load_all(dataset_of([b"a", b"b"]), workers=1)
    assert "\n" not in str(caught.value)


def test_the_next_good_picture_stands_in():
    pictures = [png("red"), b"", b"", png("blue"), b""]
    for batch in load_all(dataset_of(pictures), steps=10):
        for row, position in enumerate(batch.position.tolist()):
            asked = int(epoch_order(5, 1, position // 5)[position % 5])
            assert batch.index[row] == [0, 3, 3, 3, 0][asked]
            assert batch.captions[row] == "caption 0" and batch.ids[row] == f"file{[0, 3, 3, 3, 0][asked]}"


def test_pictures_are_decoded_once_for_all_processes():
    decoded = []

    def read(i: int) -> bytes:
        decoded.append(i)
        return png((i, 0, 0))

    pictures = sources.Pictures(ImageDataset(["a", "b"], ["a", "b"], read), size=16, channels=3)
    worker = multiprocessing.get_context("fork").Process(target=pictures.__getitem__, args=(1,))
    worker.start()
    worker.join()
    assert pictures[1][0, 0, 0] == 1 and decoded == []
    assert pictures[0][0, 0, 0] == 0 and pictures[0][0, 0, 0] == 0 and decoded == [0]


def test_large_data_sets_are_not_kept(monkeypatch):
    dataset = dataset_of([png((i * 20, 0, 0)) for i in range(7)] + [b"bad"])
    kept = load_all(dataset)
    monkeypatch.setattr(sources, "MEMORY", 100)
    for a, b in zip(kept, load_all(dataset), strict=True):
        assert torch.equal(a.x, b.x) and a.bad == b.bad
    with pytest.raises(BadImage):
        sources.Pictures(dataset, size=16, channels=3)[7]


def test_workers_leave_interrupts_to_the_main_process():
    dataset = dataset_of([png()] * 3)
    conditions = PreparedConditions.prepare(dataset, LearnedTextConfig(dim=8, heads=2).build())
    sampler = StreamSampler(3, seed=0, batch_size=2, steps=20)
    batches = loader(dataset, conditions, sampler, shape=(3, 16, 16), workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 19


@pytest.mark.gpu
def test_batches_are_pinned_where_there_is_a_gpu():
    batch = load_all(dataset_of([png()] * 3), workers=1)[0]
    assert batch.x.is_pinned() and batch.condition.tokens.is_pinned()
    assert batch.to("cuda").x.is_cuda and batch.to("cuda").condition.mask.is_cuda


# ----------------------------------------------------------------------------------------------------- their conditions


def test_each_caption_is_encoded_once():
    text = LearnedTextConfig(dim=8, heads=2).build()
    dataset = ImageDataset(["b", "a", "b", ""], ["x"] * 4, lambda _: png())
    conditions = PreparedConditions.prepare(dataset, text)
    assert len(conditions.table) == 3 and conditions.row.tolist() == [0, 1, 0, 2]
    assert torch.equal(conditions[torch.tensor([3, 1])].tokens, text.encode(["", "a"]).tokens)


def test_a_large_table_is_encoded_by_chunks_and_lies_on_disk(monkeypatch, tmp_path):
    captions = [f"caption {i}" for i in range(23)]
    dataset = ImageDataset(captions, captions, lambda _: png())
    text = LearnedTextConfig(dim=8, heads=2).build()
    whole = PreparedConditions.prepare(dataset, text)
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "CHUNK", 5)
    monkeypatch.setattr(prepared, "MEMORY", 100)
    parts = PreparedConditions.prepare(dataset, text)
    assert list((tmp_path / "cache").iterdir()) == []  # nothing is left behind
    index = torch.tensor([22, 0, 7])
    for name in ("tokens", "mask", "pooled"):
        assert torch.equal(getattr(whole.table, name), getattr(parts.table, name))
        assert torch.equal(getattr(whole[index], name), getattr(parts[index], name))


def test_no_room_for_a_table_costs_one_line(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(prepared, "CHUNK", 1)
    monkeypatch.setattr(prepared, "MEMORY", 1)
    dataset = ImageDataset(["a", "b"], ["a", "b"], lambda _: png())
    with pytest.raises(UserError, match=r"no room for .* No space left on device"):
        PreparedConditions.prepare(dataset, LearnedTextConfig(dim=8, heads=2).build())


def test_flips_hang_on_the_seed():
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 8, 16))
    out = io.BytesIO()
    image.save(out, "PNG")
    dataset = dataset_of([out.getvalue()])
    conditions = PreparedConditions.prepare(dataset, LearnedTextConfig(dim=8, heads=2).build())
    turned = []
    for seed in (1, 2):
        keys = [[(0, p) for p in range(64)]]
        (one,) = loader(dataset, conditions, keys, shape=(3, 16, 16), flip=True, seed=seed)
        turned.append(one.x[:, 0, 0, 0] > 0)
    assert not torch.equal(*turned)


def test_a_batch_comes_when_its_bucket_is_full_in_the_order_of_the_stream():
    bucket = torch.arange(40) % 3
    got = list(StreamSampler(40, seed=1, batch_size=4, steps=9, bucket=bucket))
    waiting, expected = {}, []
    for i in epoch_order(40, 1, 0).tolist():
        waiting.setdefault(i % 3, []).append(i)
        if len(waiting[i % 3]) == 4:
            expected.append(waiting.pop(i % 3))
    assert [[i for i, _ in keys] for keys in got] == expected[:9]


def test_a_batch_that_micro_batches_do_not_divide_is_refused():
    with pytest.raises(UserError, match="does not divide by 1 ranks x 3 micro-batches"):
        StreamSampler(40, seed=1, batch_size=4, steps=9, accumulation=3)
