"""Plots of decoding: which tokens of a picture each pass of the model settled."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from genflow.errors import UserError
from genflow.evaluation.plots import ACCENT, COLUMNS, INK, _figure, _pixels, styled
from genflow.registry import api_export

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIDDEN = 0.93  # the grey of tokens that are not settled


@api_export("plot_passes")
@styled
def plot_passes(pictures: Tensor, passes: Tensor, grid: tuple[int, int], captions: Sequence[str]) -> Figure:
    """For each picture a row: after some of the passes, the tokens settled by then, those of the last passes outlined.

    Guesses that held are outlined in red, tokens that the model drew itself, the last of each pass, in black. pictures:
    B x C x H x W in [-1, 1]; passes: B x h w, the pass that settled each token, from 1 on (`Decoded`); at most COLUMNS of
    them are shown. Raises UserError for anything but 1 or 3 channels.
    """
    from matplotlib.patches import Rectangle

    if pictures.shape[1] not in (1, 3):
        raise UserError(f"a strip shows pictures of 1 or 3 channels, and these have {pictures.shape[1]}")
    rows, most = len(captions), int(passes.max())
    columns = np.unique(np.linspace(1, most, min(most, COLUMNS)).round().astype(int))
    cell = pictures.shape[2] // grid[0], pictures.shape[3] // grid[1]
    figure = _figure(0.95 * len(columns) + 1.4, 1.05 * rows + 0.25)
    figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0, wspace=0)  # type: ignore[union-attr, call-arg]
    for row, (line, caption) in enumerate(
        zip(figure.subplots(rows, len(columns), squeeze=False), captions, strict=True)
    ):
        when, picture = passes[row].numpy(), _pixels(pictures[row])
        drawn = np.append(when[1:] != when[:-1], True)
        for axes, before, column in zip(line, [0, *columns], columns):
            settled = np.kron((when <= column).reshape(grid), np.ones(cell, bool))
            axes.imshow(np.where(settled[..., None], picture, HIDDEN), interpolation="nearest")
            for token in np.flatnonzero((when > before) & (when <= column)):
                y, x = divmod(int(token), grid[1])
                ink = INK if drawn[token] else ACCENT
                corner = (x * cell[1] - 0.5, y * cell[0] - 0.5)
                axes.add_patch(Rectangle(corner, cell[1], cell[0], fill=False, edgecolor=ink, linewidth=0.7))
            axes.set(xticks=[], yticks=[], anchor="W")  # where the layout takes the words beside it to be
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(f"pass {column}", fontsize=8, fontweight="normal", loc="center")
        text = "\n".join(textwrap.wrap(caption, 18, max_lines=3, placeholder="…"))
        line[0].annotate(
            f"{text}\n{len(when)} tokens, {when.max()} passes",
            (-0.08, 0.5),
            xycoords="axes fraction",
            ha="right",
            va="center",
            fontsize=7,
        )
    return figure
