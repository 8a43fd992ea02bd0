"""genflow bench attention: the backends that can serve a call, in turn."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from genflow.attention import Call, Mask, attention, attention_report
from genflow.attention.masks import KINDS
from genflow.errors import UserError, nearest
from genflow.evaluation.bench import Contest, Side, Task, difference
from genflow.evaluation.flops import attention_flops
from genflow.registry import names
from genflow.training.precision import DTYPES


def attending(args: argparse.Namespace) -> tuple[list[Contest], dict[str, str]]:
    """Every attention backend that can serve the call, and why the others cannot."""
    warnings.filterwarnings("ignore", message="flex_attention called without")  # told by its time
    mask = make_mask(args, args.batch)
    call = Call(args.device.type, DTYPES[args.precision], args.head_dim, mask.kind, args.lq, args.lk)
    wanted = _wanted(args.backend)
    refused = {name: "; ".join(why) for name, why in attention_report(call).items() if why and name in wanted}
    refused_backward = attention_report(call._replace(needs=frozenset({"backward"})))
    refused_backward = {name: why for name, why in refused_backward.items() if name in wanted}
    able = {name: not reasons for name, reasons in refused_backward.items() if name not in refused}
    refused |= {
        f"{name}, backward": "; ".join(refused_backward[name]) for name, backward in able.items() if not backward
    }
    pairs = _live_pairs(mask, args)
    flops = [attention_flops(pairs, args.heads, args.head_dim, backward=backward) for backward in (False, True)]
    shape = f"{args.batch} x {args.heads} heads x {args.lq} queries, {args.lk} keys, head_dim {args.head_dim}"
    if not able:
        raise UserError(f"--backend: none can serve; {'; '.join(f'{name} {why}' for name, why in refused.items())}")
    contest = Contest(
        f"attention: {shape}, {args.precision}, mask {args.mask}",
        tuple(able),
        partial(attention_side, args, able),
        (Task("forward", "calls", 1, flops[0]), Task("forward and backward", "calls", 1, flops[1])),
        DTYPES[args.precision],
    )
    return [contest], refused


def _wanted(asked: Sequence[str] | None) -> list[str]:
    """Raises UserError for an unknown backend."""
    for name in asked or ():
        if name not in names("attention"):
            raise UserError(f"--backend {name!r} is unknown.{nearest(name, names('attention'))}")
    return list(asked or names("attention"))


def _live_pairs(mask: Mask, args: argparse.Namespace) -> int:
    """How many pairs of a query and a key attend, of one head of all samples; some queries at a time, for there are many."""
    like, pairs = torch.empty(args.batch, 1, 1, 1, device=args.device), 0
    for start in range(0, args.lq, 1024):
        rows = range(start, min(start + 1024, args.lq))
        whole = (args.batch, 1, len(rows), args.lk)
        live = mask.block(like, rows, range(args.lk), args.lq, args.lk)
        pairs += math.prod(whole) if live is None else int(live.expand(whole).sum())
    return pairs


def attention_side(args: argparse.Namespace, able: dict[str, bool], name: str) -> Side:
    """A backend. Its error is that of the first head of the first sample beside float64, without and with gradients."""
    dtype, backward = DTYPES[args.precision], able[name]
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    lengths = (args.lq, args.lk, args.lk, args.lq)
    q, k, v, g = (draw(args.batch, args.heads, n, args.head_dim).to(args.device, dtype) for n in lengths)
    mask, first = make_mask(args, args.batch), make_mask(args, 1, "cpu")
    inputs = (q.requires_grad_(backward), k.requires_grad_(backward), v.requires_grad_(backward))

    @torch.no_grad()
    def forward() -> Tensor:
        return attention(*inputs, mask, backend=name)

    def both() -> tuple[Tensor, ...]:
        o = attention(*inputs, mask, backend=name)
        return (o, *torch.autograd.grad(o, inputs, g))

    def all_of(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([a[:1, :1].detach().cpu().flatten() for a in tensors])

    exact = [a[:1, :1].detach().cpu().double().requires_grad_() for a in inputs]
    o = attention(exact[0], exact[1], exact[2], first, backend="tiled")  # "math" has no room for long sequences
    error = {"forward": difference(all_of([forward()]), all_of([o]))}
    tasks: dict[str, Callable[[], object]] = {"forward": forward}
    if backward:
        tasks["forward and backward"] = both
        truth = (o, *torch.autograd.grad(o, exact, g[:1, :1].cpu().double()))
        error["forward and backward"] = difference(all_of(both()), all_of(truth))
    return Side(tasks, error=error)


def make_mask(args: argparse.Namespace, batch: int, device: str | None = None) -> Mask:
    """The mask of that kind for the first `batch` samples. Raises UserError for an unknown kind."""
    lq, lk, device = args.lq, args.lk, device or args.device
    lengths = lk - torch.arange(1, batch + 1)[:, None] * 37 % (lk // 2 + 1)  # half of the keys are real, or more
    segments = (4 * torch.arange(lq) // lq).expand(batch, lq)  # four of a length, end to end
    parents = (torch.arange(lq) + 1) // 2 - 1  # two branches at each node
    parts = {
        "none": lambda: Mask(),
        "causal": lambda: Mask(causal=True),
        "keys": lambda: Mask(keys=(torch.arange(lk) < lengths).to(device)),
        "segments": lambda: Mask(segments=segments.to(device)),
        "tree": lambda: Mask(tree=parents.to(device)),
        "dense": lambda: Mask(dense=(torch.rand(lq, lk, generator=torch.Generator().manual_seed(3)) < 0.5).to(device)),
    }
    mask = Mask()
    for kind in args.mask.split("+"):
        if kind not in parts:
            raise UserError(
                f"--mask {kind!r} is none.{nearest(kind, KINDS)} Several are joined by +, such as causal+keys"
            )
        mask = mask & parts[kind]()
    mask.check(batch, args.heads, lq, lk)
    return mask
