"""Optimal-transport coupling beside torchcfm's OTPlanSampler("exact"), and beside a training step: in turn, in one run.

One coupling is of a batch of noise with a batch of pictures (by default 256 of 3 x 32 x 32; smooth random pictures stand for
real ones). Prints the median milliseconds of each, the ratio, the mean squared distance that each leaves, how many draws of
noise torchcfm doubles, and, with --step, the part of a UNet's training step (forward, backward, AdamW) that the coupling is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from claims.common import told
from torch import Tensor

from genflow.flows.couplings import OptimalTransport, Sinkhorn


def pictures(n: int, size: int, kind: str) -> Tensor:
    if kind == "gaussian":
        return 0.5 * torch.randn(n, 3, size, size)
    return sum(F.interpolate(torch.randn(n, 3, s, s), size=size, mode="bilinear") for s in (1, 2, 4, 8)) / 4  # type: ignore


def timed(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def stepper(args: argparse.Namespace) -> Callable[[], None]:
    from genflow.networks.unet import UNetConfig

    network = UNetConfig(channels=args.channels, shape=(3, args.size, args.size), pooled_dim=0).build().to(args.device)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    t, none = torch.rand(args.batch, device=args.device), torch.zeros(args.batch, 0, device=args.device)

    def step() -> None:
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            v = network(x, t, none[..., None], none)
        (v.float() - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--data", choices=["smooth", "gaussian"], default="smooth")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--step", action="store_true", help="time a UNet's training step too")
    parser.add_argument("--channels", type=int, default=128, help="of that UNet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    try:
        from torchcfm.optimal_transport import OTPlanSampler
    except ImportError:
        parser.error("torchcfm is the peer here: pip install torchcfm")

    torch.manual_seed(0)
    x = pictures(args.batch, args.size, args.data).to(args.device)
    noise = torch.randn_like(x)
    plan, own, sinkhorn = OTPlanSampler("exact"), OptimalTransport(), Sinkhorn()
    done: dict[str, tuple[Tensor, Tensor]] = {}
    ways: dict[str, Callable[[], object]] = {
        "genflow": lambda: done.__setitem__("genflow", (x, own(x, noise))),
        "torchcfm": lambda: done.__setitem__("torchcfm", plan.sample_plan(x, noise)),
        "sinkhorn": lambda: done.__setitem__("sinkhorn", (x, sinkhorn(x, noise))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(args.rounds + 2):
        for name, way in ways.items():
            elapsed = timed(way, args.device)
            if i >= 2:
                seconds[name].append(elapsed)
    what = (
        torch.cuda.get_device_name()
        if torch.device(args.device).type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"batch {args.batch} of 3 x {args.size} x {args.size}, {args.data}, {what}, torch {torch.__version__}")
    for name, each in seconds.items():
        a, b = done[name]
        kept = len(b.flatten(1).unique(dim=0))
        print(
            f"  {name:10}{1e3 * statistics.median(each):8.2f} ms   distance {(a - b).square().mean():.4f}"
            f"   noise used {kept}/{args.batch}"
        )
    pairs = [b / a for a, b in zip(seconds["genflow"], seconds["torchcfm"], strict=True)]
    print(f"  ratio     {statistics.median(pairs):8.2f}      (pair by pair {min(pairs):.2f} to {max(pairs):.2f})")
    print(f"  uncoupled distance {(x - noise).square().mean():.4f}")
    if args.step:
        step = stepper(args)
        step()
        each = [timed(step, args.device) for _ in range(3)]
        part = statistics.median(seconds["genflow"]) / statistics.median(each)
        print(f"  step of a UNet of {args.channels} channels: {1e3 * statistics.median(each):.0f} ms")
        print(f"  the coupling is {part:.2%} of it")


if __name__ == "__main__":
    told(main)
