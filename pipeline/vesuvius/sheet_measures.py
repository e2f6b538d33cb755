"""Sheets of a mask counted and measured: voxels, faces, area."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.measure import marching_cubes, mesh_surface_area

from pipeline.hardware.compilation import compiled
from pipeline.vesuvius.components import component_sizes
from pipeline.vesuvius.separation import label_sheets

__all__ = ["largest_sheets", "sheet_areas", "sheet_facts"]

_MEASURED = 50  # sheets that stand in a sidecar one by one
_UM2_PER_MM2 = 1e6


def sheet_facts(
    mask: NDArray[np.uint8], spacing_um: Sequence[float] | None = None
) -> tuple[NDArray[np.int32], dict[str, Any]]:
    """Number the sheets of a mask and measure them.

    Args:
        mask: `(D, H, W)`.
        spacing_um: distance between voxels along `(D, H, W)`; None where it is unknown.

    Returns:
        A number per 26-connected sheet from 1 on, and `foreground`, `background`, `sheets`,
        `largest_sheet_voxels`; of each of the largest 50 sheets `sheet_faces`, the voxel faces that
        it shows to the background, both sides together; and `sheet_area_mm2` and their sum over
        all sheets `area_mm2` as `sheet_areas` gives them, where the spacing is known.
    """
    sheets, count = label_sheets(np.asarray(mask, np.bool_))
    sizes = component_sizes(sheets, count)
    largest = largest_sheets(sizes, _MEASURED)
    faces = _face_counts(sheets, count)
    facts: dict[str, Any] = {
        "foreground": int(sizes[1:].sum()),
        "background": int(sheets.size - sizes[1:].sum()),
        "sheets": int(count),
        "largest_sheet_voxels": int(sizes[1:].max(initial=0)),
        "sheet_faces": {number: int(faces[number]) for number in largest},
    }
    if spacing_um is not None:
        areas = sheet_areas(sheets, count, spacing_um) / _UM2_PER_MM2
        facts["area_mm2"] = round(float(areas.sum()), 6)
        facts["sheet_area_mm2"] = {number: round(float(areas[number]), 6) for number in largest}
    return sheets, facts


def largest_sheets(sizes: NDArray[Any], most: int) -> list[int]:
    """Return the numbers of the `most` largest sheets, the largest one first.

    Args:
        sizes: voxels by number; what stands at 0 is no sheet.
        most: how many.
    """
    order = np.argsort(-sizes[1:], kind="stable")[:most]
    return [int(number) + 1 for number in order if sizes[number + 1]]


def sheet_areas(
    sheets: NDArray[np.int32], count: int, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> NDArray[np.float64]:
    """Return the area of each sheet: half of the surface around it, which has two sides.

    The surface is that of marching cubes. On a slope its facets make it up to a tenth too large;
    counted faces would make it up to 1.7 times as large. Where a sheet leaves the volume it is cut
    open and goes on to the face; its rims inside count too.

    Args:
        sheets: numbers `(D, H, W)` of 26-connected components, 0 outside.
        count: the largest number.
        spacing: distance between voxels along `(D, H, W)`.

    Returns:
        `(count + 1,)`, in squares of the spacing's unit; 0 for number 0.
    """
    table = _areas_of_blocks((float(spacing[0]), float(spacing[1]), float(spacing[2])))
    return _summed_areas(np.ascontiguousarray(sheets), table, count) / 2


@cache
def _areas_of_blocks(spacing: tuple[float, float, float]) -> NDArray[np.float64]:
    """Return the surface in a block of 2x2x2 voxels by its code, a bit per voxel of foreground."""
    table = np.zeros(256)
    for code in range(1, 255):
        corners = np.array([code >> bit & 1 for bit in range(7, -1, -1)], np.float32)
        vertices, faces, _, _ = marching_cubes(corners.reshape(2, 2, 2), 0.5, spacing=spacing)
        table[code] = mesh_surface_area(vertices, faces)
    return table


def _face_counts(sheets: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    faces = np.zeros(count + 1, np.int64)
    for axis in range(3):
        ahead = np.moveaxis(sheets, axis, 0)
        differs = ahead[1:] != ahead[:-1]
        for side in (ahead[1:], ahead[:-1]):
            faces += np.bincount(side[differs], minlength=count + 1)
    return faces


@compiled
def _summed_areas(
    sheets: NDArray[np.int32], table: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    """Add up the blocks of each sheet; those that reach over a face of the volume count half.

    A block holds voxels of one sheet at most, since two of them would be connected in it.
    """
    depth, height, width = sheets.shape
    areas = np.zeros(count + 1)
    for z in range(depth + 1):
        for y in range(height + 1):
            share = (0.5 if z in (0, depth) else 1.0) * (0.5 if y in (0, height) else 1.0)
            for x in range(width + 1):
                code, number = 0, 0
                for bit in range(8):  # beyond the volume, what is at its face goes on
                    found = sheets[
                        min(max(z - 1 + (bit >> 2), 0), depth - 1),
                        min(max(y - 1 + (bit >> 1 & 1), 0), height - 1),
                        min(max(x - 1 + (bit & 1), 0), width - 1),
                    ]
                    code = code << 1 | (found != 0)
                    number = max(number, found)
                areas[number] += share * table[code] * (0.5 if x in (0, width) else 1.0)
    return areas
