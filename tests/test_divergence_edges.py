"""Divergences where autograd records nothing, of velocities that are detached, of few numbers and of no samples."""

import pytest
import torch

from genflow.errors import UserError
from genflow.flows.bijections.base import Chain
from genflow.flows.bijections.continuous import CNF
from genflow.flows.bijections.memory import Reversible
from genflow.flows.bijections.residual import ResidualBlock
from genflow.flows.bijections.transformer import tweedie
from genflow.flows.divergence import Divergence, fingerprint
from genflow.flows.models.ffjord import FFJORDConfig
from genflow.flows.velocity_likelihood import _clenshaw_curtis, velocity_log_prob
from genflow.functional import Rng
from genflow.training.apply import checkpointed

MATRIX = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)) / 2


def linear(x, t):
    return torch.tanh(x @ MATRIX.to(x.dtype)) * (1 + t.view(-1, 1))


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        return self.scale * linear(x, t)


def rows(n=3):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(2))


def test_inference_mode_is_refused_where_derivatives_are_needed_and_only_there():
    pushed = CNF((5,)).eval()  # its network pushes tangents forward
    for p in pushed.parameters():
        torch.nn.init.constant_(p, 0.3)
    with torch.inference_mode():
        x = rows()
        for act in (
            lambda: velocity_log_prob(linear, x, divergence="exact"),
            lambda: CNF((5,), Linear()).eval()(x),
            lambda: ResidualBlock((5,)).eval()(x),
            lambda: tweedie(lambda y: -y.square().sum(1), x, 0.1),
        ):
            with pytest.raises(UserError, match="take torch.no_grad"):
                act()
        assert pushed(x)[1].abs().min() > 0
        ResidualBlock((5,)).eval().decode(x)
    with torch.no_grad():
        assert velocity_log_prob(linear, rows(), divergence="exact").ladj.abs().min() > 0


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.vmap])
@pytest.mark.parametrize("make", [CNF, lambda shape: CNF(shape, Linear()), ResidualBlock])
def test_transforms_that_autograd_cannot_be_asked_under_are_refused(make, transform):
    made = make((5,)).eval()
    with pytest.raises(UserError, match="is differentiated by autograd, not by torch.func"):
        transform(lambda row: made(row[None])[0][0])(rows() if transform is torch.func.vmap else rows()[0])


@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
@pytest.mark.parametrize("velocity", [torch.no_grad()(linear), lambda x, t: linear(x, t).detach()])
def test_a_velocity_that_is_detached_from_x_is_refused(velocity, kind):
    with pytest.raises(UserError, match="follows x, but has no gradient"):
        velocity_log_prob(velocity, rows(), divergence=kind)
    shift = torch.zeros(5, requires_grad=True)
    with pytest.raises(UserError, match="follows x, but has no gradient"):
        velocity_log_prob(lambda x, t: velocity(x, t) + shift, rows(), divergence=kind)
    assert velocity_log_prob(lambda x, t: (shift + 1).expand_as(x), rows(), divergence=kind).ladj.tolist() == [0] * 3


def test_nan_is_no_dependence_on_x():
    found = Divergence()(lambda x, t: torch.full_like(x, torch.nan), rows(), torch.zeros(3))
    assert found.v.isnan().all()


@pytest.mark.parametrize(("dims", "draws"), [(3, 2), (4, 3), (5, 2), (8, 4)])
def test_the_sketches_of_hutchpp_span_as_much_as_they_are(dims, draws):
    x = torch.randn(200, dims, generator=torch.Generator().manual_seed(0))
    sketch = Divergence("hutch++", draws).probes(x, Rng(0), fingerprint(x))[:draws].double()
    smallest = torch.linalg.svdvals(sketch.permute(1, 2, 0))[:, -1]
    assert smallest.min() > 1e-4


@pytest.mark.parametrize("kind", ["exact", "hutchinson", "hutchinson_gaussian", "hutch++"])
def test_no_samples_have_no_likelihoods(kind):
    found = velocity_log_prob(linear, torch.zeros(0, 5), divergence=kind, draws=1)
    assert found.log_prob.shape == (0,) and found.z.shape == (0, 5)


def test_an_invertible_checkpoint_refuses_a_cnf():
    ffjord = FFJORDConfig(shape=(3,), condition_dim=0, hidden=(4,), kinetic=1.0).build()
    for act in (lambda: checkpointed(ffjord), lambda: Reversible(Chain([CNF((3,)).inv]))):
        with pytest.raises(UserError, match="is not for a CNF"):
            act()


@pytest.mark.parametrize("kind", ["exact", "hutchinson", "hutchinson_gaussian", "hutch++"])
def test_samples_of_one_number_have_the_likelihood_of_rows_of_one(kind):
    def swing(x, t):
        return torch.sin(2 * x) + (t if x.dim() == 1 else t.view(-1, 1))

    x, how = rows()[:, 0], {"divergence": kind, "draws": 1 if kind == "exact" else 3}
    found, expected = (velocity_log_prob(swing, each, **how) for each in (x, x[:, None]))
    torch.testing.assert_close(found.log_prob, expected.log_prob)
    torch.testing.assert_close(found.z, expected.z[:, 0])


@pytest.mark.parametrize(("kind", "draws"), [("exact", 1), ("hutchinson", 2), ("hutch++", 2)])
def test_a_likelihood_is_the_same_under_another_default_device(kind, draws):
    x = torch.randn(2, 3)
    _clenshaw_curtis.cache_clear()
    with torch.device("meta"):
        elsewhere = velocity_log_prob(lambda x, t: torch.tanh(x), x, divergence=kind, draws=draws).log_prob
    assert torch.equal(
        elsewhere, velocity_log_prob(lambda x, t: torch.tanh(x), x, divergence=kind, draws=draws).log_prob
    )
