"""genflow eval RUN"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

from genflow.cli.options import real_data, writable
from genflow.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a model folder")
    parser.add_argument("--split", default="test", help="of the run's data set (test)")
    parser.add_argument("-n", type=int, metavar="N", help="samples, the first of the split (default: all)")
    parser.add_argument("-k", type=int, default=1, metavar="K", help="draws of the dequantisation for each picture (1)")
    velocity = parser.add_argument_group("of a velocity's likelihood")
    velocity.add_argument("--divergence", help="exact, hutchinson, hutchinson_gaussian, hutch++ (exact to 16 numbers)")
    velocity.add_argument("--draws", type=int, metavar="N", help="of the divergence's estimator, for each sample (1)")
    velocity.add_argument("--tolerance", type=float, metavar="T", help="of the ODE solve, relative and absolute (1e-4)")
    parser.add_argument("--batch", type=int, default=64, help="samples at once; does not change the figure (64)")
    parser.add_argument("--no-ema", action="store_true", help="the last weights instead of their average")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--out", metavar="FILE", help="where the figure goes as JSON (default: RUN/eval.json)")


def run(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from genflow.config import Choice, from_dict
    from genflow.data.pictures import write_atomic
    from genflow.evaluation.likelihood import likelihood
    from genflow.flows.store import find_model, load

    flow = load(args.run, ema=not args.no_ema, device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out = _file(args)
    section = (flow.recipe or {}).get("data")
    if not section:
        raise UserError(f"{args.run} does not say which data it was trained on, so there is none to evaluate it with")
    section = real_data(section)
    data: Any = from_dict(Annotated[Any, Choice("dataset")], section, where=f"{args.run}: data")
    asked = {"divergence": args.divergence, "draws": args.draws, "rtol": args.tolerance, "atol": args.tolerance}
    how = {key: value for key, value in asked.items() if value is not None}
    begun = time.monotonic()
    with tqdm(total=args.n, unit="sample", dynamic_ncols=True, disable=None) as bar:
        what: dict[str, Any] = {"name": section["name"], "split": args.split, "n": args.n, "k": args.k}
        result = likelihood(flow, data, **what, batch=args.batch, progress=bar.update, **how)
    print(result)
    about = {
        **dataclasses.asdict(result),
        "error": result.error if math.isfinite(result.error) else None,  # JSON knows no NaN
        "data": section,
        "k": args.k,
        **how,
        "model": str(find_model(args.run)),
        "ema": not args.no_ema,
        "torch": torch.__version__,
        "device": str(flow.device),
        "seconds": round(time.monotonic() - begun, 1),
    }
    write_atomic(out, lambda file: file.write((json.dumps(about, indent=2) + "\n").encode()))
    return 0


def _file(args: argparse.Namespace) -> Path:
    """Where the figure goes. Raises UserError where it cannot: said before the evaluation, not after."""
    out = Path(args.out) if args.out else Path(args.run) / "eval.json"
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file, such as {out / 'eval.json'}")
    writable(str(out.parent))
    return out
