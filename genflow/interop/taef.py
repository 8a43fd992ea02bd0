"""The weights of tiny autoencoders in the layout of TAESD and its kin (github.com/madebyollin/taesd), such as taef2."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from genflow.config import to_dict
from genflow.errors import UserError
from genflow.flows.autoencoder import AutoencoderFlow, AutoencoderFlowConfig
from genflow.networks.autoencoders import TinyAutoencoderConfig
from genflow.networks.bottlenecks import PlainConfig
from genflow.registry import api_export
from genflow.text.none import NoTextConfig


@api_export("load_taef")
def load_taef(folder: str | Path, *, size: int = 64) -> AutoencoderFlow:
    """A tiny autoencoder from NAME_encoder.safetensors and NAME_decoder.safetensors in a folder, in eval mode.

    size: of its pictures' sides. The scale and shift of its latents are in no file: `flow.measure(pictures)` finds them.
    `save_model(out, config=flow.recipe, state=flow.state_dict())` makes it a model folder, for `{name: trained, run: out}`
    and to train on from (`init: out`). Raises UserError for files that are not there, or of another network.
    """
    folder = Path(folder)
    halves = {half: _read(folder, half) for half in ("encoder", "decoder")}
    model = _config(halves, folder)
    flow_config, text = AutoencoderFlowConfig(PlainConfig(model.latent_channels or 0)), NoTextConfig()
    flow = flow_config.build(model.build(), text.build(), shape=(model.in_channels or 0, size, size))
    state = {f"{half}.{name}": value.float() for half, tensors in halves.items() for name, value in tensors.items()}
    mine = flow.network.state_dict()
    if odd := sorted({*mine} ^ {*state}) or [name for name in mine if mine[name].shape != state[name].shape]:
        raise UserError(f"{folder}: no tiny autoencoder that is known here: {odd[0]} does not fit")
    flow.network.load_state_dict(state)
    sections = {"model": model, "flow": flow_config, "text": text}
    flow.recipe = {**{name: to_dict(section) for name, section in sections.items()}, "shape": list(flow.shape)}
    return flow.eval()


def _read(folder: Path, half: str) -> dict[str, Tensor]:
    files = sorted(folder.glob(f"*_{half}.safetensors"))
    if len(files) != 1:
        raise UserError(f"{folder}: {len(files) or 'no'} files are named *_{half}.safetensors; one is wanted")
    try:
        return load_file(files[0])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{files[0]} is damaged or cut short ({error}); copy it again") from error


def _config(halves: dict[str, dict[str, Tensor]], folder: Path) -> TinyAutoencoderConfig:
    """Read off the encoder's shapes: a convolution without a bias begins each size but the first."""
    encoder = halves["encoder"]
    plain = {int(m[1]): w for name, w in encoder.items() if (m := re.fullmatch(r"(\d+)\.weight", name))}
    strided = [i for i in plain if f"{i}.bias" not in encoder]
    if 0 not in plain or len(strided) not in (1, 2, 3) or "1.weight" not in halves["decoder"]:
        raise UserError(f"{folder}: no tiny autoencoder that is known here")
    last = max(plain)
    return TinyAutoencoderConfig(
        width=plain[0].shape[0],
        blocks=(last - min(strided)) // len(strided) - 1,
        factor=2 ** len(strided),  # type: ignore[arg-type]
        wide=any(".pool." in name for name in encoder),
        in_channels=plain[0].shape[1],
        encoder_channels=plain[last].shape[0],
        latent_channels=halves["decoder"]["1.weight"].shape[1],
    )
