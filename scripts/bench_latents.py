"""A training step on cached latents and texts beside one with the autoencoder and the text encoder in the loop.

Both sides train the same MM-DiT on the same pictures, batch by batch in turn, each reading its data as a run does; on the
one side the autoencoder encodes the pictures and all-MiniLM-L6-v2 the captions in every step, on the other both come from
a cache that `cache_latents` wrote. Weights are random: they do not change the time.

On a CPU the time is that of the process on its processors, which does not count what other programs take.

    OMP_NUM_THREADS=1 python scripts/bench_latents.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from claims.common import told

from genflow.conditions import Condition
from genflow.data.emoji import EmojiConfig
from genflow.data.latents import LatentsConfig
from genflow.data.latents_cache import cache_latents
from genflow.data.loading import Batch, StreamSampler, loader
from genflow.data.prepared import PreparedConditions
from genflow.flows.latent import LatentFlow, LatentFlowConfig
from genflow.functional import Rng
from genflow.interop.autoencoder import KLAutoencoderConfig
from genflow.networks.mmdit import MMDiTConfig
from genflow.text.pretrained import MiniLMConfig, PretrainedText

DATA = EmojiConfig(styles=("noto",), caption="prompt", limit=128)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="of the pictures, in pixels")
    parser.add_argument(
        "--channels", type=int, nargs="+", default=[128, 256, 512, 512], help="of the autoencoder (SD3's)"
    )
    parser.add_argument("--depth", type=int, default=6, help="of the MM-DiT, of width 64 x depth")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side, after one that is not counted")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def heard(text: PretrainedText, captions: list[str]) -> Condition:
    """What the encoder makes of captions, computed now and not looked up."""
    rows = text._compute(captions)
    states, mask, pooled = (torch.stack([row[key] for row in rows]) for key in ("states", "mask", "pooled"))
    assert text.scale is not None
    return Condition(states * text.scale, mask, pooled)


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    torch.manual_seed(0)
    text = MiniLMConfig().build()
    vae = KLAutoencoderConfig(channels=tuple(args.channels), latent_channels=16)
    side = args.size // 2 ** (len(args.channels) - 1)
    network = MMDiTConfig(
        depth=args.depth,
        in_channels=16,
        context_dim=text.context_dim,
        pooled_dim=text.pooled_dim,
        sample_size=side // 2,
    ).build()
    flow: LatentFlow = LatentFlowConfig(vae).build(network, text, shape=(3, args.size, args.size)).to(args.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    dataset = replace(DATA, size=args.size).build()

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        cache_latents(
            Path(folder) / "train",
            dataset,
            flow.autoencoder,
            text,
            shape=(3, args.size, args.size),
            device=args.device,
        )
        print(f"caching {len(dataset)} pictures took {time.perf_counter() - began:.1f} s")
        latents = LatentsConfig(folder).build()

        def batches(data: object) -> Iterator[Batch]:
            sampler = StreamSampler.over(data, seed=0, batch_size=args.batch, steps=args.rounds + 1)  # type: ignore[arg-type]
            conditions = PreparedConditions.prepare(data, text)  # type: ignore[arg-type]
            return loader(data, conditions, sampler, shape=(3, args.size, args.size))  # type: ignore[arg-type]

        def step(batch: Batch) -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = flow.loss(batch.to(args.device), Rng(0)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()

        def uncached(batch: Batch) -> None:
            step(replace(batch, condition=heard(text, batch.captions)))

        sides: dict[str, tuple[Iterator[Batch], Callable[[Batch], None]]] = {
            "encoders in the loop": (batches(dataset), uncached),
            "cached": (batches(latents), step),
        }
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds + 1):
            for name, (source, work) in sides.items():
                began = clock()
                work(next(source))
                seconds[name].append(clock() - began)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    ratios = sorted(a / b for a, b in zip(*(values[1:] for values in seconds.values()), strict=True))
    size = f"{args.size} px, autoencoder {tuple(args.channels)}, MM-DiT depth {args.depth}, batch {args.batch}"
    print(f"{size}, {args.device}, {torch.get_num_threads()} threads, bf16 autocast")
    for name, middle in medians.items():
        print(f"{name}: {args.batch / middle:.1f} images/s (median of {args.rounds} steps)")
    slow, fast = medians.values()
    print(f"ratio {slow / fast:.2f} (pair by pair {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    told(main)
