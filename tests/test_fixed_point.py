"""Fixed points by sweeps, and the prefix of a triangular map that is settled."""

from __future__ import annotations

import math

import pytest
import torch

from genflow.errors import UserError
from genflow.samplers.fixed_point import fixed_point, verified


def triangular(n=8, rows=3, scale=3.0):
    """A strictly lower triangular map far from a contraction, and the exact solution found one position at a time."""
    g = torch.Generator().manual_seed(0)
    weights = scale * torch.randn(n, n, generator=g, dtype=torch.float64).tril(-1)
    z = torch.randn(rows, n, generator=g, dtype=torch.float64)
    step = lambda x: z + torch.sin(x @ weights.T)
    exact = torch.zeros_like(z)
    for i in range(n):
        exact[:, i] = step(exact)[:, i]
    return step, z, exact


def test_a_contraction_arrives_within_the_bound_of_banach():
    x = torch.tensor([[0.0], [5.0], [-3.0]], dtype=torch.float64)
    solution = fixed_point(lambda x: 0.5 * torch.cos(x), x, tolerance=1e-8)
    assert solution.change.shape == (3,) and (solution.change <= 1e-8).all() and solution.sweeps < 40
    assert (solution.x - 0.4501836112948736).abs().max() <= 1e-8


def test_a_triangular_map_is_exact_after_as_many_sweeps_as_positions():
    step, z, exact = triangular()
    for sweeps in (1, 3, 8):
        solution = fixed_point(step, torch.zeros_like(z), tolerance=0.0, max_sweeps=sweeps)
        torch.testing.assert_close(solution.x[:, :sweeps], exact[:, :sweeps], rtol=0, atol=1e-12)
    assert not torch.allclose(fixed_point(step, torch.zeros_like(z), tolerance=0.0, max_sweeps=7).x, exact)
    assert fixed_point(step, z, tolerance=1e-12).sweeps <= 9


def test_a_row_stands_still_once_it_has_arrived():
    rate = torch.tensor([[0.0], [0.5], [0.9]], dtype=torch.float64)
    x = torch.ones(3, 1, dtype=torch.float64)
    whole = fixed_point(lambda x: rate * x + 1, x, tolerance=1e-6, max_sweeps=500)
    alone = [
        fixed_point(lambda x, i=i: rate[i] * x + 1, x[i : i + 1], tolerance=1e-6, max_sweeps=500) for i in range(3)
    ]
    assert torch.equal(whole.x, torch.cat([one.x for one in alone]))
    assert torch.equal(whole.change, torch.cat([one.change for one in alone]))
    assert whole.sweeps == max(one.sweeps for one in alone) > min(one.sweeps for one in alone)


def test_what_does_not_arrive_says_so_and_harms_no_other_row():
    x = torch.tensor([[1.0], [math.nan], [1.0]])
    rate = torch.tensor([[2.0], [0.5], [0.5]])
    solution = fixed_point(lambda x: rate * x, x, tolerance=1e-3, max_sweeps=30)
    assert solution.sweeps == 30
    assert [bool(change <= 1e-3) for change in solution.change] == [False, False, True]
    assert solution.x[2].abs() < 1e-2


def test_gradients_flow_through_the_sweeps():
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    solution = fixed_point(lambda x: a * x + 1, torch.zeros(2, 1, dtype=torch.float64), tolerance=1e-12)
    (grad,) = torch.autograd.grad(solution.x[0, 0], a)
    torch.testing.assert_close(grad, torch.tensor(1 / 0.7**2, dtype=torch.float64))
    assert not solution.change.requires_grad  # it holds no graph of the sweeps


@pytest.mark.parametrize("most", [0, 2.5, True, math.nan])
def test_sweeps_are_a_whole_number(most):
    with pytest.raises(UserError, match=f"max_sweeps = {most} is not a whole number of 1 or more"):
        fixed_point(torch.sin, torch.zeros(2, 1), max_sweeps=most)


def test_no_rows_are_no_work():
    solution = fixed_point(lambda x: x / 0, torch.empty(0, 3))
    assert solution.x.shape == (0, 3) and solution.sweeps == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [({"tolerance": -1.0}, "0 or more"), ({"tolerance": math.nan}, "0 or more")],
)
def test_bad_input_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        fixed_point(lambda x: x, torch.zeros(1, 1), **options)


def test_a_prefix_is_settled_up_to_the_one_after_the_last_that_stayed():
    change = torch.tensor([[0.0, 0.0, 9.0, 0.0, 9.0], [9.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 9.0], [0.0] * 5])
    assert verified(change, 0.5).tolist() == [3, 1, 5, 5]
    assert verified(torch.full((1, 4), math.nan), 0.5).tolist() == [1]
    assert verified(torch.zeros(2, 1), 0.5).tolist() == [1, 1]


def test_what_is_verified_is_right():
    step, x, exact = triangular(n=12, scale=1.0)
    for _ in range(12):
        new = step(x)
        for row, count in enumerate(verified((new - x).abs(), 0.0).tolist()):
            torch.testing.assert_close(new[row, :count], exact[row, :count], rtol=0, atol=1e-12)
        x = new
