"""A tiny Stable Diffusion 3 pipeline of random weights, made without a network, with all that a real one has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = ["red", "dog", "apple", "a", "of", "photo", "cat", "green"]


def transformer(**changes: Any) -> Any:
    """Random; plain by default. qk_norm="rms_norm" and dual_attention_layers make it SD3.5-medium's."""
    from diffusers import SD3Transformer2DModel

    sizes = {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2, "caption_projection_dim": 128}
    sizes |= {"joint_attention_dim": 48, "pooled_projection_dim": 36, "in_channels": 16, "out_channels": 16}
    sizes |= {"sample_size": 8, "patch_size": 2, "pos_embed_max_size": 6}
    return randomised(SD3Transformer2DModel(**{**sizes, **changes}))


def vae() -> Any:
    from diffusers import AutoencoderKL

    module = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    return randomised(module, 0.1)


def clip(hidden: int, eos: int, act: str) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=eos + 1,
        hidden_size=hidden,
        projection_dim=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=12,
        hidden_act=act,
        bos_token_id=eos - 1,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return randomised(CLIPTextModelWithProjection(config), 0.2)


def t5(vocab: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 48, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    return randomised(T5EncoderModel(T5Config(vocab_size=vocab, tie_word_embeddings=False, **sizes)), 0.2)


def clip_tokenizer(pad: str) -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=12, pad_token=pad)


def t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0, model_max_length=512
    )


def randomised(module: Any, std: float = 0.08) -> Any:
    """Weights that make every path count: the zeros of adaLN-zero would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + (p.ndim == 1) * 0.3)
    return module.eval()


def pipeline(**changes: Any) -> Any:
    """A StableDiffusion3Pipeline, its transformer with changes."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    large, other, pieces = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!"), t5_tokenizer()
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer(**changes),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(16, len(large) - 1, "quick_gelu"),
        text_encoder_2=clip(20, len(other) - 1, "gelu"),
        text_encoder_3=t5(len(pieces)),
        tokenizer=large,
        tokenizer_2=other,
        tokenizer_3=pieces,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stability_file(pipe: Any, path: Path, *, dtype: torch.dtype = torch.float32, encoders: bool = True) -> Path:
    """The pipeline's weights under Stability's names, written out by hand and not by what is tested."""
    from safetensors.torch import save_file

    state = {f"model.diffusion_model.{k}": v for k, v in stability_names(pipe.transformer.state_dict()).items()}
    levels = len(pipe.vae.config.block_out_channels)
    for name, value in pipe.vae.state_dict().items():
        for ours, theirs in {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}.items():
            name = name.replace(ours, theirs)
        for i in range(levels):
            name = name.replace(f"down_blocks.{i}.resnets", f"down.{i}.block")
            name = name.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
            name = name.replace(f"up_blocks.{i}.resnets", f"up.{levels - 1 - i}.block")
            name = name.replace(f"up_blocks.{i}.upsamplers.0", f"up.{levels - 1 - i}.upsample")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        if "attentions" in name:
            name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out").replace("to_", "")
            value = value[:, :, None, None] if value.ndim == 2 else value
        state[f"first_stage_model.{name}"] = value
    folders = {"clip_l": pipe.text_encoder, "clip_g": pipe.text_encoder_2, "t5xxl": pipe.text_encoder_3}
    for name, module in folders.items() if encoders else ():
        own = {k: v for k, v in module.state_dict().items() if k != "encoder.embed_tokens.weight"}  # tied to `shared`
        state |= {f"text_encoders.{name}.transformer.{k}": v for k, v in own.items()}
    save_file({k: v.to(dtype).clone() for k, v in state.items()}, path, metadata={"format": "pt"})
    return path


def stability_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' transformer to Stability's names, from the table of the reference's layer names."""
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks"))
    outer = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }
    result = {"pos_embed": state["pos_embed.pos_embed"]}
    for kind in ("weight", "bias"):
        result |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for ours, theirs in outer.items()}
        scale, shift = state[f"norm_out.linear.{kind}"].chunk(2)
        result[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    for i in range(depth):
        ours, theirs = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        for stream, q, out, norm, mlp, ln in (
            ("x_block", "attn.to_{}", "attn.to_out.0", "norm1", "ff", "attn.norm_{}"),
            (
                "context_block",
                "attn.add_{}_proj",
                "attn.to_add_out",
                "norm1_context",
                "ff_context",
                "attn.norm_added_{}",
            ),
            ("x_block", "attn2.to_{}", "attn2.to_out.0", None, None, "attn2.norm_{}"),
        ):
            attn = "attn" if norm else "attn2"
            for letter in "qk":
                if (w := state.get(f"{ours}{ln.format(letter)}.weight")) is not None:
                    result[f"{theirs}{stream}.{attn}.ln_{letter}.weight"] = w
            for kind in ("weight", "bias"):
                parts = [state.get(f"{ours}{q.format(letter)}.{kind}") for letter in "qkv"]
                if parts[0] is not None:
                    result[f"{theirs}{stream}.{attn}.qkv.{kind}"] = torch.cat(parts)
                if norm is None:
                    names = {out: f"{attn}.proj"}
                else:
                    w = state[f"{ours}{norm}.linear.{kind}"]
                    if stream == "context_block" and i == depth - 1:
                        w = torch.cat(w.chunk(2)[::-1])
                    result[f"{theirs}{stream}.adaLN_modulation.1.{kind}"] = w
                    names = {out: f"{attn}.proj", f"{mlp}.net.0.proj": "mlp.fc1", f"{mlp}.net.2": "mlp.fc2"}
                for a, b in names.items():
                    if (w := state.get(f"{ours}{a}.{kind}")) is not None:
                        result[f"{theirs}{stream}.{b}.{kind}"] = w
    return result
