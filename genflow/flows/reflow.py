"""Reflow: a flow's own pairs of noise and sample, on which the next flow learns straighter paths; and how straight they are.

Liu et al. 2022 (arXiv 2209.03003): the next rectified flow, trained on the pairs (Z_1, Z_0) of the present one, has paths
that cross less, and few steps follow them. The same pairs at t = 1 alone distil the flow into one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from genflow.errors import UserError
from genflow.flows.conditioned import check_prompts
from genflow.flows.couplings import Paired
from genflow.flows.paths import CosinePath, LinearPath
from genflow.flows.prepared import draws_noise
from genflow.flows.rectified import RectifiedFlow, RectifiedFlowConfig
from genflow.functional import noise_from_seeds
from genflow.registry import api_export, density_export
from genflow.samplers import Trajectory


@density_export("one_step")
@dataclass(frozen=True)
class OneStep:
    """Always t = 1, where one step has to do it all: the times of a one-step distillation."""

    def __call__(self, u: Tensor) -> Tensor:
        return torch.ones_like(u)

    def pdf(self, t: Tensor) -> Tensor:
        return torch.where(t == 1, torch.inf, torch.zeros_like(t))

    def cdf(self, t: Tensor) -> Tensor:
        return (t >= 1).to(t.dtype)


@api_export("draw_pairs")
def draw_pairs(
    flow: RectifiedFlow,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch: int = 64,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """The noise of each seed and what the flow makes of it: two of B x *shape, float32, on the CPU.

    settings: of `flow.sample`. A pair hangs on its prompt, its seed and the settings, not on the batch. Raises UserError for
    another flow, such as one of latents, whose noise is not of pictures, for a sampler that draws noise of its own, whose
    samples do not belong to their noise, and for prompts that do not fit.
    """
    if not isinstance(flow, RectifiedFlow):
        raise UserError(f"draw_pairs: only a rectified flow can be reflowed, and this is a {type(flow).__name__}")
    check_pairing(settings.get("sampler", "heun"))
    check_prompts(prompts, len(seeds))
    prompts = list(prompts) * (len(seeds) if len(prompts) == 1 else 1)
    made = [
        flow.sample(prompts[i : i + batch], seeds=seeds[i : i + batch], **settings).x.cpu()
        for i in range(0, len(seeds), batch)
    ]
    return noise_from_seeds(seeds, made[0].shape[1:]), torch.cat(made)


def check_pairing(sampler: str) -> None:
    """Raises UserError for a sampler that draws noise on the way."""
    if draws_noise(sampler):
        raise UserError(f"sampler {sampler!r} draws noise on the way, so it pairs none; choose one such as 'heun'")


@api_export("straightness")
def straightness(trajectory: Trajectory) -> Tensor:
    """S of each row of a solve, B: the mean over time of |Z_1 - Z_0 - dZ/dt|^2 (arXiv 2209.03003, eq. 5), per coordinate.

    0 where every path is straight at constant speed, so that one step is exact. By the differences of the recorded states:
    the more steps, the nearer to the integral, from below.
    """
    times, states = trajectory.times, trajectory.states
    whole = times[-1] - times[0]
    chord = (states[-1] - states[0]) / whole
    total = torch.zeros(len(chord), dtype=chord.dtype, device=chord.device)
    for (t, t_next), (z, z_next) in zip(pairwise(times), pairwise(states), strict=True):
        error = (z_next - z) / (t_next - t) - chord
        total += (t_next - t) / whole * error.unsqueeze(-1).flatten(1).square().mean(1)
    return total


def reflow_config(config: RectifiedFlowConfig, *, distill: bool = False) -> RectifiedFlowConfig:
    """How the next flow is trained on the pairs of one trained as `config` says.

    Guidance is in the pairs, so that no condition is dropped. Every affine path leads to the same straight one, so that the
    path may stay. distill: at t = 1 alone; raises UserError where the network says nothing of the sample there.
    """
    if not distill:
        return replace(config, coupling=Paired(), drop_condition=0.0)
    if config.prediction == "eps":
        raise UserError("a network that predicts the noise knows nothing of the sample at t = 1; distil one of v or x")
    if not isinstance(config.path, LinearPath | CosinePath):
        name = type(config.path).__name__
        raise UserError(f"{name}: its velocity tells little at t = 1; distil a flow on the path linear or cosine")
    return replace(config, coupling=Paired(), drop_condition=0.0, density=OneStep())
