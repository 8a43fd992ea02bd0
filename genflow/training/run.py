"""From a config file to a trained run: precision, folder, resume, tracking."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, ProjectConfiguration

from genflow.config import completed, dump, load, to_dict
from genflow.data.loading import lost_workers_told
from genflow.data.locks import lock, still_at
from genflow.errors import UserError, nearest
from genflow.flows.store import GUARD, newest_checkpoint, read_config
from genflow.flows.trained import resolved
from genflow.registry import api_export
from genflow.saving import replacing
from genflow.training.config import FITTED, RunConfig
from genflow.training.loop import Trainer
from genflow.training.precision import float32_products, resolve_precision
from genflow.training.ranks import all_or_none, from_main, join_processes, lost_ranks_told, same_on_all
from genflow.training.watch import watched

# MB of gradients that DDP reduces at a time on CPUs: with its own 25 most are reduced when the backward is over.
CPU_BUCKETS = 4

# What may differ between a run and its continuation without making it another run.
FREE = {
    "out",
    "data.path",  # wherever they are by now, the data are looked at (check_data)
    "data.root",
    "train.steps",
    "train.optimizer.lr",
    "train.clip",
    "train.workers",
    "train.accumulation",
    "train.parallel",
    "train.compile",
    "train.graphs",
    "train.checkpointing",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.preview_every",
    "train.preview_prompts",
    "train.validate_every",
    "train.max_bad",
    "train.trackers",
}


@api_export("train")
def train(config: str | Path | RunConfig, overrides: Sequence[str] = ()) -> Path:
    """Train a run, or go on with it where its folder holds a checkpoint of the same config. Returns the folder.

    config: a YAML file or a RunConfig. Raises UserError for what a person can put right; of several processes the main one
    does, and where it is not one of them that is wrong, but a process that is lost, every one that is left.
    """
    device = join_processes()
    with lost_ranks_told(), lost_workers_told(), watched():
        return _train_together(config, overrides, device)


def _train_together(config: str | Path | RunConfig, overrides: Sequence[str], device: torch.device) -> Path:
    with all_or_none():
        if isinstance(config, RunConfig):
            asked = config
        else:
            asked = load(config, overrides, schema=RunConfig)
            asked = replace(asked, out=asked.out or f"runs/{Path(config).stem}")
        asked = replace(asked, flow=resolved(asked.flow))
        if asked.out is None:
            raise UserError("config: `out` is not set; name the run's folder")
        run = Path(asked.out)
        newest = newest_checkpoint(run)
    same_on_all({**_leaves(to_dict(asked)), "the newest checkpoint": newest and newest.name})
    with contextlib.ExitStack() as stack:
        with all_or_none():
            _check_trackers(asked.train.trackers)
            auto = asked.train.precision == "auto"
            asked = _as_saved(asked, run)
            begun = auto and asked.train.precision != "auto"
            asked, why = _with_precision(asked, device)
            why = "auto: the run began in it" if begun else why
            _make_folder(run)
            hold = stack.enter_context(_alone(run))
        # "auto" is measured: its answer may not be the same on every rank
        precision, why = from_main((asked.train.precision, why))
        asked = replace(asked, train=replace(asked.train, precision=precision))
        stack.enter_context(float32_products(precision))
        _train(asked, run, device, why, hold)
    return run


def _with_precision(asked: RunConfig, device: torch.device) -> tuple[RunConfig, str]:
    """The config with the precision that will run, and why it is that one."""
    if asked.train.precision == "auto" and getattr(asked.model, "full_precision", False):
        precision: Any = "fp32"
        why = "auto: this model needs it"
    else:
        precision, why = resolve_precision(asked.train.precision, device)
    return replace(asked, train=replace(asked.train, precision=precision)), why


def _make_folder(run: Path) -> None:
    """Raises UserError also for a checkpoint, which goes when newer ones come, with all that is in it."""
    if (run / GUARD).exists():
        raise UserError(f"{run} is a checkpoint; name its run's folder as `out` to go on with that, or another folder")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        what = "a file" if run.exists() else "a link to what is not there, or below one"
        raise UserError(f"{run} is {what}; name another folder as `out`") from error
    except OSError as error:
        raise UserError(f"cannot make the run's folder {run}: {error.strerror}") from error


def _train(asked: RunConfig, run: Path, device: torch.device, why: str, hold: Callable[[], None]) -> None:
    AcceleratorState._reset_state()  # accelerate keeps one precision for a process; the run before may have had another
    accelerator = Accelerator(
        mixed_precision={"fp32": "no", "tf32": "no", "fp8": "bf16"}.get(asked.train.precision, asked.train.precision),
        cpu=device.type == "cpu",
        # The loop counts micro-batches; else ACCELERATE_GRADIENT_ACCUMULATION_STEPS would divide the gradients once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=list(asked.train.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run)),
        kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=CPU_BUCKETS)] if device.type == "cpu" else None,
    )
    trainer = Trainer(asked, run, accelerator, hold)
    try:
        if trainer.step >= asked.train.steps:
            _finish(trainer)
            return
        if accelerator.is_main_process:
            _save_config(trainer.config, run)
        trainer.log.track()
        trainer.log.say(_summary(trainer, why))
        with warnings.catch_warnings():
            # of a block that hands on a stream as it is; nothing of ours writes into what a block returns
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            trainer.run()
    finally:
        trainer.log.close()
        # accelerate's end_training would part the processes too, and another run may follow
        for tracker in accelerator.trackers:
            tracker.finish()


def _finish(trainer: Trainer) -> None:
    """What is left to do of a run that has all its steps."""
    run = trainer.run_folder
    trainer.catch_up()
    if changed := from_main(_changed(trainer.config, run)):
        trainer.save()
        if trainer.accelerator.is_main_process:
            _save_config(trainer.config, run)
        trainer.log.say(f"{run} draws by the config's {' and '.join(changed)} from now on")
    trainer.log.say(f"{run} is already trained for {trainer.step} steps; set train.steps higher to go on")


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[Callable[[], None]]:
    """Hold the run's folder; the system lets go of it when the process ends, however it ends.

    Gives what holds it anew if it was removed meanwhile. Both raise UserError where another run of genflow holds it. Of
    several processes of one run, the main one asks.
    """
    if not PartialState().is_main_process:
        yield lambda: None
        return
    path = run / ".lock"
    mine: IO[str] | None = None
    with contextlib.ExitStack() as held:

        def hold() -> None:
            nonlocal mine
            if mine is not None and still_at(mine, path):
                return
            held.close()
            mine = None
            run.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(path.open("a"))
            if lock(file, wait=False) is False:
                raise UserError(f"{run} is being trained by another process; wait for it, or choose another `out`")
            mine = file

        hold()
        try:
            yield hold
        finally:
            # refused before there was anything to keep
            if mine is not None and run.is_dir() and [p.name for p in run.iterdir()] == [".lock"]:
                shutil.rmtree(run, ignore_errors=True)


def _check_trackers(trackers: Sequence[str]) -> None:
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"train.trackers: no tracker is named {name!r}.{nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in map(str, get_available_trackers()):
            raise UserError(f"train.trackers: {name} is not installed; install it, or leave it out")


def _as_saved(config: RunConfig, run: Path) -> RunConfig:
    """Refuse a config that is not the run's own; take over its precision where "auto" is asked."""
    folder = newest_checkpoint(run)
    if folder is None:
        return config
    saved = {"train": {}, **read_config(folder)}
    for key in ("data", "model", "text", "flow", "train"):  # what another version did not know
        if key in saved:
            saved[key] = completed(saved[key], type(getattr(config, key)))
    if config.train.precision == "auto":
        config = replace(config, train=replace(config.train, precision=saved["train"]["precision"]))
    asked = _leaves(to_dict(config))
    for key, value in _leaves(saved).items():
        mine = asked.get(key, "nothing of the kind")
        told = mine is None and key.removeprefix("model.") in FITTED  # left to the data, the text and the flow
        # Of which there is none yet.
        told |= key.startswith("train.validation_") and not saved["train"]["validate_every"]
        told |= key == "init" and "base" in saved  # whose weights, wherever they are by now, are looked at
        if key not in FREE and not key.startswith(("shape", "sample.", "base.")) and mine != value and not told:
            raise UserError(
                f"{run} holds a run with {key}={value}, this config says {mine}; choose another `out`, "
                f"or remove {run} to start afresh"
            )
    return config


def _changed(config: RunConfig, run: Path) -> list[str]:
    """The parts of the config by which a run draws and its newest checkpoint does not."""
    folder, own = newest_checkpoint(run), to_dict(config)
    saved = {} if folder is None else read_config(folder)
    return [
        f"`{key}`"
        for key in ("sample", "init")
        if key in saved and _leaves({key: saved[key]}) != _leaves({key: own[key]})
    ]


def _leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_leaves(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _save_config(config: RunConfig, run: Path) -> None:
    with replacing(run / "config.yaml") as temporary:
        dump(config, temporary)


def _summary(trainer: Trainer, why: str) -> str:
    train = trainer.config.train
    params = sum(p.numel() for p in trainer.flow.parameters() if p.requires_grad)
    threads, processes = torch.get_num_threads(), trainer.accelerator.num_processes
    start = f"resuming at step {trainer.step} of " if trainer.step else ""
    return (
        f"{trainer.run_folder}: {start}{train.steps} steps, batch {train.batch_size}, "
        f"{len(trainer.dataset)} {'pictures' if len(trainer.shape) == 3 else 'vectors'}, {params:,} parameters\n"
        f"precision {train.precision} ({why}); weights, optimiser and EMA in fp32; "
        f"{processes} process{'es' * (processes > 1)}{', sharded,' if trainer.sharded else ''} on "
        f"{trainer.accelerator.device}, {threads} thread{'s' * (threads > 1)}"
    )
