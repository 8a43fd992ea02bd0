"""Tensors in safetensors files, read one by one when they are asked for, and written one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genflow.errors import UserError
from genflow.saving import leftovers, replacing

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = re.compile(r"\.safetensors\.index(\.[^.]+)?\.json$")  # with a variant: model.safetensors.index.fp16.json
SHARD = re.compile(r"-\d+-of-\d+(?=\.safetensors$)")
USUAL = ("model", "diffusion_pytorch_model")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SAFE = "take the .safetensors file of the same model, or save it as one where it was made"
# How files begin that are often taken for safetensors.
DISGUISES = {
    b"PK\x03\x04": f"is a pickle, which can run any code when it is opened; {SAFE}",
    **{bytes([128, i]): f"is a pickle, which can run any code when it is opened; {SAFE}" for i in range(2, 6)},
    b"GGUF": "is a GGUF file of quantised weights; take the .safetensors file of the same model",
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself; fetch it with git lfs pull",
    b"<": "is a web page, perhaps one that asks to log in; download the file again",
}


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when it is read, and kept by nobody."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> Lazy:
        return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def map(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> Lazy:
        """change(tensor), of this shape or another."""
        return Lazy(self.shape if shape is None else shape, self.dtype, lambda: change(self.read()))


def read_file(path: Path) -> dict[str, Lazy]:
    """The tensors of one safetensors file by name. Raises UserError for a file that is none, or is cut short.

    A tensor is mapped from the file for as long as it is held, so that a file of any size takes no more memory than
    what is in use of it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            kinds = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} {_fault(path, error)}") from error
    if unknown := [(key, dtype) for key, (_, dtype) in kinds.items() if dtype not in DTYPES]:
        raise UserError(f"{path}: {unknown[0][0]} is of type {unknown[0][1]}, which is not known here")

    def reader(key: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(path, framework="pt") as file:  # a mapping of its own, which goes when the tensor goes
                return file.get_tensor(key)

        return read

    return {key: Lazy(shape, DTYPES[dtype], reader(key)) for key, (shape, dtype) in kinds.items()}


def _fault(path: Path, error: Exception) -> str:
    """What is wrong with a file that is no readable safetensors file, and what to do."""
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError as cause:
        return f"cannot be read: {cause.strerror or cause}"
    if head[8:9] == b"{":
        return f"is damaged or cut short ({path.stat().st_size} bytes; {error}); download or copy it again"
    for beginning, what in DISGUISES.items():
        if head.startswith(beginning):
            return what
    if path.suffix in PICKLES:
        return f"is no safetensors file, the only kind that is read; {SAFE}"
    return "is no safetensors file, whatever its name says; download or copy it again"


def read_folder(folder: Path) -> dict[str, Lazy]:
    """The tensors of a folder's one safetensors file, or of its shards by their index.

    Of several the plain one is taken (not `model.fp16.safetensors`), and of several plain ones that of a usual name. Raises
    UserError where this leaves none or several, where a shard is missing or lacks what the index says, and for shards
    without an index.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; copy the whole folder")
    found: dict[str, Path] = {}  # by name: one file, else the index of shards, else one of them
    for path in sorted(folder.glob("*-of-*.safetensors")) + sorted(folder.glob("*.safetensors.index*.json")):
        found[SHARD.sub("", INDEX.sub(r"\1", path.name)).removesuffix(".safetensors")] = path
    found |= {path.stem: path for path in sorted(folder.glob("*.safetensors")) if not SHARD.search(path.name)}
    for better in (lambda name: "." not in name, USUAL.__contains__):
        found = {name: path for name, path in found.items() if better(name)} or found
    if len(found) > 1:
        first = min(path.name for path in found.values())
        raise UserError(f"{folder} holds {len(found)} files of weights, {first} first; name the one that is meant")
    for name, path in found.items():
        if INDEX.search(path.name):
            return _read_shards(path)
        if SHARD.search(path.name):
            index = f"{name}.safetensors.index.json"
            raise UserError(f"{folder} holds {path.name}, but no {index} that tells its shards; copy it as well")
        return read_file(path)
    if pickles := [p for p in sorted(folder.iterdir()) if p.suffix in PICKLES]:
        raise UserError(f"{pickles[0]} {_fault(pickles[0], ValueError())}")
    raise UserError(f"{folder} holds no .safetensors file")


def _read_shards(index: Path) -> dict[str, Lazy]:
    try:
        where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted(set(where.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a shard is not beside it")
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is damaged ({error}); copy it again") from error
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index.parent} lacks {missing[0]}, one of {len(names)} shards; copy it as well")
    files = {name: read_file(index.parent / name) for name in names}
    if lost := [key for key, name in where.items() if key not in files[name]]:
        raise UserError(
            f"{index.parent / where[lost[0]]} lacks {lost[0]}, which {index.name} says is there; copy it again"
        )
    return {key: files[name][key] for key, name in where.items()}


def refuse_full(out: Path) -> None:
    """Raises UserError for a place that holds something; what a killed process left of its first file is nothing."""
    left = (path.match(".*.partial") or (path.is_dir() and not path.is_symlink()) for path in out.rglob("*"))
    if out.is_file() or not all(left):
        raise UserError(f"{out} is there already; choose another place, so that nothing is lost")


def write_file(path: Path, tensors: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor in memory at a time, and move it into place; bytes as safetensors writes them.

    The format: 8 bytes of the header's length, the header in JSON, the tensors' bytes, little-endian and row by row.
    Raises UserError where the disk refuses.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        tensor = tensors[key]
        start, end = end, end + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in leftovers(path):
            left.unlink(missing_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key in order:
                value = tensors[key].read().detach().cpu()
                assert (tuple(value.shape), value.dtype) == (tensors[key].shape, tensors[key].dtype), key
                file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The least dtype that holds every number of these and is computed in: bfloat16 for those of 8 bits."""
    return reduce(torch.promote_types, (torch.bfloat16 if dtype.itemsize == 1 else dtype for dtype in dtypes))


def strip(tensors: Mapping[str, Lazy], prefix: str) -> dict[str, Lazy]:
    """Those whose names begin with prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def numbers(names: Mapping[str, object], pattern: str) -> list[int]:
    """The distinct numbers that a pattern's group finds at the beginning of names, in order."""
    return sorted({int(found[1]) for name in names if (found := re.match(pattern, name))})
