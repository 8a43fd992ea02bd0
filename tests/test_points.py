"""Pictures of points: densities in their cells, colours by density, panels side by side."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from genflow.data.pictures import read_settings
from genflow.data.points import (
    GAMMA,
    RAMP,
    brightest,
    density_2d,
    extent_of,
    histogram_2d,
    plane,
    point_picture,
    shade,
)
from genflow.errors import UserError

SQUARE = (-4.0, 4.0, -4.0, 4.0)


def normal(x):
    return -x.double().square().sum(1) / 2 - math.log(2 * math.pi)


def darkness(image, box):
    return 255 - np.asarray(image.convert("L").crop(box), dtype=float)


def test_a_histogram_is_a_density_and_the_top_row_is_the_top():
    points = torch.tensor([[-3.9, 3.9], [-3.9, 3.9], [3.9, -3.9], [9.0, 0.0]])
    cells = histogram_2d(points, SQUARE, 8)
    assert cells[0, 0] == 2 / 4 and cells[7, 7] == 1 / 4  # of 4 points, in cells of area 1
    assert float(cells.sum()) == 3 / 4  # one of them is outside
    low = histogram_2d(torch.tensor([[1.0, 1.5]]), (0.0, 4.0, 1.0, 5.0), 4)
    assert low[3, 1] == 1 == low.sum()
    noise = torch.randn(200_000, 2)
    exact = density_2d(normal, SQUARE, 16)
    assert (histogram_2d(noise, SQUARE, 16) - exact).abs().max() < 0.01


def test_a_density_is_asked_at_the_middles_from_the_top_left_on():
    asked = []

    def log_prob(x):
        asked.append(x)
        return x[:, 0] + 10 * x[:, 1]

    cells = density_2d(log_prob, (0.0, 2.0, 0.0, 4.0), 2)
    assert torch.cat(asked).tolist() == [[0.5, 3.0], [1.5, 3.0], [0.5, 1.0], [1.5, 1.0]]
    torch.testing.assert_close(cells.log(), torch.tensor([[30.5, 31.5], [10.5, 11.5]], dtype=torch.float64))
    assert len(asked) == 1
    density_2d(log_prob, SQUARE, 128)
    assert max(map(len, asked)) <= 8192 and sum(map(len, asked[1:])) == 128**2


def test_the_extent_is_a_square_around_all_but_outliers():
    points = torch.rand(10_000, 2) * torch.tensor([4.0, 1.0]) + torch.tensor([1.0, 0.0])
    points[0], points[1], points[2] = 1e6, math.nan, -math.inf
    left, right, bottom, top = extent_of(points, margin=0.25)
    assert right - left == pytest.approx(top - bottom) == pytest.approx(6, abs=0.05)
    assert (left + right) / 2 == pytest.approx(3, abs=0.02) and (bottom + top) / 2 == pytest.approx(0.5, abs=0.02)
    assert np.diff(extent_of(torch.ones(5, 2)))[0] > 0
    with pytest.raises(UserError, match="none of the points is finite"):
        extent_of(torch.full((3, 2), math.nan))


def test_colours_run_from_white_to_dark_blue():
    image = shade(torch.linspace(0, 2, 64).expand(64, 64), 1.0, 64).convert("RGB")
    row = np.asarray(image, dtype=int)[0]
    assert "#{:02x}{:02x}{:02x}".format(*row[0]) == RAMP[0] and "#{:02x}{:02x}{:02x}".format(*row[-1]) == RAMP[-1]
    assert (np.diff(row.sum(1)) <= 0).all() and len(np.unique(row.sum(1))) > 25
    middle = shade(torch.full((1, 1), 0.5 ** (1 / GAMMA)), 1.0, 1).convert("RGB").getpixel((0, 0))
    np.testing.assert_allclose(middle, [int(RAMP[3][i : i + 2], 16) for i in (1, 3, 5)], atol=3)
    few = shade(torch.linspace(0, 2, 64).expand(64, 64), 1.0, 64, levels=8).convert("RGB")
    assert len(few.getcolors()) == 8 and few.getpixel((0, 0)) == (255, 255, 255)
    assert shade(torch.tensor([[math.nan]]), 1.0, 2).convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_end_of_the_ramp_takes_no_notice_of_one_cell():
    density = torch.ones(100, 100)
    density[0, 0] = 1e9
    assert brightest(density) == 1 and brightest(torch.zeros(3, 3)) == 1


def test_a_picture_has_a_panel_for_each_and_one_for_the_density(tmp_path):
    data = torch.randn(5000, 2) * 0.3 + torch.tensor([1.0, 1.0])
    picture = point_picture({"data": data, "samples": -data}, normal, extent=SQUARE, side=128, settings={"step": 3})
    assert picture.image.size == (3 * 136 + 8, 128 + 32)
    boxes = [(8 + i * 136, 8, 8 + i * 136 + 128, 136) for i in range(3)]
    for box, quarter in zip(boxes, ((64, 0), (0, 64)), strict=False):  # data top right, samples bottom left
        dark = darkness(picture.image, box)
        x, y = quarter
        assert dark[y : y + 64, x : x + 64].sum() > 0.95 * dark.sum() > 0
    exact = darkness(picture.image, boxes[2])
    assert abs((exact * np.arange(128)).sum() / exact.sum() - 63.5) < 0.5
    picture.save_atomic(tmp_path / "new" / "a.png")
    assert read_settings(tmp_path / "new" / "a.png") == {"step": 3}
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.size == picture.image.size


def test_all_panels_have_one_scale():
    near, far = torch.randn(5000, 2) * 0.3, torch.randn(5000, 2)
    picture = point_picture({"data": near, "samples": far}, side=128, extent=SQUARE).image
    dense, thin = darkness(picture, (8, 8, 136, 136)), darkness(picture, (144, 8, 272, 136))
    assert dense.max() > 1.3 * thin.max()
    np.testing.assert_array_equal(
        darkness(point_picture({"data": near}, side=128, extent=SQUARE).image, (8, 8, 136, 136)), dense
    )


def test_samples_alone_need_no_name_and_any_number_of_columns():
    points = torch.randn(500, 2)
    alone, named = point_picture(points).image, point_picture({"samples": points}).image
    assert alone.tobytes() == named.tobytes()
    more = point_picture({"samples": torch.cat([points, torch.randn(500, 4)], 1)}).image
    assert more.tobytes() == named.tobytes()  # the first two of six
    stripe = darkness(point_picture(points[:, :1], side=64).image, (8, 8, 72, 72))
    assert stripe.max() > 100 and (stripe == stripe[:1]).all()


def test_what_a_panel_does_not_show_is_written_under_it(monkeypatch):
    written = []
    from PIL import ImageDraw

    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, at, text, **k: written.append(text) or draw(self, at, text, **k)
    )
    points = torch.zeros(100, 2)
    points[:20] = 50.0
    points[99] = math.nan
    point_picture({"data": torch.zeros(100, 2), "samples": points}, normal, extent=SQUARE)
    assert written == ["data", "samples (20% outside, 1 not finite)", "density"]


@pytest.mark.parametrize("panels", [{}, {"a": torch.empty(0, 2)}, {"a": torch.ones(3, 2), "b": torch.empty(0, 2)}])
def test_nothing_to_draw_is_told(panels):
    with pytest.raises(UserError, match="no points to draw"):
        point_picture(panels)


def test_pictures_are_no_points():
    with pytest.raises(UserError, match=r"N x D, not \(2, 3, 8, 8\)"):
        plane(torch.zeros(2, 3, 8, 8))
