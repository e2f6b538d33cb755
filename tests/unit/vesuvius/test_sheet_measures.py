from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.vesuvius.sheet_measures import largest_sheets, sheet_areas, sheet_facts


def plate(side: int = 24, thickness: int = 2) -> NDArray[np.uint8]:
    mask = np.zeros((side, side, side), np.uint8)
    mask[:, 8 : 8 + thickness] = 1
    return mask


@pytest.mark.parametrize("thickness", [1, 2, 5])
def test_the_area_of_a_plate_through_the_volume_is_that_of_its_plane(thickness: int) -> None:
    _, facts = sheet_facts(plate(thickness=thickness), (2000, 3000, 5000))
    assert facts["sheet_area_mm2"] == {1: pytest.approx(24 * 24 * 2 * 5)}
    assert facts["area_mm2"] == pytest.approx(24 * 24 * 2 * 5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_area_does_not_depend_on_the_axis(axis: int) -> None:
    turned = np.moveaxis(plate(), 1, axis).astype(np.int32)
    assert sheet_areas(turned, 1)[1] == pytest.approx(24 * 24)


def test_a_slope_makes_the_area_at_most_a_ninth_too_large() -> None:
    normal = np.array([1, 0.6, 0.4]) / np.linalg.norm([1, 0.6, 0.4])
    height = np.moveaxis(np.indices((64, 64, 64)) - 31.5, 0, -1) @ normal
    sheets = (np.abs(height) < 1.5).astype(np.int32)
    truth = 64 * 64 / normal[0]
    assert truth < sheet_areas(sheets, 1)[1] < truth * 10 / 9 * 1.01
    assert sheet_facts(sheets.astype(np.uint8))[1]["sheet_faces"][1] / 2 > 1.5 * truth


def test_a_sphere_inside_counts_half_of_its_surface() -> None:
    away = np.linalg.norm(np.indices((33, 33, 33)) - 16, axis=0)
    found = sheet_areas((away <= 12).astype(np.int32), 1)[1]
    assert found == pytest.approx(2 * np.pi * 12.3**2, rel=0.1)


@given(seed=st.integers(0, 1000))
def test_areas_of_sheets_add_up_to_that_of_all(seed: int) -> None:
    mask = np.random.default_rng(seed).random((8, 9, 10)) < 0.2
    sheets, facts = sheet_facts(mask.astype(np.uint8), (1000, 1000, 1000))
    alone = [sheet_areas((sheets == n).astype(np.int32), 1)[1] for n in range(1, sheets.max() + 1)]
    assert facts["area_mm2"] == pytest.approx(sum(alone), abs=1e-5)


def test_without_a_spacing_there_are_faces_alone() -> None:
    _, facts = sheet_facts(plate())
    assert facts["sheet_faces"] == {1: 2 * 24 * 24}
    assert not {"area_mm2", "sheet_area_mm2"} & facts.keys()


def test_an_empty_mask_has_nothing() -> None:
    _, facts = sheet_facts(np.zeros((5, 6, 7), np.uint8), (1, 1, 1))
    assert (facts["sheets"], facts["foreground"], facts["background"]) == (0, 0, 210)
    assert facts["area_mm2"] == 0
    assert facts["sheet_faces"] == {}


def test_the_largest_sheets_come_first() -> None:
    assert largest_sheets(np.array([99, 3, 0, 7, 7]), 3) == [3, 4, 1]
    assert largest_sheets(np.array([99]), 3) == []
