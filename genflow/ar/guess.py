"""What decoders are made of: a model with the sequences that it reads, guesses at their next tokens, their shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import accumulate
from operator import mul
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from genflow.ar.law import TokenNoise
from genflow.errors import UserError
from genflow.functional import sent


class Reader(Protocol):
    """A model with B sequences, each read as far as its decoder has come.

    A sequence is the start symbol, `vocabulary`, and then `tokens` tokens, 0 .. vocabulary - 1; each may be read once the
    one before it is. lengths: B int64 on the CPU, the symbols of each row that were read and kept. Guidance, temperature
    and filters are applied inside, once: what comes out is the distribution that tokens are drawn from.
    """

    vocabulary: int
    tokens: int

    @property
    def lengths(self) -> Tensor: ...

    @property
    def device(self) -> torch.device: ...

    def step(self, symbols: Tensor, parents: Tensor | None = None) -> Tensor:
        """Read W symbols more, B x W int64, and keep them. Returns what comes after each: B x W x V, probabilities.

        parents: W int64, where the symbols are a tree: the index of the one before each, smaller than its own; -1 for the
        one after what was read so far. Each then comes after its ancestors alone. None: they are in a row. Symbols beyond
        the end may be given, and answered with anything.
        """

    def truncate(self, lengths: Tensor) -> None:
        """Forget all but the first symbols of each row, B int64 on the CPU."""

    def gather(self, path: Tensor) -> None:
        """Of the symbols of the last step keep those of a path alone, B x D, indices into its W, as if read in a row."""


class Shape:
    """The shape of a guess: a tree in which every node of depth d has branching[d] children; a chain where all are one.

    The nodes of a step are numbered level by level, 0 the root, which is the last settled symbol. parents: nodes int64,
    -1 for the root; depth: nodes; inner: how many nodes have children, the first ones; children: inner x the widest
    branching, -1 where there is none; levels: the first node of each depth and the one after its last; path: nodes x
    depth, the ancestors of each from depth 1 on and itself, then 0; forests: for each depth the parents of the nodes up to
    it, the root left out.
    """

    def __init__(self, branching: tuple[int, ...]) -> None:
        if wrong := [width for width in branching if not isinstance(width, int)]:
            raise UserError(f"branching = {list(branching)}: {wrong[0]!r} is not a whole number")
        if any(width < 1 for width in branching):
            raise UserError(f"branching = {list(branching)}: each must be one or more")
        self.branching, self.chain = branching, all(width == 1 for width in branching)
        level, parents, depth = [0], [-1], [0]
        paths: list[list[int]] = [[]]
        children: list[list[int]] = []
        for d, width in enumerate(branching, start=1):
            above, level = level, []
            for parent in above:
                born = range(len(parents), len(parents) + width)
                children.append([*born] + [-1] * (max(branching) - width))
                parents += [parent] * width
                depth += [d] * width
                paths += [[*paths[parent], node] for node in born]
                level += born
        counts = [*accumulate(branching, mul, initial=1)]
        ends = [*accumulate(counts)]
        self.levels = [(end - count, end) for end, count in zip(ends, counts, strict=True)]
        self.nodes, self.inner = len(parents), len(children)
        number = partial(torch.tensor, dtype=torch.int64, device="cpu")
        self.forests = [number(parents[1:end]) - 1 for _, end in self.levels]
        self.parents, self.depth = number(parents), number(depth)
        self.children = number(children).view(self.inner, max(branching, default=0))
        self.path = number([[*path, *[0] * (len(branching) - len(path))] for path in paths])


@lru_cache(maxsize=256)
def shape_of(branching: tuple[int, ...], device: torch.device) -> Shape:
    """The shape, its tensors on a device."""
    shape = Shape(branching)
    for name in ("parents", "depth", "children", "path"):
        setattr(shape, name, getattr(shape, name).to(device))
    shape.forests = [forest.to(device) for forest in shape.forests]
    return shape


class Guess(NamedTuple):
    """tokens: B x nodes - 1, of each node but the root; q: B x inner x V, what the children of each inner node were drawn
    from, without replacement."""

    tokens: Tensor
    q: Tensor


class Draft(Protocol):
    """Where guesses come from. trees: whether it can guess more than a chain; reach: how many tokens ahead."""

    vocabulary: int
    trees: bool
    reach: float

    def check(self, target: Reader) -> None:
        """Before the first pass. Raises UserError where what it reads is not as it must be beside the model's reader."""

    def propose(self, symbols: Tensor, done: Tensor, shape: Shape, noise: TokenNoise, stream: str) -> Guess | None:
        """Guess at what follows; None where there is nothing yet to guess from.

        symbols: B x ..., the start symbol and then tokens, `done` of them, B int64 on the CPU. What is guessed for a
        position is drawn from the noise's stream at that position.
        """

    def observe(self, p: Tensor, path: Tensor, settled: Tensor, done: Tensor) -> None:
        """What came of a pass, after every pass.

        p: B x nodes x V, what the model said after each node; path: B x depth + 1, the nodes that hold, the root first;
        settled: B, how many of these, each with the token after it; done: B int64 on the CPU, the tokens settled so far.
        """


def symbols_at(symbols: Tensor, first: Tensor, width: int) -> Tensor:
    """symbols[i, first[i] : first[i] + width] of each row, B x width; the last one is repeated beyond the end."""
    at = sent(first, symbols.device)[:, None] + torch.arange(width, device=symbols.device)
    return symbols.gather(1, at.clamp(max=symbols.shape[1] - 1))


def check_seeds(seeds: Sequence[int], rows: int) -> None:
    """Raises UserError for seeds that are not one for each row."""
    if len(seeds) != rows:
        raise UserError(f"{len(seeds)} seeds for {rows} sequences; give one seed for each")
