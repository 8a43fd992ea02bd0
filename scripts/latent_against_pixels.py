"""Text to image in latents and in pixels, of one network and one time: which draws better?

usage: python scripts/latent_against_pixels.py --data emoji64.parquet --features GRAPH.json
       (--taef FOLDER | --autoencoder RUN) [--minutes 120] [--work FOLDER] [-n 2000] [KEY=VALUE ...]

Pictures of 64 x 64 as 64 tokens in both: patches of 8 x 8 pixels, or latents of an autoencoder by 8, which is given and
whose own training does not count. Both are trained by the config emoji-mmdit for as many steps as its pace on this machine,
measured first, makes in --minutes. Prints the Frechet distance and the alignment of both. Under --work everything is kept:
what is there is taken up again, for the same --minutes. KEY=VALUE: changes of both configs, such as model.hidden=256.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from claims.common import told

from genflow.cli import main as genflow
from genflow.config import load as load_config
from genflow.data.images import fit
from genflow.data.pictures import write_atomic
from genflow.errors import UserError
from genflow.flows.store import load, newest_checkpoint, save_model
from genflow.interop.taef import load_taef
from genflow.training.config import RunConfig
from genflow.training.precision import resolve_precision
from genflow.training.ranks import join_processes

CONFIG = str(Path(__file__).parents[1] / "configs" / "emoji-mmdit.yaml")
FLOW = "{name: rectified, prediction: x, whiten: 0.1, density: {name: logit_normal, mean: 0.5}}"  # as in CONFIG
SIZE, TOKEN, MEASURED, PROBE = 64, 8, 256, 60  # pixels a side, of a token; pictures for the latents' scale; steps


def call(*words: str) -> None:
    if genflow([*words]):
        sys.exit(f"latent_against_pixels: genflow {words[0]} has failed, as said above")


def agreed(work: Path, minutes: float) -> str:
    """The precision of both sides, found once for these minutes. Raises UserError where `work` holds runs of others."""
    file = work / "agreed.json"
    if not file.exists():
        found = json.dumps({"minutes": minutes, "precision": resolve_precision("auto", join_processes())[0]})
        write_atomic(file, lambda out: out.write(found.encode()))
    kept = json.loads(file.read_text())
    if kept["minutes"] != minutes:
        raise UserError(f"--minutes {minutes:g}: {work} holds runs of {kept['minutes']:g}; name another --work")
    return kept["precision"]


def evenly(n: int) -> list[int]:
    """Numbers of pictures for the latents' scale, of n."""
    return torch.linspace(0, n - 1, min(n, MEASURED)).long().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="PARQUET", help="captioned pictures")
    parser.add_argument("--features", required=True, metavar="GRAPH.json", help="what distances are measured with")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--taef", metavar="FOLDER", help="a tiny autoencoder's weights")
    given.add_argument("--autoencoder", metavar="RUN", help="a run of an autoencoder by 8")
    parser.add_argument("--minutes", type=float, default=120, help="of training each, at the pace measured first (120)")
    parser.add_argument("--work", type=Path, default=Path("latent-against-pixels"))
    parser.add_argument("-n", type=int, default=2000, help="samples of the Frechet distance (2000)")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of both configs")
    args = parser.parse_args()

    data = f"data={{name: parquet, path: {args.data}, size: {SIZE}, caption: prompt}}"
    model = args.autoencoder or str(args.work / "autoencoder")
    if args.taef and not (args.work / "autoencoder").exists():
        pictures = load_config(CONFIG, [data], schema=RunConfig).data.build("train")
        flow = load_taef(args.taef, size=SIZE)
        flow.measure(torch.stack([fit(pictures.image(i), SIZE, 3) for i in evenly(len(pictures))]) / 127.5 - 1)
        save_model(model, config=flow.recipe, state=flow.state_dict())
    latent = f"flow={{name: latent, autoencoder: {{name: trained, run: {model}}}, flow: {FLOW}}}"
    sides = {
        "pixels": [data, f"model.patch_size={TOKEN}"],
        "latents": [f"data={{name: latents, path: {args.work / 'cache'}}}", latent, "model.patch_size=1"],
    }
    both = [f"train.precision={agreed(args.work, args.minutes)}", *args.changes]
    cache = [data, latent, "model.patch_size=1", *args.changes]
    call("data", "cache", CONFIG, *cache, "--out", str(args.work / "cache"))

    figures = {}
    for name, words in sides.items():
        run, words = args.work / name, [*words, *both]
        if newest_checkpoint(run) is None:
            probe = args.work / f"probe-{name}"
            quiet = [f"out={probe}", f"train.steps={PROBE}", "train.log_every=5", "train.preview_every=0"]
            call("train", CONFIG, *words, *quiet, "train.validate_every=0", "train.warmup=10")
            lines = [json.loads(line) for line in (probe / "metrics.jsonl").read_text().splitlines()]
            rate = sorted(line["images_per_s"] for line in lines if "images_per_s" in line)[-3]
            batch = load(probe).recipe["train"]["batch_size"]
            steps = max(int(rate * 60 * args.minutes / batch), 2)
        else:
            steps = load(run).recipe["train"]["steps"]
        call("train", CONFIG, *words, f"out={run}", f"train.steps={steps}", "train.validate_every=0")
        out = run / "eval"
        measured = ["--metrics", "fd", "alignment", "-n", str(args.n), "--features", args.features]
        call("eval", str(run), *measured, "--dtype", "bf16", "--out", str(out))
        found = {each["name"]: each for each in json.loads((out / "figures.json").read_text())["figures"]}
        precision = load(run).recipe["train"]["precision"]
        figures[name] = {**{key: each["value"] for key, each in found.items()}, "steps": steps}
        real = {key: each["real"] for key, each in found.items()}
    figures["real"] = real
    print(f"{args.minutes:g} minutes each, in {precision}\n| | {' | '.join(figures)} |\n|---|{'---|' * len(figures)}")
    for key in figures["pixels"]:
        print(f"| {key} | " + " | ".join(f"{side[key]:.4g}" if key in side else "" for side in figures.values()) + " |")
    (args.work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    told(main)
