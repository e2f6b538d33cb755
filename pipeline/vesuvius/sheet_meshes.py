"""A sheet as a closed triangle mesh, in a PLY file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from skimage.measure import marching_cubes

from pipeline.data.atomic import write_bytes

__all__ = ["SheetMesh", "sheet_mesh", "write_ply"]


class SheetMesh(NamedTuple):
    """Triangles around a sheet.

    Args:
        vertices: `(V, 3)`, x, y, z, float32.
        faces: `(F, 3)`, numbers of vertices, counter-clockwise seen from outside, int32.
    """

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]


def sheet_mesh(
    sheet: NDArray[np.bool_],
    origin: Sequence[int] = (0, 0, 0),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> SheetMesh:
    """Return the surface around one sheet by marching cubes; closed also where the volume ends.

    The middle of voxel (0, 0, 0) is the origin of the coordinates.

    Args:
        sheet: `(D, H, W)`, a part of a volume with at least one voxel.
        origin: the voxel of the volume at which that part begins.
        spacing: distance between voxels along `(D, H, W)`; ones give coordinates in voxels.
    """
    padded = np.pad(sheet, 1).astype(np.float32)
    corners, faces, _, _ = marching_cubes(padded, 0.5)
    zyx = (corners.astype(np.float64) + np.asarray(origin) - 1) * np.asarray(spacing)
    # The faces look inwards in (z, y, x), and so outwards in its mirror image (x, y, z).
    return SheetMesh(zyx[:, ::-1].astype(np.float32), faces.astype(np.int32))


def write_ply(path: Path | str, mesh: SheetMesh, comments: Sequence[str] = ()) -> Path:
    """Write a mesh as binary PLY, atomically.

    Args:
        path: the file.
        mesh: the triangles.
        comments: lines of ASCII for the header, such as the unit.
    """
    header = [
        "ply",
        "format binary_little_endian 1.0",
        *(f"comment {line}" for line in comments),
        f"element vertex {len(mesh.vertices)}",
        *(f"property float {axis}" for axis in "xyz"),
        f"element face {len(mesh.faces)}",
        "property list uchar int vertex_indices",
        "end_header\n",
    ]
    triangles = np.empty(len(mesh.faces), [("count", "u1"), ("vertices", "<i4", 3)])
    triangles["count"], triangles["vertices"] = 3, mesh.faces
    content = "\n".join(header).encode("ascii")
    return write_bytes(path, content + mesh.vertices.astype("<f4").tobytes() + triangles.tobytes())
