"""Image features to measure distances with: a convolutional graph read from two files, Inception, or the pixels themselves.

Any callable that takes pictures to B x D numbers serves the distances; those that `genflow eval` knows by name are modules
that say what they are, so that a figure can be stored with the features it hangs on.
"""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from genflow.cachedir import cache_folder
from genflow.data.pictures import write_atomic
from genflow.errors import UserError
from genflow.networks.feature_graph import SEEN, FeatureGraph, shelved_graph
from genflow.registry import api_export

Features = Callable[[Tensor], Tensor]
BATCH = 100  # pictures at a time: fixed, so that no figure hangs on it
BLOCK = 500  # pictures whose features are kept in one file
INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


class FeatureNetwork(nn.Module, ABC):
    """Features that say what they are. name, digest: of the network with its weights; channels: that it reads, 0 for any.

    Maps B x C x H x W in [-1, 1] to B x D float32. Grey pictures are repeated to three channels where it reads three.
    """

    name: str
    digest: str
    channels: int = 3

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Raises UserError for pictures of other channels."""
        if self.channels:
            if images.dim() != 4:
                raise UserError(f"features {self.name} are of pictures; vectors are measured by their coordinates")
            if images.shape[1] == 1 and self.channels == 3:
                images = images.expand(-1, 3, -1, -1)
            if images.shape[1] != self.channels:
                what = f"read pictures of {self.channels} channels, and these have {images.shape[1]}"
                raise UserError(f"features {self.name} {what}; take others, such as pixels")
        return self.features(images.float())

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Of pictures that it can read: B x D float32."""


class PixelFeatures(FeatureNetwork):
    """The pixels, or the coordinates of vectors, themselves."""

    name, digest, channels = "pixels", "", 0

    def features(self, images: Tensor) -> Tensor:
        return pixel_features(images)


@api_export("pixel_features")
def pixel_features(images: Tensor) -> Tensor:
    """The pixels themselves. images: B x C x H x W in [-1, 1]. Returns B x CHW."""
    return images.flatten(1)


# -------------------------------------------------------------------------------------------------------------- a graph


class GraphFeatures(FeatureNetwork):
    """A graph of convolutions and pools on pictures of SEEN x SEEN (bilinear), and the spatial mean of its last layer.

    path: its JSON.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.graph = path, FeatureGraph(path)
        self.name, self.digest, self.channels = path.stem, self.graph.digest, self.graph.channels

    def features(self, images: Tensor) -> Tensor:
        return self.graph(images, SEEN)[self.graph.graph[-1]["name"]].mean(dim=(2, 3))


@api_export("graph_features")
def graph_features(path: str | Path) -> GraphFeatures:
    """A feature network given as a graph of convolutions and pools (JSON) with its weights (safetensors) beside it.

    path: the JSON file; its weights have the same name with the suffix .safetensors. The result maps B x 3 x H x W images
    in [-1, 1], resized to 128 x 128 (bilinear), to the spatial mean of the last layer: B x D, float32.
    Raises UserError where a file is missing or damaged.
    """
    return GraphFeatures(Path(path))


# ------------------------------------------------------------------------------------------------------------ inception


class InceptionFeatures(FeatureNetwork):
    """The 2048 features of the Inception v3 of published FIDs, its weights from 2015, through torch-fidelity."""

    name = "inception"

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError("features inception need torch-fidelity: pip install torch-fidelity") from error
        weights = Path(torch.hub.get_dir(), "checkpoints", INCEPTION.rpartition("/")[2])
        if not weights.exists():
            try:
                weights.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION, str(weights), hash_prefix="6726825d")
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"features inception: {INCEPTION} cannot be had ({error}); put it at {weights}"
                ) from error
        content = weights.read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        if not self.digest.startswith("6726825d"):
            raise UserError(f"features inception: {weights} is not that of published FIDs; remove it")
        try:
            torch.load(weights, weights_only=True)  # torch-fidelity itself would run what a pickle holds
        except Exception as error:
            raise UserError(f"features inception: {weights} holds more than weights ({error}); remove it") from error
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))

    def features(self, images: Tensor) -> Tensor:
        return self.network(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))[0]


# -------------------------------------------------------------------------------------------------------------- by name


@api_export("feature_network")
def feature_network(what: str | None = None) -> FeatureNetwork:
    """Features by name: "pixels", "inception", the path of a graph (its JSON, its weights, or the folder that holds both),
    or the end of the name of one in `features` of the cache folder, such as mixed4 of inception_mixed4.json.

    None is mixed4 where it is in the cache folder, else pixels. Raises UserError for what is not there.
    """
    if what is None:
        here = any((cache_folder() / "features").glob("*mixed4.json"))
        return feature_network("mixed4") if here else PixelFeatures()
    if what in ("pixels", "inception"):
        return PixelFeatures() if what == "pixels" else InceptionFeatures()
    path = Path(what).expanduser()
    if path.is_dir():
        graphs = [file for file in sorted(path.glob("*.json")) if file.with_suffix(".safetensors").is_file()]
        if len(graphs) != 1:
            raise UserError(
                f"--features {path}: {len(graphs) or 'no'} graphs with their weights are there; name one .json"
            )
        return GraphFeatures(graphs[0])
    return GraphFeatures(shelved_graph(what, also=("pixels", "inception")))


@torch.no_grad()
def features_of(
    network: FeatureNetwork,
    pictures: Tensor,
    *,
    device: torch.device | str = "cpu",
    keep: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """The features of N pictures, N x D float32 on the CPU.

    pictures: uint8, or float32 in [-1, 1]. keep: in the cache folder, block by block, under the hash of the network and of
    the pictures themselves. progress: told how many are done since.
    """
    network = network.to(device)

    def compute(block: Tensor) -> Tensor:
        done = []
        for part in block.split(BATCH):
            part = part.to(device)
            done.append(network(as_samples(part)).float().cpu())
            progress(len(part))
        return torch.cat(done)

    keep = keep and network.channels > 0
    return torch.cat(
        [_kept(network, block, compute, progress) if keep else compute(block) for block in pictures.split(BLOCK)]
    )


def as_samples(pictures: Tensor) -> Tensor:
    """Bytes as float32 in [-1, 1]; what is float already, as it is."""
    return pictures.float() / 127.5 - 1 if pictures.dtype == torch.uint8 else pictures


def as_bytes(pictures: Tensor) -> Tensor:
    """A model's pictures, [-1, 1], as a file would hold them: uint8. Raises UserError where they are not finite."""
    if not bool(pictures.isfinite().all()):
        raise UserError("the model's pictures are not finite; is it trained?")
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def checked(*sets: Tensor) -> None:
    """Raises UserError for what are no sets of features, or not of one network, or not finite."""
    for features in sets:
        if not isinstance(features, Tensor):
            kind = type(features).__name__
            raise UserError(f"features are a {kind}, not a tensor; torch.as_tensor(...) makes one of it")
        if features.dim() != 2 or len(features) < 2:
            raise UserError(
                f"features of {tuple(features.shape)} are too few, with no covariance; give N x D with N of 2 or more"
            )
        if features.shape[1] != sets[0].shape[1]:
            raise UserError(f"features of widths {sets[0].shape[1]} and {features.shape[1]} are of different networks")
        if not bool(features.isfinite().all()):
            raise UserError("features are not finite, so they have no distance; look at the samples that they are of")


def _kept(
    network: FeatureNetwork, block: Tensor, compute: Callable[[Tensor], Tensor], progress: Callable[[int], object]
) -> Tensor:
    about = f"{network.digest} {block.dtype} {tuple(block.shape)} 1".encode()
    key = hashlib.blake2b(about + block.contiguous().numpy().tobytes(), digest_size=20).hexdigest()
    file = cache_folder() / "features" / "kept" / f"{key}.safetensors"
    try:
        found = load(file.read_bytes())["features"]
        if len(found) == len(block):
            progress(len(block))
            return found
    except (OSError, SafetensorError, LookupError):  # not there, or damaged
        pass
    features = compute(block)
    try:
        write_atomic(file, lambda out: out.write(save({"features": features})))
    except UserError as error:
        warnings.warn(f"features are not kept: {error}", stacklevel=2)
    return features
