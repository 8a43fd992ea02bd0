"""Distances of features against closed forms, brute force and peers; the caption probe; which samples two splits share."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genflow.data.images import BadImage, ImageDataset
from genflow.data.vectors import VectorDataset
from genflow.errors import UserError
from genflow.evaluation import neighbours, reals
from genflow.evaluation.alignment import caption_ranks, fit_caption_probe, recall_at
from genflow.evaluation.frechet import frechet_distance
from genflow.evaluation.kernel import kernel_distance
from genflow.evaluation.neighbours import (
    copying,
    density_coverage,
    nearest_neighbours,
    own_found,
    precision_recall,
)
from genflow.evaluation.plan import Plan
from genflow.evaluation.reals import overlap, read_real


def draw(n, dim=5, *, seed=0, mean=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(n, dim, generator=generator, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------- Frechet


def test_the_frechet_distance_of_two_points_clouds_on_a_line_is_the_closed_form():
    a, b = torch.tensor([[-1.0], [1.0]]), torch.tensor([[2.0], [8.0]])  # N(0, 2) and N(5, 18)
    assert frechet_distance(a, b) == pytest.approx(25 + (math.sqrt(18) - math.sqrt(2)) ** 2, rel=1e-12)


def test_the_frechet_distance_is_that_of_torchmetrics():
    peer = pytest.importorskip("torchmetrics.image.fid")._compute_fid
    a, b = draw(300, seed=1), draw(200, seed=2, mean=0.3, scale=1.5)
    expected = peer(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ kernel


def brute_kid(a, b):
    """Eq. 4 of Binkowski et al., by loops."""
    k = lambda x, y: (float(x @ y) / len(x) + 1) ** 3
    n, m = len(a), len(b)
    own_a = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    own_b = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return own_a + own_b - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def test_the_kernel_distance_of_one_subset_of_all_is_the_unbiased_estimate():
    a, b = draw(7), draw(7, seed=1, mean=0.5)
    found = kernel_distance(a, b, subsets=1, subset=7)
    assert found.mean == pytest.approx(brute_kid(a, b), rel=1e-12) and math.isnan(found.spread)


def test_the_kernel_distance_is_the_mean_over_subsets_and_has_their_spread(monkeypatch):
    a, b = draw(9), draw(11, seed=1, mean=0.5)
    found = kernel_distance(a, b, subsets=400, subset=4)
    whole = kernel_distance(a, b[:9], subsets=1, subset=9)
    assert found.subset == 4 and found.spread > 0
    assert abs(found.mean - brute_kid(a, b)) < 4 * found.spread / math.sqrt(400) and whole.mean != found.mean
    assert kernel_distance(a, b, subsets=400, subset=4) == found != kernel_distance(a, b, subsets=400, subset=4, seed=1)
    monkeypatch.setattr("genflow.evaluation.kernel.ROWS", 4)
    assert kernel_distance(a, b, subsets=400, subset=4).mean == pytest.approx(found.mean, rel=1e-10)


def test_the_kernel_distance_of_one_distribution_is_zero_on_average_at_any_count():
    found = [kernel_distance(draw(20, seed=2 * s), draw(20, seed=2 * s + 1), subsets=20).mean for s in range(60)]
    assert abs(np.mean(found)) < 4 * np.std(found) / math.sqrt(len(found)) and min(found) < 0
    assert frechet_distance(draw(20), draw(20, seed=1)) > 0.5  # which is biased


def test_the_kernel_distance_is_that_of_torchmetrics():
    peer = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    a, b = draw(40), draw(40, seed=1, mean=0.2)
    assert kernel_distance(a, b, subsets=1, subset=40).mean == pytest.approx(float(peer(a, b)), rel=1e-9)


# -------------------------------------------------------------------------------------------------------- neighbours


def test_precision_recall_density_and_coverage_of_points_on_a_line_are_counted_by_hand():
    real, samples = (torch.tensor(each)[:, None] for each in ([0.0, 1.0, 2.0, 10.0], [0.4, 2.6, 50.0]))
    # k = 1: radii of the real ones 1, 1, 1, 8; of the samples 2.2, 2.2, 47.4
    assert vars(precision_recall(real, samples, k=1)) == {"precision": 2 / 3, "recall": 1.0}
    # 0.4 lies in the balls of 0 and 1, 2.6 in those of 2 and 10, 50 in none
    assert vars(density_coverage(real, samples, k=1)) == {"density": 4 / 3, "coverage": 1.0}
    assert precision_recall(real, samples[[2, 2]] + torch.tensor([[0.0], [0.1]]), k=1).recall == 0


@pytest.mark.parametrize("k", [1, 5])
def test_they_are_those_of_prdc(k, monkeypatch):
    pytest.importorskip("sklearn")
    peer = pytest.importorskip("prdc").compute_prdc
    real, samples = draw(80), draw(60, seed=1, mean=0.5)
    monkeypatch.setattr(neighbours, "ROWS", 7)
    expected = peer(real.numpy(), samples.numpy(), k)
    found = {**vars(precision_recall(real, samples, k)), **vars(density_coverage(real, samples, k))}
    assert found == pytest.approx(expected)


def test_samples_of_the_same_distribution_are_precise_dense_and_cover_and_far_ones_are_not():
    real, same, far = draw(300, 2), draw(300, 2, seed=1), draw(300, 2, seed=2, mean=20.0)
    assert min(vars(precision_recall(real, same)).values()) > 0.85 < density_coverage(real, same).coverage
    assert density_coverage(real, same).density == pytest.approx(1, abs=0.1)
    assert vars(precision_recall(real, far)) == {"precision": 0, "recall": 0}
    assert vars(density_coverage(real, far)) == {"density": 0, "coverage": 0}
    narrow = precision_recall(real, draw(300, 2, seed=3, scale=0.1))
    assert narrow.precision > 0.95 and narrow.recall < 0.3


def test_a_single_outlier_of_the_samples_widens_recall_and_not_coverage():
    real, samples = draw(200, 2, mean=3.0), draw(200, 2, seed=1, scale=0.01)
    outlier = torch.cat([samples, torch.full((1, 2), 30.0, dtype=torch.float64)])
    assert precision_recall(real, samples).recall < 0.1 and precision_recall(real, outlier).recall > 0.9
    assert density_coverage(real, outlier).coverage == density_coverage(real, samples).coverage


def test_nearest_neighbours_are_those_of_brute_force_and_exact_for_copies(monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 4)
    a, b = draw(10).float() + 100, draw(30, seed=1).float() + 100
    b[17] = a[3]
    far, which = nearest_neighbours(a, b, 4)
    expected = (a[:, None] - b).double().square().sum(2).sqrt().sort(1)
    torch.testing.assert_close(far, expected.values[:, :4], rtol=0, atol=1e-6)
    assert torch.equal(which, expected.indices[:, :4]) and which[3, 0] == 17 and far[3, 0] == 0


def test_copying_tells_copies_from_new_samples_and_from_noise():
    known, held = draw(200, 2), draw(300, 2, seed=1)
    assert copying(known[:50], held, known) == pytest.approx(1, abs=0.01)
    assert copying(draw(300, 2, seed=2), held, known) == pytest.approx(0.5, abs=0.06)
    assert copying(draw(300, 2, seed=2, mean=50.0), held, known) == 0
    assert copying(held, held, known) == pytest.approx(0.5, abs=1e-12)  # ties count half
    wide = draw(300, 768)
    assert copying(wide[:100], wide[100:200], wide) == 0.5  # and all copies are level


def test_own_found_counts_those_nearest_to_their_own():
    own = torch.eye(6)
    assert own_found(own + 0.1, own, gallery=3) == 1
    assert own_found(own.roll(1, 0), own) == 0
    mixed = own[[1, 1, 2, 3, 4, 5]]  # the first is the second's
    assert own_found(mixed, own) == 5 / 6 and own_found(mixed, own, gallery=1) == 1
    assert own_found(own.roll(-1, 0), own, gallery=3) == 0
    assert own_found(torch.zeros(6, 2), torch.zeros(6, 2), gallery=3) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_distance(draw(1), draw(5)), r"features of \(1, 5\) are too few"),
        (lambda: precision_recall(draw(5), draw(5, 4)), "widths 5 and 4 are of different networks"),
        (lambda: density_coverage(draw(9), draw(9) / 0), "not finite"),
        (lambda: precision_recall(draw(3), draw(9)), "k = 3 neighbours need more than 3 samples, and there are 3"),
        (lambda: density_coverage(draw(9), draw(9), k=0), "k = 0 neighbours"),
        (lambda: frechet_distance(draw(9).numpy(), draw(9)), "features are a ndarray, not a tensor; torch.as_tensor"),
        (lambda: kernel_distance(draw(9), draw(9), subset=10), "subsets of 10 out of 9 features: take"),
        (lambda: kernel_distance(draw(9), draw(9), subsets=0), "0 subsets of 4 out of 9"),
        (lambda: nearest_neighbours(draw(9), draw(9), 10), "k = 10 neighbours out of 9: take 1 to 9"),
        (lambda: own_found(draw(9), draw(8)), "9 samples and 8 real ones: each sample needs its own"),
        (lambda: fit_caption_probe(draw(2), draw(2)), "2 pictures with 2 captions are no set to fit a probe on"),
    ],
)
def test_what_is_no_set_of_features_is_refused_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- captions


def test_the_probe_is_ridge_regression_with_the_penalty_of_the_least_left_out_error():
    x, y = draw(30, 4), draw(30, 3, seed=1)
    y[:, 0] += 2 * x[:, 1]
    penalties = (0.1, 10.0, 1000.0)
    found = fit_caption_probe(x, y, penalties)

    def ridge(x, y, penalty, at):
        mean, scale, middle = x.mean(0), x.std(0), y.mean(0)
        z = (x - mean) / scale
        weight = torch.linalg.solve(z.T @ z + penalty * torch.eye(4), z.T @ (y - middle))
        return (at - mean) / scale @ weight

    assert torch.allclose(found(x), ridge(x, y, found.penalty, x)) and torch.equal(found.centre, y.mean(0))
    keep = ~torch.eye(30, dtype=torch.bool)

    def left_out(penalty):
        rows = [ridge(x[keep[i]], y[keep[i]], penalty, x[i]) + y[keep[i]].mean(0) - y[i] for i in range(30)]
        return float(torch.stack(rows).square().mean())

    assert found.penalty == min(penalties, key=left_out) == 10.0


def test_ranks_are_by_cosine_and_level_captions_share_their_places():
    vectors = torch.eye(4)
    ranks = caption_ranks(torch.tensor([[5.0, 1, 0, 0], [1, 5, 0, 0], [0, 0, 0, 1]]), vectors, torch.tensor([0, 0, 1]))
    assert [each.tolist() for each in ranks] == [[0, 1, 1], [0, 0, 2]]
    assert [recall_at(*ranks, k) for k in (1, 2, 3, 4)] == pytest.approx([1 / 3, 7 / 9, 8 / 9, 1])


def test_a_probe_of_features_that_are_not_finite_is_refused():
    features = torch.randn(5, 3)
    features[1, 2] = torch.nan
    with pytest.raises(UserError, match="the features or the vectors hold NaN or inf"):
        fit_caption_probe(features, torch.randn(5, 2))


def test_a_probe_finds_the_captions_that_its_features_tell():
    vectors, turn = draw(200, 6), draw(6, 8, seed=1)
    probe = fit_caption_probe(vectors[:150] @ turn, vectors[:150])
    held = vectors[150:] - probe.centre
    assert recall_at(*caption_ranks(probe(vectors[150:] @ turn), held, torch.arange(50)), 1) == 1
    blind = caption_ranks(probe(draw(50, 8, seed=3)), held, torch.arange(50))
    assert recall_at(*blind, 1) < 0.2


# ------------------------------------------------------------------------------------------------------------------ reals


def pictures(n, *, broken=(), seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)

    def read(i):
        from PIL import Image

        if i in broken:
            raise BadImage("torn")
        return Image.fromarray(levels[i])

    return ImageDataset([f"caption {i}" for i in range(n)], [f"{seed}/{i}" for i in range(n)], read)


def test_real_samples_are_read_in_one_order_without_the_broken_and_as_many_as_are_wanted():
    few, all_ = read_real(pictures(20, broken={3}), (3, 8, 8), most=5), read_real(pictures(20, broken={3}), (3, 8, 8))
    assert few.x.dtype == torch.uint8 and torch.equal(few.x, all_.x[:5]) and few.captions == all_.captions[:5]
    assert (len(few), len(all_), all_.total, all_.bad, len(few.hashes)) == (5, 19, 20, 1, 5)
    assert len(read_real(pictures(20), (3, 8, 8), most=5, hashed=12).hashes) == 12
    assert all_.identifiers != sorted(all_.identifiers) and read_real(pictures(2), (1, 8, 8)).x.shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="none of the 2 samples can be read"):
        read_real(pictures(2, broken={0, 1}), (3, 8, 8))


def test_pictures_beyond_the_memory_are_not_kept(monkeypatch):
    monkeypatch.setattr(reals, "MEMORY", 3 * 8 * 8 * 4)
    assert len(read_real(pictures(20), (3, 8, 8), hashed=20)) == 4


def test_samples_that_two_splits_share_are_found_by_their_pixels():
    both = pictures(6)
    train, test = (read_real(ImageDataset(c, i, r), (3, 8, 8)) for c, i, r in [
        (["a"] * 4, [f"t{k}" for k in range(4)], lambda k: both.image(k)),
        (["b"] * 3, [f"h{k}" for k in range(3)], lambda k: both.image(k + 3)),
    ])  # fmt: skip
    assert overlap(test, train) == ["h0"] and overlap(read_real(pictures(3, seed=9), (3, 8, 8)), train) == []
    rows = draw(4).float()
    table = [
        VectorDataset(rows[part], [""] * 2, names)
        for part, names in ((slice(2), ["a", "b"]), (slice(1, 3), ["c", "d"]))
    ]
    assert overlap(read_real(table[1], (5,)), read_real(table[0], (5,))) == ["c"]


@pytest.mark.parametrize(
    ("asked", "recipe", "expected"),
    [
        (None, None, "test"),
        (None, {"train": {"validation_split": "test_pair"}}, "test_pair"),
        ("test_concept", {"train": {"validation_split": "test_pair"}}, "test_concept"),
    ],
)
def test_held_out_is_what_was_asked_for_or_what_the_run_was_validated_on(asked, recipe, expected):
    assert Plan(split=asked).held_out(SimpleNamespace(recipe=recipe)) == expected


def test_a_copy_on_the_edge_of_a_neighbourhood_is_among_them():
    real = torch.tensor([[0.0], [1.0], [2.0]])
    assert vars(precision_recall(real, torch.tensor([[-1.0], [3.0]]), k=1)) == {"precision": 1.0, "recall": 1.0}


def test_rounding_moves_nothing_over_the_edge_of_a_neighbourhood():
    """Many points of a lattice are exactly as far as the k-th nearest."""
    real, samples = (torch.randint(0, 3, (n, 4), generator=torch.Generator().manual_seed(n)) for n in (200, 150))
    squares = lambda a, b: (a[:, None] - b).square().sum(-1)
    radii = squares(real, real).sort(1).values[:, 5]
    held = squares(real, samples) <= radii[:, None]
    found = density_coverage(real / 255, samples / 255)
    assert found.density == pytest.approx(int(held.sum()) / (5 * 150))
    assert found.coverage == pytest.approx(float(held.any(1).double().mean()))
    among = (squares(samples, real) <= squares(real, real).sort(1).values[:, 3]).any(1)
    assert precision_recall(real / 255, samples / 255).precision == pytest.approx(float(among.double().mean()))


def test_one_sample_far_away_leaves_the_neighbours_of_the_others_as_they_are():
    """Rounding is forgiven in proportion to where the two are, not to how far the farthest of all is."""
    far = torch.full((1, 2), 1e7, dtype=torch.float64)
    real, samples, known = draw(200, 2), torch.cat([draw(199, 2, seed=1, mean=2.0), far]), draw(199, 2, seed=2)
    exactly = lambda a, b: (a[:, None] - b).norm(dim=2)
    apart, radii = exactly(real, samples), [exactly(x, x).sort(1).values for x in (real, samples)]
    recall = (apart <= radii[1][:, 3]).any(1).double().mean()
    assert precision_recall(real, samples).recall == pytest.approx(float(recall))
    held = apart <= radii[0][:, 5, None]
    found = density_coverage(real, samples)
    assert found.density == pytest.approx(int(held.sum()) / (5 * 200))
    assert found.coverage == pytest.approx(float(held.any(1).double().mean()))
    assert copying(samples[:-1], real, torch.cat([known, far])) == copying(samples[:-1], real, known)


def test_real_ones_that_are_alike_share_a_sample_whatever_the_rounding():
    own = draw(7, 64)[torch.arange(100) % 7]
    found = own_found(own + 0.01 * draw(100, 64, seed=1), own)
    assert found == pytest.approx(sum(1 / (15 if i % 7 < 2 else 14) for i in range(100)) / 100)


def test_captions_that_cannot_be_told_apart_are_found_no_more_often_than_by_chance():
    for size in (2, 3):
        vectors = torch.eye(3).repeat_interleave(size, 0)
        own = torch.arange(len(vectors))
        assert recall_at(*caption_ranks(vectors, vectors, own), 1) == pytest.approx(1 / size)
    alike = draw(1, 7).expand(129, 7)
    assert recall_at(*caption_ranks(draw(100, 7, seed=1), alike, torch.arange(100)), 1) == pytest.approx(1 / 129)


def test_a_feature_that_never_varies_says_nothing():
    x, y = draw(30, 4), draw(30, 3, seed=1)
    still = torch.cat([x, torch.full((30, 1), 7.0, dtype=x.dtype)], 1)
    torch.testing.assert_close(fit_caption_probe(still, y)(still), fit_caption_probe(x, y)(x))
