"""OME-TIFF written by tifffile, read back by Pillow, by ITK and by the types of the OME schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import writers
from pipeline.data.ome_tiff import OME_UNITS, write_ome_tiff
from pipeline.data.volumes import open_volume

SHAPES = st.permutations([3, 5, 8]) | st.permutations([1, 2, 13])
SIDES = st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3, unique=True)
OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"
DESCRIPTION = 270


@pytest.fixture(scope="module")
def schema_types() -> Any:
    return pytest.importorskip("ome_types", reason="ome-types holds OME-XML to the OME schema")


def noise(shape: Any) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 2, tuple(shape), dtype=np.uint8)


def pillow(path: Path) -> tuple[NDArray[Any], str]:
    """Return the pages, and the XML, which Pillow takes for Latin-1."""
    with Image.open(path) as image:
        pages = []
        for page in range(image.n_frames):
            image.seek(page)
            pages.append(np.array(image))
        image.seek(0)
        return np.stack(pages), image.tag_v2[DESCRIPTION].encode("latin-1").decode("utf-8")


@settings(max_examples=15)
@given(shape=SHAPES, spacing=SIDES, unit=st.sampled_from(sorted(OME_UNITS)))
def test_voxels_axes_sizes_and_unit_come_back(
    scratch: Path, shape: list[int], spacing: list[float], unit: str
) -> None:
    volume = noise(shape)
    path = write_ome_tiff(scratch / "v.ome.tif", volume, spacing=tuple(spacing), unit=unit)
    voxels, xml = pillow(path)
    np.testing.assert_array_equal(voxels, volume)
    (pixels,) = ET.fromstring(xml).iter(f"{OME}Pixels")
    assert pixels.get("DimensionOrder", "").startswith("XY")
    assert pixels.get("Type") == "uint8"
    assert [int(pixels.get(f"Size{axis}", 0)) for axis in "ZYXCT"] == [*shape, 1, 1]
    assert [float(pixels.get(f"PhysicalSize{axis}", 0)) for axis in "ZYX"] == spacing
    assert {pixels.get(f"PhysicalSize{axis}Unit") for axis in "ZYX"} == {OME_UNITS[unit]}


@settings(max_examples=15)
@given(shape=SHAPES, spacing=SIDES, unit=st.sampled_from(sorted(OME_UNITS)))
def test_the_schema_knows_every_word(
    schema_types: Any, scratch: Path, shape: list[int], spacing: list[float], unit: str
) -> None:
    path = write_ome_tiff(
        scratch / "s.ome.tif", noise(shape), spacing=tuple(spacing), unit=unit, name="scroll"
    )
    found = schema_types.from_xml(pillow(path)[1])
    assert [image.name for image in found.images] == ["scroll"]
    pixels = found.images[0].pixels
    assert [pixels.size_z, pixels.size_y, pixels.size_x] == shape
    assert pixels.type.value == "uint8"
    sizes = [pixels.physical_size_z, pixels.physical_size_y, pixels.physical_size_x]
    assert sizes == spacing
    assert pixels.physical_size_z_unit.name == unit.upper()
    assert sum(block.plane_count for block in pixels.tiff_data_blocks) == shape[0]


@given(shape=SHAPES)
def test_itk_reads_the_voxels(itk: Any, scratch: Path, shape: list[int]) -> None:
    volume = noise(shape)
    image = itk.ReadImage(write_ome_tiff(scratch / "i.ome.tif", volume))
    np.testing.assert_array_equal(itk.GetArrayFromImage(image).reshape(shape), volume)


def test_an_unknown_size_is_left_out(tmp_path: Path) -> None:
    assert "PhysicalSize" not in pillow(write_ome_tiff(tmp_path / "v.ome.tif", noise((3, 4, 5))))[1]


def test_an_unknown_unit_is_no_length(schema_types: Any, tmp_path: Path) -> None:
    path = write_ome_tiff(tmp_path / "v.ome.tif", noise((3, 4, 5)), spacing=(3, 2, 1), unit=None)
    pixels = schema_types.from_xml(pillow(path)[1]).images[0].pixels
    assert pixels.physical_size_x_unit.value == "reference frame"


def test_it_can_be_read_in_pieces_here(tmp_path: Path) -> None:
    volume = noise((5, 7, 11))
    with open_volume(write_ome_tiff(tmp_path / "v.ome.tif", volume)) as found:
        np.testing.assert_array_equal(found[1:4, 2:5, 3:9], volume[1:4, 2:5, 3:9])


def test_the_same_volume_makes_the_same_bytes(tmp_path: Path) -> None:
    volume = noise((3, 4, 5))
    paths = [write_ome_tiff(tmp_path / name, volume) for name in ("a.ome.tif", "b.ome.tif")]
    assert len({path.read_bytes() for path in paths}) == 1
    other = write_ome_tiff(tmp_path / "c.ome.tif", 1 - volume)
    roots = [ET.fromstring(pillow(path)[1]).get("UUID") for path in (*paths, other)]
    assert len(set(roots)) == 2
    assert sorted(tmp_path.iterdir()) == [*paths, other]


def test_what_32_bits_cannot_address_is_a_bigtiff(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = noise((5, 7, 11))
    assert writers.CLASSIC_TIFF_BYTES < 2**32
    for limit, big in ((volume.nbytes, False), (volume.nbytes - 1, True)):
        monkeypatch.setattr(writers, "CLASSIC_TIFF_BYTES", limit)
        path = write_ome_tiff(tmp_path / "v.ome.tif", volume, spacing=(3, 2, 1))
        with tifffile.TiffFile(path) as file:
            assert file.is_bigtiff == big
        np.testing.assert_array_equal(pillow(path)[0], volume)


def test_something_else_than_a_volume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes \(D, H, W\) here, got \(4, 5\)"):
        write_ome_tiff(tmp_path / "v.ome.tif", noise((4, 5)))
    assert not list(tmp_path.iterdir())
