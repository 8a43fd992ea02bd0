"""What pictures lose on their way through an autoencoder and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genflow.evaluation.features import FeatureNetwork, GraphFeatures, as_bytes, as_samples, features_of
from genflow.evaluation.frechet import frechet_distance
from genflow.evaluation.plan import Figure
from genflow.flows.fidelity import SIDE, ssim
from genflow.networks.feature_graph import SEEN, PerceptualDistance
from genflow.networks.quantizers import perplexity
from genflow.registry import api_export
from genflow.samplers import psnr


@api_export("Reconstruction")
@dataclass(frozen=True)
class Reconstruction:
    """psnr (dB), ssim, perceptual (`PerceptualDistance`): of each picture, N; no ssim of those below 11 pixels, and no
    perceptual distance by features without stages. distance: Frechet, of originals and reconstructions. vocabulary, used,
    perplexity: of the codes of all pictures, where there are codes."""

    psnr: Tensor
    ssim: Tensor | None
    perceptual: Tensor | None
    distance: float
    vocabulary: int = 0
    used: int = 0
    perplexity: float = 0.0

    def figures(self, on: str) -> list[Figure]:
        """For a report; on: which pictures they were."""
        each = {"PSNR, dB": self.psnr, "SSIM": self.ssim, "perceptual distance": self.perceptual}
        there = {key: v for key, v in each.items() if v is not None}
        found = [Figure(key, float(v.mean()), on, float(v.std() / len(v) ** 0.5)) for key, v in there.items()]
        found.append(Figure("FD to reconstructions", self.distance, on))
        if self.vocabulary:
            used = f"{self.used} of {self.vocabulary} codes are in use"
            found.append(Figure("perplexity of codes", self.perplexity, f"{used}, {on}"))
        return found


@api_export("reconstruction")
@torch.no_grad()
def reconstruction(
    flow: Any,
    pictures: Tensor,
    network: FeatureNetwork,
    *,
    batch: int = 64,
    progress: Callable[[int], object] = lambda done: None,
) -> Reconstruction:
    """Of pictures there and back, each as the 8-bit picture that a file would hold.

    flow: with `reconstruct`; pictures: N x C x H x W, uint8, or float32 in [-1, 1]; network: features of the distance.
    progress: told how many are done since. Raises UserError for features that are not of such pictures, too few pictures,
    and reconstructions that are not finite.
    """
    real = features_of(network, pictures, device=flow.device)
    made, noise, likeness, apart = [], [], [], []
    perceptual = PerceptualDistance(network.graph, SEEN).to(flow.device) if isinstance(network, GraphFeatures) else None
    counts = torch.zeros(getattr(flow, "vocabulary", None) or 0, dtype=torch.int64)
    for part in pictures.split(batch):
        x = as_samples(part).to(flow.device)
        made.append(as_bytes(flow.reconstruct(x)).cpu())
        y = as_samples(made[-1]).to(x.device)
        noise.append(psnr(y, x).cpu())
        if min(x.shape[-2:]) >= SIDE:
            likeness.append(ssim(y, x).cpu())
        if perceptual is not None:
            apart.append(perceptual(y, x).cpu())
        if len(counts):
            counts += torch.bincount(flow.codes(x).flatten().cpu(), minlength=len(counts))
        progress(len(part))
    fake = features_of(network, torch.cat(made), device=flow.device)
    return Reconstruction(
        torch.cat(noise),
        torch.cat(likeness) if likeness else None,
        torch.cat(apart) if apart else None,
        frechet_distance(real, fake),
        vocabulary=len(counts),
        used=int((counts > 0).sum()),
        perplexity=float(perplexity(counts)) if len(counts) else 0.0,
    )
