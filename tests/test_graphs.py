"""CUDA graphs for sampling (networks/graphs.py). What only a card can show is marked gpu."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from genflow.errors import UserError
from genflow.networks.graphs import Recorded, record
from genflow.networks.mmdit import MMDiTConfig

SIZES = {"in_channels": 4, "context_dim": 32, "pooled_dim": 16, "sample_size": 8, "depth": 2, "hidden": 128, "heads": 2}


@pytest.fixture
def pretended(monkeypatch):
    """CUDA graphs as far as they can be had without a card: a replay computes again, into the tensors of the recording."""
    recording = []

    class Graph:
        def __init__(self):
            self.replays = 0

        def pool(self):
            return "a pool"

        def replay(self):
            self.replays += 1
            for out, new in zip(self.answer, self.again(), strict=True):
                out.copy_(new)

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(graph, pool=None):
        recording.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return recording


def recorded(function, graphs):
    """The function recorded, its last call in a recording being what the graph does again."""

    def watched(x, *rest, **options):
        answer = function(x, *rest, **options)
        if graphs and not hasattr(graphs[-1], "again"):
            graphs[-1].answer, graphs[-1].again = [answer], lambda: [function(x, *rest, **options)]
        return answer

    return Recorded(watched, "--graphs")


def test_one_recording_for_each_kind_of_call(pretended):
    call = recorded(lambda x, scale, *, shift=None: x * scale + (0 if shift is None else shift), pretended)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 3)
            assert torch.equal(call(x, 2.0), x * 2)
        assert len(pretended) == 1 and pretended[0].replays == 3
        x, shift = torch.randn(2, 3), torch.randn(3)
        assert torch.equal(call(x, 2.0, shift=shift), x * 2 + shift)  # another number of tensors
        assert torch.equal(call(x, 3.0), x * 3)  # another number
        assert torch.equal(call(x.double(), 2.0), x.double() * 2)  # another dtype
        assert torch.equal(call(x[:1], 2.0), x[:1] * 2)  # another shape
        assert len(pretended) == 5
        y = torch.randn(2, 3)
        assert torch.equal(call(y, 2.0), y * 2)
        assert len(pretended) == 5 and pretended[0].replays == 4


def test_answers_and_arguments_are_the_callers_own(pretended):
    call = recorded(lambda x: x + 1, pretended)
    with torch.no_grad():
        x = torch.zeros(3)
        first = call(x)
        second = call(torch.full((3,), 5.0))
    assert torch.equal(first, torch.ones(3)) and torch.equal(second, torch.full((3,), 6.0))
    assert torch.equal(x, torch.zeros(3))


def test_gradients_go_past_the_recording(pretended):
    call = recorded(lambda x: x.square(), pretended)
    x = torch.tensor(3.0, requires_grad=True)
    call(x).backward()
    assert x.grad == 6 and not pretended


def test_what_waits_for_the_device_is_told_in_one_line(pretended, monkeypatch):
    @contextlib.contextmanager
    def refusing(graph, pool=None):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(torch.cuda, "graph", refusing)
    told = r"--graphs: this model waits for the device \(operation not .*capturing\)"
    with pytest.raises(UserError, match=told), torch.no_grad():
        Recorded(lambda x: x, "--graphs")(torch.zeros(1))


def test_other_devices_are_refused():
    with pytest.raises(UserError, match="--graphs records CUDA graphs, and this is cpu"):
        record(nn.Linear(2, 2), "--graphs")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_network_answers_as_before(compiled):
    torch.manual_seed(0)
    model = MMDiTConfig(**SIZES).build().cuda().eval()
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    if compiled:
        for block in model.blocks:
            block.compile()
    calls = []
    for _ in range(3):
        x, context = torch.randn(2, 4, 16, 16, device="cuda"), torch.randn(2, 5, 32, device="cuda")
        calls.append((x, torch.rand(2, device="cuda"), context, torch.randn(2, 16, device="cuda")))
    mask = torch.ones(2, 5, dtype=torch.bool, device="cuda")
    with torch.no_grad():
        expected = [(model(*call), model(*call, context_mask=mask)) for call in calls]
        record(model, "--graphs")
        got = [(model(*call), model(*call, context_mask=mask)) for call in calls]
    for pair, answers in zip(expected, got, strict=True):
        for one, other in zip(pair, answers, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
