from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import euler_number

from pipeline.errors import ConfigurationError
from pipeline.vesuvius import defects
from pipeline.vesuvius.phantom import scroll_phantom

EVERYWHERE = np.ones((3, 3, 3))
Mask = NDArray[np.bool_]


@pytest.fixture
def sheets() -> Mask:
    """Two level sheets of 3 voxels, as in the table of probes of the metric."""
    mask = np.zeros((64, 64, 64), bool)
    mask[:, 20:23] = mask[:, 50:53] = True
    return mask


def betti(mask: Mask) -> tuple[int, int, int]:
    """Return 6-connected components, tunnels and 26-connected cavities."""
    pieces = ndimage.label(mask)[1]
    background = ndimage.label(~np.pad(mask, 1), EVERYWHERE)[1]
    cavities = background - 1
    return pieces, pieces + cavities - euler_number(mask, connectivity=1), cavities


PROBES: dict[str, tuple[Callable[[Mask], Mask], Any, bool]] = {
    "slit on the octant plane": (
        lambda m: defects.slit(m, (5, 21, 32)),
        np.s_[:, 20:23, 32],
        False,
    ),
    "slit": (lambda m: defects.slit(m, (5, 21, 40)), np.s_[:, 20:23, 40], False),
    "bridge": (lambda m: defects.bridge(m, (10, 30, 10)), np.s_[10, 23:50, 10], True),
    "hole 2x2": (lambda m: defects.hole(m, (10, 21, 10), 2), np.s_[10:12, 20:23, 10:12], False),
    "hole 1x1": (lambda m: defects.hole(m, (10, 22, 10)), np.s_[10, 20:23, 10], False),
    "cavity": (lambda m: defects.cavity(m, (10, 21, 10)), np.s_[10, 21, 10], False),
    "speck": (lambda m: defects.speck(m, (10, 30, 10)), np.s_[10, 30, 10], True),
}


@pytest.mark.parametrize("name", PROBES)
def test_defects_are_those_of_the_table_of_probes(name: str, sheets: Mask) -> None:
    inject, region, value = PROBES[name]
    before = sheets.copy()
    expected = sheets.copy()
    expected[region] = value
    np.testing.assert_array_equal(inject(sheets), expected)
    np.testing.assert_array_equal(sheets, before)  # the mask given is left alone


@pytest.mark.parametrize(
    ("inject", "expected"),
    [
        (lambda m: m, (2, 0, 0)),
        (lambda m: defects.hole(m, (10, 21, 10)), (2, 1, 0)),
        (lambda m: defects.slit(m, (10, 21, 40)), (3, 0, 0)),
        (lambda m: defects.bridge(m, (10, 30, 10)), (1, 0, 0)),
        (lambda m: defects.speck(m, (10, 30, 10)), (3, 0, 0)),
        (lambda m: defects.cavity(m, (10, 21, 10)), (2, 0, 1)),
        (lambda m: defects.staircase(m, (10, 21, 40)), (3, 0, 0)),
    ],
    ids=["none", *defects.KINDS[:1], "slit", "bridge", "speck", "cavity", "staircase"],
)
def test_each_defect_changes_the_topology_in_its_own_way(
    inject: Callable[[Mask], Mask], expected: tuple[int, int, int], sheets: Mask
) -> None:
    assert betti(inject(sheets)) == expected


def test_staircase_stays_whole_for_corner_neighbours(sheets: Mask) -> None:
    broken = defects.staircase(sheets, (10, 21, 40))
    assert ndimage.label(broken, EVERYWHERE)[1] == 2
    assert broken.sum() == sheets.sum()
    assert broken[:, 23:26, 40:].all()
    assert broken[:, 50:53].all()  # the other sheet is left alone


def test_thickening_on_both_sides_is_that_of_the_probe(sheets: Mask) -> None:
    expected = np.zeros_like(sheets)
    expected[:, 19:24] = expected[:, 49:54] = True
    np.testing.assert_array_equal(defects.thickening(sheets, axis=1), expected)
    np.testing.assert_array_equal(defects.thickening(sheets), expected)


@pytest.mark.parametrize("by", [1, 2, 3, -2, 100])
def test_shift_moves_the_sheets_and_lets_nothing_in(sheets: Mask, by: int) -> None:
    expected = np.zeros_like(sheets)
    for start in (20, 50):
        low, high = (min(max(start + by + i, 0), 64) for i in (0, 3))
        expected[:, low:high] = True
    np.testing.assert_array_equal(defects.shift(sheets, (0, by, 0)), expected)


def test_shift_there_and_back_loses_only_the_rim() -> None:
    mask = np.random.default_rng(0).random((6, 7, 8)) > 0.5
    back = defects.shift(defects.shift(mask, (1, -2, 3)), (-1, 2, -3))
    np.testing.assert_array_equal(back[:-1, 2:, :-3], mask[:-1, 2:, :-3])
    assert back.sum() == mask[:-1, 2:, :-3].sum()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_defects_work_along_any_axis(sheets: Mask, axis: int) -> None:
    turned = np.moveaxis(sheets, 1, axis)
    at = np.insert([10, 12], axis, 21)
    place = (int(at[0]), int(at[1]), int(at[2]))
    along = (axis + 1) % 3
    assert betti(defects.hole(turned, place)) == (2, 1, 0)
    assert betti(defects.slit(turned, place, along)) == (3, 0, 0)
    assert betti(defects.staircase(turned, place, along)) == (3, 0, 0)
    gap = np.insert([10, 12], axis, 30)
    assert betti(defects.bridge(turned, (gap[0], gap[1], gap[2]), axis)) == (1, 0, 0)


def test_hole_follows_a_slanted_sheet_and_spares_its_neighbour() -> None:
    _, y, x = np.indices((24, 40, 24))
    mask = (np.abs(y - 10 - x / 2) < 1.6) | (np.abs(y - 18 - x / 2) < 1.6)
    pierced = defects.hole(mask, (10, 15, 10), 2)
    removed = mask & ~pierced
    assert removed.any()
    assert (np.abs(y - 10 - x / 2)[removed] < 1.6).all()
    assert betti(pierced)[1] == 1


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_any_type_of_mask_gives_a_bool_one(sheets: Mask, dtype: type) -> None:
    assert defects.speck(sheets.astype(dtype), (1, 1, 1)).dtype == bool


@pytest.fixture(scope="module")
def scroll() -> Mask:
    return scroll_phantom(1, (64, 64, 64), "easy").sheets > 0


@pytest.mark.parametrize("kind", defects.KINDS)
def test_scattered_defects_are_of_their_kind(scroll: Mask, kind: str) -> None:
    before, after = betti(scroll), betti(defects.scatter(scroll, 3, {kind: 2}))
    change = tuple(b - a for a, b in zip(before, after, strict=True))
    if kind == "hole":
        assert change[1] >= 1
    elif kind in ("slit", "staircase", "speck"):
        assert change[0] >= 1
    elif kind == "bridge":
        assert change[0] < 0 or change[1] > 0
    else:
        assert change[2] == 2


def test_same_seed_scatters_the_same_defects(scroll: Mask) -> None:
    counts = {"hole": 2, "speck": 3, "slit": 1}
    first = defects.scatter(scroll, 1, counts)
    np.testing.assert_array_equal(first, defects.scatter(scroll, 1, dict(reversed(counts.items()))))
    assert (first != defects.scatter(scroll, 2, counts)).any()
    np.testing.assert_array_equal(defects.scatter(scroll, 1, {}), scroll)


@pytest.mark.parametrize(
    ("inject", "message"),
    [
        (lambda m: defects.hole(m, (10, 30, 10)), r"\(10, 30, 10\) is not in a sheet"),
        (lambda m: defects.slit(m, (10, 99, 10)), r"not in a mask of shape \(64, 64, 64\)"),
        (lambda m: defects.bridge(m, (10, 60, 10)), "no gap between two sheets along axis 1"),
        (lambda m: defects.bridge(m, (10, 21, 10)), "no gap between two sheets"),
        (lambda m: defects.cavity(m, (0, 21, 10)), "no room for its wall"),
        (lambda m: defects.staircase(m, (10, 21, 10), axis=1), "axis 1 goes through the sheet"),
        (lambda m: defects.scatter(m, 0, {"scratch": 1}), r"\['scratch'\]; expected hole, slit"),
        (lambda m: defects.scatter(m & False, 0, {"hole": 1}), "no place for a hole"),
    ],
    ids=["hole", "outside", "rim", "filled", "wall", "axis", "kind", "empty"],
)
def test_defects_without_a_place_are_refused(
    inject: Callable[[Mask], Mask], message: str, sheets: Mask
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        inject(sheets)
