"""The whole Jacobian of a batch, for maps of few numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genflow.errors import UserError

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
