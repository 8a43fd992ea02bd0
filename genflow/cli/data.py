"""genflow data inspect SOURCE | genflow data cache CONFIG --out FOLDER"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from genflow.errors import UserError

CONFIGS = (".yaml", ".yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="inspect | cache")
    inspect = verbs.add_parser("inspect", help="counts, sizes, kinds, broken and doubled pictures, captions")
    inspect.add_argument(
        "source", help="a config (its data section), a folder of pictures, .parquet or .tar files, or a folder of them"
    )
    inspect.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of a config, such as data.styles=[noto]"
    )
    inspect.add_argument("--split", default="train", help="(train)")
    inspect.add_argument("--limit", type=int, metavar="N", help="look at N pictures, evenly spread (all)")
    inspect.add_argument("--out", metavar="FOLDER", help="for inspect.json and a contact sheet, contact-sheet.png")
    cache = verbs.add_parser(
        "cache", help="encode pictures and captions once, for training a flow latent without encoders"
    )
    cache.add_argument(
        "config", help="a config of a flow latent; its data, flow.autoencoder, text and init say what to do"
    )
    cache.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    cache.add_argument(
        "--out", metavar="FOLDER", required=True, help="then train with data={name: latents, path: FOLDER}"
    )
    cache.add_argument("--split", default="train", help="(train)")
    cache.add_argument("--dtype", default="float16", help="of latents: float32, float16, bfloat16 (float16)")
    cache.add_argument("--batch", type=int, default=16, metavar="N", help="pictures at once (16)")
    cache.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")


def run(args: argparse.Namespace) -> int:
    return _inspect(args) if args.verb == "inspect" else _cache(args)


def _cache(args: argparse.Namespace) -> int:
    import torch

    from genflow.cli.options import writable
    from genflow.config import load, to_dict
    from genflow.data.images import ImageDataset
    from genflow.data.latents import LatentsConfig
    from genflow.data.latents_cache import cache_latents
    from genflow.training.config import RunConfig, shape_of
    from genflow.training.warm import autoencoder_of

    out = writable(args.out)
    config = load(args.config, args.overrides, schema=RunConfig)
    autoencoder = autoencoder_of(config)
    dataset = config.data.build(args.split)
    if not isinstance(dataset, ImageDataset):
        raise UserError(f"{args.config}: its data are no pictures but a {type(dataset).__name__}")
    report = cache_latents(
        out / args.split,
        dataset,
        autoencoder,
        config.text.build(),
        shape=shape_of(config.data),
        flip=getattr(config.data, "flip", False),
        dtype=args.dtype,
        batch=args.batch,
        device=args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu",
        about={"data": to_dict(config.data)},
    )
    for name, reason in report.bad[:10]:
        print(f"left out {name}: {reason}")
    more = f", {report.there} shards were there" * bool(report.there)
    print(f"{report.samples} pictures encoded, {len(report.bad)} broken ones left out{more}: {out / args.split}")
    if report.elsewhere:
        print(f"{report.elsewhere} shards are being written by other processes; the cache is whole when they are done")
        return 0
    mean, std = LatentsConfig(args.out).build(args.split).moments
    mean, std = (mean - float(autoencoder.shift)) * float(autoencoder.scale), std * float(autoencoder.scale)
    print(f"latents as the flow sees them: mean {mean:.3f}, standard deviation {std:.3f} (best near 0 and 1)")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from genflow.cli.options import writable
    from genflow.data.images import ImageDataset
    from genflow.data.inspect import inspect_data

    out = writable(args.out) if args.out else None
    config = data_of(args.source, args.overrides)
    dataset = config.build(args.split)
    if not isinstance(dataset, ImageDataset):
        raise UserError(f"{args.source} holds no pictures but a {type(dataset).__name__}; inspect looks at pictures")
    size = getattr(config, "size", None) if Path(args.source).suffix in CONFIGS else None  # of files as they lie, none
    found, sheet = inspect_data(dataset, size=size, limit=args.limit)
    print(found.report())
    if out is not None:
        found.save(out)
        if sheet is not None:
            sheet.save_atomic(out / "contact-sheet.png")
        print(f"written: {out}")
    return 0


def data_of(source: str, overrides: list[str]) -> Any:
    """The data section that a source means: of a config file, or for files and folders of pictures as they lie there.

    A folder or pattern of .tar or .parquet files is of those, any other one of pictures.
    """
    from genflow.config import load
    from genflow.data.folders import FolderConfig
    from genflow.data.streaming import WebDatasetConfig
    from genflow.data.tables import ParquetConfig
    from genflow.training.config import RunConfig

    path = Path(source)
    if path.suffix in CONFIGS:
        return load(path, overrides, schema=RunConfig).data
    if overrides:
        raise UserError(f"{overrides[0]}: overrides are for a config, and {source} is none")
    kinds = {".tar": WebDatasetConfig, ".parquet": ParquetConfig}
    for suffix, kind in kinds.items():
        if path.suffix == suffix or (path.is_dir() and any(path.glob(f"[!.]*{suffix}"))):
            return kind(source)
    return FolderConfig(source)
