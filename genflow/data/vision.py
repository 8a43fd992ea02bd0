"""torchvision's labelled sets by name; a picture's caption is the name of its class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from genflow.cachedir import cache_folder
from genflow.data.images import ImageDataset
from genflow.data.locks import lock
from genflow.errors import UserError, nearest
from genflow.registry import dataset_export


def _labelled(
    name: str, split: str, *, root: str | None, download: bool, classes: list[str] | None = None
) -> ImageDataset:
    from torchvision import datasets

    if split not in ("train", "test"):
        raise UserError(f"data {name}: no split {split!r}.{nearest(split, ('train', 'test'))}")
    folder = Path(root).expanduser() if root else cache_folder() / "torchvision"
    build: Any = getattr(datasets, name)
    try:
        data = build(str(folder), train=split == "train", download=False)
    except Exception as error:  # torchvision asserts, and checks little of what it reads
        if not download:
            raise UserError(f"data {name}: not in {folder}, or damaged; set root, or download: true") from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f".{name}.lock").open("a") as file:  # torchvision writes in place: one process fetches
                lock(file, wait=True)
                data = build(str(folder), train=split == "train", download=True)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            what = f"not in {folder}, or damaged, and could not be fetched"
            raise UserError(f"data {name}: {what} ({reason}); set root to a folder that has it") from error
    names = classes or list(data.classes)
    captions = [names[int(i)] for i in data.targets]
    return ImageDataset(captions, [f"{name}/{split}[{i}]" for i in range(len(data))], lambda i: data[i][0])


@dataset_export("mnist")
@dataclass(frozen=True)
class MNISTConfig:
    """Handwritten digits, 28 pixels, grey. root: torchvision's folder, fetched there (download)."""

    root: str | None = None
    download: bool = True
    size: int = 28
    flip: bool = False

    channels: ClassVar[int] = 1

    def build(self, split: str = "train") -> ImageDataset:
        return _labelled("MNIST", split, root=self.root, download=self.download, classes=[str(i) for i in range(10)])


@dataset_export("fashion_mnist")
@dataclass(frozen=True)
class FashionMNISTConfig:
    """Clothes, 28 pixels, grey. root: torchvision's folder, fetched there (download)."""

    root: str | None = None
    download: bool = True
    size: int = 28
    flip: bool = False

    channels: ClassVar[int] = 1

    def build(self, split: str = "train") -> ImageDataset:
        return _labelled("FashionMNIST", split, root=self.root, download=self.download)


@dataset_export("cifar10")
@dataclass(frozen=True)
class CIFAR10Config:
    """Small photographs of ten classes, 32 pixels. root: torchvision's folder, fetched there (download)."""

    root: str | None = None
    download: bool = True
    size: int = 32
    flip: bool = True

    channels: ClassVar[int] = 3

    def build(self, split: str = "train") -> ImageDataset:
        return _labelled("CIFAR10", split, root=self.root, download=self.download)
