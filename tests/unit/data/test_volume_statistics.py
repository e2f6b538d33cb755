from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import FgBgToIndicesd
from numpy.typing import NDArray

from pipeline.data.volume_statistics import (
    class_index_cache,
    class_indices,
    intensity_percentiles,
    intensity_problems,
    percentile_cache,
)
from pipeline.data.writers import write_tiff
from pipeline.errors import ConfigurationError, InputError

DTYPES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64", ">u2", ">f4",
)  # fmt: skip


def drawn(dtype: str, seed: int, shape: tuple[int, ...] = (7, 5, 6)) -> NDArray[Any]:
    generator = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return (generator.standard_normal(shape) * 10.0 ** generator.integers(-3, 3)).astype(kind)
    spread = max(1, np.iinfo(kind).max // int(generator.choice([1, 100, 100_000])))
    low = 0 if kind.kind == "u" else -spread
    return generator.integers(low, spread, shape, dtype=kind.newbyteorder("=")).astype(kind)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), low=st.floats(0, 99), width=st.floats(0.01, 1))
def test_percentiles_are_those_of_numpy(dtype: str, seed: int, low: float, width: float) -> None:
    volume = drawn(dtype, seed)
    high = low + width * (100 - low)
    found = intensity_percentiles(volume, low, high)
    # In float64: numpy itself subtracts neighbours in the type of the array, where they overflow.
    expected = np.percentile(volume.astype(np.float64), [low, high])
    assert [found["low"], found["high"]] == expected.tolist()
    assert (found["minimum"], found["maximum"]) == (volume.min(), volume.max())


@pytest.mark.parametrize("slab_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_percentiles_do_not_depend_on_the_slabs(dtype: str, slab_bytes: int) -> None:
    volume = drawn(dtype, 1)
    assert intensity_percentiles(volume, 2, 98, slab_bytes) == intensity_percentiles(volume, 2, 98)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    volume = drawn("float32", 2)
    clean = volume[1:].copy()
    volume[0] = np.nan
    volume[0, 0, :2] = np.inf, -np.inf
    found = intensity_percentiles(volume, 1, 99)
    assert (found["nan"], found["infinite"], found["voxels"]) == (28, 2, 210)
    assert found["low"] == np.percentile(clean.astype(np.float64), 1)
    assert found["maximum"] == clean.max()


def test_without_a_finite_value_there_is_no_percentile() -> None:
    found = intensity_percentiles(np.full((1, 2, 2), np.nan, np.float32), 1, 99)
    assert np.isnan([found["low"], found["high"], found["minimum"], found["maximum"]]).all()


def test_percentiles_of_a_mask_are_those_of_its_numbers() -> None:
    mask = np.arange(24).reshape(2, 3, 4) > 11
    found = intensity_percentiles(mask, 25, 75)
    assert (found["low"], found["high"]) == (0, 1)


@pytest.mark.parametrize(("low", "high"), [(-1, 5), (50, 50), (5, 101), (float("nan"), 5)])
def test_percentiles_outside_their_range_are_refused(low: float, high: float) -> None:
    with pytest.raises(ConfigurationError, match="0 <= low < high <= 100"):
        intensity_percentiles(np.zeros((1, 1, 1)), low, high)


def test_complex_values_are_refused() -> None:
    with pytest.raises(InputError, match="complex64, expected real numbers"):
        intensity_percentiles(np.zeros((1, 1, 1), np.complex64), 1, 99)


def indices_by_value(found: dict[str, NDArray[np.int64]]) -> dict[int, list[int]]:
    offsets = found["offsets"]
    return {
        int(value): found["positions"][offsets[k] : offsets[k + 1]].tolist()
        for k, value in enumerate(found["values"])
    }


def labels(seed: int = 0, dtype: str = "uint8") -> NDArray[Any]:
    generator = np.random.default_rng(seed)
    return generator.choice(3, (9, 8, 7), p=[0.9, 0.08, 0.02]).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", ">u2"])
def test_without_a_limit_positions_are_those_of_monai(dtype: str) -> None:
    volume = labels(dtype=dtype)
    monai = FgBgToIndicesd(keys="label")({"label": volume.astype(np.uint8)[None]})
    found = indices_by_value(class_indices(volume, limit=10**6))
    assert found[0] == monai["label_bg_indices"].tolist()
    assert sorted(found[1] + found[2]) == monai["label_fg_indices"].tolist()


def test_every_voxel_is_counted_and_at_most_the_limit_kept() -> None:
    volume = labels()
    found = class_indices(volume, limit=20)
    assert found["counts"].tolist() == np.bincount(volume.ravel()).tolist()
    for value, positions in indices_by_value(found).items():
        assert len(positions) == min(20, int((volume == value).sum()))
        assert len(set(positions)) == len(positions)
        assert (volume.ravel()[positions] == value).all()


@pytest.mark.parametrize("slab_bytes", [1, 100, 1 << 20])
def test_positions_do_not_depend_on_the_slabs(slab_bytes: int) -> None:
    volume = labels()
    found = class_indices(volume, limit=20, slab_bytes=slab_bytes)
    for key, value in class_indices(volume, limit=20).items():
        np.testing.assert_array_equal(found[key], value)


def test_every_voxel_is_kept_equally_often() -> None:
    volume = np.zeros((4, 5, 5), np.uint8)
    times = np.zeros(100)
    for seed in range(2000):
        times[class_indices(volume, limit=10, seed=seed)["positions"]] += 1
    # 200 expected each, binomial: a standard deviation of 13.4
    assert times.min() > 200 - 5 * 13.4
    assert times.max() < 200 + 5 * 13.4
    assert 0.7 < times.var() / 180 < 1.4


def test_kept_voxels_do_not_stand_in_a_pattern() -> None:
    volume = np.zeros((4, 5, 5), np.uint8)
    found = np.zeros(100)
    for seed in range(2000):
        positions = class_indices(volume, limit=10, seed=seed)["positions"]
        apart = (positions[None] - positions[:, None]).ravel()
        found += np.bincount(apart[apart > 0], minlength=100)
    # Pairs of a distance, of all that there are, as often as any two are kept together.
    expected = 2000 * (100 - np.arange(1, 60)) * (10 * 9) / (100 * 99)
    assert (np.abs(found[1:60] - expected) < 6 * np.sqrt(expected)).all()


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (np.full((1, 2, 2), 0.5), "expected labels: whole numbers"),
        (np.full((1, 2, 2), np.nan), "expected labels: whole numbers"),
        (np.arange(600).reshape(1, 20, 30), "more than 256 label values"),
    ],
    ids=["fractions", "nan", "an image"],
)
def test_values_that_are_no_labels_are_refused(volume: NDArray[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        class_indices(volume, limit=5)


def test_the_caches_give_what_the_functions_give(tmp_path: Path) -> None:
    image, label = drawn("uint16", 5, (6, 16, 16)), labels()
    np.save(tmp_path / "label.npy", label)
    write_tiff(tmp_path / "image.tif", image, compression=None)
    found = percentile_cache(tmp_path / "c", 0.5, 99.5)(tmp_path / "image.tif")
    assert found == intensity_percentiles(image, 0.5, 99.5)
    for _ in range(2):
        kept = class_index_cache(tmp_path / "c", limit=20)(tmp_path / "label.npy")
        for key, value in class_indices(label, limit=20).items():
            np.testing.assert_array_equal(kept[key], value)


def test_bad_volumes_are_found_before_training(tmp_path: Path) -> None:
    volume = drawn("float32", 1)
    np.save(tmp_path / "good.npy", volume)
    np.save(tmp_path / "flat.npy", np.full_like(volume, 3))
    volume[0, 0, 0] = np.inf
    np.save(tmp_path / "bad.npy", volume)
    speck = np.full((5, 20, 20), 3)
    speck[0, 0, 0] = 90
    np.save(tmp_path / "speck.npy", speck)
    (tmp_path / "text.npy").write_text("no volume")
    paths = [tmp_path / f"{name}.npy" for name in ("good", "bad", "flat", "speck", "text", "none")]
    for _ in range(2):
        problems = intensity_problems(percentile_cache(tmp_path / "c", 1, 99), paths)
        assert [problem.path for problem in problems] == [str(path) for path in paths[1:]]
        messages = [problem.message for problem in problems]
        assert messages[0].startswith("1 values are not finite")
        assert messages[1].startswith("constant: every voxel is 3")
        assert messages[2].startswith("nearly constant: both percentiles are 3")
        assert messages[3].startswith("no volume: it begins with")
        assert messages[4].startswith("cannot be read")


def test_an_error_in_a_file_names_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "a.npy", np.full((2, 3, 4), 0.5))
    with caplog.at_level(logging.WARNING), pytest.raises(InputError, match=r"a\.npy: values 0\.5"):
        class_index_cache(tmp_path / "c")(tmp_path / "a.npy")
