"""Which keys each query may attend to: one description, which every backend lowers to what it takes.

A query that may attend to no key at all gets zeros, and sends no gradient anywhere; so say all backends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from genflow.errors import UserError
from genflow.native.library import untransformed
from genflow.registry import api_export

T = TypeVar("T")
Live = Callable[[Any, Any, Any, Any], Tensor]
KINDS = ("none", "causal", "keys", "segments", "tree", "dense")  # joined by "+", in this order, where they meet


@api_export("Mask")
@dataclass(frozen=True, eq=False)
class Mask:
    """What attention may look at: a key is live for a query where every part that is set says so; `a & b` has both.

    causal: query i sees the keys up to Lk - Lq + i: the last query sees the last key, also where keys are cached.
    keys: B x Lk bool, True = live (padding is False).
    segments: B x L integers, Lq = Lk = L: a token sees its own segment (sequences packed side by side); negative: padding.
    tree: N or B x N integers, N = Lq: queries and the last N keys are nodes, each with the index of its parent, -1 for a
    root; a node sees all keys before the tree, its ancestors and itself (speculative decoding).
    dense: bool, broadcast to B x heads x Lq x Lk.

    The tensors are not to be changed afterwards: what a backend makes of them is kept, for the next layers.
    """

    causal: bool = False
    keys: Tensor | None = None
    segments: Tensor | None = None
    tree: Tensor | None = None
    dense: Tensor | None = None
    kind: str = field(init=False)  # the parts that are set, as in "causal+keys"; "none" where there is no part
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        parts = (self.causal or None, self.keys, self.segments, self.tree, self.dense)
        for name, part in zip(KINDS[2:], parts[1:]):
            if part is not None and not isinstance(part, Tensor):
                raise UserError(f"mask.{name} is a {type(part).__name__}, not a tensor")
        kind = "+".join([name for name, part in zip(KINDS[1:], parts) if part is not None])
        object.__setattr__(self, "kind", kind or "none")

    def __and__(self, other: Mask) -> Mask:
        for name in ("segments", "tree"):
            if getattr(self, name) is not None and getattr(other, name) is not None:
                raise UserError(f"masks: both sides of & have {name}; write one of them as dense")
        return Mask(
            self.causal or other.causal,
            _both(self.keys, other.keys),
            self.segments if other.segments is None else other.segments,
            self.tree if other.tree is None else other.tree,
            _both(self.dense, other.dense),
        )

    def check(self, batch: int, heads: int, lq: int, lk: int) -> None:
        """Raises UserError where a part does not fit q: batch x heads x lq x head_dim and lk keys."""
        keys, segments, tree, dense = self.keys, self.segments, self.tree, self.dense
        if keys is not None and (keys.dtype != torch.bool or keys.shape != (batch, lk)):
            raise UserError(f"mask.keys is {_describe(keys)}, not bool {batch} x {lk} (batch x keys)")
        if segments is not None and (not _integers(segments) or segments.shape != (batch, lq) or lq != lk):
            raise UserError(f"mask.segments is {_describe(segments)}, not integers {batch} x {lq} for {lk} keys")
        if tree is not None and (not _integers(tree) or tree.shape not in ((lq,), (batch, lq)) or lq > lk):
            raise UserError(f"mask.tree is {_describe(tree)}, not integers {lq} or {batch} x {lq} for {lk} keys")
        if dense is not None and (dense.dtype != torch.bool or not _fits(dense, (batch, heads, lq, lk))):
            raise UserError(f"mask.dense is {_describe(dense)}, not bool that fits {batch} x {heads} x {lq} x {lk}")

    def live(self, lq: int, lk: int) -> Live:
        """(b, h, i, j) -> whether query i of head h of sample b may attend to key j.

        The arguments are index tensors that broadcast against each other: scalars as flex_attention has them, or whole
        axes. This is the definition that all else follows.
        """
        keys, segments = self.keys, self.segments
        dense = None if self.dense is None else self.dense[(None,) * (4 - self.dense.ndim)]
        tree = None if self.tree is None else self.kept("ancestors", lambda: _ancestors(self.tree))

        def live(b: Any, h: Any, i: Any, j: Any) -> Tensor:
            parts = []
            if self.causal:
                parts.append(i + (lk - lq) >= j)
            if keys is not None:
                parts.append(keys[b, j])
            if segments is not None:
                parts.append((segments[b, i] == segments[b, j]) & (segments[b, j] >= 0))
            if tree is not None:
                node = j - (lk - lq)
                parts.append((node < 0) | tree[b if len(tree) > 1 else 0, i, node.clamp(min=0)])
            if dense is not None:
                at = (x if size > 1 else 0 for x, size in zip((b, h, i, j), dense.shape, strict=True))
                parts.append(dense[tuple(at)])
            result = parts.pop()
            for part in parts:
                result = result & part
            return result

        return live

    def block(self, like: Tensor, rows: range, columns: range, lq: int, lk: int) -> Tensor | None:
        """Bool, of four axes, broadcast to B x heads x len(rows) x len(columns): these queries, these keys; None: all live.

        like: B x heads x ..., for its first two axes and its device.
        """
        if self.kind == "none" or (self.kind == "causal" and columns[-1] <= rows[0] + lk - lq):
            return None
        b, h, i, j = (
            torch.arange(axis.start, axis.stop, device=like.device).view(shape)
            for axis, shape in (
                (range(like.shape[0]), (-1, 1, 1, 1)),
                (range(like.shape[1]), (-1, 1, 1)),
                (rows, (-1, 1)),
                (columns, (-1,)),
            )
        )
        live = self.live(lq, lk)(b, h, i, j)
        return live[(None,) * (4 - live.ndim)]  # torch's fused kernels take no mask of three axes

    def full(self, like: Tensor, lq: int, lk: int) -> Tensor | None:
        """Bool, broadcast to B x heads x lq x lk, for backends that take no other description; None: all live."""
        if self.kind == "keys":
            assert self.keys is not None
            return self.keys[:, None, None, :]
        if self.kind == "dense":
            assert self.dense is not None
            return self.dense[(None,) * (4 - self.dense.ndim)]
        if torch.compiler.is_compiling():
            return self.block(like, range(lq), range(lk), lq, lk)
        return self.kept(("full", lq, lk, like.device), lambda: self.block(like, range(lq), range(lk), lq, lk))

    def packing(self, batch: int, lq: int, lk: int, device: torch.device) -> Packing:
        """The same as sequences of their own, end to end. For the parts keys and segments (causal is the kernel's)."""
        return self.kept(("packing", batch, lq, lk, device), lambda: _packing(self, batch, lq, lk, device))

    def kept(self, what: Hashable, make: Callable[[], T]) -> T:
        """What a backend made of this mask, made once; in a trace or transform, which would stay in it, every time."""
        if not untransformed():
            return make()
        if what not in self._kept:
            self._kept[what] = make()
        return self._kept[what]


NONE = Mask()


class Packing(NamedTuple):
    """Where the tokens of packed sequences lie: indices into B * L, sequence after sequence, and where each begins.

    A query without a live key is left out, and so is its sequence: kernels have crashed on empty ones
    (Dao-AILab/flash-attention#2562), and left gradients unset behind the last (pytorch/pytorch#176793).
    """

    q: Tensor
    k: Tensor
    q_lengths: list[int]
    k_lengths: list[int]
    q_starts: Tensor  # int32, one more than there are sequences: the last is the end
    k_starts: Tensor


def packed(q: Tensor, k: Tensor, v: Tensor, mask: Mask, kernel: Callable[..., Tensor]) -> Tensor:
    """Attention by a kernel of packed sequences: kernel(q, k, v, packing), each tokens x heads x head_dim."""
    batch, heads, lq, dim = q.shape
    packing = mask.packing(batch, lq, k.shape[2], q.device)
    q = q.transpose(1, 2).flatten(0, 1)[packing.q]
    k, v = (x.transpose(1, 2).flatten(0, 1)[packing.k] for x in (k, v))
    o = kernel(q, k, v, packing) if len(packing.q_lengths) else q
    return o.new_zeros(batch * lq, heads, dim).index_copy(0, packing.q, o).unflatten(0, (batch, lq)).transpose(1, 2)


def _packing(mask: Mask, batch: int, lq: int, lk: int, device: torch.device) -> Packing:
    sample = torch.arange(batch, device=device)[:, None]
    q_group, k_group = sample.expand(batch, lq), sample.expand(batch, lk)
    if (segments := mask.segments) is not None:
        q_group = torch.stack([sample.expand_as(segments), segments.long()], -1).flatten(0, 1)
        q_group = q_group.unique(dim=0, return_inverse=True)[1].view(batch, lq).masked_fill(segments < 0, -1)
        k_group = q_group
    if mask.keys is not None:
        k_group = k_group.masked_fill(~mask.keys, -1)
    q_group, k_group = q_group.flatten(), k_group.flatten()
    groups = batch * max(lq, lk)
    k_count = torch.bincount(k_group[k_group >= 0], minlength=groups)
    q_group = q_group.masked_fill(k_count[q_group.clamp(min=0)] == 0, -1)
    q_count = torch.bincount(q_group[q_group >= 0], minlength=groups)
    alive = q_count > 0

    def order(group: Tensor) -> Tensor:
        at = group.argsort(stable=True)
        return at[group[at] >= 0]

    starts = (F.pad(count[alive].cumsum(0), (1, 0)).int() for count in (q_count, k_count))
    return Packing(order(q_group), order(k_group), q_count[alive].tolist(), k_count[alive].tolist(), *starts)


def _ancestors(parents: Tensor | None) -> Tensor:
    """parents: N or B x N -> 1 or B x N x N bool, whether node j is node i or above it; by doubling the known paths."""
    assert parents is not None
    n = parents.shape[-1]
    nodes = torch.arange(n, device=parents.device)
    above = (parents.reshape(-1, n, 1) == nodes) | (nodes[:, None] == nodes)
    for _ in range(n.bit_length()):
        above = (above.float() @ above.float()) > 0
    return above


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return (b if a is None else a) if a is None or b is None else a & b


def _integers(x: Tensor) -> bool:
    return not (x.dtype == torch.bool or x.is_floating_point() or x.is_complex())


def _fits(x: Tensor, shape: tuple[int, ...]) -> bool:
    return x.ndim <= len(shape) and all(a in (1, b) for a, b in zip(reversed(x.shape), reversed(shape)))


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype)[6:]} {' x '.join(map(str, x.shape))}"
