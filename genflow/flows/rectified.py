"""Rectified flow: a network learns the velocity of straight paths between pictures and noise, or that of other paths.

Liu et al. 2022 (arXiv 2209.03003), Lipman et al. 2022 (arXiv 2210.02747); the recipe of SD3 (arXiv 2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from genflow.conditions import Condition
from genflow.config import Choice, from_dict
from genflow.errors import UserError, check_whole
from genflow.flows.base import Batch, LossOutput, dtype_of, evaluating
from genflow.flows.bijections.base import Bijection
from genflow.flows.conditioned import ConditionedFlow, check_hearing
from genflow.flows.couplings import Coupling, Independent, Paired, heard
from genflow.flows.densities import Density, LogitNormal
from genflow.flows.dequantization import GREYS, UniformDequantization, bits_per_dim, importance_weighted
from genflow.flows.paths import LinearPath, PathConfig, rows_like
from genflow.flows.prepared import CachedSolution, PreparedVelocity, check_cache, check_noise
from genflow.flows.sampling import SolveConfig, from_noise, into_picture, of_size
from genflow.flows.velocity_likelihood import velocity_log_prob
from genflow.functional import Rng, check_levels, double, noise_from_seeds, resolution_shift, sent, velocity_from_x
from genflow.networks.caching import FirstBlockCache
from genflow.registry import api_export, flow_export, resolve
from genflow.samplers import Progress, Solution, Velocity, bound_sampler, cfg, heun, uniform, velocity_from
from genflow.samplers.guidance import Conditioned, autoguidance
from genflow.samplers.guides import Guide
from genflow.samplers.solution import as_state


@flow_export("rectified")
@dataclass(frozen=True)
class RectifiedFlowConfig:
    """How a rectified flow is trained.

    density: of the training times, which are the path's own. path: on which the network learns (flows/paths.py); samplers
    see the straight one. coupling: which noise a sample is joined with (flows/couplings.py). prediction: what the network
    gives: v, the path's velocity dx_s/ds; x, the clean picture, which becomes v = (z - x) / max(t, t_min) (JiT, arXiv
    2511.13720); or eps, the noise, from which sampling starts at 1 - t_min, where it still tells of the picture. Of x,
    sampling takes the picture predicted at t_min; log_prob, encode and decode follow the clamped velocity to t = 0, which
    leaves about t_min / e of the noise in place: without the clamp, what a network misses of the picture grows as 1 / t.
    drop_condition: part of the samples trained without their condition, for guidance. text_mask: hide padding tokens from
    the network (SD3 shows them). whiten: the ridge of a whitening of the pooled text vectors, fitted to the training
    captions (layers/whitening.py); none leaves them.
    """

    sampling: ClassVar[type] = SolveConfig

    density: Annotated[Density, Choice("density")] = field(default_factory=LogitNormal)
    path: Annotated[PathConfig, Choice("path")] = field(default_factory=LinearPath)
    coupling: Annotated[Coupling, Choice("coupling")] = field(default_factory=Independent)
    prediction: Literal["v", "x", "eps"] = "v"
    t_min: float = 0.05
    drop_condition: float = 0.1
    text_mask: bool = False
    whiten: float | None = None

    def __post_init__(self) -> None:
        check_hearing(self.drop_condition, self.whiten)
        if not 0 < self.t_min < 1:
            raise UserError(f"t_min = {self.t_min} is not between 0 and 1; try 0.05")

    def build(self, network: nn.Module, text: nn.Module, *, shape: Sequence[int]) -> RectifiedFlow:
        """The flow around a network and a text encoder. shape: of a sample, C, H, W or D.

        Raises UserError for a bijection, and for what does not fit.
        """
        if isinstance(network, Bijection):
            raise UserError("flow rectified: the model is a bijection; take flow normalizing, or one such as mmdit")
        return RectifiedFlow(self, network, text, shape=shape)


@api_export("RectifiedFlow")
class RectifiedFlow(ConditionedFlow):
    """A velocity network under the verbs of a flow. network: called as network(z, t, tokens, pooled, context_mask=...)."""

    def __init__(
        self, config: RectifiedFlowConfig, network: nn.Module, text: nn.Module, *, shape: Sequence[int]
    ) -> None:
        super().__init__(network, text, shape=shape, whiten=config.whiten)
        self.config = config
        self.path = config.path.build()
        # The smallest of the path's own times that is trained.
        self.first = float(self.path.s_of_t(torch.tensor(self.path.t_min).double())) if self.path.t_min else 0.0
        # Whether network and solve share their times.
        self.straight = config.path == LinearPath() and config.prediction != "eps"

    @property
    def t_max(self) -> float:
        """Where sampling starts, from t_max noise: 1, or the last time of ours at which the network tells of a picture."""
        last = 1 - self.config.t_min if self.config.prediction == "eps" else 1.0
        return min(self.path.t_max, last)

    @property
    def t_min(self) -> float:
        """The last time of ours before the predicted picture of x-prediction is taken; below it v is clamped."""
        return max(self.config.t_min, self.path.t_min)

    @property
    def dtype(self) -> torch.dtype:
        """In which the network computes."""
        return dtype_of(self.network)

    def velocity(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v = dz/dt of the straight path at (z, t) under an embedded condition. z: B x C x H x W; t: B. As z."""
        return self.velocity_of(lambda x, s: self.predict(x, s, condition), z, t)

    def velocity_of(self, predict: Callable[[Tensor, Tensor], Tensor], z: Tensor, t: Tensor) -> Tensor:
        """The velocity of what the network answers. predict(x_s, s): that answer, on the path."""
        if self.config.prediction == "x":
            if self.straight:
                return velocity_from_x(z, predict(z, t), t, self.t_min)
            s = self.path.s_of_t(double(t).clamp(self.path.t_min, self.path.t_max)).to(t)
            scale = rows_like(self.path.alpha(s) + self.path.sigma(s), z)
            return velocity_from_x(z, predict(scale * z, s), t, self.t_min)
        if self.config.prediction == "v":
            return predict(z, t) if self.straight else velocity_from(predict, self.path, "velocity")(z, t)
        return velocity_from(predict, replace(self.path, t_max=self.t_max), "eps")(z, t)

    def predict(self, x: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """What the network answers at (x_s, s) under an embedded condition, in x's dtype; UserError for another shape."""
        dtype, context_mask = self.dtype, condition.mask if self.config.text_mask else None
        tokens, pooled = condition.tokens.to(dtype), condition.pooled.to(dtype)
        return as_state(self.network(x.to(dtype), s, tokens, pooled, context_mask=context_mask), x)

    def loss(self, batch: Batch, rng: Rng) -> LossOutput:
        """The mean square error of what the network predicts, over each picture, then over the batch.

        Of v: E ||v(x_s, s) - dx_s/ds||^2, where dx_s/ds is noise - x on the straight path (flow matching). Of eps:
        E ||eps(x_s, s) - noise||^2 (Ho et al. 2020, arXiv 2006.11239, eq. 14). Of x: E ||x(x_s, s) - x||^2 over
        max(t, t_min)^2, the error of the straight velocity. Draws by batch.position: streams "t", "noise" and "drop"; then
        the coupling joins noise and samples.
        """
        config, position = self.config, batch.position
        self._check(batch.x)
        x = batch.x.float()
        s = sent(config.density(rng.uniform("t", position)).float().clamp(min=self.first), x.device)
        keep = sent(rng.uniform("drop", position) >= config.drop_condition, x.device)
        condition = self.text.drop(batch.condition, rng, position).where(keep, self.text.null().to(x.device))
        embedded = self.embed(condition)
        noise = self._coupled(x, self._noise(batch, rng), condition, embedded)
        per_sample = self._error(x, noise, s, embedded)
        loss = per_sample.mean()
        name = "noise" if config.prediction == "eps" else "velocity"
        return LossOutput(loss, {name: loss.detach()}, per_sample.detach(), s)

    def _noise(self, batch: Batch, rng: Rng) -> Tensor:
        """The noise of a batch before it is coupled: drawn, or its own. Raises UserError where it has none of its own."""
        if not isinstance(self.config.coupling, Paired):
            return rng.normal("noise", batch.position, batch.x.shape[1:], device=batch.x.device)
        own = getattr(batch, "noise", None)
        if own is None:
            raise UserError("coupling paired: the data holds no noise; take data pairs, or coupling independent")
        return own.float()

    def _coupled(self, x: Tensor, noise: Tensor, condition: Condition, embedded: Condition) -> Tensor:
        masked = self.config.text_mask or self.text.trainable
        return self.config.coupling(x, noise, heard(self.config.coupling, condition, embedded, masked=masked))

    def _error(self, x: Tensor, noise: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """Mean square error of the prediction at times s for each sample: B, float32."""
        prediction, path = self.config.prediction, self.path
        alpha, sigma = (rows_like(a, x) for a in (path.alpha(s), path.sigma(s)))
        output = self.predict(alpha * x + sigma * noise, s, condition)
        if prediction == "x":
            error = (output - x) / (sigma / (alpha + sigma)).clamp(min=self.config.t_min)
        elif prediction == "eps":
            error = output - noise
        else:
            assert path.rates is not None
            d_alpha, d_sigma = (rows_like(a, x) for a in path.rates(s))
            error = output - (d_alpha * x + d_sigma * noise)
        return error.square().flatten(1).mean(1)

    @torch.no_grad()
    def validate(self, batch: Batch, levels: int = 8) -> dict[str, Tensor]:
        """The loss at the fixed times (i + 1/2) / levels with fixed noise, and their mean (SD3, sec. 5.3).

        No condition is dropped. The noise hangs on batch.position alone, so that every call asks the same questions; it is
        coupled as in training, within this batch.
        """
        x, noise = batch.x.float(), self._noise(batch, Rng(0))
        with evaluating(self):
            condition = self.embed(batch.condition)
            if len(x) > 1:  # what is left at the end of a split may be a single sample
                noise = self._coupled(x, noise, batch.condition, condition)
            times = [(i + 0.5) / levels for i in range(levels)]
            losses = [self._error(x, noise, x.new_full((len(x),), t), condition).mean() for t in times]
        by_time = {f"validation_t{t:.3f}": loss for t, loss in zip(times, losses, strict=True)}
        return {"validation_loss": torch.stack(losses).mean(), **by_time}

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
        cache: float = 0.0,
        progress: Progress | None = None,
        record: bool = False,
    ) -> Solution:
        """One picture for each prompt and seed; the picture of a seed does not depend on its batch mates.

        prompts: as many as seeds, or one for all of them; or a prepared condition. sampler: a registered name; options: its
        own, such as {"rtol": 1e-3}. grid: a registered name (`times`), or the times themselves, from t_max down, whatever
        steps and shift say; shift: a number, or "resolution" for the one of the picture's size (`resolution_shift`).
        guidance: its scale, 1 is none; interval: the times at which it acts; guide: how, a registered name, one with its
        options, {"name": "apg", "eta": 0.5}, or a Guide; rescale: as in `cfg`. weak: a weaker model to move away from, in
        place of the empty prompt (`autoguidance`). size: side, or height and width, in place of the trained size. cache:
        LOSSY, the threshold of first-block caching (networks/caching.py), 0 is none. progress: called as progress(done,
        steps) after every step. record: keep the trajectory.

        Returns x, B x C x H x W float32 in [-1, 1], and nfe; with a cache also skipped (`CachedSolution`). Raises
        UserError for what cannot be, and for NaN.
        """
        rule = from_dict(_Guidance, {"guide": guide}, where="sample").guide
        shape = self.shape if size is None else of_size(self.shape, size)
        times = self.times(steps, grid, shift, size=shape[1:])
        solve = bound_sampler(sampler, options or {}, seeds)
        if self.config.prediction == "x" and isinstance(grid, str):
            solve = into_picture(sampler, solve, self.t_min)
        check_noise(sampler, self.config.coupling)
        noise = self.t_max * noise_from_seeds(seeds, shape).to(self.device)
        if weak is not None and (not isinstance(weak, RectifiedFlow) or weak.shape[0] != shape[0]):
            has = f" of {tuple(weak.shape)}" if isinstance(weak, RectifiedFlow) else ""
            raise UserError(f"weak must be a rectified flow of {shape}, not a {type(weak).__name__}{has}")
        check_cache(cache, self.network, sampler)
        caches: list[FirstBlockCache] = []

        def prepared(flow: RectifiedFlow) -> PreparedVelocity:
            caches.extend([FirstBlockCache(cache)] if cache else [])
            return PreparedVelocity(flow, times, caches[-1] if cache else None)

        with evaluating(self), evaluating(self if weak is None else weak):
            condition = self.embed_prompts(prompts, len(seeds))
            own = prepared(self)
            if weak is None:
                velocity = self._guided(own, condition, guidance, interval, rule, rescale)
            else:
                other = prepared(weak)
                strong = Conditioned(own, *own.prepare(condition))
                weaker = Conditioned(other, *other.prepare(weak.embed_prompts(prompts, len(seeds))))
                velocity = autoguidance(strong, weaker, guidance, interval=interval, guide=rule, rescale=rescale)
            solution = solve(velocity, noise, times, progress=progress, record=record).checked()
        x = solution.x.float()
        solution = replace(solution, x=x.clamp(-1, 1) if x.dim() == 4 and self.bounded else x)
        return CachedSolution.of(solution, caches) if cache else solution

    def times(
        self,
        steps: int,
        grid: str | Sequence[float] = "shifted",
        shift: float | Literal["resolution"] = 1.0,
        *,
        size: Sequence[int] | None = None,
    ) -> list[float]:
        """The steps + 1 times of a sample: those given, or of a registered grid.

        A grid falls from t_max, else UserError. One of a name is for x-prediction squeezed into t_max .. t_min, and its last
        step takes the predicted picture: below t_min, where the velocity is clamped, more steps would leave noise behind.
        """
        if not isinstance(grid, str):
            return from_noise(grid, self.t_max)
        if shift == "resolution":
            if len(self.shape) != 3:
                raise UserError("shift = resolution is for pictures; this model makes vectors: give a number")
            pixels = math.prod(size or self.shape[1:])
            shift = resolution_shift(pixels // getattr(self.network, "patch_size", 1) ** 2)
        make, first, last = resolve("grid", grid), self.t_max, self.t_min
        if self.config.prediction != "x" or steps < 2:
            return [first * t for t in make(steps, shift)]
        return [last + (first - last) * t for t in make(steps - 1, shift)] + [0.0]

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
        return self._guided(PreparedVelocity(self), condition, guidance, interval, rule, rescale)

    def _guided(
        self,
        velocity: PreparedVelocity,
        condition: Condition,
        guidance: float,
        interval: tuple[float, float],
        rule: Guide,
        rescale: float,
    ) -> Velocity:
        others = [] if guidance == 1 else [self.embed(self.text.null().to(self.device))]
        prepared = velocity.prepare(condition, *others)
        return cfg(velocity, prepared[0], prepared[-1], guidance, interval=interval, guide=rule, rescale=rescale)

    def log_prob(
        self,
        x: Tensor,
        condition: Condition | None = None,
        *,
        divergence: str | None = None,
        draws: int = 1,
        rtol: float = 1e-4,
        atol: float = 1e-4,
    ) -> Tensor:
        """log p(x) of the unguided ODE from noise to data, nats, B: an estimate unless the divergence is exact.

        It is the density of `decode`: of x-prediction that of the clamped velocity, not of `sample`.
        condition: prepared; none is the empty one. divergence, draws, rtol, atol: as of `velocity_log_prob`; by default
        exact for vectors of up to 16 numbers, else hutchinson. Raises UserError as that does.
        """
        self._check(x)
        divergence = divergence or ("exact" if math.prod(self.shape) <= 16 else "hutchinson")
        with evaluating(self):
            with torch.no_grad():
                velocity = self.guided(self.embed_rows(condition, len(x)))
            how: dict[str, Any] = {"divergence": divergence, "draws": draws, "rtol": rtol, "atol": atol}
            return velocity_log_prob(velocity, x.to(self.device), end=self.t_max, **how).log_prob

    @torch.no_grad()
    def bits_per_dim(
        self, x: Tensor, condition: Condition | None = None, *, k: int = 1, position: Tensor | None = None, **how: Any
    ) -> Tensor:
        """-log2 P(x) per dimension of pictures on their grey levels, B: an upper bound, up to the estimator's noise.

        k draws of uniform noise within each cell, 2 / 255 wide; position: B, its counters; how: as of `log_prob`. Raises
        UserError for vectors, and for pictures that are not on their levels.
        """
        if len(self.shape) == 1:
            raise UserError("bits_per_dim is of pictures of grey levels; vectors have a density: log_prob")
        check_whole(k=k)
        dequantize, x = UniformDequantization().build(self.shape), x.to(self.device)
        position = torch.arange(len(x)) if position is None else position
        cell = GREYS / (GREYS - 1)  # the dequantised picture in [-1, 1) to the scale that the network was trained on
        drawn = (dequantize(x, Rng(0, draw), position)[0] for draw in range(k))
        weights = [self.log_prob(cell * y, condition, **how) for y in drawn]
        return bits_per_dim(importance_weighted(torch.stack(weights)), math.prod(self.shape), scale=2 * cell)

    def likelihood_note(self, k: int, **how: Any) -> str:
        """Everything that bits per dimension of a velocity hang on."""
        exact = math.prod(self.shape) <= 16
        words = {"divergence": "exact" if exact else "hutchinson", "draws": 1, "rtol": 1e-4, "atol": 1e-4, **how}
        dequantised = "" if len(self.shape) == 1 else f"uniform dequantisation, K = {k}, "
        words |= {"velocity clamped below t =": f"{self.t_min:g}"} if self.config.prediction == "x" else {}
        dtype = str(next(self.network.parameters()).dtype).removeprefix("torch.")
        return f"{dequantised}unguided ODE, {', '.join(f'{a} {b}' for a, b in words.items())}, {dtype}"

    @torch.no_grad()
    def encode(self, x: Tensor, condition: Condition | None = None, *, steps: int = 50) -> Tensor:
        """Pictures to noise, along the unguided ODE by Heun's method. condition: prepared; none is the empty one."""
        return self._solve(x, condition, [self.t_max * t for t in uniform(steps)[::-1]]) / self.t_max

    @torch.no_grad()
    def decode(self, z: Tensor, condition: Condition | None = None, *, steps: int = 50) -> Tensor:
        """Noise to pictures, along the unguided ODE by Heun's method. The result is not clamped."""
        return self._solve(self.t_max * z, condition, [self.t_max * t for t in uniform(steps)])

    def _check(self, x: Tensor) -> None:
        """Raises UserError for samples of another kind; pictures of other sizes are welcome."""
        if x.dim() != len(self.shape) + 1 or x.shape[1] != self.shape[0]:
            wanted = " x ".join(map(str, ("B", self.shape[0], *("H", "W")[: len(self.shape) - 1])))
            raise UserError(f"the flow is of samples {wanted}, not {' x '.join(map(str, x.shape))}")
        if len(self.shape) == 3:
            check_levels(x)

    def _solve(self, x: Tensor, condition: Condition | None, times: Sequence[float]) -> Tensor:
        self._check(x)
        with evaluating(self):
            embedded = self.embed_rows(condition, len(x))
            return heun(lambda z, t: self.velocity(z, t, embedded), x.to(self.device), times).x


@dataclass(frozen=True)
class _Guidance:
    guide: Annotated[Guide, Choice("guidance")]
