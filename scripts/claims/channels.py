"""An autoencoder of more latent channels, 4 to 8 to 16, gives pictures back better at equal size and budget (SD3, arXiv
2403.03206, table 3).

Varies the channels of a small KL autoencoder of factor 8, on the embedded emoji and on CIFAR-10, at 32 px. Measures PSNR,
SSIM and distances of held-out pictures there and back. Shown where PSNR and SSIM grow seed by seed. Also writes
channels-pictures.png, emoji above what each makes of them. Where CIFAR-10 cannot be downloaded, CIFAR10_PARQUET names a
table of it with columns image, caption and split.
"""

from itertools import pairwise

from autoencoders import TINY, fidelity, pictures, there
from common import gains, merged, study, told, verdict

CHANNELS = (4, 8, 16)


def of(name: str, channels: int) -> str:
    return f"{name}, {channels} channels"


def main() -> None:
    claim = study(__file__, __doc__, steps=500)
    sets = there()
    sides = {
        of(name, channels): merged(
            {**TINY, "data": data}, {"flow": {"bottleneck": {"name": "gaussian", "channels": channels}}}
        )
        for name, data in sets.items()
        for channels in CHANNELS
    }
    results = claim.sweep(sides, fidelity(claim))
    said = {}
    for name in sets:
        for few, many in pairwise(CHANNELS):
            more, less = of(name, many), of(name, few)
            for figure in ("PSNR, dB", "SSIM"):  # the higher the better: the lesser side is to be below
                said[f"{name}: {many} channels are ahead of {few} in {figure.split(',')[0]}"] = verdict(
                    gains(results, less, more, [figure])
                )
    claim.report(results, said, note=f"Data: {', '.join(sets)}.", curves=False)
    emoji = {side: claim.train(side, claim.seeds[0], sides[side]) for side in sides if side.startswith("emoji")}
    pictures(claim, {side.split(", ")[1]: run for side, run in emoji.items()})


if __name__ == "__main__":
    told(main)
