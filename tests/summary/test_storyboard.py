"""The contact sheet: every keyframe in its place, with its time and its relevance."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from deevisum_jax.errors import UserError
from deevisum_jax.summary.storyboard import write_contact_sheet

PAPER = (250, 248, 244)


def stills(folder, count, size=(640, 360)):
    """Pictures of one grey each, brighter and brighter."""
    paths = []
    for k in range(count):
        paths.append(folder / f"{k}.jpg")
        Image.new("RGB", size, (40 + k * 200 // count,) * 3).save(paths[-1])
    return paths


def entries(count, **fields):
    return [
        {"time_s": 3.5 * k, "relevance": k / count, "filled": False} | fields for k in range(count)
    ]


def sheet_of(folder, count, size=(640, 360), **fields) -> Image.Image:
    path = folder / "sheet.jpg"
    write_contact_sheet(stills(folder, count, size), entries(count, **fields), path)
    with Image.open(path) as sheet:
        return sheet.convert("RGB")


def grey(sheet: Image.Image, x: int, y: int) -> int:
    return round(np.asarray(sheet)[y - 3 : y + 3, x - 3 : x + 3].mean())


def test_pictures_stand_in_rows_in_order_of_time(tmp_path):
    sheet = sheet_of(tmp_path, 6)
    # Four columns of 320 x 180 with gaps of 10; below each 26 for its text.
    assert sheet.size == (10 + 4 * 330, 10 + 2 * 216)
    for k in range(6):
        x, y = 10 + k % 4 * 330 + 160, 10 + k // 4 * 216 + 90
        assert grey(sheet, x, y) == pytest.approx(40 + k * 200 // 6, abs=2)
    assert np.asarray(sheet)[300, 1000] == pytest.approx(PAPER, abs=3)  # behind the last


def test_a_bar_is_as_long_as_the_relevance_within_the_video(tmp_path):
    sheet = np.asarray(sheet_of(tmp_path, 3)).astype(int)
    accent = np.abs(sheet - (194, 85, 27)).sum(-1) < 60
    row = 10 + 36 * 320 // 64 + 26 - 6 + 4
    assert [accent[row, 10 + 330 * k : 330 + 330 * k].mean() for k in range(3)] == pytest.approx(
        [0, 0.5, 1], abs=0.03
    )


def test_below_a_picture_there_is_text_and_in_grey_where_it_only_fills(tmp_path):
    darkest = {}
    for filled in (False, True):
        text = np.asarray(sheet_of(tmp_path, 1, filled=filled).convert("L"))[192:208, 10:330]
        assert text.std() > 10
        darkest[filled] = text.min()
    assert darkest[False] + 30 < darkest[True]


def test_one_picture_makes_a_sheet_and_equal_relevance_too(tmp_path):
    assert sheet_of(tmp_path, 1).width == 340
    assert sheet_of(tmp_path, 2, relevance=0.3).width == 670


def test_a_tall_picture_keeps_its_aspect(tmp_path):
    sheet = sheet_of(tmp_path, 2, size=(320, 2560))
    assert sheet.height == 10 + 4 * 320 + 36  # cells are at most four times as high as wide
    assert grey(sheet, 170, 600) == pytest.approx(40, abs=2)
    assert np.asarray(sheet)[600, 40] == pytest.approx(PAPER, abs=3)


def test_a_small_picture_is_not_made_larger(tmp_path):
    sheet = sheet_of(tmp_path, 2, size=(100, 100))
    assert sheet.size == (10 + 2 * 170, 10 + 160 + 36)  # room enough for the text
    pixels = np.asarray(sheet.convert("L")).astype(int)
    assert (np.abs(pixels[90, 10:170] - 40) < 5).sum() == pytest.approx(100, abs=2)


def test_many_pictures_make_narrow_cells(tmp_path):
    path = tmp_path / "sheet.jpg"
    [still] = stills(tmp_path, 1, size=(64, 36))
    write_contact_sheet([still] * 2000, entries(2000), path)
    with Image.open(path) as sheet:
        assert sheet.width < 10_100  # 45 columns
        assert sheet.height < 10_000


def test_what_cannot_be_shown_is_said_so(tmp_path):
    with pytest.raises(UserError, match="at least one keyframe"):
        write_contact_sheet([], [], tmp_path / "sheet.jpg")
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"a\.jpg: the keyframe cannot be read"):
        write_contact_sheet([tmp_path / "a.jpg"], entries(1), tmp_path / "sheet.jpg")
    assert not (tmp_path / "sheet.jpg").exists()
