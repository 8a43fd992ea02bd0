"""Parquet files, hub data sets, and torchvision's by name."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest

from genflow.data.images import BadImage, fit
from genflow.data.streaming import WebDatasetConfig
from genflow.data.tables import HubConfig, ParquetConfig
from genflow.data.vision import CIFAR10Config, FashionMNISTConfig, MNISTConfig
from genflow.errors import UserError
from tests.pictures import png


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"image": [png("red"), b"broken", png("blue"), None], "caption": ["r", "x", "b", "n"]}
    pq.write_table(pa.table({**table, "part": ["train", "train", "test", "train"]}), tmp_path / "a.parquet")
    dataset = ParquetConfig(path=str(tmp_path), split_column="part").build()
    assert dataset.captions == ["r", "x", "n"] and dataset.image(0).getpixel((0, 0)) == (255, 0, 0)
    for i in (1, 2):
        with pytest.raises(BadImage):
            dataset.image(i)
    assert len(ParquetConfig(path=str(tmp_path / "*.parquet")).build()) == 4
    with pytest.raises(UserError, match="no column 'split' for split 'test'"):
        ParquetConfig(path=str(tmp_path)).build("test")
    with pytest.raises(UserError, match=r"no column 'prt' for split 'train'\. Did you mean 'part'"):
        ParquetConfig(path=str(tmp_path), split_column="prt").build()
    with pytest.raises(UserError, match=r"no row is of split 'tst'\. Did you mean 'test'"):
        ParquetConfig(path=str(tmp_path), split_column="part").build("tst")
    with pytest.raises(UserError, match=r"no column 'capton'\. Did you mean 'caption'"):
        ParquetConfig(path=str(tmp_path), caption="capton").build()
    pq.write_table(pa.table({**table, "split": ["train", "train", "test", "train"]}), tmp_path / "a.parquet")
    assert ParquetConfig(path=str(tmp_path)).build("test").captions == ["b"]


def test_class_labels_become_names(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}] * 3, "label": [1, 0, 1]}, features)
    table.to_parquet(str(tmp_path / "train.parquet"))
    assert HubConfig(repo=str(tmp_path)).build().captions == ["dog", "cat", "dog"]
    with pytest.raises(UserError, match="cannot be loaded"):
        HubConfig(repo=str(tmp_path)).build("nope")


def test_a_hub_that_cannot_be_reached_costs_one_line():
    with pytest.raises(UserError, match="nobody/no-such-data: cannot be loaded") as caught:
        HubConfig(repo="nobody/no-such-data").build()
    assert "\n" not in str(caught.value)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.mark.parametrize(
    ("config", "folder", "label"), [(MNISTConfig, "MNIST", "3"), (FashionMNISTConfig, "FashionMNIST", "Dress")]
)
def test_mnist_and_fashion_mnist(tmp_path, config, folder, label):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 5), ("t10k", 2)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(np.full((n, 28, 28), 7, np.uint8)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.full(n, 3, np.uint8)))
    dataset = config(root=str(tmp_path)).build()
    assert len(dataset) == 5 and dataset.captions[0] == label and config.channels == 1
    assert len(config(root=str(tmp_path)).build("test")) == 2
    assert int(fit(dataset.image(0), 28, 1).float().mean()) == 7


def test_cifar10(tmp_path, monkeypatch):
    from torchvision.datasets import cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)  # the real files' checksums
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.tile(np.repeat(np.array([255, 0, 9], np.uint8), 1024), (2, 1))
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [1, 0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane", "automobile"]}))
    dataset = CIFAR10Config(root=str(tmp_path)).build()
    assert len(dataset) == 10 and dataset.captions[:2] == ["automobile", "airplane"]
    assert dataset.image(0).getpixel((5, 5)) == (255, 0, 9)
    assert len(CIFAR10Config(root=str(tmp_path)).build("test")) == 2
    with pytest.raises(UserError, match=r"no split 'tset'\. Did you mean 'test'"):
        CIFAR10Config(root=str(tmp_path)).build("tset")


def test_nothing_is_fetched_unasked(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda _: pytest.fail("fetched"))
    with pytest.raises(UserError, match="MNIST: not in"):
        MNISTConfig(root=str(tmp_path), download=False).build()


def test_cifar10_missing_and_offline_costs_one_line(tmp_path, monkeypatch):
    import torchvision

    def refuse(*_args, **_kwargs):
        raise OSError("no network here")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", refuse)
    with pytest.raises(
        UserError, match=r"CIFAR10: not in .* could not be fetched .*no network here.*; set root to a folder"
    ):
        CIFAR10Config(root=str(tmp_path)).build()


@pytest.mark.parametrize(
    "data",
    [b"", b"junk, no pictures", idx(np.zeros((2, 28, 28), np.uint8))[:100]],
    ids=["empty", "junk", "cut"],
)
@pytest.mark.parametrize("download", [False, True])
def test_damaged_files_cost_one_line(tmp_path, data, download):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(data)
    with pytest.raises(UserError, match=r"MNIST: not in .*, or damaged") as caught:
        MNISTConfig(root=str(tmp_path), download=download).build()
    assert "\n" not in str(caught.value)


def test_files_that_are_none_cost_one_line(tmp_path):
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("datasets").addHandler(handler)
    try:
        for config, name in ((ParquetConfig, "a.parquet"), (WebDatasetConfig, "a.tar")):
            (tmp_path / name).write_bytes(b"PAR1 junk" * 100)
            with pytest.raises(UserError, match="cannot be loaded") as caught:
                config(path=str(tmp_path / name)).build()
            assert "\n" not in str(caught.value)
    finally:
        logging.getLogger("datasets").removeHandler(handler)
    assert not said  # the library adds none of its own
