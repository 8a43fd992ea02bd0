"""Between two noises, or two conditions: what lies on the way from one picture to another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.registry import api_export
from genflow.samplers.solution import state


@api_export("slerp")
def slerp(a: Tensor, b: Tensor, fraction: float | Tensor) -> Tensor:
    """Spherical interpolation of each sample (Shoemake 1985): along the arc from a to b, so that noise stays noise.

    a, b: B or 1 x ...; fraction: a number, or B of them. The ends are a and b exactly, and equal norms are kept. For
    (nearly) parallel samples it is the straight line; exactly opposite ones have no one arc.
    """
    a, b = state(a), state(b)
    column = (-1, *[1] * (a.dim() - 1))
    weight = torch.as_tensor(fraction, dtype=a.dtype, device=a.device).reshape(column)
    u, v = (torch.nn.functional.normalize(each.unsqueeze(-1).flatten(1), dim=1) for each in (a, b))
    # the angle between, over pi, as precise for small ones as for any (Kahan)
    angle = torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1)).view(column) * (2 / math.pi)
    # sin(f angle) / sin(angle), as a ratio that has a limit at 0
    parts = [w * torch.sinc(w * angle) / torch.sinc(angle) * each for w, each in ((1 - weight, a), (weight, b))]
    return parts[0] + parts[1]


@api_export("blend")
def blend(
    a: Sequence[Tensor], b: Sequence[Tensor], fraction: float | Tensor, *, spherical: bool = False
) -> tuple[Tensor, ...]:
    """Between two embedded conditions, such as two prompts': tensor by tensor, a straight line, or `slerp`.

    a, b: tensors of B rows or one; masks (bool) become either's. fraction: a number, or B of them. Returns each in the
    dtype of a's. Raises UserError for other numbers of tensors, and for whole numbers, which have nothing between.
    """
    if len(a) != len(b):
        raise UserError(f"blend: {len(a)} tensors and {len(b)}; give as many of both conditions")

    def between(p: Tensor, q: Tensor) -> Tensor:
        if not p.is_floating_point() and p.dtype != torch.bool:
            raise UserError(f"blend: nothing lies between conditions of {p.dtype}, such as labels; embed them first")
        if spherical and p.dtype != torch.bool:
            return slerp(p, q, fraction).to(p.dtype)
        weight = torch.as_tensor(fraction, device=p.device).reshape(-1, *[1] * (p.dim() - 1))
        if p.dtype == torch.bool:
            return (p & (weight < 1)) | (q & (weight > 0))
        return torch.lerp(p, q.to(p.dtype), weight.to(p.dtype))

    return tuple(between(p, q) for p, q in zip(a, b, strict=True))
