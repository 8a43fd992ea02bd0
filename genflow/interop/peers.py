"""The libraries that genflow bench times itself against: what each has a counterpart of, how it is built and called."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from genflow.conditions import Condition
from genflow.errors import UserError, nearest
from genflow.interop.diffusers import to_diffusers
from genflow.networks.mmdit import MMDiT

PEERS = {"train": ("diffusers",), "sample": ("diffusers",), "glow": ("normflows",), "nsf": ("zuko",)}


def check_peer(peer: str, works: Sequence[str]) -> list[str]:
    """Which of these works (keys of PEERS) the peer has a counterpart of.

    Raises UserError where it has of none, and where it is not installed.
    """
    if not (found := [work for work in works if peer in PEERS[work]]):
        known = {name for work in works for name in PEERS[work]}
        raise UserError(
            f"--against {peer}: no counterpart of {' or '.join(works)} is known there.{nearest(peer, known)}"
        )
    try:
        importlib.import_module(peer)
    except ImportError as error:
        raise UserError(f"--against {peer}: it cannot be imported ({error}); pip install {peer}") from error
    return found


def diffusers_velocity(network: MMDiT, *, checkpointing: bool = False) -> tuple[Any, Callable[..., Tensor]]:
    """An SD3Transformer2DModel with copies of the network's weights, and the call network(x, t, context, pooled) of it."""
    module = to_diffusers(network)
    if checkpointing:
        module.enable_gradient_checkpointing()

    def velocity(x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return module(x, context, pooled, 1000 * t, return_dict=False)[0]

    return module, velocity


def diffusers_sampler(
    module: Any, times: Sequence[float], guidance: float
) -> Callable[[Tensor, Condition, Condition], Tensor]:
    """StableDiffusion3Pipeline from noise to latents: sampler(noise, condition, null), by Euler's method on these times.

    module: an SD3Transformer2DModel. The pipeline has neither text encoders nor a VAE: conditions are given, latents wanted.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    absent = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    parts: dict[str, Any] = dict.fromkeys(absent)
    pipeline: Any = StableDiffusion3Pipeline(transformer=module, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipeline.set_progress_bar_config(disable=True)

    def sample(noise: Tensor, condition: Condition, null: Condition) -> Tensor:
        return pipeline(
            prompt_embeds=condition.tokens,
            pooled_prompt_embeds=condition.pooled,
            negative_prompt_embeds=null.tokens,
            negative_pooled_prompt_embeds=null.pooled,
            latents=noise,
            sigmas=list(times[:-1]),
            num_inference_steps=len(times) - 1,
            guidance_scale=guidance,
            output_type="latent",
            return_dict=False,
        )[0]

    return sample


def normflows_glow(shape: Sequence[int], levels: int, steps: int, hidden: int) -> nn.Module:
    """normflows' Glow as its own example builds it, the parameters of its priors fixed; its levels count from the noise.

    forward_kld(x) is the loss; log_prob(x, None) and sample(n) as they say. shape: channels, height, width.
    """
    import normflows as nf

    warnings.filterwarnings("ignore", message="torch.lu is deprecated")  # its own affair

    channels, height, width = shape
    bases, flows = [], []
    for i in range(levels):
        inside = channels * 2 ** (levels + 1 - i)
        blocks = [nf.flows.GlowBlock(inside, hidden, split_mode="channel", scale=True) for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        latent = (inside // 2 if i else inside, height // 2 ** (levels - i), width // 2 ** (levels - i))
        bases.append(nf.distributions.DiagGaussian(latent, trainable=False))
    return nf.MultiscaleFlow(bases, flows, [nf.flows.Merge() for _ in range(levels - 1)], class_cond=False)


def zuko_nsf(features: int, steps: int, hidden: int, bins: int) -> nn.Module:
    """zuko's neural spline flow of couplings; called, it is a distribution with log_prob and sample."""
    import zuko

    return zuko.flows.NSF(features, transforms=steps, hidden_features=(hidden, hidden), passes=2, bins=bins)


def masked_parameters(module: nn.Module) -> int:
    """How many of a zuko flow's parameters its masks put out."""
    return sum(int((~mask).sum()) for name, mask in module.named_buffers() if name.endswith("mask"))
