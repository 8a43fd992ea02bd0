"""CUDA graphs (networks/graphs.py). What only a card can show is marked gpu."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from torch import nn

from genflow.config import load
from genflow.errors import UserError
from genflow.flows.models.glow import GlowConfig
from genflow.networks import graphs
from genflow.networks.graphs import WARM_UP, Recorded, record, record_training
from genflow.networks.mmdit import MMDiTConfig
from genflow.training.apply import record_steps
from genflow.training.config import RunConfig
from genflow.training.run import train

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


def test_the_same_tensors_in_other_places_are_another_kind_of_call(pretended):
    def function(x, y=None, *, shift=None):
        return 2 * x if y is None and shift is None else x * y if shift is None else x + shift

    call, x, y = recorded(function, pretended), torch.randn(3), torch.randn(3)
    with torch.no_grad():
        assert torch.equal(call(x, y), x * y) and torch.equal(call(x, shift=y), x + y)


def test_recordings_come_after_a_warm_up_and_share_their_memory(pretended, monkeypatch):
    pools, calls, graph = [], [], torch.cuda.graph
    monkeypatch.setattr(
        torch.cuda, "graph", lambda one, pool=None: pools.append((len(calls), pool)) or graph(one, pool)
    )
    call = recorded(lambda x: calls.append(len(x)) or x + 1, pretended)
    with torch.no_grad():
        call(torch.zeros(1)), call(torch.zeros(2))
    (first, none), (second, pool) = pools
    assert first == calls[:first].count(1) == WARM_UP and none is None and pool == "a pool"
    assert calls[:second].count(2) == WARM_UP


def test_what_denoises_is_recorded_and_otherwise_the_whole_network(monkeypatch):
    monkeypatch.setattr(graphs, "check_device", lambda device, asked: None)
    plain, denoising = nn.Linear(1, 1), nn.Linear(1, 1)
    denoising.denoise = denoising.forward
    for network in (plain, denoising):
        record(network, "--graphs")
    assert isinstance(plain.forward, Recorded) and not hasattr(plain, "denoise")
    assert isinstance(denoising.denoise, Recorded) and not isinstance(denoising.forward, Recorded)


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


def test_what_cannot_be_recorded_is_told_in_one_line(pretended, monkeypatch):
    @contextlib.contextmanager
    def refusing(graph, pool=None):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(torch.cuda, "graph", refusing)
    told = r"--graphs: this model cannot be recorded \(operation not .*capturing\)"
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


# -------------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def training_pretended(monkeypatch):
    """torch.cuda.make_graphed_callables without a card: what it reads and writes is in the same memory at every call."""
    recordings = []

    def make_graphed_callables(function, held, *, allow_unused_input, **_):
        assert allow_unused_input and not torch.is_autocast_enabled("cpu")
        inputs = [x for x in held if x.requires_grad]
        outputs, gradients = [], []

        def written(own, new):
            if not own:
                own.extend(x if x is None else x.detach().clone() for x in new)
            for mine, x in zip(own, new, strict=True):
                if mine is not None:
                    mine.copy_(x)
            return tuple(x if x is None else x.detach() for x in own)

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *given):
                for mine, x in zip(held, given, strict=True):
                    if mine.data_ptr() != x.data_ptr():
                        mine.data.copy_(x)
                with torch.enable_grad():
                    ctx.answer = function(*held)
                return written(outputs, (ctx.answer,))

            @staticmethod
            def backward(ctx, *grads):
                found = torch.autograd.grad(ctx.answer, inputs, grads[0], allow_unused=True)
                found = iter(written(gradients, found))
                return tuple(next(found) if x.requires_grad else None for x in held)

        recordings.append(held)
        return lambda *given: Graphed.apply(*given)[0]

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(graphs, "check_device", lambda device, asked: None)
    return recordings


class Scaled(nn.Module):
    """One parameter that some calls leave out."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x, *, shift=None, times=1):
        y = x * self.weight * times
        return y if shift is None else y + shift * self.bias


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("options", [{}, {"shift": 1}, {"shift": 1, "times": 3}])
def test_recorded_training_has_the_gradients_of_plain_calls(training_pretended, options, moving):
    plain, network = Scaled(), Scaled()
    record_training(network, "train.graphs")
    for _ in range(3):
        x = torch.randn(2, requires_grad=moving)
        own = {name: torch.randn(2) if name == "shift" else value for name, value in options.items()}
        both = []
        for each in (plain, network):
            each.zero_grad()
            x.grad = None
            each(x, **own).square().sum().backward()
            both.append([x.grad if x.grad is None else x.grad.clone(), each.weight.grad.clone(), each.bias.grad])
        for one, other in zip(*both, strict=True):
            assert one is other is None or torch.equal(one, other)
    assert len(training_pretended) == 1


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.ones(3), {}),
        (torch.ones(2).double(), {}),
        (torch.ones(2, requires_grad=True), {}),
        (torch.ones(2), {"times": 3}),
        (torch.ones(2), {"shift": torch.ones(2)}),
    ],
)
def test_a_call_of_another_kind_than_the_recorded_one_is_refused(training_pretended, x, options):
    network = Scaled()
    record_training(network, "train.graphs")
    network(torch.ones(2)).sum().backward()
    with pytest.raises(UserError, match="train.graphs: a call of other shapes than the first"):
        network(x, **options)


def test_a_recording_computes_in_the_autocast_of_its_call(training_pretended):
    network = nn.Linear(8, 8)
    record_training(network, "train.graphs")
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = network(torch.randn(2, 8))
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert network.weight.grad.dtype == torch.float32


def test_recorded_training_sums_the_gradients_of_micro_batches(training_pretended):
    network = Scaled()
    record_training(network, "train.graphs")
    batches = torch.randn(4, 3)
    for x in batches:
        network(x).sum().backward()
    torch.testing.assert_close(network.weight.grad, batches.sum())


def test_only_calls_that_train_are_recorded(training_pretended):
    network = Scaled()
    record_training(network, "train.graphs")
    with torch.no_grad():
        network(torch.ones(2))
    network.eval()
    network(torch.ones(2)).sum().backward()
    assert not training_pretended and network.weight.grad == 2


def test_a_second_call_before_the_backward_is_refused(training_pretended):
    network = Scaled()
    record_training(network, "train.graphs")
    first = network(torch.ones(2))
    with pytest.raises(UserError, match="train.graphs: this flow calls its network twice before one backward"):
        network(torch.ones(2))
    first.sum().backward()
    network(torch.ones(2)).sum().backward()


def test_answers_without_a_backward_hold_no_call_up_and_numbers_may_be_whole(training_pretended):
    network = Scaled().requires_grad_(False)
    record_training(network, "train.graphs")
    for _ in range(2):
        assert torch.equal(network(torch.tensor([1, 2])), torch.tensor([2.0, 4.0]))
    assert len(training_pretended) == 1


def test_a_run_of_recorded_steps_is_the_run_of_plain_ones(training_pretended, tmp_path):
    (tmp_path / "c.yaml").write_text(RUN)
    weights = []
    for way in ("false", "true"):
        run = train(load(tmp_path / "c.yaml", [f"out={tmp_path / way}", f"train.graphs={way}"], schema=RunConfig))
        weights.append((run / "checkpoints" / "step-00000004" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] and len(training_pretended) == 1


def test_what_cannot_be_recorded_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text(RUN)
    with pytest.raises(UserError, match="graphs cannot be had with checkpointing"):
        load(tmp_path / "c.yaml", ["train.graphs=true", "train.checkpointing=true"], schema=RunConfig)
    network, flow = Scaled(), GlowConfig(shape=(3, 8, 8), levels=1, steps=1, hidden=8, condition_dim=0).build()
    for more, words in (
        ({"network": network, "processes": 2, "one_shape": True}, "for one process, and these are 2"),
        ({"network": network, "processes": 1, "one_shape": False}, "for samples of one shape"),
        ({"network": flow, "processes": 1, "one_shape": True}, f"a {type(flow).__name__} is more than one function"),
    ):
        with pytest.raises(UserError, match=f"train.graphs.*{words}"):
            record_steps(**more)
    with pytest.raises(UserError, match="train.graphs records CUDA graphs, and this is cpu"):
        train(load(tmp_path / "c.yaml", [f"out={tmp_path / 'run'}", "train.graphs=true"], schema=RunConfig))


RUN = """
data: {name: emoji, size: 16, limit: 30}
text: {name: learned, dim: 16, heads: 2, layers: 1, max_tokens: 24}
model: {name: mmdit, depth: 2, hidden: 64, heads: 2, patch_size: 8}
train: {steps: 4, batch_size: 8, accumulation: 2, precision: fp32, preview_every: 0, trackers: []}
"""


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_recorded_run_on_a_card_is_the_run_of_plain_steps(tmp_path, compiled):
    (tmp_path / "c.yaml").write_text(RUN)
    losses = []
    for way in ("false", "true"):
        settings = ["train.precision=bf16", "train.log_every=1", f"train.compile={compiled}", f"train.graphs={way}"]
        run = train(load(tmp_path / "c.yaml", [f"out={tmp_path / way}", *settings], schema=RunConfig))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3)
