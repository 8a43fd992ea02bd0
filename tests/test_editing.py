"""Editing against a Gaussian mixture whose velocity is known: round trips, masks, arcs, edits by a prompt."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from genflow.errors import UserError
from genflow.functional import interpolate
from genflow.samplers import euler, heun, midpoint, rk4, shifted, uniform
from genflow.samplers.adaptive import dopri5
from genflow.samplers.editing import (
    flowedit,
    image_to_image,
    inpaint,
    invert,
    psnr,
    rf_inversion,
    round_trip,
)
from genflow.samplers.interpolation import blend, slerp
from genflow.samplers.parallel import picard
from genflow.samplers.stochastic import ancestral

SHAPE = (2, 4, 6)
MEANS = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
SPREAD = 0.4


def mixture(means, shift=0.0):
    """The exact velocity for data from a mixture of Gaussians of one spread around the means."""

    def velocity(z, t):
        t = t.view(-1, 1, 1, 1)
        var = (1 - t) ** 2 * SPREAD**2 + t**2
        away = z[:, None] - (1 - t)[:, None] * (means + shift).to(z)  # B x K x C x H x W
        weights = (-away.square().flatten(2).sum(2) / 2 / var.view(-1, 1)).softmax(1).view(*away.shape[:2], 1, 1, 1)
        slope = (t - (1 - t) * SPREAD**2) / var
        return (weights * (slope[:, None] * away - (means + shift).to(z))).sum(1)

    return velocity


VELOCITY = mixture(MEANS)


def pictures(n, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (MEANS[torch.arange(n) % 3] + SPREAD * torch.randn(n, *SHAPE, dtype=torch.float64, generator=g)).to(dtype)


def noises(n, seed=1, dtype=torch.float64):
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def x():
    return pictures(3)


@pytest.fixture
def noise():
    return noises(3)


# ------------------------------------------------------------------------------------------------------------ inversion


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (midpoint, 2), (rk4, 4)])
def test_inversion_then_sampling_returns_the_picture_at_the_order_of_the_sampler(sampler, order, x):
    trips = [round_trip(VELOCITY, x, uniform(steps), sampler=sampler) for steps in (40, 80, 160)]
    errors = [(trip.x - x).abs().max().item() for trip in trips]
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(rate > order - 0.3 for rate in rates), (rates, errors)
    assert trips[0].nfe < trips[1].nfe < trips[2].nfe
    for trip, better in pairwise(trips):
        assert trip.psnr.shape == (3,) and (better.psnr > trip.psnr + 4).all()


def test_the_noise_of_an_inversion_is_the_one_it_was_drawn_from(noise):
    drawn = rk4(VELOCITY, noise, uniform(100)).x
    torch.testing.assert_close(invert(VELOCITY, drawn, uniform(100), sampler=rk4).x, noise, rtol=0, atol=1e-5)


def test_inversion_runs_the_reversed_grid_and_is_counted(x):
    seen, steps = [], []

    def velocity(z, t):
        seen.append(float(t[0]))
        return VELOCITY(z, t)

    solution = invert(velocity, x, shifted(4, 3.0), sampler=euler, progress=lambda *each: steps.append(each))
    assert seen == shifted(4, 3.0)[:0:-1] and solution.nfe == 4 and steps == [(i, 4) for i in (1, 2, 3, 4)]
    trip = round_trip(VELOCITY, x, shifted(4, 3.0), sampler=heun)
    assert trip.nfe == 8 + 7 and torch.equal(trip.noise, invert(VELOCITY, x, shifted(4, 3.0), sampler=heun).x)


def test_psnr_is_its_formula():
    a = torch.zeros(3, 1, 2, 2)
    b = torch.stack([a[0], a[0] + 2, a[0] + 0.02])
    assert psnr(a, b).tolist() == [math.inf, 0.0, pytest.approx(40)]
    assert psnr(a, b, peak=1.0)[1] == pytest.approx(-10 * math.log10(4))


# ------------------------------------------------------------------------------------------ image-to-image and inpainting


def test_image_to_image_at_full_strength_is_plain_sampling(x, noise):
    for sampler in (euler, heun):
        edited = image_to_image(VELOCITY, x, noise, shifted(6, 2.0), 1.0, sampler=sampler)
        assert torch.equal(edited.x, sampler(VELOCITY, noise, shifted(6, 2.0)).x)


@pytest.mark.parametrize(("strength", "times"), [(0.6, [0.6, 0.4, 0.2]), (0.5, [0.5, 0.4, 0.2]), (0.1, [0.1])])
def test_image_to_image_begins_at_its_strength_from_the_noised_picture(strength, times, x, noise):
    seen = []

    def velocity(z, t):
        seen.append((float(t[0]), z))
        return VELOCITY(z, t)

    image_to_image(velocity, x, noise, uniform(5), strength, sampler=euler)
    assert [t for t, _ in seen] == pytest.approx(times)
    torch.testing.assert_close(seen[0][1], interpolate(x, noise, strength))


def test_a_strength_that_rounding_put_beside_a_time_of_the_grid_makes_no_empty_step(x, noise):
    assert image_to_image(VELOCITY, x, noise, [1.0, 0.1 + 0.2, 0.1, 0.0], 0.3 + 1e-16, sampler=euler).nfe == 2


def test_less_strength_keeps_more_of_the_picture(x, noise):
    kept = [psnr(image_to_image(VELOCITY, x, noise, uniform(40), s).x, x).mean() for s in (0.05, 0.3, 0.9)]
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize("sampler", [euler, heun, midpoint, rk4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inpainting_leaves_known_pixels_bit_equal(sampler, dtype):
    x, noise = pictures(3, dtype=dtype), noises(3, dtype=dtype)
    mask = torch.rand(3, 1, 4, 6) < 0.5
    result = inpaint(VELOCITY, x, mask, noise, shifted(6, 2.0), sampler=sampler)
    known = ~mask.expand_as(x)
    assert torch.equal(result.x[known], x[known]) and result.x.dtype == dtype
    assert not torch.isclose(result.x[~known], x[~known]).any() and result.ok
    one = inpaint(VELOCITY, x, mask[:1].float(), noise, shifted(6, 2.0), sampler=sampler).x
    assert torch.equal(one[:1], result.x[:1])  # one mask for all, and as numbers


def test_known_pixels_are_their_noised_version_at_every_evaluation(x, noise):
    mask = torch.zeros(1, 1, 4, 6)
    mask[..., :3] = 1
    seen = []

    def velocity(z, t):
        seen.append(float(t[0]))
        torch.testing.assert_close(z[..., 3:], interpolate(x, noise, float(t[0]))[..., 3:], rtol=0, atol=1e-15)
        return VELOCITY(z, t)

    solution = inpaint(velocity, x, mask, noise, uniform(5), sampler=heun)
    assert len(seen) == 9 == solution.nfe


def test_a_mask_of_everything_is_plain_sampling_and_of_nothing_the_picture(x, noise):
    everything, nothing = torch.ones(1, 1, 4, 6), torch.zeros(1, 1, 4, 6).bool()
    assert torch.equal(inpaint(VELOCITY, x, everything, noise, uniform(5)).x, heun(VELOCITY, noise, uniform(5)).x)
    assert torch.equal(inpaint(VELOCITY, x, nothing, noise, uniform(5)).x, x)
    half = inpaint(VELOCITY, x, everything / 2, noise, uniform(50)).x
    assert (half != x).all()


def test_inpainting_begins_on_the_path_where_the_grid_does(x, noise):
    mask, start = torch.ones(1, 1, 4, 6), interpolate(x, noise, 0.8)
    assert torch.equal(inpaint(VELOCITY, x, mask, noise, [0.8, 0.4, 0]).x, heun(VELOCITY, start, [0.8, 0.4, 0]).x)


def test_resampling_makes_the_new_part_agree_with_the_known_one():
    """Pictures of one grey level each, and a little noise: the level of the new half must be the known half's."""
    n, rough, size = 64, 0.2, math.prod(SHAPE)
    level = torch.randn(n, 1, 1, 1, dtype=torch.float64)
    x = level + rough * noises(n)
    mask = torch.ones(1, 1, 4, 6)
    mask[..., :3] = 0

    def velocity(z, t):  # the exact one: the mean of a picture and what is left are independent
        t, mean = t.view(-1, 1, 1, 1), z.mean((1, 2, 3), keepdim=True)

        def slope(data, noise):  # of a Gaussian of these variances
            return (t * noise - (1 - t) * data) / ((1 - t) ** 2 * data + t**2 * noise)

        return slope(1 + rough**2 / size, 1 / size) * mean + slope(rough**2, 1) * (z - mean)

    def error(repeats):
        solution = inpaint(velocity, x, mask, noises(n, 2), uniform(10), repeats=repeats, seeds=range(n))
        assert torch.equal(solution.x[..., :3], x[..., :3]) and solution.nfe == 19 * repeats
        return (solution.x[..., 3:].mean((1, 2, 3)) - level.flatten()).square().mean().sqrt()

    once, often = error(1), error(4)
    assert often < once / 3, (once, often)


# -------------------------------------------------------------------------------------------------------- interpolation


def test_an_arc_begins_at_a_ends_at_b_and_keeps_the_norm():
    a, b = noises(4, 1), noises(4, 2)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    b *= (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    for fraction in (0.25, 0.5, 0.9):
        norms = slerp(a, b, fraction).flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, a.flatten(1).norm(dim=1))
    angle = torch.nn.functional.cosine_similarity
    total = angle(a.flatten(1), b.flatten(1)).acos()
    part = angle(a.flatten(1), slerp(a, b, 0.25).flatten(1)).acos()
    torch.testing.assert_close(part, total / 4)


def test_an_arc_is_stable_when_nearly_parallel():
    a = noises(2, dtype=torch.float32)
    for size in (0.0, 1e-30, 1e-7, 1e-4):
        b = a * (1 + size) + size * noises(2, 5, torch.float32)
        for fraction in (0.0, 0.3, 1.0):
            torch.testing.assert_close(slerp(a, b, fraction), torch.lerp(a, b, fraction), rtol=1e-6, atol=1e-6)
    zero = torch.zeros_like(a)
    assert slerp(zero, a, 0.5).isfinite().all() and slerp(a, -a, 0.5).isfinite().all()


def test_frames_between_two_noises_are_one_batch():
    a, b = noises(1, 1), noises(1, 2)
    fractions = torch.linspace(0, 1, 5)
    frames = slerp(a, b, fractions)
    assert frames.shape == (5, *SHAPE)
    for frame, fraction in zip(frames, fractions, strict=True):
        torch.testing.assert_close(frame[None], slerp(a, b, float(fraction)))


def test_conditions_blend_tensor_by_tensor():
    a = (torch.randn(1, 3, 4), torch.tensor([[True, True, False]]), torch.randn(1, 2))
    b = (torch.randn(1, 3, 4), torch.tensor([[True, False, True]]), torch.randn(1, 2))
    tokens, mask, pooled = blend(a, b, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(tokens[0], a[0][0]) and torch.equal(tokens[2], b[0][0])
    torch.testing.assert_close(pooled[1], (a[2][0] + b[2][0]) / 2)
    assert mask.tolist() == [[True, True, False], [True, True, True], [True, False, True]]
    torch.testing.assert_close(blend(a, b, 0.3, spherical=True)[0], slerp(a[0], b[0], 0.3))


# ------------------------------------------------------------------------------------------------- editing by a prompt


def test_flowedit_between_equal_velocities_changes_nothing(x):
    for draws in (1, 3):
        edited = flowedit(VELOCITY, VELOCITY, x, shifted(10, 3.0), seeds=[1, 2, 3], draws=draws)
        assert torch.equal(edited.x, x)
        assert edited.nfe == 2 * draws * len([t for t in [0.85, *shifted(10, 3.0)] if 0 < t <= 0.85])


def test_flowedit_moves_between_translated_distributions_by_the_translation(x):
    edited = flowedit(VELOCITY, mixture(MEANS, 0.5), x, uniform(200), seeds=[1, 2, 3], strength=1.0, draws=8)
    torch.testing.assert_close(edited.x, x + 0.5, rtol=0, atol=0.25)


def test_flowedit_that_ends_by_plain_sampling_at_its_start_is_image_to_image(x):
    target = mixture(MEANS, 0.5)
    seen = []

    def source(z, t):
        pytest.fail("nothing is left to edit")

    def velocity(z, t):
        seen.append(z)
        return target(z, t)

    edited = flowedit(source, velocity, x, uniform(10), seeds=[1, 2, 3], strength=0.7, regular=0.7)
    noise = (seen[0] - 0.3 * x) / 0.7
    plain = image_to_image(target, x, noise, uniform(10), 0.7)
    torch.testing.assert_close(edited.x, plain.x)
    assert edited.nfe == plain.nfe
    part = flowedit(VELOCITY, target, x, uniform(10), seeds=[1, 2, 3], strength=0.7, regular=0.3, sampler=euler)
    assert part.nfe == 2 * 4 + 3 and part.ok


def test_rf_inversion_without_control_is_the_plain_round_trip(x, noise):
    for sampler in (euler, heun, midpoint):
        edited = rf_inversion(VELOCITY, VELOCITY, x, noise, shifted(8, 2.0), gamma=0, eta=0, sampler=sampler)
        trip = round_trip(VELOCITY, x, shifted(8, 2.0), sampler=sampler)
        assert torch.equal(edited.x, trip.x) and edited.nfe == trip.nfe


def test_rf_inversion_with_full_control_ends_in_its_target(x, noise):
    ends = []

    def back(z, t):
        ends.append(z)
        return VELOCITY(z, t)

    edited = rf_inversion(VELOCITY, back, x, noise, uniform(8), gamma=1, eta=1, interval=(0.0, 1.0))
    torch.testing.assert_close(ends[0], noise)
    torch.testing.assert_close(edited.x, x)
    for sampler in (heun, rk4):  # which ask at the singular ends
        assert rf_inversion(VELOCITY, VELOCITY, x, noise, uniform(8), interval=(0.0, 1.0), sampler=sampler).ok


def test_the_ends_of_the_interval_of_rf_inversion_belong_to_it_whatever_the_rounding_of_times(x, noise):
    times = [1 - i / 10 for i in range(11)]  # 0.19999999999999996 and 0.09999999999999998 among them
    one, other = (
        rf_inversion(VELOCITY, VELOCITY, x, noise, grid, interval=(0.1, 0.2)).x for grid in (times, uniform(10))
    )
    torch.testing.assert_close(one, other)


def test_rf_inversion_keeps_more_of_the_picture_with_more_control(x, noise):
    target = mixture(MEANS, 0.5)
    kept = [psnr(rf_inversion(VELOCITY, target, x, noise, uniform(28), eta=eta).x, x).mean() for eta in (0, 0.5, 0.9)]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize(("lo", "hi"), [(0.75, 1.0), (0.25, 0.5)])
def test_rf_inversion_is_the_algorithm_box(lo, hi, x, noise):
    """Algorithms 1 and 2, written out in Euler steps; the control acts on the steps back from times of the interval."""
    n, z = 8, x
    times = [i / n for i in range(n + 1)]
    for t, t_next in pairwise(times):
        u = VELOCITY(z, torch.full((3,), t, dtype=z.dtype))
        z = z + (t_next - t) * (u + 0.5 * ((noise - z) / (1 - t) - u))
    for t, t_next in pairwise(times[::-1]):
        v = VELOCITY(z, torch.full((3,), t, dtype=z.dtype))
        eta = 0.9 if lo <= t <= hi else 0.0
        z = z + (t_next - t) * (v + eta * (-(x - z) / t - v))
    torch.testing.assert_close(rf_inversion(VELOCITY, VELOCITY, x, noise, uniform(n), interval=(lo, hi)).x, z)


# --------------------------------------------------------------------------------------------------- alone and in a batch

EDITS = {
    "invert": lambda x, noise, mask, seeds: invert(VELOCITY, x, uniform(4)),
    "image_to_image": lambda x, noise, mask, seeds: image_to_image(VELOCITY, x, noise, uniform(4), 0.6),
    "inpaint": lambda x, noise, mask, seeds: inpaint(VELOCITY, x, mask, noise, uniform(4)),
    "resample": lambda x, noise, mask, seeds: inpaint(VELOCITY, x, mask, noise, uniform(4), repeats=2, seeds=seeds),
    "flowedit": lambda x, noise, mask, seeds: flowedit(
        VELOCITY, mixture(MEANS, 0.3), x, uniform(4), seeds=seeds, regular=0.3, draws=2
    ),
    "rf_inversion": lambda x, noise, mask, seeds: rf_inversion(VELOCITY, VELOCITY, x, noise, uniform(4)),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_picture_does_not_depend_on_its_batch_mates(name):
    x, noise, mask, seeds = pictures(3), noises(3), torch.rand(3, 1, 4, 6), [5, 6, 7]
    together = EDITS[name](x, noise, mask, seeds)
    assert together.x.shape == x.shape and together.ok
    for i in range(3):
        rows = slice(i, i + 1)
        alone = EDITS[name](x[rows], noise[rows], mask[rows], seeds[rows])
        torch.testing.assert_close(alone.x, together.x[rows], rtol=0, atol=1e-12)
    if name in ("resample", "flowedit"):
        assert not torch.allclose(EDITS[name](x, noise, mask, [5, 6, 8]).x[2], together.x[2])


@pytest.mark.parametrize("sampler", [picard, partial(dopri5, rtol=1e-6)], ids=["picard", "dopri5"])
def test_samplers_that_take_rows_apart_find_each_row_with_its_mask_and_its_noise(sampler):
    x, noise, mask = pictures(3), noises(3), torch.rand(3, 1, 4, 6) < 0.5
    together = inpaint(VELOCITY, x, mask, noise, uniform(8), sampler=sampler).x
    drawn = rf_inversion(VELOCITY, VELOCITY, x, noise, uniform(8), interval=(0.5, 1.0), sampler=sampler).x
    for i in range(3):
        rows = slice(i, i + 1)
        alone = inpaint(VELOCITY, x[rows], mask[rows], noise[rows], uniform(8), sampler=sampler).x
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-9)
        back = rf_inversion(
            VELOCITY, VELOCITY, x[rows], noise[rows], uniform(8), interval=(0.5, 1.0), sampler=sampler
        ).x
        torch.testing.assert_close(back, drawn[rows], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda x, n: invert(VELOCITY, x, uniform(4)[::-1]), r"must fall, from noise to data"),
        (lambda x, n: image_to_image(VELOCITY, x, n, uniform(4), 0.0), "strength = 0.0 is not within"),
        (lambda x, n: image_to_image(VELOCITY, x, n, uniform(4), 1.5), r"0.0 < strength <= 1.0"),
        (lambda x, n: image_to_image(VELOCITY, x, n, uniform(4), math.nan), "strength = nan"),
        (lambda x, n: image_to_image(VELOCITY, x, n[:1], uniform(4), 0.5), r"noise is 1 x 2 x 4 x 6, .* 3 x 2 x 4 x 6"),
        (
            lambda x, n: inpaint(VELOCITY, x, torch.ones(1, 1, 6, 4), n, uniform(4)),
            r"mask is 1 x 1 x 6 x 4, but the pictures are 3 x 2 x 4 x 6; give 3 or 1 x 1 x 4 x 6",
        ),
        (lambda x, n: inpaint(VELOCITY, x, torch.ones(2, 1, 4, 6), n, uniform(4)), "mask is 2 x 1 x 4 x 6"),
        (lambda x, n: inpaint(VELOCITY, x, torch.ones(4, 6), n, uniform(4)), "mask is 4 x 6"),
        (lambda x, n: inpaint(VELOCITY, x, 255 * torch.ones(1, 1, 4, 6), n, uniform(4)), "divide bytes by 255"),
        (lambda x, n: inpaint(VELOCITY, x, torch.ones(1, 1, 4, 6), n, uniform(4), repeats=0), "repeats = 0"),
        (lambda x, n: inpaint(VELOCITY, x, torch.ones(1, 1, 4, 6), n, uniform(4), repeats=1.5), "repeats = 1.5"),
        (lambda x, n: inpaint(VELOCITY, x, torch.ones(1, 1, 4, 6), n, uniform(4), repeats=2), "0 seeds for 3 pictures"),
        (
            lambda x, n: inpaint(
                VELOCITY, x, torch.ones(1, 1, 4, 6), n, uniform(4), repeats=2, seeds=[1, 2, 3], sampler=ancestral
            ),
            "repeats = 2: ancestral would draw the same noise",
        ),
        (lambda x, n: flowedit(VELOCITY, VELOCITY, x, uniform(4), seeds=[1]), "1 seeds for 3 pictures"),
        (lambda x, n: flowedit(VELOCITY, VELOCITY, x, uniform(4), seeds=[1, 2, 3], regular=0.9), "regular = 0.9"),
        (lambda x, n: flowedit(VELOCITY, VELOCITY, x, uniform(4), seeds=[1, 2, 3], draws=0), "draws = 0"),
        (lambda x, n: flowedit(VELOCITY, VELOCITY, x, uniform(4), seeds=[1, 2, 3], draws=2.5), "draws = 2.5"),
        (lambda x, n: rf_inversion(VELOCITY, VELOCITY, x, n, uniform(4), eta=1.5), "eta = 1.5 is not within 0 .. 1"),
        (lambda x, n: rf_inversion(VELOCITY, VELOCITY, x, n, uniform(4), gamma=-1), "gamma = -1"),
        (lambda x, n: rf_inversion(VELOCITY, VELOCITY, x, n, uniform(4), interval=(0.5, 0.5)), "interval"),
        (lambda x, n: rf_inversion(VELOCITY, VELOCITY, x, n, uniform(4), interval=(0, 0.5, 1)), "interval"),
    ],
)
def test_what_cannot_be_edited_is_refused_in_one_line(edit, message, x, noise):
    with pytest.raises(UserError, match=message) as error:
        edit(x, noise)
    assert "\n" not in str(error.value)


def test_every_step_and_draw_of_flowedit_has_noise_of_its_own(x):
    found = []

    def target(z, t):  # while nothing changes, z is the noised picture
        found.append((z - (1 - t[0]) * x) / t[0])
        return VELOCITY(z, t)

    grid = [0.8, 0.6, 0.4, 0.0]
    flowedit(VELOCITY, target, x, grid, seeds=[1, 2, 3], strength=0.8, regular=0.4, draws=2, sampler=euler)
    alike = torch.corrcoef(torch.stack(found).flatten(1)) - torch.eye(5)
    assert len(found) == 5 and alike.abs().max() < 0.5, alike


def test_every_repeat_of_a_step_has_noise_of_its_own(x, noise):
    found = []

    def still(z, t):
        found.append(z)
        return 0 * z

    inpaint(still, x, torch.ones(1, 1, 4, 6), noise, [1.0, 0.0], repeats=4, seeds=[1, 2, 3], sampler=euler)
    alike = torch.corrcoef(torch.stack(found).flatten(1)) - torch.eye(4)  # at t = 1 the state is the noise
    assert len(found) == 4 and alike.abs().max() < 0.5, alike


def test_a_sampler_of_the_sde_with_its_options_is_not_repeated(x, noise):
    sampler = partial(ancestral, seeds=[1, 2, 3], eta=0.5)
    with pytest.raises(UserError, match="ancestral would draw the same noise at each"):
        inpaint(VELOCITY, x, torch.ones(1, 1, 4, 6), noise, uniform(4), repeats=2, seeds=[1, 2, 3], sampler=sampler)


def test_rf_inversion_tells_its_sampler_where_the_control_jumps(x, noise):
    def jumping(z, t):
        return VELOCITY(z, t)

    jumping.edges = (0.6,)
    just = 1e-6  # beyond the ends, which belong to it
    for weight, edges in ((0.5, [(0.6, -just, 1 + just), (0.25 - just, 0.75 + just)]), (0.0, [(0.6,), ()])):
        told = []

        def sampler(velocity, x, grid, told=told, **how):
            told.append(velocity.edges)
            return euler(velocity, x, grid, **how)

        how = {"gamma": weight, "eta": weight, "interval": (0.25, 0.75), "sampler": sampler}
        rf_inversion(jumping, VELOCITY, x, noise, uniform(4), **how)
        assert told == edges


def test_the_precision_of_an_edit_is_the_wider_of_the_pictures_and_the_noise(x, noise):
    narrow = x.float(), noise.float()
    edits = [
        lambda x, n: image_to_image(VELOCITY, x, n, uniform(4), 0.6).x,
        lambda x, n: inpaint(VELOCITY, x, torch.ones(1, 1, 4, 6), n, uniform(4)).x,
        lambda x, n: rf_inversion(VELOCITY, VELOCITY, x, n, uniform(4)).x,
    ]
    for edit in edits:
        expected = edit(*narrow)
        for pair in ((narrow[0], narrow[1].double()), (narrow[0].double(), narrow[1])):
            result = edit(*pair)
            assert result.dtype == torch.float64
            torch.testing.assert_close(result.float(), expected, rtol=0, atol=1e-4)


def test_what_a_velocity_answers_to_an_edit_is_looked_at(x, noise):
    mask = torch.ones(1, 1, 4, 6)
    edits = [
        lambda v: inpaint(v, x, mask, noise, uniform(4)),
        lambda v: flowedit(v, VELOCITY, x, uniform(4), seeds=[1, 2, 3]),
        lambda v: rf_inversion(v, VELOCITY, x, noise, uniform(4)),
        lambda v: rf_inversion(VELOCITY, v, x, noise, uniform(4)),
    ]
    for edit in edits:
        with pytest.raises(UserError, match="the velocity returned a tuple, not a tensor"):
            edit(lambda z, t: (z,))
        with pytest.raises(UserError, match="they must be alike"):  # and not spread over the channels
            edit(lambda z, t: z[:, :1])


def test_resampling_names_the_step_from_which_pictures_are_not_finite(x, noise):
    def broken(z, t):
        return torch.where(t.view(-1, 1, 1, 1) < 0.6, math.nan, VELOCITY(z, t))

    seen = []
    how = {"repeats": 2, "seeds": [1, 2, 3], "sampler": euler, "progress": lambda *step: seen.append(step)}
    solution = inpaint(broken, x, torch.ones(1, 1, 4, 6), noise, uniform(4), **how)
    assert solution.status == ["not finite (NaN or inf) from step 3 of 4 on"] * 3
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_pictures_of_two_sizes_have_no_psnr():
    with pytest.raises(UserError, match="psnr: pictures of 2 x 3 x 4 x 4 and of 2 x 1 x 4 x 4 are not alike"):
        psnr(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4))


def test_conditions_are_blended_in_their_own_dtype():
    a, b = [torch.randn(2, 3).bfloat16()], [torch.randn(2, 3)]
    for spherical in (False, True):
        assert blend(a, b, 0.3, spherical=spherical)[0].dtype == torch.bfloat16


def test_conditions_with_nothing_between_are_refused():
    with pytest.raises(
        UserError, match="nothing lies between conditions of torch.int64, such as labels; embed them first"
    ):
        blend([torch.tensor([[1]])], [torch.tensor([[2]])], 0.5)
    with pytest.raises(UserError, match="blend: 1 tensors and 2; give as many of both"):
        blend([torch.zeros(1, 2)], [torch.zeros(1, 2)] * 2, 0.5)
