"""Models of other paths against closed forms, against k-diffusion's and DDIM's formulas, and there and back."""

import math
import pickle
from itertools import pairwise

import pytest
import torch

from genflow.errors import UserError
from genflow.samplers import euler, heun, uniform
from genflow.samplers.paths import Path, model_from, velocity_from

CENTRES = torch.tensor([[1.5, -0.5], [-1.0, 0.8], [0.2, 0.1]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
WIDTHS = torch.tensor([0.4, 0.6, 0.2], dtype=torch.float64)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's
TABLE = (1 - BETAS).cumprod(0)

PATHS = {
    "linear": Path.linear(),
    "cosine": Path.cosine(),
    "ve": Path.ve(),
    "vp": Path.vp(),
    "discrete": Path.discrete(TABLE),
}
COMBINATIONS = [(path, kind) for path in PATHS for kind in ("eps", "x", "v", "velocity")]
COMBINATIONS.remove(("discrete", "velocity"))


def posterior(x_s, a, b):
    """E[x | x_s] and E[eps | x_s] for a mixture of Gaussians on x_s = a x + b eps; a, b numbers or of shape B."""
    a, b = (torch.as_tensor(k, dtype=torch.float64).view(-1, 1) for k in (a, b))
    var = a**2 * WIDTHS**2 + b**2  # B x 3
    gap = x_s.unsqueeze(1) - a.unsqueeze(-1) * CENTRES  # B x 3 x 2
    resp = (WEIGHTS.log() - var.log() - gap.square().sum(-1) / (2 * var)).softmax(1).unsqueeze(-1)
    x = CENTRES + (a * WIDTHS**2 / var).unsqueeze(-1) * gap
    eps = (b / var).unsqueeze(-1) * gap
    return (resp * x).sum(1), (resp * eps).sum(1)


def exact(z, t):
    x, eps = posterior(z, 1 - t, t)
    return eps - x


def trained(path, kind):
    """The ideal network of a path: what one trained there would answer, from the definitions alone."""

    def model(x_s, s):
        assert s.shape == x_s.shape[:1]
        a, b = path.alpha(s.double()).view(-1, 1), path.sigma(s.double()).view(-1, 1)
        x, eps = posterior(x_s.double(), a.flatten(), b.flatten())
        if kind == "velocity":
            da, db = (torch.autograd.functional.jvp(f, s, torch.ones_like(s))[1] for f in (path.alpha, path.sigma))
            answer = da.view(-1, 1) * x + db.view(-1, 1) * eps
        else:
            answer = {"x": x, "eps": eps, "v": a * eps - b * x}[kind]
        return answer.to(x_s.dtype)

    return model


@pytest.fixture
def noise():
    return torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------------- models as velocities


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_any_prediction_on_any_path_is_the_analytic_velocity(name, kind, noise):
    path = PATHS[name]
    velocity = velocity_from(trained(path, kind), path, kind)
    low, high = max(path.t_min, 1e-3), min(path.t_max, 1 - 1e-3)
    times = torch.linspace(low, high, 6, dtype=torch.float64)
    torch.testing.assert_close(velocity(noise, times), exact(noise, times), rtol=0, atol=1e-10)
    for t in times.tolist():
        torch.testing.assert_close(velocity.at(noise, t), exact(noise, t), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_the_ends_of_time_are_finite_and_right(name, kind, noise):
    path = PATHS[name]
    velocity = velocity_from(trained(path, kind), path, kind)
    for t in (0.0, 1.0):
        v, known = velocity.at(noise, t), exact(noise, min(max(t, path.t_min), path.t_max))
        torch.testing.assert_close(v, velocity(noise, torch.full((6,), t)))
        at_end = path.t_min <= t <= path.t_max and kind not in ("eps", "x")
        torch.testing.assert_close(v, known, rtol=0, atol=1e-10 if at_end else 2e-2)
    # float32 throughout, at the end where the prediction says least
    t = 0.0 if kind == "x" else 1.0
    torch.testing.assert_close(velocity.at(noise.float(), t), velocity.at(noise, t).float(), rtol=0, atol=2e-2)


def test_paths_are_those_of_the_papers():
    s = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    vp, beta = Path.vp(), lambda u: 0.1 + 19.9 * u
    steps = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for each in s:
        integral = torch.trapezoid(beta(steps * each), steps * each)
        assert vp.alpha(each) ** 2 == pytest.approx(math.exp(-integral), rel=1e-9)
    for path in (vp, PATHS["cosine"], PATHS["discrete"]):  # of unit variance
        torch.testing.assert_close(path.alpha(s) ** 2 + path.sigma(s) ** 2, torch.ones_like(s))
    assert Path.ve().t_max == 80 / 81
    index = torch.tensor([0.0, 17.0, 500.0, 999.0], dtype=torch.float64)
    torch.testing.assert_close(PATHS["discrete"].alpha(index) ** 2, TABLE[index.long()])
    # halfway between two entries the log-SNR is halfway
    log_snr = lambda s: (PATHS["discrete"].alpha(s) / PATHS["discrete"].sigma(s)).log()
    torch.testing.assert_close(log_snr(index + 0.5)[:3], (log_snr(index) + log_snr(index + 1))[:3] / 2)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_times_go_there_and_back(path):
    t = torch.linspace(path.t_min, path.t_max, 50, dtype=torch.float64)
    t = t[1:-1]
    torch.testing.assert_close(path.t_of_s(path.s_of_t(t)), t, rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", [*PATHS.values(), Path.ve(sigma_max=8.0)], ids=[*PATHS, "ve to 8"])
def test_a_path_survives_pickling(path):
    again = pickle.loads(pickle.dumps(path))
    s = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert torch.equal(again.sigma(s), path.sigma(s)) and torch.equal(again.s_of_t(s), path.s_of_t(s))
    assert (again.t_min, again.t_max) == (path.t_min, path.t_max)


def test_a_table_of_whole_timesteps_asks_for_the_nearest_and_is_exact_on_them(noise):
    path, asked = Path.discrete(TABLE, nearest=True), []
    ideal = trained(path, "eps")

    def model(x, s):
        asked.append(s)
        return ideal(x, s)

    velocity = velocity_from(model, path, "eps")
    t = path.t_of_s(torch.tensor(501.0, dtype=torch.float64)).item()
    torch.testing.assert_close(velocity.at(noise, t), exact(noise, t), rtol=0, atol=1e-10)
    for part, entry in ((0.3, 501), (0.7, 502)):
        near = t + part * (path.t_of_s(torch.tensor(502.0, dtype=torch.float64)).item() - t)
        assert torch.equal(velocity.at(noise, near), velocity(noise, torch.full((6,), near, dtype=torch.float64)))
        for s in asked[-2:]:
            assert s.dtype == torch.int64 and s.tolist() == [entry] * 6


def test_a_table_that_ends_without_any_signal_is_taken():
    path = Path.discrete([*TABLE[:-1].tolist(), 0.0])
    assert path.t_max == pytest.approx(1 - 2**-12, abs=1e-6)
    assert math.isfinite(path.s_of_t(torch.tensor(path.t_max, dtype=torch.float64)))
    faint = Path.discrete([0.5, 1e-9, 0.0])  # 0 counts as half of what is less than 2^-24
    assert float(faint.alpha(torch.tensor(2.0).double())) ** 2 == pytest.approx(5e-10)


def test_a_table_rescaled_to_no_terminal_signal_or_of_very_little_ends_at_its_last_timestep(noise):
    root = TABLE.sqrt()
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()  # arXiv 2305.08891, algorithm 1
    long = (1 - torch.linspace(1e-4, 0.02, 10_000, dtype=torch.float64)).cumprod(0)
    for table in (rescaled, long[:4000], long):
        for nearest in (False, True):
            path = Path.discrete(table, nearest=nearest)
            s = torch.arange(len(table), dtype=torch.float64)
            assert path.alpha(s).diff().max() < 0
            positive = table > 0
            torch.testing.assert_close(path.alpha(s[positive]).square(), table[positive], rtol=1e-9, atol=0)
            assert path.s_of_t(torch.tensor(path.t_max, dtype=torch.float64)) == len(table) - 1
            asked = []
            velocity_from(lambda x, s, asked=asked: asked.append(s) or x, path, "v").at(noise, 1.0)
            assert asked[0].tolist() == [len(table) - 1] * len(noise)


def test_pictures_low_precision_and_gradients_go_through(noise):
    weight = torch.ones(1, requires_grad=True)
    seen = []

    def model(x, s):
        seen.append((x.dtype, s.dtype))
        return (weight * x).bfloat16()

    velocity = velocity_from(model, Path.vp(), "v")
    z = torch.randn(2, 3, 4, 4)
    x = heun(velocity, z, uniform(3)).x
    assert x.dtype == torch.float32 and set(seen) == {(torch.float32, torch.float32)}
    x.sum().backward()
    assert weight.grad.isfinite().all() and weight.grad != 0


def test_rows_are_taken_from_models_that_have_rows_of_their_own(noise):
    class Shifted:
        def __init__(self, by):
            self.by = by

        def __call__(self, x, s):
            return x + self.by

        def take(self, rows):
            return Shifted(self.by[rows])

    velocity, rows = velocity_from(Shifted(noise), Path.vp(), "x"), torch.tensor([4, 1])
    torch.testing.assert_close(velocity.take(rows).at(noise[rows], 0.5), velocity.at(noise, 0.5)[rows])
    assert not hasattr(velocity_from(exact, Path.vp(), "x"), "take")


# ------------------------------------------------------------------------------------------------------ the way back


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_a_velocity_is_the_model_of_any_path(name, kind, noise):
    path = PATHS[name]
    s = path.s_of_t(torch.linspace(path.t_min + 1e-3, path.t_max - 1e-3, 6, dtype=torch.float64))
    x_s = 3 * noise
    model = model_from(exact, path, kind)
    torch.testing.assert_close(model(x_s, s), trained(path, kind)(x_s, s), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x_s, s[2].item()), model(x_s, s[2].expand(6)))
    again = velocity_from(model, path, kind)
    torch.testing.assert_close(again.at(noise, 0.5), exact(noise, 0.5), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["cosine", "ve", "vp"])
def test_a_path_converted_to_another_gives_the_same_sample(name, noise):
    """Solved in its own time on its own path, and as a velocity of ours: one flow."""
    path = PATHS[name]
    field = trained(path, "velocity")
    grid = torch.linspace(0.9, 0.05, 201, dtype=torch.float64)
    s = path.s_of_t(grid)
    scale = path.alpha(s) + path.sigma(s)
    native = heun(field, noise * scale[0], s.tolist()).x / scale[-1]
    ours = heun(velocity_from(field, path, "velocity"), noise, grid.tolist()).x
    torch.testing.assert_close(native, ours, rtol=0, atol=2e-4)
    assert (ours - noise).abs().max() > 0.1


# ----------------------------------------------------------------------------------- other people's samplers, as printed

SIGMAS = [(80 ** (1 / 7) + i / 35 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(36)] + [0.0]


def karras(denoiser, x, sigmas, *, second_order):
    """Algorithm 1 of Karras et al. 2022 without churn: Euler's step, and Heun's correction where sigma is not yet 0."""
    for sigma, sigma_next in pairwise(sigmas):
        d = (x - denoiser(x, torch.full((len(x),), sigma, dtype=x.dtype))) / sigma
        x_next = x + (sigma_next - sigma) * d
        if second_order and sigma_next:
            d_next = (x_next - denoiser(x_next, torch.full((len(x),), sigma_next, dtype=x.dtype))) / sigma_next
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2
        x = x_next
    return x


def test_karras_euler_is_euler_of_the_converted_velocity(noise):
    """Both keep the predicted x and eps over a step, so that the path on which it is taken does not matter."""
    denoiser = trained(Path.ve(), "x")
    theirs = karras(denoiser, 80 * noise, SIGMAS, second_order=False)
    grid = [sigma / (1 + sigma) for sigma in SIGMAS]
    ours = euler(velocity_from(denoiser, Path.ve(), "x"), noise * 80 / 81, grid).x
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("second_order", [False, True])
def test_k_diffusion_samplers_run_on_a_rectified_flow(second_order, noise):
    """Karras' algorithm on the denoiser is our solver on dx/dsigma, step by step, and it draws the flow's samples."""
    denoiser, field = model_from(exact, Path.ve(), "x"), model_from(exact, Path.ve(), "velocity")
    theirs = karras(denoiser, 80 * noise, SIGMAS, second_order=second_order)
    sampler = heun if second_order else euler
    ours = sampler(field, 80 * noise, SIGMAS).x
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    fine = heun(exact, noise * 80 / 81, [80 / 81 * t for t in uniform(2000)]).x
    assert (theirs - fine).abs().max() < (0.02 if second_order else 0.15)


def test_ddim_on_a_discrete_table_is_euler_of_the_converted_velocity(noise):
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 with no noise, at 20 of the 1000 timesteps."""
    path = PATHS["discrete"]
    unet = trained(path, "eps")
    steps = list(range(999, -1, -52))
    x = noise
    for i, i_next in pairwise(steps):
        eps = unet(x, torch.full((6,), i, dtype=torch.float64))
        x0 = (x - (1 - TABLE[i]).sqrt() * eps) / TABLE[i].sqrt()
        x = TABLE[i_next].sqrt() * x0 + (1 - TABLE[i_next]).sqrt() * eps
    index = torch.tensor(steps, dtype=torch.float64)
    scale = path.alpha(index) + path.sigma(index)
    ours = euler(velocity_from(unet, path, "eps"), noise / scale[0], path.t_of_s(index).tolist()).x
    torch.testing.assert_close(ours * scale[-1], x, rtol=0, atol=1e-11)


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "near"),
    [
        (lambda: velocity_from(exact, Path.vp(), "epsilon"), "'eps'"),
        (lambda: model_from(exact, Path.vp(), "velocty"), "'velocity'"),
        (lambda: velocity_from(exact, PATHS["discrete"], "velocity"), "no rates"),
        (lambda: Path.discrete([0.9]), "two numbers"),
        (lambda: Path.discrete(torch.rand(3, 3)), r"\(3, 3\)"),
        (lambda: Path.discrete([0.9, 0.95, 0.1]), "entry 1 is 0.95"),
        (lambda: Path.discrete([1.0, 0.5]), "entry 0 is 1.0"),
        (lambda: Path.discrete([0.9, math.nan]), "entry 1"),
        (lambda: Path.discrete([0.9, -0.1]), "entry 1"),
        (lambda: Path.ve(3.0, 2.0), "sigma_max = 2.0"),
        (lambda: Path.vp(20.0, 0.1), "beta_max = 0.1"),
        (lambda: velocity_from(lambda x, s: x[:, :1], Path.ve(), "x").at(torch.zeros(2, 3), 0.5), r"\(2, 1\)"),
    ],
)
def test_impossible_paths_are_refused(make, near):
    with pytest.raises(UserError, match=near) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_model_of_another_path_answers_in_the_dtype_of_its_state(noise):
    for dtype in (torch.bfloat16, torch.float64):
        model = model_from(lambda z, t: -z, Path.vp(), "eps")
        assert model(noise.to(dtype), 0.5).dtype == dtype
