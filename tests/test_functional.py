"""The straight path, the time shift and the counter-based randomness, against their formulas."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from genflow import functional as G
from genflow.errors import UserError
from genflow.functional import Rng, noise_from_seeds


@pytest.fixture
def path():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 7, 3, 4, 4, dtype=torch.float64, generator=generator)
    t = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    return x, noise, t, G.interpolate(x, noise, t)


def test_path_runs_from_data_to_noise_at_its_velocity(path):
    x, noise, t, z = path
    assert torch.equal(G.interpolate(x, noise, 0.0), x)
    assert torch.equal(G.interpolate(x, noise, 1.0), noise)
    h = 1e-6
    slope = (G.interpolate(x, noise, t + h) - G.interpolate(x, noise, t - h)) / (2 * h)
    torch.testing.assert_close(slope, G.path_velocity(x, noise), rtol=0, atol=1e-8)
    torch.testing.assert_close(z[2], 0.6333333333333333 * x[2] + 0.36666666666666664 * noise[2])


def test_conversions_are_each_others_inverses(path):
    x, noise, t, z = path
    v = noise - x
    torch.testing.assert_close(G.x_from_velocity(z, v, t), x)
    torch.testing.assert_close(G.noise_from_velocity(z, v, t), noise)
    torch.testing.assert_close(G.velocity_from_x(z, x, t), v)
    torch.testing.assert_close(G.velocity_from_noise(z, noise, t), v)
    torch.testing.assert_close(G.x_from_velocity(z[:2], v[:2], 0.25), z[:2] - 0.25 * v[:2])


def test_velocity_from_x_is_clamped_below_t_min(path):
    x, _, _, z = path
    t = torch.tensor([0.0, 0.01, 0.04, 0.05, 0.06, 0.5, 1.0], dtype=torch.float64)
    v = G.velocity_from_x(z, x, t, t_min=0.05)
    divisor = torch.tensor([0.05, 0.05, 0.05, 0.05, 0.06, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(v, (z - x) / divisor.view(-1, 1, 1, 1))
    torch.testing.assert_close(G.velocity_from_x(z, x, 0.01, t_min=0.05), (z - x) / 0.05)


def test_score_of_a_gaussian():
    # x ~ N(mu, s^2): z_t ~ N((1-t) mu, (1-t)^2 s^2 + t^2), and E[v | z] is linear in z.
    mu, s, t = 0.7, 0.4, 0.3
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    var = (1 - t) ** 2 * s**2 + t**2
    x_mean = mu + (1 - t) * s**2 / var * (z - (1 - t) * mu)
    v = G.velocity_from_x(z, x_mean, t)
    torch.testing.assert_close(G.score_from_velocity(z, v, t), -(z - (1 - t) * mu) / var)


@settings(max_examples=50, deadline=None)
@given(t=st.floats(0.001, 0.999), shift=st.floats(0.05, 20))
def test_shift_translates_the_log_snr(t, shift):
    shifted = G.shift_time(t, shift)
    assert G.log_snr(shifted) == pytest.approx(G.log_snr(t) - math.log(shift), abs=1e-9)
    assert G.shift_time(shifted, 1 / shift) == pytest.approx(t, abs=1e-12)
    assert G.shift_time(0.0, shift) == 0
    assert G.shift_time(1.0, shift) == pytest.approx(1.0, abs=1e-15)
    tensor = torch.tensor([t], dtype=torch.float64)
    assert G.log_snr(tensor).item() == pytest.approx(math.log((1 - t) / t), abs=1e-9)


def test_the_log_snr_is_infinite_at_the_ends():
    for ends in ([G.log_snr(0.0), G.log_snr(1.0)], G.log_snr(torch.tensor([0.0, 1.0])).tolist()):
        assert ends == [math.inf, -math.inf]


@pytest.mark.parametrize("shift", [0.01, 0.05, 0.1, 0.3, 1.7, 3.0, 11.3])
def test_the_shift_leaves_the_ends_exactly_where_they_are(shift):
    assert G.shift_time(1.0, shift) == 1 and G.shift_time(0.0, shift) == 0


def test_resolution_shift_is_linear_between_any_two_numbers_of_tokens():
    rule = {"base": 100, "top": 200, "low": 0.2, "high": 0.8}
    for tokens, mu in ((100, 0.2), (150, 0.5), (200, 0.8), (300, 0.8)):
        assert G.resolution_shift(tokens, **rule) == pytest.approx(math.exp(mu))


def test_resolution_shift_takes_tokens_and_is_capped():
    assert G.resolution_shift(256) == pytest.approx(1.6487, abs=1e-4)
    assert G.resolution_shift(4096) == pytest.approx(3.1582, abs=1e-4)
    assert G.resolution_shift(9216) == G.resolution_shift(4096)


# ----------------------------------------------------------------------------------------------------------- randomness


def test_uniform_is_uniform_and_stays_inside():
    index = torch.arange(20_000)
    for seed in (0, 1, 2**63 - 1):
        u = Rng(seed, 5).uniform("t", index)
        assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
        assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
        # neighbours in the counter are not alike either
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
    bits = Rng(3).bits("t", index)
    ones = torch.stack([(bits >> i) & 1 for i in range(64)]).double().mean(1)
    assert (ones - 0.5).abs().max() < 0.02
    assert len(set(bits.tolist())) == len(index)


def test_the_extreme_hashes_are_inside_the_open_interval(monkeypatch):
    for value in (0, -1, 2**63 - 1, -(2**63)):
        monkeypatch.setattr(Rng, "bits", lambda *_, value=value: torch.tensor([value]))
        assert 0 < Rng(0).uniform("t", torch.tensor([0])).item() < 1


def test_mixing_is_splitmix64():
    # First outputs of splitmix64 seeded with 0, from the reference implementation's published test vector.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    counter = torch.tensor([1, 2, 3]) * G._signed(G._GAMMA)
    assert [v % 2**64 for v in G.mix(counter).tolist()] == expected


def test_the_numbers_of_a_row_are_the_same_for_ever():
    """Written out in whole numbers of Python: what was drawn from a seed is drawn again, by any version."""
    golden = 0x9E3779B97F4A7C15

    def mixed(x):  # splitmix64's finaliser, Steele et al. 2014
        x = x % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    key = int.from_bytes(hashlib.blake2b(b"7/3/noise", digest_size=8).digest(), "little")
    row = mixed(mixed(key + 5 * golden) ^ key)
    rng, index = Rng(7, 3), torch.tensor([5])
    assert rng.bits("noise", index).item() % 2**64 == row
    assert rng.uniform("noise", index).tolist() == [((row >> 12) + 0.5) / 2**52]
    states = [row + i * golden for i in range(1, 7)]  # splitmix64 goes on before it answers
    expected = [((mixed(state) >> 12) + 0.5) / 2**52 for state in states]
    assert rng.uniform("noise", index, (2, 3)).flatten().tolist() == expected
    normal = np.random.Generator(np.random.PCG64(row)).standard_normal((2, 2), dtype=np.float32)
    assert np.array_equal(rng.normal("noise", index, (2, 2))[0].numpy(), normal)


def test_digits_of_a_seed_are_not_those_of_a_step():
    index = torch.arange(3)
    assert not torch.equal(Rng(1, 23).bits("t", index), Rng(12, 3).bits("t", index))
    assert not torch.equal(Rng(1, 2).bits("3t", index), Rng(1, 23).bits("t", index))


def test_a_row_depends_on_its_own_counter_only():
    rng, index = Rng(7, 3), torch.tensor([5, 11, 2**62, 0])
    together = rng.normal("noise", index, (3, 4, 4))
    for i in range(4):
        assert torch.equal(rng.normal("noise", index[i : i + 1], (3, 4, 4))[0], together[i])
        assert torch.equal(rng.uniform("t", index[i : i + 1])[0], rng.uniform("t", index)[i])
    assert torch.equal(rng.normal("noise", index.flip(0), (3, 4, 4)), together.flip(0))
    assert together.dtype == torch.float32 and together.shape == (4, 3, 4, 4)


def test_seed_step_stream_and_index_each_change_the_draw():
    index = torch.arange(4000)
    base = Rng(0, 0).uniform("t", index)
    others = {
        "seed": Rng(1, 0).uniform("t", index),
        "far seed": Rng(2**32, 0).uniform("t", index),
        "step": Rng(0, 1).uniform("t", index),
        "stream": Rng(0, 0).uniform("drop", index),
        "index": Rng(0, 0).uniform("t", index + 4000),
    }
    for name, other in others.items():
        assert (other != base).all(), name
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.06, name


def test_uniform_rows_are_uniform_and_hang_on_their_counter_only():
    rng, index = Rng(1, 2), torch.tensor([5, 0, 2**62, 7])
    u = rng.uniform("dequantize", index, (3, 40, 40))
    assert u.shape == (4, 3, 40, 40) and u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(u.flatten(1).numpy()) - np.eye(4)).max() < 0.06
    assert abs(np.corrcoef(u[..., 1:].flatten(), u[..., :-1].flatten())[0, 1]) < 0.03
    assert torch.equal(rng.uniform("dequantize", index[2:3], (3, 40, 40))[0], u[2])
    assert len(u.flatten().unique()) == u.numel()
    assert rng.uniform("dequantize", torch.arange(0), (3, 2)).shape == (0, 3, 2)


def test_normal_is_normal():
    rows = Rng(1).normal("noise", torch.arange(200), (100,))
    assert stats.kstest(rows.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(rows.numpy())
    assert np.abs(correlation - np.eye(200)).max() < 0.5  # 5 sigma
    assert Rng(1).normal("noise", torch.arange(0), (3, 2)).shape == (0, 3, 2)


def test_noise_of_a_seed_is_the_same_in_any_batch():
    seeds = [7, 0, 2**63 - 1, 7 + 2**32, *range(100, 160)]
    batch = noise_from_seeds(seeds, (3, 8, 8))
    assert torch.equal(noise_from_seeds([7], (3, 8, 8))[0], batch[0])
    assert len({row.numpy().tobytes() for row in batch}) == len(seeds)
    assert torch.equal(noise_from_seeds(np.array([7, 0]), (3, 8, 8)), batch[:2])  # NumPy's whole numbers are ones too


@pytest.mark.parametrize(("seed", "near"), [(-1, "0"), (2**63, str(2**63 - 1)), (1.5, "whole"), (True, "whole")])
def test_seeds_out_of_range_are_refused(seed, near):
    with pytest.raises(UserError, match=near):
        noise_from_seeds([3, seed], (1, 2, 2))


@pytest.mark.parametrize("seeds", [5, None, torch.arange(2), (i for i in range(2)), map(int, "12")])
def test_seeds_that_are_no_list_are_refused(seeds):
    with pytest.raises(UserError, match=rf"such as \[0, 1\], not of type {type(seeds).__name__}$"):
        noise_from_seeds(seeds, (1, 2, 2))


def test_what_is_sent_to_mps_is_waited_for():
    """There torch reads the numbers of the CPU later, when a temporary's are gone."""

    class Spy:
        device = torch.device("cpu")

        def to(self, device, *, non_blocking):
            return non_blocking

    assert G.sent(Spy(), "cuda") and not G.sent(Spy(), "mps")
    files = Path(G.__file__).parent.rglob("*.py")
    assert [file.name for file in files if "non_blocking" in file.read_text()] == ["functional.py"]


def test_noise_is_added_upwards_only():
    z, noise = torch.randn(2, 3), torch.randn(2, 3)
    for t in (0.0, 0.4, 1.0):
        assert torch.equal(G.renoise(z, noise, t, t), z)
    for t, t_up in ((0.5, 0.4), (0.5, 1.2)):
        with pytest.raises(UserError, match=r"is not upwards, 0 <= t <= t_up <= 1"):
            G.renoise(z, noise, t, t_up)
