"""How probable a model finds held-out data: bits per dimension of pictures, nats of vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genflow.data.loading import Batch, loader
from genflow.data.prepared import PreparedConditions
from genflow.errors import UserError
from genflow.flows.base import Flow
from genflow.registry import api_export


@api_export("HeldOut")
@dataclass(frozen=True)
class HeldOut:
    """A mean over n samples of a split, with its standard error over them, NaN of a single one.

    unit: "bits/dim", a bound that `how` explains; "nats", -log p of vectors as the model sees them, standardised; or
    "nats of tokens", of a picture's.
    """

    mean: float
    error: float
    unit: str
    n: int
    data: str
    split: str
    how: str

    def __str__(self) -> str:
        what = f"{self.data} {self.split}, {self.n} sample{'s' * (self.n > 1)}"
        error = f" +- {self.error:.4f}" if math.isfinite(self.error) else ""
        return f"{self.mean:.4f}{error} {self.unit} ({what}; {self.how})"


@api_export("likelihood")
@torch.no_grad()
def likelihood(
    flow: Flow,
    data: Any,
    *,
    name: str,
    split: str = "test",
    n: int | None = None,
    k: int = 1,
    batch: int = 64,
    progress: Callable[[int], object] | None = None,
    **how: Any,
) -> HeldOut:
    """The mean likelihood of the first n samples of a split (all of it), whose randomness hangs on their place alone.

    data: a data set's config, called `name`; k: draws of the dequantisation for each picture; how: of a velocity's
    likelihood, divergence, draws, rtol and atol (flows/velocity_likelihood.py), whose noise is part of the error. Raises
    UserError for flows that have none, for numbers that cannot be, for a picture that cannot be read, and for a likelihood
    that is not finite.
    """
    for what, value in (("n", n), ("k", k), ("batch", batch)):
        if value is not None and value < 1:
            raise UserError(f"{what} = {value} is too few; the least is 1")
    note = flow.likelihood_note(k, **how)
    if k > 1 and flow.unit != "bits/dim":
        why = "vectors are continuous" if len(flow.shape) == 1 else "tokens are counted"
        raise UserError(f"k = {k}: {why}, and there is no dequantisation to draw; leave it at 1")
    dataset = data.build(split)
    count = len(dataset) if n is None else min(n, len(dataset))
    conditions = PreparedConditions.prepare(dataset, flow.text)  # type: ignore[arg-type]
    if conditions.table.mask.shape[1]:
        note = f"given the captions, {note}"
    values = []
    for part in _batches(flow, dataset, conditions, count, batch):
        values.append(_nll(flow, part, k, how).cpu().double())
        if progress is not None:
            progress(len(part.ids))
    each = torch.cat(values)
    if not each.isfinite().all():
        row = int((~each.isfinite()).nonzero()[0])
        raise UserError(f"the likelihood of {dataset.identifiers[row]} is {float(each[row])}; is the model trained?")
    error = float(each.std()) / math.sqrt(count) if count > 1 else math.nan
    return HeldOut(float(each.mean()), error, flow.unit, count, name, split, note)


@torch.no_grad()
def held_out_loss(
    flow: Any, dataset: Any, n: int, *, batch: int = 64, progress: Callable[[int], object] = lambda done: None
) -> dict[str, float]:
    """What `flow.validate` tells of the first n samples of a data set, by name.

    Weighted by the batches' sizes, as in training (SD3, sec. 5.3). Raises UserError for a picture that cannot be read, and
    for a loss that is not finite.
    """
    conditions = PreparedConditions.prepare(dataset, flow.text)
    sums: dict[str, float] = {}
    for part in _batches(flow, dataset, conditions, n, batch):
        for key, value in flow.validate(part).items():
            sums[key] = sums.get(key, 0.0) + float(value) * len(part.ids)
        progress(len(part.ids))
    if not math.isfinite(loss := sums["validation_loss"] / n):
        raise UserError(f"the loss of {n} held-out samples is {loss}; is the model trained?")
    return {key: total / n for key, total in sums.items()}


def _batches(flow: Any, dataset: Any, conditions: PreparedConditions, count: int, batch: int) -> Iterator[Batch]:
    """The first `count` samples, on the flow's device. Raises UserError for a picture that cannot be read."""
    places = [[(i, i) for i in range(j, min(j + batch, count))] for j in range(0, count, batch)]
    for part in loader(dataset, conditions, places, shape=flow.shape):
        if part.bad:  # the loader has put another in its place
            raise UserError(f"{part.bad[0][0]} cannot be read ({part.bad[0][1]}); mend it, or take it out of the split")
        yield part.to(flow.device)


def _nll(flow: Flow, batch: Batch, k: int, how: dict[str, Any]) -> Tensor:
    if flow.unit != "bits/dim":
        return -flow.log_prob(batch.x, batch.condition, **how).detach()
    return flow.bits_per_dim(batch.x, batch.condition, k=k, position=batch.position, **how)
