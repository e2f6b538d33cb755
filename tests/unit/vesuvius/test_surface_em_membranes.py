"""What the benchmark on real membranes learns from, and that it learns from nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
import tifffile

from pipeline.data.folds import split_samples
from pipeline.data.manifests import find_samples, load_manifest


@pytest.fixture(scope="module")
def benchmark(repository: Path) -> ModuleType:
    path = repository / "benchmarks" / "surface_em_membranes.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cells() -> np.ndarray:
    """Four neurons behind a wall along each axis of the plane, `(50, 20, 24)`."""
    cells = np.ones((50, 20, 24), np.int32)
    cells[:, 10:] += 1
    cells[:, :, 12:] += 2
    cells[:, 10] = cells[:, :, 12] = 0
    return cells


@pytest.fixture
def folder(cells: np.ndarray, tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    arrays = {
        "train-image.h5": rng.integers(0, 256, cells.shape, np.uint8),
        "train-gt.lzf.h5": cells,
        "train-p1.lzf.h5": (cells == 0).astype(np.float32),
    }
    for name, array in arrays.items():
        with h5py.File(tmp_path / name, "w") as file:
            file["stack"] = array
    return tmp_path


def test_the_first_half_is_read_without_the_last(benchmark: ModuleType, folder: Path) -> None:
    half = benchmark.read_planes(folder, benchmark.FIRST)
    assert [array.shape for array in half] == [(25, 20, 24)] * 3
    with h5py.File(folder / "train-image.h5") as file:
        np.testing.assert_array_equal(half.image, file["stack"][:25])


def test_every_column_is_judged_once_and_no_plane_is_in_both_halves(
    benchmark: ModuleType,
) -> None:
    columns = np.arange(200)
    judged = np.concatenate([columns[third] for third in benchmark.THIRDS])
    np.testing.assert_array_equal(judged, columns)
    planes = np.arange(50)
    assert not set(planes[benchmark.FIRST]) & set(planes[benchmark.LAST])


def test_a_judged_column_is_predicted_by_the_network_that_has_not_seen_its_label(
    benchmark: ModuleType,
) -> None:
    predictions = [np.full((2, 2, 200), number, np.float32) for number in range(3)]
    together = benchmark.put_together(predictions)
    assert together.shape == (2, 2, 200)
    for number, third in enumerate(benchmark.THIRDS):
        assert (together[:, :, third] == number).all()


def test_voxels_beside_a_membrane_are_not_labelled(benchmark: ModuleType) -> None:
    cells = np.ones((3, 3, 5), np.int32)
    cells[:, :, 2] = 0
    label = benchmark.learned_label(cells, slice(0, 0))
    np.testing.assert_array_equal(label[1, 1], [0, 2, 1, 2, 0])


def test_labels_of_judged_columns_are_not_learned(
    benchmark: ModuleType, folder: Path, tmp_path: Path
) -> None:
    half = benchmark.read_planes(folder, benchmark.FIRST)
    judged = slice(8, 16)
    manifest = load_manifest(benchmark.write_third(tmp_path / "third", half, judged))
    split = split_samples(find_samples(manifest, tmp_path / "third"), manifest)
    assert [len(split.train), len(split.val), len(split.test)] == [1, 1, 0]
    label = tifffile.imread(split.train[0].label)
    seen = (label != 2).any(axis=(0, 1))
    np.testing.assert_array_equal(np.flatnonzero(~seen), np.arange(24)[judged])
    np.testing.assert_array_equal(tifffile.imread(split.train[0].image), half.image)
    truth = half.cells[:, :, judged] == 0
    np.testing.assert_array_equal(tifffile.imread(split.val[0].label), truth)


def test_judged_columns_do_not_show_in_the_labels_beside_them(
    benchmark: ModuleType, cells: np.ndarray
) -> None:
    judged = slice(8, 16)
    elsewhere = cells.copy()
    elsewhere[:, :, judged] = np.roll(cells[:, :, judged], 3, axis=2)
    assert (elsewhere != cells).any()
    np.testing.assert_array_equal(
        benchmark.learned_label(elsewhere, judged), benchmark.learned_label(cells, judged)
    )


def test_a_vesicle_apart_from_the_membranes_is_left_out(benchmark: ModuleType) -> None:
    probability = np.zeros((8, 16, 16), np.float32)
    probability[:, 3] = 0.9
    wall = probability > 0
    probability[2:5, 10:12, 8:10] = 1
    np.testing.assert_array_equal(benchmark.membranes(probability, benchmark.Cut(0.5, 0)), wall)
    grown = benchmark.membranes(probability, benchmark.Cut(0.5, 1))
    np.testing.assert_array_equal(grown[:, 2:5], np.ones_like(grown[:, 2:5]))
    assert grown.sum() == 3 * wall.sum()


def test_a_cut_without_radius_is_the_threshold_alone(benchmark: ModuleType) -> None:
    probability = np.random.default_rng(0).random((6, 7, 8), np.float32)
    found = benchmark.membranes(probability, benchmark.Cut(0.5))
    np.testing.assert_array_equal(found, probability >= 0.5)


def test_no_membrane_is_an_empty_mask(benchmark: ModuleType) -> None:
    assert not benchmark.membranes(np.zeros((4, 5, 6), np.float32), benchmark.Cut(0.5, 1)).any()


def test_cells_are_found_behind_whole_walls_and_merged_behind_a_broken_one(
    benchmark: ModuleType, cells: np.ndarray
) -> None:
    walls = (cells == 0).astype(np.float32)
    assert benchmark.cells_voi(walls, cells, 0.5, 0) == pytest.approx(0, abs=1e-9)
    walls[20, 10, 4] = 0
    assert benchmark.cells_voi(walls, cells, 0.5, 0) > 0.1
    assert benchmark.cells_voi(walls, cells, 0.5, 2) == pytest.approx(0, abs=1e-9)


def test_the_real_volume_is_as_the_benchmark_says(benchmark: ModuleType, lamina_data: Path) -> None:
    folder = lamina_data / "vesuvius" / "gala"
    if not folder.is_dir():
        pytest.skip("no volume of gala")
    half = benchmark.read_planes(folder, benchmark.FIRST)
    assert [array.shape for array in half] == [(25, 100, 200)] * 3
    membrane = half.cells == 0
    assert 0.06 < membrane.mean() < 0.08
    assert half.image[membrane].mean() < half.image[~membrane].mean() - 50
