"""Image features to measure distances with: a convolutional graph read from two files, or the pixels themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from genflow.errors import UserError
from genflow.registry import api_export

Features = Callable[[Tensor], Tensor]


@api_export("pixel_features")
def pixel_features(images: Tensor) -> Tensor:
    """The pixels themselves. images: B x C x H x W in [-1, 1]. Returns B x CHW."""
    return images.flatten(1)


@api_export("graph_features")
def graph_features(path: str | Path) -> Features:
    """A feature network given as a graph of convolutions and pools (JSON) with its weights (safetensors) beside it.

    path: the JSON file; its weights have the same name with the suffix .safetensors. The result maps B x 3 x H x W images
    in [-1, 1], resized to 128 x 128 (bilinear), to the spatial mean of the last layer: B x D, float32.
    Raises UserError where a file is missing.
    """
    path = Path(path)
    weights_path = path.with_suffix(".safetensors")
    for file in (path, weights_path):
        if not file.is_file():
            raise UserError(f"{file}: no such file; a feature network is a .json graph with its .safetensors beside it")
    graph = json.loads(path.read_text())["graph"]
    weights = {name: w.float() for name, w in load_file(weights_path).items()}

    def layer(op: dict, inputs: list[Tensor]) -> Tensor:
        match op["op"]:
            case "conv_relu":
                w, b = weights[op["name"] + ".weight"], weights[op["name"] + ".bias"]
                return F.conv2d(inputs[0], w, b, stride=op["stride"], padding=op["padding"]).relu()
            case "max_pool":
                return F.max_pool2d(inputs[0], op["kernel"], op["stride"], op.get("padding", 0))
            case "avg_pool":
                return F.avg_pool2d(
                    inputs[0],
                    op["kernel"],
                    op["stride"],
                    op.get("padding", 0),
                    count_include_pad=op["count_include_pad"],
                )
            case "concat":
                return torch.cat(inputs, dim=1)
        raise UserError(f"{path}: unknown operation {op['op']!r}")

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        x = F.interpolate((images.float() + 1) / 2, size=(128, 128), mode="bilinear", align_corners=False)
        done = {graph[0]["name"]: x}
        for op in graph[1:]:
            done[op["name"]] = layer(op, [done[name] for name in op["inputs"]])
        return done[graph[-1]["name"]].mean(dim=(2, 3))

    return features
