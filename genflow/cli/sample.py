"""genflow sample RUN --prompt "..." """

from __future__ import annotations

import argparse
import csv
import inspect
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genflow.cli.options import (
    add_dtype,
    add_lora,
    add_solving,
    open_model,
    real_data,
    refuse_dtype,
    refuse_fixed_steps,
    writable,
)
from genflow.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="the folder of a run, a checkpoint, a model, or a diffusers SD3 pipeline")
    what = parser.add_argument_group("what to draw (prompts and classes: as many as you like)")
    what.add_argument("--prompt", action="append", default=[], metavar="TEXT", help='"" draws without a prompt')
    what.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="one prompt a line")
    what.add_argument(
        "--class", action="append", default=[], dest="classes", metavar="NAME", help="a class, by name or number"
    )
    what.add_argument("-n", type=int, default=1, metavar="N", help="pictures per prompt (1)")
    what.add_argument("--seed", type=int, default=0, help="of the first picture; the next have the next seeds (0)")
    what.add_argument("--size", type=int, nargs="+", metavar="PX", help="height and width (default: as trained)")
    how = add_solving(parser)
    add_lora(how)
    how.add_argument("--weak", metavar="RUN", help="guide away from this weaker model, not from the empty prompt")
    speed = parser.add_argument_group("how fast, and in how much memory")
    add_dtype(speed, "of the network; the solve is in fp32 (as the weights are)", None)
    speed.add_argument(
        "--compile", action="store_true", help="torch.compile the blocks: the first step waits for the compiler"
    )
    speed.add_argument(
        "--graphs", action="store_true", help="CUDA graphs: record the network's kernels once, launch them all at once"
    )
    speed.add_argument(
        "--cache",
        type=float,
        metavar="THRESHOLD",
        help="LOSSY: skip blocks in steps that change little, such as 0.05 (first-block caching); try fewer --steps first",
    )
    speed.add_argument(
        "--tile",
        type=int,
        metavar="PX",
        help="LOSSY: decode a latent flow's pictures in tiles of so many pixels a side, such as 512, to save memory",
    )
    parser.add_argument("--out", default="samples", metavar="FOLDER", help="where PNGs and grid.png go (./samples)")


def run(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    if args.n < 1:
        raise UserError(f"-n must be 1 or more, not {args.n}")

    import torch
    from tqdm import tqdm

    from genflow.data.pictures import caption_grid, to_picture
    from genflow.flows.latent import velocity_flow
    from genflow.flows.store import load
    from genflow.networks.graphs import record
    from genflow.training.apply import compile_blocks

    out = writable(args.out)
    flow, settings = open_model(args)
    refuse_fixed_steps(args, settings)
    if not prompts and flow.text.max_tokens:
        raise UserError('nothing to draw: give --prompt "...", --prompt-file FILE or --class NAME')
    if prompts and not flow.text.max_tokens:
        raise UserError(f"{args.run} hears no condition; leave --prompt, --prompt-file and --class out")
    if args.classes and not hasattr(flow.text, "classes"):
        raise UserError(f"--class: {args.run} draws from text, not from classes; give --prompt {args.classes[0]!r}")
    if args.size and len(args.size) > 2:
        raise UserError(f"--size takes one or two numbers, not {len(args.size)}")
    more: dict[str, Any] = {"size": (args.size[0], args.size[-1])} if args.size else {}
    inner = velocity_flow(flow)
    takes = {name for each in (flow, inner or flow) for name in inspect.signature(each.sample).parameters}
    if args.graphs and inner is None:
        raise UserError(f"--graphs is for models of a velocity; {args.run} is a {type(flow).__name__}")
    if args.graphs and settings.get("cache"):
        raise UserError("--graphs: first-block caching waits for the device at every step; leave one of the two out")
    for name, what in {"weak": "a velocity", "size": "a velocity", "tile": "an autoencoder's latents"}.items():
        if getattr(args, name) is not None and name not in takes:
            raise UserError(f"--{name} is for models of {what}; {args.run} is a {type(flow).__name__}")
    if args.tile is not None:
        more["tile"] = args.tile
    if args.weak is not None and settings.get("guidance", 1) == 1:
        raise UserError("--weak does nothing without guidance; add --guidance 2, or any number but 1")
    if args.weak is not None:
        weak = load(args.weak, ema=not args.no_ema, device=flow.device)
        if inner is not flow and getattr(weak.config, "autoencoder", None) != flow.config.autoencoder:
            raise UserError(f"--weak {args.weak} is not of the latents of {args.run}, whose autoencoder is another")
        more["weak"] = velocity_flow(weak) or weak
    models = [flow, *([more["weak"]] if "weak" in more else [])]
    speed = _in_dtype(args, models)
    if args.compile:
        for each in models:
            compile_blocks(each.network, "--compile")
    if args.graphs:
        for each in models:
            record(each.network, "--graphs")
    wanted = [(prompt, args.seed + i) for i, prompt in enumerate(p for p in prompts or [""] for _ in range(args.n))]

    model = {"model": str(args.run), "ema": not args.no_ema, **speed, **settings}
    model |= {name: value for name in ("weak", "lora", "tile") if (value := getattr(args, name))}
    images, nfe, off, skipped, decoded = [], 0, None, 0.0, []
    with tqdm(total=0, unit="step", dynamic_ncols=True, disable=None) as bar:
        batches = [wanted[i : i + args.batch] for i in range(0, len(wanted), args.batch)]
        for number, batch in enumerate(batches):

            def progress(done: int, steps: int, before: int = number) -> None:
                bar.total = len(batches) * steps
                bar.update(before * steps + done - bar.n)

            texts, seeds = [p for p, _ in batch], [s for _, s in batch]
            solution = flow.sample(texts, seeds=seeds, progress=progress, **more, **settings)
            nfe = max(nfe, solution.nfe)
            if (error := getattr(solution, "certificate", None)) is not None:
                off = max(off or 0.0, error)
            if hasattr(solution, "decoded"):
                decoded.append(solution)
            skipped += getattr(solution, "skipped", 0.0) * len(batch) / len(wanted)
            images.append(solution.x.cpu())
            if solution.x.dim() == 2:
                continue
            for i, ((prompt, seed), image) in enumerate(zip(batch, images[-1], strict=True), number * args.batch):
                about = {"prompt": prompt, "seed": seed, **model, "nfe": solution.nfe}
                to_picture(image, about).save_atomic(out / f"{i:04d}-{_stem(prompt)}-{seed}.png")
    captions = [prompt for prompt, _ in wanted]
    about = {"prompts": captions, "seed": args.seed, **model, "nfe": nfe}
    if len(flow.shape) == 1:
        return _save_points(flow, torch.cat(images), captions, out, about)
    caption_grid(torch.cat(images), captions, settings=about).save_atomic(out / "grid.png")
    told = f"{len(wanted)} picture{'s' * (len(wanted) > 1)} and grid.png in {out}"
    if decoded:
        print(f"{told} ({_passes(decoded)})")
        return 0
    exact = "" if off is None else f"; max |f(x) - z| = {off:.1g}"
    lossy = f"; LOSSY cache: {skipped:.0%} of the blocks skipped" if settings.get("cache") else ""
    print(f"{told} ({nfe} network evaluation{'s' * (nfe != 1)} each{exact}{lossy})")
    return 0


def _passes(solutions: list[Any]) -> str:
    """What the tokens of all pictures took, and whether they are samples of the model."""
    import torch

    passes = torch.cat([each.decoded.passes.amax(1) for each in solutions])
    tested, held = (sum(int(getattr(s.decoded, a).sum()) for s in solutions) for a in ("tested", "accepted"))
    tokens = solutions[0].decoded.tokens.shape[1]
    guesses = f", {held / tested:.0%} of the tested guesses held" if tested else ""
    kind = "lossless" if solutions[0].lossless else "LOSSY: not samples of the model"
    return f"{tokens} tokens in {passes.double().mean():.1f} passes a picture, {int(passes.max())} at most{guesses}; {kind}"


def _in_dtype(args: argparse.Namespace, flows: list[Any]) -> dict[str, object]:
    """Bring the networks into the dtype asked for, and say what was asked."""
    from genflow.training.precision import DTYPES

    if args.dtype is None:
        return {}
    for flow in flows:
        refuse_dtype(args, flow)
        flow.network.to(DTYPES[args.dtype])
    return {"dtype": args.dtype}


def _save_points(flow: Any, points: Tensor, captions: list[str], out: Path, about: dict[str, object]) -> int:
    """samples.csv, in the units and with the columns of the training data; of the plane, also points.png."""
    from genflow.data.pictures import write_atomic
    from genflow.data.points import point_picture

    columns, numbers, units = _in_units(flow, points)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "caption"])
    writer.writerows([*row, caption] for row, caption in zip(numbers.tolist(), captions, strict=True))
    write_atomic(out / "samples.csv", lambda file: file.write(text.getvalue().encode()))
    plane = points.shape[1] == 2
    beside = " and points.png" * plane
    print(f"{len(points)} vector{'s' * (len(points) > 1)} in {out / 'samples.csv'}{beside}, {units}")
    if plane:
        replace(point_picture(points), settings=about).save_atomic(out / "points.png")
    return 0


def _in_units(flow: Any, points: Tensor) -> tuple[list[str], Tensor, str]:
    """The names of the numbers and the points as the training data has them, or as the model does; and which it is."""
    from typing import Annotated

    from genflow.config import Choice, from_dict

    names = [f"x{i + 1}" for i in range(points.shape[1])]
    if not (section := (flow.recipe or {}).get("data")):
        return names, points, "as the model sees them"
    try:
        data: Any = from_dict(Annotated[Any, Choice("dataset")], real_data(section), where="data").build("train")
    except UserError as error:
        return names, points, f"as the model sees them, standardised: {error}"
    return data.columns, data.restore(points), "in the units of the training data"


def _stem(prompt: str) -> str:
    """What a file name says of a prompt: its letters and digits, of any script."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40] or "empty"


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt) + list(args.classes)
    for name in args.prompt_file:
        try:
            lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file {name}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
        prompts += [line for line in lines if line.strip()]
    return prompts
