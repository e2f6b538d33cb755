from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.vesuvius.sheet_meshes import sheet_mesh, write_ply


def read_ply(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int32], str]:
    """Read a binary PLY of triangles by its header, and by nothing that wrote it."""
    head, body = path.read_bytes().split(b"end_header\n", 1)
    header = head.decode("ascii")
    assert header.startswith("ply\nformat binary_little_endian 1.0\n")
    vertices, faces = (int(n) for n in re.findall(r"^element \w+ (\d+)$", header, re.M))
    found = np.frombuffer(body, "<f4", 3 * vertices).reshape(vertices, 3)
    rows = np.frombuffer(body[12 * vertices :], np.uint8).reshape(faces, 13)
    assert (rows[:, 0] == 3).all()
    return found, rows[:, 1:].copy().view("<i4"), header


def enclosed_volume(vertices: NDArray[np.float32], faces: NDArray[np.int32]) -> float:
    """Return the volume by the divergence theorem: positive where faces look outwards."""
    a, b, c = (vertices[faces[:, corner]].astype(float) for corner in range(3))
    return float((a * np.cross(b, c)).sum() / 6)


def is_closed(faces: NDArray[np.int32]) -> bool:
    """Return whether every directed edge has its opposite."""
    edges = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    there, back = (np.sort(e[:, 0] * (faces.max() + 1) + e[:, 1]) for e in (edges, edges[:, ::-1]))
    return bool((there == back).all())


@given(seed=st.integers(0, 1000))
def test_a_mesh_is_closed_and_looks_outwards(seed: int) -> None:
    mask = np.random.default_rng(seed).random((5, 6, 7)) < 0.6
    mesh = sheet_mesh(mask)
    assert is_closed(mesh.faces)
    assert 0 < enclosed_volume(*mesh) <= mask.sum()


def test_a_mesh_encloses_the_middle_of_each_voxel_of_the_sheet() -> None:
    sheet = np.zeros((20, 24, 28), np.bool_)
    sheet[2:18, 10:13, 3:25] = True
    mesh = sheet_mesh(sheet, (100, 200, 300), (4.0, 2.0, 1.0))
    low, high = np.array([303, 2 * 210, 4 * 102]), np.array([324, 2 * 212, 4 * 117])
    half = np.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(mesh.vertices.min(axis=0), low - half)
    np.testing.assert_allclose(mesh.vertices.max(axis=0), high + half)
    assert enclosed_volume(*mesh) == pytest.approx(sheet.sum() * 8, rel=0.05)


def test_a_file_holds_the_mesh_and_its_unit(tmp_path: Path) -> None:
    mesh = sheet_mesh(np.ones((3, 4, 5), np.bool_))
    path = write_ply(tmp_path / "sheet.ply", mesh, ["x y z in voxels"])
    vertices, faces, header = read_ply(path)
    np.testing.assert_array_equal(vertices, mesh.vertices)
    np.testing.assert_array_equal(faces, mesh.faces)
    assert "comment x y z in voxels\n" in header
