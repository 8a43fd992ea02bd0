"""First-block caching: steps of a solve in which a network would say much the same are not computed. LOSSY.

First Block Cache (ParaAttention, github.com/chengzeyi/ParaAttention), a simpler TeaCache (Liu et al. 2024, arXiv
2411.19108): what the first block adds tells, at the cost of one block, how much all others would change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class FirstBlockCache:
    """What one solve remembers. Each sample decides for itself, so that it does not depend on its batch mates.

    A sample takes what the blocks after the first added when they were last computed for it, where
    mean |first - first then| < threshold mean |first then|, first being what the first block adds to the picture's tokens.
    A batch of another shape begins anew. blocks, skipped: of all samples so far, blocks asked for and not computed.
    """

    threshold: float
    blocks: int = 0
    skipped: int = 0
    _first: Tensor | None = field(default=None, init=False, repr=False)
    _rest: Tensor | None = field(default=None, init=False, repr=False)

    def __call__(self, x: Tensor, first: Tensor, rest: Callable[[Tensor | slice], Tensor], depth: int) -> Tensor:
        """The tokens after all blocks.

        x, first: B x L x hidden, before and after the first block; rest: the tokens of those rows after `depth` more
        blocks. Waits for the device, to know how many rows there are to compute.
        """
        added = first - x
        self.blocks += len(x) * (depth + 1)
        if self._first is None or self._rest is None or self._first.shape != added.shape:
            out = rest(slice(None))
            self._first, self._rest = added, out - first
            return out
        size = self._first.abs().mean((1, 2), dtype=torch.float32)
        change = (added - self._first).abs().mean((1, 2), dtype=torch.float32)
        rows = (~(change < self.threshold * size)).nonzero()[:, 0]  # NaN is computed
        self.skipped += (len(x) - len(rows)) * depth
        out = first + self._rest
        if len(rows):
            fresh = rest(rows)
            self._first[rows], self._rest[rows], out[rows] = added[rows], fresh - first[rows], fresh
        return out
