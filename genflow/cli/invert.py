"""genflow invert RUN PICTURE..."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genflow.cli.canvas import Canvas
from genflow.cli.options import (
    add_lora,
    add_solving,
    embed,
    first_time,
    fit_image,
    guided,
    is_stochastic,
    open_model,
    read_image,
    refuse_fixed_steps,
    refuse_sampling,
    refuse_unheard,
    sampling_of,
    solver,
    time_grid,
    told_steps,
    writable,
)
from genflow.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a model folder")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what they show, one for all or one each (nothing)",
    )
    add_lora(add_solving(parser, guidance="1 = none (1)", nargs="+", help="each way; several: each in turn"))
    parser.add_argument(
        "--out", default="inverted", metavar="FOLDER", help="where grid.png and noise.safetensors go (./inverted)"
    )


def run(args: argparse.Namespace) -> int:
    prompts = args.prompt or [""]
    if len(prompts) not in (1, len(args.pictures)):
        raise UserError(f"{len(prompts)} prompts for {len(args.pictures)} pictures; give one, or one for each picture")

    import torch
    from tqdm import tqdm

    from genflow.data.pictures import caption_grid
    from genflow.samplers.editing import psnr, round_trip

    out = writable(args.out)
    files = [read_image(path) for path in args.pictures]
    flow, settings = open_model(args, unguided=True)
    refuse_unheard(args, flow, *prompts)
    canvas = Canvas.of(flow)
    if canvas is None:
        return _by_bijection(args, prompts, flow, torch.stack([fit_image(file, flow) for file in files]), out)
    counts = args.steps or [settings.get("steps", 20)]
    ways = [sampling_of(argparse.Namespace(**{**vars(args), "steps": n}), flow, unguided=True) for n in counts]
    for each in ways:
        if is_stochastic(each):
            raise UserError(f"sampler {each['sampler']!r} draws noise, so it has no inverse; choose one such as 'heun'")
    refuse_fixed_steps(args, ways[0])
    grids = [time_grid(canvas.flow, each, steps) for each, steps in zip(ways, counts, strict=True)]
    pictures = torch.stack([fit_image(file, flow) for file in files])
    x = canvas.lay(pictures)
    chunks = torch.arange(len(x)).split(args.batch)

    back, noise, nfe = [], torch.empty_like(x), []
    with torch.no_grad(), tqdm(total=2 * len(chunks) * sum(counts), unit="step", disable=None) as bar:

        def progress(*_: int) -> None:
            bar.update(1)

        condition = embed(canvas.flow, prompts)
        condition = condition.expand(len(x)) if len(prompts) == 1 else condition
        for each, grid in zip(ways, grids, strict=True):
            back.append(torch.empty_like(pictures))
            for rows in chunks:
                velocity = guided(canvas.flow, condition[rows], each)
                trip = round_trip(
                    velocity, x[rows], grid, sampler=solver(canvas.flow, each, both_ways=True), progress=progress
                )
                back[-1][rows], noise[rows] = canvas.show(trip.x), trip.noise / first_time(canvas.flow)
            nfe.append(trip.nfe)

    seen = canvas.show(x)  # of latents, the pictures that the autoencoder makes of them
    errors = torch.stack([psnr(each, seen) for each in back], 1).tolist()
    solves = [told_steps(each.get("sampler", "heun"), steps) for each, steps in zip(ways, counts, strict=True)]
    _print_table(args.pictures, solves, nfe, errors, noise.flatten(1).std(1).tolist())
    if canvas.latent:
        lost = ", ".join(f"{db:.1f} dB" for db in psnr(seen, pictures).tolist())
        print(f"beside what the autoencoder alone gives back of them, at {lost}")
    about = {"pictures": args.pictures, "prompts": prompts, "model": str(args.run), "ema": not args.no_ema}
    about |= {"lora": args.lora} if args.lora else {}
    captions = [
        caption
        for path, row in zip(args.pictures, errors, strict=True)
        for caption in (
            Path(path).stem,
            *(f"{solve}: {db:.1f} dB" for solve, db in zip(solves, row, strict=True)),
        )
    ]
    sheet = torch.stack([pictures, *back], 1).flatten(0, 1)
    grid_settings = {**about, **_together(ways), "steps": counts, "nfe": nfe, "psnr": errors}
    caption_grid(sheet, captions, columns=1 + len(counts), settings=grid_settings).save_atomic(out / "grid.png")
    _save_noise(out / "noise.safetensors", noise, {**about, **ways[-1], "steps": counts[-1], "nfe": nfe[-1]})
    print(f"grid.png and noise.safetensors, of {solves[-1]}, in {out}")
    return 0


def _together(ways: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all ways share, and a list of those in which they differ."""
    each = {key: [way.get(key) for way in ways] for way in ways for key in way}
    return {key: values[0] if all(v == values[0] for v in values) else values for key, values in each.items()}


def _by_bijection(args: argparse.Namespace, prompts: list[str], flow: Any, x: Tensor, out: Path) -> int:
    """A normalizing flow's one pass each way."""
    refuse_sampling(args)
    import torch

    from genflow.data.pictures import caption_grid
    from genflow.samplers.editing import psnr

    condition = flow.text.encode(prompts if len(prompts) == len(x) else prompts * len(x))
    z = torch.cat([flow.encode(x[rows], condition[rows]) for rows in torch.arange(len(x)).split(args.batch)])
    back = torch.cat([flow.decode(z[rows], condition[rows]) for rows in torch.arange(len(x)).split(args.batch)])
    errors = psnr(back, x).tolist()
    _print_table(args.pictures, ["1 pass"], [1], [[db] for db in errors], z.flatten(1).std(1).tolist())
    print(f"the largest error of a value in [-1, 1]: {float((back - x).abs().max()):.2g}")
    captions = [
        c for path, db in zip(args.pictures, errors, strict=True) for c in (Path(path).stem, f"back: {db:.1f} dB")
    ]
    about = {
        "pictures": args.pictures,
        "prompts": prompts,
        "model": str(args.run),
        "ema": not args.no_ema,
        "psnr": errors,
    }
    sheet = torch.stack([x, back.clamp(-1, 1)], 1).flatten(0, 1).cpu()
    caption_grid(sheet, captions, columns=2, settings=about).save_atomic(out / "grid.png")
    _save_noise(out / "noise.safetensors", z.cpu(), about)
    print(f"grid.png and noise.safetensors in {out}")
    return 0


def _print_table(
    pictures: list[str], ways: list[str], nfe: list[int], errors: list[list[float]], spread: list[float]
) -> None:
    width = max(map(len, ("PSNR, dB", "evaluations", *pictures)))
    print(f"{'PSNR, dB':{width}}" + "".join(f"  {way:>9}" for way in ways) + "  std of noise")
    for path, row, std in zip(pictures, errors, spread, strict=True):
        print(f"{path:{width}}" + "".join(f"  {db:9.2f}" for db in row) + f"  {std:12.2f}")
    print(f"{'evaluations':{width}}" + "".join(f"  {each:9}" for each in nfe) + f"  {'1 = typical':>12}")


def _save_noise(path: Path, noise: Tensor, about: dict[str, object]) -> None:
    from safetensors import SafetensorError

    from genflow.saving import replacing, save_file

    try:
        with replacing(path) as temporary:
            save_file({"noise": noise.contiguous()}, temporary, metadata={"genflow": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"could not write {path}: {getattr(error, 'strerror', None) or error}") from error
