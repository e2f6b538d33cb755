from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.images import read_image
from pipeline.data.preview import contact_sheet, label_overlay

RGB = np.full((40, 60, 3), (200, 100, 50), np.uint8)


@pytest.mark.parametrize(
    "picture",
    [
        RGB,
        RGB[..., 0],
        np.moveaxis(RGB, -1, 0).astype(np.float32),
        RGB[None, ..., 0],
        RGB[..., 0] > 0,
        RGB[..., 0].astype(np.uint16) * 257,
        np.full((40, 60), np.nan),
        np.concatenate([RGB, RGB[..., :1]], -1),
    ],
    ids=["rgb", "gray", "channels first", "one channel", "bool", "16 bits", "nan", "rgba"],
)
def test_every_kind_of_picture_finds_its_tile(tmp_path: Path, picture: Any) -> None:
    sheet = read_image(contact_sheet([{"image": picture}], tmp_path / "sheet.png", tile_px=64))
    assert sheet.shape == (18 + 6 + 64 + 6, 6 + 64 + 6, 3)


def test_one_row_for_each_case_and_one_column_for_each_picture(tmp_path: Path) -> None:
    rows = [{"image": RGB, "label": RGB}, {"image": RGB}, {"image": RGB, "label": RGB}]
    sheet = read_image(contact_sheet(rows, tmp_path / "sheet.png", tile_px=60))
    assert sheet.shape == (18 + 3 * 66 + 6, 2 * 66 + 6, 3)
    assert sheet[24 + 10, 6 + 10].tolist() == [200, 100, 50]
    assert sheet[24 + 66 + 10, 6 + 66 + 10].tolist() == [24, 24, 24]


def test_overlay_colours_the_foreground_alone() -> None:
    label = np.zeros((40, 60), np.uint8)
    label[3, 4] = 1
    overlay = label_overlay(RGB, label)
    changed = (overlay != RGB).any(-1)
    np.testing.assert_array_equal(changed, label > 0)


def test_sizes_that_differ_and_sheets_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label is"):
        label_overlay(RGB, np.zeros((60, 40)))
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="a picture must be"):
        contact_sheet([{"a": np.zeros((4, 4, 7))}], tmp_path / "a.png")
