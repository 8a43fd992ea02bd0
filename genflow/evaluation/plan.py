"""What an evaluation is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from genflow.errors import UserError, check_least, nearest
from genflow.registry import api_export

if TYPE_CHECKING:
    from genflow.data.pictures import Picture

METRICS = {
    "likelihood": "bits/dim of held-out pictures, or nats of vectors",
    "loss": "the loss of held-out samples, a velocity's also by time",
    "reconstruction": "PSNR, SSIM and Frechet distance of held-out pictures through an autoencoder and back",
    "fd": "Frechet distance of features",
    "kid": "kernel distance (MMD) of features, unbiased",
    "precision-recall": "how good and how varied, by nearest neighbours",
    "density-coverage": "the same, less swayed by outliers",
    "alignment": "R@1 and R@10: whether pictures find the captions that they were drawn from",
    "nearest": "whether samples are copies of training samples",
}
UNDRAWN = {"likelihood", "loss", "reconstruction"}  # metrics for which the model draws no samples
DISTANCES = {"fd": 2, "kid": 2, "precision-recall": 4, "density-coverage": 6}  # and the fewest samples of each
SAMPLES = 2000

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""A progress bar by its description and total: gives what is to be told how many are done since."""


@contextmanager
def no_bar(_what: str, _total: int) -> Iterator[Callable[[int], object]]:
    yield lambda done: None


@api_export("Plan")
@dataclass(frozen=True)
class Plan:
    """What to measure, and how.

    metrics: of METRICS, none for those that the model can honestly have. split: of the data, by default `held_out` for what
    is asked of held-out samples and "train" for distances, as is the custom. n: samples, by default 2000, but half of the
    split at most, so that the other half shows how far real ones are from real ones; of likelihoods, the whole split.
    k: draws of the dequantisation. seed: of the first sample. batch: samples at once. dtype: fp32 or bf16, of the
    network while it draws samples. sampling: of `flow.sample`; likelihood: of a velocity's.
    """

    metrics: tuple[str, ...] = ()
    split: str | None = None
    n: int | None = None
    k: int = 1
    seed: int = 0
    batch: int = 64
    dtype: str = "fp32"
    sampling: dict[str, Any] = field(default_factory=dict)
    likelihood: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_least(self, n=1, k=1, batch=1, seed=0)
        if self.dtype not in ("fp32", "bf16"):
            raise UserError(f"no dtype {self.dtype!r} to sample in; choose fp32 or bf16")
        if wrong := [name for name in self.metrics if name not in METRICS]:
            raise UserError(f"no metric {wrong[0]!r}.{nearest(wrong[0], METRICS)}")

    def held_out(self, flow: Any) -> str:
        """The split whose samples a flow has not seen: as asked, else the one that its run was validated on, else "test"."""
        return self.split or ((flow.recipe or {}).get("train") or {}).get("validation_split", "test")


@api_export("Figure")
@dataclass(frozen=True)
class Figure:
    """value, with error (its standard error, or the spread of its subsets) where it has one, and what it hangs on.

    real: what real samples have in place of the model's, at the count that `on` names.
    """

    name: str
    value: float
    on: str
    error: float | None = None
    real: float | None = None


@api_export("Evaluation")
@dataclass(frozen=True)
class Evaluation:
    """figures; remarks: what was left out, and what to be careful with; left_out: the reasons by metric; picture: samples
    and their nearest training pictures; counts, nfe, seconds: of what was drawn."""

    figures: list[Figure]
    remarks: list[str]
    left_out: dict[str, str]
    picture: Picture | None
    metrics: list[str]
    counts: dict[str, int]
    nfe: int
    seconds: dict[str, float]


def number(value: float) -> str:
    """A figure as a person reads it."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1000 or value == 0 else f"{value:.4g}"
