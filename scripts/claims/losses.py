"""A perceptual distance and a discriminator beside the absolute error make an autoencoder's pictures sharper and nearer to
real ones, and cost it PSNR (VQGAN, Esser et al. 2021, arXiv 2012.09841).

Varies the losses of a small KL autoencoder of factor 8 and 16 channels, on the embedded emoji and on CIFAR-10, at 32 px:
the absolute error alone, with each of the two, with both; the decoder heeds the discriminator from 40 % of the steps on.
Measures PSNR, SSIM and distances of held-out pictures there and back, and their detail: the mean absolute difference of
neighbouring pixels, in parts of the originals'. Shown where the Frechet distance is lower and the detail higher than with
the absolute error alone, and PSNR lower. Where the perceptual distance is of the very features that measure, a lower
distance by them is no evidence of its own; the detail is. Also writes losses-pictures.png, emoji above what each makes of
them. Where CIFAR-10 cannot be downloaded, CIFAR10_PARQUET names a table of it with columns image, caption and split.
"""

from pathlib import Path
from typing import Any

from autoencoders import TINY, fidelity, held_out, pictures, there
from common import gains, merged, study, told, verdict
from torch import Tensor

from genflow.evaluation.features import GraphFeatures
from genflow.flows.store import load

START = 0.4  # of the steps, at which the decoder heeds the discriminator
DETAIL = "detail"


def detail(x: Tensor) -> float:
    """The mean absolute difference of neighbouring pixels, across and down."""
    return float(x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()) / 2


def main() -> None:
    claim = study(__file__, __doc__, steps=1000)
    game = {"discriminator": {"start": round(START * claim.steps)}}
    ways: dict[str, dict[str, Any]] = {"absolute error": {}, "+ discriminator": game}
    note = "Without a graph of features there is no perceptual distance."
    if isinstance(claim.features, GraphFeatures):
        perceptual = {"perceptual": {"features": str(claim.features.path)}}
        ways |= {"+ perceptual": perceptual, "+ both": perceptual | game}
        note = ""
    sets = there()
    sides = {
        f"{name}: {way}": merged({**TINY, "data": data}, {"flow": {"bottleneck": {"channels": 16}, **losses}})
        for name, data in sets.items()
        for way, losses in ways.items()
    }
    others = fidelity(claim)

    def measure(run: Path) -> dict[str, float]:
        flow: Any = load(run)
        held = held_out(run, claim.n)
        return {**others(run), DETAIL: detail(flow.reconstruct(held)) / detail(held)}

    results = claim.sweep(sides, measure)
    said = {}
    for name in sets:
        plain, *more = (side for side in sides if side.startswith(f"{name}: "))
        for side in more:
            said[f"{side}: a lower FD"] = verdict(gains(results, side, plain, ["FD to reconstructions"]))
            said[f"{side}: more detail"] = verdict(gains(results, plain, side, [DETAIL]))
            said[f"{side}: a lower PSNR"] = verdict(gains(results, side, plain, ["PSNR, dB"]))
    claim.report(results, said, note=f"Data: {', '.join(sets)}. {note}".rstrip(), curves=False)
    emoji = {side: claim.train(side, claim.seeds[0], sides[side]) for side in sides if side.startswith("emoji")}
    pictures(claim, {side.split(": ")[1]: run for side, run in emoji.items()})


if __name__ == "__main__":
    told(main)
