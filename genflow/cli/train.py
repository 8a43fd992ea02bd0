"""genflow train CONFIG [key=value ...]"""

from __future__ import annotations

import argparse
import os
import shlex
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, for example configs/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for example train.steps=500 model.depth=8"
    )


def run(args: argparse.Namespace) -> int:
    from genflow.flows.store import find_model, read_config
    from genflow.training.run import train
    from genflow.training.signals import Interrupted

    speaks = os.environ.get("RANK", "0") == "0"  # of several processes, one
    try:
        folder = train(args.config, args.overrides)
    except Interrupted:
        if speaks:
            again = shlex.join(["genflow", "train", args.config, *args.overrides])
            print(f"stopped and saved; to go on: {again}", file=sys.stderr)
        return 130
    if speaks:
        recipe, run = read_config(find_model(folder)), shlex.quote(str(folder))
        if recipe["flow"]["name"] == "autoencoder":  # which draws nothing
            print(f"trained: {folder}; to measure: genflow eval {run}", file=sys.stderr)
            return 0
        text = recipe["text"]
        words = {"none": "", "labels": f" --class {shlex.quote(str(text.get('classes', ['...'])[0]))}"}
        prompt = words.get(text["name"], ' --prompt "..."')
        print(f"trained: {folder}; to draw: genflow sample {run}{prompt}", file=sys.stderr)
    return 0
