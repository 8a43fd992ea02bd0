"""Velocity networks of continuous normalizing flows, as FFJORD's: smooth, and they push tangents along with the state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from genflow.errors import UserError, nearest
from genflow.native.library import untransformed


class _Activation(NamedTuple):
    """A smooth activation whose derivatives follow from its value a, which is all that is kept."""

    value: Callable[[Tensor], Tensor]
    value_: Callable[[Tensor], Tensor]  # in place
    flat: Callable[[Tensor], Tensor]  # a -> 1 - act'
    bend_: Callable[[Tensor, Tensor, Tensor], Tensor]  # y, a, 1 - act' -> y act'' / act', in place of y


def _softplus(h: Tensor) -> Tensor:
    """nn.functional.softplus; as `_softplus_` where there is no backward, for which that would keep too much."""
    if torch.is_grad_enabled():
        return nn.functional.softplus(h)
    return torch.maximum(h, h.clamp(max=40).exp_().add_(1).log_())


def _softplus_(h: Tensor) -> Tensor:
    """max(h, log(1 + exp(h))), in half the time of nn.functional.softplus on a CPU."""
    return torch.maximum(h, h.clamp(max=40).exp_().add_(1).log_(), out=h)


ACTIVATIONS = {
    "tanh": _Activation(torch.tanh, torch.tanh_, lambda a: a * a, lambda y, a, flat: y.mul_(a).mul_(-2)),
    "softplus": _Activation(_softplus, _softplus_, lambda a: torch.neg(a).exp_(), lambda y, a, flat: y.mul_(flat)),
}


class ConcatSquash(nn.Module):
    """Layers h <- act((W h + b) sigmoid(gate) + shift), gate and shift affine in (t, condition), the last without act.

    FFJORD (Grathwohl et al. 2018, arXiv 1810.01367, appendix B.1). One affine map makes the gates and shifts of all
    layers. The last layer starts at zero, so that the flow starts as the identity. Computes in the dtype of its
    parameters, whatever autocast says: the log-determinants of a solve need it.

    shape: of a sample, (D,) for linear layers, (C, H, W) for 3 x 3 convolutions. condition_dim: P, 0 for none.
    Raises UserError for a shape, widths or an activation that it cannot have.
    """

    broadcasts_time = True  # t may be of one row, for all
    ignores_autocast = True

    def __init__(
        self,
        shape: Sequence[int],
        condition_dim: int = 0,
        *,
        hidden: Sequence[int] = (64, 64, 64),
        activation: Literal["tanh", "softplus"] = "tanh",
    ) -> None:
        super().__init__()
        if len(shape) not in (1, 3):
            raise UserError(f"shape = {tuple(shape)} is neither a vector's (D,) nor a picture's (C, H, W)")
        if not hidden or min(hidden) < 1:
            raise UserError(f"hidden = {tuple(hidden)} must be widths of 1 or more, such as (64, 64, 64)")
        if activation not in ACTIVATIONS:
            raise UserError(f"activation = {activation!r} is unknown.{nearest(activation, ACTIVATIONS)}")
        self.activation, self.condition_dim = activation, condition_dim
        widths = [shape[0], *hidden, shape[0]]
        self.kernel = (3, 3) if len(shape) == 3 else ()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(widths):
            bound = 1 / math.sqrt(inputs * math.prod(self.kernel))
            self.weights.append(nn.Parameter(torch.empty(outputs, inputs, *self.kernel).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)))
        self.widths = widths[1:]
        self.modulation = nn.Linear(1 + condition_dim, 2 * sum(self.widths))  # all gates, then all shifts
        with torch.no_grad():
            for zero in (self.weights[-1], self.biases[-1]):
                zero.zero_()
            for part in (self.modulation.weight, self.modulation.bias):
                part[-widths[-1] :].zero_()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """v at (x, t). x: B x ...; t: B or 1; condition: B x P. Returns v like x; differentiable as often as wanted."""
        act = ACTIVATIONS[self.activation].value
        with _without_autocast(x):
            gates, shifts = _parts(self._modulation(t, condition), self.widths, self.kernel)
            for i, (weight, bias, gate, shift) in enumerate(zip(self.weights, self.biases, gates, shifts, strict=True)):
                if i:
                    x = act(x)
                bias = torch.addcmul(shift, _spatial(bias, self.kernel), gate)
                if len(gate) == 1:  # into the weight, which is smaller than the activations
                    x = _map(x, weight * gate.transpose(0, 1)) + bias
                else:
                    x = torch.addcmul(bias, _map(x, weight), gate)
        return x

    def pushforward(
        self, x: Tensor, t: Tensor, tangents: Tensor, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """v at (x, t), and J u for each tangent u, J = dv/dx: forward mode, in one pass of (1 + K) B rows.

        tangents: K x B x ..., K may be 0. Returns v like x, and J u like tangents; differentiable once.
        """
        with _without_autocast(x):
            modulation = self._modulation(t, condition)
            arguments = self.widths, self.activation, x, tangents, modulation
            return _Pushforward.apply(*arguments, *self.weights, *self.biases)

    def _modulation(self, t: Tensor, condition: Tensor | None) -> Tensor:
        """The gates and shifts of all layers: 1 x M where they serve all rows, else B x M."""
        s = t.to(self.modulation.weight.dtype).unsqueeze(1)
        if not self.condition_dim:  # a product with one number, which a matrix product is slow at
            return torch.addcmul(self.modulation.bias, s, self.modulation.weight.t())
        if condition is None:
            raise UserError(f"a condition is missing: this network needs B x {self.condition_dim}")
        return self.modulation(torch.cat([s.expand(len(condition), 1), condition.to(s.dtype)], 1))


class _Pushforward(torch.autograd.Function):
    """The layers of `ConcatSquash` with tangents, and their backward by hand, which keeps the layers' inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, widths: list[int], activation: str, x: Tensor, tangents: Tensor, modulation: Tensor, *layers: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, act_, flat, _ = ACTIVATIONS[activation]
        n, keep = len(widths), any(ctx.needs_input_grad)
        kernel, count = layers[0].shape[2:], (1 + len(tangents), len(x))
        gates, shifts = _parts(modulation, widths, kernel)
        rows = _nhwc(torch.cat([x.unsqueeze(0), tangents]).flatten(0, 1))
        inputs, ungated = [], []
        for i, (weight, bias, gate, shift) in enumerate(zip(layers[:n], layers[n:], gates, shifts, strict=True)):
            if keep:
                inputs.append(rows)
            if len(gate) == 1:
                rows = _map(rows, weight * gate.transpose(0, 1))
                stack = rows.unflatten(0, count)
            else:
                rows = _map(rows, weight)
                if keep:
                    ungated.append(rows)
                stack = rows.unflatten(0, count) * gate
                rows = stack.flatten(0, 1)
            first, *pushed = stack.unbind()
            first += torch.addcmul(shift, _spatial(bias, kernel), gate)
            if i + 1 < n:
                act_(first)
                if pushed:
                    less = flat(first)
                    for u in pushed:
                        u.addcmul_(u, less, value=-1)
        if keep:
            ctx.save_for_backward(modulation, *layers, *inputs, *ungated)
            ctx.widths, ctx.activation, ctx.count = widths, activation, count
        return stack[0], stack[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_v: Tensor, grad_pushed: Tensor) -> tuple[Tensor | None, ...]:
        modulation, *saved = ctx.saved_tensors
        n = len(ctx.widths)
        weights, biases, inputs, ungated = (saved[i * n : (i + 1) * n] for i in range(4))
        _, _, flat, bend_ = ACTIVATIONS[ctx.activation]
        kernel = weights[0].shape[2:]
        gates, _ = _parts(modulation, ctx.widths, kernel)
        grad_gates, grad_shifts, grad_weights, grad_biases = (list[Tensor](weights) for _ in range(4))
        grad = _nhwc(torch.cat([grad_v.unsqueeze(0), grad_pushed]).flatten(0, 1)).unflatten(0, ctx.count)
        for i in reversed(range(n)):
            weight, bias, gate = weights[i], _spatial(biases[i], kernel), gates[i]
            grad_bias = grad[0].sum_to_size(gate.shape)  # of b gate + shift
            if ungated:
                grad_gate = (grad * ungated[i].unflatten(0, ctx.count)).sum(0).sum_to_size(gate.shape)
                back, grad_weights[i] = _map_backward(_nhwc((grad * gate).flatten(0, 1)), inputs[i], weight)
            else:
                column = gate.transpose(0, 1)
                back, found = _map_backward(grad.flatten(0, 1), inputs[i], weight * column)
                grad_gate = (found * weight).flatten(1).sum(1).view(gate.shape)
                grad_weights[i] = found.mul_(column)
            grad_gates[i] = torch.addcmul(grad_gate, grad_bias, bias).flatten(1)
            grad_shifts[i] = grad_bias.flatten(1)
            grad_biases[i] = (grad_bias * gate).sum(0).flatten()
            grad = back.unflatten(0, ctx.count)
            if i:
                a, *pushed = inputs[i].unflatten(0, ctx.count).unbind()
                less = flat(a)
                first, *rest = grad.unbind()
                turns = [bend_(g * u, a, less) for g, u in zip(rest, pushed, strict=True)]
                grad.addcmul_(grad, less, value=-1)
                for turn in turns:
                    first += turn
        gate = modulation[:, : sum(ctx.widths)].sigmoid()
        grad_modulation = torch.cat([torch.cat(grad_gates, 1) * gate * (1 - gate), *grad_shifts], 1)
        return None, None, grad[0], grad[1:], grad_modulation, *grad_weights, *grad_biases


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """No autocast within; entering where there is none would take a tenth of a small network's time."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _parts(modulation: Tensor, widths: list[int], kernel: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The gates and the shifts of the layers, B or 1 rows each, so that they broadcast over the layers' outputs."""
    gates, shifts = modulation.chunk(2, 1)
    first, second = ([_spatial(p, kernel) for p in each.split(widths, 1)] for each in (gates.sigmoid(), shifts))
    return first, second


def _spatial(each: Tensor, kernel: Sequence[int]) -> Tensor:
    """Numbers for channels, ... x C, so that they broadcast over pictures where the layers are convolutions."""
    return each.view(*each.shape, *[1] * len(kernel))


def _nhwc(rows: Tensor) -> Tensor:
    """Pictures with their channels last in memory, where convolutions are faster by 2 to 3 on a CPU; vectors as they are.

    So are all under transforms: vmap knows no such order.
    """
    if rows.dim() == 2 or not untransformed():
        return rows
    if rows.shape[1] == 1:  # in both orders at once: only the strides say which is meant
        b, c, h, w = rows.shape
        return rows.contiguous().as_strided((b, c, h, w), (h * w, 1, w, 1))
    return rows.contiguous(memory_format=torch.channels_last)


def _map(rows: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 2:
        return nn.functional.linear(rows, weight)
    if len(weight) == 1 and rows.device.type == "cpu":
        return _to_one_channel(rows, weight)
    return nn.functional.conv2d(rows, _nhwc(weight), padding=1)


def _to_one_channel(rows: Tensor, weight: Tensor) -> Tensor:
    """A 3 x 3 convolution to one channel: a product for each of its nine places, then shifts; twice as fast on a CPU.

    rows: B x C x H x W; weight: 1 x C x 3 x 3.
    """
    b, c, h, w = rows.shape
    each = weight.view(c, 9).t() @ rows.permute(0, 2, 3, 1).reshape(-1, c).t()
    padded = nn.functional.pad(each.view(9, b, h, w), (1, 1, 1, 1))
    total = padded[0, :, :h, :w].clone()
    for place in range(1, 9):
        down, right = divmod(place, 3)
        total += padded[place, :, down : down + h, right : right + w]
    return total.unsqueeze(1)


def _map_backward(grad: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `_map` to rows and weight."""
    if weight.dim() == 2:
        # Of the two products the one with the narrower left side is the faster.
        found = grad.t() @ rows if len(weight) <= weight.shape[1] else (rows.t() @ grad).t()
        return grad @ weight, found
    one, mask = [1, 1], [True, True, False]
    return torch.ops.aten.convolution_backward(grad, rows, _nhwc(weight), None, one, one, one, False, [0, 0], 1, mask)[
        :2
    ]
