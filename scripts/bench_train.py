"""Training speed of genflow's MM-DiT beside diffusers' SD3Transformer2DModel: the same work, in turn, in one run.

One step is forward, backward and fused AdamW of the same architecture (by default 18.6 M parameters: 8 blocks, width 256,
4 heads, 256 image + 16 text tokens, batch 32). Prints the median images/s of each, their ratio, and the peak memory of
each in a process of its own. Figures measured so far are in scripts/README.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn


def models(args: argparse.Namespace) -> dict[str, Callable[[], nn.Module]]:
    side = round(args.tokens**0.5)

    def peer() -> nn.Module:
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel(
            sample_size=4 * side,
            patch_size=4,
            in_channels=3,
            out_channels=3,
            num_layers=args.depth,
            attention_head_dim=args.width // args.heads,
            num_attention_heads=args.heads,
            joint_attention_dim=384,
            caption_projection_dim=args.width,
            pooled_projection_dim=384,
            pos_embed_max_size=side,
            qk_norm="rms_norm",
        )

    def own() -> nn.Module:
        from genflow import MMDiTConfig

        return MMDiTConfig(
            depth=args.depth,
            hidden=args.width,
            heads=args.heads,
            patch_size=4,
            in_channels=3,
            context_dim=384,
            pooled_dim=384,
            sample_size=side,
        ).build()

    return {"genflow": own, "diffusers": peer}


def stepper(name: str, model: nn.Module, args: argparse.Namespace) -> Callable[[], float]:
    """A function that does one training step and returns its seconds."""
    torch.manual_seed(0)
    device, cuda = args.device, args.device == "cuda"
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    side = 4 * round(args.tokens**0.5)
    x = torch.randn(args.batch, 3, side, side, device=device)
    context, pooled = (
        torch.randn(args.batch, args.text, 384, device=device),
        torch.randn(args.batch, 384, device=device),
    )
    t = torch.rand(args.batch, device=device)
    if args.compile:
        for block in model.blocks if name == "genflow" else model.transformer_blocks:
            block.compile()

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16"):
            v = (
                model(x, t, context, pooled)
                if name == "genflow"
                else model(x, context, pooled, t * 1000, return_dict=False)[0]
            )
        (v.float() - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def peak_memory(name: str, args: argparse.Namespace, out: multiprocessing.Queue) -> None:
    """MiB that three steps take, beyond the loaded libraries."""
    model = models(args)[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = stepper(name, model, args)
    for _ in range(3):
        step()
    if args.device == "cuda":
        out.put(torch.cuda.max_memory_allocated() / 2**20)
    else:
        out.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def in_a_process(measure: Callable, name: str, args: argparse.Namespace) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(name, args, queue))
    process.start()
    process.join()
    return queue.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="image tokens, a square")
    parser.add_argument("--text", type=int, default=16, help="text tokens")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block of both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    # First of all: a child's peak counts from what its parent holds when it is made.
    memory = {name: in_a_process(peak_memory, name, args) for name in models(args)}
    built = {name: build() for name, build in models(args).items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in built.items()}
    assert len(set(counts.values())) == 1, counts
    what = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{counts['genflow'] / 1e6:.1f} M parameters, {args.tokens} + {args.text} tokens, batch {args.batch}, "
        f"{args.precision}, {'compiled' if args.compile else 'eager'}, {what}, torch {torch.__version__}"
    )
    steps = {name: stepper(name, model, args) for name, model in built.items()}
    for step in steps.values():
        step(), step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            seconds[name].append(step())
    rate = {name: args.batch / statistics.median(each) for name, each in seconds.items()}
    for name, value in rate.items():
        print(f"  {name:10}{value:8.1f} images/s   (best {args.batch / min(seconds[name]):.1f})")
    pairs = [b / a for a, b in zip(seconds["genflow"], seconds["diffusers"], strict=True)]
    print(f"  ratio     {statistics.median(pairs):8.2f}            (pair by pair {min(pairs):.2f} to {max(pairs):.2f})")
    print(f"  memory    genflow {memory['genflow']:.0f} MiB, diffusers {memory['diffusers']:.0f} MiB")


if __name__ == "__main__":
    main()
