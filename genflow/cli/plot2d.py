"""genflow plot RUN, of a flow in the plane."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from genflow.cli.options import embed, first_state, guided, real_data, solver, time_grid
from genflow.cli.plot import PLANE
from genflow.config import Choice, from_dict
from genflow.data.loading import epoch_order
from genflow.data.points import Extent, extent_of
from genflow.data.vectors import VectorDataset
from genflow.errors import UserError
from genflow.evaluation import plots2d

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 20_000  # of a histogram
DOTS = 3000  # of a scatter plot
WAYS = 200  # of points whose trajectories are drawn
TIMES = (1.0, 0.75, 0.5, 0.25, 0.05)  # of the fields
RESOLUTION, COARSE = 150, 60  # places of a density on a side, and the fewest
BATCH = 4096
MOST = 64  # conditions over which a density is averaged


class PlanePlotter:
    """Figures of one flow of points in the plane. Unguided, unless guidance is asked for: the density, then, is left out."""

    def __init__(self, args: argparse.Namespace, flow: Any, settings: dict[str, Any]) -> None:
        self.args, self.flow = args, flow
        self.settings = settings if args.guidance is not None else {**settings, "guidance": 1.0}
        self.has_velocity = hasattr(flow, "guided")
        solved = () if self.has_velocity else ("trajectories", "field")
        self.what = {name: about for name, about in PLANE.items() if name not in solved}

    @cached_property
    def data(self) -> VectorDataset | None:
        """The training data, where they are to be had, shuffled: in a table, rows of one caption may stand together."""
        try:
            if not (section := (self.flow.recipe or {}).get("data")):
                return None
            data = from_dict(Annotated[Any, Choice("dataset")], real_data(section), where="data").build("train")
        except UserError as error:
            _say(f"without the data: {error}")
            return None
        order = epoch_order(len(data), 0, 0)
        captions, identifiers = ([names[i] for i in order.tolist()] for names in (data.captions, data.identifiers))
        return VectorDataset(data.rows[order], captions, identifiers, log_prob=data.log_prob)

    @cached_property
    def captions(self) -> list[str]:
        """What POINTS samples are asked to be: the prompts in turn, or the captions of the data, as often as there."""
        hears = self.flow.text.max_tokens > 0
        if self.args.prompt and not hears:
            raise UserError(f"{self.args.run} hears no condition; leave --prompt out")
        every = self.args.prompt or (self.data.captions if hears and self.data is not None else [""])
        return [every[i % len(every)] for i in range(POINTS)]

    @cached_property
    def samples(self) -> Tensor:
        parts = []
        for start in range(0, POINTS, BATCH):
            rows = range(start, min(start + BATCH, POINTS))
            seeds = [self.args.seed + i for i in rows]
            parts.append(self.flow.sample([self.captions[i] for i in rows], seeds=seeds, **self.settings).x.cpu())
        return torch.cat(parts)

    @property
    def extent(self) -> Extent:
        return extent_of(self.samples if self.data is None else self.data.rows)

    def log_prob(self, x: Tensor) -> Tensor:
        """Of the model, averaged over the captions as often as they are asked for."""
        counts = Counter(self.captions)
        if len(counts) > MOST:
            raise UserError(f"{len(counts)} conditions are too many to average over; name some, --prompt")
        prepared = self.flow.text.encode(list(counts))
        share = torch.tensor([*counts.values()], dtype=torch.float64).div(POINTS).log()
        log_p = [self.flow.log_prob(x, prepared[[i]]).cpu().double() + share[i] for i in range(len(counts))]
        return torch.logsumexp(torch.stack(log_p), 0)

    def _density(self) -> Figure:
        panels: dict[str, Any] = {}
        if self.data is not None:
            panels["data"] = self._like_the_samples(self.data.rows)
            if self.data.log_prob is not None and not self.args.prompt:
                panels["true density"] = self.data.log_prob
        panels["samples"] = self.samples
        try:
            for option in ("guidance", "temperature"):
                if (value := self.settings.get(option, 1)) != 1:
                    raise UserError(f"it is known at {option} 1 alone, and the samples are at {value:g}")
            self.log_prob(self.samples[:2])
            panels["model density"] = self.log_prob
        except UserError as error:
            _say(f"no density: {error}")
        fewer = (
            math.isqrt(len({*self.captions})) if self.has_velocity else 1
        )  # a solve at each place, of each condition
        return plots2d.plot_density_2d(panels, extent=self.extent, resolution=max(RESOLUTION // fewer, COARSE))

    def _like_the_samples(self, rows: Tensor) -> Tensor:
        """The rows of data that are what the prompts ask for; all of them without prompts."""
        assert self.data is not None
        if not (known := {*self.args.prompt} & {*self.data.captions}):
            return rows
        return rows[[caption in known for caption in self.data.captions]]

    def draw(self, name: str) -> Any:
        """A Figure, or the Animation."""
        return getattr(self, f"_{name}")()

    def _samples(self) -> Figure:
        panels = {"samples": (self.samples[:DOTS], self.captions[:DOTS])}
        if self.data is not None:
            hears = self.flow.text.max_tokens > 0
            captions = self.data.captions[:DOTS] if hears else [""] * min(DOTS, len(self.data))
            panels = {"data": (self.data.rows[:DOTS], captions), **panels}
        return plots2d.plot_samples_2d(panels, extent=self.extent)

    def _trajectories(self) -> Figure:
        times, states, _ = self.way(self.captions[:WAYS])
        data = None if self.data is None else self.data.rows[:DOTS]
        return plots2d.plot_trajectories_2d(times, states, data=data)

    def _field(self) -> Figure:
        caption = self.captions[:1]
        places, states, _ = self.way(caption * DOTS)
        times = [min(t, places[0]) for t in TIMES]
        points = [_between(places, states, t) for t in times]
        with torch.no_grad():
            velocity = guided(self.flow, embed(self.flow, caption).expand(plots2d.ARROWS**2), self.settings)
        extent = extent_of(torch.cat([states[0], states[-1]]), margin=0)
        figure = plots2d.plot_field_2d(velocity, times, extent=extent, points=points, device=self.flow.device)
        return self._of_one_caption(figure)

    def _warp(self) -> Figure:
        condition = self.flow.text.encode([self.captions[0]])
        return self._of_one_caption(plots2d.plot_warp_2d(lambda z: self.flow.decode(z, condition)))

    def _of_one_caption(self, figure: Figure) -> Figure:
        if caption := self.captions[0]:
            figure.suptitle(f"of {caption}", parse_math=False)
        return figure

    def _animation(self) -> plots2d.Animation:
        places, states, label = self.way(self.captions)
        return plots2d.point_animation(places, states, label=label)

    @torch.no_grad()
    def way(self, captions: list[str]) -> tuple[list[float], Tensor, str]:
        """Where a point of each caption is at each time, or behind each part of a bijection, noise to data; its label."""
        seeds = range(self.args.seed, self.args.seed + len(captions))
        noise = first_state(self.flow, seeds) * self.settings.get("temperature", 1.0)
        condition = embed(self.flow, captions)
        if self.has_velocity:
            times = time_grid(self.flow, self.settings, self.settings.get("steps", 20))
            solve = solver(self.flow, self.settings, seeds)
            path = solve(guided(self.flow, condition, self.settings), noise, times, record=True).checked().trajectory
            return path.times, torch.stack(path.states).cpu(), "t = {:.2f}"
        states = [noise]
        pooled = condition.pooled.float() if self.flow.network.condition_dim else None
        for part in reversed(list(_parts(self.flow.network))):
            states.append(part.decode(states[-1], pooled))
        return [float(i) for i in reversed(range(len(states)))], torch.stack(states).cpu(), "depth {:.1f}"


def _between(places: list[float], states: Tensor, t: float) -> Tensor:
    """The points at a time of a solve, straight from one step to the next."""
    i = max(k for k, place in enumerate(places[:-1]) if place >= t)
    return torch.lerp(states[i], states[i + 1], (places[i] - t) / (places[i] - places[i + 1]))


def _parts(bijection: Any) -> Any:
    """What a bijection is composed of, data to noise; itself, if it is not composed."""
    from genflow.flows.bijections.base import Chain

    return [part for each in bijection for part in _parts(each)] if isinstance(bijection, Chain) else [bijection]


def _say(line: str) -> None:
    print(f"genflow: {line}", file=sys.stderr)
