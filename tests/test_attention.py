"""The attention call: a choice of backend that never surprises, whoever makes it."""

from __future__ import annotations

import threading

import pytest
import torch

from genflow import registry
from genflow.attention import (
    Attention,
    Call,
    Mask,
    attention,
    attention_backend,
    attention_report,
    backends,
    choose,
    dispatch,
)
from genflow.attention.backends import _revived
from genflow.attention.dispatch import ORDER
from genflow.cli import main
from genflow.errors import UserError
from genflow.networks.mmdit import MMDiTConfig
from tests.test_compile import one_graph

CPU = Call("cpu", torch.float32, 16, needs=frozenset({"backward"}))
SIZES = {"in_channels": 1, "context_dim": 4, "pooled_dim": 4, "sample_size": 2, "depth": 1, "hidden": 32, "heads": 2}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing said by the environment, and a way to say something."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)

    def say(name: str) -> None:
        monkeypatch.setenv(dispatch.VARIABLE, name)
        forget()

    def forget() -> None:
        dispatch.environment.cache_clear()
        dispatch._chosen.cache_clear()

    forget()
    yield say
    monkeypatch.undo()
    forget()


def used(**options) -> str:
    """The backend that a call took, by the mark that it leaves in the graph."""
    q = torch.randn(1, 1, 3, 8, requires_grad=True)
    mark = type(attention(q, q, q, **options).grad_fn).__name__
    return {"ScaledDotProductFlashAttentionForCpuBackward0": "sdpa", "_TiledBackward": "tiled"}.get(mark, "math")


def test_the_nearest_word_is_the_strongest(environment):
    assert used() == "sdpa"
    environment("math")
    assert used() == "math"
    assert used(default="tiled") == "tiled"
    with attention_backend("math"):
        assert used(default="tiled") == "math"
        assert used(default="tiled", backend="sdpa") == "sdpa"
        with attention_backend("tiled"):
            assert used(default="sdpa") == "tiled"
        assert used(default="sdpa") == "math"
    assert used(default="tiled") == "tiled"


def test_auto_leaves_the_choice_to_the_next():
    with attention_backend("tiled"), attention_backend("auto"):
        assert used(backend="auto") == "tiled"
        assert used(backend="auto", default="auto") == "tiled"


def test_a_context_ends_with_its_block_also_by_an_error():
    with pytest.raises(RuntimeError), attention_backend("tiled"):
        raise RuntimeError
    assert used() == "sdpa"


def test_a_context_is_its_thread_s_own():
    inside, outside, seen = threading.Event(), threading.Event(), {}

    def other():
        seen["before"] = used()
        with attention_backend("math"):
            inside.set()
            outside.wait(10)
            seen["within"] = used()

    with attention_backend("tiled"):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
        seen["here"] = used()
        outside.set()
        thread.join()
    assert seen == {"before": "sdpa", "within": "math", "here": "tiled"}


def test_what_is_needed_can_be_said_by_the_context():
    with attention_backend(needs=["double_backward"]):
        assert used() == "math"
        with attention_backend(needs="forward_ad"):
            assert used() == "math"
        with pytest.raises(UserError, match="'sdpa' cannot serve this call: has no double backward"):
            used(default="sdpa")
    assert used() == "sdpa"


def test_needs_are_served():
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    out = attention(x, x, x, Mask(causal=True), needs=frozenset({"double_backward"}))
    (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(g.square().sum(), x)[0].abs().sum() > 0
    call = lambda q: attention(q, q, q, Mask(causal=True), needs=frozenset({"forward_ad"}))
    x, t = x.detach().double(), torch.randn(1, 1, 3, 4).double()
    _, tangent = torch.func.jvp(call, (x,), (t,))
    assert torch.allclose(tangent, (call(x + 1e-6 * t) - call(x - 1e-6 * t)) / 2e-6, atol=1e-6)


def test_fused_attention_has_neither_still():
    """When this fails, torch has learned it: sdpa can offer more."""
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    (g,) = torch.autograd.grad(attention(x, x, x, backend="sdpa").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(g.square().sum(), x)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda q: attention(q, q, q, backend="sdpa_flash"), (x.detach(),), (torch.ones_like(x),))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_any_of_the_three_can_ask_for_a_gradient():
    q, k, v = (torch.randn(1, 1, 3, 16) for _ in range(3))
    for x in (q, k, v):
        x.requires_grad_()
        with pytest.raises(UserError, match="'flex' cannot serve this call: has no backward on cpu"):
            attention(q, k, v, backend="flex")
        with torch.no_grad():
            assert attention(q, k, v, backend="flex").allclose(attention(q, k, v), atol=1e-6)
        x.requires_grad_(False)


def test_an_explicit_choice_that_cannot_serve_is_refused_with_all_reasons():
    with pytest.raises(UserError) as caught:
        attention(*(torch.randn(1, 1, 2, 12),) * 3, Mask(dense=torch.eye(2).bool()), backend="xformers")
    text = str(caught.value)
    assert "\n" not in text
    for reason in ("runs on cuda, not on cpu", "not float32", "multiples of 8, not 12", "not dense"):
        assert reason in text


def test_unknown_names_are_told_the_nearest(environment):
    with pytest.raises(UserError, match="'sdap' is unknown. Did you mean 'sdpa'"):
        used(backend="sdap")
    with pytest.raises(UserError, match="'tield' is unknown. Did you mean 'tiled'"), attention_backend("tield"):
        pass
    with (
        pytest.raises(UserError, match="'double' is unknown|'double'. Did you mean"),
        attention_backend(needs="double"),
    ):
        pass
    environment("meth")
    with pytest.raises(UserError, match="environment variable GENFLOW_ATTENTION: .*'meth'.*'math'"):
        used()


def test_mixed_dtypes_are_refused_and_cast_under_autocast():
    q = torch.randn(1, 1, 3, 8)
    with pytest.raises(UserError, match="q is float32, k float32, v bfloat16; cast them alike"):
        attention(q, q, q.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in ("sdpa", "math", "tiled"):
            out = attention(q, q, q.bfloat16(), backend=backend)
            assert out.dtype == torch.bfloat16
            assert torch.allclose(out.float(), attention(q, q, q).float(), atol=0.03)
        assert attention(*(q.double(),) * 3).dtype == torch.float64


def test_shapes_alone_can_be_followed():
    q = torch.empty(2, 3, 5, 8, device="meta")
    assert attention(q, q, q).shape == q.shape


def test_every_capability_is_looked_at():
    base = {"name": "x", "fn": lambda q, k, v, mask, scale: v}
    limits = [
        {"available": lambda: "is not installed"},
        {"devices": frozenset({"cuda"})},
        {"dtypes": frozenset({torch.float16})},
        {"max_head_dim": 8},
        {"head_dim_multiple": 32},
        {"masks": ("causal",)},
        {"offers": frozenset()},
        {"limits": lambda call: ["has no such kernel"]},
    ]
    assert not Attention(**base).refusals(CPU)
    for limit in limits:
        assert len(Attention(**base, **limit).refusals(CPU)) == 1, limit


def test_auto_takes_the_fused_kernel_unless_more_is_needed():
    assert choose("auto", CPU).name == "sdpa"
    for need in ("double_backward", "forward_ad"):
        assert choose("auto", CPU._replace(needs=frozenset({need}))).name == "math"


def test_the_report_names_every_backend():
    named = {
        "sdpa",
        "sdpa_flash",
        "sdpa_efficient",
        "sdpa_cudnn",
        "math",
        "tiled",
        "flex",
        "varlen",
        "flash",
        "xformers",
    }
    assert set(attention_report(CPU)) == set(registry.names("attention")) >= named >= {*ORDER}
    assert not attention_report(CPU)["math"] and attention_report(CPU)["varlen"]


def test_cuda_backends_say_on_this_machine_what_they_lack(monkeypatch):
    monkeypatch.setattr("genflow.attention.backends.capability", lambda: (7, 5))
    call = Call("cuda", torch.bfloat16, 300, "dense", 4, 5, frozenset({"backward"}))
    report = attention_report(call)
    for name in ("sdpa_flash", "sdpa_cudnn", "varlen", "flash", "xformers"):
        assert any("compute capability 8.0, not 7.5" in reason for reason in report[name]), name
        assert any("head_dim up to" in reason for reason in report[name]), name
    assert any("not dense" in reason for reason in report["sdpa_flash"])
    causal = attention_report(call._replace(mask="causal"))["sdpa_flash"]
    assert any("as many queries as keys only, not 4 and 5" in reason for reason in causal)
    assert attention_report(call)["sdpa_efficient"] == ["takes head_dim in multiples of 8 in bfloat16, not 300"]
    assert not attention_report(call._replace(head_dim=304))["sdpa_efficient"]
    assert attention_report(call._replace(lk=1))["sdpa_cudnn"][-1] == "needs a card of compute capability 8.0, not 7.5"
    assert "takes two keys or more, not 1" in attention_report(call._replace(lk=1))["sdpa_cudnn"]


def test_rows_without_a_live_key_are_set_aside_where_kernels_differ():
    live, dead = _revived(torch.tensor([[True, False], [False, False]]))
    assert live.tolist() == [[True, False], [True, True]] and dead.tolist() == [[False], [True]]


def test_one_kernel_that_torch_does_not_have_is_told():
    from genflow.attention.backends import _one_kernel

    q = torch.randn(1, 1, 3, 8)
    with pytest.raises(UserError, match="'sdpa_cudnn': torch has no such kernel"):
        _one_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION, "sdpa_cudnn")(q, q, q, Mask(), None)


@one_graph
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_follows_the_context_and_every_mask(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (5, 6, 7) if dynamic else (5,):
        q = torch.randn(2, 2, length, 8, requires_grad=True)
        for mask in (None, Mask(causal=True), Mask(keys=torch.rand(2, length) < 0.7)):
            got, expected = compiled(q, q, q, mask), attention(q, q, q, mask)
            g = torch.randn_like(got)
            assert torch.allclose(got, expected, atol=1e-6)
            assert torch.allclose(*(torch.autograd.grad(o, q, g)[0] for o in (got, expected)), atol=1e-5)
    q = q.detach()
    with attention_backend("xformers"), pytest.raises(Exception, match="cannot serve"):
        compiled(q, q, q, None)
    assert torch.allclose(compiled(q, q, q, None), attention(q, q, q), atol=1e-6)
    torch._dynamo.reset()


@one_graph
def test_a_compiled_block_serves_every_mask_of_a_kind():
    """Each step has a new mask: one graph must do for all."""
    torch._dynamo.reset()
    block = MMDiTConfig(**SIZES).build().blocks[0]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    steps = [[torch.randn(2, 4, 32), torch.randn(2, 3, 32), torch.randn(2, 32)] for _ in range(3)]
    masks = [Mask(keys=torch.rand(2, 7) < 0.7) for _ in steps]
    compiled(*steps[0], masks[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for inputs, mask in zip(steps, masks, strict=True):
            for got, expected in zip(compiled(*inputs, mask), block(*inputs, mask), strict=True):
                assert torch.allclose(got, expected, atol=1e-6)
    torch._dynamo.reset()


def test_a_model_s_choice_is_its_own():
    inputs = torch.randn(1, 1, 4, 4), torch.rand(1), torch.randn(1, 3, 4), torch.randn(1, 4)
    mask = torch.tensor([[True, True, False]])
    refused = MMDiTConfig(**SIZES, attention="xformers").build()
    with pytest.raises(UserError, match="xformers"):
        refused(*inputs)
    with attention_backend("math"):
        refused(*inputs)  # the context is nearer than the config
    models = [MMDiTConfig(**SIZES, attention=name).build() for name in ("auto", "math", "tiled", "sdpa_flash")]
    for p in zip(*(model.parameters() for model in models), strict=True):
        p[0].data.normal_(0, 0.2)
        for other in p[1:]:
            other.data.copy_(p[0].data)
    for options in ({}, {"context_mask": mask}):
        first, *others = (model(*inputs, **options) for model in models)
        for other in others:
            assert torch.allclose(first, other, atol=1e-5)


def test_info_attention_says_what_is_chosen_and_why_not_the_others(capsys):
    assert main(["info", "attention"]) == 0
    text = capsys.readouterr().out
    table = text.partition("the others")[2].partition("what each")[0].splitlines()[1:]
    lines = {line.split()[0]: line for line in table if line}
    assert {*lines} == {*registry.names("attention")}
    assert "chosen" in lines[choose("auto", CPU).name] and "could serve" in lines["math"]
    if not torch.cuda.is_available():
        for reason in ("cannot be imported", "runs on cuda, not on cpu", "takes bfloat16/float16, not float32"):
            assert reason in lines["xformers"]
    assert "backward, double backward, forward ad" in text
    assert main(["info", "system"]) == 0
    assert "attention: sdpa (" in capsys.readouterr().out


def test_info_attention_heeds_the_environment(capsys, environment):
    environment("math")
    assert main(["info", "attention"]) == 0
    out = capsys.readouterr().out
    assert "as the environment says: GENFLOW_ATTENTION=math" in out and "math                  chosen" in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3, 6, 32), (2, 1, 6, 32), (2, 1, 6, 32)],
        [(2, 3, 6, 32), (1, 3, 6, 32), (1, 3, 6, 32)],
        [(2, 3, 6, 32), (2, 3, 9, 32), (2, 3, 5, 32)],
        [(2, 3, 6, 32), (2, 3, 6, 16), (2, 3, 6, 16)],
        [(3, 6, 32), (3, 6, 32), (3, 6, 32)],
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(shapes, dtype):
    with pytest.raises(UserError, match="all are B x heads x L x head_dim"):
        attention(*(torch.randn(shape, dtype=dtype) for shape in shapes))


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash", "math", "tiled", "flex"])
@pytest.mark.parametrize(("lq", "lk"), [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_no_queries_or_no_keys_give_zeros(backend, lq, lk, causal):
    q, k, v = (torch.randn(2, 2, n, 8) for n in (lq, lk, lk))
    out = attention(q, k, v, Mask(causal=causal), backend=backend)
    assert out.shape == q.shape and not out.any()
    for x in (q, k, v):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(attention(q, k, v, Mask(causal=causal)).sum(), x)
        x.requires_grad_(False)
        assert grad.shape == x.shape and not grad.any()


def test_a_mask_serves_several_devices():
    mask = Mask(causal=True)
    for device in ("cpu", "meta", "cpu"):
        assert mask.full(torch.empty(1, 1, 4, 8, device=device), 4, 6).device.type == device


def test_genflow_s_kernel_is_of_sdpa_alone_and_a_named_kernel_is_torch_s(monkeypatch):
    ours = []
    monkeypatch.setattr(backends, "serves", lambda *tensors: True)
    monkeypatch.setattr(backends, "run", lambda function, q, k, v, *rest: ours.append(function) or q)
    q = torch.randn(1, 2, 4, 32)
    attention(q, q, q, backend="sdpa_flash")
    assert not ours
    attention(q, q, q, backend="sdpa")
    assert ours == [backends.MatrixAttention]


def test_what_an_outer_context_needs_holds_within_an_inner_one():
    with attention_backend(needs="double_backward"):
        with attention_backend("auto"):
            assert used() == "math"
        with attention_backend("sdpa"), pytest.raises(UserError, match="has no double backward"):
            used()
