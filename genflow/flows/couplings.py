"""Couplings: which noise each sample of a training batch is joined with by a path.

A coupling is a permutation of the noise of a micro-batch: every sample and every draw of noise is used once, so that both
marginals stay what they are, and only who goes with whom changes. Those of optimal transport make paths cross less, so that
the learned flow is straighter (Pooladian et al. 2023, arXiv 2304.14772; Tong et al. 2023, arXiv 2302.00482). They see one
micro-batch: with accumulation, or on several ranks, each micro-batch is coupled by itself.

With a condition, the noise may not tell of it: a network that is asked for a cat from noise that training joined with dogs
only has never seen it (Cheng & Schwing 2025, arXiv 2503.10636). So noise is exchanged within equal conditions only, as the
network hears them: those that were dropped are alike. Where almost every caption is different, nothing is left to exchange;
`weight` instead charges an exchange by how far apart the pooled vectors are that the network is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.functional import mix, row_hash, wide
from genflow.registry import coupling_export


class Coupling(Protocol):
    """coupling(x, noise, condition) -> the noise of each sample: x, noise: B x ...; condition: B rows (`heard`), or None.

    independent: whether noise says nothing of the sample it goes with, as stochastic samplers take for granted; without the
    word it is taken not to be.
    """

    independent: ClassVar[bool]

    def __call__(self, x: Tensor, noise: Tensor, condition: Condition | None = None) -> Tensor: ...


@coupling_export("independent")
@dataclass(frozen=True)
class Independent:
    """Noise as it was drawn."""

    independent: ClassVar[bool] = True

    def __call__(self, x: Tensor, noise: Tensor, condition: Condition | None = None) -> Tensor:
        return noise


@coupling_export("paired")
@dataclass(frozen=True)
class Paired:
    """The noise that the data set itself holds for each sample, such as the pairs of a reflow (data: pairs)."""

    independent: ClassVar[bool] = False

    def __call__(self, x: Tensor, noise: Tensor, condition: Condition | None = None) -> Tensor:
        return noise


@coupling_export("optimal_transport")
@dataclass(frozen=True)
class OptimalTransport:
    """The permutation of the least sum of squared distances, exactly: scipy's linear_sum_assignment, on the CPU.

    weight: none exchanges noise within equal conditions only; a number lets it cross, at a cost of that many mean squared
    differences of a coordinate for 1 - cos of the two pooled vectors (0 does not hear conditions). Raises UserError for a
    batch of one.
    """

    weight: float | None = None

    independent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def __call__(self, x: Tensor, noise: Tensor, condition: Condition | None = None) -> Tensor:
        permutation = optimal_assignment(*transport_cost(x, noise, condition, self.weight))
        return noise.index_select(0, permutation.to(noise.device))


@coupling_export("sinkhorn")
@dataclass(frozen=True)
class Sinkhorn:
    """A permutation drawn from the plan of entropic optimal transport (Cuturi 2013, arXiv 1306.0895), all on the device.

    epsilon: the entropy's weight, where 1 is the standard deviation of the cost beyond its row and column means, so that it
    means the same in every dimension: towards 0 optimal transport, in ever more iterations; beyond 10 nearly independent.
    weight: as in optimal_transport. Raises UserError for a batch of one.
    """

    epsilon: float = 0.05
    iterations: int = 100
    weight: float | None = None

    independent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        if not 0 < self.epsilon < math.inf:
            raise UserError(f"epsilon = {self.epsilon} must be positive, such as 0.05")
        if self.iterations < 1:
            raise UserError(f"iterations = {self.iterations} are too few; the least is 1")

    @torch.no_grad()
    def __call__(self, x: Tensor, noise: Tensor, condition: Condition | None = None) -> Tensor:
        cost, group = transport_cost(x, noise, condition, self.weight)
        log_plan = sinkhorn_log_plan(cost, group, self.epsilon, self.iterations)
        return noise[greedy_permutation(log_plan + _gumbel(noise).to(log_plan), group)]


def heard(coupling: Coupling, prepared: Condition, embedded: Condition, *, masked: bool) -> Condition:
    """A batch's condition as a coupling compares it: embedded for one with a weight; else prepared, which is exact.

    masked: whether the mask makes a difference to the network.
    """
    if getattr(coupling, "weight", None) is not None:
        return embedded
    return prepared if masked else replace(prepared, mask=torch.zeros_like(prepared.mask))


def _check_weight(weight: float | None) -> None:
    if weight is not None and not 0 <= weight < math.inf:
        raise UserError(f"weight = {weight} must be 0 or more, and finite, or none")


@torch.no_grad()
def transport_cost(
    x: Tensor, noise: Tensor, condition: Condition | None = None, weight: float | None = None
) -> tuple[Tensor, Tensor]:
    """The cost of joining sample i with noise j, and the group of each, within which noise may be exchanged.

    Returns B x B, ||x_i - noise_j||^2 / D less what hangs on i or on j alone, which changes no assignment, plus
    weight (1 - cos(pooled_i, pooled_j)); and B int64. Raises UserError for a batch of one and for unequal batches.
    """
    if x.shape != noise.shape:
        raise UserError(f"samples of {tuple(x.shape)} and noise of {tuple(noise.shape)} cannot be coupled one to one")
    if len(x) < 2:
        raise UserError(
            "a batch of 1 has no other noise to take: optimal transport needs micro-batches of 2 or more; raise "
            "train.batch_size, or take coupling independent"
        )
    group = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        a, b = (wide(each.flatten(1)) for each in (x, noise))
        cost = (a - a.mean(0)) @ (b - b.mean(0)).T  # far from 0 the products would leave no digits for what counts
        cost *= -2 / a.shape[1]
        if condition is not None and weight:
            pooled = F.normalize(condition.pooled.to(cost), dim=1)
            cost -= weight * (pooled @ pooled.T)
    if condition is not None and weight is None:
        group = equal_rows(condition).to(x.device)
    return cost, group


def equal_rows(condition: Condition) -> Tensor:
    """For each row the number of the first row that is equal to it: B int64. By a hash of 64 bits."""
    parts = [a.flatten(1) for a in (condition.tokens, condition.mask, condition.pooled)]
    hashed = sum(row_hash(part, name) for part, name in zip(parts, ("tokens", "mask", "pooled"), strict=True))
    assert isinstance(hashed, Tensor)
    return (hashed[:, None] == hashed).to(torch.uint8).argmax(1)


def optimal_assignment(cost: Tensor, group: Tensor) -> Tensor:
    """The permutation that minimises the sum of cost[i, permutation[i]] and exchanges within groups only: B, on the CPU.

    Raises UserError for a cost that is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    table, group = cost.cpu(), group.cpu()
    permutation = torch.arange(len(table), device="cpu")
    for first in group.unique():
        members = (group == first).nonzero().squeeze(1)
        block = table[members[:, None], members] if len(members) < len(table) else table
        block = block - block.mean(1, keepdim=True)  # what hangs on a row or a column alone changes no assignment,
        block = block - block.mean(0)  # and the search starts nearer to its end where both have a least cost of 0
        block = block - block.amin(1, keepdim=True)
        block = block - block.amin(0)
        try:
            _, chosen = linear_sum_assignment(block.numpy())
        except ValueError as error:
            raise UserError(f"optimal transport: samples or noise are not finite ({error})") from error
        permutation[members] = members[torch.from_numpy(chosen)]
    return permutation


def sinkhorn_log_plan(cost: Tensor, group: Tensor, epsilon: float, iterations: int) -> Tensor:
    """log P of the entropic plan between equal weights, B x B, -inf across groups: Sinkhorn's iterations on logarithms.

    epsilon: in standard deviations of the cost without its row and column means, over all pairs that may be joined.
    """
    barred = group[:, None] != group
    allowed = (~barred).to(cost.dtype)
    count = allowed.sum(1)
    centred = cost.masked_fill(barred, 0.0)
    centred = centred - (centred.sum(1) / count)[:, None] * allowed
    centred = centred - (centred.sum(0) / count) * allowed
    spread = (centred.square().sum() / allowed.sum()).sqrt().clamp(min=torch.finfo(cost.dtype).tiny)
    log_plan = (-centred / (epsilon * spread)).masked_fill(barred, -math.inf)
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
    return log_plan


def greedy_permutation(score: Tensor, group: Tensor) -> Tensor:
    """The greedy matching by falling score, within groups (score is -inf across them), without waiting for the device.

    Of log P with Gumbel noise it is a permutation drawn from P, cell by cell without replacement. Round after round, pairs
    that are each other's best are joined and leave; what 3 log2 B rounds leave is joined in order. Returns B int64.
    """
    n = len(score)
    rows = torch.arange(n, device=score.device)
    permutation = torch.full_like(rows, -1)
    for _ in range(3 * math.ceil(math.log2(n))):
        best, chosen = score.argmax(1), score.argmax(0)  # of each row, of each column
        mutual = (chosen[best] == rows) & (score.amax(1) > -math.inf)
        permutation = torch.where(mutual, best, permutation)
        taken = mutual[chosen] & (best[chosen] == rows)
        score = score.masked_fill(mutual[:, None] | taken, -math.inf)
    free = permutation < 0
    used = torch.zeros(n + 1, dtype=torch.bool, device=rows.device).scatter(0, permutation.where(~free, n), True)[:n]
    row_order = group.masked_fill(~free, n).argsort(stable=True)
    column_order = group.masked_fill(used, n).argsort(stable=True)
    return permutation.scatter(0, row_order, column_order.where(free[row_order], permutation[row_order]))


def _gumbel(noise: Tensor) -> Tensor:
    """B x B Gumbel numbers, a hash of the noise, which hangs on counters itself: no state, and the same on resuming."""
    rows = row_hash(noise.flatten(1)[:, :16], "gumbel")
    bits = mix(rows[:, None] ^ mix(rows))
    uniform = (((bits >> 41) & 0x7FFFFF).float() + 0.5) * 2.0**-23  # with a bit more some would be 1
    return -(-uniform.log()).log()
