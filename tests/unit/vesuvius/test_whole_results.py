from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from pipeline.data.volumes import open_volume
from pipeline.vesuvius.geometry import VoxelSize
from pipeline.vesuvius.whole_results import write_ome_zarr


def test_an_ome_zarr_keeps_voxels_size_and_unit(tmp_path: Path) -> None:
    mask = (np.random.default_rng(0).random((300, 20, 33)) < 0.1).astype(np.uint8)
    size = VoxelSize((7.9, 4.0, 2.0), "micrometer")
    path = write_ome_zarr(tmp_path / "s_surface.zarr", mask, size, "max", {"lamina": {"a": 1}})
    with open_volume(path) as volume:
        np.testing.assert_array_equal(volume[:, :, :], mask)
        assert (volume.spacing, volume.unit) == (size.spacing, size.unit)
    with open_volume(path, "1") as coarse:
        assert coarse.shape == (150, 10, 17)
        assert set(np.unique(coarse[:, :, :])) == {0, 1}
    attributes = dict(zarr.open_group(path, mode="r").attrs)
    assert attributes["lamina"] == {"a": 1}
    assert attributes["ome"]["multiscales"][0]["name"] == "s_surface"


def test_without_a_spacing_no_unit_is_claimed(tmp_path: Path) -> None:
    path = write_ome_zarr(tmp_path / "s.zarr", np.ones((4, 4, 4), np.uint8), VoxelSize(), "max", {})
    with open_volume(path) as volume:
        assert volume.unit is None
