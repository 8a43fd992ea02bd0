"""The attention call and the choice of its backend.

Who chooses, the strongest first: the call's own `backend`, the context `attention_backend(...)`, the module's config
(`default`), the environment variable GENFLOW_ATTENTION, and, where nobody has said anything, the fastest that can serve.
The context is above the config because it is nearer: it is written around one piece of code, the config for a whole
run. "auto" at any level leaves the choice to the next one. A choice is never overruled in silence: a backend that was
named and cannot serve is refused with all the reasons.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genflow.attention.known_bad import known_bad
from genflow.attention.masks import NONE, Mask
from genflow.errors import UserError, nearest
from genflow.native.library import assume_constant
from genflow.registry import api_export, names, resolve

ORDER = ("sdpa", "sdpa_efficient", "math")  # what "auto" tries, fastest first
NEEDS = ("backward", "double_backward", "forward_ad")
VARIABLE = "GENFLOW_ATTENTION"
_BACKWARD = frozenset({"backward"})
_scope: ContextVar[tuple[str, frozenset[str]]] = ContextVar("attention", default=("auto", frozenset()))

Kernel = Callable[[Tensor, Tensor, Tensor, Mask, float | None], Tensor]


class Call(NamedTuple):
    """What one attention call asks of a backend. mask: its kind; lq, lk: None where a compiled graph serves any."""

    device: str
    dtype: torch.dtype
    head_dim: int
    mask: str = "none"
    lq: int | None = None
    lk: int | None = None
    needs: frozenset[str] = frozenset()  # of NEEDS


@dataclass(frozen=True)
class Attention:
    """A backend and what it can do: the capability record that the choice is made by.

    fn: (q, k, v, mask, scale | None) -> o, all B x heads x L x head_dim.
    available: returns why the backend cannot be had on this machine, or None.
    limits: further reasons why it cannot serve a call, which the other fields cannot say.
    """

    name: str
    fn: Kernel
    available: Callable[[], str | None] = lambda: None
    devices: frozenset[str] | None = None  # None: any
    dtypes: frozenset[torch.dtype] | None = None  # None: any floating dtype
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    masks: tuple[str, ...] | None = None  # kinds; None: any
    offers: frozenset[str] = _BACKWARD
    limits: Callable[[Call], Iterable[str]] = lambda call: ()

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
        if self.masks is not None and call.mask not in self.masks:
            reasons.append(f"takes masks {', '.join(self.masks)}, not {call.mask}")
        for need in sorted(call.needs - self.offers):
            reasons.append(f"has no {need.replace('_', ' ')}")
        return [*reasons, *self.limits(call), *known_bad(self.name, call)]


def choose(backend: str, call: Call) -> Attention:
    """The backend that serves the call: the one named, or for "auto" the first of ORDER that can.

    Raises UserError with all the reasons where a backend that was named cannot serve.
    """
    if backend != "auto":
        record = resolve("attention", _checked(backend))()
        if reasons := record.refusals(call):
            raise UserError(f"attention backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
        return record
    for name in ORDER:
        record = resolve("attention", name)()
        if not record.refusals(call):
            return record
    raise UserError(f"no attention backend can serve {call}")


@api_export("attention_backend")
@contextmanager
def attention_backend(name: str = "auto", *, needs: Iterable[str] = ()) -> Iterator[None]:
    """Within: attention is computed by this backend, or by one that offers what is needed.

    name: "auto" changes nothing. needs: of "backward", "double_backward", "forward_ad", in addition to what the calls
    and outer contexts ask for. Holds for this thread (or async task) only, and for calls made within: a backward that
    computes a checkpointed block again, outside or in autograd's own thread on a GPU, chooses as its own surroundings
    say. Raises UserError for an unknown name or need.
    """
    outer, before = _scope.get()
    token = _scope.set((outer if name == "auto" else _checked(name), before | _checked_needs(needs)))
    try:
        yield
    finally:
        _scope.reset(token)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
    default: str = "auto",
    needs: frozenset[str] = frozenset(),
) -> Tensor:
    """softmax(q k^T scale + mask) v, and zeros for a query that may attend to no key.

    q: B x heads x Lq x head_dim; k, v: B x heads x Lk x head_dim, one dtype (under autocast: its dtype); scale:
    1/sqrt(head_dim) by default. backend: this call's choice; default: the calling module's, which a context overrides.
    needs: "double_backward" or "forward_ad", which fused kernels lack; "backward" is seen from the tensors.
    Returns B x heads x Lq x head_dim. Raises UserError where a named backend cannot serve, or the tensors do not fit.
    """
    if not (q.dim() == 4 and k.shape == v.shape == (*q.shape[:2], *k.shape[2:3], q.shape[-1])):
        shapes = ", ".join(f"{name} {' x '.join(map(str, x.shape))}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise UserError(f"attention: {shapes}; all are B x heads x L x head_dim, of which L of q may differ")
    batch, heads, lq, head_dim = q.shape
    lk, device, dtype = k.shape[2], q.device.type, q.dtype
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    elif not (dtype == k.dtype == v.dtype):
        raise UserError(
            f"attention: q is {str(dtype)[6:]}, k {str(k.dtype)[6:]}, v {str(v.dtype)[6:]}; cast them alike"
        )
    if mask is None:
        mask = NONE
    elif not isinstance(mask, Mask):
        raise UserError(
            f"attention: the mask is a {type(mask).__name__}; give a tensor, True = live, as Mask(dense=...)"
        )
    else:
        mask.check(batch, heads, lq, lk)
    if q.numel() == 0 or lk == 0:
        return q @ k.transpose(-2, -1) @ v  # nothing, or sums of nothing, which have gradients
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    needs = needs | _BACKWARD if grad else needs
    return serving(Call(device, dtype, head_dim, mask.kind, lq, lk, needs), backend, default).fn(q, k, v, mask, scale)


def serving(call: Call, backend: str = "auto", default: str = "auto") -> Attention:
    """The backend of a call, which may need more here than it says itself. backend, default: as of `attention`."""
    scope, needed = _scope.get()
    if needed:
        call = call._replace(needs=call.needs | needed)
    name = backend if backend != "auto" else scope if scope != "auto" else default
    if torch.compiler.is_compiling():  # the choice is a constant of the graph, which may serve other lengths
        head_dim = len(range(call.head_dim))  # a number to the graph, where it was a symbol
        name = _constant(name, *call._replace(head_dim=head_dim, lq=None, lk=None))
        return resolve("attention", name)()
    return _chosen(name, *call)


@api_export("attention_report")
def attention_report(call: Call) -> dict[str, list[str]]:
    """For every backend, why it cannot serve the call; an empty list where it can."""
    return {name: resolve("attention", name)().refusals(call) for name in names("attention")}


@lru_cache(maxsize=1024)
def _chosen(name: str, *call: Any) -> Attention:
    return choose(environment() if name == "auto" else name, Call(*call))


@assume_constant
def _constant(name: str, *call: Any) -> str:
    return _chosen(name, *call).name


@cache
def environment() -> str:
    """What the environment says, as it was at the first call. Raises UserError for an unknown name."""
    name = os.environ.get(VARIABLE) or "auto"
    try:
        return name if name == "auto" else _checked(name)
    except UserError as error:
        raise UserError(f"environment variable {VARIABLE}: {error}") from None


def _checked(name: str) -> str:
    if name not in names("attention"):
        raise UserError(f"attention backend {name!r} is unknown.{nearest(name, ['auto', *names('attention')])}")
    return name


def _checked_needs(needs: Iterable[str]) -> frozenset[str]:
    needs = frozenset([needs] if isinstance(needs, str) else needs)
    for need in sorted(needs - {*NEEDS}):
        raise UserError(f"attention: nothing is needed by the name {need!r}.{nearest(need, NEEDS)}")
    return needs
