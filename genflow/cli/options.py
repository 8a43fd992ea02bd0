"""What the drawing commands share: with which model and how to solve, and the pictures that people give."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genflow.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def add_solving(
    parser: argparse.ArgumentParser, *, guidance: str = "1 = none", **steps: Any
) -> argparse._ArgumentGroup:
    """The options that `open_model` reads, as a group. guidance: its help; steps: more about that option."""
    how = parser.add_argument_group("how (defaults: the run's own)")
    how.add_argument("--sampler", metavar="NAME", help="see: genflow info sampler")
    how.add_argument("--option", nargs="+", metavar="KEY=VALUE", help="of the sampler, see: genflow info NAME")
    how.add_argument("--steps", type=int, metavar="N", **steps)
    how.add_argument("--grid", metavar="NAME", help="of times, see: genflow info grid (the tuned one, if there is one)")
    add_guidance(how, guidance)
    how.add_argument("--shift", type=read_shift, help="of the time grid; 1 = none, resolution = by the picture's size")
    add_decoding(how)
    how.add_argument(
        "--inverse", metavar="HOW", help="of a tarflow: sequential, jacobi, measured (auto: by the device)"
    )
    how.add_argument("--batch", type=int, default=64, help="pictures at once; does not change them (64)")
    add_weights(how)
    return how


def add_guidance(how: argparse._ActionsContainer, scale: str = "1 = none") -> None:
    """The options of guidance. scale: the help of the first."""
    how.add_argument("--guidance", type=float, help=scale)
    how.add_argument(
        "--interval", type=float, nargs=2, metavar=("LO", "HI"), help="the times t, 0 to 1, in which guidance acts"
    )
    how.add_argument(
        "--guide", nargs="+", metavar=("NAME", "KEY=VALUE"), help="how it acts, see: genflow info guidance; its options"
    )
    how.add_argument("--rescale", type=float, help="bring the contrast of guided pictures back, 0 (not) to 1 (all)")


def add_weights(how: argparse._ActionsContainer) -> None:
    """Which weights of a model, and on which device."""
    how.add_argument("--no-ema", action="store_true", help="the last weights instead of their average")
    how.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")


def add_lora(group: argparse._ArgumentGroup) -> None:
    """--lora, which `open_model` reads."""
    group.add_argument(
        "--lora",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="add LoRA runs, or files in diffusers' format, to the model; how strongly (1)",
    )


def take_loras(flow: Any, asked: Sequence[str]) -> None:
    """Add each PATH or PATH:WEIGHT to the flow; a path that is there may hold a colon. Raises UserError."""
    from genflow.interop.lora import load_lora

    for text in asked:
        path, weight = text, 1.0
        before, _, number = text.rpartition(":")
        if before and not Path(text).exists():
            with contextlib.suppress(ValueError):
                path, weight = before, float(number)
        load_lora(flow, path, weight=weight)


def add_dtype(
    group: argparse._ArgumentGroup,
    of: str = "of the network in sampling; the solve is in fp32 (fp32)",
    default: str | None = "fp32",
) -> None:
    """--dtype, which `refuse_dtype` checks."""
    group.add_argument("--dtype", choices=["fp32", "bf16"], default=default, help=of)


def refuse_dtype(args: argparse.Namespace, flow: Any) -> None:
    """Raises UserError where the model of args.run cannot draw in args.dtype."""
    from genflow.flows.latent import velocity_flow
    from genflow.training.precision import refusal

    if args.dtype == "fp32":
        return
    if velocity_flow(flow) is None:
        raise UserError(f"--dtype is for models of a velocity; {args.run} is a {type(flow).__name__}")
    if reason := refusal(args.dtype, flow.device):
        raise UserError(f"--dtype {args.dtype}: {reason}")


def add_decoding(how: argparse._ArgumentGroup) -> None:
    """The options of models of noise without a velocity, and of models of tokens."""
    how.add_argument(
        "--temperature",
        type=float,
        help="of a normalizing flow: standard deviation of the noise; of tokens: 1 the model's own, 0 greedy",
    )
    tokens = {"metavar": ("NAME", "KEY=VALUE"), "help": "of tokens, see: genflow info decoder; its options"}
    how.add_argument("--decoder", nargs="+", **tokens)  # type: ignore[arg-type]
    how.add_argument(
        "--draft",
        metavar="RUN",
        help="who guesses tokens: mtp (the model's modules), medusa (a run's own heads), or a run: a smaller model, heads",
    )
    how.add_argument("--top-k", type=int, metavar="K", help="the K likeliest tokens alone")
    how.add_argument("--top-p", type=float, metavar="P", help="the fewest likeliest tokens that have P together")


def read_shift(text: str) -> float | str:
    """A number, or "resolution", for argparse."""
    try:
        return text if text == "resolution" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'resolution'") from None


def open_model(args: argparse.Namespace, *, unguided: bool = False) -> tuple[Any, dict[str, Any]]:
    """The model of args.run, and how to sample from it (`sampling_of`)."""
    flow = _open(args)
    return flow, sampling_of(args, flow, unguided=unguided)


def _open(args: argparse.Namespace) -> Any:
    import torch

    if args.batch < 1:
        raise UserError(f"--batch must be 1 or more, not {args.batch}")
    if (args.device or "").partition(":")[0] == "meta":
        raise UserError("--device meta computes nothing; leave it out")
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    flow: Any = _load(args.run, ema=not args.no_ema, device=args.device or str(best))
    take_loras(flow, getattr(args, "lora", ()))
    return flow


def sampling_of(args: argparse.Namespace, flow: Any, *, unguided: bool = False) -> dict[str, Any]:
    """How to sample from the model of args.run: its own settings with those that were asked for.

    Where no sampler, grid or shift is asked for, those that `genflow tune` found for so many steps are taken. unguided:
    without guidance unless it is asked for, whatever the model's own settings say.
    """
    from genflow.config import from_dict
    from genflow.flows.tuned import tuned

    settings = (flow.recipe or {}).get("sample", {})
    from_dict(flow.config.sampling, settings, where=f"{args.run}: sample")  # which a person may have edited
    settings = dict(settings)
    asked = {
        "sampler": args.sampler,
        "steps": args.steps,
        "guidance": args.guidance,
        "interval": tuple(args.interval) if args.interval is not None else None,
        "guide": read_named("--guide", args.guide) if args.guide else None,
        "rescale": args.rescale,
        "shift": args.shift,
        "grid": args.grid,
        "options": read_options("--option", args.option) if args.option else None,
        "temperature": getattr(args, "temperature", None),
        "inverse": getattr(args, "inverse", None),
        "decoder": read_named("--decoder", args.decoder) if getattr(args, "decoder", None) else None,
        "draft": getattr(args, "draft", None),
        "top_k": getattr(args, "top_k", None),
        "top_p": getattr(args, "top_p", None),
        "cache": getattr(args, "cache", None),
    }
    takes = [f.name for f in fields(flow.config.sampling)]
    if wrong := [key for key, value in asked.items() if value is not None and key not in takes]:
        flag = {"options": "option"}.get(wrong[0], wrong[0].replace("_", "-"))
        raise UserError(f"--{flag} does nothing for a {type(flow).__name__}; what it takes: {', '.join(takes)}")
    if not flow.text.max_tokens and getattr(args, "weak", None) is None:
        for option in ("guidance", "interval", "guide", "rescale"):
            if asked[option] is not None and (option, asked[option]) != ("guidance", 1):
                raise UserError(f"--{option} does nothing: {args.run} hears no condition to guide to; leave it out")
    if args.sampler is not None:
        settings.pop("options", None)  # of another sampler
    if asked["decoder"] is not None:
        settings.pop("draft", None)  # of another decoder
    if unguided:
        settings["guidance"] = 1.0
    settings.update({key: value for key, value in asked.items() if value is not None})
    own = "grid" in takes and all(asked[key] is None for key in ("sampler", "shift", "grid", "options"))
    if own and isinstance(settings.get("steps"), int) and (found := tuned(args.run, settings["steps"])):
        settings.update(sampler=found["sampler"], grid=found["grid"], options=None, shift=1.0)
    if settings.get("guidance", 1) == 1:
        for option in ("interval", "guide", "rescale"):
            if asked[option] is not None:
                raise UserError(f"--{option} does nothing without guidance; add --guidance 2, or any number but 1")
    return settings


def _load(run: str, *, ema: bool, device: str) -> Any:
    """The flow of a run or model folder, or of a diffusers pipeline's folder."""
    if (Path(run) / "model_index.json").is_file():
        from genflow.interop.pipelines import open_pipeline

        if not ema:
            raise UserError(f"{run} is a pipeline, which has no averaged weights; leave --no-ema out")
        return open_pipeline(run, device=device)
    from genflow.flows.store import load

    return load(run, ema=ema, device=device)


def open_velocity(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """As `open_model`, for what needs a velocity. Raises UserError for other models."""
    flow = _open(args)
    if not hasattr(flow, "guided"):
        raise UserError(
            f"{args.run} is a {type(flow).__name__}, which has {has_instead(flow)}; this is for models of one"
        )
    return flow, sampling_of(args, flow)


def has_instead(flow: Any) -> str:
    """What a model has that lacks a velocity of its samples."""
    from genflow.flows.latent import velocity_flow

    return "no velocity" if velocity_flow(flow) is None else "a velocity of latents, none of pictures"


def refuse_unheard(args: argparse.Namespace, flow: Any, *prompts: str) -> None:
    """Raises UserError for prompts to a model that hears none; the empty one is no prompt."""
    if any(prompts) and not flow.text.max_tokens:
        raise UserError(
            f"{args.run} hears no condition; leave out what it should hear, {next(filter(None, prompts))!r}"
        )


def told_steps(sampler: str, steps: int) -> str:
    """Of a solve in words; an adaptive sampler chooses its own."""
    from genflow.flows.prepared import family

    return "own steps" if family(sampler) == "adaptive" else f"{steps} steps"


def refuse_fixed_steps(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Raises UserError for a number of steps, a grid and a shift where the sampler takes steps of its own from 1 to 0."""
    from genflow.flows.prepared import family

    if family(settings.get("sampler", "heun")) == "adaptive":
        for option in ("steps", "grid", "shift"):
            if getattr(args, option) is not None:
                raise UserError(
                    f"--{option} does nothing for sampler {settings['sampler']!r}, which chooses its own steps; "
                    "--option rtol=1e-3 makes them fewer"
                )


def refuse_sampling(args: argparse.Namespace) -> None:
    """Raises UserError for the options of sampling where a bijection is only run there and back."""
    for option in ("temperature", "guidance", "inverse"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} does nothing here, where pictures go to noise and exactly back; leave it out")


def real_data(section: dict[str, Any]) -> dict[str, Any]:
    """The section of the real data: of cached latents the pictures; of pairs what the first ancestor was trained on."""
    from genflow.data.latents import LatentsConfig
    from genflow.data.pairs import PairsConfig

    if section.get("name") == "latents":
        return LatentsConfig(section["path"]).head()["data"]
    return PairsConfig(section["path"]).build().about["data"] if section.get("name") == "pairs" else section


def first_state(flow: Any, seeds: Sequence[int]) -> Tensor:
    """Where the samples of these seeds begin: noise, of the standard deviation at the flow's first time."""
    from genflow.functional import noise_from_seeds

    return first_time(flow) * noise_from_seeds(seeds, flow.shape).to(flow.device)


def first_time(flow: Any) -> float:
    """Where its samples begin, which is also the standard deviation of the state there."""
    return getattr(flow, "t_max", 1.0)


def is_stochastic(settings: dict[str, Any]) -> bool:
    from genflow.flows.prepared import draws_noise

    return draws_noise(settings.get("sampler", "heun"))


def last_time(flow: Any) -> float:
    """Where a solve takes the predicted picture: below t_min the velocity of x-prediction does not lead to it."""
    return flow.t_min if getattr(flow.config, "prediction", None) == "x" else 0.0


def solver(flow: Any, settings: dict[str, Any], seeds: Sequence[int] = (), *, both_ways: bool = False) -> Any:
    """The sampler with its options, and with the seeds if it draws noise. Raises UserError where it may not.

    both_ways: to noise and back, along one velocity; else into the picture that x-prediction predicts.
    """
    from genflow.flows.prepared import check_noise
    from genflow.flows.sampling import into_picture
    from genflow.samplers import bound_sampler

    name = settings.get("sampler", "heun")
    check_noise(name, flow.config.coupling)
    solve = bound_sampler(name, settings.get("options") or {}, seeds)
    return solve if both_ways else into_picture(name, solve, last_time(flow))


def time_grid(flow: Any, settings: dict[str, Any], steps: int) -> list[float]:
    return flow.times(steps, settings.get("grid", "shifted"), settings.get("shift", 1.0))


def embed(flow: Any, prompts: list[str]) -> Any:
    """The embedded condition of each prompt."""
    return flow.embed(flow.text.encode(prompts).to(flow.device))


def guided(flow: Any, condition: Any, settings: dict[str, Any], **changes: Any) -> Any:
    """The velocity under an embedded condition, guided as the settings say."""
    how = {k: v for k, v in settings.items() if k in ("guidance", "interval", "guide", "rescale")}
    return flow.guided(condition, **{**how, **changes})


def writable(folder: str) -> Path:
    """The folder, which need not be there yet. Raises UserError where it cannot be: said before the drawing, not after."""
    if not folder:
        raise UserError("--out is empty; name a folder")
    out = Path(folder)
    there = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.lexists(path))
    if long := [name for name in out.parts if len(os.fsencode(name)) > 255]:
        raise UserError(f"--out: {long[0][:20]}... has {len(long[0])} letters, too many for a folder's name")
    if not there.is_dir():
        what = "a file" if there.exists() else "a link to what is not there"
        raise UserError(f"--out {out}: {there.name} is {what}; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: nothing can be written in {there}; name another folder")
    return out


def read_image(path: str) -> Image:
    """A picture file of any kind. Raises UserError, with its name, for what is none."""
    from genflow.data.images import BadImage, decode

    if not path:
        raise UserError("the name of a picture is empty; name a file")
    try:
        return decode(Path(path))
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error


def fit_image(image: Image, flow: Any) -> Tensor:
    """The centre of a picture, as large as the model's own: C x H x W float32 in [-1, 1], on its device.

    Raises UserError for a model of vectors.
    """
    from genflow.data.images import fit

    if len(flow.shape) == 1:
        raise UserError(f"the model makes vectors of {flow.shape[0]} numbers, not pictures; genflow sample draws them")
    return (fit(image, flow.shape[1:], flow.shape[0]).float() / 127.5 - 1).to(flow.device)


def read_named(flag: str, words: list[str]) -> dict[str, Any]:
    """NAME KEY=VALUE ... as the section that a config would hold."""
    return {"name": words[0], **read_options(flag, words[1:])}


def read_options(flag: str, words: list[str]) -> dict[str, Any]:
    """KEY=VALUE ... as a mapping."""
    options = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{flag}: {word!r} is not KEY=VALUE, such as eta=0.5")
        options[key] = _value(text)
    return options


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for read in (json.loads, float):
        with contextlib.suppress(ValueError):
            return read(text)
    return text
