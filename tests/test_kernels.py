"""The fused CPU kernels against the plain formulas they stand for."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

from genflow.layers.kernels import gelu_backward, trains_on_matrix_units, weight_gradient
from genflow.layers.modulation import (
    QKV,
    Linear,
    gated_residual,
    gelu,
    joint_attention,
    joint_heads,
    modulated_norm,
    norm_beside,
)
from genflow.native import library as kernels

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler here")
B, L, H = 3, 5, 48


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).mul(2).to(dtype).requires_grad_() for s in shapes]


def linear(inner: int, dtype: torch.dtype) -> Linear:
    """With weights that bf16 can hold, so that every dtype has the same."""
    torch.manual_seed(2)
    made = Linear(inner, H)
    torch.nn.init.normal_(made.bias, 0.0, 0.5)
    return made.bfloat16().to(dtype)


def streams(dtype: torch.dtype, *, norm: bool) -> tuple[list[QKV], list[torch.Tensor]]:
    torch.manual_seed(1)
    parts = [QKV(H, 3, qk_norm=norm) for _ in range(2)]
    for part in parts:
        torch.nn.init.normal_(part.linear.bias, 0.0, 0.5)
        for w in (part.q_norm, part.k_norm):
            if w is not None:
                torch.nn.init.normal_(w, 1.0, 0.3)
    return [part.bfloat16().to(dtype) for part in parts], tensors((B, L, H), (B, 2, H), dtype=dtype)


def _product_case(dtype):
    torch.manual_seed(2)
    made = Linear(64, 96).bfloat16().to(dtype)
    return partial(made, bias=False), tensors((2, 600, 64), dtype=dtype), [made.weight]


def modulation_views(dtype: torch.dtype) -> list[torch.Tensor]:
    """x, shift, scale: the vectors as a Modulation gives them, views with a stride of their own."""
    x, packed = tensors((B, L, H), (B, 6 * H), dtype=dtype)
    chunks = packed[:, None].chunk(6, dim=-1)
    return [x, chunks[2], chunks[3], packed]


def _gate_case(dtype):
    last = linear(2 * H, dtype)
    inputs = tensors((B, L, H), (B, 1, H), (B, L, 2 * H), dtype=dtype)
    return lambda x, gate, y: gated_residual(x, gate, last, y), inputs, [last.bias, last.weight]


def _gelu_case(dtype):
    first = linear(H, dtype)
    return lambda x: gelu(first, x), tensors((B, L, H), dtype=dtype), [first.bias, first.weight]


def _heads_case(dtype, *, norm, function=joint_heads):
    parts, xs = streams(dtype, norm=norm)
    return (
        lambda *xs: function(list(zip(parts, xs, strict=True))),
        xs,
        [p for part in parts for p in part.parameters()],
    )


CASES = {
    "norm": lambda dtype: (modulated_norm, modulation_views(dtype)[:3], []),
    "norm beside": lambda dtype: (norm_beside, modulation_views(dtype)[:3], []),
    "gate": _gate_case,
    "gelu": _gelu_case,
    "heads": lambda dtype: _heads_case(dtype, norm=False),
    "product": _product_case,
    "normed heads": lambda dtype: _heads_case(dtype, norm=True),
    "attention": lambda dtype: _heads_case(dtype, norm=False, function=joint_attention),
    "normed attention": lambda dtype: _heads_case(dtype, norm=True, function=joint_attention),
}


def run(case, dtype):
    """Outputs and all gradients, flat, in float64."""
    function, inputs, weights = CASES[case](dtype)
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, [*inputs, *weights], cotangents)
    return [t.detach().double() for t in (*outputs, *grads)], outputs[0]


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_plain_formula(case, monkeypatch):
    fused, _ = run(case, torch.float32)
    monkeypatch.setattr(kernels, "usable", lambda *_: False)
    exact, _ = run(case, torch.float64)
    for got, expected in zip(fused, exact, strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 3e-6 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_no_worse_than_the_plain_formula(case, monkeypatch):
    fused, _ = run(case, torch.bfloat16)
    exact_inputs = [t.detach().double() for t in CASES[case](torch.bfloat16)[1]]
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "usable", lambda *_: False)
        plain, _ = run(case, torch.bfloat16)
        original = CASES[case]

        def in_float64(_dtype):
            function, _, weights = original(torch.float64)
            return function, [t.clone().requires_grad_() for t in exact_inputs], weights

        patch.setitem(CASES, case, in_float64)
        exact, _ = run(case, torch.float64)
    for got, other, expected in zip(fused, plain, exact, strict=True):
        small = 2**-8 * expected.abs().max()
        assert (got - expected).abs().max() <= 2 * (other - expected).abs().max() + small


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_same_kernel_runs_and_nothing_is_kept(case, dtype, monkeypatch):
    function, inputs, _ = CASES[case](dtype)
    expected = function(*inputs)
    monkeypatch.setattr(torch.autograd.Function, "apply", lambda *_: pytest.fail("autograd was asked"))
    with torch.no_grad():
        got = function(*inputs)
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (expected, got)), strict=True):
        assert torch.equal(a, b) and b.grad_fn is None


def test_forward_mode_derivatives_are_refused_not_lost():
    x, shift, scale = modulation_views(torch.float32)[:3]
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(RuntimeError, match="jvp"):
            modulated_norm(dual, shift.detach(), scale.detach())


def test_the_kernels_are_what_runs():
    (x,) = tensors((B, L, H), dtype=torch.float32)
    assert "GELU" in gelu(linear(H, torch.float32), x).grad_fn.name()
    assert "ModulatedNorm" in modulated_norm(*modulation_views(torch.float32)[:3]).grad_fn.name()
    assert not kernels.usable(x.double()) and not kernels.usable(x, x.bfloat16()) and not kernels.usable(x.to("meta"))


@pytest.mark.parametrize(
    "case", [case for case in CASES if "attention" not in case]
)  # there it is asked of the backend
def test_double_backward_is_that_of_the_plain_formula(case, monkeypatch):
    def second_order():
        function, inputs, weights = CASES[case](torch.float32)
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((o**2 * torch.linspace(0, 1, o.numel()).view_as(o)).sum() for o in outputs)
        first = torch.autograd.grad(loss, [*inputs, *weights], create_graph=True)
        return torch.autograd.grad(sum((g**3).sum() for g in first), [*inputs, *weights])

    fused = second_order()
    monkeypatch.setattr(kernels, "usable", lambda *_: False)
    for got, expected in zip(fused, second_order(), strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_gradient_that_can_be_differentiated_counts_what_is_used_twice_as_one_that_cannot():
    layer, (x,) = linear(H, torch.float32), tensors((B, L, H), dtype=torch.float32)
    loss = gelu(layer, gelu(layer, x)).square().sum()
    weights = [x, layer.weight, layer.bias]
    once = torch.autograd.grad(loss, weights, retain_graph=True)
    for got, expected in zip(torch.autograd.grad(loss, weights, create_graph=True), once, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_many_cotangents_at_once_are_as_one_by_one(case, dtype):
    function, inputs, _ = CASES[case](dtype)
    outputs = function(*inputs)
    output = outputs[0] if isinstance(outputs, tuple) else outputs
    many = torch.randn(3, *output.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    grad = partial(torch.autograd.grad, output, inputs[:1], retain_graph=True)
    (got,), each = grad(many, is_grads_batched=True), torch.stack([grad(g)[0] for g in many])
    assert (got - each).abs().max() <= (2**-6 if dtype == torch.bfloat16 else 1e-5) * each.abs().max()


class Pair(torch.autograd.Function):
    """Both as they are; the gradient of one that nobody uses is zeros, the same for all cotangents."""

    @staticmethod
    def forward(ctx, a, b):
        return a.clone(), b.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads


@pytest.mark.parametrize("used", [0, 1])
def test_many_cotangents_may_come_to_a_norm_or_to_what_is_beside_it_alone(used):
    inputs = modulation_views(torch.float32)[:3]
    output = Pair.apply(*norm_beside(*inputs))[used]
    many = torch.randn(3, *output.shape, generator=torch.Generator().manual_seed(3))
    grad = partial(torch.autograd.grad, output, inputs, retain_graph=True)
    each = [torch.stack(grads) for grads in zip(*map(grad, many), strict=True)]
    for got, expected in zip(grad(many, is_grads_batched=True), each, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def identity() -> Linear:
    made = Linear(H, H)
    torch.nn.init.eye_(made.weight)
    torch.nn.init.zeros_(made.bias)
    return made


def test_nan_and_inf_go_through():
    for dtype in (torch.float32, torch.bfloat16):
        x, shift, scale, _ = (t.detach() for t in modulation_views(dtype))
        same = identity().to(dtype)
        x[1, 2, 3] = float("nan")
        assert modulated_norm(x, shift, scale)[1, 2].isnan().all()
        assert modulated_norm(x, shift, scale)[[0, 2]].isfinite().all()
        assert gelu(same, x)[1, 2, 3].isnan() and gated_residual(x, shift, same, x)[1, 2, 3].isnan()
        high = torch.full((1, 1, H), 1e30).to(dtype)
        assert torch.equal(gelu(same, high), high) and gelu(same, -high).abs().max() < 1e-7


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_a_hook_kept_of_a_product_stays_as_it_was(everywhere):
    layer, kept = linear(H, torch.float32), []
    register = torch.nn.modules.module.register_module_forward_hook if everywhere else layer.register_forward_hook
    hook = register(lambda module, inputs, output: kept.append(output))
    (x,) = tensors((B, L, H), dtype=torch.float32)
    with torch.no_grad():
        gelu(layer, x)
        hook.remove()
        torch.testing.assert_close(kept[0], torch.nn.functional.linear(x, layer.weight))


def test_gelu_is_accurate_everywhere():
    x = torch.linspace(-12, 12, 2400 * H).view(1, -1, H)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert (gelu(identity(), x) - exact).abs().max() <= 1e-6


@pytest.mark.skipif(not kernels.matrix_units(), reason="this processor does not multiply bf16")
@pytest.mark.parametrize("rows", [0, 1, 33, 700])
def test_the_gradient_of_a_weight_is_a_sum_in_float32(rows):
    made = Linear(64, 96)
    x, g = torch.randn(rows, 96).bfloat16()[:, 16:80], torch.randn(rows, 96).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x, bias=False)
    y.backward(g)
    assert "Product" in y.grad_fn.name() and torch.equal(y, (x @ made.weight.bfloat16().T))
    exact = g.double().T @ x.double()
    assert made.weight.grad.dtype == torch.float32
    torch.testing.assert_close(made.weight.grad.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not kernels.matrix_units(), reason="this processor does not multiply bf16")
@pytest.mark.parametrize("outputs, inputs", [(32, 32), (64, 96), (160, 64), (32, 1088), (1056, 544)])
@pytest.mark.parametrize("rows", [1, 31, 257, 700])
def test_any_number_of_threads_makes_the_whole_gradient_of_a_weight(outputs, inputs, rows):
    """More of them than there are parts, too, and of columns that lie in wider rows."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(rows, outputs + 5, generator=generator).bfloat16()[:, 3:-2]
    x = torch.randn(rows, inputs + 24, generator=generator).bfloat16()[:, 16:-8]
    before, made = torch.get_num_threads(), []  # all are kept: none finds the numbers of another in its memory
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            made.append(weight_gradient(g, x))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(made[0].double(), g.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    assert all(torch.equal(made[0], more) for more in made[1:])


@pytest.mark.skipif(not kernels.matrix_units(), reason="this processor does not multiply bf16")
def test_the_slope_of_gelu_is_one_far_out():
    x = torch.tensor([1e15, -1e15, 100.0, -100.0]).bfloat16().repeat(H // 4).view(1, 1, H)
    dx, _ = gelu_backward(torch.ones_like(x), x, torch.zeros(H))
    assert torch.equal(dx, (x > 0).to(x.dtype))


@pytest.mark.skipif(not kernels.matrix_units(), reason="this processor does not multiply bf16")
def test_gradients_are_float32_whatever_the_default_is():
    g, x = torch.randn(40, 64).bfloat16(), torch.randn(40, 32).bfloat16()
    expected = weight_gradient(g, x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(weight_gradient(g, x), expected) and weight_gradient(g, x).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_autocast_takes_the_plain_formula():
    x = torch.randn(B, L, H)
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.usable(x) and kernels.usable(x.bfloat16())
        assert gelu(linear(H, torch.float32), x).dtype == torch.bfloat16


@pytest.mark.parametrize("case", [case for case in CASES if case != "product"])  # in float32 that is torch's own
def test_the_number_of_threads_changes_nothing(case, monkeypatch):
    """In our kernels: torch's own products, which may add up in another order, are made in float64."""
    linear, before = torch.nn.functional.linear, torch.get_num_threads()
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b: linear(x.double(), w.double(), b).to(x.dtype))
    try:
        torch.set_num_threads(1)
        expected, _ = run(case, torch.float32)
        torch.set_num_threads(2)
        got, _ = run(case, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_without_a_compiler_the_plain_formula_serves(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path))
    kernels.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cannot be built, going on slower"):
            assert kernels.library() is None
        x, first = torch.randn(2, 3, H), linear(H, torch.float32)
        assert torch.equal(gelu(first, x), torch.nn.functional.gelu(first(x), approximate="tanh"))
        monkeypatch.setenv("GENFLOW_KERNELS", "0")
        kernels.library.cache_clear()
        assert kernels.library() is None
    finally:
        kernels.library.cache_clear()


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo a remark >&2; exec sleep 60", "timed out after"),
        ("printf 'erreur \\351t\\351 de cc1\\n' >&2; exit 1", "de cc1"),
        ("exit 3", "non-zero exit status 3"),
    ],
)
def test_why_a_compiler_failed_is_said(script, told, monkeypatch, tmp_path):
    """One that took too long after a remark, one that speaks Latin-1, and one that says nothing."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path))
    run = kernels.subprocess.run
    monkeypatch.setattr(kernels.subprocess, "run", lambda *a, **options: run(*a, **{**options, "timeout": 1}))
    kernels.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=told):
            assert kernels.library() is None
    finally:
        kernels.library.cache_clear()


def test_linear_maps_without_a_bias_take_the_plain_formula():
    x, gate, bare = torch.randn(2, 3, H), torch.randn(2, 1, H), Linear(H, H, bias=False)
    assert torch.equal(gelu(bare, x), torch.nn.functional.gelu(bare(x), approximate="tanh"))
    assert torch.equal(gated_residual(x, gate, bare, x), torch.addcmul(x, gate, bare(x)))
    qkv = QKV(H, 2, qk_norm=True)
    torch.nn.init.zeros_(qkv.linear.bias)
    expected = joint_attention([(qkv, x)])[0]
    qkv.linear.bias = None
    torch.testing.assert_close(joint_attention([(qkv, x)])[0], expected)


@pytest.mark.skipif(not kernels.matrix_units(), reason="this processor does not multiply bf16")
@pytest.mark.parametrize(("inputs", "outputs", "served"), [(64, 96, True), (48, 64, False), (64, 48, False)])
def test_only_weights_of_whole_tiles_train_by_the_kernel_of_products(inputs, outputs, served):
    """It writes 32 x 32 numbers at a time, and would write beyond the end of others."""
    made, x = Linear(inputs, outputs), torch.randn(2, 5, inputs).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert trains_on_matrix_units(x, made.weight) == served
    assert not trains_on_matrix_units(x, made.weight)  # bf16 and float32 do not mix: torch says so
