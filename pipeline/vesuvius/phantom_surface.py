"""Traced papyrus sheets as coordinates of the voxels around them.

A traced sheet is a grid of points: in the tifxyz layout a folder with `x.tif`, `y.tif` and `z.tif`,
where -1 in all three marks a point that is not known.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.data.images import read_image
from pipeline.errors import ConfigurationError, InputError
from pipeline.vesuvius.phantom_sheets import Chart

__all__ = ["read_surface", "surface_box", "surface_chart"]

_MARGIN_VX = 24  # of sheet around the box, on which sheets that enter it from the side lie
_CELL_VX = 2  # of the grid on which a first nearby point is looked up
_SLIDES = 4  # from there to the foot of the perpendicular
_STEP_VX = 0.8  # between the points that stand for the sheet
_BESIDE_VX = 1.5  # how far beside the points the sheet still is


def read_surface(surface: Path | str | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the points of a traced sheet, `(3, rows, columns)` as z, y, x, NaN where unknown.

    Args:
        surface: a tifxyz folder, or such an array.

    Raises:
        InputError: a file is missing or no image, or the grid has another shape.
    """
    if isinstance(surface, (str, Path)):
        folder = Path(surface)
        grids = [read_image(folder / f"{axis}.tif").astype(np.float64) for axis in "zyx"]
        if len({grid.shape for grid in grids}) > 1:
            found = ", ".join(f"{a}.tif {g.shape}" for a, g in zip("zyx", grids, strict=True))
            raise InputError(f"{folder}: grids of different shapes: {found}; copy it again")
        points = np.stack(grids)
        points[:, (points == -1).all(axis=0)] = np.nan
        name = str(folder)
    else:
        points, name = np.array(surface, np.float64), "surface"
    if points.ndim != 3 or len(points) != 3 or min(points.shape) < 2:
        raise InputError(
            f"{name}: points of shape {points.shape}; expected (3, rows, columns), 2 or more each"
        )
    points[:, ~np.isfinite(points).all(axis=0)] = np.nan
    return points


def surface_box(
    rng: np.random.Generator, points: NDArray[np.float64], size_vx: tuple[int, ...]
) -> tuple[float, float, float]:
    """Return the origin of a box around a point of the sheet that has sheet on all sides.

    Raises:
        InputError: no four neighbouring points are known.
    """
    known = _known_cells(points)
    inner = known & np.roll(known, 1, 0) & np.roll(known, 1, 1) & np.roll(known, -1, 0)
    cells = np.argwhere(inner if inner.any() else known)
    if not len(cells):
        raise InputError("surface: no four neighbouring points are valid; give another sheet")
    row, column = cells[int(rng.integers(len(cells)))]
    middle = points[:, row : row + 2, column : column + 2].mean(axis=(1, 2))
    z, y, x = (float(np.rint(m - side / 2)) for m, side in zip(middle, size_vx, strict=True))
    return z, y, x


def surface_chart(
    points: NDArray[np.float64],
    origin_zyx: tuple[float, float, float],
    size_vx: tuple[int, int, int],
) -> Chart:
    """Return for each voxel its height above the nearest place of the sheet and that place.

    Args:
        points: `(3, rows, columns)`, as `read_surface` gives them.
        origin_zyx: where voxel (0, 0, 0) lies.
        size_vx: of the box.

    Raises:
        ConfigurationError: no part of the sheet lies in the box.
    """
    local = _around(points - np.array(origin_zyx)[:, None, None], size_vx)
    if not local.size:
        raise _outside(points, origin_zyx, size_vx)
    sheet, steps = _densified(local)
    down, right, normal = _directions(sheet)
    # A point beside an unknown one has no direction; it is as good as unknown.
    places = np.where(np.isfinite(normal), sheet.reshape(3, -1).T, np.nan)
    if not ((places >= 0) & (places <= np.array(size_vx) - 1)).all(axis=1).any():
        raise _outside(points, origin_zyx, size_vx)
    voxels = np.indices(size_vx).reshape(3, -1).T.astype(np.float64)
    nearest = _projected(
        voxels, _nearby(places, size_vx), places, (down, right), sheet.shape[2], steps
    )
    offset = voxels - places[nearest]
    height, onward, sideward = (
        np.einsum("ij,ij->i", offset, vectors[nearest]) for vectors in (normal, right, down)
    )
    beside = np.sqrt(onward**2 + sideward**2)
    row, column = np.divmod(nearest, sheet.shape[2])
    return Chart(
        height=height.astype(np.float32).reshape(size_vx),
        along=(column * steps[1] + onward).astype(np.float32).reshape(size_vx),
        across=(row * steps[0] + sideward).astype(np.float32).reshape(size_vx),
        # Beside the rim of the sheet there is none; at a bend the normals spread a little.
        valid=(beside <= _BESIDE_VX + 0.15 * np.abs(height)).reshape(size_vx),
        shape_px=(ceil(sheet.shape[2] * steps[1]) + 2, ceil(sheet.shape[1] * steps[0]) + 2),
    )


def _known_cells(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return where a grid point and its right, lower and lower right neighbour are known."""
    known: NDArray[np.bool_] = np.asarray(np.isfinite(points).all(axis=0))
    cells = np.zeros_like(known)
    cells[:-1, :-1] = known[:-1, :-1] & known[1:, :-1] & known[:-1, 1:] & known[1:, 1:]
    return cells


def _around(local: NDArray[np.float64], size_vx: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the part of the grid whose cells come near the box; others in it become NaN."""
    corners = [local[:, :-1, :-1], local[:, 1:, :-1], local[:, :-1, 1:], local[:, 1:, 1:]]
    low, high = np.minimum.reduce(corners), np.maximum.reduce(corners)
    sides = np.array(size_vx)[:, None, None]
    near = ((low <= sides + _MARGIN_VX) & (high >= -_MARGIN_VX)).all(axis=0)  # NaN is not near
    if not near.any():
        return local[:, :0, :0]
    corner = np.zeros(local.shape[1:], np.bool_)
    for rows in (slice(None, -1), slice(1, None)):
        for columns in (slice(None, -1), slice(1, None)):
            corner[rows, columns] |= near
    window = tuple(slice(int(found.min()), int(found.max()) + 1) for found in np.nonzero(corner))
    return np.asarray(np.where(corner, local, np.nan)[:, window[0], window[1]])


def _densified(local: NDArray[np.float64]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Return points less than a voxel apart and their mean distance down and to the right."""
    steps = []
    for axis in (1, 2):
        length = np.sqrt((np.diff(local, axis=axis) ** 2).sum(axis=0))
        parts = max(1, ceil(float(np.nanmax(length)) / _STEP_VX))
        at = np.arange((local.shape[axis] - 1) * parts + 1) / parts
        first = np.minimum(at.astype(np.intp), local.shape[axis] - 2)
        share = (at - first).reshape((-1, 1) if axis == 1 else (1, -1))
        local = _smooth(local, axis, first, share)
        steps.append(float(np.nanmean(length)) / parts)
    return local, (steps[0], steps[1])


def _smooth(
    points: NDArray[np.float64], axis: int, first: NDArray[np.intp], share: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Interpolate by Catmull-Rom, which passes through the points without a kink.

    Where the next point but one is unknown, the line goes straight on.
    """
    last = points.shape[axis] - 1
    before, start, end, after = (
        np.take(points, np.clip(first + step, 0, last), axis) for step in (-1, 0, 1, 2)
    )
    inner = np.expand_dims(first > 0, 1 if axis == 1 else 0)
    before = np.where(inner & np.isfinite(before), before, 2 * start - end)
    inner = np.expand_dims(first < last - 1, 1 if axis == 1 else 0)
    after = np.where(inner & np.isfinite(after), after, 2 * end - start)
    bend = 2 * before - 5 * start + 4 * end - after + share * (3 * (start - end) + after - before)
    return np.asarray(start + 0.5 * share * (end - before + share * bend))


def _directions(sheet: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Return unit vectors down and to the right on the sheet and its normal, each `(N, 3)`."""
    down, right = (np.gradient(sheet, axis=axis).reshape(3, -1).T for axis in (1, 2))
    normal = np.cross(down, right)
    # Down at a right angle to right, so that heights and places do not mix on slanted grids.
    down = np.cross(right, normal)
    with np.errstate(invalid="ignore"):  # two points in one place have no direction
        unit = [v / np.sqrt((v**2).sum(axis=1, keepdims=True)) for v in (down, right, normal)]
    return tuple(unit)


def _nearby(places: NDArray[np.float64], size_vx: tuple[int, ...]) -> NDArray[np.intp]:
    """Return for each voxel the number of a point of the sheet that is about the nearest one."""
    cells = tuple((side + 2 * _MARGIN_VX) // _CELL_VX + 1 for side in size_vx)
    with np.errstate(invalid="ignore"):  # unknown points lie nowhere
        cell = np.floor((places + _MARGIN_VX) / _CELL_VX)
        inside = np.flatnonzero(((cell >= 0) & (cell < cells)).all(axis=1))
    number = np.full(cells, -1, np.intp)
    number[tuple(cell[inside].T.astype(np.intp))] = inside
    found = ndimage.distance_transform_edt(number < 0, return_distances=False, return_indices=True)
    number = number[tuple(found)]
    where = np.ix_(*((np.arange(side) + _MARGIN_VX) // _CELL_VX for side in size_vx))
    return np.asarray(number[where].reshape(-1))


def _projected(
    voxels: NDArray[np.float64],
    nearest: NDArray[np.intp],
    places: NDArray[np.float64],
    directions: tuple[NDArray[np.float64], NDArray[np.float64]],
    columns: int,
    steps: tuple[float, float],
) -> NDArray[np.intp]:
    """Return the number of the point at the foot of each voxel, sliding along the sheet to it."""
    (down, right), rows = directions, len(places) // columns
    known: NDArray[np.bool_] = np.asarray(np.isfinite(places).all(axis=1))
    for _ in range(_SLIDES):
        offset = voxels - places[nearest]
        row, column = np.divmod(nearest, columns)
        row = row + np.rint(np.einsum("ij,ij->i", offset, down[nearest]) / steps[0])
        column = column + np.rint(np.einsum("ij,ij->i", offset, right[nearest]) / steps[1])
        row = np.clip(row, 0, rows - 1).astype(np.intp)
        column = np.clip(column, 0, columns - 1).astype(np.intp)
        moved = row * columns + column
        nearest = np.where(known[moved], moved, nearest)
    return nearest


def _outside(
    points: NDArray[np.float64], origin_zyx: tuple[float, ...], size_vx: tuple[int, ...]
) -> ConfigurationError:
    low, high = (find(points, axis=(1, 2)) for find in (np.nanmin, np.nanmax))
    origin, low, high = (tuple(int(n) for n in np.rint(place)) for place in (origin_zyx, low, high))
    return ConfigurationError(
        f"origin_zyx {origin}: no part of the surface lies in a box of {size_vx}; "
        f"it reaches from {low} to {high} (z, y, x); choose a place on it"
    )
