"""Normalizing flow: a bijection between data and noise, trained by maximum likelihood.

Rezende & Mohamed 2015 (arXiv 1505.05770); Dinh et al. 2017 (arXiv 1605.08803).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from genflow.conditions import Condition
from genflow.config import Choice
from genflow.errors import UserError, check_whole
from genflow.flows.base import Batch, LossOutput, dtype_of, evaluating
from genflow.flows.bijections.base import Bijection
from genflow.flows.bijections.continuous import CNF
from genflow.flows.bijections.marginals import Marginals
from genflow.flows.bijections.transformer import tweedie
from genflow.flows.conditioned import ConditionedFlow, check_hearing
from genflow.flows.dequantization import (
    Dequantizer,
    GaussianDequantization,
    LatentNoise,
    UniformDequantization,
    bits_per_dim,
    importance_weighted,
)
from genflow.flows.divergence import Probing, current_probing, fingerprint, probing, probing_again
from genflow.flows.models.tarflow import TarFlow, measure_inverse
from genflow.flows.sampling import InverseConfig
from genflow.functional import Rng, check_levels, noise_from_seeds, sent
from genflow.registry import api_export, flow_export, tag_of
from genflow.samplers import Progress, Solution


@flow_export("normalizing")
@dataclass(frozen=True)
class NormalizingFlowConfig:
    """How a normalizing flow is trained.

    dequantization: how pictures of whole grey levels become continuous; none is uniform noise, and nothing for vectors and
    latents, of which latents can take gaussian.
    drop_condition: part of the samples trained without their condition, for guidance. whiten: the ridge of a whitening of
    the pooled text vectors, fitted to the training captions (layers/whitening.py); none leaves them.
    """

    sampling: ClassVar[type] = InverseConfig

    dequantization: Annotated[Any, Choice("dequantization")] | None = None
    drop_condition: float = 0.0
    whiten: float | None = None

    def __post_init__(self) -> None:
        check_hearing(self.drop_condition, self.whiten)

    def build(self, network: nn.Module, text: nn.Module, *, shape: Sequence[int]) -> NormalizingFlow:
        """The flow around a bijection and a text encoder. Raises UserError for a network that is no bijection."""
        if not isinstance(network, Bijection):
            raise UserError(f"flow normalizing: {type(network).__name__} is no bijection; take a model such as glow")
        return NormalizingFlow(self, network, text, shape=shape)


@dataclass(frozen=True)
class InverseSolution(Solution):
    """certificate: max |f(x) - z| over all samples, where the inverse is iterated and not guided."""

    certificate: float | None = None


@api_export("NormalizingFlow")
class NormalizingFlow(ConditionedFlow):
    """A bijection and a standard normal base under the verbs of a flow.

    Pictures live on the grid of their grey levels in [-1, 1]. The density is one of y = x (levels - 1) / levels, the
    middle of each level's cell in [-1, 1), to which dequantisation adds noise within the cell.
    """

    network: Bijection

    def __init__(
        self, config: NormalizingFlowConfig, network: Bijection, text: nn.Module, *, shape: Sequence[int]
    ) -> None:
        super().__init__(network, text, shape=shape, whiten=config.whiten)
        self.config = config
        self._measured: dict[int, list[int | None]] = {}  # a tarflow's windows, by the batch size they were tried with
        asked = config.dequantization
        if len(self.shape) == 1 and asked is not None:
            raise UserError("dequantization is for pictures of grey levels; vectors are continuous: leave it out")
        if isinstance(asked, GaussianDequantization) and any(isinstance(m, Marginals) for m in network.modules()):
            raise UserError(
                "dequantization gaussian needs a density that can be denoised, and that of marginals is in steps; "
                "take marginals: false, or another dequantization"
            )
        self.dequantize: Dequantizer | LatentNoise | None = None
        if len(self.shape) > 1:
            self.dequantize = (asked or UniformDequantization()).build(self.shape)

    def take_latents(self) -> None:
        super().take_latents()
        asked = self.config.dequantization
        if asked is not None and not isinstance(asked, GaussianDequantization):
            name = tag_of(type(asked)).names[0]  # type: ignore[union-attr]
            raise UserError(
                f"dequantization {name} is for pictures of grey levels; latents are continuous: leave it out, or take "
                "gaussian"
            )
        if any(isinstance(m, Marginals) for m in self.network.modules()):
            raise UserError("marginals are counted over grey levels, which latents have not; take marginals: false")
        self.dequantize = None if asked is None else LatentNoise(asked.sigma)

    @property
    def _levels(self) -> int | None:
        """Grey levels of pictures; none of vectors and latents."""
        return None if self.dequantize is None else self.dequantize.levels

    @property
    def unit(self) -> str:
        """Of the loss, and of what evaluation says of its likelihood."""
        if not isinstance(self.dequantize, Dequantizer):
            return "nats"
        return "bits/dim" if self.dequantize.honest else "nats/dim"

    @property
    def dims(self) -> int:
        return math.prod(self.shape)

    @property
    def _cell(self) -> float:
        """y / x: how much room the cells of the outermost levels need."""
        return 1.0 if self._levels is None else (self._levels - 1) / self._levels

    @torch.no_grad()
    def initialise(self, table: Condition, first: Callable[[], Batch]) -> None:
        """Fit the whitening to the captions, and what the bijection takes from data to the first batch."""
        super().initialise(table, first)
        batch = first()
        y, _ = self._continuous(batch.x, Rng(0), batch.position)
        self.network.initialise(y, self._pooled(self.embed(batch.condition)))

    def _pooled(self, embedded: Condition) -> Tensor | None:
        return embedded.pooled.float() if self.network.condition_dim else None

    @property
    def _dtype(self) -> torch.dtype:
        """In which samples go through the network: its own, or float32 where that is wider."""
        return torch.promote_types(dtype_of(self.network), torch.float32)

    def _continuous(self, x: Tensor, rng: Rng, position: Tensor) -> tuple[Tensor, Tensor | float]:
        """y with noise within its cells, and log q of that noise."""
        if self.dequantize is None:
            return x.to(self._dtype), 0.0
        y, log_q = self.dequantize(x.float(), rng, position)
        return y.to(self._dtype), log_q

    def _log_prob(self, y: Tensor, condition: Tensor | None) -> Tensor:
        if self._estimated and current_probing() is None:
            # The counters of y serve all blocks: the rounding of one's output must not choose the noise of the next.
            with probing_again(Probing(Rng(0), fingerprint(y), {}, {})):
                return self._log_prob(y, condition)
        z, ladj = self.network(y, condition)
        return standard_normal(z) + ladj

    @property
    def _estimated(self) -> list[str]:
        """What in the network estimates its volumes."""
        return [type(m).__name__ for m in self.network.modules() if not getattr(m, "exact", True)]

    def loss(self, batch: Batch, rng: Rng) -> LossOutput:
        """-log p in `unit`: bits per dimension of pictures (an upper bound of the true ones), nats of others; and penalties.

        Noise-augmented pictures have nats per dimension, which bound nothing.
        Penalties are those that continuous flows ask for (bijections/continuous.py). Draws by batch.position: stream "drop",
        and those of the text encoder's own drops, of the dequantisation and of estimated volumes.
        """
        condition = self.text.drop(batch.condition, rng, batch.position)
        if self.config.drop_condition:
            keep = rng.uniform("drop", batch.position) >= self.config.drop_condition
            condition = condition.where(sent(keep, batch.x.device), self.text.null().to(batch.x.device))
        with probing(rng, batch.position) as penalties:
            per_sample = self._nll(batch.x, self._pooled(self.embed(condition)), rng, batch.position)
        name = "bits_per_dim" if self.unit == "bits/dim" else "nll"
        parts = {name: per_sample.mean(), **{each: penalty.mean() for each, penalty in penalties.items()}}
        loss = torch.stack(list(parts.values())).sum()
        return LossOutput(loss, {each: part.detach() for each, part in parts.items()}, per_sample.detach())

    def _nll(self, x: Tensor, condition: Tensor | None, rng: Rng, position: Tensor) -> Tensor:
        y, log_q = self._continuous(x, rng, position)
        log_prob = self._log_prob(y, condition) - log_q
        if not isinstance(self.dequantize, Dequantizer):
            return -log_prob
        if not self.dequantize.honest:
            return -log_prob / self.dims
        return bits_per_dim(log_prob, self.dims, self.dequantize.levels)

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """The training loss without dropped conditions, with noise that hangs on batch.position alone."""
        with evaluating(self):
            condition = self._pooled(self.embed(batch.condition))
            return {"validation_loss": self._nll(batch.x, condition, Rng(0), batch.position).mean()}

    def _given(self, x: Tensor) -> Tensor:
        """Samples where the network is, in its dtype or wider than float32. Raises UserError for others."""
        if tuple(x.shape[1:]) != self.shape:
            wanted, got = (" x ".join(map(str, shape)) for shape in (("B", *self.shape), x.shape))
            raise UserError(f"the flow is of samples {wanted}, not {got}")
        if len(self.shape) == 3:
            check_levels(x)
        return x.to(self.device, self._dtype)

    def _honest(self, verb: str) -> None:
        if self.dequantize is not None and not self.dequantize.honest:
            raise UserError(
                f"{verb}: this flow was trained on pictures with added noise, and models those, not pictures"
            )

    def log_prob(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """log p(x), the density of continuous x, nats, B. Pictures: on the scale [-1, 1]; see bits_per_dim for grey levels.

        condition: prepared; none is the empty one. Raises UserError for a flow of noise-augmented pictures.
        """
        self._honest("log_prob")
        x = self._given(x)
        with evaluating(self):
            log_prob = self._log_prob(x * self._cell, self._pooled(self.embed_rows(condition, len(x))))
        return log_prob + self.dims * math.log(self._cell)

    @torch.no_grad()
    def bits_per_dim(
        self, x: Tensor, condition: Condition | None = None, *, k: int = 1, position: Tensor | None = None
    ) -> Tensor:
        """-log2 P(x) per dimension of pictures on their grey levels, B: an upper bound, closer the larger k.

        k: draws of the dequantisation's noise, averaged as importance weights (Burda et al. 2015, arXiv 1509.00519).
        position: B, the counters of that noise (0, 1, ...). Raises UserError for vectors, for pictures that are not on
        their levels, and for a flow of noise-augmented pictures.
        """
        self._honest("bits_per_dim")
        if not isinstance(self.dequantize, Dequantizer):
            raise UserError("bits_per_dim is of pictures of grey levels; vectors have a density: log_prob")
        check_whole(k=k)
        self.dequantize.check(x)
        x = self._given(x)
        position = torch.arange(len(x)) if position is None else position
        with evaluating(self):
            pooled = self._pooled(self.embed_rows(condition, len(x)))
            weights = []
            for draw in range(k):
                y, log_q = self._continuous(x, Rng(0, draw), position)
                weights.append(self._log_prob(y, pooled) - log_q)
        return bits_per_dim(importance_weighted(torch.stack(weights)), self.dims, self.dequantize.levels)

    def likelihood_note(self, k: int, **how: Any) -> str:
        """Dequantisation, K and dtype, without which bits per dimension say little."""
        self._honest("likelihood")
        if how:
            raise UserError(f"{next(iter(how))} is for likelihoods of a velocity; a {type(self).__name__}'s is exact")
        dtype = str(next(self.network.parameters()).dtype).removeprefix("torch.")
        solves = list(dict.fromkeys(str(m.note) for m in self.network.modules() if hasattr(m, "note")))
        kind = ", ".join([f"estimated ({self._estimated[0]})" if self._estimated else "exact", *solves])
        if self._levels is None:
            return f"{kind}, {dtype}"
        name = tag_of(type(self.config.dequantization or UniformDequantization())).names[0]  # type: ignore[union-attr]
        return f"{name} dequantisation, K = {k}, {self._levels} levels, volumes {kind}, {dtype}"

    @torch.no_grad()
    def encode(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """Data to noise. condition: prepared; none is the empty one."""
        x = self._given(x)
        with evaluating(self):
            z, _ = self.network(x * self._cell, self._pooled(self.embed_rows(condition, len(x))))
        return z

    @torch.no_grad()
    def decode(self, z: Tensor, condition: Condition | None = None) -> Tensor:
        """Noise to data, the inverse of encode. The result is not clamped."""
        z = self._given(z)
        with evaluating(self):
            return self.network.decode(z, self._pooled(self.embed_rows(condition, len(z)))) / self._cell

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str] | Condition,
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
        guidance: float = 1.0,
        inverse: str = "auto",
        progress: Progress | None = None,
    ) -> InverseSolution:
        """One sample for each prompt and seed, in one pass; that of a seed does not depend on its batch mates.

        prompts: as many as seeds, or one for all of them; or a prepared condition. temperature: the standard deviation of
        the noise. guidance: away from the empty condition, for models that can be guided; 1 is none. Samples of a
        noise-augmented flow are denoised by Tweedie's formula (TarFlow, arXiv 2412.06329, sec. 2.6). inverse: of a tarflow;
        "sequential", token by token; "jacobi", by sweeps over all tokens; "measured", whichever windows were fastest when
        they were tried, once for a batch size; "auto", sequential on a CPU and jacobi elsewhere. Sweeps are right to the
        blocks' tolerance, within which batch mates matter.

        Returns x, B x *shape float32, pictures in [-1, 1], and nfe: the evaluations of its velocities where there are any,
        else 1. Raises UserError for what cannot be, and for NaN.
        """
        InverseConfig(temperature, guidance, inverse)  # type: ignore[arg-type]
        noise = noise_from_seeds(seeds, self.shape).to(self.device, self._dtype) * temperature
        with evaluating(self):
            embedded = self.embed_prompts(prompts, len(seeds))
            pooled = self._pooled(embedded if len(embedded) == len(seeds) else embedded.expand(len(seeds)))
            certificate = None
            with self._inverting(inverse, noise, pooled):
                y = self._guided(noise, pooled, guidance)
            if isinstance(self.network, TarFlow) and guidance == 1:
                certificate = float((self.network(y, pooled)[0] - noise).abs().max())
            if isinstance(self.config.dequantization, GaussianDequantization):
                y = tweedie(lambda a: self._log_prob(a, pooled), y, self.config.dequantization.sigma)
        if progress is not None:
            progress(1, 1)
        x = y.float() / self._cell
        x = x.clamp(-1, 1) if x.dim() == 4 and self.bounded else x
        nfe = sum(part.nfe for part in self.network.modules() if isinstance(part, CNF))
        solution = InverseSolution(x, max(nfe, 1), certificate=certificate)
        solution.checked()
        return solution

    @contextmanager
    def _inverting(self, inverse: str, z: Tensor, condition: Tensor | None) -> Iterator[None]:
        """Within, the blocks of a tarflow are inverted as asked; after, as before."""
        if not isinstance(self.network, TarFlow):
            if inverse != "auto":
                raise UserError(f"inverse = {inverse!r} is of tarflow; this model has one inverse: leave it out")
            yield
            return
        blocks = list(self.network)
        before = [block.window for block in blocks]
        try:
            if inverse == "measured":
                if len(z) not in self._measured:
                    self._measured[len(z)] = [plan.window for plan in measure_inverse(self.network, z, condition)]
                windows = self._measured[len(z)]
            else:
                windows = [{"auto": None, "sequential": 1, "jacobi": block.tokens}[inverse] for block in blocks]
            for block, window in zip(blocks, windows, strict=True):
                block.window = window
            yield
        finally:
            for block, window in zip(blocks, before, strict=True):
                block.window = window

    def _guided(self, z: Tensor, condition: Tensor | None, guidance: float) -> Tensor:
        if guidance == 1:
            return self.network.decode(z, condition)
        if not getattr(self.network, "guidable", False) or condition is None:
            why = "has no condition" if condition is None else "cannot be guided, as a tarflow can"
            raise UserError(f"guidance = {guidance}: this model {why}; leave it at 1")
        null = self.embed(self.text.null().to(self.device)).pooled.float()
        return self.network.decode(z, condition, null=null, guidance=guidance)  # type: ignore[call-arg]


def standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I), summed over each sample: B."""
    return (-0.5 * (z.square() + math.log(2 * math.pi))).flatten(1).sum(1)
