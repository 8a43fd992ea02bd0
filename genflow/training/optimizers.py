"""Optimisers, each a small config that builds a torch optimiser."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genflow.errors import UserError
from genflow.native.library import call, library
from genflow.registry import optimizer_export
from genflow.training.sharding import own
from genflow.versions import count_step


def decay_groups(params: Sequence[Tensor], weight_decay: float) -> list[dict]:
    """Matrices decay, those of embeddings too; biases, norms and other vectors do not."""
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


@optimizer_export("adamw")
@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), fused."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UserError(
                    f"{name} = {value} must be a finite number of 0 or more; the default is {_default(name)}"
                )
        if self.eps < torch.finfo(torch.float32).tiny:
            raise UserError(
                f"eps = {self.eps} leaves 0 / 0 of a weight without a gradient; the default is {_default('eps')}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas = {self.betas} must be 0 or more and below 1, such as {_default('betas')}")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """One fused optimiser over every parameter that requires a gradient."""
        groups = decay_groups([p for p in model.parameters() if p.requires_grad], self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@optimizer_export("adamw8bit")
@dataclass(frozen=True)
class AdamW8bitConfig(AdamWConfig):
    """AdamW whose moments take 8 bits (Dettmers et al. 2022, arXiv 2110.02861), through bitsandbytes.

    Two bytes a parameter instead of eight; of tensors of fewer than 4096 numbers float32, as in AdamW.
    """

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Raises UserError where bitsandbytes is not installed."""
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of parts that are for other uses than this
        try:
            import bitsandbytes
        except ImportError as error:
            raise UserError("optimizer adamw8bit needs bitsandbytes; pip install bitsandbytes") from error
        groups = decay_groups([p for p in model.parameters() if p.requires_grad], self.weight_decay)
        return bitsandbytes.optim.AdamW8bit(groups, lr=self.lr, betas=self.betas, eps=self.eps)


@torch.no_grad()
def step_with_average(optimizer: torch.optim.Optimizer, averages: Mapping[nn.Parameter, Tensor], weight: float) -> bool:
    """torch's step of AdamW, and average += weight (p - average) of each parameter: one pass over memory.

    averages: of every parameter of the optimiser, this process's own part. Returns False, with nothing done, where the CPU's
    kernels do not serve: other devices, dtypes and optimisers; hooks; the first step; parameters without a gradient.
    """
    groups = optimizer.param_groups
    every = [p for group in groups for p in group["params"]]
    plain = type(optimizer) is torch.optim.AdamW and not any(g["amsgrad"] or g["maximize"] for g in groups)
    hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if not plain or hooked or not all(p.is_cpu and p.grad is not None and p in optimizer.state for p in every):
        return False
    states = [optimizer.state[p] for p in every]
    steps = [state["step"] for state in states]
    rows = [
        [own(x) for x in (p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"], averages[p])]
        for p, state in zip(every, states, strict=True)
    ]
    fits = all(x.dtype == torch.float32 and x.is_contiguous() for row in rows for x in row)
    if not fits or len({float(each) for each in steps}) != 1 or library() is None:
        return False
    torch._foreach_add_(steps, 1)
    t = float(steps[0])
    for group in groups:
        mine, rows = rows[: len(group["params"])], rows[len(group["params"]) :]
        beta1, beta2, lr, eps = map(float, (*group["betas"], group["lr"], group["eps"]))
        where, sizes = tuple(x.data_ptr() for row in mine for x in row), tuple(row[0].numel() for row in mine)
        call(
            "adamw", torch.float32, where, sizes, len(mine), 1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2,
            lr / (1 - beta1**t), (1 - beta2**t) ** -0.5, eps, weight,
        )  # fmt: skip
    count_step(optimizer)
    return True


def _default(name: str) -> object:
    return AdamWConfig.__dataclass_fields__[name].default
