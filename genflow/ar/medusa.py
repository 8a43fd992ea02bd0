"""Medusa: heads fitted to a trained, frozen token model, that guess the tokens after the next one for its decoders.

Cai et al. 2024 (arXiv 2401.10774), Medusa-1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genflow.ar.decoders import Speculative
from genflow.ar.drafts import HeadsDraft
from genflow.ar.flow import DecodeConfig, TokenFlow, TokenSolution
from genflow.ar.guess import Draft
from genflow.ar.reader import TransformerReader
from genflow.conditions import Condition
from genflow.config import Choice, from_dict
from genflow.errors import UserError
from genflow.flows.base import Batch, Flow, LossOutput, evaluating
from genflow.flows.store import load
from genflow.functional import Rng
from genflow.networks.identity import identity
from genflow.networks.token_transformer import MedusaHeads
from genflow.registry import api_export, flow_export
from genflow.text.base import same_text

DECAY = 0.8  # of the heads' weights, one head to the next (arXiv 2401.10774, sec. 2.2.1)


@dataclass(frozen=True)
class HeadsDecodeConfig(DecodeConfig):
    """By decoding tokens, with the guesses of the heads."""

    decoder: Annotated[Any, Choice("decoder")] = field(default_factory=Speculative)


@flow_export("medusa")
@dataclass(frozen=True)
class MedusaFlowConfig:
    """Heads for a trained token model, which stays as it is. base: its run, checkpoint or model folder.

    The run needs the base's own text, and pictures of its shape.
    """

    sampling: ClassVar[type] = HeadsDecodeConfig

    base: str

    def fits(self, shape: Sequence[int]) -> dict[str, Any]:
        """What the heads have to be like. Raises UserError for a base that is no token model."""
        network = _base(self.base).network
        return {"vocabulary": network.vocabulary, "width": network.config.width}

    def build(self, network: nn.Module, text: nn.Module, *, shape: Sequence[int]) -> MedusaFlow:
        """Raises UserError for a network of no heads, and for what is not the base's own."""
        base = _base(self.base)
        if not isinstance(network, MedusaHeads):
            raise UserError(f"flow medusa: {type(network).__name__} has no heads; take model medusa_heads")
        if not same_text(text, base.text):
            own = (base.recipe or {}).get("text")
            raise UserError(f"flow medusa: the base {self.base} hears another text; take its own, text: {own}")
        if tuple(shape) != base.shape:
            raise UserError(f"flow medusa: pictures are {tuple(shape)}, and those of {self.base} {base.shape}")
        if (heads := len(network.inner)) >= (tokens := math.prod(base.grid)):
            raise UserError(f"flow medusa: {heads} heads on pictures of {tokens} tokens; the most is {tokens - 1}")
        return MedusaFlow(self, network, base)


def _base(path: str) -> TokenFlow:
    flow = load(path)
    if not isinstance(flow, TokenFlow):
        raise UserError(f"flow medusa: {path} is a {type(flow).__name__}; the base must be a model of tokens")
    return flow


@api_export("MedusaFlow")
class MedusaFlow(Flow):
    """Heads on a frozen model of tokens. It samples as its base does, the heads guessing; the density is the base's.

    Its state holds the heads and what the base was (`identity`), not the base.
    """

    unit = TokenFlow.unit
    no_density, no_inverse = TokenFlow.no_density, TokenFlow.no_inverse
    base_identity: Tensor
    base: TokenFlow
    network: MedusaHeads

    def __init__(self, config: MedusaFlowConfig, network: MedusaHeads, base: TokenFlow) -> None:
        super().__init__()
        self.config, self.network, self.shape = config, network, base.shape
        self.base = base.requires_grad_(False).eval()
        self.register_buffer("base_identity", _bytes(identity(base)))
        with torch.no_grad():
            for layer in cast(Iterable[nn.Linear], network.outer):
                layer.weight.copy_(base.network.head.weight)
        self.register_state_dict_post_hook(_without_base)
        self.register_load_state_dict_pre_hook(_same_base)
        self.register_load_state_dict_post_hook(_base_not_missing)

    @property
    def text(self) -> Any:
        return self.base.text

    def train(self, mode: bool = True) -> MedusaFlow:
        super().train(mode)
        self.base.eval()
        return self

    def loss(self, batch: Batch, rng: Rng) -> LossOutput:
        """sum_k 0.8^k CE of head k, nats of the token k after the next (sec. 2.2.1). Draws as the base's loss."""
        each = self._nats(batch, self.base.heard(batch, rng))
        parts = {f"head{k}": nats.mean(1).mean() for k, nats in enumerate(each, start=1)}
        weights = torch.tensor([DECAY**k for k in range(1, len(each) + 1)], device=self.device)
        loss = (weights * torch.stack(list(parts.values()))).sum()
        return LossOutput(loss, {name: part.detach() for name, part in parts.items()}, each[0].mean(1).detach())

    def _nats(self, batch: Batch, condition: Condition) -> list[Tensor]:
        """-log p of each head's tokens: B x n - 1, B x n - 2, ... condition: embedded."""
        with torch.no_grad():
            tokens = self.base.to_tokens(batch.x)
            h, _ = self.base.network.hidden(tokens, condition.tokens, condition.mask)
            h = self.base.network.norm(h.to(self.base.network.norm.weight.dtype))
        logits = self.network(h).unbind(-2)
        return [
            F.cross_entropy(a[:, :-k].transpose(1, 2), tokens[:, k:], reduction="none")
            for k, a in enumerate(logits, start=1)
        ]

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Nats a token, the mean over the heads, and of each."""
        with evaluating(self):
            each = [nats.mean() for nats in self._nats(batch, self.base.embed(batch.condition))]
        return {
            "validation_loss": torch.stack(each).mean(),
            **{f"validation_head{k}": nats for k, nats in enumerate(each, start=1)},
        }

    def log_prob(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        return self.base.log_prob(x, condition)

    def likelihood_note(self, k: int, **how: Any) -> str:
        return self.base.likelihood_note(k, **how)

    def sample(
        self, prompts: Sequence[str] | Condition, *, seeds: Sequence[int], draft: Flow | str | None = None, **how: Any
    ) -> TokenSolution:
        """As the base's (`TokenFlow.sample`). draft: "medusa" is these heads, and so is none where the decoder needs one."""
        decoder = from_dict(HeadsDecodeConfig, {"decoder": how.pop("decoder", "speculative")}, where="sample").decoder
        # Unless told otherwise, as many as the heads can guess; a run's own settings spell the default out.
        if decoder == Speculative() and draft in (None, "medusa"):
            decoder = Speculative(min(decoder.window, len(self.network.inner)))
        if draft == "medusa" or (draft is None and decoder.needs_draft):
            draft = self
        return self.base.sample(prompts, seeds=seeds, decoder=decoder, draft=draft, **how)

    def guesses_for(self, target: TokenFlow, reader: TransformerReader, prompts: Sequence[str] | Condition) -> Draft:
        """The heads as the draft of their base. Raises UserError for another model."""
        its, mine = identity(target), _hexadecimal(self.base_identity)
        if its != mine:
            raise UserError(f"the heads were fitted to model {mine[:12]}, and this is {its[:12]}; fit heads to it")
        norm = target.network.norm
        return HeadsDraft(reader, lambda h: self.network(norm(h.to(norm.weight.dtype))), len(self.network.inner))


def _bytes(identity: str) -> Tensor:
    """As checkpoints hold it: 32 uint8."""
    return torch.tensor(list(bytes.fromhex(identity)), dtype=torch.uint8)


def _hexadecimal(identity: Tensor) -> str:
    return bytes(identity.tolist()).hex()


def _without_base(_module: nn.Module, state: dict, prefix: str, _metadata: dict) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}base.")]:
        del state[key]


def _base_not_missing(_module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith("base.")]


def _same_base(module: MedusaFlow, state: dict, prefix: str, *_: Any) -> None:
    """Raises UserError where the base is not the one that the saved heads were fitted to."""
    saved = state.get(f"{prefix}base_identity")
    if saved is not None and not torch.equal(saved.cpu(), now := module.base_identity.cpu()):
        where = f"{module.config.base} is now {_hexadecimal(now)[:12]}"
        raise UserError(
            f"the heads were fitted to model {_hexadecimal(saved)[:12]}, and {where}; name that one, or fit heads anew"
        )
