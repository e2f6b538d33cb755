"""Defects of predicted sheets, put into a mask on purpose: to test metrics and repairs with.

Each takes a mask `(D, H, W)` and gives a new one. Axes are 0, 1, 2 for z, y, x; a place is an index
`(z, y, x)`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.errors import ConfigurationError

__all__ = [
    "KINDS", "bridge", "cavity", "hole", "scatter", "shift", "slit", "speck", "staircase",
    "thickening",
]  # fmt: skip

Mask = NDArray[np.bool_]
Place = tuple[int, int, int]

KINDS = ("hole", "slit", "bridge", "speck", "cavity", "staircase")
_TRIES = 400
_LONGEST_BRIDGE_VX = 40
_EVERYWHERE = np.ones((3, 3, 3), np.bool_)


def hole(mask: NDArray[np.generic], at: Place, size: int = 1, axis: int | None = None) -> Mask:
    """Pierce a sheet: remove its whole thickness in a window of `size` by `size` from `at` on.

    Args:
        mask: `(D, H, W)`.
        at: a voxel of the sheet.
        size: of the hole in voxels.
        axis: through the sheet; None takes the one along which it is thinnest at `at`.

    Raises:
        ConfigurationError: `at` is outside or not in a sheet.
    """
    result, place = _sheet(mask, at)
    axis = _thinnest(result, place) if axis is None else axis
    start, stop = _run(result, place, axis)
    window = [slice(place[i], place[i] + size) for i in range(3)]
    window[axis] = slice(max(start - size, 0), stop + size)  # a slanted sheet leaves the first run
    part = np.moveaxis(result[tuple(window)], axis, 0)
    labels, _ = ndimage.label(part, _EVERYWHERE)
    own = labels[place[axis] - window[axis].start, 0, 0]
    part[labels == own] = False
    return result


def slit(mask: NDArray[np.generic], at: Place, axis: int = 2, width: int = 1) -> Mask:
    """Cut the component at `at` in two: remove its voxels on `width` planes across `axis`.

    Raises:
        ConfigurationError: `at` is outside or not in a sheet.
    """
    result, place = _sheet(mask, at)
    labels, _ = ndimage.label(result, _EVERYWHERE)
    planes = [slice(None)] * 3
    planes[axis] = slice(place[axis], place[axis] + width)
    part = result[tuple(planes)]
    part[labels[tuple(planes)] == labels[place]] = False
    return result


def bridge(mask: NDArray[np.generic], at: Place, axis: int = 1, size: int = 1) -> Mask:
    """Join what lies on both sides of a gap: fill the background run through `at` along `axis`.

    Args:
        mask: `(D, H, W)`.
        at: a voxel between two sheets.
        axis: from one to the other.
        size: of the bridge across, in voxels.

    Raises:
        ConfigurationError: `at` is outside, in a sheet, or has no sheet on both sides.
    """
    result, place = _checked(mask, at)
    start, stop = _run(~result, place, axis) if not result[place] else (0, 0)
    if not (0 < start < stop < result.shape[axis]):
        raise ConfigurationError(
            f"no gap between two sheets along axis {axis} at {place}; choose another place"
        )
    window = [slice(place[i], place[i] + size) for i in range(3)]
    window[axis] = slice(start, stop)
    result[tuple(window)] = True
    return result


def speck(mask: NDArray[np.generic], at: Place, size: int = 1) -> Mask:
    """Add a cube of `size` voxels that begins at `at`.

    Raises:
        ConfigurationError: `at` is outside.
    """
    result, place = _checked(mask, at)
    result[tuple(slice(i, i + size) for i in place)] = True
    return result


def cavity(mask: NDArray[np.generic], at: Place, size: int = 1) -> Mask:
    """Enclose a cube of `size` empty voxels, from `at` on, in a wall of one voxel.

    In a sheet of 3 voxels or more the wall is there already; a thinner one bulges.

    Raises:
        ConfigurationError: the wall does not fit into the volume.
    """
    result, place = _checked(mask, at)
    if any(i < 1 or i + size >= side for i, side in zip(place, result.shape, strict=True)):
        raise ConfigurationError(
            f"a cavity of {size} at {place} has no room for its wall in {result.shape}; "
            "choose a place further inside"
        )
    result[tuple(slice(i - 1, i + size + 1) for i in place)] = True
    result[tuple(slice(i, i + size) for i in place)] = False
    return result


def staircase(mask: NDArray[np.generic], at: Place, axis: int = 2, rise: int | None = None) -> Mask:
    """Break a sheet into two steps that meet in edges only: 26-connected, not 6-connected.

    The component at `at` is moved by its thickness from the plane through `at` on.

    Args:
        mask: `(D, H, W)`.
        at: a voxel of the sheet.
        axis: across the plane of the break.
        rise: in voxels; None takes the thickness at `at`.

    Raises:
        ConfigurationError: `at` is outside or not in a sheet, or `axis` goes through the sheet.
    """
    result, place = _sheet(mask, at)
    through = _thinnest(result, place)
    if axis == through:
        raise ConfigurationError(
            f"axis {axis} goes through the sheet at {place}; a staircase needs one along it"
        )
    labels, _ = ndimage.label(result, _EVERYWHERE)
    half = [slice(None)] * 3
    half[axis] = slice(place[axis], None)
    moving = np.zeros_like(result)
    moving[tuple(half)] = labels[tuple(half)] == labels[place]
    start, stop = _run(result, place, through)
    by = [0, 0, 0]
    by[through] = stop - start if rise is None else rise
    moved, still = shift(moving, (by[0], by[1], by[2])), result & ~moving
    if place[axis]:
        # Where the sheet is slanted or uneven, faces would still meet.
        first, before = (np.moveaxis(part, axis, 0) for part in (moved, still))
        first[place[axis]] &= ~before[place[axis] - 1]
    return np.asarray(still | moved)


def thickening(mask: NDArray[np.generic], by: int = 1, axis: int | None = None) -> Mask:
    """Make every sheet thicker by `by` voxels on both sides, along one axis or along all three."""
    structure = ndimage.generate_binary_structure(3, 1)
    if axis is not None:
        structure[...] = False
        line: list[slice | int] = [1, 1, 1]
        line[axis] = slice(None)
        structure[tuple(line)] = True
    return np.asarray(ndimage.binary_dilation(_copy(mask), structure, iterations=by))


def shift(mask: NDArray[np.generic], by: tuple[int, int, int]) -> Mask:
    """Move everything by so many voxels; what leaves the volume is lost, what enters is empty."""
    source = _copy(mask)
    result = np.zeros_like(source)
    to, of = (
        tuple(
            slice(max(sign * n, 0), max(side + min(sign * n, 0), 0))
            for n, side in zip(by, source.shape, strict=True)
        )
        for sign in (1, -1)
    )
    result[to] = source[of]
    return result


def scatter(mask: NDArray[np.generic], seed: int, counts: Mapping[str, int]) -> Mask:
    """Put so many defects of each kind into a mask, at places that the seed chooses.

    Args:
        mask: `(D, H, W)`.
        seed: not negative; the same one gives the same defects.
        counts: by kind: `hole`, `slit`, `bridge`, `speck`, `cavity`, `staircase`.

    Raises:
        ConfigurationError: an unknown kind, or no place for a defect was found.
    """
    if unknown := sorted(set(counts) - set(KINDS)):
        raise ConfigurationError(f"unknown defects {unknown}; expected {', '.join(KINDS)}")
    rng = np.random.Generator(np.random.PCG64(seed))
    result = _copy(mask)
    for kind in KINDS:  # in this order, whatever that of `counts`
        for _ in range(counts.get(kind, 0)):
            result = _somewhere(result, rng, kind)
    return result


def _somewhere(mask: Mask, rng: np.random.Generator, kind: str) -> Mask:
    on_sheet = kind in ("hole", "slit", "cavity", "staircase")
    candidates = np.flatnonzero(mask.reshape(-1) == on_sheet)
    for _ in range(_TRIES if len(candidates) else 0):
        flat = int(candidates[int(rng.integers(len(candidates)))])
        z, y, x = (int(i) for i in np.unravel_index(flat, mask.shape))
        changed = _tried(mask, rng, kind, (z, y, x))
        if changed is not None:
            return changed
    raise ConfigurationError(f"found no place for a {kind} in the mask; ask for fewer")


def _tried(mask: Mask, rng: np.random.Generator, kind: str, at: Place) -> Mask | None:
    """Return the mask with the defect at a place, None where it would be another defect."""
    sides = mask.shape
    if min(at) < 2 or any(i >= side - 3 for i, side in zip(at, sides, strict=True)):
        return None
    if kind == "hole":
        return hole(mask, at, int(rng.integers(1, 3)))
    if kind == "cavity":
        return cavity(mask, at)
    if kind == "speck":
        size = int(rng.integers(1, 3))
        near = mask[tuple(slice(max(i - 1, 0), i + size + 1) for i in at)]
        return None if near.any() else speck(mask, at, size)
    axis = int(rng.integers(3))
    if kind == "bridge":
        start, stop = _run(~mask, at, axis)
        joins = start > 0 and stop < sides[axis] and stop - start <= _LONGEST_BRIDGE_VX
        return bridge(mask, at, axis) if joins else None
    if axis == _thinnest(mask, at):
        return None
    if kind == "slit":
        return slit(mask, at, axis)
    moved = staircase(mask, at, axis)
    # Moved onto another sheet it would be a bridge as well.
    return moved if _pieces(moved) >= _pieces(mask) else None


def _pieces(mask: Mask) -> int:
    return int(ndimage.label(mask, _EVERYWHERE)[1])


def _copy(mask: NDArray[np.generic]) -> Mask:
    return np.array(mask, dtype=np.bool_)


def _checked(mask: NDArray[np.generic], at: Place) -> tuple[Mask, Place]:
    copy = _copy(mask)
    inside = len(at) == copy.ndim == 3 and all(
        0 <= i < side for i, side in zip(at, copy.shape, strict=True)
    )
    if not inside:
        raise ConfigurationError(
            f"place {tuple(at)} is not in a mask of shape {copy.shape}; expected (z, y, x) inside"
        )
    return copy, (int(at[0]), int(at[1]), int(at[2]))


def _sheet(mask: NDArray[np.generic], at: Place) -> tuple[Mask, Place]:
    copy, place = _checked(mask, at)
    if not copy[place]:
        raise ConfigurationError(f"place {place} is not in a sheet; choose a voxel that is set")
    return copy, place


def _run(mask: Mask, at: Place, axis: int) -> tuple[int, int]:
    """Return where the run of set voxels through `at` begins and ends along an axis."""
    line: list[slice | int] = list(at)
    line[axis] = slice(None)
    unset = np.flatnonzero(~mask[tuple(line)])
    place = int(np.searchsorted(unset, at[axis]))
    start = int(unset[place - 1]) + 1 if place else 0
    stop = int(unset[place]) if place < len(unset) else mask.shape[axis]
    return start, stop


def _thinnest(mask: Mask, at: Place) -> int:
    """Return the axis along which the sheet is thinnest at a place."""
    runs = [_run(mask, at, axis) for axis in range(3)]
    return int(np.argmin([stop - start for start, stop in runs]))
