"""The block-wise attention: exact at any block size, differentiable, and without an L x L tensor."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from genflow.attention import Mask, attention
from genflow.attention.tiled import tiled
from genflow.errors import UserError
from tests.test_attention_masks import ALL_KINDS, lengths_for, make_mask


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_its_gradient_is_that_of_its_forward(kind):
    lq, lk = lengths_for(kind, [(5, 4), (5, 5)])[0]
    mask, _ = make_mask(kind, 2, 1, lq, lk)
    q, k, v = (torch.randn(2, 1, n, 2, dtype=torch.float64, requires_grad=True) for n in (lq, lk, lk))
    assert torch.autograd.gradcheck(lambda *x: tiled(*x, mask, 0.7, block=2), (q, k, v), atol=1e-7)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_any_block_size_gives_the_same_attention(kind):
    for lq, lk in lengths_for(kind, [(11, 11), (4, 11), (11, 4)]):
        mask, _ = make_mask(kind, 2, 2, lq, lk)
        q, k, v = (torch.randn(2, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (lq, lk, lk))
        plain = attention(q, k, v, mask, backend="math")
        g = torch.randn_like(plain)
        expected = [plain, *torch.autograd.grad(plain, (q, k, v), g)]
        for block in (1, 3, 4, 11, 128):
            out = tiled(q, k, v, mask, None, block=block)
            for got, e in zip([out, *torch.autograd.grad(out, (q, k, v), g)], expected, strict=True):
                assert torch.allclose(got, e, atol=1e-12)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("kind", ["none", "causal", "keys", "segments", "causal+segments"])
def test_no_tensor_is_as_large_as_l_by_l(kind):
    length = 1024
    q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    mask = Mask(
        causal="causal" in kind,
        keys=torch.rand(1, length) < 0.5 if "keys" in kind else None,
        segments=torch.arange(length)[None] // 300 if "segments" in kind else None,
    )
    used = {}
    for backend in ("tiled", "math"):
        with Largest() as largest:
            attention(q, k, v, mask, backend=backend).sum().backward()
        used[backend] = largest.elements
    assert used["tiled"] <= length * 16  # the size of q, and of a block of 128 x 128
    assert used["math"] >= length**2  # so the measure sees them


def test_what_is_kept_for_the_backward_is_o_of_l():
    kept = []
    pack = lambda x: kept.append(x.numel()) or x
    q = torch.randn(1, 1, 1024, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        tiled(q, q, q, Mask(), None)
    assert sorted(kept) == [1024] + [1024 * 16] * 4  # the log-sum-exp; q, k, v and the output


def test_blocks_in_the_future_cost_nothing():
    q = torch.randn(1, 1, 1024, 16)
    flops = []
    for causal in (False, True):
        with FlopCounterMode(display=False) as counter:
            tiled(q, q, q, Mask(causal=causal), None)
        flops.append(counter.get_total_flops())
    assert flops[1] / flops[0] == (8 * 9 / 2) / 8**2


def test_it_is_differentiable_once_and_says_so():
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    (g,) = torch.autograd.grad(tiled(q, q, q, Mask(), None).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    with pytest.raises(UserError, match="'tiled' cannot serve this call: has no double backward"):
        attention(q, q, q, backend="tiled", needs=frozenset({"double_backward"}))


def test_half_precision_is_summed_in_float32_also_under_autocast():
    q, k, v = (torch.randn(2, 2, 300, 16, dtype=torch.bfloat16) for _ in range(3))
    exact = attention(q.double(), k.double(), v.double(), backend="math")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, backend="tiled")
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() <= 2**-8 * exact.abs().max()  # one rounding, of the output
