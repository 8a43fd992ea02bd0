"""Token flows: pictures as the tokens of a frozen tokenizer, one after another by a causal transformer.

The recipe of LlamaGen (Sun et al. 2024, arXiv 2406.06525), with multi-token prediction (DeepSeek-V3, arXiv 2412.19437).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genflow.ar.decoders import Ancestral, Decoded, Decoder, Progress
from genflow.ar.drafts import ModelDraft, MTPDraft
from genflow.ar.guess import Draft
from genflow.ar.law import TokenLaw
from genflow.ar.reader import TransformerReader
from genflow.conditions import Condition
from genflow.config import Choice, from_dict
from genflow.errors import UserError
from genflow.flows.base import Batch, Flow, LossOutput, evaluating
from genflow.flows.conditioned import ConditionedFlow, check_hearing
from genflow.flows.prepared import shared_out
from genflow.flows.store import load
from genflow.flows.tokenizer import Tokenizer
from genflow.functional import Rng, check_levels, double, noise_from_seeds, sent
from genflow.networks.identity import identity
from genflow.networks.token_transformer import TokenTransformer
from genflow.registry import api_export, flow_export, tag_of
from genflow.samplers import Solution
from genflow.text.base import same_text


@dataclass(frozen=True)
class DecodeConfig:
    """By decoding tokens."""

    decoder: Annotated[Any, Choice("decoder")] = field(default_factory=Ancestral)
    draft: str | None = None  # mtp, or a run of a smaller model or of Medusa heads; default: mtp where one is needed
    guidance: float = 1.0
    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        TokenLaw(self.guidance, self.temperature, self.top_k, self.top_p)
        if self.draft is not None and not self.decoder.takes_draft:
            name = type(self.decoder).__name__
            raise UserError(f"draft = {self.draft!r} does nothing for {name}; take decoder speculative, or no draft")


@flow_export("tokens")
@dataclass(frozen=True)
class TokenFlowConfig:
    """A model of the tokens of pictures. The tokenizer is not trained.

    drop_condition: part of the samples trained without their condition, for guidance. mtp_weight: of the losses of the
    network's modules of multi-token prediction, lambda of arXiv 2412.19437, eq. 25.
    """

    sampling: ClassVar[type] = DecodeConfig

    tokenizer: Annotated[Any, Choice("tokenizer")]
    drop_condition: float = 0.1
    mtp_weight: float = 0.3

    def __post_init__(self) -> None:
        check_hearing(self.drop_condition)
        if not 0 <= self.mtp_weight < float("inf"):
            raise UserError(f"mtp_weight = {self.mtp_weight} must be 0 or more, and finite; 0.3 is usual")

    def fits(self, shape: Sequence[int]) -> dict[str, Any]:
        """What the network has to be like, for pictures of a shape. Raises UserError for one that has no tokens."""
        tokenizer = self.tokenizer.build()
        return {"vocabulary": tokenizer.vocabulary, "grid": grid_of(tokenizer, shape)}

    def build(self, network: nn.Module, text: nn.Module, *, shape: Sequence[int]) -> TokenFlow:
        """shape: of a picture, C, H, W. Raises UserError for a network that does not fit the tokenizer."""
        if not isinstance(network, TokenTransformer):
            raise UserError(f"flow tokens: {type(network).__name__} reads no tokens; take model token_transformer")
        return TokenFlow(self, network, text, self.tokenizer.build(), shape=shape)


def grid_of(tokenizer: Tokenizer, shape: Sequence[int]) -> tuple[int, int]:
    """The tokens of pictures of a shape, high and wide. Raises UserError for a shape that has none."""
    factor, channels = tokenizer.factor, tokenizer.picture_channels
    if len(shape) != 3 or shape[0] != channels:
        raise UserError(
            f"flow tokens: the tokenizer is of pictures of {channels} channels, not of samples of {tuple(shape)}"
        )
    _, height, width = shape
    if height % factor or width % factor:
        near = f"{max(round(height / factor), 1) * factor} x {max(round(width / factor), 1) * factor}"
        raise UserError(f"flow tokens: {height} x {width} is no multiple of the tokenizer's {factor}; try {near}")
    return height // factor, width // factor


@dataclass(frozen=True)
class TokenSolution(Solution):
    """decoded: the tokens, and how they came; grid: of them, high and wide; lossless: whether they are samples of the model.

    nfe: passes of the model, of the row that took most.
    """

    decoded: Decoded | None = None
    grid: tuple[int, int] = (0, 0)
    lossless: bool = True


@api_export("TokenFlow")
class TokenFlow(ConditionedFlow):
    """A causal transformer of a picture's tokens under the verbs of a flow. tokenizer: frozen, in eval mode."""

    network: TokenTransformer
    unit = "nats of tokens"
    no_density = "the probability is of tokens, which many pictures share, and not of pixels; log_prob is of tokens"
    no_inverse = "tokens are drawn one after another, and there is no noise that they come from"

    def __init__(
        self,
        config: TokenFlowConfig,
        network: TokenTransformer,
        text: nn.Module,
        tokenizer: Tokenizer,
        *,
        shape: Sequence[int],
    ) -> None:
        super().__init__(network, text, shape=shape, whiten=None)
        self.config = config
        self.tokenizer = tokenizer.requires_grad_(False)
        self.text.keep_pooled()
        self._drafts: dict[str, Flow] = {}  # of runs, by their path
        self.grid = grid_of(tokenizer, shape)
        if (network.vocabulary, network.config.grid) != (tokenizer.vocabulary, self.grid):
            mine = f"{network.vocabulary} tokens on {' x '.join(map(str, network.config.grid or ()))}"
            its = f"{tokenizer.vocabulary} on {' x '.join(map(str, self.grid))}"
            raise UserError(f"the model has {mine}, the tokenizer {its}; leave model.vocabulary and model.grid out")

    def train(self, mode: bool = True) -> TokenFlow:
        super().train(mode)
        self.tokenizer.eval()
        return self

    @torch.no_grad()
    def to_tokens(self, x: Tensor) -> Tensor:
        """Pictures, B x C x H x W in [-1, 1], to tokens, B x n int64, row by row. Raises UserError for another size."""
        if tuple(x.shape[1:]) != self.shape:
            raise UserError(f"flow tokens: pictures of {tuple(x.shape[1:])}; this model has the grid of {self.shape}")
        check_levels(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.tokenizer.encode(x.float()).flatten(1)

    @torch.no_grad()
    def to_pictures(self, tokens: Tensor) -> Tensor:
        """Tokens, B x n int64, to pictures, B x C x H x W float32 in [-1, 1]. Raises UserError for what is no such."""
        self._check(tokens, self.network.tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.tokenizer.decode(tokens.unflatten(1, self.grid)).float().clamp(-1, 1)

    def _check(self, tokens: Tensor, n: int) -> None:
        if tokens.dim() != 2 or tokens.shape[1] != n or tokens.dtype != torch.int64:
            kind = f"{' x '.join(map(str, tokens.shape))} {str(tokens.dtype).removeprefix('torch.')}"
            raise UserError(f"tokens must be B x {n} int64, as to_tokens gives them, and these are {kind}")
        if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < self.network.vocabulary:
            most = self.network.vocabulary - 1
            raise UserError(f"tokens are 0 .. {most}, and these {int(tokens.min())} .. {int(tokens.max())}")

    def reconstruct(self, x: Tensor) -> Tensor:
        """Pictures there and back through the tokenizer: no sample can be truer."""
        return self.to_pictures(self.to_tokens(x.to(self.device)))

    def heard(self, batch: Batch, rng: Rng) -> Condition:
        """The embedded conditions of a batch in training, those that are dropped empty: stream "drop" of batch.position."""
        keep = sent(rng.uniform("drop", batch.position) >= self.config.drop_condition, batch.x.device)
        condition = self.text.drop(batch.condition, rng, batch.position)
        return self.embed(condition.where(keep, self.text.null().to(batch.x.device)))

    def loss(self, batch: Batch, rng: Rng) -> LossOutput:
        """L_main + lambda / D sum_k L_k: nats a token, of the next one and of those after it (arXiv 2412.19437, eq. 24-25).

        Each L_k is a mean over the places that it has. Draws by batch.position: stream "drop".
        """
        each = self._nats(self.to_tokens(batch.x), self.heard(batch, rng))
        parts = {name: nats.mean(1).mean() for name, nats in each.items()}
        main, *ahead = parts.values()
        loss = main + self.config.mtp_weight * torch.stack(ahead).mean() if ahead else main
        return LossOutput(loss, {name: part.detach() for name, part in parts.items()}, each["nll"].mean(1).detach())

    def _nats(self, tokens: Tensor, condition: Condition) -> dict[str, Tensor]:
        """-log p of each token, B x n, and of the modules' k tokens further, "mtp1" B x n - 1, ... condition: embedded."""
        logits = self.network(tokens, condition.tokens, condition.mask)
        return {
            f"mtp{k}" if k else "nll": F.cross_entropy(a.transpose(1, 2), tokens[:, k:], reduction="none")
            for k, a in enumerate(logits)
        }

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Nats a token of all conditions, and those of the modules of multi-token prediction."""
        with evaluating(self):
            each = self._nats(self.to_tokens(batch.x), self.embed(batch.condition))
        return {
            "validation_loss" if name == "nll" else f"validation_{name}": nats.mean() for name, nats in each.items()
        }

    @torch.no_grad()
    def log_prob(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """log P of the pictures' tokens, nats, B: exact, and of tokens, not of pixels. condition: prepared; none, empty."""
        return self.log_prob_of(self.to_tokens(x.to(self.device)), condition)

    @torch.no_grad()
    def log_prob_of(self, tokens: Tensor, condition: Condition | None = None) -> Tensor:
        """log P of tokens, B x n int64 or the first of them, nats, B. condition: prepared; none is the empty one.

        Raises UserError for what is no such.
        """
        self._check(tokens, min(tokens.shape[-1], self.network.tokens))
        with evaluating(self):
            return -double(self._nats(tokens, self.embed_rows(condition, len(tokens)))["nll"]).sum(1)

    def likelihood_note(self, k: int, **how: Any) -> str:
        if how:
            raise UserError(f"{next(iter(how))} is for likelihoods of a velocity; a {type(self).__name__}'s is exact")
        dtype = str(next(self.network.parameters()).dtype).removeprefix("torch.")
        which = identity(self.tokenizer)[:12]
        return f"exact, of a picture's {self.network.tokens} tokens of {self.network.vocabulary}, tokenizer {which}, {dtype}"

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str] | Condition,
        *,
        seeds: Sequence[int],
        decoder: Decoder | str | Mapping[str, Any] = "ancestral",
        draft: Flow | str | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        progress: Progress | None = None,
    ) -> TokenSolution:
        """One picture for each prompt and seed; the picture of a seed does not depend on its batch mates.

        decoder: a registered name, one with its options, {"name": "sjd", "window": 8}, or a Decoder. draft: where its
        guesses come from: "mtp", the network's own modules, or another model (or its run), a smaller one of the same
        tokenizer or Medusa heads fitted to this one; none is "mtp" where the decoder needs a draft. guidance, temperature (0
        is greedy), top_k, top_p: of the one distribution that draft and model share (`TokenLaw`). progress: called after
        every pass as progress(tokens, all).

        Returns x, B x C x H x W float32 in [-1, 1]; nfe, passes of the row that took most; and how they came. Raises
        UserError for what cannot be.
        """
        noise_from_seeds(seeds, (0,))  # refuses what is no seed
        how = from_dict(_Decoding, {"decoder": decoder}, where="sample").decoder
        law = TokenLaw(guidance, temperature, top_k, top_p)
        # In the network's own dtype: what a pass says must not hang on who asks. Blocks that are shared out have the run's.
        own = nullcontext() if shared_out(self.network) else torch.autocast(self.device.type, enabled=False)
        with evaluating(self), own:
            reader = self.reader(prompts, len(seeds), law)
            guesses = self._guesses(how, draft, reader, prompts)
            decoded = how(reader, seeds, draft=guesses, progress=progress)
            x = self.to_pictures(decoded.tokens)
        tag = tag_of(type(how))
        lossless = tag is not None and tag.metadata["lossless"]
        return TokenSolution(x, decoded.nfe, decoded=decoded, grid=self.grid, lossless=lossless)

    def reader(self, prompts: Sequence[str] | Condition, rows: int, law: TokenLaw) -> TransformerReader:
        """The network with so many sequences that it has not begun to read, for decoders."""
        condition = self.embed_prompts(prompts, rows)
        null = None if law.guidance == 1 else self.embed(self.text.null().to(self.device))
        if law.guidance != 1 and not self.text.max_tokens:
            raise UserError(f"guidance = {law.guidance}: this model has no condition; leave it at 1")
        condition = condition if len(condition) == rows else condition.expand(rows)
        return TransformerReader(self.network, condition, law=law, null=null)

    def _guesses(
        self, decoder: Decoder, draft: Flow | str | None, reader: TransformerReader, prompts: Sequence[str] | Condition
    ) -> Draft | None:
        if draft is None and decoder.needs_draft:
            if not self.network.mtp:
                ways = "give the run of a smaller model or of Medusa heads, or take decoder sjd or gumbel"
                raise UserError(f"{type(decoder).__name__} needs a draft, and the model has no modules of mtp; {ways}")
            draft = "mtp"
        if draft is None or draft == "mtp":
            return None if draft is None else MTPDraft(reader)
        if draft == "medusa":
            raise UserError("draft medusa: this model has no heads of its own; give the run of heads fitted to it")
        if isinstance(draft, str) and draft not in self._drafts:
            self._drafts[draft] = load(draft, device=self.device)
        other: Any = self._drafts[draft].to(self.device) if isinstance(draft, str) else draft
        if not hasattr(other, "guesses_for"):
            raise UserError(f"draft: a {type(other).__name__} guesses no tokens; take a model of the same tokenizer")
        return other.guesses_for(self, reader, prompts)

    def guesses_for(self, target: TokenFlow, reader: TransformerReader, prompts: Sequence[str] | Condition) -> Draft:
        """This model as the draft of another. Raises UserError for one of another tokenizer."""
        mine, its = identity(self.tokenizer), identity(target.tokenizer)
        if self.grid != target.grid or mine != its:
            raise UserError(
                f"the draft has tokenizer {mine[:12]} and the model {its[:12]}; both must be of one tokenizer"
            )
        if isinstance(prompts, Condition) and not same_text(self.text, target.text):
            raise UserError("the draft has another text encoder than the model; give prompts, no prepared condition")
        with evaluating(self):
            return ModelDraft(self.reader(prompts, reader.rows, reader.law))


@dataclass(frozen=True)
class _Decoding:
    decoder: Annotated[Decoder, Choice("decoder")]
