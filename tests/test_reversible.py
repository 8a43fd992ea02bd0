"""The invertible checkpoint: gradients equal to plain autograd's, memory that does not grow with depth, and its refusals."""

import copy

import pytest
import torch
from torch import nn

from genflow.errors import UserError
from genflow.flows.bijections.base import Bijection, Chain, per_sample, zero_ladj
from genflow.flows.bijections.memory import Reversible, reversible
from genflow.flows.models.glow import GlowConfig
from genflow.registry import resolve
from tests.noise import shaken

CONDITION = 3


class Coupling(Bijection):
    """exp(s) x + t of one half of the features, s and t from the other and the condition."""

    def __init__(self, dim=6, flip=False, hidden=16):
        super().__init__()
        self.flip, self.condition_dim = flip, CONDITION
        self.network = nn.Sequential(nn.Linear(dim // 2 + CONDITION, hidden), nn.Tanh(), nn.Linear(hidden, dim))

    def terms(self, kept, condition):
        if condition is None:
            condition = kept.new_zeros(len(kept), CONDITION)
        s, t = self.network(torch.cat([kept, condition.to(kept.dtype)], 1)).to(kept.dtype).chunk(2, 1)
        return torch.tanh(s), t

    def halves(self, x):
        a, b = x.chunk(2, 1)
        return (b, a) if self.flip else (a, b)

    def join(self, kept, changed):
        return torch.cat([changed, kept] if self.flip else [kept, changed], 1)

    def forward(self, x, condition=None):
        kept, changed = self.halves(x)
        s, t = self.terms(kept, condition)
        return self.join(kept, changed * s.exp() + t), per_sample(s)

    def inverse(self, z, condition=None):
        kept, changed = self.halves(z)
        s, t = self.terms(kept, condition)
        return self.join(kept, (changed - t) * (-s).exp()), -per_sample(s)


class Reversal(Bijection):
    """The features backwards: no parameters, and a ladj that hangs on nothing."""

    def forward(self, x, condition=None):
        return x.flip(1), zero_ladj(x)

    inverse = forward


class Inside(Bijection):
    """Another bijection on the first features, as a split holds the rest of its flow; counts its inverses."""

    keep_input = True

    def __init__(self, inner, dim):
        super().__init__()
        self.inner, self.dim, self.inverses = inner, dim, 0

    def forward(self, x, condition=None):
        z, ladj = self.inner(x[:, : self.dim], condition)
        return torch.cat([z, x[:, self.dim :]], 1), ladj

    def inverse(self, z, condition=None):
        self.inverses += 1
        x, ladj = self.inner.inverse(z[:, : self.dim], condition)
        return torch.cat([x, z[:, self.dim :]], 1), ladj


def model(depth=3, dtype=torch.float64):
    """Chains in chains, a bijection used twice, one without parameters, one that holds a chain, a frozen parameter."""
    shared = Coupling()
    inner = Chain([Coupling(4), Reversal(), Coupling(4, flip=True)])
    layers = [Coupling(flip=i % 2 == 1) for i in range(depth)]
    chain = Chain([shared, Reversal(), Chain([*layers, Reversal()]), Inside(inner, 4), shared, Coupling(flip=True)])
    layers[0].network[0].bias.requires_grad_(False)
    return chain.to(dtype)


def batch(dtype=torch.float64, rows=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, dtype=dtype, generator=generator).requires_grad_()
    return x, torch.randn(rows, CONDITION, dtype=dtype, generator=generator).requires_grad_()


def weighted(z, ladj):
    """A loss that weighs every output and every sample differently."""
    return (z.sin() * torch.arange(1, z.numel() + 1).view_as(z)).sum() + (ladj * torch.arange(len(ladj))).sum()


def gradients(flow, loss=weighted, dtype=torch.float64, with_condition=True):
    x, condition = batch(dtype)
    flow.zero_grad()
    loss(*flow(x, condition if with_condition else None)).backward()
    found = {name: p.grad for name, p in flow.named_parameters()}
    return {**found, "x": x.grad, "condition": condition.grad}


def assert_alike(a, b, rtol):
    """Alike within rtol of each tensor's largest value."""
    assert a.keys() == b.keys()
    for name, expected in a.items():
        assert (expected is None) == (b[name] is None), name
        if expected is not None:
            assert (expected - b[name]).abs().max() <= rtol * expected.abs().max(), name


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("with_condition", [True, False])
@pytest.mark.parametrize(
    "loss", [weighted, lambda z, ladj: z.square().sum(), lambda z, ladj: ladj.sum()], ids=["both", "z", "ladj"]
)
def test_gradients_are_those_of_plain_autograd(dtype, rtol, loss, with_condition):
    plain = model(dtype=dtype)
    twin = reversible(copy.deepcopy(plain))
    assert isinstance(twin, Reversible) and list(twin.state_dict()) == list(plain.state_dict())
    expected = gradients(plain, loss, dtype, with_condition)
    assert_alike(expected, gradients(twin, loss, dtype, with_condition), rtol)
    x, condition = batch(dtype)
    for a, b in zip(plain(x, condition), twin(x, condition)):
        assert torch.equal(a, b)
    for a, b in zip(plain.inverse(x, condition), twin.inverse(x, condition)):
        assert torch.equal(a, b)


def test_gradients_of_a_deep_chain_in_float32():
    plain = Chain([Coupling(flip=i % 2 == 1) for i in range(64)])
    assert_alike(gradients(plain, dtype=torch.float32), gradients(Reversible(plain), dtype=torch.float32), 1e-3)


def test_it_is_registered():
    assert resolve("bijection", "reversible") is Reversible


def test_a_kept_input_is_not_computed_again():
    plain = model()
    twin = reversible(copy.deepcopy(plain))
    (inside,) = (m for m in twin.modules() if isinstance(m, Inside))
    assert isinstance(inside.inner, Reversible)  # the chain inside the split walks back by itself
    assert_alike(gradients(plain), gradients(twin), 1e-9)
    assert inside.inverses == 0
    inside.keep_input = False
    assert_alike(gradients(plain), gradients(twin), 1e-9)
    assert inside.inverses == 1


def test_a_glow_of_two_levels_has_the_gradients_of_plain_autograd():
    plain = GlowConfig(levels=2, steps=2, hidden=8, shape=(1, 8, 8), condition_dim=CONDITION).build().double()
    shaken(plain)
    twin = reversible(copy.deepcopy(plain))
    assert len([m for m in twin.modules() if type(m) is Reversible]) == 2
    x, condition = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.randn(3, CONDITION, dtype=torch.float64)
    for flow in (plain, twin):
        weighted(*flow(x, condition)).backward()
    found = [{name: p.grad for name, p in flow.named_parameters()} for flow in (plain, twin)]
    assert_alike(found[0], found[1], 1e-9)


def test_every_chain_is_replaced_however_deep_and_names_stay():
    flow = Inside(Chain([Chain([Inside(Chain([Coupling(2)]), 2)]), Coupling(4)]), 4)
    names = list(flow.state_dict())
    assert reversible(flow) is flow
    assert list(flow.state_dict()) == names
    assert not [m for m in flow.modules() if type(m) is Chain]
    assert len([m for m in flow.modules() if type(m) is Reversible]) == 3


def test_without_gradients_it_is_the_plain_chain():
    twin = reversible(model())
    x, condition = batch()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            z, ladj = twin(x, condition)
        assert not z.requires_grad and not ladj.requires_grad
    twin.requires_grad_(False)
    z, ladj = twin(x.detach(), condition.detach())
    assert not z.requires_grad and not ladj.requires_grad
    z, ladj = twin.eval()(x, condition)  # gradients of the input alone, in eval
    assert_alike(
        dict(zip("xc", torch.autograd.grad(weighted(*model_like(twin)(x, condition)), (x, condition)))),
        dict(zip("xc", torch.autograd.grad(weighted(z, ladj), (x, condition)))),
        1e-9,
    )


def model_like(flow):
    plain = model()
    plain.load_state_dict(flow.state_dict())
    return plain


def test_gradients_accumulate_over_batches():
    plain, x = model(), batch()[0].detach()
    twin = reversible(copy.deepcopy(plain))
    for flow in (plain, twin):
        for part in (x[:2], x[2:]):
            weighted(*flow(part)).backward()
    named = dict(plain.named_parameters())
    assert_alike({n: p.grad for n, p in named.items()}, {n: p.grad for n, p in twin.named_parameters()}, 1e-9)


@pytest.mark.parametrize("backward_inside", [True, False])
def test_the_backward_computes_in_the_autocast_of_the_forward(backward_inside):
    """Also where the backward runs inside the region, whose cache holds casts of weights without a graph."""
    plain = model(dtype=torch.float32)
    twin = reversible(copy.deepcopy(plain))
    found = []
    for flow in (plain, twin):
        x, condition = batch(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = weighted(*flow(x, condition))
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        found.append({**{n: p.grad for n, p in flow.named_parameters()}, "x": x.grad})
    # the reconstructed inputs round as others in bfloat16 now and then; float32 would be 3e-3 .. 1e-2 off throughout
    assert_alike(found[0], found[1], 3e-2)
    exact = gradients(plain, dtype=torch.float32)
    off = [(found[1][n] - exact[n]).abs().max() / exact[n].abs().max() for n in found[1] if exact[n] is not None]
    assert min(off) > 1e-5


def test_each_parameter_hears_of_its_gradient_once():
    """What DDP listens to; a module that is used twice gives one sum."""
    twin, heard = reversible(model()), []
    for name, p in twin.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: heard.append(name))
    gradients(twin)
    assert sorted(heard) == sorted(n for n, p in twin.named_parameters() if p.requires_grad)


def test_it_trains_under_ddp(tmp_path):
    plain = model()
    expected = gradients(plain)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(reversible(copy.deepcopy(plain)))
        for _ in range(2):  # the second backward finds out if the first left a bucket waiting
            found = {n.removeprefix("module."): g for n, g in gradients(wrapped).items()}
            assert_alike(expected, found, 1e-9)
    finally:
        torch.distributed.destroy_process_group()


def test_jacobians_by_autograd_and_by_functional_transforms():
    twin = reversible(model())
    x, condition = (a.detach()[:1] for a in batch())
    by_autograd = torch.autograd.functional.jacobian(lambda x: twin(x, condition)[0][0], x)[:, 0]
    by_transform = torch.func.jacrev(lambda x: twin(x, condition)[0][0])(x)[:, 0]
    torch.testing.assert_close(by_autograd, by_transform, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.linalg.slogdet(by_autograd)[1], twin(x, condition)[1][0], rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_depth():
    """The peak of forward and backward, gradients of parameters included, as the CPU's allocator counts it."""
    from scripts.bench_memory import KINDS, couplings, peak_bytes, step

    x = torch.randn(16, 4, 12, 12)
    peaks = {}
    for depth in (8, 64):
        layers = couplings((4, 12, 12), depth, hidden=16)
        for kind in ("plain", "reversible"):
            flow = KINDS[kind](layers)
            peaks[kind, depth] = peak_bytes(lambda flow=flow: step(flow, x))
            flow.zero_grad()
    assert peaks["reversible", 64] <= 1.3 * peaks["reversible", 8], peaks
    assert peaks["plain", 64] > 6 * peaks["plain", 8], peaks
    assert peaks["plain", 64] > 15 * peaks["reversible", 64], peaks


# -------------------------------------------------------------------------------------------------------------- refusals


class Inexact(Coupling):
    """A coupling whose inverse is a little wrong."""

    def inverse(self, z, condition=None):
        x, ladj = super().inverse(z, condition)
        return x + 1e-3, ladj


def test_an_inverse_that_drifts_is_noticed():
    weighted(*Reversible([Coupling(), Coupling(flip=True)], tolerance=1e-4)(batch(torch.float32)[0])).backward()
    z, ladj = Reversible([Coupling(), Inexact()], tolerance=1e-4)(batch(torch.float32)[0])
    with pytest.raises(UserError, match="beside its input, further than tolerance = 0.0001"):
        weighted(z, ladj).backward()
    x = batch(torch.float32)[0].detach()
    x[0, 0] = float("nan")
    with pytest.raises(UserError, match="nan beside"):
        weighted(*reversible(Chain([Coupling()]), tolerance=1e-4)(x)).backward()


def test_what_cannot_be_walked_back_is_refused():
    dropping = Coupling()
    dropping.network.append(nn.Dropout(0.1))
    with pytest.raises(UserError, match=r"Dropout \(bijections.1.network.3\)"):
        Reversible([Coupling(), dropping])
    dropping.network[-1].p = 0.0
    Reversible([dropping])
    normed = Coupling()
    normed.network.append(nn.BatchNorm1d(6))
    with pytest.raises(UserError, match="BatchNorm1d"):
        Reversible([normed])
    with pytest.raises(UserError, match="Coupling has none"):
        reversible(Coupling())
    with pytest.raises(UserError, match="tolerance = 0"):
        Reversible([Coupling()], tolerance=0.0)


def test_gradients_of_gradients_are_refused():
    x, _ = batch(torch.float32)
    z, ladj = Reversible([Coupling()])(x)
    for loss in (weighted(z, ladj), z.sum()):  # whose gradient to z is a constant
        with pytest.raises(UserError, match="an invertible checkpoint has first gradients only"):
            torch.autograd.grad(loss, x, create_graph=True, retain_graph=True)


def test_parameters_changed_before_the_backward_are_noticed():
    flow = Reversible([Coupling()])
    loss = weighted(*flow(batch(torch.float32)[0]))
    with torch.no_grad():
        next(flow.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="changed between"):
        loss.backward()
