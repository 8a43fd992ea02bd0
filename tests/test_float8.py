"""Training in 8 bits: products against float64, and a run on a CPU, which can emulate what it is refused for."""

from __future__ import annotations

import math

import pytest
import torch

from genflow.errors import UserError
from genflow.layers.float8 import Float8Product, product
from genflow.layers.modulation import Linear
from genflow.networks.mmdit import MMDiTConfig
from genflow.networks.velocity import MLPVelocityConfig
from genflow.training.apply import train_in_float8
from genflow.training.precision import refusal


def emulates() -> bool:
    """Whether this torch multiplies 8 bits on a CPU, which 2.10 does not."""
    eight, one = torch.zeros(16, 16, dtype=torch.float8_e4m3fn), torch.ones(())
    try:
        product(eight, eight, one, one)
    except NotImplementedError:
        return False
    return True


emulated = pytest.mark.skipif(not emulates(), reason="this torch does not multiply 8 bits on a CPU")
E4M3, E5M2 = 2**-4, 2**-3  # the largest relative error of rounding to 3 and to 2 bits


def tensors(*sizes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, generator=draw).requires_grad_() for size in sizes]


@emulated
@pytest.mark.parametrize("rows", [(32,), (3, 7), (1,)])  # of a multiple of 16, and not
def test_products_and_gradients_are_within_the_rounding_of_8_bits(rows):
    x, w, g = tensors((*rows, 48), (64, 48), (*rows, 64))
    y = Float8Product.apply(x, w)
    y.backward(g.bfloat16())
    assert y.shape == g.shape and y.dtype == torch.bfloat16
    for found, a, b, a_error in (
        (y, x, w.T, E4M3),
        (x.grad, g, w, E5M2),
        (w.grad, g.reshape(-1, 64).T, x.reshape(-1, 48), E5M2),
    ):
        a, b = a.detach().double(), b.detach().double()
        # Each factor is off by no more than its own rounding or the smallest step of its scale, and the sum's is bf16's.
        bound = (a.abs() + least(a, a_error)) * (1 + a_error), (b.abs() + least(b, E4M3)) * (1 + E4M3)
        off = (found.double() - a @ b).abs()
        assert (off <= bound[0] @ bound[1] * (a_error + E4M3 + 2**-8) + 1e-6).all()
        assert off.norm() < 0.1 * (a @ b).norm()  # and on average by far less


def least(x, error):
    """The smallest step of x's scaled numbers: subnormals of e4m3 and e5m2."""
    step, most = (2**-9, 448) if error == E4M3 else (2**-16, 57344)
    return x.abs().amax().item() * step / most


@emulated
def test_scales_follow_the_tensor():
    x, w, _ = tensors((16, 32), (16, 32), (1,))
    plain = Float8Product.apply(x, w)
    for factor in (2.0**60, 2.0**-60):
        assert torch.equal(Float8Product.apply(x * factor, w) / factor, plain)
    assert not Float8Product.apply(torch.zeros(16, 32), w).any()
    assert Float8Product.apply(torch.full((16, 32), math.inf), w).isnan().all()  # and the run is told


def network():
    torch.manual_seed(0)
    config = MMDiTConfig(depth=2, hidden=64, heads=2, in_channels=3, context_dim=24, pooled_dim=24, sample_size=4)
    made = config.build()
    for p in made.parameters():  # what is zero at first would let nothing through
        torch.nn.init.normal_(p, std=0.05)
    return made


def gradient(made):
    x, context, pooled = tensors((2, 3, 8, 8), (2, 5, 24), (2, 24), seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = made(x, torch.tensor([0.3, 0.7]), context, pooled).float().square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in made.parameters()])


@emulated
@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_trains_in_8_bits_close_to_bf16_and_draws_in_bf16(compiled):
    wide, short = network(), network()
    train_in_float8(short)
    assert {type(m) for m in short.modules() if getattr(m, "float8", False)} == {Linear}
    if compiled:
        torch._dynamo.reset()
        for block in short.blocks:
            block.compile(backend="aot_eager")
    (loss, g), (loss8, g8) = gradient(wide), gradient(short)
    assert loss8 != loss and math.isclose(loss8, loss, rel_tol=0.02)
    assert not torch.equal(g8, g) and torch.cosine_similarity(g8, g, dim=0) > 0.99
    wide.eval(), short.eval()
    assert gradient(wide)[0] == pytest.approx(gradient(short)[0], rel=1e-3)
    assert short.state_dict().keys() == network().state_dict().keys()


def test_products_of_other_widths_stay_as_they_are():
    network = torch.nn.ModuleList([Linear(16, 32), Linear(24, 32), Linear(32, 24)])
    train_in_float8(network)
    assert [linear.float8 for linear in network] == [True, False, False]


def test_it_is_refused_where_it_cannot_be():
    assert "8.9" in refusal("fp8", torch.device("cpu"))
    with pytest.raises(UserError, match="no transformer blocks of widths that are multiples of 16; take bf16"):
        train_in_float8(MLPVelocityConfig(shape=(2,), pooled_dim=0).build())
