"""Rational-quadratic splines against zuko's, nflows', autograd and their own limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from zuko.transforms import MonotonicRQSTransform

from genflow.errors import UserError
from genflow.flows.bijections.splines import (
    MIN_BIN,
    MIN_SLOPE,
    _root,
    rational_quadratic,
    rational_quadratic_inverse,
    spline_parameters,
)

BOTH = pytest.mark.parametrize("spline", [rational_quadratic, rational_quadratic_inverse])
ONE = math.log(math.expm1(1 - MIN_SLOPE))  # the unnormalised slope of nflows that is 1


def case(rows=200, width=3, bins=8, scale=1.5, dtype=torch.float64):
    x = torch.randn(rows, width, dtype=dtype) * 2
    return x, torch.randn(rows, spline_parameters(bins), width, dtype=dtype) * scale


def groups(parameters):
    """widths, heights, slopes with the knots last, as peers have them."""
    bins = (parameters.shape[1] + 1) // 3
    return parameters.transpose(1, 2).split([bins, bins, bins - 1], dim=-1)


def zukos(parameters, bound):
    """zuko's spline with these very knots and slopes."""
    widths, heights, slopes = groups(parameters)
    spline = MonotonicRQSTransform(widths, heights, slopes, bound=bound)

    def knots(lengths):
        lengths = MIN_BIN + (1 - MIN_BIN * lengths.shape[-1]) * lengths.softmax(-1)
        return F.pad(lengths.cumsum(-1), (1, 0)) * 2 * bound - bound

    spline.horizontal, spline.vertical = knots(widths), knots(heights)
    spline.derivatives = F.pad(MIN_SLOPE + F.softplus(slopes + ONE), (1, 1), value=1.0)
    return spline


@pytest.mark.parametrize("bins", [2, 8, 33])
@pytest.mark.parametrize("bound", [1.0, 5.0])
def test_numbers_are_zukos(bins, bound):
    x, parameters = case(bins=bins)
    peer = zukos(parameters, bound)
    y, log_slope = rational_quadratic(x, parameters, bound=bound)
    expected, expected_log = peer.call_and_ladj(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(log_slope, expected_log, rtol=0, atol=1e-9)
    back, back_log = rational_quadratic_inverse(x, parameters, bound=bound)
    torch.testing.assert_close(back, peer.inv(x), rtol=0, atol=1e-9)
    torch.testing.assert_close(back_log, peer.inv.call_and_ladj(x)[1], rtol=0, atol=1e-7)


def test_numbers_are_nflows():
    rational = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    x, parameters = case()
    widths, heights, slopes = groups(parameters)
    for inverse, spline in ((False, rational_quadratic), (True, rational_quadratic_inverse)):
        expected, expected_log = rational.unconstrained_rational_quadratic_spline(
            x, widths, heights, slopes + ONE, inverse=inverse, tails="linear", tail_bound=3.0
        )
        y, log_slope = spline(x, parameters)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(log_slope, expected_log, rtol=0, atol=1e-8)


@BOTH
def test_log_slope_is_autograds(spline):
    x, parameters = case()
    x.requires_grad_()
    y, log_slope = spline(x, parameters)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), rtol=1e-8, atol=1e-8)


@BOTH
def test_gradients_and_their_gradients_are_those_of_finite_differences(spline):
    x, parameters = case(rows=2, width=2, bins=4, scale=0.5)
    inputs = (x.requires_grad_(), parameters.requires_grad_())
    assert torch.autograd.gradcheck(spline, inputs)
    assert torch.autograd.gradgradcheck(spline, inputs)


@BOTH
def test_zeros_are_the_identity(spline):
    x = torch.linspace(-4, 4, 101, dtype=torch.float64).view(-1, 1)
    y, log_slope = spline(x, torch.zeros(1, 23, 1, dtype=torch.float64))
    torch.testing.assert_close(y, x, rtol=0, atol=1e-14)
    assert log_slope.abs().max() < 1e-14


@BOTH
def test_it_is_increasing_onto_its_interval_and_smooth_at_the_tails(spline):
    x = torch.linspace(-3.5, 3.5, 4001, dtype=torch.float64).view(-1, 1)
    y, log_slope = spline(x, torch.randn(1, 23, 1, dtype=torch.float64))
    assert (y.diff(dim=0) > 0).all()
    assert torch.equal(y[x.abs() >= 3], x[x.abs() >= 3])
    assert torch.equal(log_slope[x.abs() >= 3], torch.zeros_like(x[x.abs() >= 3]))
    ends = torch.tensor([[-3.0], [3.0]], dtype=torch.float64) * (1 - 1e-9)
    near, near_log = spline(ends, torch.randn(1, 23, 1, dtype=torch.float64))
    torch.testing.assert_close(near, ends, rtol=0, atol=1e-8)
    assert near_log.abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_the_inverse_goes_back(dtype, close):
    x, parameters = case(scale=0.7, dtype=dtype)
    y, log_slope = rational_quadratic(x, parameters)
    back, back_log = rational_quadratic_inverse(y, parameters)
    torch.testing.assert_close(back, x, rtol=0, atol=close)
    torch.testing.assert_close(back_log, -log_slope, rtol=0, atol=20 * close)
    assert y.dtype == log_slope.dtype == dtype


@settings(deadline=None, max_examples=50)
@given(st.floats(-3.5, 3.5), st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 3.0, 10.0]))
def test_every_value_has_a_preimage_however_steep(y, seed, scale):
    parameters = torch.randn(1, 23, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    target = torch.tensor([[y]], dtype=torch.float64)
    x, back_log = rational_quadratic_inverse(target, parameters)
    again, log_slope = rational_quadratic(x, parameters)
    torch.testing.assert_close(again, target, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_slope, -back_log, rtol=1e-6, atol=1e-6)


def test_the_root_keeps_all_digits_where_the_usual_form_loses_them():
    # Flat bins with steep ends: b^2 - 4 a c (eq. 8) is the small difference of large numbers (nflows#87).
    theta = torch.rand(100_000)
    s, d0, d1 = (10 ** (3 * torch.randn(3, 100_000)).clamp(-3, 3)).unbind()
    exact = _root(*(a.double() for a in (theta, s, d0, d1)))
    t = d0 + d1 - 2 * s
    a, b, c = s - d0 + theta * t, d0 - theta * t, -s * theta
    usual = 2 * c / (-b - (b.square() - 4 * a * c).clamp(min=0).sqrt())
    assert (_root(theta, s, d0, d1) - exact).abs().max() < 1e-5 < 1e-3 < (usual - exact).abs().max()
    a, b, c = a.double(), b.double(), c.double()  # and it is the root
    torch.testing.assert_close(a * exact**2 + b * exact, -c, rtol=1e-3, atol=1e-2)


@BOTH
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(
    "value", [0.0, 3.0, -3.0, 3.0 * (1 - 2**-24), 3.1, -50.0, 1e20, 3e38, float("inf"), float("-inf")]
)
def test_extremes_have_finite_gradients(spline, scale, value):
    x = torch.full((5, 2), value, requires_grad=True)
    parameters = (torch.randn(5, 23, 2) * scale).requires_grad_()
    y, log_slope = spline(x, parameters)
    assert not y.isnan().any() and log_slope.isfinite().all()
    if abs(value) > 3:
        assert torch.equal(y, x) and log_slope.count_nonzero() == 0
    for g in torch.autograd.grad(y.sum() + log_slope.square().sum(), [x, parameters]):
        assert g.isfinite().all()


@pytest.mark.parametrize("axis", [0, 1])
def test_inputs_at_knots_go_to_knots_with_finite_gradients(axis):
    parameters = torch.randn(1, 23, 1, dtype=torch.float64)
    lengths = MIN_BIN + (1 - 8 * MIN_BIN) * parameters[:, :16].unflatten(1, (2, 8)).softmax(2)
    knots = F.pad(lengths.cumsum(2)[0, :, :, 0], (1, 0)) * 6 - 3
    x = knots[axis].clone().view(-1, 1).requires_grad_()
    parameters.requires_grad_()
    spline = (rational_quadratic, rational_quadratic_inverse)[axis]
    y, log_slope = spline(x, parameters)
    torch.testing.assert_close(y[:, 0], knots[1 - axis], rtol=0, atol=1e-12)
    inner = (MIN_SLOPE + F.softplus(parameters[0, 16:, 0] + ONE)).log() * (1 - 2 * axis)
    torch.testing.assert_close(log_slope[1:-1, 0], inner, rtol=0, atol=1e-10)
    for g in torch.autograd.grad(y.sum() + log_slope.sum(), [x, parameters]):
        assert g.isfinite().all() and g.abs().sum() > 0


@BOTH
def test_one_row_of_parameters_serves_all(spline):
    x = torch.randn(6, 2, 4, 3, dtype=torch.float64)
    parameters = torch.randn(1, 23, 2, 1, 1, dtype=torch.float64)
    y, log_slope = spline(x, parameters)
    expected, expected_log = spline(x, parameters.expand(6, 23, 2, 4, 3).clone())
    assert torch.equal(y, expected) and torch.equal(log_slope, expected_log)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x, parameters = case(dtype=torch.float32)
    y, log_slope = rational_quadratic(x.to(dtype), parameters.to(dtype))
    expected, expected_log = rational_quadratic(x.to(dtype).float(), parameters.to(dtype).float())
    assert y.dtype == log_slope.dtype == torch.float32
    assert torch.equal(y, expected) and torch.equal(log_slope, expected_log)


@pytest.mark.parametrize("axis", [0, 1])
def test_rounding_at_a_knot_does_not_leave_the_bin(axis):
    # Just beyond the end of a narrow, tall bin with flat ends the formula for the slope is negative.
    parameters = torch.randn(1, 23, 20_000) * 10
    parameters[:, 16:] = -1e3
    lengths = MIN_BIN + (1 - 8 * MIN_BIN) * parameters[:, :16].unflatten(1, (2, 8)).softmax(2)
    x = (lengths.cumsum(2)[0, axis, :-1] * 6 - 3).requires_grad_()
    y, log_slope = (rational_quadratic, rational_quadratic_inverse)[axis](x, parameters)
    assert y.isfinite().all() and log_slope.isfinite().all()
    (slope,) = torch.autograd.grad(log_slope.sum(), x)
    assert slope.isfinite().all()


def test_no_bin_and_no_slope_vanishes():
    parameters = torch.zeros(1, 23, 1, dtype=torch.float64)
    parameters[0, [0, 15]] = 1e3  # one wide bin, one high bin
    parameters[0, 16:] = -1e3  # flat at the knots
    x = torch.linspace(-2.999, 2.999, 2001, dtype=torch.float64).view(-1, 1)
    _, log_slope = rational_quadratic(x, parameters)
    assert log_slope.isfinite().all() and log_slope.min() > math.log(MIN_SLOPE * MIN_BIN)


@pytest.mark.parametrize("bins", [-1, 0, 1, 1000])
def test_a_number_of_bins_that_cannot_be_is_refused(bins):
    with pytest.raises(UserError, match=f"bins = {bins} .* 2 .. 999"):
        spline_parameters(bins)
