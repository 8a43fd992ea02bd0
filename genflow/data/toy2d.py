"""Densities in the plane that people know by sight, and a picture as one: points with captions, and their exact log p."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from genflow.data.images import BadImage, decode
from genflow.data.vectors import SPLITS, VectorDataset
from genflow.errors import UserError, nearest
from genflow.functional import Rng
from genflow.registry import api_export, dataset_export

Curve = Callable[[Tensor, Tensor], Tensor]  # which of the curves, N, and how far along it, N in 0 .. 1 -> N x 2
NOISE = (0.01, 0.5)  # what can be asked for: less needs too many nodes, more hides the shape
SIDE = 512  # pixels of a picture taken as a density, at most
EDGE = 2**-14  # of a pixel's side, that rounding to float32 must not carry a point over
FAINT = 1e-280  # a density near underflow
ROOM = 2**22  # numbers of a quadrature at a time


@api_export("PlaneDensity")
class PlaneDensity(ABC):
    """A density of points in the plane, centred, of standard deviation 1 over both coordinates together.

    classes: the names of its parts, all equally probable.
    """

    classes: tuple[str, ...]

    @abstractmethod
    def draw(self, uniform: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Points from randomness. uniform: N x 3 inside (0, 1), normal: N x 2. Returns N x 2, and N class numbers."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Nats. x: N x 2 -> N float64 on the CPU; -inf where there is nothing."""


class Curves(PlaneDensity):
    """Gaussian noise around points of curves: p(x) = mean over curves of the integral over u of N(x; c(u), noise^2 I).

    The integral is a Gauss-Legendre sum whose panels of 16 nodes are at most 8 times as long as the noise is wide: exact
    to about 1e-9. For curves that are points, Gaussians, it is the closed form.
    """

    def __init__(self, curve: Curve, classes: tuple[str, ...], noise: float) -> None:
        self.classes, self.curve, self.noise = classes, curve, noise
        u, weight = _legendre(64)
        raw = self._along(u)
        self.centre = (raw * weight[:, None]).sum(1).mean(0)
        variance = ((raw - self.centre).square() * weight[:, None]).sum(1).mean()
        self.scale = ((1 - noise**2) / variance).sqrt()
        speed = float((raw.diff(dim=1).norm(dim=2) / u.diff()).max() * self.scale)
        u, weight = _legendre(math.ceil(speed / noise / 8))
        self.nodes = ((self._along(u) - self.centre) * self.scale).flatten(0, 1)
        self.log_weight = (weight / len(classes)).log().repeat(len(classes))

    def _along(self, u: Tensor) -> Tensor:
        """All curves at the same places: K x N x 2."""
        return torch.stack([self.curve(torch.full_like(u, k), u) for k in range(len(self.classes))])

    def draw(self, uniform: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        which = (uniform[:, 0] * len(self.classes)).floor()
        points = (self.curve(which, uniform[:, 1]) - self.centre) * self.scale
        return points + self.noise * normal, which.long()

    def log_prob(self, x: Tensor) -> Tensor:
        rows = (x.cpu().double() / self.noise).split(max(ROOM // len(self.nodes), 1))
        nodes = self.nodes / self.noise
        at_nodes = self.log_weight - nodes.square().sum(1) / 2
        log_p = [torch.logsumexp(at_nodes + r @ nodes.T, 1) - r.square().sum(1) / 2 for r in rows]
        return torch.cat(log_p) - math.log(2 * math.pi * self.noise**2)


def _legendre(panels: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of a composite Gauss-Legendre rule on 0 .. 1, 16 nodes a panel; of no panel, the middle."""
    if panels == 0:
        return torch.tensor([0.5], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    at, weight = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(16))
    u = (torch.arange(panels).double()[:, None] + (at + 1) / 2) / panels
    return u.flatten(), (weight / 2 / panels).repeat(panels)


class Pixels(PlaneDensity):
    """A picture: each pixel with the probability of its weight, uniform inside it, plus Gaussian noise (0 is none).

    weight: H x W, not negative, the top row first. classes: one for all, or one for each pixel that is not empty.
    """

    def __init__(self, weight: Tensor, classes: tuple[str, ...], noise: float) -> None:
        self.classes, self.noise = classes, noise
        self.p = weight.double() / weight.double().sum()
        height, width = self.p.shape
        down, right = torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5
        rows, columns = self.p.sum(1), self.p.sum(0)
        top, left = (rows * down).sum(), (columns * right).sum()  # the centre, in pixels
        variance = (rows * (down - top).square()).sum() + (columns * (right - left).square()).sum()
        self.side = float(((1 - noise**2) / (variance / 2 + 1 / 12)).sqrt())
        self.x = (torch.arange(width + 1) - left) * self.side  # edges of the pixels, to the right
        self.y = (top - torch.arange(height + 1)) * self.side  # and from the top down
        self.filled = self.p.flatten().nonzero().squeeze(1)
        self.upto = self.p.flatten()[self.filled].cumsum(0)

    def draw(self, uniform: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.searchsorted(self.upto, uniform[:, 0].contiguous()).clamp(max=len(self.filled) - 1)
        row, column = self.filled[place] // self.p.shape[1], self.filled[place] % self.p.shape[1]
        corner = torch.stack([self.x[column], self.y[row + 1]], 1)
        which = place if len(self.classes) > 1 else torch.zeros_like(place)
        within = uniform[:, 1:].clamp(EDGE, 1 - EDGE)
        return corner + self.side * within + self.noise * normal, which

    def log_prob(self, x: Tensor) -> Tensor:
        x = x.cpu().double()
        if self.noise == 0:
            column = torch.searchsorted(self.x, x[:, 0].contiguous(), right=True) - 1
            row = torch.searchsorted(-self.y, -x[:, 1].contiguous(), right=True) - 1
            inside = (row >= 0) & (row < self.p.shape[0]) & (column >= 0) & (column < self.p.shape[1])
            p = torch.where(inside, self.p[row * inside, column * inside], 0.0)
        else:  # the noise blurs along each axis by itself
            across, down = self._log_mass(x[:, :1] - self.x), self._log_mass(x[:, 1:] - self.y.flip(0)).flip(1)
            p = ((down.exp() @ self.p) * across.exp()).sum(1)
            if len(far := (p < FAINT).nonzero().squeeze(1)):
                return (p / self.side**2).log().index_copy(0, far, self._far(across[far], down[far]))
        return (p / self.side**2).log()

    def _far(self, across: Tensor, down: Tensor) -> Tensor:
        """The log density from the logs of the masses, where the masses themselves would be 0."""
        width, log_p = self.p.shape[1], self.p.flatten()[self.filled].log()
        rows = zip(*(each.split(max(ROOM // len(log_p), 1)) for each in (across, down)), strict=True)
        log = [(log_p + a[:, self.filled % width] + d[:, self.filled // width]).logsumexp(1) for a, d in rows]
        return torch.cat(log) - 2 * math.log(self.side)

    def _log_mass(self, from_edges: Tensor) -> Tensor:
        """The log of how much of a Gaussian around a point lies between neighbouring edges. N x K + 1, falling -> N x K."""
        high, low = from_edges[:, :-1] / self.noise, from_edges[:, 1:] / self.noise
        flip = low > 0  # both far out in the upper tail, where differences of ndtr cancel
        high, low = torch.where(flip, -low, high), torch.where(flip, -high, low)
        log_high = torch.special.log_ndtr(high)
        below = (torch.special.log_ndtr(low) - log_high).nan_to_num(-math.inf)  # both are -inf at the ends of float64
        return log_high + (-torch.expm1(below)).log()


class Pinwheel(PlaneDensity):
    """Five blades, Gaussians far out, each turned by an angle that grows with its radius.

    After Johnson et al. 2016 (arXiv 1603.06277), but for the angle's hanging on the radius: such a turn keeps areas, so
    the density is that of the Gaussians, exactly. noise: the standard deviation across a blade.
    """

    blades, along, curl = 5, 0.4, 1.2

    def __init__(self, noise: float) -> None:
        self.classes = tuple(f"blade {k}" for k in range(self.blades))
        self.noise = noise
        self.out = math.sqrt(2 - self.along**2 - noise**2)  # the mean square of a coordinate is then 1

    def draw(self, uniform: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        which = (uniform[:, 0] * self.blades).floor()
        flat = torch.stack([self.out + self.along * normal[:, 0], self.noise * normal[:, 1]], 1)
        return self._turn(flat, which, 1), which.long()

    def log_prob(self, x: Tensor) -> Tensor:
        x = x.cpu().double()
        flat = torch.stack([self._turn(x, x.new_tensor(k), -1) for k in range(self.blades)])
        squares = ((flat[..., 0] - self.out) / self.along).square() + (flat[..., 1] / self.noise).square()
        return torch.logsumexp(-squares / 2, 0) - math.log(self.blades * 2 * math.pi * self.along * self.noise)

    def _turn(self, x: Tensor, which: Tensor, sign: int) -> Tensor:
        angle = sign * (2 * math.pi * which / self.blades + self.curl * x.norm(dim=1))
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], 1)


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def _moons(which: Tensor, u: Tensor) -> Tensor:
    """Two half circles, one in the other's mouth (scikit-learn's make_moons)."""
    arc = _polar(1.0, math.pi * u)
    return torch.where(which[:, None] == 0, arc, torch.tensor([1.0, 0.5]) - arc)


def _rings(which: Tensor, u: Tensor) -> Tensor:
    return _polar(1 + which, 2 * math.pi * u)


def _gaussians(which: Tensor, _u: Tensor) -> Tensor:
    return _polar(1.0, math.pi / 4 * which)


def _swissroll(_which: Tensor, u: Tensor) -> Tensor:
    angle = 1.5 * math.pi * (1 + 2 * u)
    return _polar(angle, angle)


def _spirals(which: Tensor, u: Tensor) -> Tensor:
    """Two arms, their angle as the root of u: about as many points in each piece of an arm."""
    angle = (0.04 + 0.96 * u).sqrt() * 3 * math.pi
    return _polar(angle, angle + math.pi * which)


CURVES: dict[str, tuple[Curve, int, str, float]] = {  # the curve, how many, what one is called, its noise
    "moons": (_moons, 2, "moon", 0.07),
    "rings": (_rings, 4, "ring", 0.05),
    "gaussians8": (_gaussians, 8, "gaussian", 0.15),
    "swissroll": (_swissroll, 1, "roll", 0.06),
    "spirals": (_spirals, 2, "arm", 0.06),
}


@dataset_export("toy2d")
@dataclass(frozen=True)
class Toy2DConfig:
    """Points in the plane: moons, checkerboard, rings, Gaussians, a swiss roll, spirals, a pinwheel, or a picture.

    Their exact log p is the data set's `log_prob`; the caption of a point is the part that it is of ("moon 1"). n: of
    training points, and a tenth as many in test and validation, all draws of their own. noise: the standard deviation
    of the Gaussian noise, where that of all points is 1; by default the kind's own. picture: a file, of kind picture,
    whose points lie as densely as its pixels are dark, or bright (mass).
    """

    kind: Literal["moons", "checkerboard", "rings", "gaussians8", "swissroll", "spirals", "pinwheel", "picture"] = (
        "moons"
    )
    n: int = 100_000
    noise: float | None = None
    seed: int = 0
    picture: str | None = None
    mass: Literal["darkness", "brightness"] = "darkness"

    shape: ClassVar[tuple[int, ...]] = (2,)

    def __post_init__(self) -> None:
        low, high = NOISE
        if self.n < 1:
            raise UserError(f"n = {self.n} points are too few; the least is 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed = {self.seed} is out of range; try 0")
        if self.noise is not None and not (low <= self.noise <= high or (self.noise == 0 and self._of_pixels)):
            zero = ", or 0" if self._of_pixels else ""
            raise UserError(f"noise = {self.noise} is not within {low} .. {high}{zero}, where all points spread by 1")
        if (self.kind == "picture") != (self.picture is not None):
            missing = self.picture is None
            raise UserError(f"kind {self.kind} {'needs the path of a file as' if missing else 'takes no'} `picture`")

    @property
    def _of_pixels(self) -> bool:
        return self.kind in ("checkerboard", "picture")

    def density(self) -> PlaneDensity:
        """The density itself. Raises UserError for a picture that cannot be one."""
        if self.kind in CURVES:
            curve, count, name, noise = CURVES[self.kind]
            classes = tuple(f"{name} {k}" for k in range(count)) if count > 1 else (name,)
            return Curves(curve, classes, noise if self.noise is None else self.noise)
        if self.kind == "pinwheel":
            return Pinwheel(0.1 if self.noise is None else self.noise)
        if self.kind == "picture":
            assert self.picture is not None
            return Pixels(_weights(self.picture, self.mass), ("picture",), self.noise or 0.0)
        board = (torch.arange(4)[:, None] + torch.arange(4)) % 2
        return Pixels(board, tuple(f"square {k}" for k in range(8)), self.noise or 0.0)

    def build(self, split: str = "train") -> VectorDataset:
        """Raises UserError for an unknown split, and for a picture that cannot be a density."""
        if split not in SPLITS:
            raise UserError(f"data toy2d: no split {split!r}.{nearest(split, SPLITS)}")
        density, rng = self.density(), Rng(self.seed)
        index = torch.arange(self.n if split == "train" else max(self.n // 10, 1))
        u = torch.stack([rng.uniform(f"toy2d/{split}/{i}", index) for i in range(5)], 1)
        points, which = density.draw(u[:, :3], torch.special.ndtri(u[:, 3:]))
        return VectorDataset(
            points.float(),
            [density.classes[k] for k in which.tolist()],
            [f"{self.kind}/{split}[{i}]" for i in range(len(index))],
            log_prob=density.log_prob,
        )


def _weights(path: str, mass: str) -> Tensor:
    """The pixels of a picture as weights, at most SIDE on a side. Raises UserError."""
    try:
        image = decode(Path(path).expanduser()).convert("L")
    except (BadImage, RuntimeError) as error:  # ~ of nobody
        raise UserError(f"data toy2d: picture {path}: {error}") from error
    image.thumbnail((SIDE, SIDE))
    brightness = torch.from_numpy(np.array(image)).double()
    weight = 255 - brightness if mass == "darkness" else brightness
    if weight.max() == 0:
        plain = "white" if mass == "darkness" else "black"
        raise UserError(f"data toy2d: picture {path} is all {plain}, so nothing of it has {mass}; try the other mass")
    return weight
