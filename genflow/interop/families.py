"""Whose weights a file holds, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The first pattern that some name matches says which; the narrower before the wider.
FAMILIES = (
    ("a LoRA file, of changes to another model's weights", r"lora_|\.lora[._]|hada_w1|lokr_w1|\.oft_|dora_scale"),
    ("weights quantised by bitsandbytes", r"\.(absmax|quant_map|nested_absmax|quant_state\.)"),
    ("a ControlNet", r"^(controlnet_|control_model\.|input_hint_block\.|controlnet_cond_embedding)"),
    ("FLUX.2", r"(^|\.)(single_stream_modulation|double_stream_modulation_img)\."),
    ("Chroma", r"(^|\.)distilled_guidance_layer\."),
    ("FLUX.1", r"(^|\.)(double_blocks\.\d+\.img_attn|single_blocks\.\d+\.linear1|single_transformer_blocks\.)"),
    ("HunyuanVideo", r"(^|\.)(txt_in\.individual_token_refiner|context_embedder\.token_refiner)"),
    ("Qwen-Image", r"(^|\.)(txt_norm\.|transformer_blocks\.\d+\.img_mod\.)"),
    ("AuraFlow", r"(^|\.)(double_layers|joint_transformer_blocks|single_layers)\.\d+\."),
    ("Lumina", r"(^|\.)(cap_embedder|context_refiner|noise_refiner)\."),
    ("Sana", r"(^|\.)(blocks\.\d+\.cross_attn\.q_linear\.|caption_norm\.|transformer_blocks\.\d+\.ff\.conv_inverted)"),
    ("PixArt", r"(^|\.)(adaln_single\.|t_block\.1\.|y_embedder\.y_proj\.)"),
    ("LTX-Video", r"(^|\.)(patchify_proj\.|scale_shift_table$)"),
    ("Wan", r"(^|\.)(head\.modulation$|condition_embedder\.)"),
    ("a DiT or SiT of ImageNet classes", r"(^|\.)y_embedder\.embedding_table\."),
    ("a Stable Diffusion XL UNet", r"^(conditioner\.embedders\.|add_embedding\.)|(^|\.)label_emb\.0\.0\."),
    ("a Stable Diffusion 2 UNet", r"^cond_stage_model\.model\."),
    ("a Stable Diffusion 1 UNet", r"^cond_stage_model\.transformer\."),
    ("a Stable Diffusion UNet", r"(^|\.)input_blocks\.\d+\.|^(down|up)_blocks\.\d+\.(attentions|resnets)\."),
    ("an autoencoder alone", r"(^|\.)(encoder\.down|decoder\.up)(_blocks)?\.\d+\."),
    (
        "a text encoder alone",
        r"(^|\.)(text_model\.|encoder\.block\.\d+\.layer\.|transformer\.resblocks\.|shared\.weight$)",
    ),
    ("a language model", r"^model\.(layers\.\d+|embed_tokens)\."),
)


def looks_like(names: Iterable[str]) -> str:
    """What the tensors of these names seem to be of, as the end of an error."""
    names = list(names)
    for family, pattern in FAMILIES:
        if found := next((name for name in names if re.search(pattern, name)), None):
            return f"it looks like {family} ({found})"
    return f"what it is, its names do not tell ({min(names)})" if names else "it holds no tensor at all"
