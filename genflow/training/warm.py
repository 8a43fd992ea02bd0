"""Runs that start from weights that are there already."""

from __future__ import annotations

from pathlib import Path

import torch

from genflow.config import to_dict
from genflow.errors import UserError
from genflow.flows.base import Flow
from genflow.flows.latent import Autoencoder, LatentFlow, LatentFlowConfig
from genflow.flows.store import CONFIG, MODEL, _read_tensors, fill_from, find_model, newest_checkpoint, read_config
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


def begin_with(flow: Flow, path: str) -> None:
    """Fill a flow with the weights, averaged or not, of a run, a checkpoint or a model folder of the same model.

    Raises UserError for one that does not fit.
    """
    own, theirs, where = getattr(flow, "config", None), read_config(find_model(path))["flow"], "flow"
    if isinstance(flow, LatentFlow):
        _check_scale(flow.config, path)
        own, theirs, where = flow.config.flow, theirs.get("flow", {}), "flow.flow"
    for name in ("prediction", "whiten"):
        if name in theirs and theirs[name] != (mine := getattr(own, name, theirs[name])):
            given, asked = ("null" if value is None else value for value in (theirs[name], mine))
            raise UserError(
                f"init {path}: its flow has {name} {given}, the config's {asked}; set {where}.{name}={given}"
            )
    fill_from(flow, find_model(path), ema=True, model="the run's model")


def _check_scale(config: LatentFlowConfig, path: str) -> None:
    """Raises UserError where the latents of a model are scaled or shifted otherwise: its weights do not tell."""
    theirs = read_config(find_model(path))["flow"].get("autoencoder", {})
    for name in ("scale", "shift"):
        own = getattr(config.autoencoder, name, None)
        if own is not None and theirs.get(name, own) != own:
            raise UserError(
                f"init {path}: its latents have {name} {theirs[name]}, those of the config {own}; set "
                f"flow.autoencoder.{name}={theirs[name]}"
            )


def autoencoder_of(config: RunConfig) -> Autoencoder:
    """The autoencoder that a run of a flow latent is to have, with its weights.

    Raises UserError for another flow, and where neither the autoencoder's section nor `init` say where its weights are.
    """
    if not isinstance(config.flow, LatentFlowConfig):
        raise UserError("the config's flow has no autoencoder; take flow: {name: latent, autoencoder: ..., flow: ...}")
    if config.init is not None:
        _check_scale(config.flow, config.init)
        autoencoder = config.flow.autoencoder.build()
        folder = find_model(config.init)
        state, prefix = _read_tensors(folder / MODEL, skip={}), "autoencoder."
        held = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        try:
            autoencoder.load_state_dict(held)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()[:100]  # of all its tensors, it may be
            raise UserError(
                f"init {config.init}: it has not the autoencoder of the config: {reason} ...; what it has is "
                f"flow.autoencoder in {folder / CONFIG}"
            ) from error
        return autoencoder
    torch.manual_seed(0)
    first, second = config.flow.autoencoder.build(), config.flow.autoencoder.build()
    theirs = second.state_dict()
    if any(not torch.equal(tensor, theirs[name]) for name, tensor in first.state_dict().items()):
        raise UserError(
            "the config's autoencoder has random weights; set `init` to a model folder that has its weights, such as one "
            "that genflow convert wrote"
        )
    return first
