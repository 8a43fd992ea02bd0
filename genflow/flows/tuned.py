"""The learnt time grids of a model, sampling.json in its folder: {"8": {"sampler": ..., "grid": [...], ...}}, by steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genflow.errors import UserError
from genflow.flows.store import _write_json, find_model
from genflow.registry import api_export
from genflow.samplers.solution import check_grid

SAMPLING = "sampling.json"


@api_export("tuned")
def tuned(path: str | Path, steps: int) -> dict[str, Any] | None:
    """How the model of a run or model folder draws best in so many steps, if that was learnt (`genflow tune`).

    It has sampler, grid (steps + 1 times), nfe, error, and under which guidance it was learnt. Raises UserError where the
    file is damaged.
    """
    return _read(Path(path) / SAMPLING).get(str(steps))


@api_export("save_tuned")
def save_tuned(path: str | Path, steps: int, found: Mapping[str, Any]) -> Path:
    """Keep what was learnt for so many steps beside what was for others; returns the file. Raises UserError."""
    find_model(path)
    file = Path(path) / SAMPLING
    every = {**_read(file), str(steps): dict(found)}
    _check(file, every)
    every[str(steps)]["grid"] = check_grid(found["grid"])  # floats, whatever they were
    try:
        _write_json(file, dict(sorted(every.items(), key=lambda item: int(item[0]))))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    return file


def _read(file: Path) -> dict[str, Any]:
    try:
        every = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); remove it and tune again") from error
    _check(file, every)
    return every


def _check(file: Path, every: Any) -> None:
    """Raises UserError for anything but solvers and grids by their numbers of steps."""
    try:
        for steps, found in every.items():
            if len(check_grid(found["grid"])) != int(steps) + 1 or not isinstance(found["sampler"], str):
                raise ValueError(f"the grid for {steps} steps has {len(found['grid']) - 1}")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); remove it and tune again") from error
