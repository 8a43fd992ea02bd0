"""The keys and values of what causal transformers have read: preallocated, cut back at will, each row at its own length."""

from __future__ import annotations

import torch
from torch import Tensor

from genflow.attention import Mask
from genflow.errors import UserError
from genflow.functional import sent


class KeyValueCache:
    """The keys and values of the first tokens of B sequences, in room made once for all of them.

    tensor: layers x 2 x B x heads x room x head_dim, keys then values. length: how many tokens are kept, of the longest row.
    `open` makes room for a window of more tokens, `extend` writes those of each layer there; `mask` then says what they see.
    Rows of one length go the fast way, by slices and a causal mask; others by indices and a mask of their own.
    """

    def __init__(self, layers: int, rows: int, heads: int, room: int, head_dim: int, like: Tensor) -> None:
        self.tensor = like.new_zeros(layers, 2, rows, heads, room, head_dim)  # a masked NaN would still spread
        self.length = 0
        self.mask = self._causal = Mask(causal=True)  # keeps what backends make of it as long as the cache lives
        self._lengths: Tensor | None = None  # of the rows, where they differ
        self._before: int | Tensor = 0  # the lengths when the window was opened, B x 1 where they differed
        self._width = 0  # of the window
        self._at: Tensor | None = None  # where each of the window's tokens goes, B x W, where rows differ
        self._trees: dict[int, tuple[Tensor, Mask, Tensor]] = {}  # by the identity of their parents

    @property
    def lengths(self) -> Tensor:
        """How many tokens of each row are kept: B int64 on the CPU."""
        rows = self.tensor.shape[2]
        return torch.full((rows,), self.length, device="cpu") if self._lengths is None else self._lengths

    def open(self, width: int, parents: Tensor | None = None) -> Tensor | int:
        """Make room for `width` tokens more of each row, which then count as kept. Returns where they stand.

        parents: of a window that is a tree (see Mask.tree), width int64 on the device. Returns the place of the first, where
        rows are alike and the window is in a row; otherwise that of each token, B or 1 x width, by its depth in a tree.
        """
        if self.length + width > self.tensor.shape[4]:
            self._grow(self.length + width)
        before, self.length, self._width = self.length, self.length + width, width
        if self._lengths is None:
            self._before, self._at = before, None
            if parents is None:
                self.mask = self._causal
                return before
            _, self.mask, related = self._tree(parents)
            return before + related.sum(1)[None] - 1
        device = self.tensor.device
        self._before = start = sent(self._lengths, device)[:, None]
        self._lengths = self._lengths + width
        window = torch.arange(width, device=device)
        self._at = start + window
        related = window[:, None] >= window if parents is None else self._tree(parents)[2]
        beyond = torch.arange(self.length, device=device) - start  # B x keys, from 0 on in the window
        seen = related[:, beyond.clamp(0, width - 1)].transpose(0, 1) & (beyond < width)[:, None]
        self.mask = Mask(dense=(seen | (beyond < 0)[:, None])[:, None])
        return start + related.sum(1) - 1

    def extend(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Write the window's keys and values, 2 x B x heads x W x head_dim; returns those of all tokens, up to its end."""
        room = self.tensor[layer]  # of which a compiler makes one graph for all layers
        if self._at is None:
            room[:, :, :, self.length - kv.shape[3] : self.length] = kv
        else:
            room.scatter_(3, self._at[None, :, None, :, None].expand(kv.shape), kv.to(room.dtype))
        k, v = room[:, :, :, : self.length].unbind()
        return k, v

    def truncate(self, lengths: int | Tensor) -> None:
        """Forget all but the first tokens: as many of every row, or of each row, B int64 on the CPU."""
        if isinstance(lengths, Tensor):
            if bool(((lengths < 0) | (lengths > self.lengths)).any()):
                raise UserError(
                    f"truncate: the cache has {self.lengths.tolist()} tokens, not {lengths.tolist()} or more"
                )
            low, high = (int(end) for end in lengths.aminmax()) if len(lengths) else (0, 0)
            self._lengths, self.length = (None if low == high else lengths.clone()), high
            return
        shortest = self.length if self._lengths is None else int(self._lengths.min())
        if not 0 <= lengths <= shortest:
            raise UserError(f"truncate: the cache has {shortest} tokens, so it cannot keep the first {lengths}")
        self._lengths, self.length = None, lengths

    def gather(self, path: Tensor) -> None:
        """Of the last window keep the tokens of a path alone, B x D indices into it, as if they had come in a row."""
        width = path.shape[1]
        start = self._before if isinstance(self._before, Tensor) else torch.full_like(path[:, :1], self._before)
        shape = (*self.tensor.shape[:4], width, self.tensor.shape[5])
        source, target = (
            (start + at)[None, None, :, None, :, None].expand(shape)
            for at in (path, torch.arange(width, device=path.device))
        )
        self.tensor.scatter_(4, target, self.tensor.gather(4, source))
        self.truncate(self.lengths - self._width + width)

    def _tree(self, parents: Tensor) -> tuple[Tensor, Mask, Tensor]:
        """The parents, their mask, and which node is which one's ancestor or itself, W x W bool."""
        if id(parents) not in self._trees:
            mask, nodes = Mask(tree=parents), range(len(parents))
            related = mask.block(parents[None, None], nodes, nodes, len(nodes), len(nodes))
            assert related is not None
            self._trees[id(parents)] = parents, mask, related.view(len(nodes), len(nodes))
        return self._trees[id(parents)]

    def _grow(self, room: int) -> None:
        more = self.tensor.new_zeros(*self.tensor.shape[:4], room - self.tensor.shape[4], self.tensor.shape[5])
        self.tensor = torch.cat([self.tensor, more], 4)
