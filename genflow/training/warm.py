"""A run that starts from the weights of another one."""

from __future__ import annotations

from pathlib import Path

from genflow.config import to_dict
from genflow.flows.base import Flow
from genflow.flows.store import newest_checkpoint
from genflow.training.checkpoint import checkpoint_tensors, save_checkpoint
from genflow.training.config import RunConfig
from genflow.training.ema import EMA


def warm_start(config: RunConfig, flow: Flow, run: Path) -> None:
    """Write the checkpoint of step 0 of a run that has none: the flow's weights, their average alike, a fresh optimiser.

    flow: of the same model and text encoder as the config. Raises UserError where the disk refuses.
    """
    if newest_checkpoint(run) is not None:
        return
    train = config.train
    save_checkpoint(
        run,
        0,
        config={**to_dict(config), "shape": list(flow.shape)},
        tensors=checkpoint_tensors(flow, train.optimizer.build(flow), EMA(flow, train.ema) if train.ema else None),
        state={"by_time": [], "scaler": None},
        keep=train.keep,
    )
