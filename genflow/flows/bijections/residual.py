"""Residual bijections: z = x + g(x) with a contraction g, inverted as a fixed point (i-ResNet, Residual Flow)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.flows.bijections.base import Bijection, check_condition, per_sample, zero_ladj
from genflow.flows.bijections.elementwise import channels_and_places
from genflow.flows.bijections.jacobian import jacobian, recorded
from genflow.flows.divergence import current_probing, fingerprint
from genflow.functional import Rng, wide
from genflow.networks.lipschitz import LipschitzNet
from genflow.registry import bijection_export
from genflow.samplers.fixed_point import fixed_point
from genflow.versions import version


@bijection_export("residual")
class ResidualBlock(Bijection):
    """z = x + g(x, condition), g a contraction (Behrmann et al. 2019, arXiv 1811.00995; Chen et al. 2019, arXiv 1906.02735).

    hidden: widths of g, an MLP, or convolutions for pictures (networks/lipschitz.py); lipschitz: the bound of its constant.

    The ladj is log det(I + J), J = dg/dx, by the whole Jacobian where a sample has few numbers, D <= 64 in training and 256
    in eval mode. Beyond, it is the unbiased estimate (arXiv 1906.02735, eq. 6), v random signs, N a random number of terms,

        sum_{k=1}^N (-1)^(k+1) / k  v^T J^k v / P(N >= k)

    with the first terms always there and each later one following with probability `lipschitz`, which bounds the variance
    of value and gradient, as |J^k| <= lipschitz^k. Its gradient is that of a Neumann series (eq. 8): memory does not grow
    with N. `exact` says which it is; exact: one of the two, always.

    seed: of the estimates. In training v hangs on the counters of `probing`, another one in every block, or outside on the
    row's own numbers; and v and N are drawn anew for new weights, so that repeated calls are the same map; the count of
    draws is in the state dict. In eval mode they are the same for all samples and calls.

    The inverse x = z - g(x) of a row iterates until within `tolerance` of the limit, or a few units of the last place of z;
    the loop is differentiated as it ran. Raises UserError where it does not arrive, and, as no ladj is without derivatives,
    in torch.inference_mode and under torch.func.vmap and jvp.
    """

    keep_input = True  # the inverse is slow, and not exact
    exact_dims = (256, 64)  # the most numbers of an exact ladj, in eval mode and in training
    sure_terms = (20, 2)  # of the series
    max_sweeps = 1000

    def __init__(
        self,
        shape: Sequence[int],
        *,
        condition_dim: int = 0,
        hidden: Sequence[int] = (64, 64),
        lipschitz: float = 0.9,
        exact: bool | None = None,
        tolerance: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__()
        channels_and_places(shape)
        if not tolerance > 0:
            raise UserError(f"tolerance = {tolerance} of residual must be positive, such as 1e-6")
        self.condition_dim, self.lipschitz, self.tolerance, self.seed = condition_dim, lipschitz, tolerance, seed
        self.inverse_error = tolerance
        self.dims = math.prod(shape)
        self.network = LipschitzNet(shape, condition_dim, hidden=hidden, lipschitz=lipschitz)
        self.draws = 0
        self._asked_exact = exact
        self._weights: tuple[int, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the ladj is exact in the present mode, or an estimate."""
        return self.dims <= self.exact_dims[self.training] if self._asked_exact is None else self._asked_exact

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, watched = wide(x), torch.is_grad_enabled()
        inputs = recorded(x, "the ladj of residual")
        # Never in bf16: powers of J, and an inverse that arrives, need a g that is smooth.
        with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
            g = self._g(inputs, condition)
            ladj = self._exact(inputs, g, watched) if self.exact else self._estimate(inputs, g, watched)
        return (x + g, ladj) if watched else (x + g.detach(), ladj.detach())

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.decode(z, condition)
        return x, -self(x, condition)[1]

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        z = wide(z)
        L = self.lipschitz
        tolerance = self.tolerance * (1 - L) / L  # the limit is within L / (1 - L) of a change
        size = z.detach().abs().unsqueeze(-1).flatten(1).amax(1)
        least = 4 * torch.finfo(z.dtype).eps * (1 + size)
        # A row in units in which its tolerance is that of all: powers of two, which round nothing.
        unit = (least / tolerance).clamp(min=1).log2().ceil().exp2()
        by = unit.view(-1, *[1] * (z.dim() - 1))
        with torch.autocast(z.device.type, enabled=False):
            found = fixed_point(
                lambda x: (z - self._g(x * by, condition)) / by, z / by, tolerance=tolerance, max_sweeps=self.max_sweeps
            )
        if not (found.change <= tolerance).all():
            row = int((~(found.change <= tolerance)).int().argmax())
            moved, allowed = (float(each * unit[row]) for each in (found.change[row], tolerance))
            raise UserError(
                f"the inverse of residual still moved by {moved:.2g} in row {row} after {found.sweeps} sweeps, more than "
                f"{allowed:.2g}: z is not finite, or g no contraction; try a smaller lipschitz than {L}"
            )
        return found.x * by

    def _g(self, x: Tensor, condition: Tensor | None) -> Tensor:
        check_condition(condition, self.condition_dim, len(x))
        dtype = next(self.network.parameters()).dtype
        given = condition.to(dtype) if self.condition_dim and condition is not None else None
        return self.network(x.to(dtype), given).to(x.dtype)

    def _exact(self, x: Tensor, g: Tensor, watched: bool) -> Tensor:
        """log det(I + J) of the whole Jacobian."""
        J = jacobian(g, x, create_graph=watched)
        return torch.linalg.slogdet(torch.eye(self.dims, dtype=J.dtype, device=J.device) + J).logabsdet

    def _estimate(self, x: Tensor, g: Tensor, watched: bool) -> Tensor:
        """The estimate of log det(I + J) for each sample, its gradient that of the Neumann series."""
        v, probabilities = self._draw(x)
        power, value, neumann = v, zero_ladj(x), torch.zeros_like(v)
        for k, probability in enumerate(probabilities, 1):
            sign = (-1) ** (k + 1) / probability
            neumann = neumann + sign * power
            power = torch.autograd.grad(g, x, power, retain_graph=True)[0]  # v^T J^k
            value = value + sign / k * per_sample(power * v)
        if not watched:
            return value
        slope = torch.autograd.grad(g, x, neumann, create_graph=True)[0]
        surrogate = per_sample(slope * v)
        return value + surrogate - surrogate.detach()

    def _draw(self, x: Tensor) -> tuple[Tensor, list[float]]:
        """v, shaped like x, and P(N >= k) for k = 1 .. N."""
        scope, zero, stream = current_probing(), torch.zeros(1, dtype=torch.int64), ""
        if not self.training:
            draw, index = Rng(self.seed), zero
        elif scope is not None:
            draw, index, stream = scope.rng, scope.counters, f"residual/{self.seed}/{scope.place(self)}/"
        else:
            weights = tuple(version(p) for p in self.parameters())
            self.draws += weights != self._weights
            self._weights = weights
            draw, index = Rng(self.seed, self.draws), fingerprint(x)
        signs = torch.where(draw.uniform(f"{stream}signs", index, x.shape[1:]) < 0.5, -1.0, 1.0)
        more = math.floor(math.log(float(draw.uniform(f"{stream}terms", zero))) / math.log(self.lipschitz))
        sure = self.sure_terms[self.training]
        return signs.to(x).expand_as(x), [self.lipschitz ** max(0, k - sure) for k in range(1, sure + more + 1)]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.draws)

    def set_extra_state(self, state: Tensor) -> None:
        self.draws = int(state)
