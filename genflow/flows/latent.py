"""Latent flows: any flow in the latents of an autoencoder (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from genflow.conditions import Condition
from genflow.config import Choice
from genflow.errors import UserError
from genflow.flows.base import Batch, Flow, LossOutput, dtype_of, evaluating
from genflow.flows.couplings import Paired
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.sampling import of_size
from genflow.functional import Rng, check_levels
from genflow.registry import api_export, flow_export
from genflow.samplers import Solution


@api_export("Autoencoder")
class Autoencoder(nn.Module, ABC):
    """Pictures to latents, each of `channels` x H/factor x W/factor, and back; in float32.

    A flow sees (z - shift) * scale, so that its data has about unit variance.
    """

    picture_channels: int
    channels: int
    factor: int
    scale: float | Tensor
    shift: float | Tensor

    @abstractmethod
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x). x: B x C x H x W in [-1, 1], multiples of factor."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """B x channels x h x w -> B x C x h factor x w factor, which may leave [-1, 1]."""

    def tiled(self, tile: int) -> Callable[[Tensor], Tensor]:
        """`decode` by tiles of tile x tile pixels, which take less memory, and see less: the picture is near `decode`'s.

        Raises UserError where this cannot be done, and for a tile that does not fit.
        """
        raise UserError(f"tile: a {type(self).__name__} decodes pictures as a whole; leave tile out")


@flow_export("latent")
@dataclass(frozen=True)
class LatentFlowConfig:
    """A flow of an autoencoder's latents. Its pictures are the autoencoder's; the autoencoder itself is not trained."""

    autoencoder: Annotated[Any, Choice("autoencoder")]
    flow: Annotated[Any, Choice("flow")] = field(default_factory=RectifiedFlowConfig)

    def __post_init__(self) -> None:
        if isinstance(getattr(self.flow, "coupling", None), Paired):
            raise UserError("flow latent: coupling paired takes the data's own noise, of pictures; take independent")

    @property
    def sampling(self) -> type:
        return type(self.flow).sampling

    def fits(self, shape: Sequence[int]) -> dict[str, Any]:
        """What the network has to be like, for pictures of a shape. Raises UserError for one that has no latents."""
        inner = _latent_shape(self.autoencoder.build(), shape)
        own = self.flow.fits(inner) if hasattr(self.flow, "fits") else {}
        return {"shape": inner, "in_channels": inner[0], **own}

    def build(self, network: nn.Module, text: nn.Module, *, shape: Sequence[int]) -> LatentFlow:
        """shape: of a picture, C, H, W. Raises UserError for a shape that the autoencoder does not make."""
        autoencoder = self.autoencoder.build()
        inner = _latent_shape(autoencoder, shape)
        return LatentFlow(self, self.flow.build(network, text, shape=inner), autoencoder)


def _latent_shape(autoencoder: Autoencoder, shape: Sequence[int], sides: int = 1) -> tuple[int, int, int]:
    """The latents' shape of pictures of a shape, its sides multiples of `sides`. Raises UserError for one that has none."""
    factor, channels = autoencoder.factor, autoencoder.picture_channels
    if len(shape) != 3 or shape[0] != channels:
        raise UserError(
            f"flow latent: the autoencoder makes pictures of {channels} channels, not samples of {tuple(shape)}"
        )
    _, height, width = shape
    step = factor * sides
    if height % step or width % step or min(height, width) < 1:
        near = f"{max(round(height / step), 1) * step} x {max(round(width / step), 1) * step}"
        what = (
            f"the autoencoder's {factor}"
            if sides == 1
            else f"{step}, the autoencoder's {factor} x the network's {sides}"
        )
        raise UserError(f"flow latent: {height} x {width} is no multiple of {what}; try {near}")
    return autoencoder.channels, height // factor, width // factor


def sides_of(network: nn.Module) -> int:
    """What the sides of all that a network takes are multiples of: of its patches, or for as often as it halves them."""
    return max(getattr(network, name, 1) for name in ("patch_size", "multiple", "factor"))


@api_export("LatentFlow")
class LatentFlow(Flow):
    """A flow of latents under the verbs of a flow of pictures. flow: of latents; autoencoder: frozen, in eval mode."""

    no_density = "the density of latents is not that of pictures"

    def __init__(self, config: LatentFlowConfig, flow: Flow, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.config = config
        self.flow = flow
        flow.take_latents()
        self.autoencoder = autoencoder.requires_grad_(False)
        channels, height, width = flow.shape
        if channels != autoencoder.channels:
            raise UserError(f"flow latent: the flow has {channels} channels, the autoencoder {autoencoder.channels}")
        self.shape = (autoencoder.picture_channels, height * autoencoder.factor, width * autoencoder.factor)

    @property
    def text(self) -> Any:
        return self.flow.text

    @property
    def network(self) -> Any:
        return self.flow.network

    def train(self, mode: bool = True) -> LatentFlow:
        super().train(mode)
        self.autoencoder.eval()
        return self

    @torch.no_grad()
    def to_latents(self, x: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """Latents as the flow sees them, float32: the posterior's mean, and noise times its standard deviation.

        x: B x C x H x W. Raises UserError for pictures that the autoencoder does not make.
        """
        _latent_shape(self.autoencoder, x.shape[1:])
        check_levels(x)
        with torch.autocast(x.device.type, enabled=False):
            mean, std = self.autoencoder.posterior(x.to(dtype_of(self.autoencoder)))
        return (mean.float() + std.float() * noise - self.autoencoder.shift) * self.autoencoder.scale

    @torch.no_grad()
    def to_pictures(self, z: Tensor, *, tile: int | None = None) -> Tensor:
        """Pictures of latents as the flow makes them, B x C x H x W float32 in [-1, 1], whatever the autocast around it.

        tile: see `sample`.
        """
        decode = self.autoencoder.decode if tile is None else self.autoencoder.tiled(tile)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float() / self.autoencoder.scale + self.autoencoder.shift
            return decode(z.to(dtype_of(self.autoencoder))).float().clamp(-1, 1)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Pictures there and back through the autoencoder: no sample can be truer."""
        with evaluating(self):
            return self.to_pictures(self.to_latents(x.to(self.device)))

    def latents_of(self, batch: Batch, noise: Tensor | float = 0.0) -> Tensor:
        """As `to_latents`, of a batch; of one that holds posteriors, from them (data/latents.py).

        Such a batch has the means as x and, as spread, the standard deviations.
        """
        spread = getattr(batch, "spread", None)
        if spread is None:
            return self.to_latents(batch.x, noise)
        return (batch.x + spread * noise - self.autoencoder.shift) * self.autoencoder.scale

    def initialise(self, table: Condition, first: Callable[[], Batch]) -> None:
        self.flow.initialise(table, lambda: _Latents.of(batch := first(), self.latents_of(batch)))

    def loss(self, batch: Batch, rng: Rng) -> LossOutput:
        """The flow's own, on latents drawn from the posterior: stream "latent" of batch.position, then the flow's."""
        cached = getattr(batch, "spread", None) is not None
        shape = batch.x.shape[1:] if cached else _latent_shape(self.autoencoder, batch.x.shape[1:])
        noise = rng.normal("latent", batch.position, shape, device=batch.x.device)
        return self.flow.loss(_Latents.of(batch, self.latents_of(batch, noise)), rng)

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """The flow's own, on the posteriors' means."""
        return self.flow.validate(_Latents.of(batch, self.latents_of(batch)))

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str] | Condition,
        *,
        seeds: Sequence[int],
        size: int | tuple[int, int] | None = None,
        tile: int | None = None,
        **how: Any,
    ) -> Solution:
        """One picture per seed, decoded from latents that the flow samples; how: the flow's own (`RectifiedFlow.sample`).

        size: side, or height and width, of the picture. tile: pixels of the side of what is decoded at once, for pictures
        too large for the memory (`Autoencoder.tiled`). Raises UserError for what the autoencoder or the flow refuses.
        """
        if tile is not None:
            self.autoencoder.tiled(tile)  # refuses before the solve, not after
        if size is not None:
            if velocity_flow(self) is None:
                raise UserError(f"size = {size}: a {type(self.flow).__name__} has one size of pictures; leave size out")
            asked, sides = of_size(self.shape, size), sides_of(self.network)
            how["size"] = _latent_shape(self.autoencoder, asked, sides)[1:]
        solution = self.flow.sample(prompts, seeds=seeds, **how)
        with evaluating(self):
            # one by one: a decoder's activations at 1024 x 1024 are of gigabytes
            return replace(solution, x=torch.cat([self.to_pictures(z[None], tile=tile) for z in solution.x]))

    def encode(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """Pictures to the noise of their latents' means."""
        return self.flow.encode(self.to_latents(x.to(self.device)), condition)

    def decode(self, z: Tensor, condition: Condition | None = None) -> Tensor:
        """Noise of latents to pictures."""
        return self.to_pictures(self.flow.decode(z, condition))


def velocity_flow(model: Flow) -> Any:
    """The flow that has the velocity of a model: itself, or a latent flow's flow of latents. None where there is none."""
    flow = model.flow if isinstance(model, LatentFlow) else model
    return flow if hasattr(flow, "guided") else None


@dataclass
class _Latents:
    """A batch of pictures as the flow of latents sees it."""

    x: Tensor
    condition: Condition
    position: Tensor

    @staticmethod
    def of(batch: Batch, x: Tensor) -> _Latents:
        return _Latents(x, batch.condition, batch.position)
