"""Whether pictures show what their captions say: a linear probe from features to caption vectors, and its retrieval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from genflow.errors import UserError
from genflow.registry import api_export

PENALTIES = tuple(10.0**k for k in range(6))
LEVEL = 1e-12  # cosines no farther apart are one, but for rounding


@api_export("CaptionProbe")
@dataclass(frozen=True)
class CaptionProbe:
    """Ridge regression from features to caption vectors less their mean. penalty: found by leaving one out.

    mean, scale: D, of the features; weight: D x E; centre: E, the mean caption vector; all float64.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    centre: Tensor
    penalty: float

    def __call__(self, features: Tensor) -> Tensor:
        """B x D features -> B x E: what their captions' vectors should be, less the mean one."""
        return (features.double() - self.mean) / self.scale @ self.weight


@api_export("fit_caption_probe")
@torch.no_grad()
def fit_caption_probe(features: Tensor, vectors: Tensor, penalties: Sequence[float] = PENALTIES) -> CaptionProbe:
    """The probe of N x D features of real pictures and the N x E vectors of their captions, in float64.

    The penalty is the one with the least square error on each picture left out in turn, which ridge regression has in
    closed form: the residual over 1 - h, h the picture's leverage (Allen 1974). Raises UserError for fewer than three, and
    for what is not finite.
    """
    if len(features) != len(vectors) or len(features) < 3:
        what = f"{len(features)} pictures with {len(vectors)} captions"
        raise UserError(f"{what} are no set to fit a probe on; as many captions as pictures, and 3 at least")
    x, y = features.double(), vectors.double()
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise UserError("a probe is fitted to finite numbers, but the features or the vectors hold NaN or inf")
    mean, scale, centre = x.mean(0), x.std(0).clamp(min=1e-6), y.mean(0)
    x, y = (x - mean) / scale, y - centre
    values, basis = torch.linalg.eigh(x.T @ x)
    turned, cross = x @ basis, basis.T @ (x.T @ y)
    best, least = penalties[0], math.inf
    for penalty in penalties:
        shrunk = values.clamp(min=0) + penalty
        leverage = (turned.square() / shrunk).sum(1) + 1 / len(x)
        left_out = (y - turned @ (cross / shrunk[:, None])) / (1 - leverage).clamp(min=1e-9)[:, None]
        if (error := float(left_out.square().mean())) < least:
            best, least = penalty, error
    return CaptionProbe(mean, scale, basis @ (cross / (values.clamp(min=0) + best)[:, None]), centre, best)


@api_export("caption_ranks")
@torch.no_grad()
def caption_ranks(predicted: Tensor, vectors: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """How many captions are nearer than each picture's own by cosine, and how many of the others are level with it: B each.

    predicted: B x E, of the pictures; vectors: G x E, of distinct captions, with the same origin (less the probe's centre);
    own: B, the number of each picture's.
    """
    similarity = normalize(predicted.double(), dim=1) @ normalize(vectors.double(), dim=1).T
    mine = similarity.gather(1, own[:, None])
    return (similarity > mine + LEVEL).sum(1), ((similarity - mine).abs() <= LEVEL).sum(1) - 1


def recall_at(nearer: Tensor, level: Tensor, k: int) -> float:
    """R@k: part of the pictures whose own caption is among the k nearest, in expectation over the order of level ones."""
    return float(((k - nearer) / (level + 1.0)).clamp(0, 1).mean())
