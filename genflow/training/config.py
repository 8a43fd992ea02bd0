"""What a training run is made of, as typed sections of one YAML file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from torch import nn

from genflow.config import Choice, Owned
from genflow.errors import UserError, check_least
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.text.none import NoTextConfig
from genflow.training.lora import LoRA
from genflow.training.optimizers import AdamW8bitConfig, AdamWConfig

LEAST = {
    "steps": 1,
    "batch_size": 1,
    "accumulation": 1,
    "warmup": 0,
    "workers": 0,
    "log_every": 1,
    "save_every": 1,
    "keep": 1,
    "preview_every": 0,
    "validate_every": 0,
    "validation_images": 1,
}
MOST = {"decay": 1.0, "clip": math.inf, "ema": 0.28, "max_bad": 1.0}  # of numbers from 0 on; no EMA profile is wider
NARROWEST = 1e-3  # of an EMA profile that is one


@dataclass(frozen=True)
class TrainConfig:
    """How to train. All counts of steps are optimiser steps; `batch_size` is the global batch of one such step."""

    steps: int = 1000
    batch_size: int = 64
    accumulation: int = 1  # micro-batches per step and process
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp8"] = "auto"  # training/precision.py
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes: each holds all, or a part (training/README.md)
    optimizer: Annotated[Any, Choice("optimizer")] = field(default_factory=AdamWConfig)
    lora: LoRA | None = None  # train low-rank updates of what `init` holds, not the model (training/lora.py)
    warmup: int = 100  # steps of linear warm-up
    decay: float = 0.0  # the last part of the run, 0 to 1, over which the learning rate falls linearly to zero
    clip: float = 1.0  # the norm of all gradients, or of each side of a game; 0 turns clipping off
    ema: float = 0.05  # relative width of the power-function EMA profile (training/ema.py); 0 turns it off
    compile: bool = False  # torch.compile each block
    graphs: bool = False  # replay the network's forward and backward as CUDA graphs (training/apply.py)
    checkpointing: bool = False  # keep less for the backward and compute it again (training/apply.py)
    workers: int = 0  # data-loading processes
    log_every: int = 20
    save_every: int = 500
    keep: int = 2  # checkpoints kept
    preview_every: int = 500  # sample grids; 0 turns them off
    preview_prompts: tuple[str, ...] = ()  # default: captions of the data set
    validate_every: int = 0  # 0 turns it off
    validation_split: str = "test"
    validation_images: int = 256
    max_bad: float = 0.05  # part of the data set that may turn out unreadable before the run is stopped
    trackers: tuple[str, ...] = ("tensorboard",)  # of accelerate's; metrics.jsonl is always written

    def __post_init__(self) -> None:
        check_least(self, **LEAST)
        for name, most in MOST.items():
            if not 0 <= (value := getattr(self, name)) <= most:
                raise UserError(f"{name} = {value} is not within 0 .. {most:g}")
        if 0 < self.ema < NARROWEST:
            raise UserError(f"ema = {self.ema} averages nothing; the least is {NARROWEST}, and 0 turns it off")
        if self.graphs and self.checkpointing:
            raise UserError("graphs cannot be had with checkpointing; leave one of them out")
        if self.parallel == "fsdp" and isinstance(self.optimizer, AdamW8bitConfig):
            raise UserError("optimizer adamw8bit takes no shared-out parameters; take adamw, or parallel=ddp")


@dataclass(frozen=True)
class RunConfig:
    """One run: data, model, text, flow, training, sampling."""

    data: Annotated[Any, Choice("dataset")]
    model: Annotated[Any, Choice("network")]
    text: Annotated[Any, Choice("text")] = field(default_factory=NoTextConfig)
    flow: Annotated[Any, Choice("flow")] = field(default_factory=RectifiedFlowConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: Annotated[Any, Owned("flow", "sampling")] = None  # default: the flow's own
    init: str | None = None  # a run or model folder whose weights to begin with (genflow convert makes one of SD3)
    seed: int = 0
    out: str | None = None  # the run's folder; default: runs/<name of the config file>

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed = {self.seed} is out of range; try 0")
        if self.train.lora is not None and self.init is None:
            raise UserError("train.lora: an update of what? Set `init` to the run or model folder to start from")
        if self.sample is None:
            object.__setattr__(self, "sample", self.flow.sampling())


def shape_of(data: Any) -> tuple[int, ...]:
    """The shape of a data set's samples, from its config: (channels, size, size), or its own."""
    return tuple(data.shape) if hasattr(data, "shape") else (data.channels, data.size, data.size)


# What a network's config may leave to the data, the text and the flow.
FITTED = (
    *("shape", "in_channels", "sample_size", "context_dim", "pooled_dim", "condition_dim"),
    *("encoder_channels", "latent_channels", "vocabulary", "width", "grid"),
)


def fit_to(model: Any, text: nn.Module, shape: tuple[int, ...], flow: Any = None) -> Any:
    """Fill in what a network's config leaves open: a sample's shape, the text encoder's widths, and what the flow says.

    Raises UserError for a network that reads the tokens of a text where there is none, and for what does not fit.
    """
    if not text.max_tokens and getattr(model, "context_dim", 0) is None:
        kind = type(model).__name__.removesuffix("Config")
        raise UserError(f"a model {kind} reads the tokens of a text, and text is none; set text, such as learned")
    known: dict[str, Any] = {
        "shape": shape,
        "in_channels": shape[0],
        "context_dim": text.context_dim,
        "pooled_dim": text.pooled_dim,
        "condition_dim": text.pooled_dim,
    }
    if hasattr(flow, "fits"):
        known |= flow.fits(shape)
    for key in [key for key in FITTED if key in known]:
        given, fits = getattr(model, key, None), known[key]
        deaf = given == 0 and key.endswith("_dim")  # to what a text says
        if given not in (None, fits) and not deaf:
            raise UserError(f"model.{key} = {given} does not fit data, text and flow, which have {fits}; leave it out")
    if len(known["shape"]) == 3:
        known["sample_size"] = max(known["shape"][1] // getattr(model, "patch_size", 1), 1)
    return replace(model, **{k: known[k] for k in FITTED if k in known and getattr(model, k, 0) is None})
