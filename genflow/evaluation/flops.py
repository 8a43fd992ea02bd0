"""How many floating-point operations a network's definition asks for: a product and its addition are two.

These are the model's operations, whatever an implementation saves or does twice (a backward that computes the forward
again, a modulation kept for a step), so that operations / seconds / peak, the MFU (Chowdhery et al. 2022, arXiv
2204.02311, app. B), compares implementations of the same work. Only matrix products count.
"""

from __future__ import annotations

from genflow.networks.mmdit import MMDiTConfig

TIME_FEATURES = 256  # of an MM-DiT


def mmdit_flops(config: MMDiTConfig, image: int, text: int) -> int:
    """Of one forward of an MM-DiT on one sample of `image` patches and `text` tokens.

    A linear of n inputs and m outputs costs 2 n m for every token that goes through it. Per block, with h = hidden and
    the MLP r h wide, a stream's token meets q, k, v (3 h^2), the projection (h^2) and the MLP (2 r h^2): 2 h^2 (4 + 2 r).
    The last block's context is only asked for q, k, v (context_pre_only). Attention over N = image + text tokens is q k^T
    and P v, each 2 N^2 h for all heads together. A modulation, h to n h, is paid once per sample and not per token: n is
    6 for a stream, 9 where the picture attends to itself once more (dual), 2 for the last context. Around the blocks: the
    patches, the context, the embeddings of time and of the pooled text (once per sample), the last modulation and linear.
    """
    h, r, n = config.sizes[0], config.mlp_ratio, image + text
    flops = _first(config, image, text) + 2 * (2 * h * h)  # and the second linears of both embeddings
    for i in range(config.depth):
        last, dual = i == config.depth - 1, i in config.dual_attention_layers
        flops += 2 * image * h * h * (4 + 2 * r) + 2 * text * h * h * (3 if last else 4 + 2 * r)
        flops += 4 * n * n * h
        flops += 2 * h * h * ((9 if dual else 6) + (2 if last else 6))
        if dual:
            flops += 2 * image * h * h * 4 + 4 * image * image * h
    return flops + 2 * h * 2 * h + 2 * image * h * _patch(config)


def mmdit_training_flops(config: MMDiTConfig, image: int, text: int) -> int:
    """Of a forward and its backward: three times the forward, for the gradient of a product is two products.

    The linears that meet the inputs need no gradient of these: of them one product is saved.
    """
    return 3 * mmdit_flops(config, image, text) - _first(config, image, text)


def attention_flops(pairs: int, heads: int, head_dim: int, *, backward: bool = False) -> int:
    """Of softmax(q k^T) v over `pairs` pairs of a query and a key it sees, in each head: two products, in the backward four.

    A fused backward also makes q k^T again, which does not count.
    """
    return (6 if backward else 2) * 2 * pairs * heads * head_dim


def _first(config: MMDiTConfig, image: int, text: int) -> int:
    """The linears that meet the inputs: patches, context, features of time, pooled text."""
    assert config.context_dim is not None and config.pooled_dim is not None
    return (
        2 * config.sizes[0] * (image * _patch(config) + text * config.context_dim + TIME_FEATURES + config.pooled_dim)
    )


def _patch(config: MMDiTConfig) -> int:
    """Numbers in a patch."""
    assert config.in_channels is not None
    return config.in_channels * config.patch_size**2
