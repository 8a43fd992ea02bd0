"""What nearest neighbours in feature space tell: how good and how varied samples are, and whether they are copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genflow.data.pictures import Picture, caption_grid
from genflow.errors import UserError
from genflow.evaluation.features import as_samples, checked
from genflow.registry import api_export

ROWS = 1024  # of a matrix of distances at a time
SHOWN, NEIGHBOURS = 10, 5  # samples of a picture, and of each
ROUNDING = 1e-12  # of squared distances, to those from the middle


def distances(a: Tensor, b: Tensor) -> Tensor:
    """N x M Euclidean distances in float64, about the middle of b, so that none but the smallest lose digits."""
    middle = _middle(b)
    return torch.cdist(a.double() - middle, b.double() - middle, compute_mode="use_mm_for_euclid_dist")


def _middle(x: Tensor) -> Tensor:
    """The median of about a thousand, which no outlier moves."""
    return x[:: max(len(x) // 1000, 1)].double().median(0).values


@api_export("nearest_neighbours")
def nearest_neighbours(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For each of N x D features the k nearest of M x D others: distances and their numbers, N x k, nearest first.

    Raises UserError for sets that are none, and for a k beyond M.
    """
    checked(a, b)
    if not 1 <= k <= len(b):
        raise UserError(f"k = {k} neighbours out of {len(b)}: take 1 to {len(b)}")
    near = [distances(part, b).topk(k, largest=False) for part in a.split(ROWS)]
    far, which = (torch.cat(each) for each in zip(*near, strict=True))
    return far.where(far.square() > _slack(b)[which], 0.0), which


def _radii(x: Tensor, k: int) -> Tensor:
    """The distance of each sample to the k-th nearest of the others: N. Raises UserError for too few of them."""
    if not 1 <= k < len(x):
        raise UserError(
            f"k = {k} neighbours need more than {k} samples, and there are {len(x)}; take more, or a smaller k"
        )
    return torch.cat([distances(part, x).kthvalue(k + 1).values for part in x.split(ROWS)])  # the nearest is itself


def _within(far: Tensor, radii: Tensor, slack: Tensor) -> Tensor:
    """Whether distances of points to others are no longer than radii, but for rounding. slack: of the others."""
    return far.square() <= radii.square() * (1 + ROUNDING) + slack


def _slack(x: Tensor) -> Tensor:
    """By how much squared distances to each of x, N, may be wrong of what is near it."""
    return ROUNDING * (x.double() - _middle(x)).square().sum(1)


@api_export("PrecisionRecall")
@dataclass(frozen=True)
class PrecisionRecall:
    """precision: part of the samples that lie among the real ones; recall: part of the real ones among the samples."""

    precision: float
    recall: float


@api_export("precision_recall")
@torch.no_grad()
def precision_recall(real: Tensor, samples: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2) of N x D and M x D features.

    A point is among others where it is not farther from one of them than that one's k-th nearest neighbour is. Raises
    UserError for sets that are none, and for too few samples for k.
    """
    checked(real, samples)

    def among(points: Tensor, others: Tensor) -> float:
        radii, slack = _radii(others, k), _slack(others)
        inside = [_within(distances(part, others), radii, slack).any(1) for part in points.split(ROWS)]
        return float(torch.cat(inside).double().mean())

    return PrecisionRecall(among(samples, real), among(real, samples))


@api_export("DensityCoverage")
@dataclass(frozen=True)
class DensityCoverage:
    """density: how many neighbourhoods of real samples hold a sample, over k, 1 on average for real ones; coverage: part of
    the real samples whose neighbourhood holds a sample."""

    density: float
    coverage: float


@api_export("density_coverage")
@torch.no_grad()
def density_coverage(real: Tensor, samples: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797, eq. 7 and 9) of N x D and M x D features.

    Neighbourhoods are of the real samples alone, up to the k-th nearest, so that no outlier of the samples widens them.
    Raises UserError for sets that are none, and for too few real samples for k.
    """
    checked(real, samples)
    radii, slack = _radii(real, k), _slack(real)
    held = [_within(distances(samples, part), radii[i], slack[i]) for i, part in _parts(real)]
    count = torch.stack([each.sum() for each in held]).sum()
    covered = torch.cat([each.any(0) for each in held])
    return DensityCoverage(float(count) / (k * len(samples)), float(covered.double().mean()))


def _parts(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(rows, x[rows]) for rows in torch.arange(len(x)).split(ROWS)]


@api_export("copying")
@torch.no_grad()
def copying(samples: Tensor, held_out: Tensor, known: Tensor) -> float:
    """The probability that a sample lies nearer to a known (training) one than a held-out real one does.

    The Mann-Whitney statistic of the data-copying test (Meehan et al. 2020, arXiv 2004.05675, sec. 3) over all of the
    space: 1/2 for samples as new as held-out ones, 1 for copies, below 1/2 for what is far from all data.
    """
    mine, theirs = (nearest_neighbours(x, known, 1)[0][:, 0] for x in (samples, held_out))
    theirs = theirs.sort().values
    above = len(theirs) - torch.searchsorted(theirs, mine, right=True)
    at_least = len(theirs) - torch.searchsorted(theirs, mine)
    return float((above + at_least).double().mean()) / (2 * len(theirs))


@api_export("own_found")
@torch.no_grad()
def own_found(samples: Tensor, own: Tensor, gallery: int = 256) -> float:
    """Part of N samples whose nearest of `gallery` real ones is their own: that of the same number, N x D both.

    The others are those of the next numbers. Several that are as near share the sample. By chance it is 1 / gallery, or
    1 / N where N is less. Raises UserError for sets that are none, and a gallery of none.
    """
    checked(samples, own)
    if gallery < 1:
        raise UserError(f"a gallery of {gallery} has no place for a sample's own; 256 is usual")
    if len(samples) != len(own):
        raise UserError(f"{len(samples)} samples and {len(own)} real ones: each sample needs its own")
    n, found, slack = len(own), 0.0, _slack(own)
    gallery = min(gallery, n)
    for rows, part in _parts(samples):
        band = (rows[:, None] + torch.arange(gallery)) % n
        near = distances(part, own).gather(1, band)
        nearest = _within(near, near.amin(1, keepdim=True), slack[band])
        found += float((nearest[:, 0] / nearest.sum(1)).sum())
    return found / n


def picture_beside_nearest(x: Tensor, features: Tensor, real: Tensor, known: Tensor, *, pixels: bool) -> Picture:
    """The samples with the nearest real pictures of all, each beside its nearest, by features and by pixels.

    x, real: N and M pictures, uint8, or float32 in [-1, 1]; features, known: of them, N x D and M x D. pixels: whether these
    are the pixels themselves.
    """
    k = min(NEIGHBOURS, len(known))
    shown = nearest_neighbours(features, known, 1)[0][:, 0].argsort(stable=True)[:SHOWN]
    spaces = {"pixels" if pixels else "features": (features[shown], known)}
    if not pixels:
        spaces["pixels"] = (as_samples(x[shown]).flatten(1), as_samples(real).flatten(1))
    columns = [(as_samples(x[shown])[:, None], [[f"sample {int(i)}"] for i in shown])]
    for name, (mine, theirs) in spaces.items():
        far, which = nearest_neighbours(mine, theirs, k)
        columns.append((as_samples(real[which]), [[f"{name} {d:.3g}" for d in row] for row in far.tolist()]))
    images = torch.cat([each for each, _ in columns], 1).flatten(0, 1)
    captions = [text for row in zip(*(texts for _, texts in columns), strict=True) for part in row for text in part]
    return caption_grid(images, captions, columns=1 + k * len(spaces), cell=64)
