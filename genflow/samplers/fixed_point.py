"""Fixed points x = F(x) by sweeps over all of x at once, and how much of a sequence is settled after a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genflow.errors import UserError, check_whole
from genflow.registry import api_export


@dataclass(frozen=True)
class FixedPoint:
    """x: the last iterate; sweeps: the calls of the step; change: B, max |F(x) - x| of each row at its own last sweep.

    A row whose change is above the tolerance (or NaN) did not arrive.
    """

    x: Tensor
    sweeps: int
    change: Tensor


@api_export("fixed_point")
def fixed_point(
    step: Callable[[Tensor], Tensor], x: Tensor, *, tolerance: float = 1e-6, max_sweeps: int = 100
) -> FixedPoint:
    """Iterate x <- step(x) from x, B x ..., until no number of a row moves by more than the tolerance.

    A row stands still from then on, so that it does not depend on its batch mates where step treats rows apart. The limit
    is off by at most tolerance L / (1 - L) where step has the Lipschitz constant L < 1 (Banach); where it is strictly
    lower triangular over N positions, N sweeps give it exactly, whatever L. Each sweep waits for the device once.

    Raises UserError for fewer than one sweep and for a tolerance that is negative or not a number.
    """
    if not tolerance >= 0:
        raise UserError(f"tolerance = {tolerance} must be 0 or more; 0 iterates until nothing moves")
    check_whole(max_sweeps=max_sweeps)
    change = x.new_full((len(x),), torch.inf)
    sweeps = 0
    check_seen(x, "a fixed point")
    while sweeps < max_sweeps and not (change <= tolerance).all():
        arrived = change <= tolerance
        new = step(x)
        moved = (new - x).detach().abs().unsqueeze(-1).flatten(1).amax(1)
        x = torch.where(arrived.view(-1, *[1] * (x.dim() - 1)), x, new)
        change = torch.where(arrived, change, moved)
        sweeps += 1
    return FixedPoint(x, sweeps, change)


def check_seen(x: Tensor, what: str) -> None:
    """Raises UserError under torch.func.vmap, for what goes on by the numbers that it finds."""
    if torch._C._functorch.is_batchedtensor(x):
        raise UserError(f"{what} waits for numbers of its rows, which vmap hides; call it with the whole batch instead")


def verified(change: Tensor, tolerance: float) -> Tensor:
    """How many leading positions are settled after a sweep over a strictly lower triangular map: B, 1 .. N.

    change: B x N, by how much each position moved. Position i is computed from those before it alone, so the first is right
    after any sweep, and each one after a position that, like all before it, stayed within the tolerance. Such prefixes are
    committed by Picard iteration (arXiv 2305.16317) and by the Gauss-Seidel-Jacobi inverse of autoregressive flows.
    """
    return 1 + (change[:, :-1] <= tolerance).cumprod(1).sum(1)
