"""A sheet as a map over the plane that shows most of it: height, thickness, layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.writers import write_tiff

__all__ = ["SheetMap", "sheet_map", "write_sheet_map"]


class SheetMap(NamedTuple):
    """A sheet seen along one axis.

    Args:
        axis: 0, 1 or 2, along which the sheet is seen; the rows and columns of the images are the
            other two axes, in their order.
        height: `(rows, columns)`, where along the axis the middle of the sheet is, in voxels of the
            volume; NaN where there is no sheet.
        thickness: `(rows, columns)`, in voxels along the axis; 0 where there is no sheet.
        layers: `(rows, columns)`, how often the line of sight meets the sheet. Where a folded sheet
            is met several times, height and thickness are those of the layer met first.
        corner: row and column of the volume at which the images begin.
    """

    axis: int
    height: NDArray[np.float32]
    thickness: NDArray[np.float32]
    layers: NDArray[np.float32]
    corner: tuple[int, int]


def sheet_map(sheet: NDArray[np.bool_], origin: Sequence[int] = (0, 0, 0)) -> SheetMap:
    """Return the map of one sheet, seen along the axis that shows most of it.

    Args:
        sheet: `(D, H, W)`, a part of a volume.
        origin: the voxel of the volume at which that part begins.
    """
    axis = int(np.argmax([np.count_nonzero(sheet.any(axis)) for axis in range(3)]))
    view = np.moveaxis(sheet, axis, 0)
    met = np.logical_or.accumulate(view, axis=0)
    left = np.logical_or.accumulate(met & ~view, axis=0)
    layer = view & ~left
    thickness = layer.sum(axis=0, dtype=np.float32)
    first = view.argmax(axis=0)
    height = np.where(thickness > 0, origin[axis] + first + (thickness - 1) / 2, np.nan)
    begins = view.copy()
    begins[1:] &= ~view[:-1]
    rows, columns = (origin[other] for other in range(3) if other != axis)
    layers = begins.sum(axis=0, dtype=np.float32)
    return SheetMap(axis, height.astype(np.float32), thickness, layers, (int(rows), int(columns)))


def write_sheet_map(path: Path | str, found: SheetMap, spacing: Sequence[float] | None) -> Path:
    """Write height, thickness and layers as the three pages of a float32 TIFF.

    The JSON of its description says the axis, the corner and the spacing along `(D, H, W)`.

    Args:
        path: the file.
        found: the map.
        spacing: None where it is unknown.
    """
    facts: dict[str, Any] = {
        "axes": "CYX",
        "pages": ["height", "thickness", "layers"],
        "projection_axis": "zyx"[found.axis],
        "corner": list(found.corner),
        "spacing_zyx": None if spacing is None else list(spacing),
    }
    pages = np.stack([found.height, found.thickness, found.layers])
    return write_tiff(path, pages, metadata=facts)
