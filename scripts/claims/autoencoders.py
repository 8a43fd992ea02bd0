"""What the claims of autoencoders share: the data sets that can be had, a small network, figures of held-out pictures.

Where CIFAR-10 cannot be downloaded, CIFAR10_PARQUET names a table of it with columns image, caption and split.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from common import Study
from torch import Tensor

from genflow.cli.eval import data_of
from genflow.config import Choice, from_dict
from genflow.data.pictures import caption_grid
from genflow.errors import UserError
from genflow.evaluation.features import as_samples
from genflow.evaluation.plan import Plan
from genflow.evaluation.reals import read_real
from genflow.evaluation.report import Reals, evaluate
from genflow.flows.store import load

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


def fidelity(claim: Study) -> Callable[[Path], dict[str, float]]:
    """What `Study.sweep` measures of a run: PSNR, SSIM and distances of held-out pictures there and back."""
    shared: dict[str, Reals] = {}  # what is read of each data set

    def measure(run: Path) -> dict[str, float]:
        flow = load(run)
        section, data = data_of(flow, str(run))
        plan, reals = Plan(("reconstruction",), n=claim.n), shared.setdefault(section["name"], Reals())
        found = evaluate(flow, data, plan, name=section["name"], features=claim.features, reals=reals)
        return {each.name: each.value for each in found.figures}

    return measure


def held_out(run: Path, n: int) -> Tensor:
    """The first pictures of a run's held-out ones, n x 3 x 32 x 32 in [-1, 1]."""
    _, data = data_of(load(run), str(run))
    return as_samples(read_real(data.build("test"), (3, 32, 32), most=n, hashed=0).x[:n])


def pictures(claim: Study, runs: Mapping[str, Path]) -> None:
    """Writes NAME-pictures.png: held-out pictures above what each run makes of them. CIFAR-10's have no licence for that."""
    held = held_out(next(iter(runs.values())), SHOWN)
    flows: list[Any] = [load(run) for run in runs.values()]
    rows = [held, *(flow.reconstruct(held) for flow in flows)]
    captions = [word for label in ("original", *runs) for word in (label, *[""] * (SHOWN - 1))]
    caption_grid(torch.cat(rows), captions, columns=SHOWN).save_atomic(claim.out / f"{claim.name}-pictures.png")
