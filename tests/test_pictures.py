"""PNG files with their settings, and captioned grids."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from genflow.data.pictures import caption_grid, read_settings, to_picture
from genflow.errors import UserError


def test_a_picture_keeps_its_pixels_and_settings(tmp_path):
    x = torch.tensor([[-1.0, 0.0, 1.0, 7.0]]).expand(3, 2, 4)
    settings = {"prompt": "a \u05e9 \U0001f9a6\n", "seed": 2**62, "steps": 4}
    to_picture(x, settings).save_atomic(tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255, 255]
    assert read_settings(tmp_path / "new" / "a.png") == settings
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_picture_is_open_to_whom_other_new_files_are(tmp_path):
    before = os.umask(0o027)
    try:
        to_picture(torch.zeros(1, 2, 2)).save_atomic(tmp_path / f"{'name' * 60}.png")
    finally:
        os.umask(before)
    (picture,) = tmp_path.iterdir()
    assert picture.stat().st_mode & 0o777 == 0o640


def test_every_grey_level_survives(tmp_path):
    levels = torch.arange(256).view(1, 16, 16)
    to_picture(levels / 127.5 - 1).save_atomic(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image)[..., 1], levels[0].numpy())


def test_no_place_to_write_costs_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not write .*a\.png"):
        to_picture(torch.zeros(3, 4, 4)).save_atomic(tmp_path / "file" / "a.png")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    to_picture(torch.zeros(3, 4, 4), {"seed": 1}).save_atomic(tmp_path / "a.png")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left"):
        to_picture(torch.ones(3, 4, 4), {"seed": 2}).save_atomic(tmp_path / "a.png")
    assert read_settings(tmp_path / "a.png") == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_settings_that_are_not_there(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    for name, reason in (("plain.png", "no genflow settings"), ("text.png", "not a picture"), ("none.png", "No such")):
        with pytest.raises(UserError, match=reason):
            read_settings(tmp_path / name)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_each_picture_in_its_place(channels):
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, channels, 8, 8)
    captions = ["one", "", "three " * 100, "\0 \u05e9\u05dc\u05d5\u05dd", "\U0001f9a6"]
    grid = np.asarray(caption_grid(images, captions, columns=2, cell=32).image.convert("L"))
    seen = [grid[6 + 16 + r * ((grid.shape[0] - 6) // 3), 6 + 16 + c * 38] for r in range(3) for c in range(2)]
    assert seen[:5] == [0, 64, 128, 191, 255]
    assert (grid < 200).sum() > 3 * 32 * 32  # and there is writing


def test_a_grid_of_captions_that_do_not_match_is_refused():
    with pytest.raises(ValueError):
        caption_grid(torch.zeros(2, 3, 8, 8), ["one"])


def test_letters_beyond_ascii_are_drawn_and_not_a_box():
    black = torch.zeros(1, 3, 16, 16)
    drawn = {letter: caption_grid(black, [letter]).image.tobytes() for letter in "éüłЖΩ"}
    assert len(set(drawn.values())) == len(drawn)


def test_what_is_no_picture_is_refused():
    for x in (torch.zeros(2, 3, 4, 4), torch.zeros(4, 4), torch.zeros(5, 4, 4)):
        with pytest.raises(UserError, match="a picture is 1 or 3 x H x W, not"):
            to_picture(x)
    with pytest.raises(UserError, match=r"numbers in \[-1, 1\], not torch.uint8; scale levels as k / 127.5 - 1"):
        to_picture(torch.zeros(3, 4, 4, dtype=torch.uint8))
    with pytest.raises(UserError, match="1 captions for 2 pictures; give one for each"):
        caption_grid(torch.zeros(2, 3, 4, 4), ["a"])
