"""Rules of verification: how much of a guess holds, and what the token after that is drawn from.

A rule is called as rule(guess, p, noise, at, shape): at, B int64, is the position of the first guessed token; p, B x nodes
x V, what the model says after each node. It returns the node up to which the guess holds, B int64, 0 for the root, and the
law of the token after it, B x V, which the decoder draws from stream "token".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genflow.ar.guess import Guess, Shape
from genflow.ar.law import TokenNoise

Rule = Callable[[Guess, Tensor, TokenNoise, Tensor, Shape], tuple[Tensor, Tensor]]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm((p - q)+), what is left of p where a draw from q was rejected; p where nothing is left. ... x V."""
    left = (p - q).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total, p)


def accepted(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """u < p(x) / q(x): whether draws x from q stand as draws from p. p, q: ... x V; tokens, u: ... -> bool."""
    px, qx = (a.gather(-1, tokens[..., None])[..., 0] for a in (p, q))
    return (u * qx < px) & (qx > 0)  # what q never draws has no place in its residual


def rejection(
    guess: Guess, p: Tensor, noise: TokenNoise, at: Tensor, shape: Shape, *, lenience: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Speculative sampling of a chain (Leviathan et al. 2022, arXiv 2211.17192, alg. 1; Chen et al. 2023, arXiv 2302.01318).

    From the left, a guess x ~ q stands with probability min(1, p(x) / q(x)); in place of the first that does not comes a
    draw from norm((p - q)+). P(stands) = 1 - TV(p, q). lenience: q is taken as that much of it, so that no token comes out
    with more than 1 / lenience of its probability (app. A.5); at 1 the outcome is exactly the model's.
    """
    width = guess.tokens.shape[1]
    q = lenience * guess.q
    u = noise.uniform("accept", _positions(at, width), 1)[..., 0].to(p)
    node = accepted(p[:, :width], q, guess.tokens, u).long().cumprod(1).sum(1)
    q = torch.cat([q, torch.zeros_like(p[:, :1])], 1)  # nothing was guessed after the last
    return node, residual(_after(p, node), _after(q, node))


def tree_rejection(guess: Guess, p: Tensor, noise: TokenNoise, at: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Speculative sampling of a tree: the same at each node for its children in turn (SpecInfer, arXiv 2305.09781, alg. 2).

    They were drawn without replacement: after each that does not stand p becomes norm((p - q)+), and q loses it and is made
    a distribution again (Jeon et al. 2024, arXiv 2402.14160). On a chain this is `rejection`.
    """
    rows = torch.arange(len(p), device=p.device)
    node = torch.zeros_like(at)
    law = p[:, 0]
    going = torch.ones_like(at, dtype=torch.bool)
    for depth, width in enumerate(shape.branching):
        q, children = guess.q[rows, node], shape.children[node]
        u = noise.uniform("accept", at[:, None] + depth, width)[:, 0].to(p)
        here = going
        going = torch.zeros_like(here)
        for i in range(width):
            x = guess.tokens[rows, children[:, i] - 1]
            stands = accepted(law, q, x, u[:, i]) & here
            node = torch.where(stands, children[:, i], node)
            law = torch.where(here[:, None], torch.where(stands[:, None], p[rows, node], residual(law, q)), law)
            going, here = going | stands, here & ~stands
            if i + 1 < width:
                q = q.scatter(1, x[:, None], 0)
                q = q / q.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return node, law


def agreement(guess: Guess, p: Tensor, noise: TokenNoise, at: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """A guess holds as far as it is what the model draws itself, with its own noise, at each of the positions.

    So the outcome is token for token that of ancestral sampling with that noise, whatever the guess (Wiggers & Hoogeboom
    2020, arXiv 2002.09928; Daliri et al. 2024, arXiv 2408.07978, by which P(holds) >= (1 - TV) / (1 + TV)).
    """
    width = guess.tokens.shape[1]
    own = noise.draw(p[:, :width], "token", _positions(at, width))[..., 0]
    node = (own == guess.tokens).long().cumprod(1).sum(1)
    return node, _after(p, node)


def typical(
    guess: Guess, p: Tensor, noise: TokenNoise, at: Tensor, shape: Shape, *, epsilon: float, delta: float
) -> tuple[Tensor, Tensor]:
    """The longest path of typical tokens, p(x) > min(epsilon, delta exp(-H(p))) (Medusa, arXiv 2401.10774, sec. 2.3.1).

    Of paths of one length one of the first. Not a sample of the model: likely tokens come out too often.
    """
    above = p[:, shape.parents[1:]]  # what is said before each node but the root
    threshold = (delta * torch.exp(-torch.special.entr(above).sum(-1))).clamp(max=epsilon)
    fine = above.gather(2, guess.tokens[..., None])[..., 0] > threshold
    held = torch.cat([fine.new_ones(len(fine), 1), fine], 1)
    for first, last in shape.levels[1:]:
        held[:, first:last] &= held[:, shape.parents[first:last]]
    node = torch.where(held, shape.depth, -1).argmax(1)
    return node, _after(p, node)


def _positions(at: Tensor, width: int) -> Tensor:
    return at[:, None] + torch.arange(width, device=at.device)


def _after(p: Tensor, node: Tensor) -> Tensor:
    """p, B x nodes x V, after one node of each row: B x V."""
    return p[torch.arange(len(p), device=p.device), node]
