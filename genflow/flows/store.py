"""Models on disk: safetensors and JSON, written so that a reader sees a whole file or none.

A model folder holds config.json (the sections model, flow, text, data, sample, and shape), model.safetensors and
perhaps ema.safetensors. A checkpoint is one with a guard file, complete.json, written last: {"files": {name: bytes}}.
A run keeps its checkpoints in checkpoints/step-XXXXXXXX.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from genflow.config import Choice, from_dict
from genflow.errors import UserError, nearest
from genflow.flows.base import Flow
from genflow.flows.lora import factors_of, lora_scale, merge, whole
from genflow.registry import api_export
from genflow.saving import flush, replacing, save_file

CONFIG, MODEL, EMA, GUARD = "config.json", "model.safetensors", "ema.safetensors", "complete.json"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Recipe:
    """The parts of a config.json from which a flow is built."""

    model: Annotated[Any, Choice("network")]
    flow: Annotated[Any, Choice("flow")]
    text: Annotated[Any, Choice("text")]


# ---------------------------------------------------------------------------------------------------------- checkpoints


def finish_checkpoint(folder: Path) -> None:
    """Declare a folder's files whole: flush each to the disk, then write the guard file with their sizes."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != GUARD)
    for file in files:
        flush(file)
    _write_json(folder / GUARD, {"files": {file.name: file.stat().st_size for file in files}})


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint's guard file is there and every file that it lists has the size that it lists."""
    return _fault(folder) is None


def checkpoints(run: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(filter(is_whole, _steps(run)), key=_step)


def newest_checkpoint(run: str | Path) -> Path | None:
    """The newest whole checkpoint of a run; warns of damaged ones that are newer."""
    for folder in sorted(_steps(run), key=_step, reverse=True):
        if (fault := _fault(folder)) is None:
            return folder
        warnings.warn(f"checkpoint {folder} is passed over: {fault}", stacklevel=2)
    return None


def _steps(run: str | Path) -> list[Path]:
    return [p for p in Path(run, "checkpoints").glob("step-*") if _STEP.fullmatch(p.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        files = json.loads((folder / GUARD).read_text())["files"]
        for name, size in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
    except FileNotFoundError:
        return f"it was not written to the end ({GUARD} is missing)"
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return f"{GUARD} is damaged"
    return None


# --------------------------------------------------------------------------------------------------------------- saving


def normalise_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state under the plain model's names: without the `module.` of DDP and the `_orig_mod.` of torch.compile."""
    return {_plain(key): value for key, value in state.items()}


def _plain(key: str) -> str:
    return key.replace("_orig_mod.", "").removeprefix("module.")


@api_export("save_model")
def save_model(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model folder: config.json, model.safetensors, and ema.safetensors where there is an average.

    config: sections as plain dicts, with shape. Each file is flushed and moved into place; config.json goes first
    and comes back last, so that a folder cut short is never taken for a model. Raises UserError where the disk refuses,
    and, before anything is touched, for a config that is no JSON.
    """
    folder = Path(folder)
    try:
        json.dumps(config)
    except TypeError as error:
        raise UserError(f"the config of a model is plain dicts, lists, numbers and words: {error}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
        _write_tensors(folder / MODEL, state)
        if ema is None:
            (folder / EMA).unlink(missing_ok=True)
        else:
            _write_tensors(folder / EMA, ema)
        _write_json(folder / CONFIG, config)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the model to {folder}: {error}; free some space or choose another place"
        ) from error


def _write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in normalise_keys(state).items():
        value = value.detach().cpu().contiguous()
        if value.data_ptr() in seen or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()  # safetensors takes no two names for one memory
        seen.add(value.data_ptr())
        tensors[key] = value
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------------------- loading


@api_export("load")
def load(path: str | Path, *, ema: bool = True, device: str | torch.device = "cpu") -> Flow:
    """A flow, in eval mode, from a run (its newest whole checkpoint), a checkpoint, or a model folder.

    ema: take the averaged weights where there are any. Of a LoRA run the updates are added to what its `init` holds. The
    config of what is then there, a whole model, is left in `flow.recipe`. Raises UserError, in one line, for what is
    missing, damaged or cut short.
    """
    folder = find_model(path)
    config = read_config(folder)
    recipe = from_dict(Recipe, {name: config[name] for name in ("model", "flow", "text")}, where=str(folder / CONFIG))
    flow = recipe.flow.build(recipe.model.build(), recipe.text.build(), shape=config["shape"])
    fill_from(flow, folder, ema=ema)
    flow.recipe = whole(config)
    try:
        return flow.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # as torch says that there is no such device, or no room on it
        raise UserError(f"device {str(device)!r} cannot take the model: {str(error).splitlines()[0]}") from error


def fill_from(flow: nn.Module, folder: Path, *, ema: bool, model: str = f"the model of {CONFIG}") -> None:
    """Put the weights of a model folder into a flow of the same model; those of a LoRA run are of its `init`, updated.

    ema: the averaged ones where there are any; model: whose the flow is, for errors. Raises UserError for what does not
    belong together.
    """
    config, averaged = read_config(folder), folder / EMA
    files = [averaged, folder / MODEL] if ema and averaged.exists() else [folder / MODEL]
    if (scale := lora_scale(config)) is None:
        _fill(flow, files, model)
    else:
        fill_from(flow, check_base(folder), ema=True, model=model)
        merge(flow, factors_of(_read_tensors(files[0], skip={}), scale, files[0]), files[0])


def check_base(folder: Path, init: str | None = None) -> Path:
    """The folder of the model that a LoRA's checkpoint is an update of. init: where it is by now, else where it was.

    Raises UserError where it is not there, or has other weights by now.
    """
    config = read_config(folder)
    init = init or config["init"]
    if not Path(init).exists():
        raise UserError(
            f"{folder} is an update of {init}, which is not there; put it back, or train on with init=FOLDER"
        )
    if (told := config.get("base")) is not None and weights_of(init, ema=True) != told:
        raise UserError(
            f"{folder} is an update of other weights of {init} than those that are there now "
            f"({told['file']}, SHA-256 {told['sha256'][:12]}); put those back, or train the update anew"
        )
    return find_model(init)


def weights_of(path: str | Path, *, ema: bool) -> dict[str, str]:
    """Which weights `load` takes: the name of their file and its SHA-256. Raises UserError."""
    folder = find_model(path)
    file = folder / EMA if ema and (folder / EMA).exists() else folder / MODEL
    try:
        with file.open("rb") as content:
            return {"file": file.name, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}
    except FileNotFoundError:
        raise UserError(f"{file} is missing; copy the whole folder, or save the model again") from None


def find_model(path: str | Path) -> Path:
    """The model folder that a path means: itself, or a run's newest whole checkpoint. Raises UserError."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists():
            what = "a folder of a run, a checkpoint or a model"
            if folder.suffix == ".safetensors" and not (folder.parent / CONFIG).exists():
                raise UserError(f"{folder} is a file, not {what}; genflow convert {folder} FOLDER makes one of it")
            if folder.suffix in (".yaml", ".yml") and not (folder.parent / "checkpoints").is_dir():
                raise UserError(f"{folder} is a file, not {what}; genflow train {folder} makes a run of it")
            raise UserError(f"{folder} is a file, not {what}; try {folder.parent}")
        around = [str(p) for p in folder.parent.glob("*") if p.is_dir()]
        near = nearest(str(folder), around) if around else ""
        raise UserError(f"{folder} does not exist; give the folder of a run, a checkpoint or a model.{near}")
    if (folder / "checkpoints").is_dir():
        newest = newest_checkpoint(folder)
        if newest is None:
            raise UserError(f"{folder} has no whole checkpoint yet; let the run reach its first save")
        return newest
    if (folder / GUARD).exists() or _STEP.fullmatch(folder.name):
        fault = _fault(folder)
        if fault is not None:
            others = [p for p in checkpoints(folder.parent.parent) if p != folder]
            advice = f"use {others[-1]}" if others else "there is no other one in its run"
            raise UserError(f"checkpoint {folder} is not whole: {fault}; {advice}")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises UserError."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        if (folder / "model_index.json").exists():
            raise UserError(f"{folder} is a pipeline of diffusers; genflow convert it first") from None
        if (folder / "transformer").is_dir():
            raise UserError(
                f"{folder} has parts of a diffusers pipeline, but no model_index.json; genflow convert --like adds the rest"
            ) from None
        raise UserError(f"{folder} has no {CONFIG}: it is no run or model, or its saving was cut short") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again or save the model again") from error
    wanted = ("model", "flow", "text", "shape")
    missing = [name for name in wanted if name not in config] if isinstance(config, dict) else list(wanted)
    if missing:
        if isinstance(config, dict) and "_class_name" in config:
            raise UserError(f"{folder} holds a {config['_class_name']} of diffusers; genflow convert it first")
        raise UserError(f"{path} has no {missing[0]!r}: it is not a genflow model's; save the model again")
    for name in ("data", "train", "sample"):
        if not isinstance(section := config.get(name, {}), dict):
            raise UserError(f"{path}: {name} must be a section of keys, not {section!r}")
    shape = config["shape"]
    if not (isinstance(shape, list) and len(shape) in (1, 3) and all(isinstance(n, int) and n > 0 for n in shape)):
        raise UserError(f"{path}: shape = {shape} is not [channels, height, width], such as [3, 32, 32], or [numbers]")
    return config


def _fill(flow: nn.Module, files: list[Path], model: str) -> None:
    """Load the flow's weights, each from the first of the files that has it."""
    wanted = flow.state_dict()
    found: dict[str, Tensor] = {}
    for file in files:
        for key, value in _read_tensors(file, skip=found).items():
            owner, _, name = key.rpartition(".")
            if key not in wanted and not _has_empty_buffer(flow, owner, name):
                raise UserError(f"{file} holds {key!r}, which {model} does not have; they do not belong together")
            if key in wanted and value.shape != wanted[key].shape:
                raise UserError(
                    f"{file}: {key} is {list(value.shape)}, but {model} wants {list(wanted[key].shape)}; "
                    "they do not belong together"
                )
            if key not in wanted:
                setattr(flow.get_submodule(owner), name, value)
            found[key] = value
    if missing := [key for key in wanted if key not in found]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{files[-1]} lacks {missing[0]!r}{more}; save the model again, or take another checkpoint")
    flow.load_state_dict(found)


def _has_empty_buffer(flow: nn.Module, owner: str, name: str) -> bool:
    """Whether a module declares a buffer that only some checkpoints fill."""
    try:
        return name in flow.get_submodule(owner)._buffers
    except AttributeError:
        return False


def _read_tensors(path: Path, *, skip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, but for those of `skip`, under normalised names. Raises UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            return {_plain(key): file.get_tensor(key) for key in keys if _plain(key) not in skip}
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy the whole folder, or save the model again") from None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is damaged or cut short ({error}); copy it again, or use another checkpoint"
        ) from error
