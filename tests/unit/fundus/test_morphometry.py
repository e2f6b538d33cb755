from __future__ import annotations

from math import isnan, radians, sqrt

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage import draw

from pipeline.errors import InputError
from pipeline.fundus.morphometry import skeleton_length_px, vessel_calibre

SIDE = 161
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE] - SIDE // 2
FOV = ROWS**2 + COLUMNS**2 <= 75**2


def bar(width_px: float, angle_degrees: float, offset_px: float = 0.0) -> NDArray[np.bool_]:
    """A straight vessel: the pixels whose centre lies in a strip."""
    angle = radians(angle_degrees)
    across = COLUMNS * np.sin(angle) - ROWS * np.cos(angle) - offset_px
    return np.asarray((across > -width_px / 2) & (across <= width_px / 2))


@pytest.mark.parametrize("width_px", range(1, 13))
def test_upright_bar_has_exactly_its_width(width_px: int) -> None:
    mask = np.zeros((60, 80), np.bool_)
    mask[20 : 20 + width_px, :] = True
    assert vessel_calibre(mask)["median_calibre_px"] == width_px
    assert vessel_calibre(mask.T)["median_calibre_px"] == width_px


@pytest.mark.parametrize("width_px", [2, 3, 4, 5, 6, 8, 10])
@pytest.mark.parametrize("angle_degrees", [0, 45, 90, 135])
def test_straight_bar_is_as_wide_as_drawn(width_px: float, angle_degrees: float) -> None:
    found = [
        vessel_calibre(bar(width_px, angle_degrees, offset), FOV)["median_calibre_px"]
        for offset in np.linspace(0.01, 0.01 + sqrt(2), 12, endpoint=False)
    ]
    assert np.mean(found) == pytest.approx(width_px, abs=0.15)


@pytest.mark.parametrize("angle_degrees", [10, 22.5, 30, 67])
def test_oblique_bar_is_nearly_as_wide_as_drawn(angle_degrees: float) -> None:
    for width_px in (2, 4, 6, 8):
        found = vessel_calibre(bar(width_px, angle_degrees, 0.3), FOV)
        assert found["median_calibre_px"] == pytest.approx(width_px, abs=0.6)
        assert found["mean_calibre_px"] == pytest.approx(width_px, abs=0.8)


@pytest.mark.parametrize("angle_degrees", [0, 13, 22.5, 30, 45, 60, 90])
def test_length_of_a_line_is_right_in_every_direction(angle_degrees: float) -> None:
    length = 120
    angle = radians(angle_degrees)
    end_row, end_column = (round(length * part) for part in (np.sin(angle), np.cos(angle)))
    line = np.zeros((SIDE, SIDE), np.bool_)
    line[draw.line(0, 0, end_row, end_column)] = True
    assert skeleton_length_px(line) == pytest.approx(length, rel=0.055)


def test_diagonal_steps_count_once() -> None:
    corner = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], np.bool_)
    assert skeleton_length_px(corner) == pytest.approx(2 * 0.948 + 1.343)


def test_density_is_the_share_of_the_field_of_view() -> None:
    mask = np.zeros((10, 10), np.bool_)
    mask[:, 4:6] = True
    fov = np.zeros((10, 10), np.bool_)
    fov[:5] = True
    assert vessel_calibre(mask, fov)["vessel_density"] == 0.2
    assert vessel_calibre(mask)["vessel_density"] == 0.2
    assert vessel_calibre(mask, mask)["vessel_density"] == 1.0


def test_pixels_outside_the_field_of_view_change_nothing() -> None:
    mask = bar(5, 45)
    noise = np.random.default_rng(0).random(mask.shape) < 0.5
    assert vessel_calibre(np.where(FOV, mask, noise), FOV) == vessel_calibre(mask, FOV)


def test_rim_of_the_field_of_view_does_not_narrow_vessels() -> None:
    mask = np.zeros((40, 200), np.bool_)
    mask[16:24] = True
    fov = np.zeros_like(mask)
    fov[:, 60:90] = True
    found = vessel_calibre(mask, fov)
    assert found["median_calibre_px"] == 8
    assert found["mean_calibre_px"] == pytest.approx(8, abs=0.8)


def test_micrometres_follow_from_the_pixel_size() -> None:
    plain, scaled = vessel_calibre(bar(4, 0), FOV), vessel_calibre(bar(4, 0), FOV, pixel_um=7.5)
    assert {name: scaled[name] for name in plain} == plain
    assert scaled["mean_calibre_um"] == pytest.approx(7.5 * plain["mean_calibre_px"])
    assert scaled["skeleton_length_mm"] == pytest.approx(0.0075 * plain["skeleton_length_px"])


def test_no_vessel_has_no_calibre() -> None:
    found = vessel_calibre(np.zeros((8, 8)))
    assert found["vessel_density"] == 0
    assert found["skeleton_length_px"] == 0
    assert isnan(found["mean_calibre_px"])
    assert isnan(found["median_calibre_px"])


def test_vessel_without_walls_has_no_calibre() -> None:
    assert isnan(vessel_calibre(np.ones((8, 8)))["mean_calibre_px"])


def test_empty_field_of_view_has_no_density() -> None:
    assert isnan(vessel_calibre(np.ones((8, 8)), np.zeros((8, 8)))["vessel_density"])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match=r"mask must be \(H, W\), got shape \(1, 8, 8\)"):
        vessel_calibre(np.zeros((1, 8, 8)))
    with pytest.raises(InputError, match=r"fov has shape \(8, 4\), mask has \(8, 8\)"):
        vessel_calibre(np.zeros((8, 8)), np.zeros((8, 4)))
    with pytest.raises(InputError, match=r"pixel_um must be positive, got 0"):
        vessel_calibre(np.zeros((8, 8)), pixel_um=0)


def test_diagonal_of_one_pixel_is_narrower_than_one() -> None:
    assert vessel_calibre(np.eye(30))["median_calibre_px"] == pytest.approx(1 / sqrt(2), abs=0.45)
