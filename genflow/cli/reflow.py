"""genflow reflow RUN --pairs N --out FOLDER"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from genflow.cli.options import add_solving, open_velocity, real_data, refuse_fixed_steps, writable
from genflow.errors import UserError

GUIDANCE = ("guidance", "interval", "guide", "rescale")
SOLVING = ("sampler", "option", "steps", "grid", "shift", "temperature", "inverse", *GUIDANCE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="the flow to straighten: a run's folder, one of its checkpoints, or a model folder")
    parser.add_argument("--pairs", type=int, default=10000, metavar="N", help="of noise and sample (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first pair; the next have the next seeds (0)")
    parser.add_argument("--distill", action="store_true", help="learn t = 1 alone: a model of one step")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="for each distance in the table (1000)")
    parser.add_argument("--features", metavar="GRAPH.json", help="the network of the distances (default: coordinates)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the next run's config, such as train.steps=2000"
    )
    add_solving(parser)
    parser.add_argument("--out", metavar="FOLDER", help="the next run, its pairs in FOLDER/pairs (RUN-reflow)")


def run(args: argparse.Namespace) -> int:
    for name in ("pairs", "samples"):
        if (value := getattr(args, name)) < (least := {"pairs": 1, "samples": 2}[name]):
            raise UserError(f"--{name} {value} is too few; the least is {least}")
    from genflow.flows.rectified import RectifiedFlow
    from genflow.flows.reflow import check_pairing
    from genflow.training.run import train
    from genflow.training.signals import Interrupted
    from genflow.training.warm import warm_start

    out = writable(args.out or f"{str(args.run).rstrip('/')}-{'distilled' if args.distill else 'reflow'}")
    flow, settings = open_velocity(args)
    if not isinstance(flow, RectifiedFlow):
        raise UserError(f"{args.run} is a {type(flow).__name__}; only a rectified flow can be reflowed")
    refuse_fixed_steps(args, settings)
    check_pairing(settings.get("sampler", "heun"))
    config, data = _next_run(args, flow, out)
    table = _Table(args, data, flow.shape)
    rows = {"before": table.row(flow, settings)}
    _draw(args, flow, settings, data.captions, out / "pairs")
    warm_start(config, flow, out)
    try:
        train(config)
    except Interrupted:
        print("stopped and saved; to go on, give the same command again", file=sys.stderr)
        return 130
    after = argparse.Namespace(**{**vars(args), "run": str(out), **dict.fromkeys(SOLVING)})
    rows["after"] = table.row(*open_velocity(after))
    table.report(rows, out)
    return 0


def _next_run(args: argparse.Namespace, flow: Any, out: Path) -> tuple[Any, Any]:
    """The config of the next run, laid down as reflow.yaml, and the data that the present one was trained on."""
    from dataclasses import replace
    from typing import Annotated

    from genflow.config import Choice, dump, from_dict, load
    from genflow.data.pairs import PairsConfig
    from genflow.flows.reflow import reflow_config
    from genflow.saving import replacing
    from genflow.training.config import RunConfig

    recipe = {key: value for key, value in flow.recipe.items() if key not in ("shape", "base")}
    if "data" not in recipe:
        raise UserError(f"{args.run} does not say what it was trained on, which reflow takes prompts from")
    data = from_dict(Annotated[Any, Choice("dataset")], real_data(recipe["data"])).build("train")
    config = from_dict(RunConfig, recipe, where=str(args.run))
    sample = replace(config.sample, guidance=1.0)
    config = replace(
        config,
        data=PairsConfig(str(out / "pairs")),
        text=replace(config.text, drop=0.0)
        if hasattr(config.text, "drop")
        else config.text,  # guidance is in the pairs
        flow=reflow_config(flow.config, distill=args.distill),
        sample=replace(sample, sampler="euler", options=None, steps=1, grid="uniform") if args.distill else sample,
        train=replace(config.train, lora=None, validate_every=0),  # a LoRA is in the weights
        out=str(out),
    )
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is below 0")
    if (out / "config.yaml").exists() and not (out / "reflow.yaml").exists():
        raise UserError(f"{out} is another run's folder; choose another --out")
    if wrong := [each for each in args.set if each.partition("=")[0].split(".")[0] in ("out", "data")]:
        raise UserError(f"--set {wrong[0]}: the pairs and the run go to --out; leave it out")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "reflow.yaml") as temporary:
        dump(config, temporary)
    return load(out / "reflow.yaml", args.set, schema=RunConfig), data


def _draw(args: argparse.Namespace, flow: Any, settings: dict[str, Any], captions: list[str], folder: Path) -> None:
    """Write the pairs, whose prompts are the training captions in an order drawn from the seed."""
    import torch
    from tqdm import tqdm

    from genflow.data.pairs import write_pairs
    from genflow.flows.reflow import draw_pairs
    from genflow.flows.store import weights_of

    prompts = _prompts(captions, args.pairs, args.seed)
    about = {
        "run": str(args.run),
        "weights": weights_of(args.run, ema=not args.no_ema),
        "data": real_data(flow.recipe["data"]),
        "seeds": [args.seed, args.seed + args.pairs],
        "settings": settings,
        "torch": torch.__version__,
    }
    with tqdm(total=args.pairs, unit="pair", dynamic_ncols=True, disable=None) as bar:

        def draw(numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
            seeds = [args.seed + i for i in numbers]
            pair = draw_pairs(flow, [prompts[i] for i in numbers], seeds, batch=args.batch, **settings)
            bar.update(len(numbers))
            return pair

        write_pairs(folder, draw, captions=prompts, shape=flow.shape, about=about)


def _prompts(captions: list[str], n: int, seed: int) -> list[str]:
    import torch

    from genflow.functional import Rng

    order = Rng(seed).bits("reflow", torch.arange(n)).remainder(len(captions))
    return [captions[i] for i in order.tolist()]


class _Table:
    """Straightness, and the Frechet distance to real samples after few steps, before and after."""

    def __init__(self, args: argparse.Namespace, data: Any, shape: tuple[int, ...]) -> None:
        from genflow.evaluation.features import graph_features, pixel_features
        from genflow.evaluation.frechet import frechet_distance

        self.features = graph_features(args.features) if args.features else pixel_features
        self.name = Path(args.features).stem if args.features else "coordinates"
        self.n, self.batch = min(args.samples, len(data) // 2), args.batch
        if self.n < 2:
            raise UserError(f"{len(data)} training samples are too few to measure distances with; 4 are the least")
        real = _real(data, 2 * self.n, shape)
        self.real, other = real.split(self.n)
        self.floor = frechet_distance(*(self._of(each) for each in (self.real, other)))
        self.prompts = _prompts(data.captions, self.n, args.seed + args.pairs)
        self.seeds = list(range(args.seed + args.pairs, args.seed + args.pairs + self.n))  # those after the pairs'

    def _of(self, samples: Any) -> Any:
        import torch

        return torch.cat([self.features(part) for part in samples.split(self.batch)])

    def row(self, flow: Any, settings: dict[str, Any]) -> Any:
        from tqdm import tqdm

        from genflow.evaluation.few_steps import COUNTS, few_steps

        guidance = {key: value for key, value in settings.items() if key in GUIDANCE}
        with tqdm(total=self.n * len(COUNTS), unit="sample", desc="measuring", dynamic_ncols=True, disable=None) as bar:
            return few_steps(
                flow,
                self.real,
                self.prompts,
                self.seeds,
                features=self.features,
                batch=self.batch,
                progress=bar.update,
                **guidance,
            )

    def report(self, rows: dict[str, Any], out: Path) -> None:
        """Print the table, and write it as reflow.json and reflow.md, with the plot reflow.png."""
        from genflow.data.pictures import write_atomic
        from genflow.evaluation.few_steps import plot_few_steps
        from genflow.evaluation.plots import save_plot

        before, after = rows.values()
        counts = list(before.distance)
        head = ["", "straightness", *(f"{k} step{'s' * (k > 1)}" for k in counts)]
        lines = [[name, *map(_number, (row.straightness, *row.distance.values()))] for name, row in rows.items()]
        pairs = [(before.straightness, after.straightness), *((before.distance[k], after.distance[k]) for k in counts)]
        lines.append(["before / after", *(f"{was / now:.2f} x" if now > 0 else "-" for was, now in pairs)])
        lines.append(["real to real", "", *[_number(self.floor)] * len(counts)])
        what = f"Frechet distance by {self.name} of {self.n} samples to as many real ones, Euler's method"
        print(f"{what}:")
        for line in (head, *lines):
            print(f"{line[0]:14}{line[1]:>14}" + "".join(f"{cell:>12}" for cell in line[2:]))

        found = {name: {"straightness": row.straightness, "distance": row.distance} for name, row in rows.items()}
        about = {"features": self.name, "samples": self.n, "real_to_real": self.floor, **found}
        write_atomic(out / "reflow.json", lambda file: file.write((json.dumps(about, indent=2) + "\n").encode()))
        table = [f"| {' | '.join(line)} |" for line in (head, ["---", *["---:"] * (len(head) - 1)], *lines)]
        legend = "Straightness: the mean square of the velocity's way off the straight path, per number; 0 is straight."
        text = "\n".join([*table, "", f"{what}. {legend}", ""])
        write_atomic(out / "reflow.md", lambda file: file.write(text.encode()))
        save_plot(plot_few_steps(rows, floor=self.floor, features=self.name), out / "reflow.png")
        print(f"the next flow, its pairs, and reflow.json, .md and .png in {out}")


def _number(value: float) -> str:
    return f"{value:.4g}"


def _real(data: Any, n: int, shape: tuple[int, ...]) -> Any:
    """n training samples in an order of their own: n x *shape."""
    import torch

    from genflow.data.loading import epoch_order, loader
    from genflow.data.prepared import PreparedConditions
    from genflow.text.none import NoTextConfig

    conditions = PreparedConditions.prepare(data, NoTextConfig().build())
    keys = [(i, p) for p, i in enumerate(epoch_order(len(data), 0, 0)[:n].tolist())]
    batches = [keys[i : i + 256] for i in range(0, n, 256)]
    return torch.cat([batch.x for batch in loader(data, conditions, batches, shape=shape)])
