"""Autoencoders trained like any model: pictures to latents or tokens and back.

One flow serves all: a network that encodes and decodes (networks/autoencoders.py) and a bottleneck between (Gaussian: the KL
autoencoder of latent diffusion, arXiv 2112.10752; FSQ or VQ: a tokenizer). Losses as in VQGAN (Esser et al. 2021, arXiv
2012.09841): absolute error, a perceptual distance, a discriminator of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from genflow.conditions import Condition
from genflow.config import Choice
from genflow.errors import UserError, check_least
from genflow.flows.base import Batch, Flow, LossOutput, dtype_of, evaluating
from genflow.flows.fidelity import SIDE, ssim
from genflow.functional import Rng, check_levels
from genflow.networks.autoencoders import EncoderDecoder
from genflow.networks.bottlenecks import Bottleneck, Continuous, GaussianConfig, Squeezed
from genflow.networks.discriminator import PatchDiscriminator, adaptive_weight, hinge
from genflow.networks.feature_graph import FeatureGraph, PerceptualDistance, shelved_graph
from genflow.networks.quantizers import Quantizer
from genflow.registry import api_export, flow_export
from genflow.samplers import Solution, psnr

SHOWN = 16  # pictures of a preview


@dataclass(frozen=True)
class NoSampling:
    """An autoencoder draws nothing."""


@dataclass(frozen=True)
class PerceptualConfig:
    """The distance of a feature network (networks/feature_graph.py), beside the absolute error.

    features: the .json of a graph, or a name in `features` of the cache folder; size: pixels of a side that it sees.
    """

    weight: float = 0.5
    features: str = "mixed4"
    size: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise UserError(f"weight = {self.weight} must be positive; leave perceptual out for none")
        if self.size < 64:
            raise UserError(f"size = {self.size} leaves the deeper features no place; the least is 64")


@dataclass(frozen=True)
class DiscriminatorConfig:
    """A discriminator of patches. weight: beside the adaptive one; start: the step from which the decoder heeds it."""

    weight: float = 0.5
    start: int = 0
    width: int = 64
    layers: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise UserError(f"weight = {self.weight} must be positive; leave discriminator out for none")
        check_least(self, start=0, width=1, layers=1)


@flow_export("autoencoder")
@dataclass(frozen=True)
class AutoencoderFlowConfig:
    """An autoencoder: its bottleneck (gaussian, plain, fsq, vq), and what counts beside the absolute error."""

    sampling: ClassVar[type] = NoSampling

    bottleneck: Annotated[Any, Choice("bottleneck")] = field(default_factory=GaussianConfig)
    perceptual: PerceptualConfig | None = None
    discriminator: DiscriminatorConfig | None = None

    def fits(self, shape: Sequence[int]) -> dict[str, Any]:
        """What the network has to be like."""
        bottleneck = self.bottleneck.build()
        return {"encoder_channels": bottleneck.reads, "latent_channels": bottleneck.channels}

    def build(self, network: nn.Module, text: Any, *, shape: Sequence[int]) -> AutoencoderFlow:
        """shape: of a picture, C, H, W. Raises UserError for a network or a shape that does not fit."""
        if text.max_tokens:
            raise UserError("flow autoencoder: an autoencoder hears no text; leave `text` out")
        return AutoencoderFlow(self, network, text, shape=shape)


def check_parts(network: nn.Module, bottleneck: Bottleneck) -> EncoderDecoder:
    """The network. Raises UserError for one that is no autoencoder's, or of other channels than the bottleneck."""
    if not isinstance(network, EncoderDecoder):
        raise UserError(f"flow autoencoder: {type(network).__name__} is no autoencoder; take model tiny_autoencoder")
    mine, its = (network.encoder_channels, network.latent_channels), (bottleneck.reads, bottleneck.channels)
    if mine != its:
        raise UserError(
            f"flow autoencoder: the model gives {mine[0]} channels and reads {mine[1]}, the bottleneck reads {its[0]} and "
            f"gives {its[1]}; leave model.encoder_channels and model.latent_channels out"
        )
    return network


def check_pictures(network: EncoderDecoder, shape: Sequence[int]) -> None:
    """Raises UserError for pictures, C, H, W, that the network would not give back in their size."""
    factor, channels = network.factor, network.in_channels
    if len(shape) != 3 or shape[0] != channels:
        raise UserError(f"flow autoencoder: the model is of pictures of {channels} channels, not of {tuple(shape)}")
    if shape[1] % factor or shape[2] % factor:
        near = " x ".join(str(max(round(side / factor), 1) * factor) for side in shape[1:])
        raise UserError(
            f"flow autoencoder: {shape[1]} x {shape[2]} is no multiple of the model's factor {factor}; try {near}"
        )


@api_export("AutoencoderFlow")
class AutoencoderFlow(Flow):
    """A network and a bottleneck under the verbs of a flow. encode: latents, without noise; decode: pictures of them."""

    no_density = "an autoencoder has no likelihood of pictures; train a flow of its latents"
    no_samples: ClassVar[str] = (
        "an autoencoder draws no pictures: nothing says which latents are likely; train a flow of them (flow: "
        "{name: latent, autoencoder: {name: trained, run: ...}}), or of its tokens"
    )

    def __init__(self, config: AutoencoderFlowConfig, network: nn.Module, text: Any, *, shape: Sequence[int]) -> None:
        super().__init__()
        self.config, self.text, self.shape = config, text, tuple(shape)
        self.bottleneck: Bottleneck = config.bottleneck.build()
        self.network = check_parts(network, self.bottleneck)
        check_pictures(self.network, shape)
        self.discriminator: PatchDiscriminator | None = None
        if (asked := config.discriminator) is not None:
            if min(shape[1:]) < (least := 2 ** (asked.layers + 2)):
                raise UserError(f"discriminator: {asked.layers} layers need pictures of {least} pixels; give fewer")
            self.discriminator = PatchDiscriminator(shape[0], width=asked.width, layers=asked.layers)
        # In training only: a trained model needs no such file. No submodule: DDP would send its weights at every step.
        self.perceptual: Callable[[Tensor, Tensor], Tensor] | None = None

    def sides(self) -> list[list[nn.Parameter]]:
        """The autoencoder, and its discriminator, whose gradients would else say how far the first may go."""
        (both,) = super().sides()
        if self.discriminator is None:
            return [both]
        rival = set(self.discriminator.parameters())
        return [[p for p in both if p not in rival], [p for p in both if p in rival]]

    @property
    def vocabulary(self) -> int | None:
        """Of its tokens, where it has such."""
        return self.bottleneck.vocabulary if isinstance(self.bottleneck, Quantizer) else None

    def prepare_training(self) -> None:
        """Read the perceptual features. Raises UserError where there are none."""
        if (asked := self.config.perceptual) is not None:
            try:
                graph = FeatureGraph(shelved_graph(asked.features))
            except UserError as error:
                raise UserError(f"perceptual: {error}; put it there, or leave perceptual out") from None
            if self.shape[0] not in (1, graph.channels):
                raise UserError(
                    f"perceptual: its features are of {graph.channels} channels, pictures have {self.shape[0]}"
                )
            self.perceptual = PerceptualDistance(graph, asked.size).to(self.device).__call__

    @torch.no_grad()
    def initialise(self, table: Condition, first: Callable[[], Batch]) -> None:
        """Fit a codebook to the first batch."""
        self.bottleneck.initialise(self.network.encode(first().x).float())

    def _squeezed(self, x: Tensor, rng: Rng | None = None, position: Tensor | None = None) -> Squeezed:
        h = self.network.encode(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.bottleneck(h.float(), rng, position)

    def loss(self, batch: Batch, rng: Rng) -> LossOutput:
        """Mean absolute error + the bottleneck's penalty / numbers of a picture + perceptual + discriminator.

        One optimiser plays both sides of the game: the decoder's term goes through a discriminator whose weights are held
        fast, the discriminator's own term (hinge) is asked of pictures without their history, so that each parameter has the
        gradient of its own loss only. Randomness by batch.position: the bottleneck's.
        """
        x = batch.x
        squeezed = self._squeezed(x, rng, batch.position)
        y = self.network.decode(squeezed.z).float()
        per_sample = (y - x).abs().flatten(1).mean(1)
        loss = per_sample.mean()
        parts = {"l1": loss, **squeezed.told}
        if self.perceptual is not None and self.config.perceptual is not None:
            parts["perceptual"] = self.perceptual(x, y).mean()
            loss = loss + self.config.perceptual.weight * parts["perceptual"]
        if self.discriminator is not None and self.config.discriminator is not None:
            held = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            asked = -functional_call(self.discriminator, held, (y,)).float().mean()
            parts["discriminator"] = hinge(self.discriminator(x).float(), self.discriminator(y.detach()).float())
            if rng.step >= self.config.discriminator.start:
                parts["adaptive_weight"] = adaptive_weight(loss, asked, self.network.last)
                loss = loss + self.config.discriminator.weight * parts["adaptive_weight"] * asked
            loss = loss + parts["discriminator"]
        loss = loss + squeezed.penalty.mean() / x[0].numel()
        return LossOutput(loss, {name: part.detach() for name, part in parts.items()}, per_sample.detach())

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Absolute error and penalty, PSNR in dB, SSIM (of pictures of 11 pixels or more), and what the bottleneck tells."""
        with evaluating(self):
            squeezed = self._squeezed(batch.x)
            y = self.network.decode(squeezed.z).float()
        loss = (y - batch.x).abs().mean() + squeezed.penalty.mean() / batch.x[0].numel()
        y = y.clamp(-1, 1)
        told = {f"validation_{name}": value for name, value in squeezed.told.items()}
        if min(self.shape[1:]) >= SIDE:
            told["validation_ssim"] = ssim(y, batch.x).mean()
        return {"validation_loss": loss, "validation_psnr": psnr(y, batch.x).mean(), **told}

    def sample(self, prompts: Sequence[str] | Condition, *, seeds: Sequence[int], **how: Any) -> Solution:
        """Raises UserError: there is nothing to draw from."""
        raise UserError(f"sample: {self.no_samples}")

    @torch.no_grad()
    def encode(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """Pictures to latents (a normal posterior's mean, a quantiser's embeddings), B x channels x h x w.

        Any size that the factor divides. Raises UserError for pictures of other sizes or channels.
        """
        check_pictures(self.network, x.shape[1:])
        check_levels(x)
        with evaluating(self), torch.autocast(self.device.type, enabled=False):
            return self._squeezed(x.to(self.device, dtype_of(self.network))).z

    @torch.no_grad()
    def decode(self, z: Tensor, condition: Condition | None = None) -> Tensor:
        """Latents to pictures in [-1, 1]."""
        with evaluating(self), torch.autocast(self.device.type, enabled=False):
            return self.network.decode(z.to(self.device, dtype_of(self.network))).float().clamp(-1, 1)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Pictures there and back, float32 in [-1, 1]."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The codes of pictures, B x h x w int64. Raises UserError where there are none, and as `encode` does."""
        check_pictures(self.network, x.shape[1:])
        check_levels(x)
        if not isinstance(self.bottleneck, Quantizer):
            raise UserError(f"codes: a {type(self.bottleneck).__name__} has none; take bottleneck fsq or vq")
        with evaluating(self), torch.autocast(self.device.type, enabled=False):
            return self.bottleneck.codes(self.network.encode(x.to(self.device, dtype_of(self.network))).float())

    def measure(self, x: Tensor) -> None:
        """Take the scale and shift of the latents from pictures, as training does by itself."""
        if not isinstance(self.bottleneck, Continuous):
            raise UserError("measure: codes have no scale; only latents that are numbers have")
        self.bottleneck.note(self.encode(x))

    def preview(self, batch: Batch) -> tuple[Tensor, list[str], int]:
        """The first pictures of a batch above what becomes of them: pictures, captions, columns."""
        columns = min(8, len(batch.x))
        x = batch.x[: min(SHOWN, len(batch.x)) // columns * columns]
        y = self.reconstruct(x)
        told = [f"{value:.1f} dB" for value in psnr(y, x).tolist()]
        rows = [part.unflatten(0, (-1, columns)) for part in (x, y)]
        captions = [text for i in range(0, len(x), columns) for text in ([""] * columns + told[i : i + columns])]
        return torch.stack(rows, dim=1).flatten(0, 2), captions, columns
