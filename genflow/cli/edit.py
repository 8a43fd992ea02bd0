"""genflow edit RUN PICTURE... --prompt "..." """

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genflow.cli.canvas import Canvas
from genflow.cli.options import (
    add_lora,
    add_solving,
    embed,
    fit_image,
    guided,
    is_stochastic,
    open_model,
    read_image,
    refuse_fixed_steps,
    refuse_sampling,
    refuse_unheard,
    solver,
    time_grid,
    writable,
)
from genflow.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from genflow.samplers import Progress, Solution

Job = tuple[int, dict[str, Any]]  # which picture, and what it becomes

EDITS = ("image-to-image", "inpainting", "FlowEdit", "RF-inversion")
WAYS = {
    "mask": "inpainting",
    "from": "FlowEdit",
    "rf": "RF-inversion",
    "into": "interpolation",
    "to": "interpolation",
}
"""The option that asks for a way of editing. Without one it is image-to-image."""
OPTIONS: dict[str, dict[str, Any]] = {
    "n": dict.fromkeys(EDITS, 1),
    "seed": dict.fromkeys(EDITS, 0),
    "strength": {"image-to-image": 0.6, "FlowEdit": 0.85},
    "repeats": {"inpainting": 1},
    "from_guidance": {"FlowEdit": 1.0},
    "gamma": {"RF-inversion": 0.5},
    "eta": {"RF-inversion": 0.9},
    "hold": {"RF-inversion": 0.75},
    "frames": {"interpolation": 8},
}
"""The ways to which an option belongs, and its default in each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a model folder")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    what = parser.add_argument_group("what they become")
    what.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="several: each in turn")
    what.add_argument("-n", type=int, metavar="N", help="pictures per prompt (1)")
    what.add_argument("--seed", type=int, help="of the first of them; the next have the next seeds (0)")
    way = parser.add_argument_group("in which way (without --mask, --from, --rf, --into or --to: image-to-image)")
    way.add_argument(
        "--strength", type=float, metavar="S", help="how noisy to begin, 0 to 1: the more, the freer (0.6)"
    )
    way.add_argument("--mask", metavar="FILE", help="inpainting: draw its white part anew; the rest stays, bit for bit")
    way.add_argument("--repeats", type=int, metavar="N", help="how often to take each step, to agree better (1)")
    way.add_argument("--from", metavar="TEXT", help="FlowEdit: what the pictures show now (strength 0.85)")
    way.add_argument("--from-guidance", type=float, metavar="G", help="guidance of that prompt (1)")
    way.add_argument("--rf", action="store_true", default=None, help="RF-inversion: controlled inversion and sampling")
    way.add_argument("--gamma", type=float, metavar="G", help="how far to a typical noise it goes, 0 to 1 (0.5)")
    way.add_argument("--eta", type=float, metavar="E", help="how far back to the picture it comes, 0 to 1 (0.9)")
    way.add_argument("--hold", type=float, metavar="T", help="until which time, 1 to 0, it comes back so (0.75)")
    way.add_argument("--into", metavar="FILE", help="interpolation: frames from each picture to this one")
    way.add_argument(
        "--to", metavar="TEXT", help="interpolation: frames from --prompt, what they show now, to this one"
    )
    way.add_argument("--frames", type=int, metavar="N", help="of an interpolation, both ends among them (8)")
    add_lora(add_solving(parser, guidance="1 = none; an interpolation has none unless you say so"))
    parser.add_argument("--out", default="edited", metavar="FOLDER", help="where PNGs and grid.png go (./edited)")


def run(args: argparse.Namespace) -> int:
    way, used = _way(args)

    import torch
    from tqdm import tqdm

    out = writable(args.out)
    files = [read_image(path) for path in (*args.pictures, *([] if args.into is None else [args.into]))]
    flow, settings = open_model(args, unguided=way == "interpolation")
    refuse_unheard(args, flow, *args.prompt, *filter(None, (getattr(args, "from"), args.to)))
    canvas = Canvas.of(flow)
    if way == "FlowEdit":  # takes Euler steps
        settings = {key: value for key, value in settings.items() if key not in ("sampler", "options")}
    if canvas is None:
        return _between(args, way, used, flow, files, out)
    if is_stochastic(settings) and (way not in ("image-to-image", "inpainting") or used.get("repeats", 1) > 1):
        raise UserError(
            f"sampler {settings['sampler']!r} draws noise, which has no place here; take one such as 'heun'"
        )
    if used.get("repeats", 1) == 1:
        refuse_fixed_steps(args, settings)
    grid = time_grid(canvas.flow, settings, settings.get("steps", 20))
    if args.strength is None and "strength" in used:
        used["strength"] = min(used["strength"], grid[0])
    x = torch.stack([fit_image(file, flow) for file in files])
    mask = None if args.mask is None else _read_mask(args, files, flow)
    if way == "interpolation":
        cells = [{"prompt": "".join(args.prompt), "frame": k} for k in range(used["frames"])]
    else:
        cells = [{"prompt": text, "seed": used["seed"] + k} for text in args.prompt for k in range(used["n"])]
    jobs = [(i, cell) for i in range(len(args.pictures)) for cell in cells]
    batches = [jobs[i : i + args.batch] for i in range(0, len(jobs), args.batch)]

    with torch.no_grad(), tqdm(total=0, unit="step", dynamic_ncols=True, disable=None) as bar:

        def progress(*_: int) -> None:
            bar.update(1)

        where = None if mask is None else canvas.lay_mask(mask)
        editor = Editor(args, way, used, canvas.flow, settings, grid, canvas.lay(x), where, progress)
        steps = sum(t < used.get("strength", 1) for t in grid) * (2 if way == "RF-inversion" else 1)
        bar.reset(total=steps * (len(batches) + editor.inversions))
        solutions = [editor.draw(batch).checked() for batch in batches]
    images = torch.cat([canvas.show(solution.x).cpu() for solution in solutions])
    if mask is not None:  # an autoencoder changes a little what it is given to keep
        images = torch.where(mask.cpu(), images, x[[i for i, _ in jobs]].cpu())
    named = {name: value for name in ("mask", "from", "into", "to", "lora") if (value := getattr(args, name))}
    about = {"way": way, **named, **used, "model": str(args.run), "ema": not args.no_ema, **settings}
    nfe = max(solution.nfe for solution in solutions)
    there = _write(out, args.pictures, x, mask, jobs, images, {**about, "nfe": nfe})
    print(f"{there}: {way}, {nfe} network evaluation{'s' * (nfe != 1)} each")
    return 0


def _between(
    args: argparse.Namespace, way: str, used: dict[str, Any], flow: Any, files: Sequence[Image], out: Path
) -> int:
    """Frames by a bijection: each picture and the last one to noise, and the arc between back to pictures."""
    import torch

    from genflow.ar.flow import DecodeConfig
    from genflow.samplers.interpolation import slerp

    if issubclass(flow.config.sampling, DecodeConfig):
        raise UserError(
            f"{args.run} is a {type(flow).__name__}, which draws pictures and edits none; see genflow sample"
        )
    if not args.into:
        raise UserError(
            f"{args.run} is a {type(flow).__name__}, which has no velocity: it can only go --into a picture"
        )
    if args.to is not None:
        raise UserError(f"--to is for models of a velocity; {args.run} goes --into a picture under one --prompt")
    refuse_sampling(args)
    x, frames = torch.stack([fit_image(file, flow) for file in files]), used["frames"]
    condition = flow.text.encode(["".join(args.prompt)])
    z = flow.encode(x, condition)
    jobs = [(i, {"prompt": "".join(args.prompt), "frame": k}) for i in range(len(args.pictures)) for k in range(frames)]
    images = []
    for part in (jobs[i : i + args.batch] for i in range(0, len(jobs), args.batch)):
        fractions = torch.tensor([cell["frame"] / max(frames - 1, 1) for _, cell in part])
        images.append(flow.decode(slerp(z[[i for i, _ in part]], z[-1:], fractions), condition).clamp(-1, 1).cpu())
    about = {"way": way, "into": args.into, **used, "model": str(args.run), "ema": not args.no_ema}
    there = _write(out, args.pictures, x, None, jobs, torch.cat(images), about)
    through = "its latents" if hasattr(flow, "reconstruct") else "the flow's noise, and exactly back"
    print(f"{there}: {way} through {through}")
    return 0


def _way(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The way of editing that is asked for, and the options that belong to it, given or by default."""
    asked = [name for name in WAYS if getattr(args, name) is not None]
    way = WAYS[asked[0]] if asked else "image-to-image"
    if other := [name for name in asked if WAYS[name] != way]:
        raise UserError(f"--{asked[0]} and --{other[0]} are two ways of editing, {way} and {WAYS[other[0]]}; give one")
    used = {}
    for name, ways in OPTIONS.items():
        value, option = getattr(args, name), f"--{name.replace('_', '-')}" if len(name) > 1 else f"-{name}"
        if value is not None and way not in ways:
            raise UserError(f"{option} belongs to {', '.join(ways)}, and this is {way}; leave it out")
        if name in ("n", "frames", "repeats") and value is not None and value < 1:
            raise UserError(f"{option} must be 1 or more, not {value}")
        if name == "hold" and value is not None and not 0 <= value < 1:
            raise UserError(f"{option} must be 0 or more and below 1, not {value}; try 0.75")
        if way in ways:
            used[name] = ways[way] if value is None else value
    if way == "FlowEdit" and (given := [name for name in ("sampler", "option") if getattr(args, name) is not None]):
        raise UserError(f"--{given[0]} does nothing in FlowEdit, which takes Euler steps; leave it out")
    if way == "interpolation" and len(args.prompt) > 1:
        raise UserError(f"an interpolation begins at one --prompt, not at {len(args.prompt)}; --to says where it ends")
    if way != "interpolation" and not args.prompt:
        raise UserError('nothing to draw: say what the pictures become, --prompt "..."; "" is no prompt')
    return way, used


def _read_mask(args: argparse.Namespace, files: Sequence[Image], flow: Any) -> Tensor:
    """1 x 1 x H x W bool, cut out as the pictures are; True where it is white, and not transparent."""
    from PIL import Image, ImageChops, ImageOps

    from genflow.data.images import fit

    image = read_image(args.mask)
    with Image.open(args.mask) as raw:
        if raw.has_transparency_data and not raw.mode.startswith("I"):
            image = ImageChops.multiply(
                image.convert("L"), ImageOps.exif_transpose(raw.convert("RGBA")).getchannel("A")
            )
    for name, file in zip(args.pictures, files, strict=True):
        if image.width * file.height != image.height * file.width:
            sizes = f"{image.width} x {image.height} pixels, but {name} is {file.width} x {file.height}"
            raise UserError(f"the mask {args.mask} is {sizes}; make it as large as the picture")
    mask = fit(image, flow.shape[1:], 1).unsqueeze(0).to(flow.device) > 127
    if not mask.any():
        raise UserError(f"the mask {args.mask} has no white part, so there is nothing to draw")
    return mask


@dataclass(frozen=True)
class Editor:
    """Draws jobs in one way."""

    args: argparse.Namespace
    way: str
    used: dict[str, Any]
    flow: Any
    settings: dict[str, Any]
    grid: list[float]
    x: Tensor  # the pictures, and last the one to arrive at, where there is one
    mask: Tensor | None
    progress: Progress

    def draw(self, jobs: Sequence[Job]) -> Solution:
        from genflow.functional import noise_from_seeds
        from genflow.samplers import editing

        if self.way == "interpolation":
            return self.interpolate(jobs)
        x, seeds, used = self.x[[i for i, _ in jobs]], [cell["seed"] for _, cell in jobs], self.used
        velocity = self.under([cell["prompt"] for _, cell in jobs])
        noise = noise_from_seeds(seeds, x.shape[1:]).to(x)
        how: dict[str, Any] = {"sampler": solver(self.flow, self.settings, seeds), "progress": self.progress}
        if self.mask is not None:
            return editing.inpaint(
                velocity, x, self.mask, noise, self.grid, repeats=used["repeats"], seeds=seeds, **how
            )
        if self.way == "FlowEdit":
            now = self.under([getattr(self.args, "from")], guidance=used["from_guidance"])
            return editing.flowedit(now, velocity, x, self.grid, seeds=seeds, strength=used["strength"], **how)
        if self.way == "RF-inversion":
            now, how["interval"] = self.under([""], guidance=1.0), (used["hold"], 1.0)
            return editing.rf_inversion(now, velocity, x, noise, self.grid, gamma=used["gamma"], eta=used["eta"], **how)
        return editing.image_to_image(velocity, x, noise, self.grid, used["strength"], **how)

    def under(self, prompts: list[str], **changes: Any) -> Any:
        return guided(self.flow, embed(self.flow, prompts), self.settings, **changes)

    def interpolate(self, jobs: Sequence[Job]) -> Solution:
        """Frames from each picture to the last one, by the noise and the prompts between."""
        import torch

        from genflow.conditions import Condition
        from genflow.samplers.interpolation import blend, slerp

        start, end, noise, inverting = self.ends
        ends = [(c.tokens, c.mask, c.pooled) for c in (start, end)]
        rows = [i for i, _ in jobs]
        fractions = torch.tensor([cell["frame"] / max(self.used["frames"] - 1, 1) for _, cell in jobs])
        z = slerp(noise[rows], noise[-1:], fractions) if self.args.into else noise[rows]
        condition = Condition(*blend(ends[0], ends[1], fractions))
        velocity = guided(self.flow, condition, self.settings)
        solution = solver(self.flow, self.settings, both_ways=True)(velocity, z, self.grid, progress=self.progress)
        return replace(solution, nfe=inverting + solution.nfe)

    @property
    def inversions(self) -> int:
        """How many batches are inverted before the first is drawn."""
        return -(-len(self.x) // self.args.batch) if self.way == "interpolation" else 0

    @cached_property
    def ends(self) -> tuple[Any, Any, Tensor, int]:
        """The conditions at both ends, the noise of each of x, and what it took to find."""
        import torch

        from genflow.conditions import Condition
        from genflow.samplers.editing import invert

        prompt = "".join(self.args.prompt)
        start, end = embed(self.flow, [prompt]), embed(self.flow, [prompt if self.args.to is None else self.args.to])
        arriving = 1 if self.args.into else 0
        condition = Condition.cat([start.expand(len(self.x) - arriving), *[end] * arriving])
        chunks = [
            invert(
                guided(self.flow, condition[rows], self.settings),
                self.x[rows],
                self.grid,
                sampler=solver(self.flow, self.settings, both_ways=True),
                progress=self.progress,
            ).checked()
            for rows in torch.arange(len(self.x)).split(self.args.batch)
        ]
        noise = torch.cat([solution.x for solution in chunks])
        return start, end, noise, max(solution.nfe for solution in chunks)


def _write(
    out: Path,
    pictures: Sequence[str],
    x: Tensor,
    mask: Tensor | None,
    jobs: Sequence[Job],
    images: Tensor,
    about: dict[str, Any],
) -> str:
    """A PNG of each edit, and a grid with a row for each picture: itself, what is masked, its edits. Returns a report."""
    import torch

    from genflow.data.pictures import caption_grid, to_picture

    stems = [Path(path).stem for path in pictures]
    for k, ((i, cell), image) in enumerate(zip(jobs, images, strict=True)):
        words = re.sub(r"[\W_]+", "-", f"{stems[i]} {cell['prompt']}".lower()).strip("-")[:60]
        last = cell.get("seed", cell.get("frame"))
        to_picture(image, {**about, "picture": pictures[i], **cell}).save_atomic(out / f"{k:04d}-{words}-{last}.png")
    x = x[: len(pictures)].cpu()
    sheet = [x.unsqueeze(1), images.unflatten(0, (len(x), -1))]
    if mask is not None:
        sheet.insert(1, torch.where(mask.cpu(), torch.zeros(()), x).unsqueeze(1))
    rows = torch.cat(sheet, 1)
    captions = []
    for i, stem in enumerate(stems):
        cells = [cell for job, cell in jobs if job == i]
        captions += [stem, *(["masked"] if mask is not None else [])]
        captions += [cell["prompt"] if "seed" in cell else f"frame {cell['frame'] + 1}" for cell in cells]
    settings = {**about, "pictures": list(pictures), "prompts": list(dict.fromkeys(cell["prompt"] for _, cell in jobs))}
    grid = caption_grid(rows.flatten(0, 1), captions, columns=rows.shape[1], settings=settings)
    grid.save_atomic(out / "grid.png")
    return f"{len(jobs)} picture{'s' * (len(jobs) > 1)} and grid.png in {out}"
