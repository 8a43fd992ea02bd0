"""LoRA, through peft: train low-rank updates of some matrices, and leave the model as it is.

Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from genflow.errors import UserError, nearest
from genflow.flows.base import Flow
from genflow.flows.lora import is_factor
from genflow.layers.modulation import Linear


@dataclass(frozen=True)
class LoRA:
    """W + alpha / rank B A in place of W, for every linear layer whose name ends in one of the targets.

    alpha: by default the rank. targets: of an MM-DiT, `qkv.linear` and `proj` are all its attentions; `image_mlp.fc1` and
    its like are its MLPs.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("qkv.linear", "proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank = {self.rank} is too few; try 16")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UserError(f"alpha = {self.alpha} must be positive and finite; try {self.rank}")
        if not self.targets:
            raise UserError("targets is empty; try [qkv.linear, proj]")


def adapted(flow: Flow, network: nn.Module, lora: LoRA) -> None:
    """Freeze a flow and give its network's target layers the factors, in place; its state dict is then the factors alone.

    Raises UserError where peft is not installed, and for a target that is no linear layer of the network.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft opens it where it is there; it has much to say
    try:
        import peft
    except ImportError as error:
        raise UserError("train.lora needs peft; pip install peft") from error

    linears = [name for name, module in network.named_modules() if type(module) in (Linear, nn.Linear)]
    for target in lora.targets:
        if not any(f".{name}".endswith(f".{target}") for name in linears):
            known = {".".join(name.split(".")[-k:]) for name in linears for k in (1, 2, 3)}
            raise UserError(f"train.lora.targets: no linear layer is called {target!r}.{nearest(target, known)}")
    chosen = [name for name in linears if any(f".{name}".endswith(f".{target}") for target in lora.targets)]
    flow.requires_grad_(False)
    alpha: Any = lora.alpha or lora.rank
    config = peft.LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=chosen)
    peft.inject_adapter_in_model(config, network)
    flow.register_state_dict_post_hook(_only_factors)
    flow.register_load_state_dict_post_hook(_rest_not_missing)


def _only_factors(_module: nn.Module, state: dict, _prefix: str, _metadata: dict) -> None:
    for key in [key for key in state if not is_factor(key)]:
        del state[key]


def _rest_not_missing(_module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if is_factor(key)]
