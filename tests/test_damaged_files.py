"""Files that are damaged, cut short or more than one costs a line, and what is written is whole."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from genflow.data.latents import KEYS, LatentsConfig
from genflow.data.pairs import PairsConfig, write_pairs
from genflow.data.pictures import read_settings, write_atomic
from genflow.errors import UserError
from genflow.interop.tensors import Lazy, read_file, read_folder, write_file
from genflow.saving import replacing


@pytest.mark.parametrize(("text", "message"), [("{", "damaged"), ("a" * 5_000_000, "damaged"), ("[1]", "carries no")])
def test_settings_that_are_none_cost_one_line(tmp_path, text, message):
    info = PngInfo()
    info.add_itxt("genflow", text, zip=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(UserError, match=message):
        read_settings(tmp_path / "a.png")


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.bin", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_is_ended_leaves_no_half_file(tmp_path):
    program = """
import os, signal, sys, torch
from pathlib import Path
import genflow.interop.convert
from genflow.cli import main
from genflow.interop import tensors
def ended(source, out, **how):
    number = tensors.Lazy.of(torch.zeros(1)).map(lambda x: os.kill(os.getpid(), signal.SIGTERM) or x)
    tensors.write_file(Path(out) / "model.safetensors", {"x": number})
sys.modules["genflow.interop.convert"].convert = ended
sys.argv = ["genflow", "convert", "run", sys.argv[1]]
sys.exit(main())
"""
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode == 128 + signal.SIGTERM and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [{"dtype": "int8"}, {"latents": "x"}, dict.fromkeys(KEYS)], ids=["dtype", "count", "nulls"]
)
def test_a_cache_that_says_impossible_things_costs_one_line(tmp_path, change):
    head = {"shape": [3, 8, 8], "channels": 4, "flip": False, "dtype": "float32", "autoencoder": "a", "text": None}
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cache.json").write_text(
        json.dumps({**head, "data": None, "latents": 0, "texts": 0, **change})
    )
    with pytest.raises(UserError, match=r"cache\.json is damaged"):
        LatentsConfig(str(tmp_path)).build()


def test_pairs_that_are_too_few_or_not_finite_are_refused(tmp_path):
    how = {"captions": ["a"] * 5, "shape": (2,), "about": {}}
    write_pairs(tmp_path / "a", lambda r: (torch.zeros(len(r), 2), torch.ones(len(r), 2)), **how)
    save_file(
        dict.fromkeys(("x", "noise"), torch.ones(2, 2)) | {"x": torch.zeros(2, 2)},
        tmp_path / "a/shard-00000.safetensors",
    )
    with pytest.raises(UserError, match="damaged .*holds no 5 pairs of shape"):
        PairsConfig(str(tmp_path / "a")).build()
    with pytest.raises(UserError, match="not finite"):
        write_pairs(tmp_path / "b", lambda r: (torch.full((len(r), 2), torch.nan), torch.ones(len(r), 2)), **how)


@pytest.mark.parametrize(
    "change",
    [{"shard": 1e24}, {"shard": 0}, {"pairs": "5"}, {"shape": 2}, {"captions": ["a"] * 4}],
    ids=["float", "zero", "word", "number", "captions"],
)
def test_pairs_that_say_impossible_things_cost_one_line(tmp_path, change):
    ones = lambda numbers: (torch.ones(len(numbers), 2), torch.ones(len(numbers), 2))
    write_pairs(tmp_path, ones, captions=["a"] * 5, shape=(2,), about={})
    head = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps(head | change))
    with pytest.raises(UserError, match=r"pairs\.json is damaged"):
        PairsConfig(str(tmp_path)).build()


def test_a_full_disk_is_told_with_the_file_that_it_has_no_room_for(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'") as told, replacing(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert told.value.filename == str(tmp_path / "a.json")


def weights(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps({"weight_map": {"shards": "model-00001-of-00001.safetensors"}}))
        else:
            save_file({"shards" if "-of-" in name else name: torch.zeros(1)}, folder / name)
    return folder


INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["diffusion_pytorch_model.safetensors", "lora.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["model.fp16.safetensors", INDEX, SHARD], "shards"),
        (["lora.safetensors", INDEX, SHARD], "shards"),
        (["model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
        (["other.safetensors"], "other.safetensors"),
        (["model.fp16.safetensors"], "model.fp16.safetensors"),
    ],
)
def test_of_several_files_of_weights_the_plain_one_of_a_usual_name_is_read(tmp_path, names, taken):
    assert list(read_folder(weights(tmp_path / "model", *names))) == [taken]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([SHARD], f"holds {SHARD}, but no {INDEX}"),
        ([SHARD, "model.fp16.safetensors"], f"holds {SHARD}, but no {INDEX}"),
        (["a.safetensors", "longer.safetensors"], "holds 2 files of weights, a.safetensors first"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "holds 2 files of weights"),
    ],
)
def test_weights_that_are_not_clear_are_refused(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        read_folder(weights(tmp_path / "model", *names))


def test_an_index_nested_too_deeply_is_damaged(tmp_path):
    (weights(tmp_path / "model", SHARD) / INDEX).write_text("[" * 200_000)
    with pytest.raises(UserError, match="index.json is damaged"):
        read_folder(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.complex64])
def test_every_type_that_a_file_may_have_is_written_and_read(tmp_path, dtype):
    tensor = torch.arange(3).to(dtype)
    write_file(tmp_path / "a.safetensors", {"a": Lazy.of(tensor)})
    assert torch.equal(read_file(tmp_path / "a.safetensors")["a"].read(), tensor)
