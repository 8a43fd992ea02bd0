"""The invertible 1x1 convolution and its cached inverse, permutations, squeeze and split."""

from __future__ import annotations

import pytest
import torch

from genflow.errors import UserError
from genflow.flows.bijections.elementwise import Affine
from genflow.flows.bijections.linear import InvertibleConv1x1, Permutation
from genflow.flows.bijections.shapes import Split, Squeeze
from tests.noise import shaken


def test_a_convolution_starts_as_a_rotation():
    conv = InvertibleConv1x1((6, 2, 2)).double()
    weight = conv.weight()
    torch.testing.assert_close(weight @ weight.T, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)
    assert conv(torch.randn(3, 6, 2, 2))[1].abs().max() < 1e-5


def test_convolution_is_the_matrix_at_every_place_and_its_volume_that_of_slogdet():
    conv, x = shaken(InvertibleConv1x1((5, 3, 2)), 0.2).double(), torch.randn(4, 5, 3, 2, dtype=torch.float64)
    z, ladj = conv(x)
    weight = conv.weight()
    torch.testing.assert_close(z, torch.einsum("ij,bjhw->bihw", weight, x))
    torch.testing.assert_close(ladj, 6 * torch.linalg.slogdet(weight)[1].expand(4))
    vectors = shaken(InvertibleConv1x1((5,)), 0.2).double()
    torch.testing.assert_close(vectors(x[:, :, 0, 0])[0], x[:, :, 0, 0] @ vectors.weight().T)


def test_the_inverse_is_the_inverse_matrix():
    conv = shaken(InvertibleConv1x1((7, 2, 2)), 0.2).double()
    torch.testing.assert_close(conv.inverse_weight(), torch.linalg.inv(conv.weight()))


def test_signs_and_order_are_kept_by_the_state_dict():
    one, other = InvertibleConv1x1((6,)), InvertibleConv1x1((6,))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.weight(), other.weight())


def test_matrices_are_kept_in_eval_and_follow_the_weights():
    conv = InvertibleConv1x1((4, 2, 2)).eval()
    with torch.no_grad():
        kept = conv.inverse_weight()
        assert conv.inverse_weight() is kept and conv.weight() is conv.weight()
        conv.log_diagonal.add_(0.5)  # in place, as optimisers do
        assert (conv.inverse_weight() - kept).abs().max() > 0.1
        conv.load_state_dict(InvertibleConv1x1((4, 2, 2)).state_dict())
        torch.testing.assert_close(conv.inverse_weight() @ conv.weight(), torch.eye(4), atol=1e-5, rtol=0)
        conv.lower.data = torch.randn(4, 4)
        torch.testing.assert_close(conv.inverse_weight() @ conv.weight(), torch.eye(4), atol=1e-5, rtol=0)
        conv.double()
        assert conv.inverse_weight().dtype == conv.weight().dtype == torch.float64
    assert conv.weight().requires_grad  # gradients are asked for: nothing kept is handed out
    with torch.no_grad():
        assert conv.train().weight() is not conv.weight()


def test_autocast_does_not_reach_the_map():
    conv, x = InvertibleConv1x1((4, 2, 2)), torch.randn(3, 4, 2, 2)
    plain = conv(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x)[0], plain)
        assert conv.weight().dtype == conv.inverse_weight().dtype == torch.float32


def test_permutations():
    x = torch.arange(5.0).expand(2, 5)
    assert Permutation((5,), reverse=True)(x)[0][0].tolist() == [4, 3, 2, 1, 0]
    one, same, other = Permutation((32,)), Permutation((32,), seed=0), Permutation((32,), seed=1)
    assert torch.equal(one.order, same.order) and not torch.equal(one.order, other.order)
    assert sorted(one.order.tolist()) == list(range(32))


def test_squeeze_takes_squares_to_channels():
    x = torch.randn(2, 3, 4, 6)
    squeeze = Squeeze((3, 4, 6))
    z, _ = squeeze(x)
    assert z.shape[1:] == squeeze.output_shape == (12, 2, 3)
    assert torch.equal(z, torch.nn.functional.pixel_unshuffle(x, 2))
    assert torch.equal(squeeze.inv(z)[0], x)
    assert torch.equal(Squeeze((3, 4, 6), 1)(x)[0], x)


@pytest.mark.parametrize(
    ("shape", "factor", "words"),
    [
        ((1, 7, 8), 2, "6 x 8 or 8 x 8"),
        ((1, 28, 28), 8, "24 x 24 or 32 x 32"),
        ((1, 1, 1), 2, "2 x 2"),
        ((4,), 2, "pictures"),
    ],
)
def test_squeeze_refuses_sizes_and_names_the_nearest(shape, factor, words):
    with pytest.raises(UserError, match=words):
        Squeeze(shape, factor)


@pytest.mark.parametrize("shape", [(4, 2, 2), (3,)])
def test_split_standardises_one_half_given_the_other(shape):
    kept = (shape[0] + 1) // 2
    inner = Affine((kept, *shape[1:]), scale=2.0)
    split = shaken(Split(shape, inner, condition_dim=3), 0.2).double()
    x, condition = torch.randn(5, *shape, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    z, ladj = split(x, condition)
    mean, log_sigma = split._moments(x[:, :kept], condition)
    assert z.shape == x.shape
    torch.testing.assert_close(z[:, :kept], 2 * x[:, :kept])
    torch.testing.assert_close(z[:, kept:], (x[:, kept:] - mean) / log_sigma.exp())
    # log p(x2 | x1) under N(mu, sigma^2) is the standard normal's at z2 plus the volume
    prior = torch.distributions.Normal(mean, log_sigma.exp()).log_prob(x[:, kept:]).flatten(1).sum(1)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, kept:]).flatten(1).sum(1)
    torch.testing.assert_close(prior, standard + ladj - inner(x[:, :kept])[1])
    torch.testing.assert_close(split.decode(z, condition), x)
    other, _ = split(x, condition + 1)
    assert (other - z)[:, kept:].abs().max() > 1e-3 and torch.equal(other[:, :kept], z[:, :kept])


def test_split_starts_as_its_inner_bijection_and_needs_two_channels():
    x = torch.randn(2, 4, 3, 3)
    z, ladj = Split((4, 3, 3))(x)
    assert torch.equal(z, x) and ladj.abs().max() == 0
    with pytest.raises(UserError, match="squeeze first"):
        Split((1, 4, 4))
    with pytest.raises(UserError, match="condition is missing"):
        Split((4, 3, 3), condition_dim=2)(x)
