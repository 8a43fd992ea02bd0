"""The fused CPU kernels under torch.compile: the same kernels, the same numbers, one graph."""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from functools import partial, partialmethod

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from genflow.attention import Mask, attention
from genflow.attention.backends import many_graphs
from genflow.flows.bijections.autoregressive import InverseAutoregressive
from genflow.flows.bijections.continuous import CNF
from genflow.native import library as native
from genflow.networks.mmdit import JointBlock
from genflow.networks.token_transformer import TokenTransformerConfig
from genflow.training.apply import checkpointed, compile_blocks
from tests import test_kernels
from tests.noise import shaken
from tests.test_kernels import CASES

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler here")
HIDDEN, EAGERLY = 64, "aot_eager"  # the compiler's graphs, of torch's own operators: no C++ to wait for
PRECISIONS = [torch.float32, torch.bfloat16]


def reads_context() -> bool:
    """Whether this torch's compiler goes on through a ContextVar, which the choice of attention reads (2.10 does not)."""
    try:
        torch.compile(lambda x: x + CONTEXT.get(), backend="eager", fullgraph=True)(torch.ones(1))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


CONTEXT = ContextVar("context", default=1)
one_graph = pytest.mark.skipif(not reads_context(), reason="this torch breaks its graph at a ContextVar")


@pytest.fixture(autouse=True)
def no_graphs_of_others():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel was really called."""
    lib, found = native.library(), Counter()

    class Counting:
        def __getattr__(self, name):
            found[name] += name != "matrix_units"
            return getattr(lib, name)

    counting = Counting()
    monkeypatch.setattr(native, "library", lambda: counting)
    return found


def taken(calls):
    """What was called since the last time."""
    seen = +calls
    calls.clear()
    return seen


def close(got, expected, dtype):
    for a, b in zip(got, expected, strict=True):
        largest = float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=largest * (1e-5 if dtype == torch.float32 else 2**-6))


@pytest.mark.parametrize("case", [pytest.param(c, marks=one_graph) if "attention" in c else c for c in CASES])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_compiled_kernel_is_the_eager_one(case, dtype, calls, monkeypatch):
    expected, _ = test_kernels.run(case, dtype)
    eager = taken(calls)
    function, inputs, weights = CASES[case](dtype)
    compiled = torch.compile(function, backend=EAGERLY, fullgraph=True)
    monkeypatch.setitem(CASES, case, lambda _: (compiled, inputs, weights))
    got, output = test_kernels.run(case, dtype)
    assert "Compiled" in output.grad_fn.name() and taken(calls) == eager
    assert eager or case == "product"  # that is torch's own in float32
    close(got, expected, dtype)


@one_graph
@pytest.mark.skipif(not native.matrix_units(), reason="this processor does not multiply bf16")
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_attention_is_the_eager_one_also_of_a_tensor_with_itself(dynamic, calls):
    compiled = torch.compile(attention, backend=EAGERLY, fullgraph=True, dynamic=dynamic)
    for length in (5, 9):
        q, k = (torch.randn(2, length, 3, 32).bfloat16().transpose(1, 2).requires_grad_() for _ in range(2))
        for given, mask in (((q, k, k), None), ((q, q, q), Mask(causal=True))):
            answers = []
            for function in (compiled, attention):
                out = function(*given, mask)
                answers.append([out, *torch.autograd.grad(out.float().square().sum(), given[:2])])
                assert taken(calls) == {"attention_forward_bf16": 1, "attention_backward_bf16": 1}
            close(*answers, torch.bfloat16)


def block() -> JointBlock:
    torch.manual_seed(0)
    made = JointBlock(HIDDEN, 2, mlp_ratio=2, qk_norm=True, dual=True, context_pre_only=False, backend="auto")
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made


def step(block, batch, dtype):
    """Both streams after the block under autocast to dtype, and every gradient, or without gradients the streams alone."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(batch))
    inputs = [draw(batch, *shape).to(dtype) for shape in ((6, HIDDEN), (3, HIDDEN), (HIDDEN,))]
    leaves = [*(x.requires_grad_(torch.is_grad_enabled()) for x in inputs), *block.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        outputs = block(*inputs, None)
    if not torch.is_grad_enabled():
        return outputs
    return *outputs, *torch.autograd.grad(sum(o.float().square().mean() for o in outputs), leaves)


@one_graph
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_block_is_one_graph_of_the_same_kernels_for_every_batch_size(dtype, gradients, calls):
    plain, compiled = block(), block()
    compiled.compile(backend=EAGERLY, fullgraph=True)
    with torch.set_grad_enabled(gradients):
        for batch in (2, 3, 5):  # a graph for the first, one for any from the second on
            with torch._dynamo.config.patch(error_on_recompile=batch == 5):
                got = step(compiled, batch, dtype)
            own = taken(calls)
            close(got, step(plain, batch, dtype), dtype)
            assert own == taken(calls) and sum(own.values()) > 10


@one_graph
def test_a_checkpointed_block_computes_its_kernels_again(calls):
    plain, again = block(), torch.nn.Module()
    again.blocks = torch.nn.ModuleList([block()])
    checkpointed(again).blocks[0].compile(backend=EAGERLY, fullgraph=True)
    got = step(again.blocks[0], 2, torch.float32)
    twice = taken(calls)
    close(got, step(plain, 2, torch.float32), torch.float32)
    once = taken(calls)
    assert twice["norm_forward_f32"] == 2 * once["norm_forward_f32"]
    assert twice["norm_backward_f32"] == once["norm_backward_f32"] > 0


@pytest.fixture
def without_compiler(monkeypatch):
    """Graphs alone."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))


@one_graph
@pytest.mark.skipif(not many_graphs(), reason="this torch has one number of graphs for all that is compiled")
def test_blocks_stay_compiled_beyond_torch_s_usual_number_of_graphs(without_compiler):
    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList([block()])
    compile_blocks(network)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                step(network.blocks[0], 2, torch.float32)
                step(network.blocks[0], 3, torch.float32)


@one_graph
def test_all_layers_of_a_cache_are_one_graph(without_compiler):
    sizes = {"vocabulary": 5, "grid": (2, 2), "width": 8, "context_dim": 0}

    def graphs(layers):
        torch._dynamo.reset()
        counters.clear()
        network = TokenTransformerConfig(**sizes, layers=layers).build()
        compile_blocks(network)
        cache = network.cache(1, 4)
        with torch.no_grad():
            for _ in range(4):
                network.read(torch.ones(1, 1, 8), cache, 0)
        return counters["stats"]["unique_graphs"]

    assert graphs(5) == graphs(3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_what_the_compiler_writes_calls_them_too(dtype, calls):
    plain, compiled = block(), torch.nn.Module()
    compiled.blocks = torch.nn.ModuleList([block()])
    compile_blocks(compiled)
    for batch in (2, 3):
        got = step(compiled.blocks[0], batch, dtype)
        own = taken(calls)
        close(got, step(plain, batch, dtype), dtype)
        assert own == taken(calls)


def test_operators_tell_the_truth_of_their_shapes_and_leave_their_arguments_alone(monkeypatch):
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "genflow":
                seen.append((op, args))
            return op(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Seen():
        for case in CASES:
            for dtype in PRECISIONS:
                test_kernels.run(case, dtype)
        q = torch.randn(2, 3, 5, 32).bfloat16().requires_grad_()
        attention(q, q, q).sum().backward()
    monkeypatch.undo()
    if native.matrix_units():
        assert {op.name() for op, _ in seen} == native.OPERATORS._op_defs
    for op, args in seen:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_takes_the_plain_formula_and_runs_without_us(strict):
    class Normed(torch.nn.Module):
        def forward(self, *tensors):
            return test_kernels.modulated_norm(*tensors)

    inputs = tuple(x.detach() for x in test_kernels.modulation_views(torch.float32)[:3])
    exported = torch.export.export(Normed(), inputs, strict=strict)
    assert not any("genflow" in str(node.target) for node in exported.graph.nodes)
    close(exported.module()(*inputs), test_kernels.modulated_norm(*inputs), torch.float32)


@pytest.mark.parametrize(
    "make", [partial(InverseAutoregressive, hidden=(4,)), partial(CNF, solver="midpoint", steps=1)]
)
def test_flows_that_are_differentiated_by_hand_train_beside_a_compiler(make):
    torch.manual_seed(0)
    flow, x = shaken(make((2,)), 0.3), torch.randn(4, 2)

    def gradients(call):
        z, ladj = call(x)
        return torch.autograd.grad(z.square().sum() - ladj.sum(), list(flow.parameters()))

    torch.testing.assert_close(gradients(torch.compile(flow, backend=EAGERLY)), gradients(flow))
