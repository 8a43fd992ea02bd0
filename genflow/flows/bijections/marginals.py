"""The marginal of each channel of pictures, to a normal one by its histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.flows.bijections.base import Bijection, per_sample
from genflow.functional import wide
from genflow.registry import bijection_export

TAIL = 0.1  # how fast, in units of x, the density falls beyond [-1, 1]


@bijection_export("marginals")
class Marginals(Bijection):
    """z = Phi^-1(F(x)), element by element, F the distribution of a picture's channel: its marginal becomes N(0, 1).

    The first step of Gaussianization (Chen & Gopinath 2000; Laparra et al. 2011). F has a density that is constant in each
    of `cells` cells of [-1, 1], as uniformly dequantised grey levels have, and falls exponentially beyond. It is counted by
    `initialise` over a batch, half a count added to each cell, and is not trained; at first all cells are alike. Grey
    levels that come often get room in z, where a flow of affine maps would need to stretch them by hundreds.

    Raises UserError for a shape that is no picture's.
    """

    below: Tensor  # channels x cells + 2, the mass in all cells before; the first and the last are the tails
    above: Tensor
    mass: Tensor
    edges: Tensor  # channels x cells + 1, in z

    def __init__(self, shape: Sequence[int], *, cells: int = 256) -> None:
        super().__init__()
        if len(shape) != 3:
            raise UserError(f"marginals are of pictures (channels, height, width), not of {tuple(shape)}")
        if cells < 1:
            raise UserError(f"cells = {cells} are too few; take as many as there are grey levels, 256")
        self.channels, self.cells = shape[0], cells
        for name, width in (("below", cells + 2), ("above", cells + 2), ("mass", cells + 2), ("edges", cells + 1)):
            self.register_buffer(name, torch.empty(self.channels, width))
        self._fit(torch.zeros(self.channels, cells + 2, dtype=torch.float64))

    @torch.no_grad()
    def initialise(self, x: Tensor, condition: Tensor | None = None) -> None:
        """Count the grey levels of a batch."""
        cell = self._cell(x.transpose(0, 1).flatten(1)).cpu()  # some devices have no float64
        count = torch.zeros(self.channels, self.cells + 2, dtype=torch.float64, device="cpu")
        self._fit(count.scatter_add_(1, cell, torch.ones_like(cell, dtype=torch.float64)))

    def _fit(self, count: Tensor) -> None:
        mass = (count + 0.5) / (count + 0.5).sum(1, keepdim=True)
        total = torch.nn.functional.pad(mass.cumsum(1), (1, 0))
        rest = torch.nn.functional.pad(mass.flip(1).cumsum(1).flip(1), (0, 1))
        self.mass.copy_(mass)
        self.below.copy_(total[:, :-1])
        self.above.copy_(rest[:, 1:])
        self.edges.copy_(_quantile(total, rest)[:, 1:-1])

    def _cell(self, x: Tensor) -> Tensor:
        return ((x.detach() + 1) * (self.cells / 2)).floor().clamp(-1, self.cells).nan_to_num(-1).long() + 1

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = self._rows(x)
        z, log = self._map(rows, self._cell(rows))
        return self._pictures(z, x), per_sample(self._pictures(log, x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = self._rows(z)
        cell = torch.searchsorted(self.edges.to(rows.dtype), rows.detach().contiguous(), right=True)
        mass, low = self._at(self.mass, cell), rows < 0
        # The mass below z, or above it: torch's ndtr loses the tails, and abs has no slope at 0.
        side = 0.5 * torch.erfc(torch.where(low, -rows, rows) / math.sqrt(2))
        part = (side - torch.where(low, self._at(self.below, cell), self._at(self.above, cell))) / mass
        part = part.clamp(torch.finfo(part.dtype).tiny, 1)
        x = (cell - 1 + torch.where(low, part, 1 - part)) * (2 / self.cells) - 1
        x = torch.where(cell == 0, -1 + TAIL * torch.where(cell == 0, part, 1.0).log(), x)
        x = torch.where(cell > self.cells, 1 - TAIL * torch.where(cell > self.cells, part, 1.0).log(), x)
        log = self._log_slope(x, rows, cell)
        return self._pictures(x, z), -per_sample(self._pictures(log, z))

    def _map(self, x: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """z and log dz/dx. x, cell: channels x n."""
        left, right = cell == 0, cell > self.cells
        inside = (x + 1) * (self.cells / 2) - (cell - 1)
        beyond = -torch.where(left, -1 - x, torch.where(right, x - 1, 0.0)) / TAIL
        before = torch.where(left, beyond.exp(), torch.where(right, -torch.expm1(beyond), inside))  # of the cell's mass
        after = torch.where(right, beyond.exp(), torch.where(left, -torch.expm1(beyond), 1 - inside))
        mass = self._at(self.mass, cell)
        z = _quantile(self._at(self.below, cell) + before * mass, self._at(self.above, cell) + after * mass)
        return z, self._log_slope(x, z, cell)

    def _log_slope(self, x: Tensor, z: Tensor, cell: Tensor) -> Tensor:
        """log F'(x) - log phi(z)."""
        left, right = cell == 0, cell > self.cells
        beyond = torch.where(left, -1 - x, torch.where(right, x - 1, 0.0)) / TAIL
        width = torch.where(left | right, TAIL, 2 / self.cells)
        return (self._at(self.mass, cell) / width).log() - beyond + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)

    def _rows(self, x: Tensor) -> Tensor:
        """B x C x H x W -> C x B H W, in float32 or wider."""
        return wide(x).transpose(0, 1).flatten(1)

    def _pictures(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.view(like.shape[1], like.shape[0], *like.shape[2:]).transpose(0, 1)

    def _at(self, table: Tensor, cell: Tensor) -> Tensor:
        return table.gather(1, cell)


def _quantile(below: Tensor, above: Tensor) -> Tensor:
    """Phi^-1(below), below + above = 1, from the smaller of the two: exact in both tails, but finite."""
    low = below < above
    z = torch.special.ndtri(torch.where(low, below, above).clamp(min=torch.finfo(below.dtype).tiny))
    return torch.where(low, z, -z)
