"""The causal transformer: nothing leaks from behind, and tokens by windows are the tokens at once."""

from __future__ import annotations

import pytest
import torch

from genflow.errors import UserError
from genflow.networks.causal import CausalTransformer
from tests.noise import shaken


def make(dtype=torch.float64, **options):
    torch.manual_seed(0)
    net = CausalTransformer(3, 4, 10, width=32, heads=2, **options).to(dtype).eval()
    return shaken(net, 0.2)


def data(rows=2, tokens=10, dtype=torch.float64):
    return torch.randn(rows, tokens, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def test_the_output_is_zero_at_first():
    assert not CausalTransformer(3, 4, 10, width=32)(data(dtype=torch.float32)).any()


def test_a_token_sees_itself_and_those_before_it_and_all_of_them():
    net, x = make(), data(rows=1)
    jacobian = torch.autograd.functional.jacobian(lambda a: net(a)[0].sum(-1), x)[:, 0].abs().sum(-1)  # L x L
    assert not jacobian.triu(1).any()
    assert (jacobian + torch.ones(10, 10).triu(1) > 0).all()


@pytest.mark.parametrize("windows", [[10], [1] * 10, [3, 1, 4, 2], [9, 1]])
@pytest.mark.parametrize("condition_dim", [0, 5])
@torch.no_grad()
def test_tokens_by_windows_are_the_tokens_at_once(windows, condition_dim):
    net, x = make(condition_dim=condition_dim), data()
    condition = torch.randn(2, 5, dtype=torch.float64) if condition_dim else None
    cache = net.cache(2)
    parts = [net(part, condition, cache) for part in x.split(windows, 1)]
    assert cache.length == 10
    torch.testing.assert_close(torch.cat(parts, 1), net(x, condition))


@torch.no_grad()
def test_what_was_truncated_is_forgotten():
    net, x = make(), data()
    cache = net.cache(2)
    net(x[:, :4], None, cache)
    net(100 * x[:, 4:], None, cache)
    cache.truncate(4)
    torch.testing.assert_close(net(x[:, 4:7], None, cache), net(x)[:, 4:7])
    assert cache.length == 7
    for wrong in (8, -1):
        with pytest.raises(UserError, match="the cache has 7 tokens"):
            cache.truncate(wrong)


@torch.no_grad()
def test_rows_go_on_from_their_own_lengths():
    net, x = make(condition_dim=5), data()
    condition, cache = torch.randn(2, 5, dtype=torch.float64), net.cache(2)
    net(x[:, :6], condition, cache)
    cache.truncate(torch.tensor([3, 5]))
    got = net(torch.stack([x[0, 3:5], x[1, 5:7]]), condition, cache)
    every = net(x, condition)
    torch.testing.assert_close(got, torch.stack([every[0, 3:5], every[1, 5:7]]))


@torch.no_grad()
def test_a_window_beyond_the_end_is_refused():
    net, x = make(), data()
    cache = net.cache(2)
    net(x[:, :8], None, cache)
    with pytest.raises(UserError, match="10 tokens"):
        net(x[:, :3], None, cache)
    with pytest.raises(UserError, match="10 tokens"):
        net(torch.cat([x, x], 1))


@torch.no_grad()
def test_the_condition_reaches_every_token():
    net, x = make(condition_dim=5), data()
    a, b = (net(x, torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(s))) for s in (0, 1))
    assert ((a - b).abs().amax((0, 2)) > 1e-3).all()


def test_a_missing_condition_is_refused():
    with pytest.raises(UserError, match="a condition is missing: this network needs B x 5"):
        make(condition_dim=5)(data())


def test_half_precision_inside_is_close_and_comes_out_wide():
    net, x = make(torch.float32), data(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, net(x), atol=0.1, rtol=0.1)
    half.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "says"),
    [({"width": 30, "heads": 4}, "multiple of heads"), ({"layers": 0}, "least"), ({"heads": 0}, "least")],
)
def test_bad_sizes_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        CausalTransformer(3, 4, 10, **options)
