from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.data.writers import write_tiff
from pipeline.errors import ConfigurationError, InputError
from pipeline.vesuvius.phantom import scroll_phantom
from pipeline.vesuvius.phantom_surface import read_surface, surface_chart

ORIGIN = (1000.0, 2000.0, 500.0)
SIZE = (64, 64, 64)
EASY = "easy"


def bent(step: float = 8.0) -> NDArray[np.float64]:
    """Return a sheet that bends gently around the middle of the box."""
    z = np.arange(-60, 130, step)[:, None] + ORIGIN[0]
    x = np.arange(-60, 130, 1.5 * step)[None] + ORIGIN[2]
    y = 32 + 6 * np.sin((z - ORIGIN[0]) / 25) + 0.2 * (x - ORIGIN[2]) + ORIGIN[1]
    return np.stack(np.broadcast_arrays(z, y, x))


def bent_y(z: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(32 + 6 * np.sin(z / 25) + 0.2 * x)


def write_grids(folder: Path, points: NDArray[np.float64]) -> Path:
    folder.mkdir()
    filled = np.where(np.isfinite(points), points, -1).astype(np.float32)
    for axis, grid in zip("zyx", filled, strict=True):
        write_tiff(folder / f"{axis}.tif", grid)
    return folder


def test_height_is_the_distance_from_the_surface() -> None:
    chart = surface_chart(bent(), ORIGIN, SIZE)
    z, y, x = np.indices(SIZE).astype(float)
    slope = np.sqrt(1 + (6 / 25 * np.cos(z / 25)) ** 2 + 0.2**2)
    near = np.abs(chart.height) < 3
    expected = (y - bent_y(z, x)) / slope
    sign = np.sign((chart.height * expected)[near].sum())  # which side is up is the grid's affair
    assert near.mean() > 0.05
    np.testing.assert_allclose(sign * chart.height[near], expected[near], atol=0.15)
    assert chart.valid.mean() > 0.98


def test_surface_lands_where_it_should() -> None:
    piece = scroll_phantom(0, SIZE, EASY, bent(), ORIGIN)
    assert piece.origin_zyx == ORIGIN
    distance = ndimage.distance_transform_edt(piece.sheets == 0)
    z, x = np.mgrid[:64, :64]
    y = np.rint(bent_y(z, x)).astype(int)
    assert (distance[z, y, x] <= 1.5).mean() > 0.95  # all but holes


def test_neighbours_lie_along_the_surface_and_touch_nowhere() -> None:
    piece = scroll_phantom(2, SIZE, EASY, bent(), ORIGIN)
    sizes = np.bincount(piece.sheets.ravel())[1:]
    assert (sizes > 2000).sum() >= 2
    _, count = ndimage.label(piece.sheets > 0, np.ones((3, 3, 3)))
    assert count == piece.sheets.max()
    assert 0.02 < (piece.label == 1).sum() / (piece.label != 2).sum() < 0.08


def test_moving_the_box_moves_the_surface_with_it() -> None:
    here = surface_chart(bent(), ORIGIN, SIZE)
    there = surface_chart(bent(), (ORIGIN[0], ORIGIN[1] + 8, ORIGIN[2]), SIZE)
    near = np.abs(here.height[:, 8:]) < 6
    np.testing.assert_allclose(there.height[:, :-8][near], here.height[:, 8:][near], atol=0.2)


def test_unknown_points_leave_a_gap() -> None:
    points = bent()
    points[:, 10:13, 7:10] = np.nan
    chart = surface_chart(points, ORIGIN, SIZE)
    assert chart.valid.mean() < surface_chart(bent(), ORIGIN, SIZE).valid.mean() - 0.05
    piece = scroll_phantom(0, SIZE, EASY, points, ORIGIN)
    z, x = round(points[0, 9, 0] - ORIGIN[0] + 16), round(bent()[2, 0, 8] - ORIGIN[2])
    y = round(float(bent_y(np.float64(z), np.float64(x))))
    assert not piece.sheets[z, y - 3 : y + 4, x].any()


def test_folder_of_grids_is_the_array_of_its_points(tmp_path: Path) -> None:
    points = bent()
    points[:, 3, 4] = np.nan
    folder = write_grids(tmp_path / "sheet", points)
    read = read_surface(folder)
    np.testing.assert_allclose(read, points, rtol=1e-6)
    assert np.isnan(read[:, 3, 4]).all()
    first, second = (scroll_phantom(1, (32, 32, 32), EASY, s) for s in (folder, read))
    np.testing.assert_array_equal(first.image, second.image)


def test_seed_chooses_a_place_on_the_surface() -> None:
    for seed in range(3):
        piece = scroll_phantom(seed, (40, 40, 40), EASY, bent())
        assert (piece.sheets[10:30, 10:30, 10:30] > 0).any()


def test_box_away_from_the_surface_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\(0, 0, 0\): no part of the surface .* reaches"):
        scroll_phantom(0, SIZE, EASY, bent(), (0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("surface", "message"),
    [
        (np.zeros((2, 9, 9)), r"points of shape \(2, 9, 9\); expected \(3, rows, columns\)"),
        (np.full((3, 9, 9), np.nan), "no four neighbouring points"),
    ],
    ids=["shape", "empty"],
)
def test_grid_that_is_no_surface_is_refused(surface: NDArray[np.float64], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scroll_phantom(0, SIZE, EASY, surface)


def test_folder_without_a_grid_is_refused(tmp_path: Path) -> None:
    folder = write_grids(tmp_path / "sheet", bent())
    write_tiff(folder / "x.tif", np.zeros((4, 4), np.float32))
    with pytest.raises(InputError, match=r"grids of different shapes: z.tif .* x.tif \(4, 4\)"):
        read_surface(folder)
    (folder / "x.tif").unlink()
    with pytest.raises(InputError, match=r"x.tif: not found"):
        read_surface(folder)


def test_real_traced_sheet_is_drawn(lamina_data: Path) -> None:
    folders = sorted(path.parent for path in lamina_data.glob("vesuvius/tifxyz/*/x.tif"))
    if not folders:
        pytest.skip(f"no vesuvius/tifxyz below {lamina_data}")
    piece = scroll_phantom(5, (64, 64, 64), "medium", folders[0])
    assert (piece.sheets > 0).mean() > 0.02
