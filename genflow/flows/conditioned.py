"""Flows that hear a condition: what the prompts of any family go through."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from genflow.conditions import Condition
from genflow.errors import UserError
from genflow.flows.base import Batch, Flow
from genflow.layers.whitening import Whitening


class ConditionedFlow(Flow):
    """A network and a text encoder under the verbs of a flow.

    text: a module that turns prepared conditions into embedded ones, with encode(prompts) and null() for prepared ones, and
    drop(condition, rng, position) for what training hides of them (`TextEncoder`). A text encoder that is not trainable
    stays out of the state dict: its name says what it is. whiten: the ridge of a whitening of the pooled vectors, fitted to
    the training captions (layers/whitening.py), or none.
    """

    text: Any

    def __init__(self, network: nn.Module, text: nn.Module, *, shape: Sequence[int], whiten: float | None) -> None:
        super().__init__()
        self.network = network
        self.text = text
        self.shape = tuple(shape)
        self.whitening = None if whiten is None else Whitening(self.text.pooled_dim, whiten)
        if not text.trainable:
            text.requires_grad_(False)
            self.register_state_dict_post_hook(_without_text)
            self.register_load_state_dict_post_hook(_text_not_missing)

    def initialise(self, table: Condition, first: Callable[[], Batch]) -> None:
        """Fit the whitening to the prepared conditions of the training data. Raises UserError where all are alike."""
        if self.whitening is None:
            return
        with torch.no_grad():
            pooled = self.text(table.to(self.device)).pooled
        if not pooled.numel() or bool((pooled == pooled[:1]).all()):
            why = f"the text encoder hears no difference between the {len(pooled)} captions of the training data"
            raise UserError(f"whiten = {self.whitening.ridge}: {why}; leave it out, or let the captions tell more")
        self.whitening.fit(pooled)

    def embed(self, condition: Condition) -> Condition:
        """A prepared condition as the network takes it."""
        condition = self.text(condition)
        if self.whitening is None:
            return condition
        return replace(condition, pooled=self.whitening(condition.pooled))

    def embed_prompts(self, prompts: Sequence[str] | Condition, n: int) -> Condition:
        """The embedded condition of n samples: n rows, or one for all. Raises UserError for numbers that do not fit."""
        check_prompts(prompts, n)
        condition = prompts if isinstance(prompts, Condition) else self.text.encode(list(prompts))
        return self.embed(condition.to(self.device))

    def embed_rows(self, condition: Condition | None, n: int) -> Condition:
        """The embedded condition of n samples, n rows; none is the empty one. Raises UserError for another number."""
        prepared = self.text.null() if condition is None else condition
        if not isinstance(prepared, Condition):
            kind = type(prepared).__name__
            raise UserError(f"the condition is a {kind}, not prepared; flow.text.encode(prompts) makes one of prompts")
        if len(prepared) not in (1, n):
            raise UserError(f"{len(prepared)} conditions for {n} pictures; give one condition, or one for each picture")
        embedded = self.embed(prepared.to(self.device))
        return embedded if len(embedded) == n else embedded.expand(n)


def check_hearing(drop_condition: float, whiten: float | None = None) -> None:
    """Raises UserError for what a config says of conditions and cannot be."""
    if not 0 <= drop_condition <= 1:
        near = float(drop_condition > 1)
        raise UserError(f"drop_condition = {drop_condition} is not within 0 .. 1; try {near}")
    if whiten is not None and not 0 < whiten < math.inf:
        raise UserError(f"whiten = {whiten} must be positive, such as 0.1, or none")


def check_prompts(prompts: Sequence[str] | Condition, n: int) -> None:
    """Raises UserError for prompts that are not of n samples."""
    if isinstance(prompts, str):
        raise UserError("prompts must be a list of strings, such as ['a red apple'], not one string")
    if not isinstance(prompts, Condition) and (other := [p for p in prompts if not isinstance(p, str)]):
        raise UserError(f"prompts must be strings, such as 'a red apple' or '3', not {other[0]!r}")
    if n == 0:
        raise UserError("no seeds are given, so there is nothing to sample; give one seed for each picture")
    if len(prompts) not in (1, n):
        raise UserError(f"{len(prompts)} prompts for {n} seeds; give one prompt, or one for each seed")


def _without_text(_module: nn.Module, state: dict, prefix: str, _metadata: dict) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}text.")]:
        del state[key]


def _text_not_missing(module: Any, incompatible: Any) -> None:
    own = tuple(f".text.{name}" for name in module.text.state_dict())  # behind the names of the modules around this one
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not f".{key}".endswith(own)]
