"""Feature networks read from a graph, against the same layers written in torch."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from genflow.errors import UserError
from genflow.evaluation.features import graph_features, pixel_features


@pytest.fixture
def graph(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a.weight": torch.randn(4, 3, 3, 3, generator=generator).half(),
        "a.bias": torch.randn(4, generator=generator).half(),
        "b.weight": torch.randn(2, 4, 1, 3, generator=generator).half(),
        "b.bias": torch.randn(2, generator=generator).half(),
    }
    save_file(weights, tmp_path / "net.safetensors")
    pool = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1]}
    ops = [
        {"name": "in", "op": "input"},
        {"name": "a", "op": "conv_relu", "inputs": ["in"], "stride": [2, 2], "padding": [0, 0]},
        {"name": "m", "op": "max_pool", "inputs": ["a"], "kernel": [3, 3], "stride": [2, 2]},
        {"name": "b", "op": "conv_relu", "inputs": ["m"], "stride": [1, 1], "padding": [0, 1]},
        {"name": "p", "op": "avg_pool", "inputs": ["m"], **pool, "count_include_pad": False},
        {"name": "c", "op": "concat", "inputs": ["b", "p"]},
    ]
    (tmp_path / "net.json").write_text(json.dumps({"graph": ops}))
    return tmp_path / "net.json", {k: v.float() for k, v in weights.items()}


def test_the_graph_computes_what_it_says(graph):
    path, w = graph
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    big = F.interpolate((x + 1) / 2, size=(128, 128), mode="bilinear", align_corners=False)
    m = F.max_pool2d(F.conv2d(big, w["a.weight"], w["a.bias"], stride=2).relu(), 3, 2)
    b = F.conv2d(m, w["b.weight"], w["b.bias"], padding=(0, 1)).relu()
    p = F.avg_pool2d(m, 3, 1, 1, count_include_pad=False)
    expected = torch.cat([b.mean((2, 3)), p.mean((2, 3))], dim=1)
    assert torch.allclose(graph_features(path)(x), expected, atol=1e-5)
    assert pixel_features(x).shape == (2, 3 * 32 * 32)


def test_missing_files_are_named(graph, tmp_path):
    with pytest.raises(UserError, match=r"other\.json: no such file"):
        graph_features(tmp_path / "other.json")
    (tmp_path / "net.safetensors").unlink()
    with pytest.raises(UserError, match=r"net\.safetensors: no such file"):
        graph_features(graph[0])
