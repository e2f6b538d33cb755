from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from pipeline.data.ome_zarr import create_ome_zarr
from pipeline.data.volumes import open_volume
from pipeline.data.writers import write_tiff
from pipeline.vesuvius.geometry import VoxelSize, voxel_size

NAN = float("nan")


@pytest.mark.parametrize(
    ("unit", "factor"), [("nanometer", 1e-3), ("micrometer", 1.0), ("millimeter", 1e3)]
)
def test_the_unit_of_the_file_makes_micrometres(tmp_path: Path, unit: str, factor: float) -> None:
    path = tmp_path / "v.zarr"
    create_ome_zarr(path, (4, 4, 4), "uint8", (4, 4, 4), spacing=(3, 2, 1), unit=unit)
    size = voxel_size(path, (3, 2, 1))
    assert size == VoxelSize((3, 2, 1), unit)
    assert size.um == pytest.approx((3 * factor, 2 * factor, factor))


def test_a_spacing_without_a_unit_is_no_length(tmp_path: Path) -> None:
    path = tmp_path / "v.zarr"
    create_ome_zarr(path, (4, 4, 4), "uint8", (4, 4, 4), spacing=None)
    assert voxel_size(path, (1, 1, 1)).um is None


@pytest.mark.parametrize("spacing", [(NAN, NAN, NAN), (), (1, 0, 1), (1, float("inf"), 1)])
def test_an_unknown_spacing_is_none(spacing: tuple[float, ...]) -> None:
    assert voxel_size("nowhere.tif", spacing) == VoxelSize()
    assert voxel_size("nowhere.tif", spacing).tiff_tags() == {}


def test_a_tiff_keeps_the_voxel_size(tmp_path: Path) -> None:
    size = VoxelSize((7.91, 2.0, 4.0), "micrometer")
    path = write_tiff(tmp_path / "v.tif", np.zeros((3, 4, 5), np.uint8), **size.tiff_tags())
    with tifffile.TiffFile(path) as file:
        across, down = (file.pages[0].tags[f"{axis}Resolution"].value for axis in "XY")
        assert across[0] / across[1] == pytest.approx(2500)  # pixels of 4 um in a centimetre
        assert down[0] / down[1] == pytest.approx(5000)
        assert file.shaped_metadata[0]["spacing_zyx"] == [7.91, 2.0, 4.0]
        assert file.series[0].axes == "ZYX"


@pytest.mark.parametrize("side", [1e-7, 4e-3, 7.9, 1e11])
def test_a_voxel_of_any_size_is_written_and_read_back(tmp_path: Path, side: float) -> None:
    size = VoxelSize((side, side, side), "micrometer")
    path = write_tiff(tmp_path / "v.tif", np.ones((2, 3, 4), np.uint8), **size.tiff_tags())
    with open_volume(path) as volume:
        assert (volume.spacing, volume.unit) == (size.spacing, size.unit)
