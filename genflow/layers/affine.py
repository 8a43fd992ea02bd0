"""The affine map of some channels as a network's output says, their scale bounded: on a CPU in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genflow.layers.kernels import again
from genflow.native.library import SUFFIX, by_formula, call, usable


def affine_half(x: Tensor, parameters: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """x = (kept, changed) to (kept, changed exp(s) + t), s = limit tanh(u / limit), and the sum of s: B.

    x: B x C x H x W; parameters: B x 2 c x H x W, t and then u, for the last c channels of x.
    """
    if _fused(x, parameters, limit):
        return AffineHalf.apply(_rows(x), _rows(parameters), limit)
    return _plain(x, parameters, limit)


def affine_half_inverse(z: Tensor, parameters: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The inverse of `affine_half`, and minus the sum of s."""
    tracked = torch.is_grad_enabled() and (z.requires_grad or parameters.requires_grad)
    if _fused(z, parameters, limit) and not tracked and forward_ad._current_level < 0:
        z, parameters = _rows(z), _rows(parameters)
        return _run("affine_inverse", z, parameters, limit)
    kept, changed, shift, log_scale = _parts(z, parameters, limit)
    return torch.cat([kept, (changed - shift) * (-log_scale).exp()], 1), -log_scale.sum((1, 2, 3))


def _plain(x: Tensor, parameters: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    kept, changed, shift, log_scale = _parts(x, parameters, limit)
    return torch.cat([kept, torch.addcmul(shift, changed, log_scale.exp())], 1), log_scale.sum((1, 2, 3))


def _parts(x: Tensor, parameters: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shift, u = parameters.to(x.dtype).chunk(2, 1)
    kept, changed = x.split([x.shape[1] - u.shape[1], u.shape[1]], 1)
    return kept, changed, shift, limit * torch.tanh(u / limit)


def _fused(x: Tensor, parameters: Tensor, limit: float) -> bool:
    """Whether the kernels can serve: for a limit that their exp can, and parameters of just these places and channels."""
    with torch.autocast("cpu", enabled=False):  # of no concern to a map in float32
        return (
            x.dtype == torch.float32
            and parameters.dtype in SUFFIX
            and limit <= 60
            and x.dim() == 4
            and parameters.shape[::2] == x.shape[::2]
            and parameters.shape[3] == x.shape[3]
            and parameters.shape[1] in range(2, 2 * x.shape[1] + 1, 2)
            and usable(x)
            and not torch.compiler.is_compiling()
        )


def _rows(x: Tensor) -> Tensor:
    """B x C x H x W with its channels side by side in memory, densely."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _run(name: str, x: Tensor, parameters: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    B, C, H, W = x.shape
    out, ladj = x.new_empty(B, H, W, C), x.new_empty(B)
    call(name, parameters.dtype, x, parameters, out, ladj, B, H * W, C, C - parameters.shape[1] // 2, float(limit))
    return out.permute(0, 3, 1, 2), ladj


class AffineHalf(torch.autograd.Function):
    """`affine_half` of dense rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, parameters)
        ctx.limit = limit
        return _run("affine_forward", x, parameters, limit)

    @staticmethod
    def backward(ctx: Any, gz: Tensor, gladj: Tensor) -> tuple:  # type: ignore[override]
        x, parameters = ctx.saved_tensors
        if by_formula(gz, gladj):
            return *again(lambda x, parameters: _plain(x, parameters, ctx.limit), (x, parameters), (gz, gladj)), None
        B, C, H, W = x.shape
        gz, gladj = _rows(gz), gladj.contiguous()
        dx, dparameters = x.new_empty(B, H, W, C), parameters.new_empty(B, H, W, parameters.shape[1])
        kept = C - parameters.shape[1] // 2
        call(
            "affine_backward", parameters.dtype, gz, gladj, x, parameters, dx, dparameters,
            B, H * W, C, kept, float(ctx.limit),
        )  # fmt: skip
        return dx.permute(0, 3, 1, 2), dparameters.permute(0, 3, 1, 2), None
