"""diffusers' AutoencoderKL as genflow's autoencoder, and its tensors under the names of Stability's files.

Kingma & Welling 2014 (arXiv 1312.6114); the network is that of latent diffusion (arXiv 2112.10752).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genflow.config import setting
from genflow.errors import UserError
from genflow.flows.autoencoder import AutoencoderFlow
from genflow.flows.latent import Autoencoder
from genflow.interop.tensors import Lazy, numbers
from genflow.networks.autoencoders import EncoderDecoder
from genflow.networks.bottlenecks import Continuous
from genflow.registry import api_export, genflow_export, network_export

# Scale and shift by the number of latent channels, of the autoencoders whose files do not hold them.
SD3 = {"scale": 1.5305, "shift": 0.0609}
# genflow's field -> diffusers' keys
FIELDS = {
    "channels": ("block_out_channels",),
    "latent_channels": ("latent_channels",),
    "layers": ("layers_per_block",),
    "groups": ("norm_num_groups",),
    "picture_channels": ("in_channels", "out_channels"),
    "quant_convs": ("use_quant_conv", "use_post_quant_conv"),
    "middle_attention": ("mid_block_add_attention",),
    "scale": ("scaling_factor",),
    "shift": ("shift_factor",),
}


@genflow_export("kl", kind="autoencoder")
@dataclass(frozen=True)
class KLAutoencoderConfig:
    """The autoencoder of Stable Diffusion, diffusers' AutoencoderKL; as it stands, SD3's.

    channels: of its levels, each half as large as the one before; layers: residual blocks a level; groups: of its norms;
    quant_convs: 1 x 1 convolutions around the latents (SD1, SDXL). A flow sees (z - shift) * scale.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 16
    layers: int = 2
    groups: int = 32
    picture_channels: int = 3
    quant_convs: bool = False
    middle_attention: bool = True
    scale: float = SD3["scale"]
    shift: float = SD3["shift"]

    def build(self) -> KLAutoencoder:
        return KLAutoencoder(self)


class KLAutoencoder(Autoencoder):
    """An AutoencoderKL, `module`, under genflow's interface."""

    def __init__(self, config: KLAutoencoderConfig) -> None:
        from diffusers import AutoencoderKL

        super().__init__()
        _check_sizes("autoencoder kl", config)
        if not (math.isfinite(config.scale) and config.scale) or not math.isfinite(config.shift):
            raise UserError(
                f"autoencoder kl: scale = {config.scale} and shift = {config.shift} must be finite, and scale not 0"
            )
        self.picture_channels, self.channels = config.picture_channels, config.latent_channels
        self.factor = 2 ** (len(config.channels) - 1)
        self.scale, self.shift = config.scale, config.shift
        self.module: Any = AutoencoderKL(**vae_to_diffusers(config))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.module.encode(x).latent_dist
        return latents.mean, latents.std

    def decode(self, z: Tensor) -> Tensor:
        return self.module.decode(z).sample

    def tiled(self, tile: int) -> Callable[[Tensor], Tensor]:
        return _tiled(self.module, tile, self.factor)


@network_export("kl_autoencoder")
@dataclass(frozen=True)
class KLNetworkConfig:
    """diffusers' AutoencoderKL as a network to train, under flow autoencoder with bottleneck gaussian.

    channels: of its levels, each half as large as the one before; layers: residual blocks a level; groups: of its norms;
    middle_attention: between the places of the smallest level. in_channels, encoder_channels and latent_channels may be left
    out where a run's data and bottleneck tell them.
    """

    channels: tuple[int, ...] = (64, 128, 256)
    layers: int = 1
    groups: int = 32
    middle_attention: bool = True
    in_channels: int | None = None
    encoder_channels: int | None = None
    latent_channels: int | None = None

    def build(self) -> KLNetwork:
        """The network, freshly initialised. Raises UserError where the numbers do not fit each other."""
        return KLNetwork(self)

    def autoencoder(self, scale: float = 1.0, shift: float = 0.0) -> KLAutoencoderConfig:
        """The same network as an autoencoder that is not trained."""
        assert self.in_channels is not None and self.latent_channels is not None
        return KLAutoencoderConfig(
            self.channels,
            self.latent_channels,
            self.layers,
            self.groups,
            self.in_channels,
            middle_attention=self.middle_attention,
            scale=scale,
            shift=shift,
        )


class KLNetwork(EncoderDecoder):
    """An AutoencoderKL, `module`; what `encode` gives are means and log-variances."""

    def __init__(self, config: KLNetworkConfig) -> None:
        super().__init__()
        if config.in_channels is None or config.latent_channels is None:
            missing = "in_channels" if config.in_channels is None else "latent_channels"
            raise UserError(f"kl_autoencoder: {missing} is not set, and no data set or bottleneck is there to tell it")
        _check_sizes("kl_autoencoder", config)
        self.in_channels, self.latent_channels = config.in_channels, config.latent_channels
        self.encoder_channels = 2 * config.latent_channels
        if config.encoder_channels not in (None, self.encoder_channels):
            raise UserError(
                f"kl_autoencoder: it gives means and variances, {self.encoder_channels} channels, and the bottleneck reads "
                f"{config.encoder_channels}; take bottleneck gaussian, or model tiny_autoencoder"
            )
        self.module: Any = KLAutoencoder(config.autoencoder()).module
        self.factor = 2 ** (len(config.channels) - 1)

    @property
    def blocks(self) -> Iterator[nn.Module]:
        """Every residual block, in order."""
        for name, module in self.module.named_modules():
            if re.fullmatch(r".*resnets\.\d+", name):
                yield module

    @property
    def last(self) -> nn.Parameter:
        return self.module.decoder.conv_out.weight

    def encode(self, x: Tensor) -> Tensor:
        return self.module.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.module.decoder(z)

    def tiled(self, tile: int) -> Callable[[Tensor], Tensor]:
        return _tiled(self.module, tile, self.factor)


def _check_sizes(name: str, config: KLAutoencoderConfig | KLNetworkConfig) -> None:
    channels, groups = config.channels, config.groups
    if groups < 1 or not channels or any(width < 1 or width % groups for width in channels):
        raise UserError(f"{name}: channels = {list(channels)} must be multiples of groups = {groups}, 1 or more")
    for field in ("layers", "latent_channels", "picture_channels", "in_channels"):
        if (value := getattr(config, field, None)) is not None and value < 1:
            raise UserError(f"{name}: {field} = {value} is too few; the least is 1")


def _tiled(module: Any, tile: int, factor: int) -> Callable[[Tensor], Tensor]:
    """An AutoencoderKL's `decode` by diffusers' tiles, which overlap by a quarter, there faded into each other."""
    step = 4 * factor  # a quarter of a tile is whole latents
    if tile < step or tile % step:
        near = max(round(tile / step), 1) * step
        raise UserError(f"tile = {tile} is no multiple of {step} pixels, as this autoencoder needs; try {near}")

    latents, stride = tile // factor, 3 * tile // step
    alone = module.config.block_out_channels[-1] == module.config.norm_num_groups  # each channel, in its group
    now = {"tile_sample_min_size": tile, "tile_latent_min_size": latents, "use_tiling": True}

    def decode(z: Tensor) -> Tensor:
        height, width = z.shape[-2:]
        if alone and max(height, width) > latents and height % stride == width % stride == 1:
            z = F.pad(z, (0, 1, 0, 1), mode="replicate")  # a last tile of one latent would leave it no spread
        before = {name: getattr(module, name) for name in now}
        vars(module).update(now)
        try:
            return module.decode(z).sample[..., : height * factor, : width * factor]
        finally:
            vars(module).update(before)

    return decode


@api_export("autoencoder_to_diffusers")
def autoencoder_to_diffusers(flow: AutoencoderFlow) -> Any:
    """The AutoencoderKL of a trained flow, with its latents' scale and shift, as diffusers saves and loads it.

    Raises UserError for a flow of another network.
    """
    network, bottleneck = flow.network, flow.bottleneck
    if not isinstance(network, KLNetwork) or not isinstance(bottleneck, Continuous):
        raise UserError(f"a {type(network).__name__} is no AutoencoderKL; take model kl_autoencoder")
    network.module.register_to_config(scaling_factor=float(bottleneck.scale), shift_factor=float(bottleneck.shift))
    return network.module


def vae_to_diffusers(config: KLAutoencoderConfig) -> dict[str, Any]:
    """The arguments of an AutoencoderKL of the same shape."""
    levels = len(config.channels)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return {**blocks, **{key: getattr(config, name) for name, keys in FIELDS.items() for key in keys}}


def vae_from_diffusers(source: Mapping[str, Any]) -> KLAutoencoderConfig:
    """The reverse of vae_to_diffusers. Raises UserError for an autoencoder that is another, or has parts not known here."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        plain: Any = AutoencoderKL(block_out_channels=(32,))
    given = {**plain.config, **source, "shift_factor": source.get("shift_factor") or 0.0}
    if source.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise UserError(f"the autoencoder is a {source['_class_name']}; only an AutoencoderKL is known here")
    kinds = get_type_hints(KLAutoencoderConfig)
    config = KLAutoencoderConfig(
        **{name: setting(kinds[name], given, keys[0], "the autoencoder's config") for name, keys in FIELDS.items()}
    )
    if config.groups < 1 or any(width % config.groups for width in config.channels):
        raise UserError(
            f"the autoencoder has block_out_channels = {config.channels}, no multiples of norm_num_groups = {config.groups}"
        )
    known = {**plain.config, **vae_to_diffusers(config)}
    for key, value in known.items():
        there = tuple(given[key]) if isinstance(given[key], list) else given[key]
        if key not in ("sample_size", "force_upcast") and not key.startswith("_") and there != value:
            raise UserError(f"the autoencoder has {key} = {there}, and only {value} is known here")
    return config


# ---------------------------------------------------------------------------------------------------- Stability's names


def vae_from_shapes(tensors: Mapping[str, Lazy]) -> KLAutoencoderConfig:
    """The configuration of an autoencoder under Stability's names, from its tensors' shapes.

    Raises UserError where it is none, or its scale and shift are not known: they are in no file.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"the file's autoencoder has no tensor {name}")
        return tensors[name].shape

    levels = numbers(tensors, r"encoder\.down\.(\d+)\.")
    config = KLAutoencoderConfig(
        channels=tuple(shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in levels),
        latent_channels=shape("decoder.conv_in.weight")[1],
        layers=len(numbers(tensors, r"encoder\.down\.0\.block\.(\d+)\.")),
        picture_channels=shape("encoder.conv_in.weight")[1],
        quant_convs="quant_conv.weight" in tensors,
        middle_attention="encoder.mid.attn_1.q.weight" in tensors,
    )
    if config.latent_channels != 16 or config.quant_convs:
        what = f"{config.latent_channels} channels{' and quant convolutions' * config.quant_convs}"
        raise UserError(
            f"the file's autoencoder is not SD3's but one of {what}, whose scale no file tells; take diffusers' layout"
        )
    return config


def vae_from_stability(source: Mapping[str, Lazy], config: KLAutoencoderConfig) -> dict[str, Lazy]:
    """An AutoencoderKL's tensors from those under Stability's names. Raises UserError for one missing or left over."""
    shapes = _shapes(config)
    theirs = {name: _stability_name(name, len(config.channels)) for name in shapes}
    if missing := {*theirs.values()} - {*source}:
        raise UserError(f"not an autoencoder of this configuration: it has no tensor {min(missing)}")
    if unused := {*source} - {*theirs.values()}:
        raise UserError(f"not an autoencoder of this configuration: what would {min(unused)} be for?")
    for name, there in theirs.items():
        if math.prod(source[there].shape) != math.prod(shapes[name]):
            raise UserError(f"not an autoencoder of this configuration: {there} is {source[there].shape}")
    return {name: _reshaped(source[there], shapes[name]) for name, there in theirs.items()}


def check_vae(tensors: Mapping[str, Lazy], config: KLAutoencoderConfig) -> None:
    """Raises UserError where these are not the tensors, under diffusers' names, of an AutoencoderKL of the configuration."""
    wanted, there = _shapes(config), {name: tensor.shape for name, tensor in tensors.items()}
    if odd := sorted(name for name in wanted | there if wanted.get(name) != there.get(name)):
        what = f"{odd[0]} is {there.get(odd[0], 'missing')}, not {wanted.get(odd[0], 'left out')}"
        raise UserError(f"the autoencoder is not as its config says: {what}")


def _shapes(config: KLAutoencoderConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(w.shape) for name, w in config.build().module.state_dict().items()}


def vae_to_stability(state: Mapping[str, Lazy], config: KLAutoencoderConfig) -> dict[str, Lazy]:
    """The reverse of vae_from_stability."""
    result = {}
    for name, tensor in state.items():
        linear = ".attentions." in name and len(tensor.shape) == 2  # a 1 x 1 convolution there
        shape = (*tensor.shape, 1, 1) if linear else tensor.shape
        result[_stability_name(name, len(config.channels))] = _reshaped(tensor, shape)
    return result


def _reshaped(tensor: Lazy, shape: tuple[int, ...]) -> Lazy:
    return tensor if tensor.shape == shape else tensor.map(lambda w: w.reshape(shape), shape)


def _stability_name(name: str, levels: int) -> str:
    """Stability's name of one of AutoencoderKL's tensors: levels of its decoder are counted from the other end."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
    name = name.replace(".resnets.", ".block.").replace("samplers.0.conv", "sample.conv")
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    pattern = rf"mid_block\.attentions\.0\.({'|'.join(map(re.escape, attention))})\."
    return re.sub(pattern, lambda m: f"mid.attn_1.{attention[m[1]]}.", name)
