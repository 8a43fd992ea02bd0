"""The Frechet distance of two sets of features: how far apart the Gaussians are that have their means and covariances.

d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) (Dowson & Landau 1982; Heusel et al. 2017, arXiv 1706.08500, with
the features of an Inception network). It is biased upwards, the more the fewer the samples: compare equal numbers only, and
beside the distance of real samples to other real ones. With fewer samples than features the covariances are singular, and
the bias is large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genflow.evaluation.features import checked
from genflow.registry import api_export


@api_export("frechet_distance")
@torch.no_grad()
def frechet_distance(a: Tensor, b: Tensor) -> float:
    """d^2 between two sets of features, N x D and M x D, in float64.

    The last trace is the sum of singular values of C1^1/2 C2^1/2, taken from the centred features themselves: no root of a
    matrix is formed, so that nothing is lost where there are fewer samples than features. Raises UserError for fewer than
    two samples, different widths, and features that are not finite.
    """
    checked(a, b)
    a, b = a.cpu().double(), b.cpu().double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    root_a, root_b = _root(a), _root(b)
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(float(mean + root_a.square().sum() + root_b.square().sum() - 2 * overlap), 0.0)


def _root(features: Tensor) -> Tensor:
    """R with R^T R the covariance: min(N, D) x D."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred
