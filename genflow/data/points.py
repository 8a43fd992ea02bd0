"""Pictures of points in the plane, drawn without matplotlib: histograms of data and samples side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from genflow.data.pictures import Picture
from genflow.errors import UserError
from genflow.registry import api_export

Extent = tuple[float, float, float, float]  # left, right, bottom, top
LogDensity = Callable[[Tensor], Tensor]  # N x 2 -> N nats
RAMP = ("#ffffff", "#d3e4f3", "#93c1de", "#4f94c8", "#2660a4", "#17366e", "#0b1238")  # from no density to the most
GAMMA = 0.6  # of the colours: thin bridges between modes should show
CHUNK = 8192  # places at which a density is asked at a time


@api_export("extent_of")
def extent_of(points: Tensor, margin: float = 0.15) -> Extent:
    """A square that holds all but the farthest thousandth of N x 2 points, and a margin, a part of its side.

    Raises UserError where no point is finite.
    """
    points = plane(points)
    points = points[points.isfinite().all(1)]
    if not len(points):
        raise UserError("none of the points is finite, so there is nothing to draw")
    low, high = np.quantile(points.numpy(), (0.0005, 0.9995), axis=0)
    half = max(float((high - low).max()) / 2, 1e-3) * (1 + 2 * margin)
    x, y = ((low + high) / 2).tolist()
    return x - half, x + half, y - half, y + half


def plane(points: Tensor) -> Tensor:
    """The first two numbers of each of N x D points, float64 on the CPU; of one number, on the line y = 0."""
    if points.dim() != 2 or not points.shape[1]:
        raise UserError(f"points are N x D, not {tuple(points.shape)}")
    points = points.detach().cpu().double()
    return points[:, :2] if points.shape[1] > 1 else torch.cat([points, torch.zeros_like(points)], 1)


@api_export("histogram_2d")
def histogram_2d(points: Tensor, extent: Extent, bins: int) -> Tensor:
    """How densely points lie in each of bins x bins cells: a density, the top row first. Those outside count as points."""
    left, right, bottom, top = extent
    points = plane(points)
    points = points[points.isfinite().all(1)]
    counts, _, _ = np.histogram2d(-points[:, 1], points[:, 0], bins=bins, range=[[-top, -bottom], [left, right]])
    return torch.from_numpy(counts) / max(len(points), 1) / ((right - left) * (top - bottom) / bins**2)


@api_export("density_2d")
def density_2d(log_prob: LogDensity, extent: Extent, bins: int) -> Tensor:
    """exp(log_prob) at the middles of bins x bins cells, the top row first; float64."""
    left, right, bottom, top = extent
    middle = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    y, x = torch.meshgrid(top - (top - bottom) * middle, left + (right - left) * middle, indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()], 1).float()
    with torch.no_grad():
        log_p = torch.cat([log_prob(part).cpu().double() for part in places.split(CHUNK)])
    return log_p.exp().view(bins, bins)


def brightest(density: Tensor) -> float:
    """The density that the end of the ramp stands for: all but a hundredth of the filled cells lie below it."""
    filled = density[density > 0]
    return float(np.quantile(filled.numpy(), 0.99)) if len(filled) else 1.0


def shade(
    density: Tensor,
    top: float,
    side: int,
    resample: Image.Resampling = Image.Resampling.NEAREST,
    *,
    levels: int = 256,
) -> Image.Image:
    """A density as a square picture, a palette of the colours of RAMP. levels: how many of its 256 are used."""
    level = (density / top).nan_to_num(0).clamp(0, 1).pow(GAMMA) * 255
    image = Image.fromarray(level.round().to(torch.uint8).numpy()).resize((side, side), resample)
    image = image.point([round(round(i / 255 * (levels - 1)) / (levels - 1) * 255) for i in range(256)])
    anchors = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in RAMP])
    at = np.linspace(0, 255, len(RAMP))
    palette = np.stack([np.interp(np.arange(256), at, anchors[:, i]) for i in range(3)], 1)
    image.putpalette(palette.round().astype(np.uint8).tobytes())
    return image


@api_export("point_picture")
def point_picture(
    panels: Tensor | Mapping[str, Tensor],
    density: LogDensity | None = None,
    *,
    extent: Extent | None = None,
    side: int = 256,
    settings: Mapping[str, object] | None = None,
) -> Picture:
    """Histograms of points side by side, each over its name, in one scale of colours; then their exact density.

    panels: N x D points by name, such as data and samples, or samples alone; the first gives the extent. D = 2; of more,
    the first two numbers are drawn, of one, a stripe. density: the log density, as a last panel. side: of a panel, pixels.
    Under a panel stand the points that are not on it, or not finite. Raises UserError where there is nothing to draw.
    """
    panels = {"samples": panels} if isinstance(panels, Tensor) else panels
    if not panels or not min(map(len, panels.values())):
        raise UserError("there are no points to draw")
    first = next(iter(panels.values()))
    extent = extent or extent_of(first)
    shades = {f"{name}{_missing(points, extent)}": _cells(points, extent) for name, points in panels.items()}
    if density is not None:
        shades["density"] = density_2d(density, extent, side)
    top = brightest(shades["density"] if density is not None else next(iter(shades.values())))
    pad, line, font = 8, 16, ImageFont.load_default(11)
    sheet = Image.new("RGB", (len(shades) * (side + pad) + pad, side + 2 * pad + line), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, cells) in enumerate(shades.items()):
        left = pad + i * (side + pad)
        sheet.paste(shade(cells, top, side), (left, pad))
        draw.rectangle((left - 1, pad - 1, left + side, pad + side), outline="#c8c8c8")
        draw.text((left + side / 2, pad + side + 4), name, fill="black", font=font, anchor="ma")
    return Picture(sheet, settings or {})


def bins_for(points: Tensor) -> int:
    """Cells on a side of a histogram: the more points, the finer."""
    return 32 if len(points) < 2000 else 64 if len(points) < 20_000 else 128


def _cells(points: Tensor, extent: Extent) -> Tensor:
    bins = bins_for(points)
    cells = histogram_2d(points, extent, bins)
    return cells if points.shape[1] > 1 else cells.mean(0).expand(bins, bins)


def _missing(points: Tensor, extent: Extent) -> str:
    """What a panel does not show, in words, where that is more than one in a hundred, or not finite."""
    points = plane(points)
    finite = points.isfinite().all(1)
    left, right, bottom, top = extent
    x, y = points.unbind(1)
    outside = float((finite & ~((left <= x) & (x <= right) & (bottom <= y) & (y <= top))).double().mean())
    words = [f"{outside:.0%} outside"] if outside > 0.01 else []
    words += [f"{int((~finite).sum())} not finite"] if not finite.all() else []
    return f" ({', '.join(words)})" if words else ""
