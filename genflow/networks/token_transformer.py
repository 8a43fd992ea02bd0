"""A causal transformer of image tokens: what comes after each token, given those before it and a text.

The recipe of LlamaGen (Sun et al. 2024, arXiv 2406.06525): Llama's block, with RMS norms, SwiGLU (Shazeer 2020, arXiv
2002.05202) and rotary positions (Su et al. 2021, arXiv 2104.09864), here of rows and columns, behind a prefix of
text tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genflow.attention import Mask, attention
from genflow.config import Named
from genflow.errors import UserError, check_least
from genflow.functional import wide
from genflow.layers.modulation import Linear
from genflow.networks.cache import KeyValueCache
from genflow.registry import api_export, network_export

CAUSAL = Mask(causal=True)
EPS = 1e-6  # of the norms


@network_export("token_transformer")
@dataclass(frozen=True)
class TokenTransformerConfig:
    """A causal transformer of the tokens of a tokenizer.

    vocabulary: its number of codes; grid: its tokens, high and wide; both from a run's tokenizer unless given. heads:
    default one for each 64 of the width. mtp: so many modules that predict the tokens after the next one, in training
    and as drafts (DeepSeek-V3, arXiv 2412.19437, sec. 2.2). context_dim: of a text token, from a run's text encoder
    unless given; 0 for no text.
    """

    vocabulary: int | None = None
    grid: tuple[int, int] | None = None
    width: int = 256
    layers: int = 8
    heads: int | None = None
    mtp: int = 0
    context_dim: int | None = None
    attention: Annotated[str, Named("attention", also=("auto",))] = "auto"

    def __post_init__(self) -> None:
        check_least(self, vocabulary=2, width=1, layers=1, heads=1, mtp=0, context_dim=0)
        if self.grid is not None and min(self.grid) < 1:
            raise UserError(f"grid = {list(self.grid)} must be the tokens' height and width, such as [8, 8]")
        if self.grid is not None and self.mtp >= (tokens := self.grid[0] * self.grid[1]):
            raise UserError(f"mtp = {self.mtp} looks beyond the {tokens} tokens; take {min(tokens - 1, 1)}")
        if self.width % (part := 4 * (heads := heads_of(self.width, self.heads))):
            fit = (w for w in range(1, self.width + part + 1) if w % (4 * heads_of(w, self.heads)) == 0)
            near = min(fit, key=lambda w: abs(w - self.width))
            raise UserError(
                f"width = {self.width} is not a multiple of 4 x {heads} heads, as 2D positions need; try {near}"
            )

    def build(self) -> TokenTransformer:
        """The network, freshly initialised: every token is equally likely. Raises UserError for sizes that nobody told."""
        if self.vocabulary is None or self.grid is None:
            raise UserError(
                "token_transformer: vocabulary and grid are not set, and there is no tokenizer to tell them"
            )
        if self.context_dim is None:
            raise UserError(
                "token_transformer: context_dim is not set, and there is no text encoder to tell it; 0 is none"
            )
        return TokenTransformer(self)


def heads_of(width: int, heads: int | None) -> int:
    """Of attention: as many as are asked for, or one for each 64 of the width."""
    return heads or max(width // 64, 1)


@api_export("TokenTransformer")
class TokenTransformer(nn.Module):
    """Logits of each token after a text, the start symbol (`vocabulary`) and the tokens before it."""

    def __init__(self, config: TokenTransformerConfig) -> None:
        super().__init__()
        assert config.context_dim is not None and config.vocabulary is not None and config.grid is not None
        self.config, self.vocabulary = config, config.vocabulary
        self.tokens, width = config.grid[0] * config.grid[1], config.width
        self.heads = heads_of(width, config.heads)
        self.embed = nn.Embedding(config.vocabulary + 1, width)
        self.context = nn.Linear(config.context_dim, width) if config.context_dim else None
        self.padding = nn.Parameter(torch.zeros(width)) if config.context_dim else None
        self.blocks = nn.ModuleList(TokenBlock(width, self.heads, config.attention) for _ in range(config.layers))
        self.norm = nn.RMSNorm(width, EPS)
        self.head = nn.Linear(width, config.vocabulary, bias=False)
        self.mtp = nn.ModuleList(MTPModule(width, self.heads, config.attention) for _ in range(config.mtp))
        self.register_buffer("rotations", rotations(*config.grid, width // self.heads), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02), what is added to the residual stream by 1/sqrt(2 layers) less (GPT-2), and a zero head."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                deep = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.blocks)) ** 0.5 if deep else 0.02)
        nn.init.zeros_(self.head.weight)

    def prefix(self, context: Tensor, mask: Tensor) -> Tensor:
        """Text tokens, B x P x context_dim, and which are real, B x P, as the network reads them: B x P x width.

        They have no positions of their own here, those of the text encoder are in them; padding is one learnt
        vector, seen as
        such, so that no mask is needed.
        """
        if self.context is None:
            return self.embed.weight.new_zeros(len(context), 0, self.config.width)
        assert self.padding is not None
        return torch.where(mask[..., None], self.context(context), self.padding.to(self.context.weight.dtype))

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor) -> list[Tensor]:
        """The logits of every token given those before it, and of the modules of mtp those of the tokens after that.

        tokens: B x n int64; context, mask: see `prefix`. Returns float32 or wider, B x n x V, then for k = 1 .. mtp
        B x n - k x V: at place i of token i + k, given all before it, of which the trunk saw those before token i
        alone.
        """
        h, symbols = self.hidden(tokens, context, mask)
        logits = [self.logits(h)]
        for k, module in enumerate(cast(Iterable[MTPModule], self.mtp), start=1):
            h = module(h[:, :-1], symbols[:, k:], self.rotation(slice(k, tokens.shape[1])))
            logits.append(self.logits(h))
        return logits

    def hidden(self, tokens: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk's states before each token, not yet normed, and the symbols that they were made of, embedded.

        tokens: B x n int64 -> two of B x n x width: at place i the start or token i - 1. Raises UserError for more tokens
        than the network has places.
        """
        if tokens.shape[1] > self.tokens:
            raise UserError(f"{tokens.shape[1]} tokens are too many; the model has {self.tokens}")
        start = torch.full_like(tokens[:, :1], self.vocabulary)
        symbols = self.embed(torch.cat([start, tokens[:, :-1]], 1))
        before = self.prefix(context, mask)
        h = torch.cat([before, symbols], 1)
        rotation = self.rotation(F.pad(torch.arange(tokens.shape[1], device=h.device), (before.shape[1], 0)))
        for block in cast(Iterable[TokenBlock], self.blocks):
            h = block(h, rotation)
        return h[:, before.shape[1] :], symbols

    def logits(self, h: Tensor) -> Tensor:
        """h: ... x width -> ... x V, in float32 or wider: what is drawn from is not rounded to half precision."""
        with torch.autocast(h.device.type, enabled=False):
            weight = wide(self.head.weight)
            return F.linear(self.norm(h.to(self.norm.weight.dtype)).to(weight.dtype), weight)

    def rotation(self, places: Tensor | slice) -> tuple[Tensor, Tensor]:
        """cos and sin of places in the sequence of symbols, 0 the start: L or B x L -> L or B x 1 x L x head_dim."""
        cos, sin = cast(Tensor, self.rotations)[:, places].unbind()
        return (cos, sin) if cos.dim() == 2 else (cos[:, None], sin[:, None])

    def cache(self, rows: int, room: int, layers: int | None = None) -> KeyValueCache:
        """An empty cache for so many sequences of so many tokens, prefixes counted. layers: default the trunk's."""
        width = self.config.width
        return KeyValueCache(layers or len(self.blocks), rows, self.heads, room, width // self.heads, self.head.weight)

    def read(self, x: Tensor, cache: KeyValueCache, prefix: int, parents: Tensor | None = None) -> Tensor:
        """What follows in sequences that a cache has the beginning of, which then has this too. Not for gradients.

        x: B x W x width, embedded; prefix: how many of all tokens are text; parents: where x is a tree (cache.open).
        Returns the
        hidden states, B x W x width, before the last norm.
        """
        places = cache.open(x.shape[1], parents)
        if isinstance(places, int):
            first = max(places - prefix, 0)
            if places >= prefix and first + x.shape[1] <= self.tokens + 1:
                rotation = self.rotation(slice(first, first + x.shape[1]))
            else:
                places = torch.arange(places, places + x.shape[1], device=x.device)
                rotation = self.rotation((places - prefix).clamp(0, self.tokens))
        else:
            rotation = self.rotation((places - prefix).clamp(0, self.tokens))
        for i, block in enumerate(cast(Iterable[TokenBlock], self.blocks)):
            x = block(x, rotation, cache, i)
        return x


class TokenBlock(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)), no biases."""

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        inner = -(-8 * width // 3 // 32) * 32  # as many parameters as two matrices of 4 width
        self.heads, self.backend = heads, backend
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, EPS), nn.RMSNorm(width, EPS)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width, bias=False)
        self.up = Linear(width, 2 * inner, bias=False)
        self.down = Linear(inner, width, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """x: B x L x width, and so the result. cache: has the tokens before, and of this layer these too afterwards."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        (q, k), v = rotated(qkv[:2], *rotation), qkv[2]
        if cache is None:
            o = attention(q, k, v, CAUSAL, default=self.backend)
        else:
            k, v = cache.extend(layer, torch.stack([k, v]))
            o = attention(q, k, v, cache.mask, default=self.backend)
        x = x + self.proj(o.transpose(1, 2).flatten(2))
        gate, up = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class MTPModule(nn.Module):
    """One more token ahead: a block on the hidden state of a place joined with the next token (arXiv 2412.19437, eq. 21-22).

    Embedding and head are the network's own.
    """

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.hidden_norm, self.symbol_norm = nn.RMSNorm(width, EPS), nn.RMSNorm(width, EPS)
        self.join = Linear(2 * width, width, bias=False)
        self.block = TokenBlock(width, heads, backend)

    def forward(
        self, h: Tensor, symbols: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None = None
    ) -> Tensor:
        """h: B x L x width, hidden states one module shallower; symbols: those that come next, embedded. As h."""
        joined = torch.cat([self.hidden_norm(h), self.symbol_norm(symbols)], -1)
        return self.block(self.join(joined).to(h.dtype), rotation, cache)  # the residual stream stays wide


@network_export("medusa_heads")
@dataclass(frozen=True)
class MedusaHeadsConfig:
    """Heads that guess the tokens after the next one from a token transformer's state (Medusa, arXiv 2401.10774).

    heads: the k-th looks k tokens further. width, vocabulary: the transformer's, from a run's base unless given.
    """

    heads: int = 4
    width: int | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        check_least(self, heads=1)

    def build(self) -> MedusaHeads:
        """Raises UserError for sizes that nobody told."""
        if self.width is None or self.vocabulary is None:
            raise UserError("medusa_heads: width and vocabulary are not set, and there is no base to tell them")
        return MedusaHeads(self.heads, self.width, self.vocabulary)


@api_export("MedusaHeads")
class MedusaHeads(nn.Module):
    """p_k = softmax(W2_k (h + SiLU(W1_k h))), W1_k beginning at 0 (arXiv 2401.10774, sec. 2.1.1)."""

    def __init__(self, heads: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(heads))
        self.outer = nn.ModuleList(nn.Linear(width, vocabulary, bias=False) for _ in range(heads))
        for layer in cast(Iterable[nn.Linear], self.inner):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Normed states, ... x width, to logits, ... x heads x V, float32 or wider."""
        logits = [outer(h + F.silu(inner(h))) for inner, outer in zip(self.inner, self.outer, strict=True)]
        return torch.stack([wide(a) for a in logits], -2)


def rotations(height: int, width: int, dim: int) -> Tensor:
    """cos and sin of the angles by which queries and keys are turned: 2 x (1 + height width) x dim.

    Place 0 (prefix, start) is not turned. The token of row r and column c has angles (r + 1) w_i for the first half
    of its
    pairs of channels and (c + 1) w_i for the second, w_i = 100^(-4i / dim): a picture has few rows, so that slower ones
    would tell nothing.
    """
    frequency = 100.0 ** (-torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.cat([(at.reshape(-1, 1) + 1) * frequency for at in (rows, columns)], 1)
    angles = F.pad(angles, (0, 0, 1, 0)).repeat(1, 2)  # the pair of a channel is half of the head away
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of channels (i, i + dim / 2) turned by its angle. x: ... x L x dim; cos, sin: L x dim, or to broadcast."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos.to(x.dtype), torch.cat([-b, a], -1), sin.to(x.dtype))
