"""Autoencoders and tokenizers out of trained runs, as parts of other flows.

A config that names a run is resolved before training: it then holds the part's recipe and the hash of its weights. These
are in the new run's own checkpoints too, so that nothing hangs on the old folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import torch
from torch import Tensor, nn

from genflow.config import Choice, from_dict
from genflow.errors import UserError
from genflow.flows.autoencoder import AutoencoderFlow, check_parts
from genflow.flows.base import dtype_of
from genflow.flows.latent import Autoencoder
from genflow.flows.store import EMA, MODEL, find_model, load
from genflow.flows.tokenizer import Tokenizer
from genflow.networks.bottlenecks import Bottleneck, Continuous
from genflow.networks.quantizers import Quantizer
from genflow.registry import genflow_export

T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """What an autoencoder is made of."""

    model: Annotated[Any, Choice("network")]
    bottleneck: Annotated[Any, Choice("bottleneck")]


@dataclass(frozen=True)
class _TrainedConfig:
    """run: the folder of a run, a checkpoint or a model; recipe and sha256, of its weights' files, are filled in."""

    run: str
    recipe: Any = None
    sha256: str | None = None

    def resolved(self) -> Self:
        """With the recipe and the hash of the run as it is; as it stands where they are told and the run is gone.

        Raises UserError for a run that is not there, is no autoencoder, or has other weights than were told.
        """
        if self.sha256 is not None and not Path(self.run).exists():
            return self
        recipe = self.flow().recipe or {}
        digest = _digest(find_model(self.run))
        if self.sha256 not in (None, digest):
            raise UserError(
                f"{self.run} has other weights ({digest[:12]}) than the config tells ({self.sha256[:12]}); leave sha256 and "  # type: ignore[index]
                "recipe out to take these"
            )
        parts = {"model": recipe["model"], "bottleneck": recipe["flow"]["bottleneck"]}
        return replace(self, recipe=parts, sha256=digest)

    def flow(self) -> AutoencoderFlow:
        """The run's model, its averaged weights. Raises UserError for one that is no autoencoder."""
        flow = load(self.run)
        if not isinstance(flow, AutoencoderFlow):
            raise UserError(
                f"{self.run} holds a {type(flow).__name__}; a trained autoencoder is one of flow autoencoder"
            )
        return flow

    def parts(self) -> tuple[Any, Any]:
        """The network and the bottleneck; with the run's weights where no recipe is told, else to be filled."""
        if self.recipe is None:
            flow = self.flow()
            return flow.network, flow.bottleneck
        recipe = from_dict(Parts, self.recipe, where=f"recipe of {self.run}")
        network, bottleneck = recipe.model.build(), recipe.bottleneck.build()
        return check_parts(network, bottleneck), bottleneck


@genflow_export("trained", kind="autoencoder")
@dataclass(frozen=True)
class TrainedAutoencoderConfig(_TrainedConfig):
    """The autoencoder of a run of flow autoencoder. run: its folder; recipe and sha256 are filled in when a run begins."""

    def build(self) -> TrainedAutoencoder:
        """Raises UserError for a run that cannot be read, and for one of a tokenizer."""
        return TrainedAutoencoder(self, *self.parts())


@genflow_export("trained", kind="tokenizer")
@dataclass(frozen=True)
class TrainedTokenizerConfig(_TrainedConfig):
    """The tokenizer of a run of flow autoencoder. run: its folder; recipe and sha256 are filled in when a run begins."""

    def build(self) -> TrainedTokenizer:
        """Raises UserError for a run that cannot be read, and for one whose bottleneck has no codes."""
        return TrainedTokenizer(self, *self.parts())


class TrainedAutoencoder(Autoencoder):
    """Its latents' scale and shift are those measured over its own training data."""

    def __init__(self, config: TrainedAutoencoderConfig, network: Any, bottleneck: Bottleneck) -> None:
        super().__init__()
        if not isinstance(bottleneck, Continuous):
            raise UserError(
                f"{config.run} holds a tokenizer; take it as tokenizer: {{name: trained, run: {config.run}}}"
            )
        self.config, self.network, self.bottleneck = config, network, bottleneck
        self.picture_channels, self.factor = network.in_channels, network.factor
        self.channels = bottleneck.channels

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        return self.bottleneck.scale

    @property
    def shift(self) -> Tensor:  # type: ignore[override]
        return self.bottleneck.shift

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return self.bottleneck.moments(self.network.encode(x))

    def decode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return self.network.decode(z)

    def tiled(self, tile: int) -> Callable[[Tensor], Tensor]:
        return self.network.tiled(tile)


class TrainedTokenizer(Tokenizer):
    """The codes of a quantiser, and pictures of them."""

    def __init__(self, config: TrainedTokenizerConfig, network: Any, bottleneck: Bottleneck) -> None:
        super().__init__()
        if not isinstance(bottleneck, Quantizer):
            raise UserError(f"{config.run} has no tokens; take it as autoencoder: {{name: trained, run: {config.run}}}")
        self.config, self.network, self.bottleneck = config, network, bottleneck
        self.picture_channels, self.factor = network.in_channels, network.factor
        self.vocabulary = bottleneck.vocabulary

    def encode(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.bottleneck.codes(self.network.encode(x.to(dtype_of(self.network))).float())

    def decode(self, codes: Tensor) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            return self.network.decode(self.bottleneck.embed(codes).to(dtype_of(self.network)))


def resolved(config: T) -> T:
    """A config, and what it is made of, with the recipes and hashes of the parts that come from trained runs."""
    if hasattr(config, "resolved"):
        return config.resolved()
    if not is_dataclass(config) or isinstance(config, type):
        return config
    now = {f.name: getattr(config, f.name) for f in fields(config) if f.init}
    changed = {name: new for name, value in now.items() if (new := resolved(value)) is not value}
    return replace(config, **changed) if changed else config


def fill_trained(flow: nn.Module, *, needed: bool) -> None:
    """Give the trained parts of a flow the weights of their runs.

    needed: no checkpoint of the flow itself has them. Raises UserError where a run has changed, or is gone and needed.
    """
    for part in flow.modules():
        if isinstance(part, TrainedAutoencoder | TrainedTokenizer) and (needed or Path(part.config.run).exists()):
            part.config.resolved()
            source = part.config.flow()
            part.network.load_state_dict(source.network.state_dict())
            part.bottleneck.load_state_dict(source.bottleneck.state_dict())


def _digest(folder: Path) -> str:
    """SHA-256 of the files of a model's weights, averaged or not."""
    digest = hashlib.sha256()
    for file in (folder / MODEL, folder / EMA):
        if file.exists():
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
