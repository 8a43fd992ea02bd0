"""Feature networks: a graph against the same layers written in torch, those by name, and what is kept of them."""

from __future__ import annotations

import hashlib
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from genflow.errors import UserError
from genflow.evaluation import features as features_module
from genflow.evaluation.features import PixelFeatures, feature_network, features_of, graph_features, pixel_features
from genflow.networks.feature_graph import shelved_graph


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


def test_a_damaged_graph_is_refused(graph):
    graph[0].write_text("{}")
    with pytest.raises(UserError, match=r"net\.json: no feature network \(KeyError"):
        graph_features(graph[0])
    graph[0].write_text(json.dumps({"graph": [{"op": "input", "name": "in"}]}))
    with pytest.raises(UserError, match="no feature network"):
        graph_features(graph[0])


def test_grey_pictures_are_repeated_and_other_channels_refused(graph):
    network = graph_features(graph[0])
    grey = torch.rand(2, 1, 9, 9) * 2 - 1
    assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(UserError, match="features net read pictures of 3 channels, and these have 4; take others"):
        network(torch.zeros(1, 4, 9, 9))
    with pytest.raises(UserError, match="features net are of pictures; vectors are measured by their coordinates"):
        network(torch.zeros(1, 4))
    assert torch.equal(PixelFeatures()(torch.eye(4)), torch.eye(4))


@pytest.fixture
def shelf(graph, tmp_path, monkeypatch):
    """A cache folder that holds the graph as inception_mixed4.json."""
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "features"
    folder.mkdir(parents=True)
    for suffix in (".json", ".safetensors"):
        (folder / f"inception_mixed4{suffix}").write_bytes(graph[0].with_suffix(suffix).read_bytes())
    return folder


def test_a_network_is_found_by_its_file_its_folder_or_its_name_in_the_cache(graph, shelf):
    digest = hashlib.sha256(graph[0].read_bytes() + graph[0].with_suffix(".safetensors").read_bytes()).hexdigest()
    names = (graph[0], graph[0].with_suffix(".safetensors"), graph[0].parent, "mixed4", "inception_mixed4", None)
    found = [feature_network(None if name is None else str(name)) for name in names]
    assert {each.digest for each in found} == {digest}
    assert [each.name for each in found] == ["net"] * 3 + ["inception_mixed4"] * 3
    assert feature_network("pixels").name == "pixels"
    with pytest.raises(UserError, match="no features 'pixles'.* Did you mean 'pixels'"):
        feature_network("pixles")
    with pytest.raises(UserError, match="no graphs with their weights are there"):
        feature_network(str(shelf.parent))


def test_a_whole_name_goes_before_a_longer_one_of_that_end(graph, shelf):
    for suffix in (".json", ".safetensors"):
        (shelf / f"mixed4{suffix}").write_bytes(graph[0].with_suffix(suffix).read_bytes())
    assert feature_network("mixed4").name == shelved_graph("mixed4").stem == "mixed4"
    assert shelved_graph("inception_mixed4").stem == "inception_mixed4"


def test_without_a_network_in_the_cache_features_are_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path))
    assert feature_network().name == "pixels"


def test_features_are_kept_by_what_they_are_of_and_computed_anew_where_damaged(graph, shelf, monkeypatch):
    monkeypatch.setattr(features_module, "BLOCK", 4)
    network, calls = graph_features(graph[0]), []
    compute = network.features
    monkeypatch.setattr(network, "features", lambda x: (calls.append(len(x)), compute(x))[1])
    x = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    told = []
    first = features_of(network, x, keep=True, progress=told.append)
    assert calls == [4, 2] and sum(told) == 6 and len(list((shelf / "kept").iterdir())) == 2
    assert torch.equal(features_of(network, x, keep=True, progress=told.append), first) and len(calls) == 2
    assert sum(told) == 12
    assert torch.equal(features_of(network, x[:4], keep=True), first[:4]) and len(calls) == 2
    changed = x.clone()
    changed[0, 0, 0, 0] += 1
    assert not torch.equal(features_of(network, changed, keep=True)[0], first[0]) and calls == [4, 2, 4]
    for file in (shelf / "kept").iterdir():
        file.write_bytes(b"torn")
    assert torch.equal(features_of(network, x, keep=True), first) and len(calls) == 5
    other = graph_features(shelf / "inception_mixed4.json")
    other.digest = "of other weights"
    monkeypatch.setattr(other, "features", lambda x: compute(x) + 1)
    assert torch.allclose(features_of(other, x, keep=True), first + 1)
    floats = x.float() / 127.5 - 1
    assert torch.equal(features_of(network, floats), first)


def test_a_cache_that_cannot_be_written_is_done_without(graph, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="features are not kept"):
        assert len(features_of(graph_features(graph[0]), torch.zeros(2, 3, 8, 8), keep=True)) == 2


# ------------------------------------------------------------------------------------------------------------ inception


@pytest.fixture
def fidelity(tmp_path, monkeypatch):
    """A stand-in for torch-fidelity, and torch's hub in a folder of its own, where nothing can be fetched."""

    class Extractor(torch.nn.Module):
        def __init__(self, name, features, weights):
            super().__init__()

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.float().mean((2, 3)),)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def fetch(url, to, hash_prefix):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"


def test_inception_is_the_published_one_and_holds_nothing_but_weights(fidelity, monkeypatch):
    with pytest.raises(UserError, match=r"cannot be had \(no network\); put it at .*6726825d\.pth"):
        feature_network("inception")
    torch.save({"w": torch.ones(2)}, fidelity)
    with pytest.raises(UserError, match="not that of published FIDs"):
        feature_network("inception")

    class Same(str):
        def startswith(self, _prefix):
            return True

    plain = hashlib.sha256
    monkeypatch.setattr(
        features_module.hashlib,
        "sha256",
        lambda data: types.SimpleNamespace(hexdigest=lambda: Same(plain(data).hexdigest())),
    )
    levels = torch.randint(0, 256, (2, 3, 5, 5))
    assert torch.allclose(feature_network("inception")(levels / 127.5 - 1), levels.float().mean((2, 3)))
    torch.save({"w": print}, fidelity)
    with pytest.raises(UserError, match="holds more than weights"):
        feature_network("inception")


def test_inception_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        feature_network("inception")
