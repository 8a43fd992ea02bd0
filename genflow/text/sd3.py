"""How Stable Diffusion 3 hears a prompt: two CLIPs and T5 (Esser et al. 2024, arXiv 2403.03206, sec. 4 and fig. 2)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from genflow.cachedir import cache_folder
from genflow.conditions import Condition
from genflow.errors import UserError, nearest
from genflow.functional import Rng
from genflow.registry import text_export
from genflow.text.base import FrozenText, warn_cut
from genflow.text.cache import EmbeddingCache, Row
from genflow.text.pretrained import READ, _load, _print, _quiet, _tokenised, fingerprint

# Our name -> the folders of its weights and of its tokenizer in a diffusers pipeline.
FOLDERS = {
    "clip_l": ("text_encoder", "tokenizer"),
    "clip_g": ("text_encoder_2", "tokenizer_2"),
    "t5": ("text_encoder_3", "tokenizer_3"),
}
CLIPS = ("clip_l", "clip_g")
CLIP_TOKENS = 77
WIDTHS = {"clip_l": 768, "clip_g": 1280}
HINT = "give the folder of a diffusers SD3 pipeline, or what holds its text_encoder and tokenizer folders"


@text_export("sd3")
@dataclass(frozen=True)
class SD3TextConfig:
    """CLIP-L, CLIP-bigG and T5, frozen, from the folder of a diffusers SD3 pipeline.

    encoders: those to use of clip_l, clip_g and t5 (default: those that the folder has); the others are zeros, as SD3 was
    trained to hear. t5_tokens: how much of a prompt T5 reads; the CLIPs read 77. drop: part of the training samples for
    which each encoder on its own is zeros, one number or one for each (SD3: 0.464 with drop_condition 0 of the flow). dtype:
    of weights and embeddings (auto: as the weights lie on the disk). width, pooled: of the tokens and the pooled vector
    where the encoders that would tell are absent.
    """

    folder: str | None = None
    encoders: tuple[str, ...] | None = None
    t5_tokens: int = 256
    drop: float | tuple[float, float, float] = 0.0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    width: int = 4096
    pooled: int = 2048

    def __post_init__(self) -> None:
        if unknown := [name for name in self.encoders or () if name not in FOLDERS]:
            raise UserError(f"encoders: {unknown[0]!r} is unknown.{nearest(unknown[0], FOLDERS)}")
        if self.t5_tokens < 1:
            raise UserError(f"t5_tokens = {self.t5_tokens} is too few; SD3 has 77 in training and 256 in sampling")
        if wrong := [p for p in self.drops.values() if not 0 <= p <= 1]:
            raise UserError(f"drop = {wrong[0]} is not within 0 .. 1; SD3 has 0.464")

    @property
    def drops(self) -> dict[str, float]:
        values = self.drop if isinstance(self.drop, tuple) else (self.drop,) * 3
        return dict(zip(FOLDERS, values, strict=True))

    def build(self) -> SD3Text:
        """Raises UserError where the folder, or an encoder that was named, is not there."""
        return SD3Text(self)


class SD3Text(FrozenText):
    """Prepares the embeddings of the three, joined.

    Tokens: the CLIPs' penultimate states side by side on the features, zeros up to T5's width, then T5's last states as
    further tokens. Pooled: the CLIPs' projected end-of-text states side by side. The mask tells real tokens from padding;
    SD3's weights were trained without it (`text_mask` of the flow).
    """

    def __init__(self, config: SD3TextConfig) -> None:
        super().__init__()
        self.config = config
        self.parts = {name: Pretrained(config, name) for name in _present(config)}
        sizes = {name: _sizes(config, name) for name in FOLDERS}
        self.context_dim = sizes["t5"].width
        limits = {self.parts[name].limit for name in CLIPS if name in self.parts}
        if len(limits) > 1:
            raise UserError(
                f"text sd3: the CLIPs read {min(limits)} and {max(limits)} tokens; they do not belong together"
            )
        self.clip_tokens = limits.pop() if limits else CLIP_TOKENS
        self.max_tokens = self.clip_tokens + config.t5_tokens
        self.pooled_dim = config.pooled if config.folder is None else sum(sizes[name].pooled for name in CLIPS)
        middle = sizes["clip_l"].width
        end = middle + sizes["clip_g"].width
        if config.folder is not None and end > self.context_dim:
            raise UserError(
                f"text sd3: the CLIPs are {end} wide, wider than T5's {self.context_dim}; they do not belong together"
            )
        # where each encoder's states and pooled vector lie: tokens, features, pooled
        first, cut = slice(0, self.clip_tokens), sizes["clip_l"].pooled
        self.places = {
            "clip_l": (first, slice(0, middle), slice(0, cut)),
            "clip_g": (first, slice(middle, end), slice(cut, self.pooled_dim)),
            "t5": (slice(self.clip_tokens, self.max_tokens), slice(0, self.context_dim), slice(0, 0)),
        }

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Raises UserError for a prompt that no encoder is there to read."""
        prompts = [p.encode("utf-8", errors="replace").decode() for p in prompts]  # halves of surrogate pairs
        if not self.parts and any(prompts):
            raise UserError(f"text sd3: no encoder is there to read {next(filter(None, prompts))[:40]!r}; {HINT}")
        rows = {name: part.rows(prompts) for name, part in self.parts.items()}
        dtype = next((row[0]["states"].dtype for row in rows.values() if row), torch.float32)
        tokens = torch.zeros(len(prompts), self.max_tokens, self.context_dim, dtype=dtype)
        mask = torch.zeros(len(prompts), self.max_tokens, dtype=torch.bool)
        pooled = torch.zeros(len(prompts), self.pooled_dim, dtype=dtype)
        for name in self.parts:
            where, features, place = self.places[name]
            for i, row in enumerate(rows[name]):
                tokens[i, where, features] = row["states"]
                mask[i, where] |= row["mask"]
                if "pooled" in row:
                    pooled[i, place] = row["pooled"]
        for names, limit, which in ((CLIPS, self.clip_tokens, "CLIP"), (("t5",), self.config.t5_tokens, "T5")):
            heard = [rows[name] for name in names if name in rows]
            warn_cut(
                [p for i, p in enumerate(prompts) if any(r[i]["length"] > limit for r in heard)],
                f"{limit} tokens ({which})",
            )
        return Condition(tokens, mask, pooled)

    def fingerprint(self) -> str | None:
        if not self.parts:
            return None
        settings = ["sd3", *self.parts, self.max_tokens, self.context_dim, self.config.dtype]
        return fingerprint(settings, [folder for part in self.parts.values() for folder in (part.folder, part.tokens)])

    def drop(self, condition: Condition, rng: Rng, position: Tensor) -> Condition:
        """Zeros in place of each encoder for a part of the samples, `drop` of the config: streams "drop_clip_l", ..."""
        tokens, pooled = condition.tokens, condition.pooled
        for name, p in self.config.drops.items():
            if p == 0:
                continue
            keep = (rng.uniform(f"drop_{name}", position) >= p).to(tokens.device)
            where, features, place = self.places[name]
            hidden = torch.zeros_like(tokens[:1], dtype=torch.bool)
            hidden[:, where, features] = True
            tokens = tokens.masked_fill(hidden & ~keep[:, None, None], 0)
            hidden = torch.zeros_like(pooled[:1], dtype=torch.bool)
            hidden[:, place] = True
            pooled = pooled.masked_fill(hidden & ~keep[:, None], 0)
        return Condition(tokens, condition.mask, pooled)

    def extra_repr(self) -> str:
        return f"{', '.join(self.parts) or 'nothing'}, max_tokens={self.max_tokens}"


def _present(config: SD3TextConfig) -> list[str]:
    """The encoders to use, in their order. Raises UserError for one that is not there."""
    if config.folder is None:
        if config.encoders:
            raise UserError(f"text sd3: encoders = {list(config.encoders)}, but no folder; {HINT}")
        return []
    folder = Path(config.folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"text sd3: {folder} is not there; {HINT}")
    there = [name for name, (weights, _) in FOLDERS.items() if (folder / weights).is_dir()]
    wanted = there if config.encoders is None else [name for name in FOLDERS if name in config.encoders]
    for name in wanted:
        for part in FOLDERS[name]:
            if not (folder / part).is_dir():
                raise UserError(f"text sd3: {folder} has no {part}, which {name} needs; {HINT}")
    if not there:
        raise UserError(f"text sd3: {folder} has no text encoder; {HINT}")
    return wanted


@dataclass(frozen=True)
class _Sizes:
    width: int
    pooled: int
    limit: int  # tokens
    config: dict[str, Any]


def _sizes(config: SD3TextConfig, name: str) -> _Sizes:
    """Of an encoder, by its config.json; where the folder has none, SD3's. Raises UserError for a file that is none."""
    path = None if config.folder is None else Path(config.folder).expanduser() / FOLDERS[name][0] / "config.json"
    if path is None or not path.parent.is_dir():
        if name == "t5":
            return _Sizes(config.width, 0, config.t5_tokens, {})
        return _Sizes(WIDTHS[name], WIDTHS[name], CLIP_TOKENS, {})
    try:
        about = json.loads(path.read_text())
        if name == "t5":
            return _Sizes(about["d_model"], 0, config.t5_tokens, about)
        return _Sizes(about["hidden_size"], about["projection_dim"], about["max_position_embeddings"], about)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"text sd3: {path} is no readable {name}'s ({error})") from error


def _variant(folder: Path) -> str | None:
    """fp16 where the only weights are model.fp16.safetensors, or shards of it."""
    pattern = re.compile(r"model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")
    variants = {found[1] for file in folder.iterdir() if (found := pattern.fullmatch(file.name))}
    return variants.pop() if len(variants) == 1 else None


class Pretrained:
    """One of the three: its states by caption, kept on the disk under what it is."""

    def __init__(self, config: SD3TextConfig, name: str) -> None:
        assert config.folder is not None
        self.name, self.dtype = name, config.dtype
        self.folder, self.tokens = (Path(config.folder).expanduser() / part for part in FOLDERS[name])
        sizes = _sizes(config, name)
        self.limit = sizes.limit
        files = [f for folder in (self.folder, self.tokens) for f in sorted(folder.iterdir())]
        prints = [_print(f) for f in files if f.suffix in READ]
        self.identity = json.dumps(["sd3", name, sizes.config, prints, self.limit, config.dtype], sort_keys=True)
        self._loaded: tuple[Any, Any] | None = None

    def rows(self, prompts: Sequence[str]) -> list[Row]:
        return EmbeddingCache(cache_folder() / "text", self.identity).get(prompts, self._compute)

    def network(self) -> tuple[Any, Any]:
        """The tokenizer and the network, loaded at the first call. Raises UserError where they cannot be."""
        if self._loaded is None:
            from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

            _quiet()
            kind: Any = T5EncoderModel if self.name == "t5" else CLIPTextModelWithProjection
            dtype = "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.tokens)
                network = _load(kind, self.folder, variant=_variant(self.folder), dtype=dtype)
            except Exception as error:
                raise UserError(
                    f"text sd3: {self.folder} cannot be loaded ({' '.join(str(error).split())[:200]})"
                ) from error
            self._loaded = (tokenizer, network)
        return self._loaded

    @torch.no_grad()
    def _compute(self, captions: list[str]) -> list[Row]:
        """Each caption's states, mask, length before it was cut and, of a CLIP, pooled vector.

        No mask reaches T5, which therefore hears its own padding: so SD3 was trained.
        """
        tokenizer, network = self.network()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network.to(device)
        rows: list[Row] = []
        with torch.autocast(device, enabled=False):  # what is kept must not hang on who asked first
            for data, lengths in _tokenised(tokenizer, captions, self.limit):
                ids, mask = data["input_ids"].to(device), data["attention_mask"].bool()
                if self.name == "t5":
                    answers = {"states": network(ids).last_hidden_state}
                else:
                    output = network(ids, output_hidden_states=True)
                    answers = {"states": output.hidden_states[-2], "pooled": output.text_embeds}
                for i, length in enumerate(lengths):
                    row = {"mask": mask[i], "length": torch.tensor(length)} | {k: v[i] for k, v in answers.items()}
                    rows.append({key: value.cpu().clone() for key, value in row.items()})
        network.to("cpu")
        return rows
