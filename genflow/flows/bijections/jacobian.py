"""The whole Jacobian of a batch, for maps of few numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.native.library import transformed

_ROWS_AT_ONCE = 8192


def jacobian(y: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """dy/dx of each sample, B x D x D, from the graph of y, shaped like x, B x ... Sample i of y hangs on sample i of x."""
    rows = (
        torch.eye(math.prod(x.shape[1:]), dtype=y.dtype, device=y.device).view(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
    )
    parts = [
        torch.autograd.grad(y, x, part, retain_graph=True, create_graph=create_graph, is_grads_batched=True)[0]
        for part in rows.split(max(1, _ROWS_AT_ONCE // max(1, len(x))))
    ]
    return torch.cat(parts).flatten(2).transpose(0, 1)


def check_recording(what: str) -> None:
    """Raises UserError in torch.inference_mode, where autograd records nothing, whatever enable_grad says."""
    if torch.is_inference_mode_enabled():
        raise UserError(f"{what} needs derivatives, which torch.inference_mode rules out; take torch.no_grad")


def recorded(x: Tensor, what: str) -> Tensor:
    """x where gradients flow through it, or else a copy that autograd records. Raises UserError where there is none."""
    check_recording(what)
    if torch.is_grad_enabled() and x.requires_grad:
        return x
    check_plain(what)
    return x.detach().requires_grad_()


def check_plain(what: str) -> None:
    """Raises UserError under a transform of torch.func, where autograd cannot be asked."""
    if transformed():
        raise UserError(
            f"{what} is differentiated by autograd, not by torch.func; take torch.autograd.functional's jacobian or vjp"
        )


def first_only(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of a backward that has no gradient of its own. Raises UserError where one is asked for.

    once_differentiable would take gradients of constants, and those asked for by input, for zero.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def first(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.is_grad_enabled():
                raise UserError(f"{what} has first gradients only, and create_graph asks for their own")
            return backward(ctx, *grads)

        return first

    return decorate
