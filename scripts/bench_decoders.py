"""What every decoder of a token model gives: tokens a pass, guesses that hold, seconds, in turn with ancestral decoding.

    python scripts/bench_decoders.py runs/emoji-ar --draft runs/emoji-medusa runs/emoji-ar-small

Every round draws the same pictures with every decoder, one after another; ratios are medians of the rounds. With --check N
it draws N pictures with each, and asks whether they are samples of the distribution of ancestral ones.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from claims.common import told
from torch import Tensor

from genflow.ar.decoders import (
    Ancestral,
    Decoder,
    GumbelCoupled,
    MedusaTypical,
    Relaxed,
    Speculative,
    SpeculativeJacobi,
    SpeculativeTree,
)
from genflow.ar.flow import TokenFlow, TokenSolution
from genflow.ar.medusa import MedusaFlow
from genflow.cli.tune import captions
from genflow.flows.store import load
from genflow.registry import tag_of

WORTH = 0.35  # of the tested guesses: below, a decoder is no accelerator
PASSES, SECONDS = 0.6, 0.8  # of ancestral's, the marks at batch 1


@dataclass
class Contender:
    """A decoder with its draft, and what was measured of it: lists of the rounds' figures."""

    decoder: Decoder
    draft: Any = None
    whose: str = ""
    seconds: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    tested: int = 0
    held: int = 0

    @property
    def name(self) -> str:
        tag = tag_of(type(self.decoder))
        size = getattr(self.decoder, "window", None) or getattr(self.decoder, "branching", None)
        words = [tag.names[0] if tag else "", *([str(size).replace(" ", "")] if size else []), self.whose]
        return " ".join(word for word in words if word)

    @property
    def lossless(self) -> bool:
        tag = tag_of(type(self.decoder))
        return tag is not None and tag.metadata["lossless"]

    def draw(self, flow: TokenFlow, prompts: Sequence[str], seeds: Sequence[int], law: dict[str, Any]) -> TokenSolution:
        return flow.sample(prompts, seeds=seeds, decoder=self.decoder, draft=self.draft, **law)


def contenders(flow: TokenFlow, drafts: Sequence[str], window: int) -> list[Contender]:
    """Ancestral first; then what can go without a draft, then each draft with what it can serve."""
    found = [Contender(Ancestral()), Contender(SpeculativeJacobi(window)), Contender(GumbelCoupled(window))]
    found.append(Contender(Relaxed(window)))
    if flow.network.mtp:
        found += [Contender(Speculative(w), "mtp", "mtp") for w in sorted({2, 4, window})]
        found.append(Contender(GumbelCoupled(window), "mtp", "mtp"))
    for path in drafts:
        draft = load(path, device=flow.device)
        if isinstance(draft, MedusaFlow):
            reach = len(draft.network.inner)
            tree = (3, 2, 1, 1)[:reach]
            found.append(Contender(Speculative(reach), draft, "heads"))
            found += [Contender(SpeculativeTree(tree), draft, "heads"), Contender(MedusaTypical(tree), draft, "heads")]
        else:
            found += [Contender(Speculative(4), draft, "small"), Contender(SpeculativeTree((3, 2, 1)), draft, "small")]
    return found


def measure(flow: TokenFlow, every: list[Contender], prompts: list[str], batch: int, rounds: int, law: dict) -> None:
    """Fill the contenders with the figures of so many rounds, the first one thrown away."""
    for each in every:
        each.seconds, each.passes, each.tested, each.held = [], [], 0, 0
    for number in range(-1, rounds):
        texts = [prompts[(number * batch + i) % len(prompts)] for i in range(batch)]
        seeds = range((number + 1) * batch, (number + 2) * batch)
        for each in every:
            begun = time.perf_counter()
            solution = each.draw(flow, texts, seeds, law)
            if flow.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                each.seconds.append(time.perf_counter() - begun)
                assert solution.decoded is not None
                each.passes.append(float(solution.decoded.passes.amax(1).double().mean()))
                each.tested += int(solution.decoded.tested.sum())
                each.held += int(solution.decoded.accepted.sum())


def report(every: list[Contender], batch: int, tokens: int) -> None:
    """The table of one batch size, and at batch 1 whether the marks are reached."""
    base = every[0]
    print(f"\nbatch {batch}: ancestral {statistics.median(base.seconds):.3f} s, {tokens} passes")
    print(f"  {'':34}{'passes':>8}{'tokens/pass':>13}{'held':>7}{'s':>8}{'of ancestral':>14}{'(range)':>15}")
    best: dict[str, tuple[float, str]] = {}
    for each in every:
        ratios = [a / b for a, b in zip(each.seconds, base.seconds, strict=True)]
        passes, ratio = statistics.mean(each.passes), statistics.median(ratios)
        held = each.held / each.tested if each.tested else math.nan
        low = "  a study: fewer than 35 % of its guesses hold" if held < WORTH else ""
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        figures = f"{passes:8.1f}{tokens / passes:13.2f}{held:7.2f}{statistics.median(each.seconds):8.3f}{ratio:14.2f}"
        print(f"  {each.name:34}{figures}{spread:>15}  {'lossless' if each.lossless else 'LOSSY'}{low}")
        if each is not base and each.lossless:
            for what, value in (("passes", passes / tokens), ("seconds", ratio)):
                best[what] = min(best.get(what, (math.inf, "")), (value, each.name))
    if batch == 1:
        for what, mark in (("passes", PASSES), ("seconds", SECONDS)):
            value, name = best[what]
            verdict = "reached" if value <= mark else "NOT reached"
            print(f"  {what}: {value:.2f} of ancestral's ({name}); the mark is {mark}: {verdict}")


# ---------------------------------------------------------------------------------------------------- two-sample tests


def mean_z(a: Tensor, b: Tensor) -> float:
    """The difference of two means in its standard errors (Welch). a, b: N each."""
    a, b = a.double(), b.double()
    return float((a.mean() - b.mean()) / (a.var() / len(a) + b.var() / len(b)).sqrt())


def histogram_z(a: Tensor, b: Tensor, vocabulary: int) -> float:
    """Chi-square of homogeneity of two token histograms, as a standard normal, pictures taken as the independent units.

    a, b: N x n each. Tokens of one picture hang together, so that the chi-square of single tokens would be too large: its
    scale is taken from random halves of both samples joined, which are of one distribution.
    """

    def chi_square(x: Tensor, y: Tensor) -> float:
        counts = torch.stack([torch.bincount(z.flatten(), minlength=vocabulary).double() for z in (x, y)])
        counts = counts[:, counts.sum(0) >= 10]
        expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
        return float(((counts - expected) ** 2 / expected).sum())

    joined, generator = torch.cat([a, b]), torch.Generator().manual_seed(0)
    null = []
    for _ in range(200):
        order = torch.randperm(len(joined), generator=generator)
        null.append(chi_square(joined[order[: len(a)]], joined[order[len(a) :]]))
    spread = statistics.stdev(null)
    return (chi_square(a, b) - statistics.mean(null)) / spread if spread else math.nan  # all pictures are alike


def check(flow: TokenFlow, every: list[Contender], prompts: list[str], n: int, batch: int) -> None:
    """Print z of the mean log-probability and of the token histograms of each decoder against ancestral decoding."""

    def drawn(each: Contender, first: int) -> tuple[Tensor, Tensor]:
        tokens, said = [], []
        for i in range(0, n, batch):
            texts = [prompts[j % len(prompts)] for j in range(i, min(i + batch, n))]
            solution = each.draw(flow, texts, range(first + i, first + i + len(texts)), {})
            assert solution.decoded is not None
            tokens.append(solution.decoded.tokens)
            said.append(flow.log_prob_of(tokens[-1], flow.text.encode(texts)))
        return torch.cat(tokens).cpu(), torch.cat(said).cpu()

    base, known = drawn(every[0], 10**6)
    print(
        f"\n{n} pictures each, other seeds, against ancestral: z of the mean log-probability, and of the token histogram"
    )
    for number, each in enumerate(every[1:], start=2):
        tokens, said = drawn(each, number * 10**6)
        z, h = mean_z(said, known), histogram_z(tokens, base, flow.network.vocabulary)
        print(f"  {each.name:34}{z:8.2f}{h:8.2f}  {'lossless' if each.lossless else 'LOSSY'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument(
        "--draft", nargs="+", default=[], metavar="RUN", help="smaller models of the tokenizer, or heads"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=int, default=8, help="of sjd, gumbel and relaxed")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--check", type=int, default=0, metavar="N", help="pictures for the two-sample tests")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: the least is 1")
    if args.check == 1 or args.check < 0:
        parser.error(f"--check {args.check}: the least is 2 pictures; 0 checks nothing")
    flow = load(args.run, device=args.device)
    if not isinstance(flow, TokenFlow):
        parser.error(f"{args.run} is no model of tokens")
    every = contenders(flow, args.draft, args.window)
    prompts = list(dict.fromkeys(captions(flow, args.run)))
    law = {"guidance": args.guidance, "top_p": args.top_p}
    for batch in args.batch:
        measure(flow, every, prompts, batch, args.rounds, law)
        report(every, batch, flow.network.tokens)
    if args.check:
        check(flow, every, prompts, args.check, max(args.batch))


if __name__ == "__main__":
    told(main)
