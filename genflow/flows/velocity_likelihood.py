"""The likelihood of any velocity model: the probability flow's change of variables, every sample a solve of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from genflow.errors import UserError
from genflow.flows.divergence import Divergence, fingerprint, modules_of
from genflow.flows.stepping import TABLEAUS, Stepping
from genflow.functional import Rng
from genflow.registry import api_export, resolve
from genflow.samplers.solution import Velocity, state

LEVELS = (8, 16, 32, 64, 128)  # intervals of the quadratures, one after another as far as needed
AHEAD = (32, 128)  # the levels that a solve keeps the states for, so that it is not done again for the next


@api_export("Likelihood")
@dataclass(frozen=True)
class Likelihood:
    """What `velocity_log_prob` found. All tensors B, in nats, float32 or wider.

    log_prob: log p(x); ladj: log |det dz/dx|; z: like x, the noise that x came from. standard_error: of log_prob from the
    draws of the divergence's estimator: 0 for the exact one, NaN for a single draw. error: the estimate of the quadrature's
    in ladj alone; the path has one of its own in z and ladj, which is not estimated and may be larger: compare with smaller
    rtol and atol. nfe: evaluations of the velocity of the longest solve; divergences: evaluations with the divergence.
    rtol, atol: as asked.
    """

    log_prob: Tensor
    standard_error: Tensor
    ladj: Tensor
    z: Tensor
    error: Tensor
    nfe: int
    divergences: int
    rtol: float
    atol: float


@api_export("velocity_log_prob")
def velocity_log_prob(
    velocity: Velocity,
    x: Tensor,
    *,
    divergence: str = "hutchinson",
    draws: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    solver: str = "dopri5",
    compact: bool | None = None,
    seed: int = 0,
    end: float = 1.0,
) -> Likelihood:
    """log p(x) = log N(z; 0, I) + int_0^1 tr(dv/dx) dt along the path of dx/dt = v(x, t) from x at t = 0 to z at t = 1.

    (Chen et al. 2018, arXiv 1806.07366; Song et al. 2021, arXiv 2011.13456, eq. 39.) x: B x ..., float32 or wider.
    velocity, compact: as for the adaptive samplers. divergence, draws: see `Divergence`; the noise of a row hangs on seed
    and its numbers, and is the same along the whole path. solver, rtol, atol: an adaptive sampler's; the quadrature of ladj
    goes to D (atol + rtol) + rtol |ladj| nats. end: where the path ends instead, in end z, as a model that is asked no
    further draws from there. No gradient: a CNF's forward has one.

    Raises UserError for tolerances below the noise of the arithmetic, a velocity with dropout or batch statistics in
    training mode, one that is not finite (naming samples and t), one whose divergence does not integrate, and for x that
    asks for a gradient.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise UserError(
            "velocity_log_prob has no gradient, but x asks for one; use CNF(shape, velocity), or x.detach()"
        )
    if solver in TABLEAUS and not TABLEAUS[solver].error:
        raise UserError(f"solver {solver!r} takes equal steps, whatever rtol and atol say; take dopri5, tsit5 or bosh3")
    estimator = Divergence(divergence, draws)  # type: ignore[arg-type]
    stepping = Stepping(solver, rtol, atol)
    check_velocity(velocity, x, stepping)
    x = state(x)
    probes = estimator.probes(x, Rng(seed), fingerprint(x))
    with torch.no_grad():
        z, each, error, nfe, divergences = path_integral(
            velocity, x, estimator, probes, stepping, end=end, compact=compact
        )
    z, ladj = z / end, each.mean(0) - math.prod(x.shape[1:]) * math.log(end)
    if divergence == "exact":
        standard_error = torch.zeros_like(ladj)
    else:
        standard_error = each.std(0) / math.sqrt(len(each)) if len(each) > 1 else torch.full_like(ladj, math.nan)
    base = -0.5 * (z.square() + math.log(2 * math.pi)).unsqueeze(-1).flatten(1).sum(1)
    return Likelihood(base + ladj, standard_error, ladj, z, error, nfe, divergences, rtol, atol)


def path_integral(
    velocity: Velocity,
    x: Tensor,
    estimator: Divergence,
    probes: Tensor | None,
    stepping: Stepping,
    start: float = 0.0,
    end: float = 1.0,
    compact: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Where the path ends, and the integral of the divergence along it, each row to its own tolerance. No gradients.

    The path does not hang on the integral: it is solved for alone, and the divergence is asked at the nodes of
    Clenshaw-Curtis quadrature on the solver's dense output, which are doubled until its error is within
    D (atol + rtol) + rtol |integral|. Returns z, the integrals of the draws K x B, the estimated error of their mean, B,
    and the evaluations without and with the divergence.

    Raises UserError for a row that is still far from that at the last doubling.
    """
    sampler = resolve("sampler", stepping.solver)
    how = {"rtol": stepping.rtol, "atol": stepping.atol, "max_steps": stepping.max_steps, "compact": compact}
    take = getattr(velocity, "take", None)
    compact = take is not None if compact is None else compact
    dims, most = math.prod(x.shape[1:]), LEVELS[-1]
    time = [start + (end - start) * (0.5 - 0.5 * math.cos(math.pi * i / most)) for i in range(most + 1)]
    rates, states = dict[int, Tensor](), dict[int, Tensor]()  # at node i of `most`, of the rows that are left
    rows, open_ = torch.arange(len(x), device=x.device), torch.ones(len(x), dtype=torch.bool, device=x.device)
    z, here, nfe, divergences = x, velocity, 0, 0
    for count in LEVELS:
        wanted = [i for i in range(0, most + 1, most // count) if i not in rates]
        if not states.keys() >= {*wanted}:
            ahead = next(level for level in AHEAD if level >= count)
            nodes = sorted({0, most, *(i for i in range(0, most + 1, most // ahead) if i not in rates)})
            solved = sampler(here, x[rows], [time[i] for i in nodes], record=True, **how).checked()
            states = dict(zip(nodes, solved.trajectory.states, strict=True))
            nfe += solved.nfe
            z = solved.x if count == LEVELS[0] else z
        for i in wanted:
            t = x.new_full((1 if getattr(here, "broadcasts_time", False) else len(rows),), time[i])
            rates[i] = estimator(here, states[i], t, None if probes is None else probes[:, rows]).divergence
            divergences += 1
        level = [rates[i] for i in range(0, most + 1, most // count)]
        integral, off = _quadrature(level)
        integral, off = (end - start) * integral, abs(end - start) * off
        if count == LEVELS[0]:
            total, error, allowed = integral.clone(), off.clone(), off.clone()
        new = open_[rows]  # rows that stayed keep what they had
        total[:, rows] = torch.where(new, integral, total[:, rows])
        error[rows] = torch.where(new, off, error[rows])
        allowed[rows] = dims * (stepping.atol + stepping.rtol) + stepping.rtol * integral.mean(0).abs()
        open_ = open_ & ~(error <= allowed)
        keep = open_[rows].nonzero().squeeze(1)
        if not len(keep):
            break
        if compact and len(keep) < len(rows):
            rows = rows[keep]
            here = velocity if take is None else take(rows)
            rates = {i: each[:, keep] for i, each in rates.items()}
            states = {i: each[keep] for i, each in states.items()}
    far = ~(error <= 100 * allowed)
    if bool(far.any()):
        row = int(far.int().argmax())
        raise UserError(
            f"the divergence does not integrate to rtol = {stepping.rtol}: {most} evaluations leave an error of "
            f"{float(error[row]):.2g} nats in the ladj of sample {row}; loosen rtol and atol"
        )
    return z, total, error, nfe, divergences


def _quadrature(rates: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The integral over [0, 1] from values at (1 - cos(pi i / n)) / 2, i = 0 .. n, each K x B, and its mean's error, B.

    The error is foretold from the Chebyshev coefficients: the largest of the last quarter falls from the largest of the
    quarter before by some factor, and what is missing beyond n is no larger than that factor times it.
    """
    weights, cosines = (each.to(rates[0]) for each in _clenshaw_curtis(len(rates) - 1))
    values = torch.stack(rates)
    with torch.autocast(values.device.type, enabled=False):
        integral, coefficients = torch.tensordot(weights, values, 1), torch.tensordot(cosines, values.mean(1), 1)
    before, last = coefficients.abs().chunk(2)
    before, last = before.amax(0), last.amax(0)
    fall = (last / before.clamp(min=torch.finfo(last.dtype).tiny)).clamp(max=1)
    return integral, last * fall


@cache
def _clenshaw_curtis(n: int) -> tuple[Tensor, Tensor]:
    """What n + 1 values are multiplied with, n divisible by 4, float64: n + 1 weights that integrate their cosine series
    (Clenshaw & Curtis 1960), and n / 2 x n + 1 that give the second half of its coefficients.
    """
    k = torch.arange(n + 1, dtype=torch.float64, device="cpu")
    series = torch.cos(math.pi / n * torch.outer(k, k)) * 2 / n
    for end in (0, n):
        series[end] /= 2
        series[:, end] /= 2
    return (series[::2] / (1 - k[::2, None].square())).sum(0), series[n // 2 + 1 :]


def check_velocity(velocity: Any, x: Tensor, stepping: Stepping) -> None:
    """Raises UserError for a velocity that is no function of (x, t), and for tolerances below its arithmetic's noise."""
    stepping.check(state(x).dtype)
    for name, module in modules_of(velocity):
        kind = type(module).__name__
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if module.training and random:
            raise UserError(f"{name} ({kind}) draws noise in training mode: a likelihood needs a function; call eval()")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise UserError(f"{name} ({kind}) mixes the samples of a batch: a likelihood needs each alone; call eval()")
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
                stepping.check(parameter.dtype)
    kind = x.device.type
    exact = getattr(velocity, "ignores_autocast", False)
    if kind != "meta" and torch.is_autocast_enabled(kind) and not exact:
        stepping.check(torch.get_autocast_dtype(kind))
