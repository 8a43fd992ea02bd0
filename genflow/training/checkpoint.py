"""Atomic checkpoints: all the files of a step, then a guard file; a half-written one is recognised and passed over."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from genflow.data.pairs import PairsDataset
from genflow.data.sources import Samples
from genflow.data.vectors import VectorDataset
from genflow.errors import UserError
from genflow.flows.store import _step, _steps, checkpoints, finish_checkpoint, normalise_keys
from genflow.saving import flush, save_file
from genflow.training.ema import EMA
from genflow.training.log import T_BINS, LossByTime
from genflow.training.sharding import as_shared, whole

GROUPS = "param_groups."


def named_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's tensors under the names of the parameters they belong to: "<parameter>/<key>".

    And "param_groups.<i>/<key>", the numbers of a group, where Prodigy, for one, keeps its estimate; but not the learning
    rate, which each step sets.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    states = [(names[id(p)], state) for p, state in optimizer.state.items()]
    for i, group in enumerate(optimizer.param_groups):
        states.append((f"{GROUPS}{i}", {k: v for k, v in group.items() if k != "lr" and not isinstance(v, Tensor)}))
    return {
        f"{name}/{key}": value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
        for name, state in states
        for key, value in state.items()
        if isinstance(value, Tensor | int | float) and not isinstance(value, bool)
    }


def load_named_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Tensor]) -> None:
    """The reverse of named_optimizer_state, in place."""
    params = dict(model.named_parameters())
    for full, value in normalise_keys(state).items():
        name, _, key = full.rpartition("/")
        if name.startswith(GROUPS):
            optimizer.param_groups[int(name.removeprefix(GROUPS))][key] = value.item()
            continue
        p = params[name]
        if key == "step" and value.dtype == torch.int64:  # bitsandbytes counts in Python
            optimizer.state[p][key] = int(value)
        elif key == "step":  # a fused optimiser counts on the device
            optimizer.state[p][key] = value.to(p.device) if optimizer.defaults.get("fused") else value
        else:
            optimizer.state[p][key] = as_shared(value, p.detach())


Tensors = dict[str, dict[str, Tensor]]  # file -> name -> tensor


def checkpoint_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, *, main: bool = True
) -> Tensors:
    """All that a checkpoint holds, whole and on the CPU, whoever shared it out; nothing where not `main`.

    Every process of the run has to call.
    """
    states = {"model": model.state_dict(), "optimizer": named_optimizer_state(optimizer, model)}
    if ema is not None:
        states["ema"] = ema.state_dict()
    found: Tensors = {name: {} for name in states}
    seen: set[int] = set()
    for name, state in states.items():
        for key, value in normalise_keys(state).items():
            gathered = whole(value.detach())  # one at a time: a device need not hold them all
            if main:
                kept = gathered.contiguous().cpu()
                shared = kept.numel() > 0 and kept.data_ptr() in seen
                found[name][key] = kept.clone() if shared else kept  # safetensors takes no two names for one memory
                seen.add(kept.data_ptr())
    return found


def save_checkpoint(run: Path, step: int, *, config: dict, tensors: Tensors, state: dict, keep: int) -> Path:
    """Write checkpoints/step-XXXXXXXX of the run and drop all but the newest `keep` whole ones.

    Raises UserError where the disk refuses; what had been saved before is untouched.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    temporary, before = (final.with_name(f".{final.name}.{what}partial") for what in ("", "before."))
    try:
        for left in (temporary, before):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / "config.json").write_text(json.dumps(config, indent=2))
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}))
        for name, values in tensors.items():
            save_file(values, temporary / f"{name}.safetensors")
        finish_checkpoint(temporary)
        if final.exists():  # to remove it here would leave none for as long as that takes
            os.replace(final, before)
        os.replace(temporary, final)
        flush(final.parent)  # before older ones go
    except Exception as error:  # safetensors reports a full disk with an exception of its own
        shutil.rmtree(temporary, ignore_errors=True)
        if before.exists() and not final.exists():
            os.replace(before, final)
        last = checkpoints(run)
        kept = f"the last good checkpoint is {last[-1].name}" if last else "no checkpoint had been written yet"
        raise UserError(
            f"could not save step {step} under {run} ({error}); {kept}. Free some space and run again"
        ) from error
    whole = checkpoints(run)
    cut = [p for p in _steps(run) if p.name < final.name and p not in whole]  # by a killed process
    for old in (*whole[:-keep], *cut, *final.parent.glob(".step-*.partial")):
        shutil.rmtree(old, ignore_errors=True)
    return final


def told_of(dataset: Samples) -> dict[str, Any]:
    """What a checkpoint tells of the data: how many samples, and a digest of their names and captions in order.

    Of vectors and pairs, whose names are but numbers, their columns and where they come from too.
    """
    for name in ("identifiers", "captions"):
        if not hasattr(dataset, name):
            kind = type(dataset).__name__
            raise UserError(
                f"data: a {kind} has no `{name}`; have the data set build an ImageDataset or a VectorDataset"
            )
    names = json.dumps([list(dataset.identifiers), list(dataset.captions)])
    told: dict[str, Any] = {"samples": len(dataset), "listing": hashlib.sha256(names.encode()).hexdigest()}
    if isinstance(dataset, VectorDataset):
        moments = zip(dataset.columns, dataset.mean.tolist(), dataset.std.tolist(), strict=True)
        told["columns"] = [f"{name}: {mean:.3e}, {std:.3e}" for name, mean, std in moments]
    if isinstance(dataset, PairsDataset):
        told["about"] = dataset.about
    return told


def check_data(state: Mapping[str, Any], told: Mapping[str, Any], folder: Path, run: Path) -> None:
    """Raises UserError where a run's data are not those that a checkpoint's state tells of."""
    now, then = told["samples"], state.get("samples", told["samples"])
    wrong = [key for key in told if state.get(key, told[key]) != told[key]]
    what = (
        f"{now} samples, but {then}" if now != then else f"other names, captions or numbers of the {now} samples than"
    )
    if wrong:
        raise UserError(
            f"data: {what} when {folder} was written: this would be another run. Give it the data that it had, or begin a "
            f"new one from its weights: init={run} out=NEW"
        )


def load_checkpoint(folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> dict:
    """Put a whole checkpoint back in place; returns its state (step and the running sums of the log).

    Raises UserError for one whose contents are damaged.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("state.json has no step")
        if state["step"] != _step(folder):
            raise ValueError(f"state.json is of step {state['step']}")
        if LossByTime(state["by_time"]).sums.shape != (2, T_BINS):
            raise ValueError("state.json has no sums of the loss by time")
        mine, saved = model.state_dict(), load_file(folder / "model.safetensors")
        model.load_state_dict({key: as_shared(v, mine[key]) if key in mine else v for key, v in saved.items()})
        load_named_optimizer_state(optimizer, model, load_file(folder / "optimizer.safetensors"))
        if ema is not None:
            ema.load_state_dict(load_file(folder / "ema.safetensors"))
        return state
    except UserError:  # a module's own word on what it is given
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {folder} is damaged ({reason}); remove it to go on from the one before, if there is one"
        ) from error
