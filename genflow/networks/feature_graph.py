"""A frozen graph of convolutions and pools, read from a JSON file and its weights: features, and a perceptual distance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from genflow.cachedir import cache_folder
from genflow.errors import UserError, nearest

SEEN = 128  # pixels of a side, to which the pictures of an evaluation are resized


class FeatureGraph(nn.Module):
    """channels: that it reads; digest: of both files. Its weights are no part of a state dict."""

    def __init__(self, path: Path) -> None:
        """path: the JSON file, beside weights of the same name. Raises UserError where one is missing or damaged."""
        super().__init__()
        files = (path, path.with_suffix(".safetensors"))
        for file in files:
            if not file.is_file():
                raise UserError(
                    f"{file}: no such file; a feature network is a .json graph with its .safetensors beside it"
                )
        self.path = path
        try:
            self.graph: list[dict[str, Any]] = json.loads(path.read_text())["graph"]
            weights = load_file(files[1])
            self.digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
            first = next(op["name"] for op in self.graph if op["op"] == "conv_relu")
            self.channels: int = weights[f"{first}.weight"].shape[1]
            for name, w in weights.items():
                w = w.float()
                w = w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w
                self.register_buffer(name.replace(".", "_"), w, persistent=False)
            with torch.no_grad():
                self(torch.zeros(1, self.channels, SEEN, SEEN), SEEN)  # do they fit together?
        except Exception as error:  # damage shows in many ways
            why = str(error).partition("\n")[0]
            raise UserError(
                f"{path}: no feature network ({type(error).__name__}: {why}); copy both files again"
            ) from error

    def forward(self, images: Tensor, size: int) -> dict[str, Tensor]:
        """Every layer by name, of B x channels x H x W in [-1, 1], resized to size x size (bilinear)."""
        x = F.interpolate((images + 1) / 2, size=(size, size), mode="bilinear", align_corners=False)
        done = {self.graph[0]["name"]: x.contiguous(memory_format=torch.channels_last)}
        for op in self.graph[1:]:
            done[op["name"]] = self._layer(op, [done[name] for name in op["inputs"]])
        return done

    def _layer(self, op: dict[str, Any], inputs: list[Tensor]) -> Tensor:
        match op["op"]:
            case "conv_relu":
                w, b = (self.get_buffer(f"{op['name']}_{part}") for part in ("weight", "bias"))
                return F.conv2d(inputs[0], w, b, stride=op["stride"], padding=op["padding"]).relu_()
            case "max_pool":
                return F.max_pool2d(inputs[0], op["kernel"], op["stride"], op.get("padding", 0))
            case "avg_pool":
                padding, counted = op.get("padding", 0), op["count_include_pad"]
                return F.avg_pool2d(inputs[0], op["kernel"], op["stride"], padding, count_include_pad=counted)
            case "concat":
                return torch.cat(inputs, dim=1)
        raise ValueError(f"unknown operation {op['op']!r}")

    @property
    def stages(self) -> list[str]:
        """The layers that end a resolution: what a max pool reads, and the last one."""
        pooled = [op["inputs"][0] for op in self.graph if op["op"] == "max_pool"]
        return list(dict.fromkeys([*pooled, self.graph[-1]["name"]]))


def shelved_graph(name: str, also: Sequence[str] = ()) -> Path:
    """The graph of a name or the end of one in `features` of the cache folder, such as mixed4; or of a path.

    The shortest name that ends so: the one of just this name, where it is there. Raises UserError where there is none,
    which may bring up the names that the caller takes `also`.
    """
    path = Path(name).expanduser()
    if path.suffix in (".json", ".safetensors"):
        return path.with_suffix(".json")
    shelf = cache_folder() / "features"
    found = sorted(shelf.glob(f"*{path.name}.json"), key=lambda file: (len(file.name), file))
    if not found:
        near = nearest(name, [*also, *(file.stem for file in shelf.glob("*.json"))])
        raise UserError(f"no features {name!r}: neither a .json graph nor a name of one in {shelf}.{near}")
    return found[0]


class PerceptualDistance(nn.Module):
    """How far apart two pictures are to a feature network, as LPIPS is without its learnt weights.

    Zhang et al. 2018 (arXiv 1801.03924), eq. 1 with w = 1: at each stage, features of unit length at every place, their
    squared difference, its mean over places; then the mean over stages. 0 .. 4.
    """

    def __init__(self, graph: FeatureGraph, size: int) -> None:
        super().__init__()
        self.graph, self.size = graph, size

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b: B x C x H x W in [-1, 1], grey ones repeated to the channels of the graph. Returns B."""
        if a.shape[1] == 1:
            a, b = (x.expand(-1, self.graph.channels, -1, -1) for x in (a, b))
        if max(a.shape[-2:]) > self.size:  # the plain resize leaves pixels unseen
            size = (self.size, self.size)
            a, b = (F.interpolate(x, size=size, mode="bilinear", antialias=True) for x in (a, b))
        mine, theirs = self.graph(a, self.size), self.graph(b, self.size)
        each = [
            (F.normalize(mine[name].float()) - F.normalize(theirs[name].float())).square().sum(1).mean((1, 2))
            for name in self.graph.stages
        ]
        return torch.stack(each).mean(0)
