"""genflow bench train, sample: an MM-DiT of random weights, beside SD3Transformer2DModel and its pipeline."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genflow.cli.options import read_options, told_steps
from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.evaluation.bench import Contest, Side, Task
from genflow.evaluation.flops import mmdit_flops, mmdit_training_flops
from genflow.flows.rectified import RectifiedFlow, RectifiedFlowConfig
from genflow.functional import noise_from_seeds
from genflow.interop import peers
from genflow.layers.modulation import Modulation
from genflow.networks.graphs import check_device, record, record_training
from genflow.networks.mmdit import MMDiTConfig
from genflow.samplers import uniform
from genflow.text.base import FrozenText
from genflow.training.apply import checkpointed, compile_blocks, train_in_float8
from genflow.training.precision import DTYPES

PATCH, CONTEXT_DIM = 4, 384
KEPT = ", no checkpoints"  # a side whose memory is measured with everything kept


def training(args: argparse.Namespace) -> list[Contest]:
    """Forward, backward and fused AdamW of an MM-DiT."""
    config, side = mmdit_config(args), f"{args.tokens} + {args.text} tokens, batch {args.batch}"
    if args.graphs:
        check_device(args.device, "--graphs")
        if args.checkpointing:
            raise UserError("--graphs cannot be had with --checkpointing; leave one of them out")
    ways = [args.precision, _way(args), *["checkpointed"] * args.checkpointing]
    flops = args.batch * mmdit_training_flops(config, args.tokens, args.text)
    sides = ("genflow", *_peer(args, "train"))
    # The compiler works in the same process, and takes more than the step.
    memory = None if args.compile and args.device.type == "cpu" else "training"
    return [
        Contest(
            f"training an MM-DiT: {_words(config)}, {side}, {', '.join(ways)}",
            sides,
            partial(training_side, args),
            (Task("training", "images", args.batch, flops),),
            DTYPES[args.precision],
            pairs=tuple(("genflow", peer) for peer in sides[1:]),
            memory=memory,
            also=tuple(name + KEPT for name in sides) if args.checkpointing and memory else (),
            tolerance=_tolerance(args),
        )
    ]


def training_side(args: argparse.Namespace, name: str) -> Side:
    module, velocity = _velocity(args, name, checkpointing=args.checkpointing and not name.endswith(KEPT))
    module.train()
    if args.graphs and name == "genflow":
        record_training(module, "--graphs")
    device, dtype = args.device, DTYPES[args.precision]
    x, condition, _ = _inputs(args)
    t = torch.rand(args.batch, generator=torch.Generator().manual_seed(2)).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def predict() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return velocity(x, t, condition.tokens, condition.pooled)

    def step() -> None:
        (predict().float() - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Side.of(module, {"training": step}, answers={"training": torch.no_grad()(predict)})


def sampling(args: argparse.Namespace) -> list[Contest]:
    """Pictures from that network with random weights."""
    config = mmdit_config(args)
    sides = ("genflow", *_peer(args, "sample"))
    if len(sides) > 1 and (args.sampler != "euler" or args.option):
        raise UserError(f"--against {args.against} samples by Euler's method; leave --sampler and --option out")
    if len(sides) > 1 and args.guidance < 1:
        raise UserError(f"--guidance {args.guidance:g}: {args.against} guides above 1 only; take 1 or more beside it")
    solution = _sample(args, sampling_flow(args), steps=args.steps)  # one run tells how often the network is called
    per_row = solution.statistics.evaluations.sum() if solution.statistics else args.batch * solution.nfe
    calls = int(per_row) * (1 if args.guidance == 1 else 2)
    flops = calls * mmdit_flops(config, args.tokens, args.text)
    how = f"{args.sampler}, {told_steps(args.sampler, args.steps)}, guidance {args.guidance:g}"
    what = f"{args.tokens} + {args.text} tokens, batch {args.batch}, {args.precision}"
    return [
        Contest(
            f"sampling from an MM-DiT: {_words(config)}, {what}, {_way(args)}; {how}",
            sides,
            partial(sampling_side, args),
            (Task("sampling", "images", args.batch, flops, calls),),
            DTYPES[args.precision],
            pairs=tuple(("genflow", peer) for peer in sides[1:]),
            memory=None if args.compile and args.device.type == "cpu" else "sampling",
            tolerance=_tolerance(args),
        )
    ]


def sampling_side(args: argparse.Namespace, name: str) -> Side:
    if name == "genflow":
        flow = sampling_flow(args)

        def travelled() -> Tensor:  # before it is clamped
            states = _sample(args, flow, record=True).trajectory.states
            return states[-1] - states[0]

        return Side.of(flow, {"sampling": lambda: _sample(args, flow)}, answers={"sampling": travelled})
    module, _ = _velocity(args, name, dtype=DTYPES[args.precision])
    sampler = peers.diffusers_sampler(module.eval(), uniform(args.steps), args.guidance)
    noise = noise_from_seeds(range(args.batch), _shape(args)).to(args.device)
    _, condition, null = _inputs(args, DTYPES[args.precision])
    run = partial(sampler, noise, condition, null.expand(args.batch))
    return Side.of(module, {"sampling": run}, answers={"sampling": lambda: run() - noise})


def sampling_flow(args: argparse.Namespace) -> RectifiedFlow:
    network, _ = _velocity(args, "genflow", dtype=DTYPES[args.precision])
    if args.graphs:
        record(network, "--graphs")
    return RectifiedFlowConfig().build(network, Given(*_inputs(args)[1:]), shape=_shape(args))


def _sample(args: argparse.Namespace, flow: RectifiedFlow, **more: Any) -> Any:
    how = {"sampler": args.sampler, "options": read_options("--option", args.option or []), "guidance": args.guidance}
    return flow.sample(flow.text.condition, seeds=range(args.batch), **{"steps": args.steps, **how, **more})


class Given(FrozenText):
    """Conditions instead of an encoder: those of a batch, and the empty one."""

    def __init__(self, condition: Condition, empty: Condition) -> None:
        super().__init__()
        self.condition, self.empty = condition, empty

    def encode(self, prompts: Sequence[str]) -> Condition:
        return self.empty.expand(len(prompts))


def mmdit_config(args: argparse.Namespace) -> MMDiTConfig:
    """Raises UserError for a number of tokens that is no square."""
    side = math.isqrt(args.tokens)
    if side * side != args.tokens:
        raise UserError(f"--tokens {args.tokens} is no square of a picture's sides; try {round(args.tokens**0.5) ** 2}")
    sizes = {"depth": args.depth, "hidden": args.width, "heads": args.heads, "sample_size": side}
    return MMDiTConfig(**sizes, patch_size=PATCH, in_channels=3, context_dim=CONTEXT_DIM, pooled_dim=CONTEXT_DIM)


def _words(config: MMDiTConfig) -> str:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in config.build().parameters())
    return f"{parameters / 1e6:.1f} M parameters ({config.depth} blocks of {config.hidden}, {config.heads} heads)"


def _velocity(
    args: argparse.Namespace, name: str, *, dtype: torch.dtype = torch.float32, checkpointing: bool = False
) -> tuple[Any, Callable[..., Tensor]]:
    """A side's network, of the same random weights whoever's it is, and its call (x, t, tokens, pooled)."""
    torch.manual_seed(0)
    network = mmdit_config(args).build()
    for module in network.modules():  # what is zero at first would let nothing through
        if isinstance(module, Modulation):
            nn.init.normal_(module.bias, std=0.5)
    nn.init.normal_(network.final.weight, std=network.hidden**-0.5)
    network.to(dtype)
    if name.startswith("genflow"):
        velocity: Callable[..., Tensor] = checkpointed(network) if checkpointing else network
        network.to(args.device)
        if args.precision == "fp8":  # of which the peer knows nothing: it stays in bf16
            train_in_float8(network)
        if args.compile in ("both", "genflow"):
            compile_blocks(network)
        return network, velocity
    module, velocity = peers.diffusers_velocity(network, checkpointing=checkpointing)
    module.to(args.device)
    if args.compile in ("both", "peer"):
        for block in module.transformer_blocks:
            block.compile()
    return module, velocity


def _inputs(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Condition, Condition]:
    """Pictures, their conditions, and one condition for none."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    x = draw(args.batch, *_shape(args))
    tokens, pooled = draw(args.batch + 1, args.text, CONTEXT_DIM), draw(args.batch + 1, CONTEXT_DIM)
    mask = torch.ones(args.batch + 1, args.text, dtype=torch.bool)
    rows = Condition(tokens.to(dtype), mask, pooled.to(dtype)).to(args.device)
    return x.to(args.device), rows[:-1], rows[-1:]


def _shape(args: argparse.Namespace) -> tuple[int, int, int]:
    return 3, PATCH * math.isqrt(args.tokens), PATCH * math.isqrt(args.tokens)


def _way(args: argparse.Namespace) -> str:
    """Raises UserError where a peer is to be compiled that is not there."""
    if args.compile == "peer" and args.against is None:
        raise UserError("--compile peer: there is none; name one with --against, such as diffusers")
    ways = {None: "eager", "both": "compiled", "genflow": "genflow compiled", "peer": f"{args.against} compiled"}
    return ways[args.compile] + ", genflow's as CUDA graphs" * args.graphs


def _peer(args: argparse.Namespace, work: str) -> tuple[str, ...]:
    if args.against is None:
        return ()
    peers.check_peer(args.against, [work])
    return (args.against,)


def _tolerance(args: argparse.Namespace) -> float:
    return {"fp32": 1e-3, "bf16": 0.1, "fp8": 0.3}[args.precision]
