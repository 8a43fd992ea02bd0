"""Latents decoded by tiles: the whole picture where one tile holds it, near it with smaller ones, in less memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genflow.cli import main
from genflow.config import to_dict
from genflow.data.pictures import read_settings
from genflow.errors import UserError
from genflow.flows.latent import LatentFlow
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.store import save_model
from genflow.flows.trained import TrainedAutoencoderConfig
from genflow.interop.autoencoder import KLNetworkConfig
from genflow.interop.pipelines import open_pipeline
from genflow.networks.autoencoders import TinyAutoencoderConfig
from genflow.networks.velocity import MLPVelocityConfig
from genflow.text.none import NoTextConfig
from tests import tiny_sd3
from tests.test_tiled import Largest

PROMPT = "red dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny pipeline for pictures of up to 64 pixels a side; a latent is 2 of them."""
    folder = tmp_path_factory.mktemp("tiles") / "pipe"
    torch.manual_seed(0)
    tiny_sd3.pipeline(pos_embed_max_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flow(folder) -> LatentFlow:
    return open_pipeline(folder)


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(2, 16, 32, 48)


@pytest.mark.parametrize("tile", [96, 128])
def test_a_tile_that_holds_the_picture_changes_no_bit(flow, z, tile):
    assert torch.equal(flow.to_pictures(z, tile=tile), flow.to_pictures(z))


def test_the_tiling_that_an_autoencoder_had_stays_its_own(flow, z):
    module = flow.autoencoder.module
    own = vars(module).keys() & {"use_tiling", "tile_sample_min_size", "tile_latent_min_size"}
    before = {name: getattr(module, name) for name in own}
    flow.to_pictures(z, tile=48)
    assert len(own) == 3 and before == {name: getattr(module, name) for name in own}


@pytest.mark.parametrize(("tile", "off"), [(64, 0.01), (48, 0.015), (32, 0.025)])
def test_smaller_tiles_come_near(flow, z, tile, off):
    """In [0, 1], of pictures whose standard deviation is 0.18: random weights, so that norms and attention see far."""
    whole, tiled = flow.to_pictures(z) / 2, flow.to_pictures(z, tile=tile) / 2
    assert tiled.shape == whole.shape and 0 < (tiled - whole).abs().mean() < off
    assert (tiled - whole).abs().max() < 0.3 and whole.std() > 0.15
    assert torch.equal(flow.to_pictures(z), whole * 2)  # tiles are of one call


def test_it_is_diffusers_own_tiling(flow, z):
    module = flow.autoencoder.module
    module.tile_sample_min_size, module.tile_latent_min_size = 32, 16
    module.enable_tiling()
    latents = z / flow.autoencoder.scale + flow.autoencoder.shift
    with torch.no_grad():
        theirs = module.decode(latents).sample
    module.disable_tiling()
    assert torch.equal(flow.to_pictures(z, tile=32), theirs.clamp(-1, 1))


def test_no_tensor_is_as_large_as_those_of_the_whole(flow, z):
    used = []
    for tile in (None, 32):
        with Largest() as largest:
            flow.to_pictures(z, tile=tile)
        used.append(largest.elements)
    assert used[1] <= used[0] * (32 * 32) / (64 * 96)


def test_pictures_are_sampled_in_tiles(flow):
    how = {"seeds": [1], "steps": 1, "size": (64, 48)}
    whole, tiled = flow.sample([PROMPT], **how).x, flow.sample([PROMPT], tile=32, **how).x
    assert torch.equal(flow.sample([PROMPT], tile=64, **how).x, whole)
    assert 0 < (tiled - whole).abs().mean() / 2 < 0.025


@pytest.mark.parametrize(("tile", "near"), [(4, 8), (36, 32), (61, 64), (0, 8), (-64, 8)])
def test_tiles_that_do_not_cut_into_latents_are_refused_before_the_solve(flow, tile, near):
    seen = []
    with pytest.raises(UserError, match=rf"tile = {tile} is no multiple of 8 pixels.*; try {near}"):
        flow.sample([PROMPT], seeds=[0], steps=1, tile=tile, progress=lambda *_: seen.append(1))
    assert not seen


def test_trained_autoencoders_are_tiled_where_they_are_an_autoencoder_kl():
    def trained(network) -> object:
        bottleneck = {"name": "gaussian", "channels": 4}
        return TrainedAutoencoderConfig("a run", {"model": to_dict(network), "bottleneck": bottleneck}).build().eval()

    channels = {"in_channels": 3, "encoder_channels": 8, "latent_channels": 4}
    kl, tiny = trained(KLNetworkConfig((32, 64), **channels)), trained(TinyAutoencoderConfig(8, 1, 2, **channels))
    z = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        assert torch.equal(kl.tiled(32)(z), kl.decode(z))
        assert not torch.equal(kl.tiled(16)(z), kl.decode(z))
    with pytest.raises(UserError, match="a TinyAutoencoder decodes pictures as a whole; leave tile out"):
        tiny.tiled(16)


def test_a_last_tile_of_one_latent_has_spread_in_groups_of_one_channel():
    config = KLNetworkConfig((8, 8, 8), groups=8, in_channels=3, latent_channels=4)
    network = config.build().requires_grad_(False)
    z = torch.randn(1, 4, 16, 16)  # tiles of 4 x 4 begin at every third latent, the last at the 16th
    whole, tiled = network.decode(z), network.tiled(16)(z)
    assert tiled.shape == whole.shape and 0 < (tiled - whole).abs().mean() < whole.std()
    assert torch.equal(network.tiled(16)(z[..., :4, :4]), network.decode(z[..., :4, :4]))


def test_the_command_draws_in_tiles_and_says_so_in_the_picture(flow, folder, tmp_path):
    how = [
        "--prompt",
        PROMPT,
        "--seed",
        "1",
        "--steps",
        "1",
        "--guidance",
        "1",
        "--size",
        "64",
        "48",
        "--device",
        "cpu",
    ]
    for tile in (["--tile", "32"], []):
        out = tmp_path / str(len(tile))
        assert main(["sample", str(folder), *how, *tile, "--out", str(out)]) == 0
        file = next(out.glob("0000-*.png"))
        assert read_settings(file).get("tile") == (32 if tile else None)
        settings = {**flow.recipe["sample"], "steps": 1, "guidance": 1.0}
        x = flow.sample([PROMPT], seeds=[1], size=(64, 48), tile=32 if tile else None, **settings).x[0]
        assert np.abs(np.asarray(Image.open(file)) - ((x + 1) * 127.5).permute(1, 2, 0).numpy()).max() < 0.51


def test_models_without_latents_or_an_mmdit_say_so(tmp_path, capsys):
    text = NoTextConfig()
    model, flow = MLPVelocityConfig(hidden=8, depth=1, shape=(2,), pooled_dim=0), RectifiedFlowConfig()
    state = flow.build(model.build(), text.build(), shape=(2,)).state_dict()
    config = {"model": to_dict(model), "flow": to_dict(flow), "text": to_dict(text), "shape": [2]}
    save_model(tmp_path, config=config, state=state)
    for asked, message in (
        (["--tile", "64"], "--tile is for models of an autoencoder's latents"),
        (["--lora", "x"], "x: a LoRA is for an MM-DiT, and the model is a MLPVelocity"),
    ):
        assert main(["sample", str(tmp_path), *asked]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1, told
