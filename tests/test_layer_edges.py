"""Layers, networks and kernels at their edges: odd shapes, empty batches, transforms, and conditions that change."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from genflow.errors import UserError
from genflow.functional import log_snr
from genflow.layers import affine
from genflow.layers.affine import affine_half, affine_half_inverse
from genflow.layers.conv import three_convolutions
from genflow.layers.float8 import Float8Product
from genflow.layers.modulation import QKV, Linear, gated_residual, gelu, joint_heads, modulated_norm
from genflow.native import library as native
from genflow.networks.lipschitz import ContractedLinear, LipschitzNet
from genflow.networks.mmdit import MMDiTConfig
from genflow.networks.token_transformer import TokenTransformerConfig
from genflow.networks.vit import ViT
from genflow.samplers.guidance import cfg
from tests.test_float8 import emulated

B, L, H = 3, 5, 48
needs_kernels = pytest.mark.skipif(native.library() is None, reason="no C++ compiler here")


def plain(monkeypatch, function, *inputs):
    """What the plain formula gives."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "usable", lambda *_: False)
        patch.setattr(affine, "usable", lambda *_: False)
        return function(*inputs)


def block_functions():
    torch.manual_seed(0)
    linear, parts = Linear(H, H), [QKV(H, 3, qk_norm=True) for _ in range(2)]
    return {
        "norm": (modulated_norm, [(B, L, H), (B, 1, H), (B, 1, H)], []),
        "gate": (lambda x, g, y: gated_residual(x, g, linear, y), [(B, L, H), (B, 1, H), (B, L, H)], [linear]),
        "gelu": (lambda x: gelu(linear, x), [(B, L, H)], [linear]),
        "heads": (lambda *xs: joint_heads(list(zip(parts, xs, strict=True))), [(B, L, H), (B, 2, H)], parts),
        "affine": (lambda x, p: affine_half(x, p, 2.0), [(B, 5, 3, 3), (B, 4, 3, 3)], []),
    }


def draw(shapes):
    torch.manual_seed(1)
    return [torch.randn(shape) for shape in shapes]


# ---------------------------------------------------------------------------------------------------- the fused kernels


@pytest.mark.parametrize(
    ("case", "shapes"),
    [
        ("norm", [(B, L, H), (1, 1, H), (1, 1, H)]),
        ("norm", [(1, L, H), (B, 1, H), (B, 1, H)]),
        ("norm", [(B, L, H), (B, L, H), (B, L, H)]),
        ("norm", [(B, L, H), (B, 1, 1), (B, 1, 1)]),
        ("norm", [(B, H), (B, H), (B, H)]),
        ("gate", [(B, L, H), (1, 1, H), (B, L, H)]),
        ("gate", [(B, L, H), (B, 1, H), (1, L, H)]),
        ("gate", [(1, L, H), (B, 1, H), (B, L, H)]),
        ("gelu", [(B, H)]),
        ("gelu", [(2, B, L, H)]),
        ("affine", [(B, 5, 3, 3), (1, 4, 3, 3)]),
    ],
)
def test_shapes_that_the_kernels_do_not_take_broadcast_as_in_the_formula(case, shapes, monkeypatch):
    function, _, _ = block_functions()[case]
    inputs = draw(shapes)
    torch.testing.assert_close(function(*inputs), plain(monkeypatch, function, *inputs))


@pytest.mark.parametrize(
    ("case", "shapes"),
    [
        ("heads", [(4, L, H), (1, 2, H)]),
        ("affine", [(B, 5, 9, 9), (B, 4, 3, 3)]),
        ("affine", [(B, 3, 3, 3), (B, 8, 3, 3)]),
    ],
)
def test_shapes_that_do_not_fit_each_other_are_refused(case, shapes):
    function, _, _ = block_functions()[case]
    with pytest.raises(RuntimeError):
        function(*draw(shapes))


def mmdit():
    torch.manual_seed(0)
    made = MMDiTConfig(depth=1, hidden=32, heads=2, in_channels=3, context_dim=8, pooled_dim=6, sample_size=4).build()
    for p in made.parameters():
        nn.init.normal_(p, std=0.1)
    return made


def batch(rows):
    return [torch.randn(rows, *shape) for shape in ((3, 8, 8), (), (L, 8), (6,))]


@pytest.mark.parametrize("single", [(1, 3), (2,)])  # time and pooled text; text tokens
def test_mmdit_takes_one_row_for_all(single):
    net, inputs = mmdit(), batch(3)
    one = [a[:1] if i in single else a for i, a in enumerate(inputs)]
    every = [a[:1].expand_as(a).contiguous() if i in single else a for i, a in enumerate(inputs)]
    torch.testing.assert_close(net(*one), net(*every))


def test_mmdit_takes_an_empty_batch():
    assert mmdit()(*batch(0)).shape == (0, 3, 8, 8)


def test_gradients_of_gradients_reach_what_lies_otherwise_in_memory(monkeypatch):
    leaf, shift, scale = (x.requires_grad_() for x in draw([(L, B, H), (B, 1, H), (B, 1, H)]))

    def second():
        y = modulated_norm(leaf.sin().transpose(0, 1), shift, scale)
        (first,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (leaf, shift, scale))

    torch.testing.assert_close(second(), plain(monkeypatch, second), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("case", ["norm", "gate", "gelu", "heads", "affine"])
def test_gradients_of_gradients_are_there_for_each_input_alone(case, monkeypatch):
    function, shapes, modules = block_functions()[case]
    leaves = [*draw(shapes), *(p for m in modules for p in m.parameters())]

    def first(leaf):
        outputs = function(*leaves[: len(shapes)])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(sum(o.square().sum() for o in outputs), leaf, create_graph=True)[0]

    for leaf in leaves:
        for x in leaves:
            x.requires_grad_(x is leaf)
        torch.testing.assert_close(first(leaf), plain(monkeypatch, first, leaf), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("function", [affine_half, affine_half_inverse])
@pytest.mark.parametrize("limit", [2.0, 65.0])
def test_the_affine_map_is_the_formula_for_every_limit(function, limit, monkeypatch):
    x, u = torch.full((1, 2, 1, 1), 1e-20), torch.full((1, 2, 1, 1), 1e4)
    u[:, 0] = 0
    torch.testing.assert_close(function(x, u, limit), plain(monkeypatch, function, x, u, limit))


def test_forward_derivatives_of_the_inverse_affine_map_are_not_lost():
    z, p = draw([(2, 4, 3, 3), (2, 4, 3, 3)])
    with torch.no_grad(), forward_ad.dual_level():
        x, _ = affine_half_inverse(forward_ad.make_dual(z, torch.ones_like(z)), p, 2.0)
        tangent = forward_ad.unpack_dual(x).tangent
    expected = torch.func.jvp(lambda z: affine_half_inverse(z, p, 2.0)[0], (z,), (torch.ones_like(z),))[1]
    torch.testing.assert_close(tangent, expected)


def traced(function, x):
    return torch.jit.trace(function, (x,), check_trace=False)


def recorded(function, x):
    return make_fx(function)(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("trace", [traced, recorded])
def test_a_trace_computes_the_layer(trace):
    linear = Linear(H, H).requires_grad_(False)
    x, other = torch.randn(2, B, L, H)
    torch.testing.assert_close(trace(lambda x: gelu(linear, x), x)(other), gelu(linear, other))


def fake(net, inputs):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        net(*map(mode.from_tensor, inputs))


def differentiated(net, inputs):
    torch.func.grad(lambda x: net(x, *inputs[1:]).sum())(inputs[0])


@pytest.mark.parametrize("use", [fake, differentiated])
def test_what_was_done_to_an_mmdit_before_leaves_nothing_in_it(use):
    net, inputs = mmdit(), batch(2)
    expected = mmdit()(*inputs)
    use(net, inputs)
    torch.testing.assert_close(copy.deepcopy(net)(*inputs), expected)


def test_a_processor_is_known_by_its_features_whatever_it_calls_them(monkeypatch):
    seen = set()
    for text in (b"flags\t: sse avx\n", b"flags\t: sse\n", b"Features\t: fp sve\n", b"Features\t: fp\n"):
        monkeypatch.setattr(Path, "read_bytes", lambda _, text=text: b"processor\t: 0\n" + text + b"bugs\t:\n")
        seen.add(native._processor())
    assert len(seen) == 4


@needs_kernels
@pytest.mark.parametrize("part", [0.01, 0.5, 0.9])
def test_a_damaged_file_of_kernels_is_built_again(part, monkeypatch, tmp_path):
    good = Path(native.library()._name)
    bad = tmp_path / "kernels" / good.name
    bad.parent.mkdir()
    bad.write_bytes(good.read_bytes()[: int(part * good.stat().st_size)])
    monkeypatch.setenv("GENFLOW_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_build", lambda _, path: path.write_bytes(good.read_bytes()))
    assert native.library.__wrapped__()._name == str(bad)


@pytest.mark.parametrize(
    ("cxx", "path", "said"),
    [
        ("", "a folder", ["{}/a folder/g++"]),
        (" ", "a folder", ["{}/a folder/g++"]),
        ("ccache '{}/a folder/g++' -pipe", "", ["ccache", "{}/a folder/g++", "-pipe"]),
    ],
)
def test_a_compiler_may_have_spaces_in_its_path_and_words_of_its_own(cxx, path, said, monkeypatch, tmp_path):
    compiler = tmp_path / "a folder" / "g++"
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    asked = []

    def run(command, **_):
        asked.extend(command)
        raise OSError("not really")

    monkeypatch.setattr(native.subprocess, "run", run)
    monkeypatch.setenv("CXX", cxx.format(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/{path}")
    monkeypatch.setenv("GENFLOW_CACHE", f"{tmp_path}/cache")
    with pytest.warns(UserWarning, match="not really"):
        assert native.library.__wrapped__() is None
    assert asked[: len(said)] == [word.format(tmp_path) for word in said]


@pytest.mark.parametrize(("name", "value"), [("CXX", "'g++"), ("GENFLOW_CACHE", "~no-such-user/cache")])
def test_no_setting_of_the_kernels_ends_the_work(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="cannot be built, going on slower"):
        assert native.library.__wrapped__() is None


# -------------------------------------------------------------------------------------------------------- other layers


def convolutions():
    torch.manual_seed(0)
    return nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 10, 3, padding=1)


def test_what_is_added_between_convolutions_may_lie_in_memory_as_it_likes():
    x, added = torch.randn(4, 3, 5, 5), torch.randn(16, 4).t()
    expected = three_convolutions(*convolutions(), x, added.contiguous())
    torch.testing.assert_close(three_convolutions(*convolutions(), x, added), expected)


def test_what_is_added_between_convolutions_is_of_as_many_rows():
    with pytest.raises(RuntimeError):
        three_convolutions(*convolutions(), torch.randn(4, 3, 5, 5), torch.randn(2, 16))


def test_convolutions_of_an_empty_batch_have_gradients():
    x, added = torch.randn(0, 3, 5, 5, requires_grad=True), torch.randn(0, 16, requires_grad=True)
    three_convolutions(*convolutions(), x, added).sum().backward()
    assert x.grad.shape == x.shape and added.grad.shape == added.shape


@emulated
def test_a_product_in_8_bits_of_no_rows_is_empty():
    x, w = torch.randn(2, 0, 48, requires_grad=True), torch.randn(64, 48, requires_grad=True)
    y = Float8Product.apply(x, w)
    y.backward(torch.empty_like(y))
    assert y.shape == (2, 0, 64) and x.grad.shape == x.shape and not w.grad.any()


# ------------------------------------------------------------------------------------------------------ Lipschitz layers


def lipschitz():
    torch.manual_seed(0)
    net = LipschitzNet((4,))
    for p in net.layers.parameters():
        nn.init.normal_(p, std=0.5)
    return net.eval()


def test_other_weights_at_the_same_address_are_other_weights():
    layer, x = ContractedLinear(64, 64, 0.9).eval(), torch.randn(2, 64)
    with torch.no_grad():
        for _ in range(5):
            weights = {"weight": torch.randn(64, 64), "bias": torch.zeros(64)}
            expected = 0.9 / torch.linalg.matrix_norm(weights["weight"], 2) * x @ weights["weight"].T
            torch.testing.assert_close(functional_call(layer, weights, (x,)), expected, rtol=1e-3, atol=1e-3)
            del weights


def inference(net, x):
    with torch.inference_mode():
        net(x)


def half(net, x):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net(x)


@pytest.mark.parametrize("before", [inference, half])
def test_a_lipschitz_network_is_the_same_whatever_ran_before(before):
    net, x = lipschitz(), torch.randn(3, 4, requires_grad=True)
    before(net, x.detach())
    with torch.no_grad():
        assert torch.equal(net(x), lipschitz()(x))
    net(x).sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("training", [False, True])
def test_a_lipschitz_network_can_be_differentiated_as_a_function(training):
    net, x = lipschitz().train(training), torch.randn(3, 4)
    found = torch.func.grad(lambda w: functional_call(net, w, (x,)).sum())(dict(net.named_parameters()))
    net = lipschitz().train(training)
    expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    torch.testing.assert_close(list(found.values()), list(expected))


def test_a_lipschitz_network_may_be_made_for_inference_alone():
    x = torch.randn(3, 4)
    with torch.inference_mode():
        torch.testing.assert_close(lipschitz()(x), lipschitz()(x))


# ---------------------------------------------------------------------------------------------------------- the others


def test_guidance_hears_conditions_that_change_in_place():
    cond, uncond = torch.ones(3, 4), torch.zeros(3, 4)
    guided, x = cfg(lambda x, t, c: x * c, (cond,), (uncond,), 2.0), torch.randn(3, 4)
    torch.testing.assert_close(guided.at(x, 0.5), 2 * x)
    cond.mul_(3)
    torch.testing.assert_close(guided.at(x, 0.5), 6 * x)


def test_guidance_has_gradients_also_after_a_step_without():
    cond, x = torch.ones(3, 4, requires_grad=True), torch.randn(3, 4)
    guided = cfg(lambda x, t, c: x * c, (cond,), (torch.zeros(3, 4),), 2.0)
    with torch.no_grad():
        guided.at(x, 0.5)
    guided.at(x, 0.5).sum().backward()
    torch.testing.assert_close(cond.grad, 2 * x)


@pytest.mark.parametrize(("t", "expected"), [(0.0, math.inf), (1.0, -math.inf), (0.5, 0.0)])
def test_the_log_snr_is_infinite_at_the_ends(t, expected):
    assert log_snr(t) == expected == log_snr(torch.tensor(t))


@pytest.mark.parametrize(
    ("make", "near"),
    [
        (lambda: ViT(4, 3, 3, width=10, depth=1, heads=20), "try 20"),
        (lambda: TokenTransformerConfig(grid=(1, 1), mtp=1), "take 0"),
        (lambda: TokenTransformerConfig(grid=(2, 2), mtp=4), "take 1"),
    ],
)
def test_the_nearest_right_number_is_one_that_is_taken(make, near):
    with pytest.raises(UserError, match=near):
        make()


@needs_kernels
@pytest.mark.parametrize("which", ["convolutions", "affine"])
def test_many_cotangents_at_once_are_as_one_by_one(which):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    if which == "affine":
        y, _ = affine_half(x, torch.randn(2, 4, 5, 6), 2.0)
    else:
        layers = [nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3, padding=1)]
        y = three_convolutions(*layers, x, None)
    many = torch.randn(3, *y.shape)
    (got,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in many]
    torch.testing.assert_close(got, torch.stack(each), rtol=1e-4, atol=1e-5)
