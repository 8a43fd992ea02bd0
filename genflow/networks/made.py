"""MADE: a masked multi-layer perceptron whose outputs for a feature depend on the features before it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genflow.errors import UserError


class MaskedLinear(nn.Linear):
    """A linear layer that has the weight from j to i only where allowed[i, j], outputs x inputs bool."""

    mask: Tensor

    def __init__(self, allowed: Tensor) -> None:
        super().__init__(allowed.shape[1], allowed.shape[0])
        self.register_buffer("mask", allowed.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """Masked autoencoder (Germain et al. 2015, arXiv 1502.03509): n parameters for each of D features, x_i's from x_<i.

    A hidden unit of degree d sees the features at places 0 .. d - 1 of the order and units of its degree or less; the
    outputs of the feature at place r see units of degree r or less (eq. 12-13, counted from 0). Degrees are spread evenly
    and sorted, so that what becomes known with a feature is a slice of every layer. The condition is seen by all units.
    A width below D - 1 has no unit of some degrees, and some outputs see fewer features. The last layer starts at zero.

    order: order[i] is the place of feature i; none is 0 .. D - 1. residual: after the first, every two layers are a
    residual block (arXiv 1906.04032, app. B); hidden is then an odd number of equal widths. Raises UserError for what is
    no order and for widths that do not fit.
    """

    sequence: Tensor

    def __init__(
        self,
        features: int,
        parameters: int,
        condition_dim: int = 0,
        *,
        hidden: Sequence[int] = (64, 64),
        order: Sequence[int] | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__()
        places = torch.arange(features) if order is None else torch.as_tensor(order)
        if sorted(places.tolist()) != list(range(features)):
            raise UserError(
                f"order {places.tolist()} is none of {features} features; give each of 0 .. {features - 1} once"
            )
        if not hidden or min(hidden) < 1:
            raise UserError(f"hidden = {tuple(hidden)} must be one width or more, each of 1 or more, such as (64, 64)")
        if residual and (len(hidden) % 2 == 0 or len(set(hidden)) > 1):
            near = (max(hidden),) * (len(hidden) // 2 * 2 + 1)
            raise UserError(
                f"hidden = {tuple(hidden)} of residual blocks must be an odd number of equal widths; try {near}"
            )
        self.features, self.parameters_each, self.residual = features, parameters, residual
        self.register_buffer("sequence", places.argsort(), persistent=False)  # the features in their order

        lowest = 0 if condition_dim or features == 1 else 1  # units of degree 0 see the condition alone
        degrees = [_spread(width, features - lowest) + lowest for width in hidden]
        self.first = MaskedLinear(degrees[0].unsqueeze(1) > places)
        self.condition = nn.Linear(condition_dim, hidden[0], bias=False) if condition_dim else None
        self.layers = nn.ModuleList(MaskedLinear(after.unsqueeze(1) >= before) for before, after in pairwise(degrees))
        self.last = MaskedLinear((places.unsqueeze(1) >= degrees[-1]).repeat(parameters, 1))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self._known = [torch.searchsorted(d, torch.arange(features), right=True).tolist() for d in degrees]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x: B x D; condition: B x P -> B x n x D."""
        before, h = None, self.first(x)
        if self.condition is not None and condition is not None:
            h = h + self.condition(condition)
        for i, layer in enumerate(self.layers):
            new = layer(h.relu())
            if self.residual and i % 2 == 1:
                new = new + before
            before, h = h, new
        return self.last(h.relu()).unflatten(1, (self.parameters_each, self.features))

    @torch.no_grad()
    def ancestral(self, choose: Callable[[int, Tensor], Tensor], rows: int, condition: Tensor | None = None) -> Tensor:
        """Feature by feature in their order: x_i = choose(i, parameters), the n that x_<i gives, rows x n. Returns rows x D.

        Every unit is computed once, when the features that it sees are known, so that the whole costs the multiplications
        of one `forward`. It carries no gradient.
        """
        layers = [self.first, *(cast(MaskedLinear, layer) for layer in self.layers)]
        weights = [self.first.weight[:, self.sequence], *(layer.weight for layer in layers[1:])]
        biases = [layer.bias.unsqueeze(1) for layer in layers]  # units x 1: a column here is a row of the batch
        last, last_bias = (p.unflatten(0, (-1, self.features)) for p in (self.last.weight, self.last.bias))
        shift = self.condition(condition).t() if self.condition is not None and condition is not None else None

        x = last.new_empty(self.features, rows)  # in the order
        units = [last.new_empty(layer.out_features, rows) for layer in layers]  # after ReLU
        done = [0] * len(layers)
        for place, feature in enumerate(self.sequence.tolist()):
            seen = x[:place]
            fresh: list[Tensor] = []  # the units that become known with the feature before, layer by layer
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                new = slice(done[i], self._known[i][place])
                h = torch.addmm(bias[new], weight[new, : len(seen)], seen)
                if i == 0 and shift is not None:
                    h = h + shift[new]
                if self.residual and i > 0 and i % 2 == 0:
                    h = h + fresh[-2]
                fresh.append(h)
                units[i][new] = h.relu()
                done[i] = new.stop
                seen = units[i][: new.stop]
            parameters = torch.addmm(last_bias[:, feature, None], last[:, feature, : len(seen)], seen)
            x[place] = choose(feature, parameters.t())
        return x[self.sequence.argsort()].t()


def _spread(width: int, degrees: int) -> Tensor:
    """Degrees 0 .. degrees - 1 over so many units, evenly, sorted, the highest among them."""
    return (torch.arange(1, width + 1) * degrees - 1) // width
