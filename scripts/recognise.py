"""Is the picture of a prompt its own? python scripts/recognise.py RUN [--features GRAPH.json] [--out GRID.png]

Draws 64 prompts of the run's training set, generates each, and looks for the generated picture's nearest neighbour among
its own training picture and 255 others, or all there are: by pixels, and by a feature network where one is given (a JSON
graph of convolutions with a .safetensors of the same name beside it). Prints the share that finds its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from claims.common import told

import genflow
from genflow.cli.eval import data_of
from genflow.data.images import fit
from genflow.data.pictures import caption_grid
from genflow.errors import UserError
from genflow.evaluation.features import graph_features, pixel_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--features", metavar="GRAPH.json")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--others", type=int, default=255)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--out", metavar="GRID.png", help="true (left) and generated (right) pictures side by side")
    args = parser.parse_args()

    flow = genflow.load(args.run)
    if len(flow.shape) != 3:
        raise UserError(f"{args.run} draws vectors of {flow.shape[0]} numbers; this is for models of pictures")
    dataset = data_of(flow, args.run)[1].build("train")
    channels, *size = flow.shape
    pictures = torch.stack([fit(dataset.image(i), tuple(size), channels) for i in range(len(dataset))]) / 127.5 - 1
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(dataset), generator=generator)[: args.prompts].tolist()
    settings = dict(flow.recipe["sample"])
    if args.guidance is not None:
        settings["guidance"] = args.guidance
    prompts = [dataset.captions[i] for i in chosen]
    generated = flow.sample(prompts, seeds=list(range(len(chosen))), **settings).x
    print(f"{args.run}: {len(dataset)} training pictures, {len(chosen)} prompts, {settings}")
    kinds = {"pixels": pixel_features} | ({args.features: graph_features(args.features)} if args.features else {})
    for name, features in kinds.items():
        known = torch.cat([features(part) for part in pictures.split(128)])
        found = 0
        for i, feature in zip(chosen, features(generated), strict=True):
            others = torch.randperm(len(dataset), generator=generator)
            gallery = torch.cat([torch.tensor([i]), others[others != i][: args.others]])
            found += int((known[gallery] - feature).square().sum(1).argmin() == 0)
        share = f"{found}/{len(chosen)} = {found / len(chosen):.0%}"
        print(f"nearest of {len(gallery)} is its own picture, by {name}: {share}")
    error = (generated - pictures[chosen]).square().flatten(1).mean(1).sqrt()
    print(f"root mean square error of a pixel, in [-1, 1]: {error.mean():.3f} on average, {error.max():.3f} at worst")
    if args.out:
        pairs = torch.cat([pictures[chosen], generated], dim=3)
        caption_grid(pairs, prompts, columns=8).save_atomic(Path(args.out))


if __name__ == "__main__":
    told(main)
