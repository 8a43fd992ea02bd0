"""Transformer autoregressive flow: every token is scaled and shifted as a causal transformer of those before it says.

TarFlow (Zhai et al. 2024, arXiv 2412.06329); its inverse by Jacobi sweeps, Song et al. 2021 (arXiv 2002.03629).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from genflow.errors import UserError, nearest
from genflow.flows.bijections.base import Bijection, check_condition, per_sample
from genflow.flows.bijections.jacobian import check_recording
from genflow.functional import wide
from genflow.layers.embeddings import patchify
from genflow.networks.causal import CausalTransformer
from genflow.registry import api_export, bijection_export
from genflow.samplers.fixed_point import verified

Rule = Literal["product", "linear"]


@bijection_export("transformer_autoregressive")
class TransformerAutoregressive(Bijection):
    """z_i = (x_i - mu(x_<i)) exp(-alpha(x_<i)) over tokens i, log |det| = -sum alpha (TarFlow, arXiv 2412.06329, eq. 6-8).

    A token is one number of a vector (D,), a patch of a picture (C, H, W), or a row of a sequence (tokens, D). reverse:
    the last token comes first. limit: alpha = limit tanh(u / limit), the most that it can be, in nats.

    The inverse x_i = z_i exp(alpha(x_<i)) + mu(x_<i) is a fixed point, found in `window` tokens at once by sweeps over
    them; tokens are committed, and the window slides, as soon as those before them are right to `tolerance` in units of z
    (None: 1024 eps, 1e-4 in float32). With window = 1 it is sequential, and exact. None is 1 on a CPU, where a sweep of many
    tokens costs what they cost one by one, and all tokens elsewhere; `measure_inverse` finds the best. The rows of a batch
    share their windows, so that but for window = 1 a row depends on its mates, within the tolerance. `sweeps`: those of
    the last inverse. It carries no gradient.

    Raises UserError for a shape that the patches do not divide.
    """

    keep_input = True
    guidable = True

    def __init__(
        self,
        shape: Sequence[int],
        *,
        condition_dim: int = 0,
        patch: int = 4,
        width: int = 128,
        layers: int = 2,
        heads: int | None = None,
        reverse: bool = False,
        limit: float = 4.0,
    ) -> None:
        super().__init__()
        if not 0 < limit <= 10:
            raise UserError(f"limit = {limit} is not within 0 .. 10 nats; try 4")
        self.shape, self.patch = tuple(shape), patch
        self.tokens, self.dim = token_shape(self.shape, patch)
        self.condition_dim, self.reverse, self.limit = condition_dim, reverse, limit
        self.window: int | None = None
        self.tolerance: float | None = None
        self.sweeps = 0
        self.network = CausalTransformer(
            self.dim, 2 * self.dim, self.tokens, condition_dim=condition_dim, width=width, layers=layers, heads=heads
        )

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_condition(condition, self.condition_dim, len(x))
        x = self._cut(x)
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        mu, alpha = self._read(self.network(before, condition))
        return self._join((x - mu) * torch.exp(-alpha)), -per_sample(alpha)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, alpha = self._solve(z, condition, self._read)
        return x, per_sample(alpha)

    def decode(
        self,
        z: Tensor,
        condition: Tensor | None = None,
        *,
        null: Tensor | None = None,
        guidance: float = 1.0,
        rule: Rule = "product",
    ) -> Tensor:
        """Noise to data; guided where guidance is not 1: each token's Gaussian as `guide` has it.

        null: one row or B, the condition to move away from; both go through the network in one batch. A guided map is no
        inverse of `forward`, and has no likelihood. Raises UserError for guidance without both conditions.
        """
        if guidance == 1:
            return self._solve(z, condition, self._read)[0]
        if condition is None or null is None or not self.condition_dim:
            raise UserError(f"guidance = {guidance} needs a condition and a null condition; 1 is none")
        both = torch.cat([condition, null.expand_as(condition)])

        def guided(theta: Tensor) -> tuple[Tensor, Tensor]:
            under_condition, under_null = theta.chunk(2)
            return guide(self._read(under_condition), self._read(under_null), guidance, rule)

        return self._solve(z, both, guided, copies=2)[0]

    @torch.no_grad()
    def _solve(
        self, z: Tensor, condition: Tensor | None, read: Callable[[Tensor], tuple[Tensor, Tensor]], copies: int = 1
    ) -> tuple[Tensor, Tensor]:
        """x, and alpha over tokens. copies: of z's rows, each under its own part of the condition; `read` merges them."""
        check_condition(condition, self.condition_dim, copies * len(z))
        z = self._cut(z)
        x = torch.cat([torch.zeros_like(z[:, :1]), z], 1)  # the network's tokens: nothing, then x; first guess z
        alpha = torch.empty_like(z)
        cache = self.network.cache(copies * len(z))
        size = self.window or (1 if z.is_cpu else self.tokens)
        tolerance = 1024 * torch.finfo(z.dtype).eps if self.tolerance is None else self.tolerance
        self.sweeps, start = 0, 0
        while start < self.tokens:
            stop = min(start + size, self.tokens)
            mu, alpha[:, start:stop] = read(self.network(x[:, start:stop].repeat(copies, 1, 1), condition, cache))
            new = torch.addcmul(mu, z[:, start:stop], alpha[:, start:stop].exp())
            settled = 1
            if stop - start > 1:  # |f(x) - z| for the x that the sweep began with
                off = (new - x[:, start + 1 : stop + 1]) * torch.exp(-alpha[:, start:stop])
                settled = min(verified(off.abs().amax(2), tolerance).tolist(), default=stop - start)
            x[:, start + 1 : stop + 1] = new
            start += settled
            cache.truncate(start)
            self.sweeps += 1
        return self._join(x[:, 1:]), alpha

    def _read(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        mu, u = theta.chunk(2, dim=-1)
        return mu, self.limit * torch.tanh(u / self.limit)

    def _cut(self, x: Tensor) -> Tensor:
        tokens = to_tokens(wide(x), self.shape, self.patch)
        return tokens.flip(1) if self.reverse else tokens

    def _join(self, tokens: Tensor) -> Tensor:
        return from_tokens(tokens.flip(1) if self.reverse else tokens, self.shape, self.patch)


def token_shape(shape: tuple[int, ...], patch: int) -> tuple[int, int]:
    """How many tokens a sample has, and of how many numbers. Raises UserError where the patches do not divide it."""
    if len(shape) == 1:
        return shape[0], 1
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) != 3:
        raise UserError(f"shape {shape} is no sample's; tokens are of (features,) or (channels, height, width)")
    channels, height, width = shape
    if patch < 1 or height % patch or width % patch:
        near = max(p for p in range(1, max(patch, 1) + 1) if height % p == width % p == 0)
        raise UserError(f"patch = {patch} does not divide a picture of {height} x {width}; try {near}")
    return height * width // patch**2, channels * patch**2


def to_tokens(x: Tensor, shape: tuple[int, ...], patch: int) -> Tensor:
    """B x *shape -> B x tokens x numbers; patches row by row."""
    return patchify(x, patch) if len(shape) == 3 else x.view(len(x), *token_shape(shape, patch))


def from_tokens(tokens: Tensor, shape: tuple[int, ...], patch: int) -> Tensor:
    """The inverse of to_tokens."""
    if len(shape) != 3:
        return tokens.reshape(-1, *shape)
    channels, height, width = shape
    x = tokens.reshape(-1, height // patch, width // patch, channels, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, *shape)


def guide(
    conditional: tuple[Tensor, Tensor], null: tuple[Tensor, Tensor], guidance: float, rule: Rule = "product"
) -> tuple[Tensor, Tensor]:
    """(mu, alpha) of the Gaussian N(mu, exp(alpha)^2) that is guided from the null one towards, and past, the conditional.

    With w = guidance - 1: "linear", each of mu, alpha <- conditional + w (conditional - null) (TarFlow, arXiv 2412.06329,
    sec. 2.5). "product", p_c^(1 + w) / p_0^w, which is a Gaussian of precision (1 + w - w s) / sigma_c^2 and mean
    mu_c + w s / (1 + w - w s) (mu_c - mu_0), s = sigma_c^2 / sigma_0^2, for w > 0 clipped at 1 (STARFlow, arXiv 2506.06276,
    sec. 3.4): stable at high guidance, the null one at 0, and nothing below. Raises UserError there, and for another rule.
    """
    (mu, alpha), (mu_0, alpha_0), w = conditional, null, guidance - 1
    if rule == "linear":
        return mu + w * (mu - mu_0), alpha + w * (alpha - alpha_0)
    if rule != "product":
        raise UserError(f"rule = {rule!r} is none.{nearest(rule, ('product', 'linear'))}")
    if guidance < 0:
        raise UserError(f"guidance = {guidance}: rule product needs 0 or more; take linear")
    s = torch.exp(2 * (alpha - alpha_0)).clamp(max=1 if w > 0 else math.inf)
    precision = 1 + w - w * s
    return mu + w * s / precision * (mu - mu_0), alpha - 0.5 * precision.log()


@api_export("tweedie")
def tweedie(log_prob: Callable[[Tensor], Tensor], y: Tensor, sigma: float) -> Tensor:
    """E[x | y] of y = x + N(0, sigma^2) noise, from the log density of y: y + sigma^2 grad log p(y) (Efron 2011).

    How samples of a flow that was trained with added noise are cleaned (TarFlow, arXiv 2412.06329, sec. 2.6). y: B x ...
    Raises UserError in torch.inference_mode.
    """
    check_recording("denoising")
    with torch.enable_grad():
        at = y.detach().requires_grad_()
        (grad,) = torch.autograd.grad(log_prob(at).sum(), at)
    return y + sigma**2 * grad


@torch.no_grad()
def certificate(bijection: Bijection, x: Tensor, z: Tensor, condition: Tensor | None = None) -> Tensor:
    """How far x is from the inverse of z, whatever found it: max |f(x) - z| of each sample, B. One pass of f."""
    return (bijection(x, condition)[0] - z).abs().flatten(1).amax(1)
