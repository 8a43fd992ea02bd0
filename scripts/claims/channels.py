"""An autoencoder of more latent channels, 4 to 8 to 16, gives pictures back better at equal size and budget (SD3, arXiv
2403.03206, table 3).

Varies the channels of a small KL autoencoder of factor 8, on the embedded emoji and on CIFAR-10, at 32 px. Measures PSNR,
SSIM and the Frechet distance of held-out pictures there and back. Shown where PSNR and SSIM grow seed by seed. Also writes
channels-pictures.png, emoji above what each makes of them. Where CIFAR-10 cannot be downloaded, CIFAR10_PARQUET names a
table of it with columns image, caption and split.
"""

import os
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Any

import torch
from common import Study, gains, merged, study, told, verdict

from genflow.cli.eval import data_of
from genflow.config import Choice, from_dict
from genflow.data.pictures import caption_grid
from genflow.errors import UserError
from genflow.evaluation.features import as_samples
from genflow.evaluation.plan import Plan
from genflow.evaluation.reals import read_real
from genflow.evaluation.report import Reals, evaluate
from genflow.flows.store import load

CHANNELS = (4, 8, 16)
SHOWN = 8
TINY: dict[str, Any] = {
    "model": {"name": "tiny_autoencoder", "width": 32, "blocks": 1, "factor": 8},
    "flow": {"name": "autoencoder", "bottleneck": {"name": "gaussian"}},
    "train": {
        "batch_size": 32,
        "optimizer": {"name": "adamw", "lr": 2e-3},
        "decay": 0.5,
        "log_every": 50,
        "save_every": 100_000,
        "preview_every": 0,
        "trackers": [],
    },
}
TABLE = os.environ.get("CIFAR10_PARQUET")
CIFAR10 = {"name": "parquet", "path": TABLE, "size": 32} if TABLE else {"name": "cifar10"}
DATA = {"emoji": {"name": "emoji"}, "CIFAR-10": CIFAR10}


def there() -> dict[str, dict[str, Any]]:
    """The data sets that can be had; of another one it is said why not."""
    found = {}
    for name, data in DATA.items():
        try:
            from_dict(Annotated[Any, Choice("dataset")], data).build("test")
            found[name] = data
        except UserError as error:
            print(f"{name} is left out: {error}")
    return found


def of(name: str, channels: int) -> str:
    return f"{name}, {channels} channels"


def pictures(claim: Study, names: Iterable[str], sides: dict[str, dict[str, Any]]) -> None:
    """Held-out pictures of each data set, and what the first seed's autoencoders make of them."""
    rows, captions = [], []
    for name in names:
        runs = {c: claim.train(of(name, c), claim.seeds[0], sides[of(name, c)]) for c in CHANNELS}
        flows: dict[int, Any] = {channels: load(run) for channels, run in runs.items()}
        _, data = data_of(flows[CHANNELS[0]], str(runs[CHANNELS[0]]))
        held = as_samples(read_real(data.build("test"), (3, 32, 32), most=SHOWN, hashed=0).x[:SHOWN])
        rows += [held, *(flow.reconstruct(held) for flow in flows.values())]
        for label in (f"{name}, original", *(f"{channels} channels" for channels in CHANNELS)):
            captions += [label, *[""] * (SHOWN - 1)]
    caption_grid(torch.cat(rows), captions, columns=SHOWN).save_atomic(claim.out / f"{claim.name}-pictures.png")


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

    shared = {name: Reals() for name in sets}  # what is read of each data set

    def measure(run):
        flow = load(run)
        section, data = data_of(flow, str(run))
        network, plan = claim.features, Plan(("reconstruction",), n=claim.n)
        reals = shared["emoji" if section["name"] == "emoji" else "CIFAR-10"]
        found = evaluate(flow, data, plan, name=section["name"], features=network, reals=reals)
        return {each.name: each.value for each in found.figures}

    results = claim.sweep(sides, measure)
    said = {}
    for name in sets:
        for few, many in pairwise(CHANNELS):
            more, less = of(name, many), of(name, few)
            for figure in ("PSNR, dB", "SSIM"):  # the higher the better: the lesser side is to be below
                said[f"{name}: {many} channels are ahead of {few} in {figure.split(',')[0]}"] = verdict(
                    gains(results, less, more, [figure])
                )
    claim.report(results, said, note=f"Data: {', '.join(sets)}.", curves=False)
    pictures(claim, sets.keys() & {"emoji"}, sides)  # CIFAR-10's pictures have no licence that would let them be shown


if __name__ == "__main__":
    told(main)
