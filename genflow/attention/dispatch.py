"""The attention call and the choice of its backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genflow.errors import UserError, nearest
from genflow.registry import api_export, names, resolve

ORDER = ("sdpa", "math")  # what "auto" tries, fastest first


@dataclass(frozen=True)
class Call:
    """What one attention call asks of a backend."""

    device: str
    dtype: torch.dtype
    head_dim: int
    masked: bool
    needs: frozenset[str] = frozenset()  # of {"backward", "double_backward", "forward_ad"}


@dataclass(frozen=True)
class Attention:
    """A backend and what it can do: the capability record that the choice is made by.

    fn: (q, k, v, key_mask | None, scale | None) -> o, all B x heads x L x head_dim; key_mask B x L bool, True = attend.
    available: returns why the backend cannot be had on this machine, or None.
    """

    name: str
    fn: Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
    available: Callable[[], str | None] = lambda: None
    devices: frozenset[str] | None = None  # None: any
    dtypes: frozenset[torch.dtype] | None = None  # None: any floating dtype
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    masks: bool = True
    offers: frozenset[str] = field(default_factory=lambda: frozenset({"backward"}))

    def refusals(self, call: Call) -> list[str]:
        """Every reason why this backend cannot serve the call; empty where it can."""
        reason = self.available()
        reasons = [reason] if reason else []
        if self.devices is not None and call.device not in self.devices:
            reasons.append(f"runs on {'/'.join(sorted(self.devices))}, not on {call.device}")
        if self.dtypes is not None and call.dtype not in self.dtypes:
            reasons.append(f"takes {'/'.join(sorted(str(d)[6:] for d in self.dtypes))}, not {str(call.dtype)[6:]}")
        if self.max_head_dim is not None and call.head_dim > self.max_head_dim:
            reasons.append(f"takes head_dim up to {self.max_head_dim}, not {call.head_dim}")
        if call.head_dim % self.head_dim_multiple:
            reasons.append(f"takes head_dim in multiples of {self.head_dim_multiple}, not {call.head_dim}")
        if call.masked and not self.masks:
            reasons.append("takes no key mask")
        for need in sorted(call.needs - self.offers):
            reasons.append(f"has no {need.replace('_', ' ')}")
        return reasons


def choose(backend: str, call: Call) -> Attention:
    """The backend that serves the call: the one named, or for "auto" the first of ORDER that can.

    Raises UserError with all the reasons where an explicit choice cannot serve.
    """
    if backend != "auto":
        if backend not in names("attention"):
            raise UserError(
                f"attention backend {backend!r} is unknown.{nearest(backend, ['auto', *names('attention')])}"
            )
        record = resolve("attention", backend)()
        if reasons := record.refusals(call):
            raise UserError(f"attention backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
        return record
    for name in ORDER:
        record = resolve("attention", name)()
        if not record.refusals(call):
            return record
    raise UserError(f"no attention backend can serve {call}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    needs: frozenset[str] = frozenset(),
) -> Tensor:
    """softmax(q k^T scale) v.

    q: B x heads x Lq x head_dim; k, v: B x heads x Lk x head_dim; key_mask: B x Lk bool, True = attend (a row needs one
    live key); scale: 1/sqrt(head_dim) by default. needs: "double_backward" or "forward_ad", which fused kernels lack.
    Returns B x heads x Lq x head_dim. Raises UserError where an explicit backend cannot serve.
    """
    if torch.is_grad_enabled() and q.requires_grad:
        needs = needs | {"backward"}
    call = Call(q.device.type, q.dtype, q.shape[-1], key_mask is not None, needs)
    return choose(backend, call).fn(q, k, v, key_mask, scale)


@api_export("attention_report")
def attention_report(call: Call) -> dict[str, list[str]]:
    """For every backend, why it cannot serve the call; an empty list where it can."""
    return {name: resolve("attention", name)().refusals(call) for name in names("attention")}
