"""Gradients through a solve: three ways against plain autograd, the steps against torchdiffeq, and clear ends."""

import math

import pytest
import torch
from torch import nn

from genflow.errors import UserError
from genflow.flows.adjoint import GRADIENTS, checkpointed
from genflow.flows.stepping import TABLEAUS, Stepping, march
from tests.noise import normal

SPAN = [(0.0, 1.0), (1.0, 0.2)]


class Problem:
    """A velocity that hears x, t, parameters and a condition, and two integrals along its path."""

    def __init__(self):
        self.x = normal(4, 3).requires_grad_()
        self.weight = (0.7 * normal(3, 3, seed=1)).requires_grad_()
        self.condition = normal(4, 3, seed=2).requires_grad_()
        self.calls = 0

    @property
    def parameters(self):
        return [self.weight, self.condition]

    def __call__(self, x, t, rates):
        self.calls += 1
        v = torch.tanh(x @ self.weight + t) * self.condition
        if not rates:
            return v, None
        return v, torch.stack([(x * self.weight.sum(0)).sin().sum(1), v.square().sum(1)], 1)

    def loss(self, x, q):
        return (x.square() * normal(4, 3, seed=3)).sum() + (q * normal(4, 2, seed=4)).sum()

    def gradients(self, solve):
        solved = solve(self)
        return solved, torch.autograd.grad(self.loss(solved[0], solved[1]), [self.x, *self.parameters])


def plain(problem, start, end, steps=100):
    """Classical Runge-Kutta in many steps, by autograd."""
    x, q, h = problem.x, 0, (end - start) / steps
    for i in range(steps):
        t = start + i * h
        k1, r1 = problem(x, t, True)
        k2, r2 = problem(x + h / 2 * k1, t + h / 2, True)
        k3, r3 = problem(x + h / 2 * k2, t + h / 2, True)
        k4, r4 = problem(x + h * k3, t + h, True)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        q = q + h / 6 * (r1 + 2 * r2 + 2 * r3 + r4)
    return x, q


@pytest.fixture(scope="module")
def fine():
    return {span: Problem().gradients(lambda p, span=span: plain(p, *span)) for span in SPAN}


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("span", SPAN)
@pytest.mark.parametrize("solver", ["dopri5", "tsit5", "bosh3"])
@pytest.mark.parametrize("gradient", list(GRADIENTS))
def test_gradients_are_those_of_a_fine_solve_by_autograd(gradient, solver, span, fine):
    tolerance = 1e-6 if solver == "bosh3" else 1e-9
    stepping = Stepping(solver, rtol=tolerance, atol=tolerance)
    (x, q, *_), grads = Problem().gradients(
        lambda p: GRADIENTS[gradient](p, p.x, p.parameters, stepping, start=span[0], end=span[1])
    )
    (x_fine, q_fine), grads_fine = fine[span]
    torch.testing.assert_close(x, x_fine, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(q, q_fine, rtol=tolerance, atol=100 * tolerance)
    for ours, reference in zip(grads, grads_fine, strict=True):
        torch.testing.assert_close(ours, reference, rtol=100 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize("solver", list(TABLEAUS))
def test_checkpointed_gradients_are_exactly_those_of_the_steps_taken(solver):
    """However coarse they are: autograd through the same formula."""
    steps, tableau = 3, TABLEAUS[solver]

    def by_autograd(problem):
        x, q, h = problem.x, 0, 1 / steps
        for n in range(steps):
            slopes = []
            y, added = x, 0
            for c, row, b in zip(tableau.c, tableau.a, tableau.b, strict=True):
                y = x + sum((h * a * k for a, k in zip(row, slopes, strict=True)), torch.zeros_like(x))
                k, r = problem(y, (n + c) * h, True)
                slopes.append(k)
                added = added + h * b * r
            x = x + sum(h * b * k for b, k in zip(tableau.b, slopes, strict=True))
            q = q + added
        return x, q

    ours, reference = (
        Problem().gradients(f)
        for f in (lambda p: checkpointed(p, p.x, p.parameters, Stepping(solver, steps=steps)), by_autograd)
    )
    for a, b in zip((*ours[0][:2], *ours[1]), (*reference[0], *reference[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", ["adjoint", "interpolated"])
def test_fixed_steps_have_the_other_gradients_too(gradient, fine):
    stepping = Stepping("rk4", steps=40)
    _, grads = Problem().gradients(lambda p: GRADIENTS[gradient](p, p.x, p.parameters, stepping))
    for ours, reference in zip(grads, fine[SPAN[0]][1], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", list(GRADIENTS))
def test_a_backward_may_be_taken_twice(gradient):
    p = Problem()
    solved = GRADIENTS[gradient](p, p.x, p.parameters)
    loss = p.loss(solved.x, solved.q)
    first = torch.autograd.grad(loss, p.x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, p.x)[0])


@pytest.mark.parametrize("gradient", list(GRADIENTS))
def test_gradients_of_gradients_are_refused(gradient):
    p = Problem()
    solved = GRADIENTS[gradient](p, p.x, p.parameters)
    for loss in (solved.x.square().sum(), solved.x.sum()):  # whose gradient to x is a constant
        with pytest.raises(UserError, match="a solve has first gradients only"):
            torch.autograd.grad(loss, p.x, create_graph=True, retain_graph=True)


@pytest.mark.parametrize("gradient", list(GRADIENTS))
def test_gradients_go_through_a_condition_that_was_computed(gradient):
    p = Problem()
    base = normal(4, 3, seed=8).requires_grad_()
    p.condition = base.sin()
    stepping = Stepping(rtol=1e-8, atol=1e-8)
    solved = GRADIENTS[gradient](p, p.x, p.parameters, stepping)
    ours = torch.autograd.grad(p.loss(solved.x, solved.q), base, retain_graph=True)[0]
    reference = torch.autograd.grad(p.loss(*plain(p, 0.0, 1.0)), base)[0]
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", list(GRADIENTS))
def test_autocast_holds_on_the_way_back_and_keeps_the_gradients(gradient):
    torch.manual_seed(0)
    net, x = nn.Linear(3, 3), torch.randn(4, 3)
    seen = set()

    def dynamics(x, t, rates):
        v = net(x)
        seen.add(v.dtype)
        return v.float(), x.new_zeros(len(x), 1) if rates else None

    def grads():
        solved = GRADIENTS[gradient](dynamics, x, [*net.parameters()], Stepping("rk4", steps=4))
        return torch.autograd.grad(solved.x.square().sum(), net.parameters())

    full = grads()
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        solved = GRADIENTS[gradient](dynamics, x, [*net.parameters()], Stepping("rk4", steps=4))
    half = torch.autograd.grad(solved.x.square().sum(), net.parameters())
    assert seen == {torch.bfloat16}
    for a, b in zip(full, half, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    seen.clear()
    solved = GRADIENTS[gradient](dynamics, x, [*net.parameters()], Stepping("rk4", steps=4))
    with torch.autocast("cpu", torch.bfloat16):  # that of the way there counts
        late = torch.autograd.grad(solved.x.square().sum(), net.parameters())
    assert seen == {torch.float32}
    for a, b in zip(full, late, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_the_backward_keeps_no_graph_but_one_evaluations():
    """The tensors alive while stages are differentiated: as many for many steps as for few, but for the states."""
    alive, most = 0, 0

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal alive, most
            if ctx.needs_input_grad[0]:
                ctx.mark = Mark()
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return g

    class Mark:
        def __init__(self):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    def dynamics(x, t, rates):
        return Kept.apply(x), x.new_zeros(len(x), 1) if rates else None

    x = normal(2, 3).requires_grad_()
    checkpointed(dynamics, x, [], Stepping("rk4", steps=30)).x.sum().backward()
    assert most <= 2


# --------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_nfe_is_what_the_dynamics_were_called(gradient):
    for stepping in (Stepping(), Stepping("rk4", steps=5), Stepping("bosh3", rtol=1e-3)):
        for recording in (False, True):
            p = Problem()
            with torch.set_grad_enabled(recording):
                solved = GRADIENTS[gradient](p, p.x, p.parameters, stepping)
            assert solved.nfe == p.calls > 0


@pytest.mark.parametrize("gradient", list(GRADIENTS))
def test_what_is_not_in_the_loss_is_not_computed_on_the_way_back(gradient):
    asked = []

    class Watched(Problem):
        def __call__(self, x, t, rates):
            if torch.is_grad_enabled():
                asked.append(rates)
            return super().__call__(x, t, rates)

    for part, wanted in (("x", False), ("q", True)):
        p = Watched()
        stepping = Stepping(rtol=1e-8, atol=1e-8)
        loss = lambda each: each.square().sum()
        ours = torch.autograd.grad(
            loss(getattr(GRADIENTS[gradient](p, p.x, p.parameters, stepping), part)), [p.x, p.weight]
        )
        assert any(asked) == wanted
        q = Problem()
        reference = torch.autograd.grad(loss(plain(q, 0.0, 1.0)["xq".index(part)]), [q.x, q.weight])
        for a, b in zip(ours, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rates_are_asked_where_they_have_a_weight():
    asked = []

    def dynamics(x, t, rates):
        asked.append(rates)
        return -x, x[:, :1] if rates else None

    checkpointed(dynamics, normal(2, 2), [], Stepping("dopri5", steps=2))
    assert asked == [True, False, True, True, True, True] * 2


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("dopri5", 5)])
def test_errors_fall_with_the_order_of_the_solver(solver, order):
    def field(y, t, rates):
        return -3 * t * y**2, [y]

    def error(steps):
        y = march(field, torch.ones(1, 1, dtype=torch.float64), 0.0, 1.0, Stepping(solver, steps=steps)).y
        return abs(y.item() - 0.4)

    assert math.log2(error(16) / error(32)) == pytest.approx(order, abs=0.4)


def test_adaptive_steps_end_where_torchdiffeqs_do():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    p = Problem()
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    zero = torch.zeros(4, 2, dtype=torch.float64)
    with torch.no_grad():
        x, q = torchdiffeq.odeint(lambda t, s: p(s[0], float(t), True), (p.x, zero), times, rtol=1e-9, atol=1e-9)
        solved = checkpointed(p, p.x, [], Stepping(rtol=1e-9, atol=1e-9))
    torch.testing.assert_close(solved.x, x[-1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solved.q, q[-1], rtol=1e-7, atol=1e-7)


def test_tighter_tolerances_take_more_steps_and_have_less_error():
    p = Problem()
    with torch.no_grad():
        exact, _ = plain(p, 0.0, 1.0)
        found = [checkpointed(p, p.x, [], Stepping(rtol=tol, atol=tol)) for tol in (1e-3, 1e-6, 1e-9)]
    errors = [(s.x - exact).abs().max().item() for s in found]
    assert errors[0] > errors[1] > errors[2] and found[0].nfe < found[1].nfe < found[2].nfe
    assert all(error < 10 * tol for error, tol in zip(errors, (1e-3, 1e-6, 1e-9), strict=True))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"solver": "dopri"}, "dopri5"),
        ({"solver": "picard"}, "no gradient"),
        ({"solver": "euler_maruyama"}, "no gradient"),
        ({"solver": "rk4"}, "give steps"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": True}, "steps = True"),
        ({"max_steps": 0}, "max_steps"),
        ({"rtol": 0.0}, "positive"),
        ({"atol": -1.0}, "positive"),
        ({"rtol": math.nan}, "positive"),
    ],
)
def test_impossible_steppings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Stepping(**fields)


@pytest.mark.parametrize("dtype, rtol, floor", [(torch.float32, 1e-7, "9.5e-07"), (torch.bfloat16, 5e-3, "1.0e-02")])
def test_a_tolerance_below_the_noise_is_refused_with_the_floor(dtype, rtol, floor):
    with pytest.raises(UserError, match=floor):
        Stepping(rtol=rtol).check(dtype)
    Stepping(rtol=rtol, steps=3).check(dtype)


@pytest.mark.parametrize("stepping", [Stepping(), Stepping("rk4", steps=10)])
def test_a_velocity_that_is_not_finite_is_told_with_its_samples_and_time(stepping):
    def dynamics(x, t, rates):
        bad = torch.arange(len(x)).unsqueeze(1) % 2 == 1
        return torch.where(bad & (t > 0.55), torch.nan, x), x[:, :1] if rates else None

    with pytest.raises(UserError, match=r"not finite .* at t = 0\.[56]\d*; samples 1, 3 of 5"):
        checkpointed(dynamics, normal(5, 2), [], stepping)


def test_a_start_that_is_not_finite_is_told():
    with pytest.raises(UserError, match="at t = 0; samples 2 of 3"):
        checkpointed(lambda x, t, rates: (x, x), torch.tensor([[1.0], [2.0], [math.inf]]), [], Stepping())


def test_a_solve_that_does_not_arrive_says_so():
    with pytest.raises(UserError, match="after 5 steps"):
        checkpointed(lambda x, t, rates: (-1e4 * x, x), normal(2, 1), [], Stepping(max_steps=5))


@pytest.mark.parametrize("gradient", ["adjoint", "interpolated"])
@pytest.mark.parametrize("part", ["x", "q"])
def test_the_tolerance_of_a_gradient_is_relative_to_the_loss(gradient, part):
    p = Problem()

    def grads(scale):
        solved = GRADIENTS[gradient](p, p.x, p.parameters, Stepping(rtol=1e-6, atol=1e-6))
        return torch.autograd.grad(scale * getattr(solved, part).sin().sum(), [p.x, *p.parameters])

    for small, ours in zip(grads(2.0**-40), grads(1.0), strict=True):
        torch.testing.assert_close(small * 2.0**40, ours, rtol=1e-12, atol=1e-12)
    assert all(nothing.count_nonzero() == 0 for nothing in grads(0.0))


@pytest.mark.parametrize("solver", ["bosh3", "dopri5", "tsit5"])
def test_no_step_is_taken_whose_error_is_above_the_tolerance(solver):
    """The estimate of every step that was kept, from its slopes, in the root mean square over the batch."""
    stepping = Stepping(solver, rtol=1e-6, atol=1e-8)
    field = lambda y, t, rates: (-30 * (y - math.cos(3 * t)), [] if rates else None)
    y = normal(4, 3)
    steps = march(field, y, 0.0, 2.0, stepping, keep=lambda step: step).kept
    ends = [*(step.stages[0] for step in steps[1:]), None]
    ratios = []
    for step, end in zip(steps[:-1], ends):
        error = step.h * torch.tensordot(step.slopes.new_tensor(stepping.tableau.error), step.slopes, 1)
        size = stepping.atol + stepping.rtol * torch.maximum(step.stages[0].abs(), end.abs())
        ratios.append(float((error / size).square().mean().sqrt()))
    assert 0.1 < max(ratios) <= 1 + 1e-9


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_parameter_that_has_changed_since_gives_no_wrong_gradient(gradient):
    problem = Problem()
    solved = GRADIENTS[gradient](problem, problem.x, problem.parameters, Stepping(rtol=1e-6, atol=1e-6))
    with torch.no_grad():
        problem.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        solved.x.sum().backward()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_are_of_the_state_given_though_it_is_written_to_before_the_backward(gradient):
    def found(write):
        x, weight = normal(4, 3), normal(3, 3, seed=1).requires_grad_()
        solved = GRADIENTS[gradient](lambda x, t, rates: (torch.tanh(x @ weight), x if rates else None), x, [weight])
        if write:
            x.zero_()
        return torch.autograd.grad(solved.x.square().sum(), weight)[0]

    assert torch.equal(found(write=True), found(write=False))
