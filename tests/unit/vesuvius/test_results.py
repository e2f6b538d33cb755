from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from ignite.engine import Engine
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from pipeline.data.images import read_image
from pipeline.data.ome_zarr import create_ome_zarr
from pipeline.data.volumes import open_volume
from pipeline.inference.batch import BatchRun
from pipeline.inference.ensembles import Ensemble
from pipeline.vesuvius.geometry import VoxelSize
from pipeline.vesuvius.results import SurfaceWriter
from pipeline.vesuvius.sheet_measures import sheet_facts
from pipeline.vesuvius.topology import PostProcess

ALL = (
    "save_probability", "separate_instances", "save_ome_zarr", "save_nifti", "save_ome_tiff",
    "save_height_maps", "save_meshes",
)  # fmt: skip
UM = 7.9
# What takes long to compile changes nothing here.
REPAIR = [
    {"name": "threshold", "threshold": 0.5},
    {"name": "remove_small_components", "min_component_size": 20},
]


def two_sheets() -> NDArray[np.float32]:
    """The probability of two waves."""
    z, y, x = np.indices((40, 36, 44))
    wave = z - 2 * np.sin(y / 8) - x / 20
    faint = np.random.default_rng(0).random(wave.shape) * 0.3
    return np.where((abs(wave - 8) < 1.2) | (abs(wave - 26) < 1.2), 0.95, faint).astype(np.float32)


def write(
    folder: Path, probability: NDArray[np.float32], known_size: bool = False, **settings: Any
) -> dict[str, Any]:
    """Let the writer follow an engine over one volume; return its sidecar."""
    source = folder / "in" / "a" / "scroll.zarr"
    size = {"spacing": (UM, UM, UM)} if known_size else {}
    create_ome_zarr(source, probability.shape, "uint8", (32, 32, 32), overwrite=True, **size)
    cases = [{"name": "a/scroll.zarr", "image": str(source)}]
    batch = BatchRun(cases, str(folder / "out"), {}, None, "vesuvius_surface", overwrite=True)
    repair = PostProcess(steps=settings.pop("steps", REPAIR), betti=False)
    checkpoint = {"epoch": 4, "metrics": {"val_surface": 0.7}}
    writer = SurfaceWriter(batch, repair, 0.5, checkpoint=checkpoint, **settings)
    item = {
        "name": "a/scroll.zarr",
        "image": torch.from_numpy(probability)[None],
        "image_path": str(source),
        "spacing": torch.tensor([UM if known_size else np.nan] * 3, dtype=torch.float64),
        "source_dtype": "uint16",
        "stages": {"seconds": {"read": 0.25}, "cpu_seconds": {"read": 0.125}},
    }

    def step(engine: Engine, data: Any) -> Any:
        batch.begin({"a/scroll.zarr": batch.origins(cases[0])})
        return [{"pred": torch.from_numpy(probability)[None]}]

    engine = Engine(step)
    writer.attach(engine)
    batch.run(lambda: engine.run([[item]]))
    found: dict[str, Any] = json.loads((folder / "out" / "a" / "scroll.json").read_text())
    return found


def check_outputs(folder: Path, sidecar: dict[str, Any], unit: float = 1.0) -> None:
    """Read everything back, and compare it with the mask."""
    out = folder / "out" / "a"
    assert all((folder / "out" / name).exists() for name in sidecar["results"])
    mask, sheets = (read_image(out / f"scroll{suffix}.tif") for suffix in ("", "_sheets"))
    assert mask.dtype == np.uint8
    assert list(mask.shape) == sidecar["shape"]
    np.testing.assert_array_equal(mask, sheets > 0)
    np.testing.assert_array_equal(read_image(out / "scroll_visualization.tif"), 255 * mask)
    for suffix, expected in (("_surface", mask), ("_sheets", sheets)):
        with open_volume(out / f"scroll{suffix}.zarr") as image:
            np.testing.assert_array_equal(image[:, :, :], expected)
    for suffix in (".nii.gz", ".ome.tif"):
        assert f"a/scroll{suffix}" in sidecar["results"]
        with open_volume(out / f"scroll{suffix}") as image:
            np.testing.assert_array_equal(image[:, :, :], mask)
    numbers = [int(path.stem.split("_")[1]) for path in (out / "scroll_meshes").iterdir()]
    assert sorted(numbers) == list(range(1, sidecar["sheets"] + 1))
    for number in numbers:
        voxels = sheets == number
        vertices, header = ply_vertices(out / "scroll_meshes" / f"sheet_{number:04d}.ply")
        # Half a voxel beyond the middles of the outermost voxels, in x, y, z.
        box = ndimage.find_objects(voxels.astype(int))[0][::-1]
        np.testing.assert_allclose(vertices.min(axis=0), [unit * (b.start - 0.5) for b in box])
        np.testing.assert_allclose(vertices.max(axis=0), [unit * (b.stop - 0.5) for b in box])
        assert ("in um" if unit != 1 else "in voxels") in header
        check_map(out / "scroll_heights" / f"sheet_{number:04d}.tif", voxels)


def ply_vertices(path: Path) -> tuple[NDArray[np.float32], str]:
    head, body = path.read_bytes().split(b"end_header\n", 1)
    count = int(re.findall(rb"element vertex (\d+)", head)[0])
    return np.frombuffer(body, "<f4", 3 * count).reshape(count, 3), head.decode("ascii")


def check_map(path: Path, voxels: NDArray[np.bool_]) -> None:
    """Draw a sheet from its map, and compare the columns with one layer."""
    with tifffile.TiffFile(path) as file:
        (height, thickness, layers), facts = file.asarray(), json.loads(file.pages[0].description)
    view = np.moveaxis(voxels, "zyx".index(facts["projection_axis"]), 0)
    row, column = facts["corner"]
    part = view[:, row : row + height.shape[0], column : column + height.shape[1]]
    assert part.sum() == voxels.sum()
    away = np.abs(np.arange(len(view))[:, None, None] - np.nan_to_num(height, nan=-99))
    once = layers == 1
    np.testing.assert_array_equal((away <= (thickness - 1) / 2)[:, once], part[:, once])
    np.testing.assert_array_equal(layers > 0, part.any(axis=0))


@pytest.mark.parametrize("known_size", [True, False])
def test_all_outputs_agree_with_the_mask(tmp_path: Path, known_size: bool) -> None:
    sidecar = write(tmp_path, two_sheets(), known_size, **dict.fromkeys(ALL, True))
    assert sidecar["sheets"] == 2
    check_outputs(tmp_path, sidecar, UM if known_size else 1.0)


def test_more_sheets_than_16_bits_can_count_keep_their_numbers(tmp_path: Path) -> None:
    specks = np.zeros((84, 82, 82), np.float32)
    specks[::2, ::2, ::2] = 1
    sidecar = write(tmp_path, specks, steps=REPAIR[:1], separate_instances=True)
    assert sidecar["sheets"] == 42 * 41 * 41 > 2**16
    sheets = tifffile.imread(tmp_path / "out" / "a" / "scroll_sheets.tif")
    np.testing.assert_array_equal(np.unique(sheets), np.arange(sidecar["sheets"] + 1))


def test_all_outputs_of_a_real_volume_agree_with_its_mask(
    tmp_path: Path, lamina_data: Path
) -> None:
    source = sorted((lamina_data / "vesuvius" / "qim3d").glob("*.tif"))[0]
    image = read_image(source)[60:124, 20:100, 20:100].astype(np.float32)
    probability = (image - image.min()) / (image.max() - image.min())
    sidecar = write(tmp_path, probability, True, **dict.fromkeys(ALL, True))
    assert sidecar["foreground"] > 1000
    check_outputs(tmp_path, sidecar, UM)


def test_without_requests_there_are_mask_visualization_and_picture_alone(tmp_path: Path) -> None:
    sidecar = write(tmp_path, two_sheets())
    expected = ["a/scroll.tif", "a/scroll_visualization.tif", "pictures/a/scroll.png"]
    assert sidecar["results"] == expected
    found = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")}
    assert len(found) == len(expected) + 4  # sidecar, summary and two tables


def test_a_sidecar_says_what_the_issue_asks_for(tmp_path: Path) -> None:
    found = write(tmp_path, two_sheets(), known_size=True)
    assert found["checkpoint"] == {"epoch": 4, "metrics": {"val_surface": 0.7}}
    assert (found["shape"], found["source_dtype"]) == ([40, 36, 44], "uint16")
    assert (found["spacing"], found["unit"]) == ([UM] * 3, "micrometer")
    mask = read_image(tmp_path / "out" / "a" / "scroll.tif")
    assert found["foreground"] == mask.sum()
    assert found["background"] == mask.size - mask.sum()
    assert found["sheets"] == 2
    assert found["largest_sheet_voxels"] == max(np.bincount(ndimage.label(mask)[0].ravel())[1:])
    flat = 36 * 44 * (UM / 1000) ** 2  # of the waves, which reach from face to face
    for area in found["sheet_area_mm2"].values():
        assert flat < area < 1.25 * flat
    assert list(found["seconds"]) == ["read", "network", "repair", "measure", "write"]
    assert found["seconds"]["read"] == 0.25
    assert found["cpu_seconds"].keys() == found["seconds"].keys()


def test_faces_stand_for_the_area_where_the_size_is_unknown(tmp_path: Path) -> None:
    found = write(tmp_path, two_sheets())
    assert found["spacing"] is None
    assert set(found["sheet_faces"]) == {"1", "2"}
    assert "sheet_area_mm2" not in found


def test_only_the_largest_sheets_get_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        write(tmp_path, two_sheets(), save_meshes=True, largest_sheets=1)
    assert len(list((tmp_path / "out" / "a" / "scroll_meshes").iterdir())) == 1
    assert any("of the 1 largest of 2 sheets" in r.getMessage() for r in caplog.records)


def test_a_second_run_leaves_no_mesh_of_the_first(tmp_path: Path) -> None:
    write(tmp_path, two_sheets(), save_meshes=True)
    one = two_sheets()
    one[18:] = 0
    write(tmp_path, one, save_meshes=True)
    assert len(list((tmp_path / "out" / "a" / "scroll_meshes").iterdir())) == 1


def test_nothing_found_makes_empty_folders_and_a_warning(tmp_path: Path) -> None:
    found = write(tmp_path, np.zeros((24, 24, 24), np.float32), save_meshes=True)
    assert found["sheets"] == 0
    assert list((tmp_path / "out" / "a" / "scroll_meshes").iterdir()) == []
    assert "0.00% of the volume is surface" in found["warnings"][0]
    assert found["row"]["warning"] == found["warnings"][0]


def test_an_ensemble_of_one_model_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    members = Ensemble([nn.Conv3d(1, 1, 3, padding=1)] * 2)
    found = write(tmp_path, two_sheets(), members=members, window=(16, 16, 16))
    assert found["member_difference"] == 0
    assert "they are one model" in found["warnings"][0]
    assert any("they are one model" in record.getMessage() for record in caplog.records)


def test_many_sheets_keep_their_numbers(tmp_path: Path) -> None:
    """More than 16 bits can count."""
    specks = np.zeros((90, 90, 90), np.float32)
    specks[1::2, 1::2, 1::2] = 1
    batch = BatchRun([], str(tmp_path), {}, None, "vesuvius_surface")
    writer = SurfaceWriter(batch, PostProcess(steps=REPAIR, betti=False), 0.5, True, True)
    mask = (specks > 0).astype(np.uint8)
    sheets, facts = sheet_facts(mask)
    assert facts["sheets"] == 45**3
    writer._write_volumes("s.tif", specks, mask, sheets, VoxelSize())
    assert read_image(tmp_path / "s_sheets.tif").max() == 45**3
