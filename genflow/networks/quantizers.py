"""Quantised bottlenecks: every place of the latents is one of finitely many codes."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from genflow.errors import UserError
from genflow.functional import Rng, sent
from genflow.networks.bottlenecks import Bottleneck, Squeezed, check_channels, of_first_rank, sum_over_ranks
from genflow.registry import genflow_export

SHRINK = 1e-3  # how far within half a level of its end values FSQ's bound stays
MOST_LEVELS = 1000  # of a channel: with more, that bound does not reach the outermost
STEEP = 2.0  # up to where its bound has a slope worth the name, and within which all levels are
DEAD = 0.03  # a code that is used less than this part of its even share is put elsewhere


class Quantizer(Bottleneck):
    """vocabulary: how many codes there are, 0 .. vocabulary - 1."""

    vocabulary: int

    @abstractmethod
    def codes(self, h: Tensor) -> Tensor:
        """B x reads x h x w -> B x h x w int64."""

    @abstractmethod
    def embed(self, codes: Tensor) -> Tensor:
        """B x h x w int64 -> what the decoder reads, B x channels x h x w: what the forward gives for these codes."""

    def told(self, codes: Tensor) -> dict[str, Tensor]:
        """The perplexity of a batch's codes, exp of their entropy: of how many they make use."""
        return {"perplexity": perplexity(torch.bincount(codes.flatten(), minlength=self.vocabulary))}


def perplexity(counts: Tensor) -> Tensor:
    """exp(-sum p log p) of the frequencies of codes."""
    p = counts.float() / counts.sum()
    return torch.special.entr(p).sum().exp()


def straight_through(z: Tensor, quantised: Tensor) -> Tensor:
    """quantised, with the gradient of z (Bengio et al. 2013, arXiv 1308.3432)."""
    return z + (quantised - z).detach()


# ------------------------------------------------------------------------------------------------------------------- FSQ


@genflow_export("fsq", kind="bottleneck")
@dataclass(frozen=True)
class FSQConfig:
    """Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505): each channel is rounded to one of its levels.

    levels: of each channel; the vocabulary is their product. The paper's: 8 6 5 (240), 8 5 5 5 (1000), 7 5 5 5 5 (4375).
    saturation: weight of what the encoder gives beyond -2 .. 2, squared. It is not in the paper: where the bound is flat
    there is no way back, and a channel that at first tells how bright all pictures are can stay at its last level for good.
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)
    saturation: float = 0.25

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 3:
            raise UserError(f"levels = {list(self.levels)}: each channel needs 3 levels or more; try 8, 5, 5, 5")
        if max(self.levels) > MOST_LEVELS:
            raise UserError(
                f"levels = {list(self.levels)}: the outermost of more than {MOST_LEVELS} levels are never reached; "
                "give fewer, and more channels"
            )
        if not 0 <= self.saturation < math.inf:
            raise UserError(f"saturation = {self.saturation} must be 0 or more, and finite; 0.25 is usual")
        if math.prod(self.levels) > 2**24:
            raise UserError(
                f"levels = {list(self.levels)} make {math.prod(self.levels)} codes, too many to count; give fewer"
            )

    def build(self) -> FSQ:
        return FSQ(self)


class FSQ(Quantizer):
    """No parameters. The levels of a channel are -floor(L/2) .. and are handed on divided by floor(L/2)."""

    levels: Tensor
    basis: Tensor

    def __init__(self, config: FSQConfig) -> None:
        super().__init__()
        self.saturation = config.saturation
        self.reads = self.channels = len(config.levels)
        self.vocabulary = math.prod(config.levels)
        basis = [math.prod(config.levels[:i]) for i in range(len(config.levels))]
        self.register_buffer("levels", torch.tensor(config.levels).view(-1, 1, 1), persistent=False)
        self.register_buffer("basis", torch.tensor(basis).view(-1, 1, 1), persistent=False)

    def bound(self, h: Tensor) -> Tensor:
        """f(z) of eq. 1: within the levels, 0 at 0; for even L between -L/2 and L/2 - 1."""
        half = (self.levels - 1) * (1 - SHRINK) / 2
        offset = torch.where(self.levels % 2 == 1, 0.0, 0.5)
        return torch.tanh(h + torch.atanh(offset / half)) * half - offset

    def forward(self, h: Tensor, rng: Rng | None = None, position: Tensor | None = None) -> Squeezed:
        bounded = self.bound(h)
        rounded = bounded.round()
        z = straight_through(bounded, rounded) / (self.levels // 2)
        beyond = (h.abs() - STEEP).relu().square().flatten(1).sum(1)
        return Squeezed(z, self.saturation * beyond, self.told(self._count(rounded)))

    def codes(self, h: Tensor) -> Tensor:
        return self._count(self.bound(h).round())

    def _count(self, rounded: Tensor) -> Tensor:
        whole = rounded.detach().nan_to_num().long()  # what is NaN is told by the loss
        return ((whole + self.levels // 2) * self.basis).sum(1)

    def embed(self, codes: Tensor) -> Tensor:
        digits = codes.unsqueeze(1) // self.basis % self.levels
        return (digits - self.levels // 2) / (self.levels // 2)


# ---------------------------------------------------------------------------------------------------------------- VQ-EMA


@genflow_export("vq", kind="bottleneck")
@dataclass(frozen=True)
class VQConfig:
    """The nearest of learnt codes (van den Oord et al. 2017, arXiv 1711.00937), which follow their latents' running means.

    vocabulary: of codes; channels: of each; decay: gamma of app. A.1; commitment: beta of eq. 3. A code that is hardly used
    is put where a latent of the batch is.
    """

    vocabulary: int = 512
    channels: int = 8
    decay: float = 0.99
    commitment: float = 0.25

    def __post_init__(self) -> None:
        check_channels(self.channels)
        if self.vocabulary < 2:
            raise UserError(f"vocabulary = {self.vocabulary} is too few codes; try 512")
        if not 0 <= self.decay < 1:
            raise UserError(f"decay = {self.decay} must be 0 or more and below 1; 0.99 is usual")
        if not 0 <= self.commitment < math.inf:
            raise UserError(f"commitment = {self.commitment} must be 0 or more, and finite; 0.25 is usual")

    def build(self) -> VQ:
        return VQ(self)


class VQ(Quantizer):
    """codebook: vocabulary x channels; counts N and sums m of app. A.1, e_i = m_i / N_i. Alike on all ranks."""

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.decay, self.commitment = config.decay, config.commitment
        self.reads = self.channels = config.channels
        self.vocabulary = config.vocabulary
        self.register_buffer("codebook", torch.randn(config.vocabulary, config.channels))
        self.register_buffer("counts", torch.ones(config.vocabulary))
        self.register_buffer("sums", self.codebook.clone())

    @torch.no_grad()
    def initialise(self, h: Tensor) -> None:
        """The codes are latents of the first batch, and where there are too few, such ones with a little noise."""
        rows = _rows(h)
        generator = torch.Generator().manual_seed(0)
        picked = torch.randperm(len(rows), generator=generator, device="cpu").repeat(-(-self.vocabulary // len(rows)))
        noise = (
            0.01 * torch.randn(self.codebook.shape, generator=generator, device="cpu") * rows.std(correction=0).cpu()
        )
        self.codebook.copy_(rows[picked[: self.vocabulary].to(rows.device)] + noise.to(rows.device))
        self.sums.copy_(self.codebook)
        self.counts.fill_(1.0)

    def codes(self, h: Tensor) -> Tensor:
        codebook = self.codebook.to(h.dtype)
        centre = codebook.mean(0)  # far from 0 the products would leave no digits for what counts
        rows, codebook = _rows(h) - centre, codebook - centre
        # |h - e|^2 without |h|^2, which is the same for all codes
        distance = codebook.square().sum(1) - 2 * rows @ codebook.T
        return distance.argmin(1).view(len(h), *h.shape[2:])

    def embed(self, codes: Tensor) -> Tensor:
        return self.codebook[codes].movedim(-1, 1).contiguous()

    def forward(self, h: Tensor, rng: Rng | None = None, position: Tensor | None = None) -> Squeezed:
        """In training the codes move, after they have been looked up. Which latent revives a code: stream "revive"."""
        codes = self.codes(h.detach())
        quantised = self.embed(codes)
        if self.training and rng is not None:
            self.update(_rows(h.detach()), codes.flatten(), rng)
        penalty = self.commitment * (h - quantised).square().flatten(1).sum(1)
        return Squeezed(straight_through(h, quantised), penalty, self.told(codes))

    @torch.no_grad()
    def update(self, rows: Tensor, codes: Tensor, rng: Rng) -> None:
        """N <- gamma N + (1 - gamma) n, m <- gamma m + (1 - gamma) sum of a code's latents, e = m / N (app. A.1).

        rows: n x channels; codes: n. n and the sums are of all ranks together.
        """
        one_hot = F.one_hot(codes, self.vocabulary).to(rows.dtype)
        now = sum_over_ranks(torch.cat([one_hot.sum(0)[:, None], one_hot.T @ rows], dim=1))
        self.counts.lerp_(now[:, 0], 1 - self.decay)
        self.sums.lerp_(now[:, 1:], 1 - self.decay)
        even = self.counts.sum() / self.vocabulary
        dead = self.counts < DEAD * even
        place = sent((rng.uniform("revive", torch.arange(self.vocabulary)) * len(rows)).long(), rows.device)
        fresh = of_first_rank(rows[place])
        self.counts.copy_(torch.where(dead, even, self.counts))
        self.sums.copy_(torch.where(dead[:, None], fresh * even, self.sums))
        self.codebook.copy_(self.sums / self.counts[:, None])


def _rows(h: Tensor) -> Tensor:
    """B x C x h x w -> B h w x C."""
    return h.movedim(1, -1).flatten(0, -2)
