"""The velocity of a rectified flow along one solve: what every step would compute alike is computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.functional import sent
from genflow.networks.caching import FirstBlockCache
from genflow.registry import resolve, tag_of
from genflow.samplers import Solution

if TYPE_CHECKING:
    from genflow.flows.rectified import RectifiedFlow


class PreparedVelocity:
    """velocity(z, t, *cond) and at(z, time, *cond), as `cfg` and `Conditioned` take it. cond: of what `prepare` gives.

    A network that has prepare and denoise, as MMDiT, embeds its text once, and makes the modulation of all its blocks for
    several of the times to come in one product each: as many as fill an eighth of the weights that it saves reading.
    times: those; they are not looked at where blocks are shared out among processes, and on paths other than the straight
    one, whose times are not ours. cache: first-block caching, LOSSY.
    """

    def __init__(self, flow: RectifiedFlow, times: Sequence[float] = (), cache: FirstBlockCache | None = None) -> None:
        self.flow, self.cache = flow, cache
        self.network: Any = flow.network
        self.times = list(times) if flow.straight and not shared_out(self.network) else []
        self._step = {time: i for i, time in enumerate(self.times)}
        self._first, self._table = 0, torch.empty(0, 0)  # modulation by row and step, from the first step on

    def prepare(self, *conditions: Condition) -> list[tuple[Tensor, ...]]:
        """For each embedded condition tensors of as many rows, all of them prepared together. To be called once."""
        rows, dtype = Condition.cat(conditions), self.flow.dtype
        prepared: tuple[Tensor, ...] = rows.tokens.to(dtype), rows.mask, rows.pooled.to(dtype)
        # A gradient would run through what is prepared at every step, and is free to be asked for at each.
        if not torch.is_grad_enabled() and hasattr(self.network, "prepare"):
            context, self._pooled = self.network.prepare(prepared[0], prepared[2])
            # Rows of the table, not the table, are what guidance repeats and puts side by side.
            prepared = context, rows.mask, self._pooled, torch.arange(len(rows), device=context.device)
            self._times = sent(torch.tensor(self.times, dtype=torch.float32, device="cpu"), context.device)
        return list(zip(*(a.split([len(c) for c in conditions]) for a in prepared), strict=True))

    def __call__(self, z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        return self.flow.velocity_of(lambda x, s: self._predict(x, s, cond, None), z, t)

    def at(self, z: Tensor, time: float, *cond: Tensor) -> Tensor:
        step, t = self._step.get(time), z.new_full((len(z),), time)
        return self.flow.velocity_of(lambda x, s: self._predict(x, s, cond, step), z, t)

    def _predict(self, x: Tensor, s: Tensor, cond: tuple[Tensor, ...], step: int | None) -> Tensor:
        flow = self.flow
        if len(cond) == 3:
            return flow.predict(x, s, Condition(*cond))
        context, mask, pooled, rows = cond
        output = self.network.denoise(
            x.to(context.dtype),
            s,
            context,
            pooled,
            context_mask=mask if flow.config.text_mask else None,
            modulation=None if step is None else self._modulations(step)[rows],
            cache=self.cache,
        )
        return output.to(x.dtype)

    def _modulations(self, step: int) -> Tensor:
        """Those of one step, by row."""
        if not 0 <= step - self._first < self._table.shape[1]:
            size = max(self.network.hidden // (8 * len(self._pooled)), 1)
            self._first = max(min(step, len(self.times) - size), 0)  # slabs of one size, also at the end
            self._table = torch.empty(0, 0)  # given back before the next one is made
            self._table = self.network.modulations(self._pooled, self._times[self._first : self._first + size])
        return self._table[:, step - self._first]


def shared_out(network: nn.Module) -> bool:
    """Whether blocks are shared out among processes, which are whole only while they run."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # which imports the compiler: a second at every start

    return any(isinstance(p, DTensor) for p in network.parameters())


@dataclass(frozen=True)
class CachedSolution(Solution):
    """skipped: the part of all blocks that first-block caching left out, 0 to 1. nfe counts as if it had not."""

    skipped: float = 0.0

    @classmethod
    def of(cls, solution: Solution, caches: Sequence[FirstBlockCache]) -> CachedSolution:
        own = {field.name: getattr(solution, field.name) for field in fields(Solution)}
        return cls(**own, skipped=sum(c.skipped for c in caches) / max(sum(c.blocks for c in caches), 1))


def family(sampler: str) -> Any:
    """Of the sampler of that name: "ode", "sde", "adaptive" or "parallel"."""
    tag = tag_of(resolve("sampler", sampler))
    return tag and tag.metadata.get("family")


def draws_noise(sampler: str) -> bool:
    """Whether the sampler of that name draws noise on the way."""
    return family(sampler) == "sde"


def check_noise(sampler: str, coupling: Any) -> None:
    """Raises UserError for a sampler that draws noise, where data and noise were not coupled independently."""
    if draws_noise(sampler) and not getattr(coupling, "independent", False):
        raise UserError(
            f"sampler {sampler!r} draws noise, which is right for coupling independent alone; choose one such as 'heun'"
        )


def check_cache(cache: float, network: nn.Module, sampler: str) -> None:
    """Raises UserError for a threshold that is none, and for networks and samplers that first-block caching is not for."""
    check_cached_sampler(cache, sampler)
    if cache and not hasattr(network, "denoise"):
        raise UserError(f"cache = {cache} skips blocks of an MMDiT; this network is a {type(network).__name__}")


def check_cached_sampler(cache: float, sampler: str) -> None:
    """Raises UserError for a threshold that is none, and for samplers that first-block caching is not for."""
    if not 0 <= cache < math.inf:
        raise UserError(f"cache = {cache} is not a threshold; 0 is no caching, 0.05 a mild one")
    if cache and (family(sampler) in ("adaptive", "parallel") or sampler == "speculative"):
        why = "takes steps by what the network says"
        raise UserError(f"cache = {cache}: sampler {sampler!r} {why}; choose one such as 'euler'")
