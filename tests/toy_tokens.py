"""A tokenizer without training, a tiny model of its tokens, and runs of it, for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import genflow.ar.flow
import genflow.ar.medusa
from genflow.data.emoji import EmojiConfig
from genflow.flows.tokenizer import Tokenizer
from genflow.networks.token_transformer import TokenTransformerConfig
from genflow.registry import genflow_export
from genflow.text.trained import LabelsConfig, LearnedTextConfig
from genflow.training.config import RunConfig, TrainConfig
from genflow.training.optimizers import AdamWConfig

CLASSES = ("dark", "light", "mixed")


@genflow_export("toy_grey", kind="tokenizer")
@dataclass(frozen=True)
class GreyConfig:
    """The mean grey of each patch, in so many levels."""

    levels: int = 6
    factor: int = 2
    channels: int = 3

    def build(self):
        return Grey(self)


class Grey(Tokenizer):
    def __init__(self, config):
        super().__init__()
        self.picture_channels, self.factor, self.vocabulary = config.channels, config.factor, config.levels
        self.register_buffer("centres", torch.linspace(-0.9, 0.9, config.levels))

    def encode(self, x):
        mean = F.avg_pool2d(x.mean(1, keepdim=True), self.factor)[:, 0]
        return (mean[..., None] - self.centres).abs().argmin(-1)

    def decode(self, codes):
        grey = self.centres[codes][:, None].expand(-1, self.picture_channels, -1, -1)
        return F.interpolate(grey, scale_factor=float(self.factor))


def model(seed=0, *, grid=(3, 4), tokenizer=None, text=None, noise=0.3, **network):
    """A token flow of 6 x 8 pictures, by class, with random weights."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or GreyConfig()
    text = (text or LabelsConfig(CLASSES, dim=5)).build()
    config = TokenTransformerConfig(
        vocabulary=tokenizer.levels, grid=grid, **{"width": 32, "layers": 2, "heads": 2, **network}, context_dim=5
    )
    shape = (3, grid[0] * tokenizer.factor, grid[1] * tokenizer.factor)
    flow = genflow.ar.flow.TokenFlowConfig(tokenizer).build(config.build(), text, shape=shape).double().eval()
    flow.tokenizer.float()
    with torch.no_grad():
        for p in flow.parameters():
            if p.requires_grad:
                p.add_(noise * torch.randn_like(p))
    return flow


def run_config(out, *, flow=None, model=None, text=None, size=8, steps=3, **train):
    """A run on embedded emoji of so many pixels."""
    return RunConfig(
        data=EmojiConfig(size=size, styles=("noto",), limit=24),
        model=model or TokenTransformerConfig(width=32, layers=1, heads=2, mtp=1),
        text=text or LearnedTextConfig(dim=16, layers=1, heads=2, max_tokens=6),
        flow=flow or genflow.ar.flow.TokenFlowConfig(GreyConfig()),
        train=TrainConfig(
            steps=steps,
            batch_size=8,
            precision="fp32",
            trackers=(),
            save_every=steps,
            optimizer=AdamWConfig(1e-2),
            **train,
        ),
        out=str(out),
    )
