"""The fused kernels of couplings, convolution network and affine map, against the plain formulas that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genflow.layers import affine, conv
from genflow.layers.affine import affine_half, affine_half_inverse
from genflow.layers.conv import three_convolutions
from genflow.native import library as kernels

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler here")


def layers(inputs: int = 3, hidden: int = 16, outputs: int = 10) -> list[nn.Conv2d]:
    torch.manual_seed(0)
    return [
        nn.Conv2d(inputs, hidden, 3, padding=1),
        nn.Conv2d(hidden, hidden, 1),
        nn.Conv2d(hidden, outputs, 3, padding=1),
    ]


def weights(net: list[nn.Conv2d]) -> list[torch.Tensor]:
    return [w for layer in net for w in (layer.weight, layer.bias)]


PICTURES = {
    "contiguous": lambda: torch.randn(5, 3, 6, 4),
    "channels last": lambda: torch.randn(5, 3, 6, 4).contiguous(memory_format=torch.channels_last),
    "first channels of more": lambda: torch.randn(5, 6, 4, 7).permute(0, 3, 1, 2)[:, :3],
    "last channels of more": lambda: torch.randn(5, 6, 4, 7).permute(0, 3, 1, 2)[:, 4:],
    "one row": lambda: torch.randn(5, 3, 1, 4),
    "one pixel": lambda: torch.randn(5, 3, 1, 1),
    "one picture": lambda: torch.randn(1, 3, 5, 5),
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("conditional", [False, True])
def test_values_and_gradients_are_those_of_the_convolutions(picture, conditional, monkeypatch):
    monkeypatch.setattr(conv, "ROWS", 48)  # two pictures of 6 x 4 at a time: 5 do not fill the last turn
    net = layers()
    x = PICTURES[picture]().requires_grad_()
    added = torch.randn(len(x), 16, requires_grad=conditional) if conditional else None
    asked = [x, *weights(net), *([added] if conditional else [])]
    fused = three_convolutions(*net, x, added)
    plain = conv._plain(x, torch.zeros(1, 16) if added is None else added, *weights(net))
    assert type(fused.grad_fn).__name__ == "ThreeConvolutionsBackward"
    torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(three_convolutions(*net, x, added), fused, atol=1e-6, rtol=1e-5)
    g = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(fused, asked, g), torch.autograd.grad(plain, asked, g), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_autocast_computes_in_bf16_with_float32_gradients():
    net, x = layers(), torch.randn(4, 3, 6, 6, requires_grad=True)
    exact = three_convolutions(*net, x, None)
    with torch.autocast("cpu", torch.bfloat16):
        fused = three_convolutions(*net, x, None)
    assert fused.dtype == torch.bfloat16
    assert 0 < (fused - exact).abs().max() < 0.03
    gradients = torch.autograd.grad(fused.float().square().sum(), [x, *weights(net)])
    reference = torch.autograd.grad(exact.square().sum(), [x, *weights(net)])
    for a, b in zip(gradients, reference, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm()


def test_second_derivatives_are_those_of_the_convolutions():
    net, x = layers(), torch.randn(2, 3, 4, 4, requires_grad=True)
    found = []
    for call in (three_convolutions, lambda *net_x: conv._plain(x, torch.zeros(1, 16), *weights(net))):
        (first,) = torch.autograd.grad(call(*net, x, None).square().sum(), [x], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, net[0].weight]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_float64_takes_the_plain_convolutions():
    net = [layer.double() for layer in layers()]
    out = three_convolutions(*net, torch.randn(2, 3, 4, 4, dtype=torch.float64), None)
    assert out.dtype == torch.float64 and type(out.grad_fn).__name__ == "ConvolutionBackward0"


def test_frozen_weights_and_inputs_without_gradients():
    net, x = layers(), torch.randn(2, 3, 4, 4)
    three_convolutions(*net, x, None).sum().backward()
    assert x.grad is None and all(w.grad is not None for w in weights(net))
    for w in weights(net):
        w.requires_grad_(False).grad = None
    three_convolutions(*net, x.requires_grad_(), None).sum().backward()
    assert x.grad is not None and all(w.grad is None for w in weights(net))


def test_nan_is_not_hidden():
    x = torch.randn(2, 3, 4, 4)
    x[1, 0, 0, 0] = torch.nan
    out = three_convolutions(*layers(), x, None)
    assert out[0].isfinite().all() and out[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (2, 4, 1, 1)])
def test_the_affine_map_its_inverse_and_gradients_are_those_of_the_formula(shape, dtype):
    torch.manual_seed(1)
    x = torch.randn(shape, requires_grad=True)
    changed = shape[1] // 2
    parameters = (torch.randn(shape[0], 2 * changed, *shape[2:]) * 3).to(dtype).requires_grad_()
    fused, plain = affine_half(x, parameters, 2.0), affine._plain(x, parameters, 2.0)
    assert type(fused[0].grad_fn).__name__ == "AffineHalfBackward"
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        back, ladj = affine_half_inverse(fused[0], parameters, 2.0)
    torch.testing.assert_close((back, ladj), (x.detach(), -fused[1].detach()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(affine_half_inverse(fused[0], parameters, 2.0)[0], x, atol=1e-5, rtol=1e-5)
    gradients = [
        torch.autograd.grad([z, ladj], [x, parameters], [torch.ones_like(z) * 0.3, torch.arange(1.0, len(z) + 1)])
        for z, ladj in (fused, plain)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_second_derivatives_of_the_affine_map_are_those_of_the_formula():
    x, parameters = torch.randn(2, 4, 2, 2, requires_grad=True), torch.randn(2, 4, 2, 2, requires_grad=True)
    found = []
    for call in (affine_half, affine._plain):
        z, ladj = call(x, parameters, 2.0)
        (first,) = torch.autograd.grad(z.square().sum() + ladj.square().sum(), [parameters], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, parameters]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("usual", [{"dtype": torch.float64}, {"device": "meta"}])
def test_what_a_new_tensor_is_by_default_changes_nothing(usual):
    net, x, parameters = layers(), torch.randn(3, 3, 4, 5), torch.randn(3, 4, 4, 5)
    cases = [(lambda x: three_convolutions(*net, x, None), [x])]
    cases += [(lambda *given, f=f: f(*given, 2.0), [x, parameters]) for f in (affine_half, affine_half_inverse)]

    def answers():
        found = []
        for function, given in cases:
            with torch.no_grad():
                found += function(*given)
            given = [a.clone().requires_grad_() for a in given]
            found += torch.autograd.grad([o.sum() for o in function(*given)], given)
        return found

    expected, before = answers(), (torch.get_default_dtype(), torch.get_default_device())
    try:
        torch.set_default_dtype(usual.get("dtype", before[0]))
        torch.set_default_device(usual.get("device", before[1]))
        got = answers()
    finally:
        torch.set_default_dtype(before[0])
        torch.set_default_device(None)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
