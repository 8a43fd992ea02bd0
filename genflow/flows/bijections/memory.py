"""Invertible checkpoint: the backward computes each input again from its output, so that memory does not grow with depth.

Gomez et al. 2017 (arXiv 1707.04585); of flows, Kingma & Dhariwal 2018 (arXiv 1807.03039, sec. 3.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from genflow.errors import UserError
from genflow.flows.bijections.base import Bijection, Chain, zero_ladj
from genflow.flows.bijections.continuous import CNF
from genflow.flows.bijections.jacobian import first_only
from genflow.flows.divergence import current_probing, probing_again
from genflow.native.library import transformed
from genflow.registry import bijection_export
from genflow.versions import version


@bijection_export("reversible")
class Reversible(Chain):
    """A chain that keeps only its last output for the backward, and walks back from there by the inverses.

    The gradients are those of `Chain` up to the rounding of the inverses, its state dict is the same, and a step computes
    the inverses and one more forward. Of bijections that say so (`keep_input`) the input is kept. Chains within the chain
    are walked one bijection at a time; chains inside other bijections are plain (see `reversible`).

    tolerance: where given, the backward compares the input that it arrives at with the true one, which is kept, and raises
    UserError if any value is further off; this waits for the device once a step.

    Raises UserError for dropout and batch norms, which are another map in the second forward, and for a CNF, whose own
    gradient keeps little, and whose penalties would be lost. Gradients of gradients are refused; under
    torch.func's transforms and without gradients it is the plain chain.
    """

    def __init__(self, bijections: Iterable[Bijection], *, tolerance: float | None = None) -> None:
        super().__init__(bijections)
        if tolerance is not None and not tolerance > 0:
            raise UserError(f"tolerance = {tolerance} must be positive, such as 1e-3, or none")
        self.tolerance = tolerance
        for name, module in self.named_modules():
            if isinstance(module, CNF):
                raise UserError(
                    f"an invertible checkpoint is not for a CNF ({name}), which keeps little for its backward already; "
                    "train without the checkpoint"
                )
            dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
            if dropout or isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise UserError(
                    f"an invertible checkpoint runs every bijection twice, and {type(module).__name__} ({name}) is not the "
                    "same map then; take it out, or train without the checkpoint"
                )

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled() or transformed():
            return super().forward(x, condition)
        steps = list(_steps(self))
        parameters = list(dict.fromkeys(p for step in steps for p in step.parameters() if p.requires_grad))
        return _WalkBack.apply(self, steps, x, condition, *parameters)


def reversible(bijection: Bijection, *, tolerance: float | None = None) -> Bijection:
    """The same bijection, trained in memory that does not grow with its depth: every Chain becomes a Reversible.

    Chains inside other bijections, such as the rest of a flow inside a split, are replaced in place; the outermost one is
    returned anew, its parameters shared. Names in the state dict stay. tolerance: of every chain, see Reversible. Raises
    UserError for a bijection that has no chain.
    """
    chains = [(m, name, child) for m in bijection.modules() for name, child in m.named_children() if _plain(child)]
    if not chains and not _plain(bijection):
        kind = type(bijection).__name__
        raise UserError(f"an invertible checkpoint works on a chain of bijections, and {kind} has none")
    for parent, name, child in reversed(chains):  # the innermost first: each is rebuilt from what it then holds
        setattr(parent, name, Reversible(child, tolerance=tolerance))
    return Reversible(bijection, tolerance=tolerance) if _plain(bijection) else bijection


def _plain(module: nn.Module) -> TypeGuard[Chain]:
    return type(module) is Chain


def _steps(chain: Chain) -> Iterator[Bijection]:
    """The bijections of a chain and of the chains that it is made of."""
    for bijection in chain:
        if type(bijection) in (Chain, Reversible):
            yield from _steps(bijection)
        else:
            yield bijection


class _WalkBack(torch.autograd.Function):
    """forward: the chain without a graph. backward: from the last output, each input by its bijection's inverse, then that
    bijection alone with a graph. Parameters are inputs, so that their gradients reach whoever listens to them (DDP)."""

    @staticmethod
    def forward(
        ctx: Any, chain: Reversible, steps: list[Bijection], x: Tensor, condition: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.chain, ctx.steps, ctx.device = chain, steps, x.device.type
        ctx.autocast = (torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device))
        if (scope := current_probing()) is not None:
            scope = scope._replace(penalties={})  # which hold graphs, and this node in them
        ctx.probing = scope
        first = x if chain.tolerance is not None else None
        kept, total = [], zero_ladj(x)
        with _autocast(ctx):
            for step in steps:
                if step.keep_input:
                    kept.append(x)
                x, ladj = step(x, condition)
                total = total + ladj
        ctx.save_for_backward(first, x, condition, *kept)
        ctx.parameters, ctx.versions = parameters, [version(p) for p in parameters]
        return x, total

    @staticmethod
    @first_only("an invertible checkpoint")
    def backward(ctx: Any, grad: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        first, x, condition, *kept = ctx.saved_tensors
        if [version(p) for p in ctx.parameters] != ctx.versions:
            raise RuntimeError(
                "a parameter of an invertible checkpoint was changed between its forward and its backward"
            )
        wants_condition = condition is not None and ctx.needs_input_grad[3]
        if condition is not None:
            condition = condition.detach().requires_grad_(wants_condition)
        sums: dict[Tensor, Tensor] = {}
        with _autocast(ctx), probing_again(ctx.probing):
            for step in reversed(ctx.steps):
                with torch.no_grad():
                    x = kept.pop() if step.keep_input else step.decode(x, condition)
                x = x.detach().requires_grad_()
                with torch.enable_grad():
                    z, ladj = step(x, condition)
                own = [p for p in step.parameters() if p.requires_grad]
                inputs = [x, *([condition] if wants_condition else []), *own]
                pairs = [(y, g.to(y.dtype)) for y, g in ((z, grad), (ladj, grad_ladj)) if y.requires_grad]
                outputs, grads = zip(*pairs)
                grad, *found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
                for tensor, g in zip(inputs[1:], found):
                    if g is not None:
                        sums[tensor] = sums[tensor] + g if tensor in sums else g
        if first is not None:
            _compare(x, first, ctx.chain.tolerance)
        return None, None, grad, sums.get(condition), *(sums.get(p) for p in ctx.parameters)


def _autocast(ctx: Any) -> AbstractContextManager:
    """The autocast of the forward. Without its cache, which would hold a cast of every weight, perhaps without a graph."""
    enabled, dtype = ctx.autocast
    return torch.autocast(ctx.device, dtype, enabled=enabled, cache_enabled=False)


def _compare(x: Tensor, first: Tensor, tolerance: float) -> None:
    error = float((x.detach() - first).abs().max())
    if not error <= tolerance:
        raise UserError(
            f"the invertible checkpoint arrived {error:.2g} beside its input, further than tolerance = {tolerance:g}: an "
            "inverse of this chain is not exact enough; bound its scales more, or train without the checkpoint"
        )
