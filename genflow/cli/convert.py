"""genflow convert SOURCE OUT"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="folder of a diffusers SD3 pipeline or transformer, a .safetensors file, or a genflow run or model",
    )
    parser.add_argument("out", help="a new folder, or a file that ends in .safetensors for Stability's layout")
    parser.add_argument(
        "--to",
        metavar="LAYOUT",
        help="genflow, diffusers or stability (by the name of OUT; else diffusers for a genflow model, genflow for others); "
        "lora: of a LoRA run its updates alone, as diffusers loads them",
    )
    parser.add_argument(
        "--like",
        metavar="PIPELINE",
        help="a diffusers pipeline folder that lends what SOURCE lacks: autoencoder, text encoders, tokenizers",
    )
    parser.add_argument("--no-ema", action="store_true", help="of a genflow model, the last weights, not their average")


def run(args: argparse.Namespace) -> int:
    from genflow.interop.convert import convert

    for note in convert(args.source, args.out, to=args.to, like=args.like, ema=not args.no_ema):
        print(f"note: {note}")
    print(f"written: {args.out}")
    return 0
