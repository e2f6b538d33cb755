from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data.images import read_image
from pipeline.oct.heyex_vol import read_vol, write_vol
from pipeline.oct.pictures import (
    bscan_picture,
    thickness_picture,
    write_overlay,
    write_thickness_picture,
)

H, W = 60, 80
CYAN, AMBER, MAGENTA, RED = (0, 230, 255), (255, 190, 0), (235, 90, 235), (255, 60, 60)


def rows(**changes: Any) -> SimpleNamespace:
    ilm, valid = np.full((1, W), 20.0), np.ones((1, W), bool)
    known = {
        "ilm_px": ilm,
        "bm_px": ilm + 20,
        "ilm_sigma_px": np.zeros((1, W)),
        "bm_sigma_px": np.zeros((1, W)),
        "ilm_valid": valid,
        "bm_valid": valid.copy(),
    }
    return SimpleNamespace(**{**known, **changes})


def picture(given: SimpleNamespace, truth: dict[str, Any] | None = None) -> NDArray[np.uint8]:
    return bscan_picture(np.full((H, W), 100, np.uint8), 255.0, given, truth=truth)[: 2 * H]


def where(image: NDArray[np.uint8], colour: tuple[int, int, int], x: int = 60) -> list[int]:
    return np.flatnonzero((image[:, x] == colour).all(axis=-1)).tolist()


def test_a_line_is_drawn_between_its_row_and_the_one_above() -> None:
    image = picture(rows())
    assert where(image, CYAN) == [39, 40]  # row 20 begins at line 40 of the enlarged picture
    assert where(image, AMBER) == [79, 80]


def test_a_fraction_of_a_row_is_seen() -> None:
    image = picture(rows(ilm_px=np.full((1, W), 20.25))).astype(int)
    blue = image[38:43, 60, 2] - 100
    assert np.argmax(blue) == 2
    np.testing.assert_allclose(blue / 155, [0, 0.5, 1, 0.5, 0], atol=0.02)


def test_outside_the_boundaries_the_bscan_is_unchanged() -> None:
    image = picture(rows())
    assert (image[:38] == 100).all()
    assert (image[42:78] == 100).all()


def test_columns_that_are_not_valid_have_a_bar_and_no_line() -> None:
    valid = np.ones((1, W), bool)
    valid[0, 30:40] = False
    image = picture(rows(ilm_valid=valid))
    assert where(image, CYAN, 65) == []
    assert where(image, RED, 65) == list(range(6))
    assert where(image, CYAN, 80) == [39, 40]
    assert where(image, RED, 80) == []
    assert where(image, AMBER, 65) == [79, 80]
    below = picture(rows(bm_valid=valid))
    assert where(below, RED, 65) == list(range(2 * H - 6, 2 * H))


def test_the_band_is_two_sigma_to_either_side() -> None:
    image = picture(rows(ilm_sigma_px=np.full((1, W), 3.0))).astype(int)
    tinted = np.flatnonzero(image[:70, 60, 2] > 100)
    assert (tinted[0], tinted[-1]) == (40 - 12, 40 + 11)


@pytest.mark.parametrize("sigma", [np.inf, np.nan, 1e30])
def test_any_sigma_can_be_drawn(sigma: float) -> None:
    image = picture(rows(ilm_sigma_px=np.full((1, W), sigma)))
    assert where(image, CYAN) == [39, 40]


@pytest.mark.parametrize("row", [-50.0, 0.0, 59.9, 60.0, 1e6, np.nan])
def test_any_row_can_be_drawn(row: float) -> None:
    assert picture(rows(ilm_px=np.full((1, W), row))).shape == (2 * H, 2 * W, 3)


def test_annotated_rows_have_their_own_colour() -> None:
    truth = {"ILM": np.full(W, 10.0), "BM": np.where(np.arange(W) < 40, np.nan, 50.0)}
    image = picture(rows(), truth)
    assert where(image, MAGENTA, 20) == [19, 20]
    assert where(image, MAGENTA, 100) == [19, 20, 99, 100]


def test_black_is_zero_and_white_is_white() -> None:
    bscan = np.zeros((H, W), np.uint16)
    bscan[50:] = 65535
    image = bscan_picture(bscan, 65535.0, rows(), 0)
    assert (image[:30] == 0).all()
    assert (image[104 : 2 * H] == 255).all()


def vol(path: Path, count: int = 5) -> Path:
    layers = {"ILM": np.full((count, W), 12.0), "BM": np.full((count, W), 44.0)}
    bscans = np.full((count, H, W), 0.4)
    return write_vol(path, bscans, layers, scale_x_um=75, spacing_um=1500, laterality="OS")


def tiled(count: int) -> SimpleNamespace:
    return SimpleNamespace(**{name: np.repeat(a, count, 0) for name, a in vars(rows()).items()})


def test_an_overlay_is_written_with_the_annotated_rows_of_its_volume(tmp_path: Path) -> None:
    volume = read_vol(vol(tmp_path / "a.vol"))
    path = write_overlay(tmp_path / "deep" / "a.png", volume, tiled(5), 3)
    image = read_image(path)
    assert where(image, MAGENTA) == [23, 24, 87, 88]
    assert where(image, CYAN) == [39, 40]
    assert set(image[0, 0].tolist()) == {round(0.4 * 255)}


def test_a_thickness_map_is_to_scale_and_grey_where_not_valid(tmp_path: Path) -> None:
    volume = read_vol(vol(tmp_path / "a.vol"))  # 6 mm wide, 7.5 mm high
    thickness = np.full((5, W), 300.0)
    thickness[0, :10] = np.nan
    image = thickness_picture(volume, thickness)
    assert image.shape == (600 + 18, 480, 3)
    assert (image[5, 5] == 110).all()
    assert not (image[5, 400] == 110).all()
    middle = (round(599 / 2 - 0.5 * 80), 240)  # the circle of 1 mm, at 80 px per mm
    assert (image[middle[0] - 1 : middle[0] + 2, middle[1]] == 255).all(axis=-1).any()


def test_thicker_is_brighter(tmp_path: Path) -> None:
    volume = read_vol(vol(tmp_path / "a.vol"))
    levels = [thickness_picture(volume, np.full((5, W), um))[5, 5].sum() for um in (100, 300, 500)]
    assert levels == sorted(levels)
    assert len(set(levels)) == 3


def test_no_map_is_written_of_one_bscan(tmp_path: Path) -> None:
    volume = read_vol(vol(tmp_path / "a.vol", 1))
    assert write_thickness_picture(tmp_path / "a.png", volume, rows()) is None
    assert not (tmp_path / "a.png").exists()
    many = read_vol(vol(tmp_path / "b.vol"))
    assert write_thickness_picture(tmp_path / "b.png", many, tiled(5)) == tmp_path / "b.png"
