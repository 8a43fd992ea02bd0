"""genflow bench flows: Glow and a neural spline flow, beside normflows' and zuko's."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genflow.errors import UserError
from genflow.evaluation.bench import Contest, Side, Task
from genflow.flows.bijections.base import Chain
from genflow.flows.bijections.coupling import SplineCoupling
from genflow.flows.models.glow import GlowConfig
from genflow.flows.models.nsf import NSFConfig
from genflow.flows.normalizing import standard_normal
from genflow.interop import peers
from genflow.networks.couplers import MLP

FEATURES, BINS, BOUND = 64, 8, 5.0  # of the spline flows
DEFAULTS = {"glow": {"steps": 8, "hidden": 128, "batch": 32}, "nsf": {"steps": 4, "hidden": 256, "batch": 1024}}


def flowing(args: argparse.Namespace) -> list[Contest]:
    """Training, sampling and likelihood of Glow and of a neural spline flow."""
    works = [args.model] if args.model else list(DEFAULTS)
    if args.against is not None:
        works = peers.check_peer(args.against, works)
    for name in ("steps", "hidden", "batch", "levels", "size"):
        if getattr(args, name) is not None and len(works) > 1:
            raise UserError(f"--{name} is of one model; add --model {' or --model '.join(works)}")
        if getattr(args, name) is not None and works == ["nsf"] and name in ("levels", "size"):
            raise UserError(f"--{name} is of glow; leave it out, or take --model glow")
    return [{"glow": glow, "nsf": nsf}[work](args) for work in works]


def glow(args: argparse.Namespace) -> Contest:
    peer = args.against
    names = [name for name in ("genflow", peer) if name]
    sizes = _sizes(args, "glow")
    size, levels = args.size or 32, args.levels or 3
    what = f"Glow: 3 x {size} x {size}, {levels} levels of {sizes['steps']} steps, hidden {sizes['hidden']}"
    pairs = (("genflow fp32", f"{peer} fp32"), ("genflow bf16", f"{peer} bf16"), ("genflow bf16", f"{peer} fp32"))
    return Contest(
        f"{what}, batch {sizes['batch']}; bf16: its networks under autocast",
        tuple(f"{name} {precision}" for name in names for precision in ("fp32", "bf16")),
        partial(glow_side, args.device, (3, size, size), levels, sizes),
        tuple(Task(name, "images", sizes["batch"]) for name in ("training", "likelihood", "sampling")),
        torch.float32,
        pairs=pairs if peer else (),
        memory="training",
    )


def glow_side(device: torch.device, shape: tuple[int, ...], levels: int, sizes: dict[str, int], name: str) -> Side:
    torch.manual_seed(0)
    batch = sizes["batch"]
    x = torch.rand(batch, *shape) * 2 - 1
    precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=name.endswith("bf16"))
    if name.startswith("genflow"):
        model: Any = GlowConfig(levels, sizes["steps"], sizes["hidden"], shape=shape, condition_dim=0).build()
        model.initialise(x)
        return _side(model, x.to(device), partial(_log_prob, model), partial(_decode, model, shape, device), precision)
    model = peers.normflows_glow(shape, levels, sizes["steps"], sizes["hidden"])
    return _side(model, x.to(device), lambda x: model.log_prob(x, None), model.sample, precision, model.forward_kld)


def nsf(args: argparse.Namespace) -> Contest:
    sizes = _sizes(args, "nsf")
    peer = args.against
    what = f"RQ-NSF of {FEATURES} numbers: {sizes['steps']} couplings, hidden {sizes['hidden']}, {BINS} bins"
    return Contest(
        f"{what}, batch {sizes['batch']}, fp32",
        ("genflow couplings", peer, "genflow nsf") if peer else ("genflow nsf",),
        partial(nsf_side, args.device, sizes),
        tuple(Task(name, "rows", sizes["batch"]) for name in ("training", "likelihood", "sampling")),
        torch.float32,
        pairs=(("genflow couplings", peer), ("genflow nsf", peer)) if peer else (),
        memory="training",
    )


def nsf_side(device: torch.device, sizes: dict[str, int], name: str) -> Side:
    """genflow couplings: bare couplings whose halves change places, as zuko's are; genflow nsf: the model of that name."""
    torch.manual_seed(0)
    steps, hidden = sizes["steps"], sizes["hidden"]
    x, precision = torch.randn(sizes["batch"], FEATURES).to(device), partial(torch.autocast, device.type, enabled=False)
    if not name.startswith("genflow"):
        peer: Any = peers.zuko_nsf(FEATURES, steps, hidden, BINS)
        note = f"{peers.masked_parameters(peer):,} of them masked"
        return _side(peer, x, lambda x: peer().log_prob(x), lambda n: peer().sample((n,)), precision, note=note)
    shape = (FEATURES,)
    network = partial(MLP, hidden=(hidden, hidden))
    couplings = (SplineCoupling(shape, flip=i % 2 == 1, network=network, bins=BINS, bound=BOUND) for i in range(steps))
    full = NSFConfig(steps=steps, bins=BINS, bound=BOUND, hidden=hidden, blocks=1, shape=shape, condition_dim=0)
    model = full.build() if name.endswith("nsf") else Chain(couplings)
    return _side(model, x, partial(_log_prob, model), partial(_decode, model, shape, device), precision)


def _side(
    model: nn.Module,
    x: Tensor,
    log_prob: Callable[[Tensor], Tensor],
    sample: Callable[[int], object],
    precision: Callable[[], AbstractContextManager],
    loss: Callable[[Tensor], Tensor] | None = None,
    note: str = "",
) -> Side:
    """A flow's training step, with fused Adam, its likelihood and its samples. loss: if it is not -log_prob's mean."""
    model.to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        with precision():
            value = -log_prob(x).mean() if loss is None else loss(x)
        value.backward()
        optimizer.step()

    def evaluated(run: Callable[[], object]) -> Callable[[], object]:
        def evaluate() -> object:
            model.eval()
            with torch.no_grad(), precision():
                return run()

        return evaluate

    tasks = {
        "training": train,
        "likelihood": evaluated(lambda: log_prob(x)),
        "sampling": evaluated(lambda: sample(len(x))),
    }
    return Side.of(model, tasks, note=note)


def _log_prob(model: Any, x: Tensor) -> Tensor:
    z, ladj = model(x)
    return standard_normal(z) + ladj


def _decode(model: Any, shape: tuple[int, ...], device: torch.device, n: int) -> object:
    return model.decode(torch.randn(n, *shape, device=device))


def _sizes(args: argparse.Namespace, model: str) -> dict[str, int]:
    return {name: getattr(args, name) or default for name, default in DEFAULTS[model].items()}
