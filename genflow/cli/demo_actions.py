"""What the buttons of `genflow demo` do: plain functions of a model and of what a person chose."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from genflow.cli.canvas import Canvas
from genflow.cli.compare import own_way
from genflow.cli.options import (
    embed,
    fit_image,
    guided,
    is_stochastic,
    open_model,
    read_image,
    refuse_unheard,
    sampling_of,
    solver,
    time_grid,
)
from genflow.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

POINTS = 2000  # of a model of vectors


@dataclass(frozen=True)
class Player:
    """A loaded model. own: how its recipe says to sample."""

    args: argparse.Namespace
    flow: Any
    own: dict[str, Any]

    @property
    def takes(self) -> set[str]:
        """The settings that mean something to it: no guidance without a condition."""
        return {f.name for f in fields(self.flow.config.sampling)} - ({"guidance"} if not self.hears else set())

    @property
    def hears(self) -> bool:
        return bool(self.flow.text.max_tokens)


@dataclass(frozen=True)
class Choice:
    """What the page's controls say."""

    prompt: str = ""
    seed: int = 0
    count: int = 4
    sampler: str = "heun"
    steps: int = 20
    guidance: float = 1.0


def open_player(path: str, args: argparse.Namespace) -> Player:
    """args: batch, no_ema and device. Raises UserError as `open_model` does."""
    asked = own_way(path, args)
    flow, _ = open_model(asked)
    return Player(asked, flow, (flow.recipe or {}).get("sample", {}))


def settings_of(player: Player, choice: Choice) -> dict[str, Any]:
    """How to sample: of the choice what this model takes. A tuned grid is taken where the sampler is the model's own."""
    asked = argparse.Namespace(**vars(player.args))
    if choice.sampler != player.own.get("sampler", Choice.sampler) and "sampler" in player.takes:
        asked.sampler = choice.sampler
    for name in {"steps", "guidance"} & player.takes:
        setattr(asked, name, getattr(choice, name))
    return sampling_of(asked, player.flow)


def draw(player: Player, choice: Choice) -> tuple[Image, str]:
    """Pictures of a prompt and of the seeds from the chosen one on, and what they cost; of vectors, where they lie."""
    from genflow.data.pictures import caption_grid
    from genflow.data.points import point_picture

    if choice.count < 1 or choice.seed < 0:
        raise UserError(f"pictures = {choice.count} and seed = {choice.seed} must be 1 or more, and 0 or more")
    refuse_unheard(player.args, player.flow, choice.prompt)
    settings, vectors = settings_of(player, choice), len(player.flow.shape) == 1
    seeds = range(choice.seed, choice.seed + (POINTS if vectors else choice.count))
    solution = player.flow.sample([choice.prompt] * len(seeds), seeds=seeds, **settings)
    x = solution.x.cpu()
    picture = point_picture(x) if vectors else caption_grid(x, [f"seed {seed}" for seed in seeds], cell=160)
    return picture.image, f"{len(seeds)} of {solution.nfe} evaluations each: {_told(player, settings)}"


def strip(player: Player, choice: Choice) -> Image:
    """The pictures that a solve goes through, step by step, and those that they foretell. Raises UserError without one."""
    import io

    from PIL import Image as Pictures

    from genflow.cli.plot import _Plotter

    if not hasattr(player.flow, "guided") or len(player.flow.shape) != 3:
        raise UserError(
            f"{player.args.run} is a {type(player.flow).__name__}, no velocity of pictures; a strip shows its solve"
        )
    refuse_unheard(player.args, player.flow, choice.prompt)
    args = argparse.Namespace(run=player.args.run, prompt=[choice.prompt], seed=choice.seed)
    buffer = io.BytesIO()
    _Plotter(args, player.flow, settings_of(player, choice)).strip().savefig(buffer, format="png")
    return Pictures.open(buffer)


def edit(player: Player, choice: Choice, file: str | None, strength: float, before: str = "") -> tuple[Image, str]:
    """A picture drawn anew under a prompt: image-to-image, or FlowEdit where `before` says what it shows now."""
    before = plain(before)
    import torch

    from genflow.data.pictures import caption_grid
    from genflow.functional import noise_from_seeds
    from genflow.samplers import editing

    canvas = Canvas.of(player.flow) if len(player.flow.shape) == 3 else None
    if canvas is None:
        raise UserError(
            f"{player.args.run} is a {type(player.flow).__name__}, no velocity of pictures; edits follow it"
        )
    refuse_unheard(player.args, player.flow, choice.prompt, before)
    settings = settings_of(player, choice)
    if before and is_stochastic(settings):
        raise UserError(
            f"sampler {settings['sampler']!r} draws noise, which has no place here; take one such as 'heun'"
        )
    given = _fitted(player, file)[None]
    x = canvas.lay(given).expand(choice.count, -1, -1, -1)
    seeds = list(range(choice.seed, choice.seed + choice.count))
    grid = time_grid(canvas.flow, settings, settings["steps"])
    strength, solve = min(strength, grid[0]), solver(canvas.flow, settings, seeds)
    velocity = guided(canvas.flow, embed(canvas.flow, [choice.prompt] * len(seeds)), settings)
    with torch.no_grad():
        if before:
            now = guided(canvas.flow, embed(canvas.flow, [before] * len(seeds)), settings, guidance=1.0)
            solution = editing.flowedit(now, velocity, x, grid, seeds=seeds, strength=strength, sampler=solve)
        else:
            noise = noise_from_seeds(seeds, x.shape[1:]).to(x)
            solution = editing.image_to_image(velocity, x, noise, grid, strength, sampler=solve)
        solution = solution.checked()
    sheet = torch.cat([given, canvas.show(solution.x)]).cpu()
    captions = ["given", *(f"seed {seed}" for seed in seeds)]
    way = "FlowEdit" if before else "image-to-image"
    told = f"{way}, {solution.nfe} evaluations: {_told(player, settings)}"
    return caption_grid(sheet, captions, cell=160).image, told


def invert(player: Player, choice: Choice, file: str | None) -> tuple[Image, str]:
    """A picture, its noise, and what comes back of it; of a bijection, exactly. A velocity is followed unguided."""
    import torch

    from genflow.data.pictures import caption_grid
    from genflow.samplers.editing import psnr, round_trip

    refuse_unheard(player.args, player.flow, choice.prompt)
    x, canvas = _fitted(player, file)[None], Canvas.of(player.flow)
    seen = x  # of latents, the picture that the autoencoder makes of it
    with torch.no_grad():
        if canvas is not None:
            settings = settings_of(player, choice)
            if is_stochastic(settings):
                raise UserError(
                    f"sampler {settings['sampler']!r} draws noise, and has no inverse; take one such as 'heun'"
                )
            velocity = guided(canvas.flow, embed(canvas.flow, [choice.prompt]), settings, guidance=1.0)
            grid, z = time_grid(canvas.flow, settings, settings["steps"]), canvas.lay(x)
            trip = round_trip(velocity, z, grid, sampler=solver(canvas.flow, settings, both_ways=True))
            noise, back, seen = trip.noise, canvas.show(trip.x), canvas.show(z)
            cost = f"{trip.nfe} evaluations there and back, unguided"
            if canvas.latent:
                cost += f", beside what the autoencoder alone gives back, at {float(psnr(seen, x)):.1f} dB"
        else:
            condition = player.flow.text.encode([choice.prompt])
            noise = player.flow.encode(x, condition)
            back, cost = player.flow.decode(noise, condition), "one pass each way"
    sheet = {"given": x, "noise / 3": noise.reshape(x.shape) / 3} if noise.numel() == x.numel() else {"given": x}
    sheet["back"] = back.clamp(-1, 1)
    told = f"{float(psnr(back, seen)):.1f} dB, {cost}; the noise has a standard deviation of {float(noise.std()):.2f}"
    return caption_grid(torch.cat([*sheet.values()]).cpu(), [*sheet], columns=len(sheet), cell=160).image, told


def plain(text: str | None) -> str:
    """What a browser sends of a text, without halves of characters, which nothing can draw."""
    return (text or "").encode(errors="replace").decode()


def _fitted(player: Player, file: str | None) -> Any:
    if file is None:
        raise UserError("there is no picture yet; give one on the left")
    return fit_image(read_image(file), player.flow)


def _told(player: Player, settings: dict[str, Any]) -> str:
    from genflow.flows.prepared import family

    told = {"sampler", "steps", "guidance", "temperature", "decoder"} & player.takes
    if "sampler" in told and family(settings.get("sampler", "heun")) == "adaptive":  # whose steps are its own
        told.remove("steps")
    shown = {k: v["name"] if k == "decoder" else v for k, v in settings.items() if k in told}
    return ", ".join(f"{key} {value}" for key, value in shown.items())
