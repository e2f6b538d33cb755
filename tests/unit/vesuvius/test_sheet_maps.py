from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from pipeline.vesuvius.sheet_maps import sheet_map, write_sheet_map

ROWS, COLUMNS = np.indices((20, 30))
HEIGHT = 8 + 3 * np.sin(ROWS / 6) + COLUMNS / 10


def rendered(height: NDArray[np.float64], thickness: int, depth: int = 20) -> NDArray[np.bool_]:
    """A sheet whose lowest voxel is the rounded height."""
    above = np.arange(depth)[:, None, None] - np.rint(height)
    return (above >= 0) & (above < thickness)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("thickness", [1, 2, 3])
def test_a_map_of_a_rendered_sheet_is_what_it_was_rendered_from(axis: int, thickness: int) -> None:
    sheet = np.moveaxis(rendered(HEIGHT, thickness), 0, axis)
    found = sheet_map(sheet, (100, 200, 300))
    assert found.axis == axis
    origin = (100, 200, 300)[axis]
    np.testing.assert_array_equal(found.height, origin + np.rint(HEIGHT) + (thickness - 1) / 2)
    assert set(found.thickness.ravel()) == {thickness}
    assert set(found.layers.ravel()) == {1}
    assert found.corner == tuple(np.delete([100, 200, 300], axis))


def test_a_hole_has_no_height() -> None:
    sheet = rendered(HEIGHT, 2)
    sheet[:, 5:8, 6:9] = False
    found = sheet_map(sheet)
    assert np.isnan(found.height[5:8, 6:9]).all()
    assert np.isfinite(found.height).sum() == 20 * 30 - 9
    assert (found.thickness[5:8, 6:9] == 0).all()
    assert (found.layers[5:8, 6:9] == 0).all()


def test_where_a_sheet_folds_the_layer_met_first_is_shown() -> None:
    sheet = rendered(np.full((20, 30), 4.0), 2) | rendered(np.full((20, 30), 12.0), 3)
    sheet[:6, 10:, :] = False  # in a part the second layer is all there is
    found = sheet_map(sheet)
    assert (found.height[:10] == 4.5).all()
    assert (found.height[10:] == 13.0).all()
    assert (found.layers[:10] == 2).all()
    assert (found.layers[10:] == 1).all()


def test_a_map_says_in_its_file_how_it_lies_in_the_volume(tmp_path: Path) -> None:
    found = sheet_map(np.moveaxis(rendered(HEIGHT, 2), 0, 1), (1, 2, 3))
    path = write_sheet_map(tmp_path / "sheet.tif", found, (7.9, 7.9, 7.9))
    with tifffile.TiffFile(path) as file:
        pages, facts = file.asarray(), json.loads(file.pages[0].description)
    np.testing.assert_array_equal(pages, [found.height, found.thickness, found.layers])
    assert pages.dtype == np.float32
    assert (facts["projection_axis"], facts["corner"]) == ("y", [1, 3])
    assert facts["spacing_zyx"] == [7.9, 7.9, 7.9]
