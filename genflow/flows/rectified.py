"""Rectified flow: a network learns the velocity of straight paths between pictures and noise.

Liu et al. 2022 (arXiv 2209.03003), Lipman et al. 2022 (arXiv 2210.02747); the recipe of SD3 (arXiv 2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from genflow.conditions import Condition
from genflow.config import Choice, from_dict
from genflow.errors import UserError
from genflow.flows.base import Batch, Flow, LossOutput, evaluating
from genflow.flows.densities import Density, LogitNormal
from genflow.functional import (
    Rng,
    interpolate,
    noise_from_seeds,
    path_velocity,
    resolution_shift,
    velocity_from_x,
)
from genflow.layers.whitening import Whitening
from genflow.registry import api_export, flow_export, resolve
from genflow.samplers import Progress, Solution, Velocity, bound_sampler, cfg, check_grid, heun, uniform
from genflow.samplers.guidance import Conditioned, autoguidance
from genflow.samplers.guides import Guide


@flow_export("rectified")
@dataclass(frozen=True)
class RectifiedFlowConfig:
    """How a rectified flow is trained.

    density: of the training times. prediction: what the network gives, the velocity, or the clean picture x, which
    becomes v = (z - x) / max(t, t_min) (JiT, arXiv 2511.13720). drop_condition: part of the samples trained without
    their condition, for guidance. text_mask: hide padding tokens from the network (SD3 shows them). whiten: the ridge
    of a whitening of the pooled text vectors, fitted to the training captions (layers/whitening.py); none leaves them.
    """

    density: Annotated[Density, Choice("density")] = field(default_factory=LogitNormal)
    prediction: Literal["v", "x"] = "v"
    t_min: float = 0.05
    drop_condition: float = 0.1
    text_mask: bool = False
    whiten: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.drop_condition <= 1:
            near = float(self.drop_condition > 1)
            raise UserError(f"drop_condition = {self.drop_condition} is not within 0 .. 1; try {near}")
        if not 0 < self.t_min < 1:
            raise UserError(f"t_min = {self.t_min} is not between 0 and 1; try 0.05")
        if self.whiten is not None and not 0 < self.whiten < math.inf:
            raise UserError(f"whiten = {self.whiten} must be positive, such as 0.1, or none")

    def build(self, network: nn.Module, text: nn.Module, *, image_shape: Sequence[int]) -> RectifiedFlow:
        """The flow around a network and a text encoder. image_shape: C, H, W."""
        channels, height, width = image_shape
        return RectifiedFlow(self, network, text, image_shape=(channels, height, width))


@api_export("RectifiedFlow")
class RectifiedFlow(Flow):
    """A velocity network under the verbs of a flow.

    network: called as network(z, t, tokens, pooled, context_mask=...), like MMDiT. text: a module that turns prepared
    conditions into embedded ones, with encode(prompts) and null() for prepared ones. A text encoder that is not
    trainable stays out of the state dict: its name says what it is.
    """

    text: Any
    no_density: ClassVar[str] = (
        "the likelihood of a velocity needs an ODE solve with its divergence, which this version does not have"
    )

    def __init__(
        self,
        config: RectifiedFlowConfig,
        network: nn.Module,
        text: nn.Module,
        *,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.config = config
        self.network = network
        self.text = text
        self.image_shape = image_shape
        self.whitening = None if config.whiten is None else Whitening(self.text.pooled_dim, config.whiten)
        if not text.trainable:
            self.register_state_dict_post_hook(_without_text)
            self.register_load_state_dict_post_hook(_text_not_missing)

    def initialise(self, condition: Condition) -> None:
        """Fit the whitening to the prepared conditions of the training data."""
        if self.whitening is not None:
            with torch.no_grad():
                self.whitening.fit(self.text(condition.to(self.device)).pooled)

    def embed(self, condition: Condition) -> Condition:
        """A prepared condition as the network takes it."""
        condition = self.text(condition)
        if self.whitening is None:
            return condition
        return replace(condition, pooled=self.whitening(condition.pooled))

    def velocity(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v at (z, t) under an embedded condition. z: B x C x H x W; t: B. Returns z's shape and dtype."""
        return self._velocity(z, t, condition.tokens, condition.mask, condition.pooled)

    def _velocity(self, z: Tensor, t: Tensor, tokens: Tensor, mask: Tensor, pooled: Tensor) -> Tensor:
        config = self.config
        dtype = next((p.dtype for p in self.network.parameters()), z.dtype)
        context_mask = mask if config.text_mask else None
        output = self.network(z.to(dtype), t, tokens.to(dtype), pooled.to(dtype), context_mask=context_mask).to(z.dtype)
        return output if config.prediction == "v" else velocity_from_x(z, output, t, config.t_min)

    def loss(self, batch: Batch, rng: Rng) -> LossOutput:
        """E ||v(z_t, t) - (noise - x)||^2, the mean over each picture, then over the batch.

        With x-prediction the target is (z_t - x) / max(t, t_min), the same but for t < t_min, where the clamp would
        otherwise ask for a picture that is not x. Draws by batch.position: streams "t", "noise" and "drop".
        """
        config, position = self.config, batch.position
        x = batch.image.float()
        t = config.density(rng.uniform("t", position)).float().to(x.device)
        noise = rng.normal("noise", position, x.shape[1:]).to(x.device)
        keep = (rng.uniform("drop", position) >= config.drop_condition).to(x.device)
        condition = self.embed(batch.condition.where(keep, self.text.null().to(x.device)))
        per_sample = self._error(x, noise, t, condition)
        loss = per_sample.mean()
        return LossOutput(loss, {"velocity": loss.detach()}, per_sample.detach(), t)

    def _error(self, x: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Mean square error of the velocity for each sample: B, float32."""
        z = interpolate(x, noise, t)
        if self.config.prediction == "v":
            target = path_velocity(x, noise)
        else:
            target = velocity_from_x(z, x, t, self.config.t_min)
        return (self.velocity(z, t, condition) - target).square().flatten(1).mean(1)

    @torch.no_grad()
    def validation_loss(self, batch: Batch, levels: int = 8) -> Tensor:
        """The loss at the fixed times (i + 1/2) / levels with fixed noise: one number per level (SD3, sec. 5.3).

        No condition is dropped. The noise hangs on batch.position alone, so that every call asks the same questions.
        """
        x = batch.image.float()
        noise = Rng(0).normal("noise", batch.position, x.shape[1:]).to(x.device)
        with evaluating(self):
            condition = self.embed(batch.condition)
            times = [(i + 0.5) / levels for i in range(levels)]
            return torch.stack([self._error(x, noise, x.new_full((len(x),), t), condition).mean() for t in times])

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str] | Condition,
        *,
        seeds: Sequence[int],
        steps: int = 20,
        sampler: str = "heun",
        options: Mapping[str, Any] | None = None,
        grid: str | Sequence[float] = "shifted",
        shift: float | Literal["resolution"] = 1.0,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        guide: Guide | str | Mapping[str, Any] = "cfg",
        rescale: float = 0.0,
        weak: RectifiedFlow | None = None,
        size: int | tuple[int, int] | None = None,
        progress: Progress | None = None,
        record: bool = False,
    ) -> Solution:
        """One picture for each prompt and seed; the picture of a seed does not depend on its batch mates.

        prompts: as many as seeds, or one for all of them; or a prepared condition. sampler: a registered name; options: its
        own, such as {"rtol": 1e-3}. grid: a registered name (`times`), or the times themselves, whatever steps and shift
        say; shift: a number, or "resolution" for the one of the picture's size (`resolution_shift`). guidance: its scale,
        1 is none; interval: the times at which it acts; guide: how, a registered name, one with its options, {"name":
        "apg", "eta": 0.5}, or a Guide; rescale: as in `cfg`. weak: a weaker model to move away from, in place of the
        empty prompt (`autoguidance`). size: side, or height and width, in place of the trained size. progress: called as
        progress(done, steps) after every step. record: keep the trajectory.

        Returns x, B x C x H x W float32 in [-1, 1], and nfe. Raises UserError for what cannot be, and for NaN.
        """
        rule = from_dict(_Guidance, {"guide": guide}, where="sample").guide
        channels, *sides = self.image_shape
        height, width = sides if size is None else (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise UserError(
                f"size = {height} x {width} is not a picture's; this model was trained at {sides[0]} x {sides[1]}"
            )
        times = self.times(steps, grid, shift, size=(height, width))
        solve = bound_sampler(sampler, options or {}, seeds)
        noise = noise_from_seeds(seeds, (channels, height, width)).to(self.device)
        if weak is not None and (not isinstance(weak, RectifiedFlow) or weak.image_shape[0] != channels):
            has = f" with {weak.image_shape[0]} channels" if isinstance(weak, RectifiedFlow) else ""
            raise UserError(f"weak must be a rectified flow with {channels} channels, not a {type(weak).__name__}{has}")
        with evaluating(self), evaluating(self if weak is None else weak):
            condition = self._embed(prompts, len(seeds))
            if weak is None:
                velocity = self.guided(condition, guidance=guidance, interval=interval, guide=rule, rescale=rescale)
            else:
                strong = Conditioned(self._velocity, _tensors(condition))
                weaker = Conditioned(weak._velocity, _tensors(weak._embed(prompts, len(seeds))))
                velocity = autoguidance(strong, weaker, guidance, interval=interval, guide=rule, rescale=rescale)
            solution = solve(velocity, noise, times, progress=progress, record=record).checked()
        return replace(solution, x=solution.x.float().clamp(-1, 1))

    def times(
        self,
        steps: int,
        grid: str | Sequence[float] = "shifted",
        shift: float | Literal["resolution"] = 1.0,
        *,
        size: tuple[int, int] | None = None,
    ) -> list[float]:
        """The steps + 1 times of a sample: those given, or of a registered grid.

        For x-prediction a grid of a name is squeezed into 1 .. t_min, and its last step takes the predicted picture:
        below t_min, where the velocity is clamped, more steps would leave noise behind.
        """
        if not isinstance(grid, str):
            return check_grid(grid)
        if shift == "resolution":
            height, width = size or self.image_shape[1:]
            shift = resolution_shift(height * width // getattr(self.network, "patch_size", 1) ** 2)
        make, last = resolve("grid", grid), self.config.t_min
        if self.config.prediction == "v" or steps < 2:
            return make(steps, shift)
        return [last + (1 - last) * t for t in make(steps - 1, shift)] + [0.0]

    def guided(
        self,
        condition: Condition,
        *,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        guide: Guide | str | Mapping[str, Any] = "cfg",
        rescale: float = 0.0,
    ) -> Velocity:
        """The velocity v(z, t) under an embedded condition (`embed`), for any sampler or edit; guidance as in `sample`."""
        rule = from_dict(_Guidance, {"guide": guide}, where="guided").guide
        cond = _tensors(condition)
        uncond = _tensors(self.embed(self.text.null().to(self.device))) if guidance != 1 else cond
        return cfg(self._velocity, cond, uncond, guidance, interval=interval, guide=rule, rescale=rescale)

    def _embed(self, prompts: Sequence[str] | Condition, n: int) -> Condition:
        """The embedded condition of n samples: n rows, or one for all."""
        if isinstance(prompts, str):
            raise UserError("prompts must be a list of strings, such as ['a red apple'], not one string")
        if not isinstance(prompts, Condition) and (other := [p for p in prompts if not isinstance(p, str)]):
            raise UserError(f"prompts must be strings, such as 'a red apple' or '3', not {other[0]!r}")
        if n == 0:
            raise UserError("no seeds are given, so there is nothing to sample; give one seed for each picture")
        if len(prompts) not in (1, n):
            raise UserError(f"{len(prompts)} prompts for {n} seeds; give one prompt, or one for each seed")
        condition = prompts if isinstance(prompts, Condition) else self.text.encode(list(prompts))
        return self.embed(condition.to(self.device))

    @torch.no_grad()
    def encode(self, x: Tensor, condition: Condition | None = None, *, steps: int = 50) -> Tensor:
        """Pictures to noise, along the unguided ODE by Heun's method. condition: prepared; none is the empty one."""
        return self._solve(x, condition, uniform(steps)[::-1])

    @torch.no_grad()
    def decode(self, z: Tensor, condition: Condition | None = None, *, steps: int = 50) -> Tensor:
        """Noise to pictures, along the unguided ODE by Heun's method. The result is not clamped."""
        return self._solve(z, condition, uniform(steps))

    def _solve(self, x: Tensor, condition: Condition | None, times: Sequence[float]) -> Tensor:
        prepared = self.text.null() if condition is None else condition
        if len(prepared) not in (1, len(x)):
            raise UserError(
                f"{len(prepared)} conditions for {len(x)} pictures; give one condition, or one for each picture"
            )
        with evaluating(self):
            embedded = self.embed(prepared.to(self.device)).expand(len(x))
            return heun(lambda z, t: self.velocity(z, t, embedded), x.to(self.device), times).x


@dataclass(frozen=True)
class _Guidance:
    guide: Annotated[Guide, Choice("guidance")]


def _tensors(condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
    return condition.tokens, condition.mask, condition.pooled


def _without_text(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: dict) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}text.")]:
        del state[key]


def _text_not_missing(_module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith("text.")]
