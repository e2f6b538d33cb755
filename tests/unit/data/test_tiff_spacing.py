from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from pipeline.data import tiff_spacing as tiff_spacing_module
from pipeline.data.ome_tiff import OME_UNITS, write_ome_tiff
from pipeline.data.volumes import open_volume
from pipeline.data.writers import write_tiff

VOLUME = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
SPACING = (5.5, 2.25, 1.125)


def found(path: Path) -> tuple[Any, Any]:
    with open_volume(path) as volume:
        return volume.spacing, volume.unit


@pytest.mark.parametrize("unit", OME_UNITS)
def test_what_is_written_as_ome_comes_back(tmp_path: Path, unit: str) -> None:
    path = write_ome_tiff(tmp_path / "v.ome.tif", VOLUME, spacing=SPACING, unit=unit)
    assert found(path) == (SPACING, unit)


def test_a_length_of_no_unit_comes_back_without_one(tmp_path: Path) -> None:
    path = write_ome_tiff(tmp_path / "v.ome.tif", VOLUME, spacing=SPACING, unit=None)
    assert found(path) == (SPACING, None)


@pytest.mark.parametrize("compression", [None, "lzw"])
def test_what_a_surface_is_written_with_comes_back(tmp_path: Path, compression: str | None) -> None:
    said = {"spacing_zyx": list(SPACING), "unit": "micrometer"}
    path = write_tiff(tmp_path / "v.tif", VOLUME, compression=compression, metadata=said)
    assert found(path) == (SPACING, "micrometer")


@pytest.mark.parametrize("unit", ["um", "micron", "\\u00B5m"])
def test_imagej_says_the_depth_and_its_resolution_the_rest(tmp_path: Path, unit: str) -> None:
    path = tmp_path / "v.tif"
    said = {"spacing": 5.5, "unit": unit, "axes": "ZYX"}
    tifffile.imwrite(path, VOLUME, imagej=True, resolution=(1 / 1.125, 1 / 2.25), metadata=said)
    spacing, found_unit = found(path)
    assert spacing == pytest.approx(SPACING)
    assert found_unit == "micrometer"


@pytest.mark.parametrize(
    "said",
    [
        {"resolution": (72, 72), "resolutionunit": "INCH"},
        {"metadata": {"axes": "ZYX", "spacing_zyx": [1, 0, 2], "unit": "micrometer"}},
        {"metadata": {"axes": "ZYX", "spacing_zyx": [1, 2], "unit": "micrometer"}},
        {"metadata": {"axes": "ZYX", "spacing_zyx": "wide", "unit": "micrometer"}},
        {"metadata": {"axes": "ZYX", "PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0}, "ome": True},
        {"imagej": True, "metadata": {"axes": "ZYX", "unit": "um"}, "resolution": (2, 2)},
    ],
)  # fmt: skip
def test_half_a_size_is_none(tmp_path: Path, said: dict[str, Any]) -> None:
    tifffile.imwrite(tmp_path / "v.tif", VOLUME, **{"photometric": "minisblack", **said})
    assert found(tmp_path / "v.tif") == (None, None)


@pytest.mark.parametrize(
    "description",
    [
        "<OME></OME>",
        "<OME>text</OME>",
        "<OME><Image/></OME>",
        "<OME><Image>x</Image></OME>",
        "<OME><Image",
        '<OME><Image><Pixels DimensionOrder="XYZCT" Type="uint8" SizeX="4" SizeY="3" SizeZ="2" '
        f'SizeC="1" SizeT="1" PhysicalSizeX="1{"0" * 400}" PhysicalSizeY="1" PhysicalSizeZ="1">'
        '<TiffData IFD="0" PlaneCount="2"/></Pixels></Image></OME>',
        "ImageJ=1.53\nimages=2\nslices=2\nspacing=2.0\nunit=um\n",
        '{"shape": [2, 3, 4], "spacing_zyx": [1, 2, 3], "unit": ["um"]}',
    ],
    ids=range(8),
)
def test_metadata_that_nobody_can_read_refuse_no_volume(tmp_path: Path, description: str) -> None:
    path = tmp_path / "v.tif"
    tifffile.imwrite(
        path, VOLUME, photometric="minisblack", description=description, metadata=None,
        resolution=(2, 2), contiguous=False,
    )  # fmt: skip
    with open_volume(path) as volume:
        np.testing.assert_array_equal(volume[:], VOLUME)
        assert volume.unit in (None, "micrometer")


@pytest.mark.parametrize("unit", ["\N{GREEK SMALL LETTER MU}m", "\N{MICRO SIGN}m", "\\u00b5m"])
def test_every_spelling_of_a_micrometre_is_known(unit: str) -> None:
    assert tiff_spacing_module._unit(unit) == "micrometer"
