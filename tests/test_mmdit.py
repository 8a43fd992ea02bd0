"""MM-DiT against diffusers, against published sizes, and against its own promises."""

from __future__ import annotations

import pytest
import torch

from genflow.errors import UserError
from genflow.interop.diffusers import from_diffusers, state_from_diffusers, state_to_diffusers, to_diffusers
from genflow.layers.embeddings import patchify, sincos_2d, sinusoidal, unpatchify
from genflow.networks.mmdit import MMDiTConfig

SMALL = {"in_channels": 4, "patch_size": 2, "context_dim": 24, "pooled_dim": 20, "sample_size": 4}
SD3 = {"patch_size": 2, "in_channels": 16, "context_dim": 4096, "pooled_dim": 2048, "sample_size": 64}


def inputs(dtype: torch.dtype, *, height: int = 8, width: int = 8, batch: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, height, width, generator=generator, dtype=dtype)
    context = torch.randn(batch, 5, 24, generator=generator, dtype=dtype)
    pooled = torch.randn(batch, 20, generator=generator, dtype=dtype)
    return x, torch.linspace(0.1, 0.9, batch, dtype=dtype), context, pooled


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that make every path count: the zeros of adaLN-zero would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.08 + (p.ndim == 1) * 0.3)
    return model


@pytest.mark.parametrize(
    ("depth", "extra", "millions"),
    [
        (24, {"qk_norm": False}, 2028.3),
        (24, {"qk_norm": True, "dual_attention_layers": tuple(range(13))}, 2243.2),
        (38, {"qk_norm": True}, 8056.6),
        (15, {"qk_norm": False}, 496),
        (18, {"qk_norm": False}, 856),
        (30, {"qk_norm": False}, 3962),
        (6, {"qk_norm": True}, 33.1),
        (2, {"qk_norm": True}, 1.88),
    ],
)
def test_parameter_counts_of_the_sd3_family(depth, extra, millions):
    with torch.device("meta"):
        model = MMDiTConfig(depth=depth, **SD3, **extra).build()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    digits = len(str(millions).partition(".")[2])
    assert round(count, digits) == millions


VARIANTS = {
    "plain": {"qk_norm": None},
    "qk-norm": {"qk_norm": "rms_norm"},
    "dual": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}


def diffusers_model(dtype: torch.dtype, **extra: object) -> torch.nn.Module:
    from diffusers import SD3Transformer2DModel

    module = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=24,
        caption_projection_dim=24,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
        **extra,
    )
    return randomised(module).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("size", [(8, 8), (6, 12)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients_equal_diffusers(variant, size, dtype, tolerance, monkeypatch):
    if dtype == torch.float64:  # diffusers takes the variance in float32 even then, which alone costs 5e-10
        exact = lambda self, x: torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        monkeypatch.setattr("diffusers.models.normalization.RMSNorm.forward", exact)
    theirs = diffusers_model(dtype, **VARIANTS[variant])
    ours = from_diffusers(theirs)
    x, t, context, pooled = inputs(dtype, height=size[0], width=size[1])
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = theirs(x1, context, pooled, t * 1000, return_dict=False)[0]
    got = ours(x2, t, context, pooled)
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= tolerance * scale
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    (expected * weights).mean().backward()
    (got * weights).mean().backward()
    assert (x1.grad - x2.grad).abs().max() <= tolerance * x1.grad.abs().max()
    gradients = state_from_diffusers(
        {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in theirs.named_parameters()}
        | {"pos_embed.pos_embed": theirs.pos_embed.pos_embed},
        ours.config,
    )
    largest = max(g.abs().max() for g in gradients.values())
    for name, p in ours.named_parameters():
        assert (p.grad - gradients[name]).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips_are_bit_equal(variant):
    theirs = diffusers_model(torch.float32, **VARIANTS[variant])
    ours = from_diffusers(theirs)
    back = to_diffusers(ours).state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())
    again = state_from_diffusers(state_to_diffusers(ours.state_dict(), ours.config), ours.config)
    assert again.keys() == ours.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in ours.state_dict().items())


def test_own_model_reaches_diffusers_with_the_paper_s_positions():
    ours = randomised(MMDiTConfig(depth=2, hidden=24, heads=3, **SMALL).build())
    x, t, context, pooled = inputs(torch.float32)
    expected = ours(x, t, context, pooled)
    theirs = to_diffusers(ours)
    got = theirs(x, context, pooled, t * 1000, return_dict=False)[0]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert from_diffusers(theirs).position_table is None  # recognised as the formula's


def test_a_kept_position_table_survives_a_state_dict():
    ours = from_diffusers(diffusers_model(torch.float32, **VARIANTS["plain"]))
    fresh = ours.config.build()
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh.position_table, ours.position_table)
    with pytest.raises(UserError, match="position table has 8 a side"):
        ours(*inputs(torch.float32, height=18))


def test_positions_follow_the_paper():
    # SD3 sec. 5.3.2: for a target of S^2 pixels and a largest bucket of H_max: (p - (h_max - s)/2) * 256/S, cropped.
    for target, largest, height, width in [(256, 256, 16, 16), (512, 1024, 32, 32), (1024, 2048, 48, 80)]:
        s, h_max = target // 16, largest // 16
        axis = (torch.arange(h_max, dtype=torch.float64) - (h_max - s) / 2) * 256 / target
        rows = axis[(h_max - height) // 2 :][:height]
        columns = axis[(h_max - width) // 2 :][:width]
        dim = 32
        omega = 10000 ** (-2 * torch.arange(dim // 4, dtype=torch.float64) / (dim / 2))
        got = sincos_2d(height, width, dim, sample_size=s, max_size=h_max).view(height, width, dim)
        for i, j in [(0, 0), (height - 1, 3), (5, width - 1)]:
            x, y = columns[j] * omega, rows[i] * omega
            expected = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()]).float()
            assert torch.allclose(got[i, j], expected, atol=1e-6)
    square = sincos_2d(64, 64, 32, sample_size=64, max_size=192)
    assert torch.allclose(square[0], sincos_2d(16, 16, 32, sample_size=16)[0], atol=1e-6)  # starts at 0


def test_timestep_features_are_float32_cosines_first():
    got = sinusoidal(torch.tensor([0.7], dtype=torch.bfloat16), 256)
    assert got.dtype == torch.float32
    t = float(torch.tensor(0.7, dtype=torch.bfloat16))
    for i in (0, 1, 64, 127):
        angle = torch.tensor(1000 * t * 10000 ** (-i / 128), dtype=torch.float64)
        assert abs(got[0, i] - angle.cos()) < 1e-3
        assert abs(got[0, 128 + i] - angle.sin()) < 1e-3


def test_patches_are_those_of_a_convolution_and_come_back():
    x = torch.randn(2, 3, 6, 4)
    weight = torch.randn(7, 3, 2, 2)
    expected = torch.nn.functional.conv2d(x, weight, stride=2).flatten(2).transpose(1, 2)
    assert torch.allclose(patchify(x, 2) @ weight.flatten(1).T, expected, atol=1e-5)
    tokens = patchify(x, 2).view(2, 6, 3, 4).transpose(2, 3).reshape(2, 6, 12)  # channel slowest -> fastest
    assert torch.equal(unpatchify(tokens, 3, 2, 2), x)


def test_a_new_model_is_adaln_zero():
    model = MMDiTConfig(depth=2, hidden=32, heads=2, **SMALL).build()
    assert torch.count_nonzero(model(*inputs(torch.float32))) == 0
    for block in model.blocks:
        x, context = torch.randn(2, 4, 32), torch.randn(2, 5, 32)
        assert torch.equal(block(x, context, torch.randn(2, 32), None)[0], x)


def test_masked_context_is_as_if_it_were_not_there():
    model = randomised(MMDiTConfig(depth=2, hidden=32, heads=2, **SMALL).build())
    x, t, context, pooled = inputs(torch.float32)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[:, 3:] = False
    got = model(x, t, context, pooled, context_mask=mask)
    assert torch.allclose(got, model(x, t, context[:, :3], pooled), atol=1e-5)
    assert not torch.allclose(got, model(x, t, context, pooled), atol=1e-3)


def test_every_option_changes_the_model():
    base = {"depth": 2, "hidden": 32, "heads": 2, **SMALL}
    count = sum(p.numel() for p in MMDiTConfig(**base).build().parameters())
    for option in (
        {"qk_norm": False},
        {"dual_attention_layers": (0,)},
        {"mlp_ratio": 2},
        {"patch_size": 1},
        {"depth": 3},
    ):
        assert sum(p.numel() for p in MMDiTConfig(**{**base, **option}).build().parameters()) != count
    a, b = (randomised(MMDiTConfig(**{**base, **option}).build()) for option in ({}, {"sample_size": 8}))
    assert not torch.allclose(a(*inputs(torch.float32)), b(*inputs(torch.float32)))


def test_wrong_numbers_are_refused():
    with pytest.raises(UserError, match="try 8 x 8"):
        MMDiTConfig(depth=1, **SMALL).build()(*inputs(torch.float32, height=9, width=8))
    with pytest.raises(UserError, match="multiple"):
        MMDiTConfig(depth=2, hidden=30, heads=4, **SMALL).build()
    with pytest.raises(UserError, match="block 5"):
        MMDiTConfig(depth=2, dual_attention_layers=(5,), **SMALL).build()
    for name in ("depth", "hidden", "patch_size"):
        with pytest.raises(UserError, match=f"^{name} = 0 is too few; the least is 1$"):
            MMDiTConfig(**{name: 0})
    with pytest.raises(UserError, match="pooled_dim is not set"):
        MMDiTConfig(depth=2, in_channels=3, context_dim=4, sample_size=4).build()


def test_positions_are_not_those_of_another_shape_or_rounded_for_another_dtype():
    model = MMDiTConfig(depth=1, hidden=32, heads=2, **SMALL).build()
    model.positions(5, 3, torch.zeros(1))
    model.positions(3, 5, torch.zeros(1, dtype=torch.bfloat16))
    got = model.positions(3, 5, torch.zeros(1))
    assert got.dtype == torch.float32
    fresh = MMDiTConfig(depth=1, hidden=32, heads=2, **SMALL).build()
    assert torch.equal(got, fresh.positions(3, 5, torch.zeros(1)))
