"""The divergence of a velocity, tr(dv/dx), exact or estimated, in one evaluation with the velocity itself.

For attention inside a differentiated divergence the need is declared here: it goes to a backend that has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from genflow.attention import attention_backend
from genflow.errors import UserError, check_whole, nearest
from genflow.flows.bijections.jacobian import recorded
from genflow.functional import Rng, row_hash
from genflow.registry import api_export
from genflow.samplers.solution import Velocity

CHUNK = 64  # products at a time: of the exact divergence's D

# ---------------------------------------------------------------------------------------------------------- estimators


class Evaluated(NamedTuple):
    """v: like x; divergence: K x B, whose mean over the K draws is the estimate; frobenius: B, of |dv/dx|^2."""

    v: Tensor
    divergence: Tensor
    frobenius: Tensor


@api_export("Divergence")
@dataclass(frozen=True)
class Divergence:
    """How the divergence is found.

    kind: "exact", with D products of the Jacobian; "hutchinson", the mean of u^T J u over draws of u in {-1, 1}^D, whose
    variance is 2 (|S|^2 - sum S_ii^2), S the symmetric part of J (Hutchinson 1989; FFJORD, arXiv 1810.01367);
    "hutchinson_gaussian", u normal, 2 |S|^2; "hutch++", exact on as many directions as draws, and Hutchinson beside them,
    3 products a draw (Meyer et al. 2020, arXiv 2010.09649). draws: of u, all in one evaluation; 1 for "exact".

    A velocity with pushforward(x, t, tangents) -> v, J tangents is asked so; any other is differentiated backwards.
    """

    kind: Literal["exact", "hutchinson", "hutchinson_gaussian", "hutch++"] = "exact"
    draws: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise UserError(f"divergence {self.kind!r} is unknown.{nearest(self.kind, _KINDS)}")
        check_whole(draws=self.draws)
        if self.kind == "exact" and self.draws > 1:
            raise UserError(f"draws = {self.draws}: the exact divergence has none to take; leave it at 1")

    def probes(self, x: Tensor, rng: Rng, index: Tensor, stream: str = "divergence") -> Tensor | None:
        """The draws of a whole solve, K x B x ..., like x: those of a row by rng and its index alone; None for exact.

        The sketches of hutch++, its first half, are normal: of few numbers, signs are often alike, and span too little.
        """
        if self.kind == "exact":
            return None
        if len(index) != len(x):
            raise UserError(f"divergence: {len(index)} counters for {len(x)} samples; give one for each")
        draws = [_gaussian if self.kind == "hutchinson_gaussian" else _rademacher] * self.draws
        if self.kind == "hutch++":
            draws = [_gaussian] * self.draws + draws
        return torch.stack([draw(rng, f"{stream}/{k}", index, x.shape[1:]) for k, draw in enumerate(draws)]).to(x)

    def __call__(self, velocity: Velocity, x: Tensor, t: Tensor, probes: Tensor | None = None) -> Evaluated:
        """v, its divergence and the square of its Jacobian's norm at (x, t). Gradients flow where they are enabled.

        x: B x ...; t: B, or 1 where the velocity allows. probes: of `probes`. Raises UserError where there is nothing to
        differentiate: in torch.inference_mode, under torch.func.vmap and jvp, and for a velocity that follows x
        but is detached from it.
        """
        return _KINDS[self.kind](_Products(velocity, x, t, batched=self.kind == "hutch++"), probes)


class _Products:
    """Products of the Jacobian of a velocity at (x, t) with K x B x ... vectors: J u, or J^T u backwards.

    Both have the traces and the norms of J. The velocity is evaluated at the first, with as little graph as may be.
    batched: whether there will be more vectors than one at a time, also where the first is alone.
    """

    def __init__(self, velocity: Velocity, x: Tensor, t: Tensor, *, batched: bool) -> None:
        self.velocity, self.t, self.batched = velocity, t, batched
        self.pushforward: Callable[..., tuple[Tensor, Tensor]] | None = getattr(velocity, "pushforward", None)
        self.graph = torch.is_grad_enabled()
        self.x = recorded(x, "a divergence") if self.pushforward is None else x
        self._v: Tensor | None = None

    @property
    def v(self) -> Tensor:
        assert self._v is not None
        return self._v if self.graph else self._v.detach()

    def __call__(self, vectors: Tensor) -> Tensor:
        if self.pushforward is not None:
            self._v, pushed = self.pushforward(self.x, self.t, vectors)
            return pushed
        batched = len(vectors) > 1
        with torch.enable_grad():
            if self._v is None:
                with attention_backend(needs=("double_backward",) if self.graph or batched or self.batched else ()):
                    self._v = self.velocity(self.x, self.t).to(self.x.dtype)
            pulled = None
            if self._v.requires_grad:
                (pulled,) = torch.autograd.grad(
                    self._v,
                    self.x,
                    vectors if batched else vectors[0],
                    retain_graph=True,
                    create_graph=self.graph,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
        if pulled is None:
            self._check_constant()
            return torch.zeros_like(vectors)
        return pulled if batched else pulled.unsqueeze(0)

    @torch.no_grad()
    def _check_constant(self) -> None:
        """Raises UserError where a velocity without a gradient to x is not the same beside x."""
        moved = self.velocity(1.01 * self.x + 0.01, self.t).to(self.x.dtype)
        if not torch.allclose(moved, self.v, rtol=0, atol=0, equal_nan=True):
            raise UserError(
                "the velocity follows x, but has no gradient to it, and so no divergence: torch.no_grad or detach() in it?"
            )


def _flat(a: Tensor) -> Tensor:
    """K x B x (sample) as K x B x D; also where a sample is one number."""
    return a.unsqueeze(-1).flatten(2)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of vectors, ... x B x (sample) -> ... x B, in float32 or wider."""
    return _flat(a * b).sum(2)


def _exact(products: _Products, probes: Tensor | None) -> Evaluated:
    """The sum over every number of a sample of d v_i / d x_i; of pictures too."""
    x = products.x
    count = math.prod(x.shape[1:])
    divergence = frobenius = x.new_zeros(len(x))
    for first in range(0, count, CHUNK):
        size = min(CHUNK, count - first)
        basis = x.new_zeros(size, count)
        basis[:, first : first + size].fill_diagonal_(1)
        vectors = basis.view(size, 1, *x.shape[1:]).expand(size, *x.shape)
        pulled = products(vectors).reshape(size, len(x), count)
        divergence = divergence + pulled[:, :, first : first + size].diagonal(dim1=0, dim2=2).sum(1)
        frobenius = frobenius + pulled.square().sum((0, 2))
    return Evaluated(products.v, divergence.unsqueeze(0), frobenius)


def _hutchinson(products: _Products, probes: Tensor | None) -> Evaluated:
    assert probes is not None
    pulled = products(probes)
    return Evaluated(products.v, _dot(pulled, probes), _dot(pulled, pulled).mean(0))


def _hutchpp(products: _Products, probes: Tensor | None) -> Evaluated:
    """tr(Q^T A Q) + mean of g^T (I - Q Q^T) A (I - Q Q^T) g, Q an orthonormal basis of A S (arXiv 2010.09649, alg. 1).

    Q is a constant to gradients: for any Q the mean over g is the trace, and so is its gradient's.
    """
    assert probes is not None
    sketch, g = probes.chunk(2)
    range_of = products(sketch)
    shape = sketch.shape
    q, _ = torch.linalg.qr(_flat(range_of.detach()).permute(1, 2, 0))  # B x D x K, or x D where D < K
    flat = _flat(g).permute(1, 2, 0)
    with torch.autocast(flat.device.type, enabled=False):
        rest = flat - q @ (q.mT @ flat)
    both = torch.cat([q, rest], 2).permute(2, 0, 1)
    dots = _dot(_flat(products(both.reshape(len(both), *shape[1:]))), both)
    columns = q.shape[2]
    return Evaluated(products.v, dots[:columns].sum(0) + dots[columns:], _dot(range_of, range_of).mean(0))


_KINDS: dict[str, Callable[[_Products, Tensor | None], Evaluated]] = {
    "exact": _exact,
    "hutchinson": _hutchinson,
    "hutchinson_gaussian": _hutchinson,
    "hutch++": _hutchpp,
}

# --------------------------------------------------------------------------------------------------------------- noise


def _rademacher(rng: Rng, stream: str, index: Tensor, shape: torch.Size) -> Tensor:
    """-1 and 1 with equal chance, B x *shape float32 on the CPU: 64 from every number of a counter."""
    size = math.prod(shape)
    words = rng.bits(stream, index).unsqueeze(1) + torch.arange(-(-size // 64), device="cpu")
    bits = rng.bits(f"{stream}/words", words.flatten()).view(*words.shape, 1) >> torch.arange(64, device="cpu")
    return (bits & 1).flatten(1)[:, :size].mul(2).sub(1).float().view(len(index), *shape)


def _gaussian(rng: Rng, stream: str, index: Tensor, shape: torch.Size) -> Tensor:
    return rng.normal(stream, index, shape)


def fingerprint(x: Tensor) -> Tensor:
    """A counter for each row from its own numbers, B int64: the same alone and in any batch."""
    return row_hash(x.detach().unsqueeze(-1).flatten(1), "fingerprint")


class Probing(NamedTuple):
    """Where the noise of what is within comes from, and where solves leave their penalties, B each, by name."""

    rng: Rng
    counters: Tensor
    penalties: dict[str, Tensor]
    places: dict[torch.nn.Module, int]

    def place(self, module: torch.nn.Module) -> int:
        """The place of a module among those that asked for theirs: a stream of its own for each."""
        return self.places.setdefault(module, len(self.places))


_probing: ContextVar[Probing | None] = ContextVar("probing", default=None)


@api_export("probing")
@contextmanager
def probing(rng: Rng, index: Tensor) -> Iterator[dict[str, Tensor]]:
    """Within, as around the loss of a training step: estimated volumes draw their noise from rng at index, B int64.

    Yields the penalties of RNODE (kinetic, jacobian), weighted, B each, that the solves with gradients within add up, to be
    added to the loss. Outside, a row's noise hangs on the flow's seed and its own numbers, and no penalty is computed.
    """
    scope = Probing(rng, index, {}, {})
    with probing_again(scope):
        yield scope.penalties


@contextmanager
def probing_again(scope: Probing | None) -> Iterator[None]:
    """Within, what `current_probing` gave elsewhere, as where a forward is computed again."""
    token = _probing.set(scope)
    try:
        yield
    finally:
        _probing.reset(token)


def current_probing() -> Probing | None:
    return _probing.get()


def modules_of(velocity: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every module, with its name, that a velocity is or holds: of a module, a method, a partial, an object, a closure."""
    seen: set[int] = set()
    waiting = [("velocity", velocity)]
    while waiting:
        name, each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.nn.Module):
            yield from ((f"{name}.{inner}" if inner else name, m) for inner, m in each.named_modules())
        elif isinstance(each, tuple | list):
            waiting += [(name, part) for part in each]
        elif callable(each) or is_dataclass(each):
            cells = [cell.cell_contents for cell in getattr(each, "__closure__", None) or ()]
            waiting += [(name, part) for part in (getattr(each, "__self__", None), *cells)]
            waiting += list(getattr(each, "__dict__", {}).items())
            waiting += [(name, getattr(each, part, None)) for part in ("func", "args")]
