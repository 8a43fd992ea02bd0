"""Test NLL in the plane after the same time of training: zuko's NSF, and genflow's spline, continuous and matched flows.

usage: python scripts/compare_toy2d.py [--kinds checkerboard moons] [--minutes 2] [--models ...]

All are trained by the same loop: Adam on batches of 512 points, one schedule over the time, one average of the weights; the
time is the processor's (minutes of one core). The NLL is of 10,000 test points, in nats, beside that of the true density.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import get_args, get_type_hints

import torch
from claims.common import told
from torch import Tensor, nn

from genflow.data.toy2d import Toy2DConfig
from genflow.flows.couplings import OptimalTransport
from genflow.flows.densities import Uniform
from genflow.flows.models.ffjord import FFJORDConfig
from genflow.flows.models.nsf import NSFConfig
from genflow.flows.normalizing import NormalizingFlowConfig
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.functional import Rng
from genflow.networks.velocity import MLPVelocityConfig
from genflow.text.none import NoTextConfig
from genflow.training.ema import EMA

BATCH = 512
KINDS = [kind for kind in get_args(get_type_hints(Toy2DConfig)["kind"]) if kind != "picture"]
Losses = tuple[nn.Module, Callable[[Tensor, int], Tensor], Callable[[Tensor], Tensor]]  # loss(x, step), nll(x): B


class Batch:
    def __init__(self, x: Tensor, step: int) -> None:
        self.x, self.condition = x, NoTextConfig().build().encode([""] * len(x))
        self.position = torch.arange(step * len(x), (step + 1) * len(x))


def of_flow(config: object, network: nn.Module) -> Losses:
    flow = config.build(network, NoTextConfig().build(), shape=(2,))  # type: ignore[attr-defined]
    return flow, lambda x, step: flow.loss(Batch(x, step), Rng(0, step)).loss, lambda x: -flow.log_prob(x)


def zuko_nsf() -> Losses:
    """Its defaults but for wider networks; autoregressive."""
    import zuko

    flow = zuko.flows.NSF(2, transforms=3, hidden_features=(128, 128))
    return flow, lambda x, _: -flow().log_prob(x).mean(), lambda x: -flow().log_prob(x)


MODELS: dict[str, tuple[float, Callable[[], Losses]]] = {  # learning rate, builder
    "zuko-nsf": (1e-3, zuko_nsf),
    "nsf": (2e-3, lambda: of_flow(NormalizingFlowConfig(), NSFConfig(shape=(2,), condition_dim=0).build())),
    "ffjord": (
        5e-3,
        lambda: of_flow(
            NormalizingFlowConfig(),
            FFJORDConfig(shape=(2,), condition_dim=0, divergence="exact", rtol=1e-4, atol=1e-4).build(),
        ),
    ),
    "flow-matching": (
        2e-3,
        lambda: of_flow(
            RectifiedFlowConfig(density=Uniform(), coupling=OptimalTransport(), drop_condition=0.0),
            MLPVelocityConfig(hidden=128, depth=3, shape=(2,), pooled_dim=0).build(),
        ),
    ),
}


def run(name: str, rows: Tensor, test: Tensor, minutes: float) -> tuple[float, int]:
    """The NLL of the test points, nats, and the steps taken."""
    torch.manual_seed(0)
    lr, build = MODELS[name]
    model, loss_of, nll = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    ema, used, step = EMA(model, 0.05), 0.0, 0
    while used < 60 * minutes:
        begun = time.process_time()
        x = rows[Rng(0, step).bits("order", torch.arange(BATCH)).remainder(len(rows))]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * min(1.0, (1 - used / (60 * minutes)) / 0.5)
        optimizer.zero_grad()
        loss_of(x, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        ema.update(step)
        used += time.process_time() - begun
    model.eval()
    with torch.no_grad(), ema.swapped():
        return float(torch.cat([nll(part) for part in test.split(1000)]).double().mean()), step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["checkerboard", "moons"])
    parser.add_argument("--minutes", type=float, default=2, help="of one core, for each model (2)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.minutes} minutes of one core each")
    for kind in args.kinds:
        data = Toy2DConfig(kind=kind)
        rows, held = data.build("train").rows, data.build("test")
        test = held.rows[:10_000]
        assert held.log_prob is not None
        true = held.log_prob(test)
        outside = int((true == -math.inf).sum())
        print(
            f"{kind}: true density {-float(true[true > -math.inf].mean()):.4f} nats ({outside} points outside it)",
            flush=True,
        )
        for name in args.models:
            value, steps = run(name, rows, test, args.minutes)
            print(f"  {name:14}{value:.4f} nats, {steps} steps", flush=True)


if __name__ == "__main__":
    told(main)
