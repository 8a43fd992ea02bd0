"""Other people's models as velocities, and velocities as their models: the exact change of path.

On an affine path x_s = alpha(s) x + sigma(s) eps, noise and signal stand somewhere in the same ratio as on ours,
z_t = (1 - t) x + t eps; there the two are one point on two scales (Lipman et al. 2024, arXiv 2412.06264):

    t = sigma / (alpha + sigma),    x_s = (alpha + sigma) z_t

What a model predicts there is p x + q eps for known p and q. With the point itself these are two equations for x and
eps, and so

    v = eps - x = (alpha + sigma) (prediction - (p + q) z_t) / (alpha q - sigma p)

    prediction    p, q               for instance
    "eps"         0, 1               DDPM, Stable Diffusion 1 and XL
    "x"           1, 0               a denoiser D(x, sigma) of EDM and k-diffusion
    "v"           -sigma, alpha      Salimans & Ho 2022, arXiv 2202.00512
    "velocity"    alpha', sigma'     dx_s/ds: a flow-matching model of another path

A Stable Diffusion network, for instance, under any sampler:

    path = Path.discrete(alphas_cumprod)
    velocity = velocity_from(lambda x, s: unet(x, s, text).sample, path, "eps")
    x = heun(velocity, path.t_max * noise, [path.t_max * t for t in uniform(20)]).x
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal, ParamSpec

import torch
from torch import Tensor

from genflow.errors import UserError, nearest
from genflow.functional import Time, double
from genflow.registry import api_export
from genflow.samplers.solution import Velocity, as_state, state

P = ParamSpec("P")
Model = Callable[[Tensor, Tensor], Tensor]
"""model(x_s, s): x_s B x ..., s B, the path's own times -> its prediction, shaped as x_s."""

Prediction = Literal["eps", "x", "v", "velocity"]
END = 1e-3  # how near an "x" model comes to t = 0, and an "eps" model to t = 1, where they say nothing of the velocity


def remembered(make: Callable[P, Path]) -> Callable[P, Path]:
    """A maker of paths that are pickled as the call that made them: functions made within it could not be."""

    @wraps(make)
    def made(*args: P.args, **options: P.kwargs) -> Path:
        path = make(*args, **options)
        path.__dict__["_made"] = partial(made, *args, **options)
        return path

    return made


@api_export("Path")
@dataclass(frozen=True)
class Path:
    """An affine path x_s = alpha(s) x + sigma(s) eps in a time s of its own.

    alpha, sigma, and rates, which is (d alpha / ds, d sigma / ds): functions of a float64 tensor of times s.
    s_of_t: our times -> the path's, where alpha / sigma = (1 - t) / t. t_min, t_max: our times between which its models
    were trained.
    """

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    s_of_t: Callable[[Tensor], Tensor]
    rates: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    t_min: float = 0.0
    t_max: float = 1.0

    def __reduce__(self) -> Any:
        return (self._made, ()) if hasattr(self, "_made") else super().__reduce__()

    def t_of_s(self, s: Tensor) -> Tensor:
        """The path's times -> ours."""
        return self.sigma(s) / (self.alpha(s) + self.sigma(s))

    @staticmethod
    @remembered
    def linear() -> Path:
        """Ours, x_s = (1 - s) x + s eps: rectified flow."""
        return Path(lambda s: 1 - s, lambda s: s, lambda t: t, lambda s: (-torch.ones_like(s), torch.ones_like(s)))

    @staticmethod
    @remembered
    def cosine() -> Path:
        """x_s = cos(pi s / 2) x + sin(pi s / 2) eps: the trigonometric path, SiT's GVP with its time turned."""
        half = math.pi / 2
        return Path(
            lambda s: (half * s).cos(),
            lambda s: (half * s).sin(),
            lambda t: torch.atan2(t, 1 - t) / half,
            lambda s: (-half * (half * s).sin(), half * (half * s).cos()),
        )

    @staticmethod
    @remembered
    def ve(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Path:
        """x_s = x + s eps, the time is the noise: EDM, k-diffusion (Karras et al. 2022, arXiv 2206.00364)."""
        if not 0 <= sigma_min < sigma_max < math.inf:
            raise UserError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}: not 0 <= sigma_min < sigma_max < inf")
        return Path(
            torch.ones_like,
            lambda s: s,
            lambda t: t / (1 - t),
            lambda s: (torch.zeros_like(s), torch.ones_like(s)),
            sigma_min / (1 + sigma_min),
            sigma_max / (1 + sigma_max),
        )

    @staticmethod
    @remembered
    def vp(beta_min: float = 0.1, beta_max: float = 20.0, s_min: float = 1e-5) -> Path:
        """alpha(s)^2 = 1 - sigma(s)^2 = exp(-int beta), beta linear from beta_min to beta_max over s in [0, 1].

        The VP-SDE of Song et al. 2021, arXiv 2011.13456. s_min: the smallest time of its training.
        """
        if not 0 < beta_min < beta_max < math.inf or not 0 < s_min < 1:
            raise UserError(
                f"beta_min = {beta_min}, beta_max = {beta_max}, s_min = {s_min}: not 0 < beta_min < beta_max < inf,"
                " 0 < s_min < 1"
            )
        slope = beta_max - beta_min
        integral = lambda s: s * (beta_min + slope / 2 * s)  # of beta
        alpha = lambda s: (-integral(s) / 2).exp()
        sigma = lambda s: (-torch.expm1(-integral(s))).sqrt()

        def s_of_t(t: Tensor) -> Tensor:
            total = torch.log1p((t / (1 - t)).square())  # the integral there: -log alpha^2
            return 2 * total / (beta_min + (beta_min**2 + 2 * slope * total).sqrt())

        def rates(s: Tensor) -> tuple[Tensor, Tensor]:
            half = (beta_min + slope * s) / 2
            return -half * alpha(s), half * alpha(s).square() / sigma(s)

        t_min, t_max = (_t(alpha, sigma, s) for s in (s_min, 1.0))
        return Path(alpha, sigma, s_of_t, rates, t_min, t_max)

    @staticmethod
    @remembered
    def discrete(alphas_cumprod: Sequence[float] | Tensor, *, nearest: bool = False) -> Path:
        """A DDPM's table of alpha^2, the time is its index: sqrt(table[s]) x + sqrt(1 - table[s]) eps.

        Between the entries the log-SNR is linear in s, as in k-diffusion. nearest: for models that take whole numbers
        only, the nearest entry of the table is taken for every time (s int64), exact for grids of those. A last entry
        of 0 (zero terminal SNR) counts as 2^-24, or as half the one before where that is less. Raises UserError for a
        table that does not fall within 1 .. 0.
        """
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu").detach()
        if table.dim() != 1 or len(table) < 2:
            raise UserError(f"alphas_cumprod is {tuple(table.shape)}; it must be two numbers or more, one per timestep")
        before = torch.cat([table.new_ones(1), table[:-1]])
        if bad := (~((table >= 0) & (table < before))).nonzero().flatten().tolist():
            i = bad[0]
            raise UserError(
                f"alphas_cumprod must fall, from below 1 to 0, but entry {i} is {table[i]} after {before[i]}"
            )
        least = table[-2:-1].div(2).clamp(max=2.0**-24)
        logits = -torch.logit(torch.where(table > 0, table, least)) / 2  # log(sigma / alpha), rising
        last = len(logits) - 1

        def noise(s: Tensor) -> Tensor:
            low = s.floor().long().clamp(0, last - 1)
            knots = logits.to(s.device)
            return knots[low] + (s - low) * (knots[low + 1] - knots[low])

        def s_of_t(t: Tensor) -> Tensor:
            y, knots = torch.logit(t), logits.to(t.device)
            low = (torch.searchsorted(knots, y) - 1).clamp(0, last - 1)
            s = low + (y - knots[low]) / (knots[low + 1] - knots[low])
            s = s.clamp(0, last)  # the last times of a long table are 1 but for rounding
            return s.round().long() if nearest else s

        alpha = lambda s: (-2 * noise(s)).sigmoid().sqrt()
        sigma = lambda s: (2 * noise(s)).sigmoid().sqrt()
        t_min, t_max = (_t(alpha, sigma, s) for s in (0.0, float(last)))
        return Path(alpha, sigma, s_of_t, None, t_min, t_max)

    def terms(self, s: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor, Tensor]:
        """alpha + sigma, p + q and alpha q - sigma p at times s."""
        a, b = self.alpha(s), self.sigma(s)
        match prediction:
            case "eps":
                p, q = torch.zeros_like(a), torch.ones_like(a)
            case "x":
                p, q = torch.ones_like(a), torch.zeros_like(a)
            case "v":
                p, q = -b, a
            case "velocity":
                assert self.rates is not None
                p, q = self.rates(s)
        return a + b, p + q, a * q - b * p


def _t(alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor], s: float) -> float:
    at = torch.tensor(s, dtype=torch.float64, device="cpu")
    return float(sigma(at) / (alpha(at) + sigma(at)))


@api_export("velocity_from")
def velocity_from(model: Model, path: Path, prediction: Prediction) -> Converted:
    """Any model of an affine path as a velocity of ours.

    model: called as model(x_s, s), s B in the path's own time; prediction: what it answers, "eps", "x", "v" or
    "velocity" (see the file's head). A k-diffusion denoiser D(x, sigma): velocity_from(D, Path.ve(), "x").

    Beyond path.t_min .. path.t_max the model knows nothing, and the velocity is that of the nearer end; within 1e-3 of
    t = 0 for "x" and of t = 1 for "eps" too, where its limit cannot be told from the prediction. So sampling starts at
    path.t_max, where path.t_max * noise stands for what little of the data is left.

    Raises UserError for an unknown prediction, and for "velocity" on a path without rates.
    """
    _check(path, prediction)
    return Converted(model, path, prediction)


@dataclass(frozen=True)
class Converted:
    """The velocity that `velocity_from` makes."""

    model: Model
    path: Path
    prediction: Prediction

    def at(self, z: Tensor, time: float) -> Tensor:
        s = self._s(torch.tensor(time, dtype=torch.float64, device="cpu"))
        rows = torch.full((len(z),), s.item(), dtype=_dtype(s, z), device=z.device)
        scale, total, det = (a.item() for a in self.path.terms(s, self.prediction))
        return scale / det * (as_state(self.model(scale * z, rows), z) - total * z)

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        s = self._s(_double(t))
        scale, total, det = (_rows(a, z) for a in self.path.terms(s, self.prediction))
        return scale / det * (as_state(self.model(scale * z, s.to(z.device, _dtype(s, z))), z) - total * z)

    @property
    def take(self) -> Callable[[Tensor], Converted]:  # where the model has it
        take = self.model.take  # type: ignore[attr-defined]
        return lambda rows: Converted(take(rows), self.path, self.prediction)

    def _s(self, t: Tensor) -> Tensor:
        low = max(self.path.t_min, END) if self.prediction == "x" else self.path.t_min
        high = min(self.path.t_max, 1 - END) if self.prediction == "eps" else self.path.t_max
        return self.path.s_of_t(t.clamp(low, high))


@api_export("model_from")
def model_from(velocity: Velocity, path: Path, prediction: Prediction) -> Model:
    """The way back: a velocity of ours as a model of another path, for other people's samplers.

    As a k-diffusion denoiser D(x, sigma): model_from(velocity, Path.ve(), "x"). The model takes x B x ..., and s as B
    times of the path, as one or as a number; it answers in x's dtype.

    Raises UserError for an unknown prediction, and for "velocity" on a path without rates.
    """
    _check(path, prediction)

    def model(x: Tensor, s: Tensor | float) -> Tensor:
        times = _double(s).expand(len(x))
        z, t = state(x), path.t_of_s(times)
        scale, total, det = (_rows(a, z) for a in path.terms(times, prediction))
        z = z / scale
        return (det / scale * as_state(velocity(z, t.to(z)), z) + total * z).to(x.dtype)

    return model


def _rows(a: Tensor, x: Tensor) -> Tensor:
    return a.to(x).view(-1, *[1] * (x.dim() - 1))


def _double(t: Time) -> Tensor:
    """Times in float64."""
    return double(t) if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64, device="cpu")


def _dtype(s: Tensor, x: Tensor) -> torch.dtype:
    return x.dtype if s.is_floating_point() else s.dtype


def _check(path: Path, prediction: str) -> None:
    if prediction not in (known := ("eps", "x", "v", "velocity")):
        raise UserError(f"no prediction is named {prediction!r}.{nearest(prediction, known)}")
    if prediction == "velocity" and path.rates is None:
        raise UserError('this path has no rates, so that "velocity" means nothing on it; use "eps", "x" or "v"')
