"""Vectors: densities of the plane against their integrals and samples, and tables of numbers."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy import stats

from genflow.config import from_dict
from genflow.data.toy2d import Pixels, Toy2DConfig
from genflow.data.vectors import TableConfig, VectorDataset
from genflow.errors import UserError
from genflow.training.config import RunConfig

KINDS = ["moons", "checkerboard", "rings", "gaussians8", "swissroll", "spirals", "pinwheel", "picture"]
CLASSES = {"moons": 2, "checkerboard": 8, "rings": 4, "gaussians8": 8, "spirals": 2, "pinwheel": 5}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Eight columns by ten rows: an L on white, its stem black, its foot grey."""
    pixels = np.full((10, 8), 255, np.uint8)
    pixels[1:9, 1:3], pixels[7:9, 3:7] = 0, 128
    path = tmp_path_factory.mktemp("pictures") / "L.png"
    Image.fromarray(pixels).save(path)
    return path


def config(kind, picture, **options):
    return Toy2DConfig(kind=kind, **({"picture": str(picture)} if kind == "picture" else {}), **options)


def cells(density, n, half=4.0):
    """A grid of n x n middles over a square, and the probability of each cell by the midpoint rule."""
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 * half - half
    places = torch.cartesian_prod(middle, middle)
    return places, density.log_prob(places).exp() * (2 * half / n) ** 2


# -------------------------------------------------------------------------------------------------- densities of the plane


SMOOTH = [(kind, noise) for kind in KINDS for noise in (0.1, 0.3)]
SHARP = [("checkerboard", None), ("picture", None)]


@pytest.mark.parametrize(("kind", "noise"), [*SMOOTH, *SHARP])
def test_a_density_integrates_to_one(kind, noise, picture):
    places, p = cells(config(kind, picture, noise=noise).density(), 200 if kind == "pinwheel" else 100, half=5.0)
    smooth = noise is not None
    assert float(p.sum()) == pytest.approx(1, abs=1e-4 if smooth else 0.05)
    mean = (p[:, None] * places).sum(0)
    assert mean.abs().max() < (1e-3 if smooth else 0.05)
    assert float((p[:, None] * (places - mean).square()).sum() / 2) == pytest.approx(1, abs=2e-3 if smooth else 0.1)


@pytest.mark.parametrize(("kind", "noise"), [*SMOOTH, *SHARP])
def test_samples_are_of_the_density(kind, noise, picture):
    """Chi-square over squares of a grid, against the integral of the density over each."""
    asked = config(kind, picture, n=10_000, noise=noise)
    rows = asked.build().rows.double()
    side, fine = 8, 20 if noise else 100
    _, p = cells(asked.density(), side * fine, half=4.0)
    expected = p.view(side, fine, side, fine).sum((1, 3)).flatten() * len(rows)
    place = ((rows + 4) / (8 / side)).floor().long().clamp(0, side - 1)
    seen = torch.bincount(place[:, 0] * side + place[:, 1], minlength=side * side).double()
    keep = expected > 25
    chi = ((seen - expected).square() / expected)[keep].sum()
    assert stats.chi2.sf(float(chi), int(keep.sum()) - 1) > 1e-4, (float(chi), int(keep.sum()))
    assert seen[~keep].sum() == pytest.approx(
        float(expected[~keep].sum()), abs=5 * float(expected[~keep].sum()) ** 0.5 + 5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_log_prob_of_samples_is_minus_the_entropy(kind, picture):
    dataset = config(kind, picture, noise=0.2, n=2000).build()
    _, p = cells(dataset, 100, half=5.0)
    area = (10.0 / 100) ** 2
    entropy = -float((p * (p / area).clamp(min=1e-300).log()).sum())
    log_p = dataset.log_prob(dataset.rows)
    assert float(-log_p.mean()) == pytest.approx(entropy, abs=4 * float(log_p.std()) / math.sqrt(2000) + 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_of_a_kind_is_fine_and_its_points_spread_by_one(kind, picture):
    dataset = config(kind, picture, n=4000).build()
    assert dataset.rows.square().mean() == pytest.approx(1, abs=0.06) and dataset.rows.mean(0).abs().max() < 0.06
    assert dataset.log_prob(dataset.rows[:500]).isfinite().all()


def test_gaussians_are_the_closed_form():
    density = Toy2DConfig(kind="gaussians8").density()
    x = torch.randn(50, 2, dtype=torch.float64) * 2
    radius = math.sqrt(2 * (1 - 0.15**2))
    means = [radius * np.array([math.cos(a), math.sin(a)]) for a in np.arange(8) * math.pi / 4]
    p = sum(stats.multivariate_normal(m, 0.15**2).pdf(x.numpy()) for m in means) / 8
    np.testing.assert_allclose(density.log_prob(x).exp(), p, rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.5])
def test_rings_are_the_closed_form(noise):
    """A ring of radius R under isotropic noise: N(r; R) I0(r R / s^2) exp(-r R / s^2), up to a constant."""
    radii = np.arange(1, 5) * math.sqrt((1 - noise**2) / (np.arange(1, 5) ** 2).mean() * 2)
    x = torch.randn(200, 2, dtype=torch.float64) * 1.2
    r = x.norm(dim=1)[:, None]
    scaled = torch.special.i0e(r * torch.from_numpy(radii) / noise**2)
    p = (torch.exp(-((r - torch.from_numpy(radii)) ** 2) / (2 * noise**2)) * scaled).mean(1) / (2 * math.pi * noise**2)
    ours = Toy2DConfig(kind="rings", noise=noise).density().log_prob(x).exp()
    torch.testing.assert_close(ours, p, rtol=1e-7, atol=1e-9)


def test_the_density_of_a_pinwheel_is_that_of_its_draws_to_the_last_digit():
    density = Toy2DConfig("pinwheel", noise=0.01).density()
    middle = torch.full((5, 1), 0.5, dtype=torch.float64)
    x, _ = density.draw(
        torch.linspace(0.1, 0.9, 5, dtype=torch.float64)[:, None] * torch.ones(3), 0 * middle.expand(5, 2)
    )
    peak = -math.log(5 * 2 * math.pi * 0.4 * 0.01)
    torch.testing.assert_close(density.log_prob(x), torch.full((5,), peak, dtype=torch.float64), rtol=0, atol=1e-12)


def test_an_empty_checkerboard_square_has_no_density_and_noise_fills_it():
    side = math.sqrt(3) / 2
    board = Toy2DConfig(kind="checkerboard").density()
    full, empty = torch.tensor([[side / 2, side / 2], [-side / 2, side / 2]]).split(1)
    values = sorted(board.log_prob(torch.cat([full, empty])).tolist())
    assert values == pytest.approx([-math.inf, -math.log(8 * side**2)])
    assert board.log_prob(torch.tensor([[9.0, 0.0], [0.0, -9.0]])).tolist() == [-math.inf] * 2
    blurred = Toy2DConfig(kind="checkerboard", noise=0.01).density().log_prob(torch.cat([full, empty]))
    assert blurred.max() == pytest.approx(-math.log(8 * side**2 * (1 - 0.01**2)), abs=1e-9) and blurred.min() < -100


def test_the_tails_of_a_blurred_board_are_alike_on_both_sides():
    x = torch.tensor([[2.6, 0.3], [0.4, 3.0], [2.7, 2.8]], dtype=torch.float64)
    board = Toy2DConfig(kind="checkerboard", noise=0.1).density()
    assert board.log_prob(x).max() < -25
    torch.testing.assert_close(board.log_prob(x), board.log_prob(-x), rtol=1e-9, atol=0)


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_a_blurred_board_has_a_density_however_far_from_it(noise):
    board = Toy2DConfig(kind="checkerboard", noise=noise).density()
    x = torch.tensor([[9.0, 0.3], [9.0 + noise / 2, 0.3], [0.4, -30.0], [-0.8, 0.6]], dtype=torch.float64)
    log_p = board.log_prob(x)
    assert log_p.isfinite().all()
    tail = torch.special.log_ndtr(
        (board.x[-1] - x[:2, 0]) / noise
    )  # of the nearest edge, beside which all else is nothing
    torch.testing.assert_close(log_p[1] - log_p[0], tail[1] - tail[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_captions_are_the_parts_each_as_often(kind):
    dataset = Toy2DConfig(kind=kind, n=8000).build()
    counts = Counter(dataset.captions)
    assert len(counts) == CLASSES[kind]
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_a_caption_tells_where_a_point_lies():
    rings = Toy2DConfig(kind="rings", n=2000).build()
    radius = rings.rows.norm(dim=1)
    means = [float(radius[[c == f"ring {k}" for c in rings.captions]].mean()) for k in range(4)]
    np.testing.assert_allclose(np.array(means) / means[0], [1, 2, 3, 4], rtol=0.02)
    moons = Toy2DConfig(kind="moons", n=2000).build()
    upper = torch.tensor([c == "moon 0" for c in moons.captions])
    assert moons.rows[upper, 1].mean() > moons.rows[~upper, 1].mean() + 0.5


def test_a_picture_stands_upright_and_as_dense_as_it_is_dark(picture):
    asked = config("picture", picture, n=8000)
    rows = asked.build().rows
    stem = rows[:, 0] < rows[:, 0].min() + 2 * asked.density().side
    assert stem.double().mean() == pytest.approx(16 * 255 / (16 * 255 + 8 * 127), abs=0.02)
    assert rows[~stem, 1].max() < rows[stem, 1].mean()  # the foot of the L is at the bottom
    bright = config("picture", picture, mass="brightness").density()
    assert bright.p[1, 1] == 0 < bright.p[0, 0] and asked.density().p[0, 0] == 0 < asked.density().p[1, 1]


def test_splits_are_draws_of_their_own_and_the_same_every_time():
    asked = Toy2DConfig(n=1000)
    train, test, validation = (asked.build(split) for split in ("train", "test", "validation"))
    assert (len(train), len(test), len(validation)) == (1000, 100, 100)
    assert torch.equal(train.rows, Toy2DConfig(n=1000).build().rows)
    assert torch.equal(train.rows[:100], Toy2DConfig(n=100).build().rows)  # a point hangs on its number alone
    seen = {tuple(row) for each in (train, test, validation) for row in each.rows.tolist()}
    assert len(seen) == 1200
    assert not torch.equal(train.rows, Toy2DConfig(n=1000, seed=1).build().rows)
    assert len(set(train.identifiers + test.identifiers)) == 1100


def test_a_data_set_of_points_is_what_a_loader_needs():
    dataset = Toy2DConfig(n=10).build()
    assert isinstance(dataset, VectorDataset) and dataset.rows.dtype == torch.float32
    assert dataset.shape == Toy2DConfig().shape == (2,) and len(dataset) == 10 and dataset.columns == ["x1", "x2"]
    assert torch.equal(dataset.log_prob(dataset.rows), Toy2DConfig().density().log_prob(dataset.rows))
    assert dataset.log_prob(dataset.rows).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "the least is 1"),
        ({"seed": -1}, "try 0"),
        ({"noise": 0.0}, r"not within 0.01 .. 0.5,"),
        ({"kind": "checkerboard", "noise": 0.6}, "or 0"),
        ({"noise": math.nan}, "not within"),
        ({"kind": "picture"}, "needs the path"),
        ({"picture": "a.png"}, "kind moons takes no `picture`"),
    ],
)
def test_impossible_toys_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Toy2DConfig(**options)


def test_pictures_that_are_no_density_are_refused(tmp_path):
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="all white"):
        Toy2DConfig(kind="picture", picture=str(tmp_path / "white.png")).density()
    assert Toy2DConfig(kind="picture", picture=str(tmp_path / "white.png"), mass="brightness").density()
    for name in ("text.png", "none.png"):
        with pytest.raises(UserError, match=name):
            Toy2DConfig(kind="picture", picture=str(tmp_path / name)).density()
    with pytest.raises(UserError, match="no split 'tset'. Did you mean 'test'"):
        Toy2DConfig().build("tset")


def test_a_config_chooses_them_by_name():
    sections = {"text": {"name": "learned"}, "model": {"name": "mmdit"}}
    data = from_dict(RunConfig, {"data": {"name": "toy2d", "kind": "rings", "noise": 0.1}, **sections}, where="t").data
    assert data == Toy2DConfig(kind="rings", noise=0.1)


# ----------------------------------------------------------------------------------------------------------------- tables


@pytest.fixture(scope="module")
def numbers():
    return np.random.default_rng(0).normal(size=(600, 3)) * [1, 10, 0.1] + [5, 0, -1]


def written(folder, suffix, numbers):
    """The same columns a, b, c and kind, in a file of each sort."""
    path = folder / f"t{suffix}"
    kinds = np.array(list("xyz"))[np.arange(len(numbers)) % 3]
    if suffix == ".npz":
        np.savez(path, kind=kinds, **dict(zip("abc", numbers.T, strict=True)))
    elif suffix == ".parquet":
        pq.write_table(pa.table({**dict(zip("abc", numbers.T, strict=True)), "kind": kinds}), path)
    else:
        between = "\t" if suffix == ".tsv" else ","
        rows = [between.join([*map(repr, row), kind]) for row, kind in zip(numbers.tolist(), kinds, strict=True)]
        path.write_text("\n".join([between.join(["a", "b", "c", "kind"]), *rows]), encoding="utf-8-sig")
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".npz", ".parquet"])
def test_every_sort_of_table_holds_the_same(tmp_path, suffix, numbers):
    asked = TableConfig(written(tmp_path, suffix, numbers), label="kind")
    assert asked.shape == (3,)
    train, test = asked.build(), asked.build("test")
    assert sorted(train.columns) == ["a", "b", "c"] and train.shape == (3,)
    assert len(train) + len(test) == 600 and 30 < len(test) < 100
    for part in (train, test):
        index = [int(name.partition("[")[2][:-1]) - 1 for name in part.identifiers]
        order = ["abc".index(name) for name in part.columns]
        torch.testing.assert_close(
            part.restore(part.rows), torch.from_numpy(numbers[index][:, order]), rtol=1e-5, atol=1e-5
        )
        assert part.captions == ["xyz"[i % 3] for i in index]
        assert torch.equal(part.mean, train.mean) and torch.equal(part.std, train.std)  # of training, everywhere
    assert train.rows.mean(0).abs().max() < 1e-6
    torch.testing.assert_close(train.rows.std(0, correction=0), torch.ones(3))
    assert test.rows.mean(0).abs().max() > 1e-4


def test_arrays_without_names_count_their_columns(tmp_path, numbers):
    np.save(tmp_path / "a.npy", numbers)
    np.savez(tmp_path / "a.npz", x=numbers, y=numbers[:, 0])
    (tmp_path / "a.csv").write_text("\n".join(",".join(map(repr, row)) for row in numbers.tolist()))
    assert TableConfig(str(tmp_path / "a.npy")).build().columns == ["0", "1", "2"]
    assert TableConfig(str(tmp_path / "a.npz")).build().columns == ["x[0]", "x[1]", "x[2]", "y"]
    csv, npy = (TableConfig(str(tmp_path / f"a.{s}"), columns=("2", "0")).build() for s in ("csv", "npy"))
    assert csv.columns == ["2", "0"] and torch.equal(csv.rows, npy.rows)
    assert csv.captions == [""] * len(csv)


def test_equal_rows_stay_together_in_any_order(tmp_path, numbers):
    doubled = np.concatenate([numbers, numbers[::-1]])
    np.save(tmp_path / "a.npy", numbers)
    np.save(tmp_path / "b.npy", doubled)
    once = [TableConfig(str(tmp_path / "a.npy"), test=0.2, validation=0.1).build(s) for s in ("test", "validation")]
    twice = [TableConfig(str(tmp_path / "b.npy"), test=0.2, validation=0.1).build(s) for s in ("test", "validation")]
    for a, b, share in zip(once, twice, (0.2, 0.1), strict=True):
        assert 2 * len(a) == len(b) and abs(len(a) / 600 - share) < 0.06
        first = {tuple(row) for row in a.restore(a.rows).float().tolist()}
        assert len(first & {tuple(row) for row in b.restore(b.rows).float().tolist()}) > 0.95 * len(first)


def test_zero_is_zero_whatever_its_sign(tmp_path):
    plus, minus = np.stack([np.zeros(50), np.arange(50)], 1), np.stack([-np.zeros(50), np.arange(50)], 1)
    np.save(tmp_path / "a.npy", np.concatenate([plus, minus, np.arange(80.0).reshape(40, 2) + 100]))
    test = TableConfig(str(tmp_path / "a.npy"), test=0.5).build("test")
    values = test.restore(test.rows)
    counts = Counter(values[values[:, 0] < 50, 1].round().tolist())
    assert len(counts) > 10 and all(n % 2 == 0 for n in counts.values())


def test_a_column_can_say_the_split(tmp_path):
    (tmp_path / "a.csv").write_text("a,b,part\n" + "1,2,train\n3,5,train\n4,9,held out\n")
    asked = TableConfig(str(tmp_path / "a.csv"), split_column="part")
    train, held = asked.build(), asked.build("held out")
    assert train.rows.tolist() == [[-1, -1], [1, 1]] and asked.shape == (2,)
    torch.testing.assert_close(held.rows, torch.tensor([[2.0, (9 - 3.5) / 1.5]]))
    with pytest.raises(UserError, match="no row of split 'hold out'. Did you mean 'held out'"):
        asked.build("hold out")


@pytest.mark.parametrize("columns", [["a", "b", "c"], [0, 1, 2]])
@pytest.mark.parametrize(("index", "header"), [(False, False), (False, True), (True, True)])
def test_a_table_that_pandas_wrote_has_its_columns_and_no_row_of_their_numbers(
    tmp_path, columns, index, header, numbers
):
    pandas.DataFrame(numbers, columns=columns).to_csv(tmp_path / "a.csv", index=index, header=header)
    table = TableConfig(str(tmp_path / "a.csv"), test=0.0).build()
    assert table.columns == [str(each) for each in (columns if header else range(3))]
    torch.testing.assert_close(table.restore(table.rows), torch.from_numpy(numbers), rtol=1e-5, atol=1e-5)


def test_labels_and_splits_are_as_they_are_written(tmp_path):
    rows = "".join(f"{i},{i % 2:02d},{i % 2 == 0:d}e0\n" for i in range(8))
    (tmp_path / "a.csv").write_text("x,kind,part\n" + rows.replace("1e0", "train").replace("0e0", "00"))
    asked = TableConfig(str(tmp_path / "a.csv"), label="kind", split_column="part")
    assert asked.build().captions == ["00"] * 4 and asked.build("00").captions == ["01"] * 4


def test_cells_may_have_lines_whatever_the_size_of_the_file(tmp_path):
    rows = "".join(f'{i},"one\n{"two" * 40}"\n' for i in range(20_000))
    (tmp_path / "a.csv").write_text('\nx,"the\nlabel"\n' + rows)
    table = TableConfig(str(tmp_path / "a.csv"), label="the\nlabel", test=0.0).build()
    assert len(table) == 20_000 and set(table.captions) == {"one\n" + "two" * 40}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n3,\n", {}, "column 'b': row 2 holds nothing, or NaN"),
        ("a,b\n1,2\n3,nan\n", {}, "column 'b': row 2 holds nothing, or NaN"),
        ("a,b\n1,2\n-inf,4\n", {}, "column 'a': row 2 holds -inf"),
        ("a,b\n1,2\n3,4 kg\n", {}, "column 'b': row 2 holds '4 kg'"),
        ("a,b\n1,2\n3,4\n5\n", {}, "cannot be read.*Expected 2 columns"),
        ('a,b,c\n1,2,e\n3,4,"f\n5,6,g\n', {"label": "c"}, "cannot be read: line 4: unexpected end of data"),
        ("a,b\n1,2\n1,4\n1,5\n", {"test": 0.0}, "column 'a' .* is 1 in all 3 training rows"),
        ("a,b\n1,2\n1,4\n1,5\n", {"columns": ("a", "bb")}, "no column 'bb'. Did you mean 'b'"),
        ("a,b\n1,2\n", {"label": "c"}, "no column 'c'"),
        ("a,b\n1,2\n", {"label": "a", "columns": ("a",)}, "'a' is asked for twice"),
        ("a\n1\n2\n", {"label": "a"}, "no column of .* is left but a"),
        ("a,a\n1,2\n", {}, "two columns 'a'"),
        ("a,b\n", {}, "no row but its header"),
        ("", {}, "no column"),
    ],
)
def test_bad_tables_are_refused_with_the_place(tmp_path, text, options, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        TableConfig(str(tmp_path / "t.csv"), **options).build()


def test_files_that_are_no_tables_are_refused(tmp_path):
    for name in ("a.npy", "a.npz", "a.parquet", "a.csv"):
        (tmp_path / name).write_bytes(b"\x93\x00 none \xff")
        with pytest.raises(UserError, match=name):
            TableConfig(str(tmp_path / name)).build()
    np.save(tmp_path / "objects.npy", np.array([[{}, 1]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="no NumPy array of numbers"):
        TableConfig(str(tmp_path / "objects.npy")).build()
    np.save(tmp_path / "flat.npy", np.arange(5.0))
    with pytest.raises(UserError, match=r"shape \(5,\)"):
        TableConfig(str(tmp_path / "flat.npy")).build()
    np.savez(tmp_path / "ragged.npz", a=np.arange(5.0), b=np.arange(4.0))
    with pytest.raises(UserError, match="a: 5, b: 4"):
        TableConfig(str(tmp_path / "ragged.npz")).build()
    with pytest.raises(UserError, match="does not exist. Did you mean 'flat.npy'"):
        TableConfig(str(tmp_path / "flot.npy")).build()
    with pytest.raises(UserError, match="none of the tables known: .csv"):
        TableConfig(str(tmp_path)).build()
    for options in ({"test": 1.0}, {"validation": -0.1}, {"test": 0.5, "validation": 0.5}):
        with pytest.raises(UserError, match="of the rows|no row to train on"):
            TableConfig("a.csv", **options)


def test_rounding_carries_no_point_out_of_a_pixel():
    weight = (torch.arange(512)[:, None] + torch.arange(512)) % 2
    density = Pixels(weight, ("picture",), 0.0)
    edge = torch.tensor([1e-7, 1 - 1e-7], dtype=torch.float64)
    uniform = torch.cartesian_prod(torch.linspace(0.001, 0.999, 500, dtype=torch.float64), edge, edge)
    points, _ = density.draw(uniform, torch.zeros(len(uniform), 2))
    assert density.log_prob(points.float()).isfinite().all()
