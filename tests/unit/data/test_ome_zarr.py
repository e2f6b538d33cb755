from __future__ import annotations

import copy
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from pipeline.data import ome_levels, ome_zarr
from pipeline.data.ome_levels import fill_level, halved, reduced
from pipeline.data.ome_validation import validate_ome_zarr
from pipeline.data.ome_zarr import build_levels, create_ome_zarr, level_count, write_unit
from pipeline.data.volumes import open_volume
from pipeline.errors import ConfigurationError, InputError, ResourceError

SHAPE = (21, 33, 18)
DTYPES = [np.uint8, np.uint16, np.float16, np.float32]
LAYOUTS = [(2, None), (3, None), (3, (16, 32, 16))]
layouts = pytest.mark.parametrize(("zarr_format", "shards"), LAYOUTS)


def noise(dtype: Any, shape: tuple[int, ...] = SHAPE) -> NDArray[Any]:
    return (np.random.default_rng(0).random(shape) * 250).astype(dtype)


def written(path: Path, array: NDArray[Any], **kw: Any) -> Path:
    settings = {"channels": array.shape[0] if array.ndim == 4 else None, **kw}
    target = create_ome_zarr(path, array.shape[-3:], array.dtype, (8, 16, 16), **settings)
    target[...] = array
    return path


def level(path: Path, number: int) -> NDArray[Any]:
    return np.asarray(zarr.open_group(path, mode="r")[str(number)][...])


def metadata(path: Path) -> dict[str, Any]:
    attributes = dict(zarr.open_group(path, mode="r").attrs)
    content: dict[str, Any] = attributes.get("ome", attributes)
    return content


def levels_named(path: Path) -> list[str]:
    return [dataset["path"] for dataset in metadata(path)["multiscales"][0]["datasets"]]


def coarser(array: NDArray[Any], reduce: str) -> NDArray[Any]:
    """Say what a level should be, from blocks of 2 x 2 x 2 with NaN beyond odd ends."""
    factors = [2 if length > 1 else 1 for length in array.shape]
    ends = [(0, -length % factor) for length, factor in zip(array.shape, factors, strict=True)]
    padded = np.pad(array.astype(np.float64), ends, constant_values=np.nan)
    split = [n for n, f in zip(padded.shape, factors, strict=True) for n in (n // f, f)]
    cells = np.moveaxis(padded.reshape(split), (1, 3, 5), (3, 4, 5))
    if reduce == "nearest":
        return cells[..., 0, 0, 0].astype(array.dtype)
    whole = np.nanmean if reduce == "mean" else np.nanmax
    values = whole(cells, axis=(3, 4, 5))
    return (np.rint(values) if array.dtype.kind in "iu" else values).astype(array.dtype)


# Level 0


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [None, 2])
def test_what_is_written_reads_back(
    tmp_path: Path, dtype: Any, channels: int | None, zarr_format: int, shards: Any
) -> None:
    array = noise(dtype, SHAPE if channels is None else (channels, *SHAPE))
    layout: Any = {"zarr_format": zarr_format, "shards": shards, "channels": channels}
    target = create_ome_zarr(tmp_path / "v.zarr", SHAPE, dtype, (8, 16, 16), **layout)
    region = (..., slice(3, 20), slice(8, 33), slice(0, 5))
    target[region] = array[region]
    expected = np.zeros_like(array)
    expected[region] = array[region]
    np.testing.assert_array_equal(open_volume(tmp_path / "v.zarr")[...], expected, strict=True)


@layouts
def test_one_unit_is_one_file(tmp_path: Path, zarr_format: int, shards: Any) -> None:
    layout: Any = {"zarr_format": zarr_format, "shards": shards, "channels": 2}
    array = create_ome_zarr(tmp_path / "v.zarr", (32, 64, 32), np.uint8, (8, 16, 16), **layout)
    unit = write_unit(array)
    assert unit == (1, *(shards or (8, 16, 16)))
    before = set(tmp_path.rglob("*"))
    array[tuple(slice(0, length) for length in unit)] = 7
    assert len([path for path in set(tmp_path.rglob("*")) - before if path.is_file()]) == 1
    array[tuple(slice(0, length + 1) for length in unit)] = 7
    assert len([path for path in set(tmp_path.rglob("*")) - before if path.is_file()]) == 16


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("compressor", ["zstd", "lz4", None])
def test_compressors_keep_every_bit(tmp_path: Path, zarr_format: int, compressor: Any) -> None:
    array = noise(np.float32)
    layout: Any = {"zarr_format": zarr_format, "compressor": compressor}
    path = written(tmp_path / "v.zarr", array, **layout)
    np.testing.assert_array_equal(level(path, 0), array, strict=True)
    kinds = str(zarr.open_group(path, mode="r")["0"].compressors)
    assert (compressor or "()") in kinds


def test_what_is_never_written_is_the_fill_value(tmp_path: Path) -> None:
    array = create_ome_zarr(tmp_path / "v.zarr", SHAPE, np.uint8, (8, 8, 8), fill_value=9)
    assert (array[...] == 9).all()


def test_attributes_stand_beside_the_metadata(tmp_path: Path) -> None:
    create_ome_zarr(tmp_path / "v.zarr", SHAPE, np.uint8, (8, 8, 8), attributes={"lamina": [1]})
    attributes = dict(zarr.open_group(tmp_path / "v.zarr", mode="r").attrs)
    assert attributes["lamina"] == [1]
    validate_ome_zarr(tmp_path / "v.zarr")


def test_an_image_that_exists_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "v.zarr", noise(np.uint8))
    with pytest.raises(ConfigurationError, match="exists"):
        create_ome_zarr(path, SHAPE, np.uint8, (8, 8, 8))
    np.testing.assert_array_equal(level(path, 0), noise(np.uint8))
    create_ome_zarr(path, SHAPE, np.uint8, (8, 8, 8), overwrite=True)
    assert not level(path, 0).any()


def test_a_failure_while_creating_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kw: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr.Group, "create_array", full)
    with pytest.raises(ResourceError, match="No space left"):
        create_ome_zarr(tmp_path / "v.zarr", SHAPE, np.uint8, (8, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": (4, 4)}, r"expected \(D, H, W\)"),
        ({"shape": (4, 0, 4)}, r"expected \(D, H, W\)"),
        ({"dtype": "S3"}, r"expected \(D, H, W\)"),
        ({"chunks": (8, 8)}, "three positive lengths"),
        ({"chunks": (8, 8, 0)}, "three positive lengths"),
        ({"shards": (8, 8, 12)}, "multiples of chunks"),
        ({"shards": (8, 8, 8), "zarr_format": 2}, "no shards"),
        ({"zarr_format": 4}, "zarr_format must be 2 or 3"),
        ({"spacing": (1, 1)}, "three positive numbers"),
        ({"spacing": (1, 1, float("nan"))}, "three positive numbers"),
        ({"unit": "um"}, "expected micrometer"),
        ({"compressor": "gzip"}, "zstd, lz4 or null"),
        ({"chunks": (2048, 2048, 512)}, "2 GB or more"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, settings: Any, message: str) -> None:
    whole = {"shape": SHAPE, "dtype": np.uint8, "chunks": (8, 8, 8), **settings}
    with pytest.raises(ConfigurationError, match=message):
        create_ome_zarr(tmp_path / "v.zarr", **whole)
    assert not list(tmp_path.iterdir())


# Coarser levels


@layouts
@pytest.mark.parametrize(
    ("dtype", "reduce"),
    [*((dtype, "mean") for dtype in DTYPES), (np.uint8, "nearest"), (np.float32, "max")],
)
def test_each_level_is_made_of_the_one_before(
    tmp_path: Path, dtype: Any, reduce: str, zarr_format: int, shards: Any
) -> None:
    array = noise(dtype)
    layout: Any = {"zarr_format": zarr_format, "shards": shards}
    path = written(tmp_path / "v.zarr", array, **layout)
    assert build_levels(path, 4, reduce=reduce) == 4
    for number in range(1, 4):
        array = coarser(array, reduce)
        np.testing.assert_array_equal(level(path, number), array, strict=True)
    validate_ome_zarr(path)


@given(
    block=hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.float32]),
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=5),
        elements={"min_value": 0, "max_value": 250},
    ),
    reduce=st.sampled_from(["mean", "nearest", "max"]),
)
def test_reducing_equals_the_oracle(block: NDArray[Any], reduce: Any) -> None:
    shape, factors = halved(block.shape)
    result = reduced(block, factors, reduce)
    assert result.shape == shape
    np.testing.assert_array_equal(result, coarser(block, reduce), strict=True)


def test_nearest_makes_no_new_labels(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).choice(np.uint64([3, 70, 2**63]), SHAPE)
    path = written(tmp_path / "v.zarr", labels)
    build_levels(path, 3, reduce="nearest")
    assert set(np.unique(level(path, 2))) <= {3, 70, 2**63}


def test_channels_are_not_mixed(tmp_path: Path) -> None:
    array = noise(np.uint8, (3, *SHAPE))
    path = written(tmp_path / "v.zarr", array, spacing=(4.0, 2.0, 1.0))
    build_levels(path, 2)
    expected = np.stack([coarser(channel, "mean") for channel in array])
    np.testing.assert_array_equal(level(path, 1), expected, strict=True)
    assert open_volume(path, "1").spacing == (8, 4, 2)
    validate_ome_zarr(path)


def test_nan_and_infinities_pass_without_a_warning(tmp_path: Path) -> None:
    array = np.zeros((4, 4, 4), np.float32)
    array[0, 0, 0], array[2, 0, 0], array[3, 0, 0] = np.nan, np.inf, -np.inf
    path = written(tmp_path / "v.zarr", array)
    build_levels(path, 2)
    assert np.isnan(level(path, 1)[:, 0, 0]).all()


@pytest.mark.parametrize("shape", [(257, 3, 5), (256, 1, 1), (1, 2, 2049), (10**6, 10**5, 7)])
def test_levels_go_down_to_256(shape: tuple[int, ...]) -> None:
    sizes = [shape]
    for _ in range(level_count(shape) - 1):
        sizes.append(halved(sizes[-1])[0])
    assert max(sizes[-1]) <= 256
    assert all(max(size) > 256 for size in sizes[:-1])


def test_the_number_of_levels_follows_from_the_size(tmp_path: Path) -> None:
    array = create_ome_zarr(tmp_path / "v.zarr", (3, 600, 4), np.uint8, (8, 64, 8))
    array[...] = 200
    assert build_levels(tmp_path / "v.zarr") == 3
    assert (level(tmp_path / "v.zarr", 2) == 200).all()
    assert level(tmp_path / "v.zarr", 2).shape == (1, 150, 1)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_coarse_voxel_stands_in_the_middle_of_its_own(tmp_path: Path, zarr_format: Any) -> None:
    path = written(
        tmp_path / "v.zarr", noise(np.uint8), spacing=(4.0, 2.0, 1.0), zarr_format=zarr_format
    )
    build_levels(path, 3)
    found = [
        [transform[transform["type"]] for transform in dataset["coordinateTransformations"]]
        for dataset in metadata(path)["multiscales"][0]["datasets"]
    ]
    # The centre of voxel i of level n is that of the mean of voxels i 2^n to (i + 1) 2^n - 1.
    assert found == [
        [[4, 2, 1]],
        [[8, 4, 2], [2, 1, 0.5]],
        [[16, 8, 4], [6, 3, 1.5]],
    ]


def test_an_axis_of_one_stays_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "v.zarr", noise(np.uint8, (1, 8, 8)), spacing=(5.0, 1.0, 1.0))
    build_levels(path, 2)
    assert open_volume(path, "1").spacing == (5, 2, 2)
    assert open_volume(path, "1").shape == (1, 4, 4)


# Killed and called again


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("after", [0, 5, 11])
def test_a_half_built_level_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zarr_format: Any, after: int
) -> None:
    array = noise(np.uint8, (40, 33, 35))
    path = written(tmp_path / "v.zarr", array, zarr_format=zarr_format)
    calls = itertools.count()

    def killed(*args: Any) -> Any:
        if next(calls) == after:
            raise Killed
        return np.full_like(reduced(*args), 77)  # nothing of the killed run may survive

    with monkeypatch.context() as patch:
        patch.setattr(ome_levels, "reduced", killed)
        with pytest.raises(Killed):
            build_levels(path, 2)
    assert levels_named(path) == ["0"]
    validate_ome_zarr(path)
    assert build_levels(path, 2) == 2
    np.testing.assert_array_equal(level(path, 1), coarser(array, "mean"))


def test_whole_levels_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    array = noise(np.uint8)
    path = written(tmp_path / "v.zarr", array)
    build_levels(path, 2)
    kept = (path / "1" / "zarr.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        assert build_levels(path, 3) == 3
    assert [record.args[1] for record in caplog.records if record.args] == [2]  # type: ignore[index]
    assert (path / "1" / "zarr.json").stat().st_mtime_ns == kept
    monkeypatch.setattr(ome_zarr, "fill_level", None)
    assert build_levels(path, 3) == 3
    assert build_levels(path, 2) == 3


def test_levels_are_rebuilt_on_request(tmp_path: Path) -> None:
    path = written(tmp_path / "v.zarr", noise(np.uint8))
    build_levels(path, 3)
    zarr.open_group(path, mode="r+")["0"][...] = 5
    build_levels(path, 3)
    assert not (level(path, 2) == 5).all()
    build_levels(path, 3, rebuild=True)
    assert (level(path, 2) == 5).all()
    assert levels_named(path) == ["0", "1", "2"]


@pytest.mark.parametrize("depth", [32, 256])
def test_memory_does_not_grow_with_the_volume(depth: int) -> None:
    read: list[int] = []

    class Finer:
        shape = (depth, 64, 64)

        def __getitem__(self, index: tuple[slice, ...]) -> NDArray[Any]:
            part = np.zeros([piece.stop - piece.start for piece in index], np.uint8)
            read.append(part.nbytes)
            return part

    stored: list[int] = []

    class Target:
        shape, dtype = (depth // 2, 32, 32), np.dtype(np.uint8)
        chunks, shards = (8, 8, 8), (16, 16, 16)

        def __setitem__(self, index: tuple[slice, ...], part: NDArray[Any]) -> None:
            stored.append(part.nbytes)

    fill_level(Target(), Finer(), (2, 2, 2), "mean")
    assert max(read) == 16**3
    assert max(stored) == 16**3
    assert sum(read) == depth * 64 * 64
    assert sum(stored) == depth // 2 * 32 * 32


@pytest.mark.parametrize(
    ("dtype", "settings", "message"),
    [
        (np.uint8, {"reduce": "median"}, "mean, nearest, max"),
        (np.int64, {}, "which are labels"),
        (bool, {}, "which are labels"),
        (np.uint8, {"levels": 0}, "at least 1"),
    ],
)
def test_levels_that_cannot_be_are_refused(
    tmp_path: Path, dtype: Any, settings: Any, message: str
) -> None:
    path = written(tmp_path / "v.zarr", noise(dtype))
    with pytest.raises(ConfigurationError, match=message):
        build_levels(path, **settings)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        build_levels(tmp_path / "none.zarr")
    zarr.create_group(tmp_path / "group.zarr")
    with pytest.raises(InputError, match="no multiscales"):
        build_levels(tmp_path / "group.zarr")


# Metadata


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("spacing", [None, (3.0, 2.0, 1.0)])
def test_what_is_created_is_valid(
    tmp_path: Path, zarr_format: Any, channels: int | None, spacing: Any
) -> None:
    path = tmp_path / "v.zarr"
    layout: Any = {"zarr_format": zarr_format, "channels": channels, "spacing": spacing}
    create_ome_zarr(path, SHAPE, np.uint8, (8, 8, 8), **layout)
    validate_ome_zarr(path)
    build_levels(path, 3)
    validate_ome_zarr(path)
    version = {2: "0.4", 3: "0.5"}[zarr_format]
    content = metadata(path)
    assert version in (content.get("version"), content["multiscales"][0].get("version"))
    units = [axis.get("unit") for axis in content["multiscales"][0]["axes"][-3:]]
    assert units == [None if spacing is None else "micrometer"] * 3
    assert open_volume(path).unit == units[0]


BREAKS: dict[str, tuple[Any, str]] = {
    "version": (lambda m: m.update(version="0.3"), "version '0.3'"),
    "axes": (lambda m: m["axes"].reverse(), "dimension_names"),
    "order": (lambda m: m["axes"][2].update(type="channel"), "axes of types"),
    "kind": (lambda m: m["axes"][2].update(type="depth"), "axes of types"),
    "unit": (lambda m: m["axes"][2].update(unit="um"), "unit 'um'"),
    "twice": (lambda m: m["axes"][1].update(name="z"), "two axes of one name"),
    "absent": (lambda m: m["datasets"][1].update(path="9"), "level '9' is not there"),
    "swapped": (lambda m: m["datasets"].reverse(), "finer than the one before"),
    "scale": (
        lambda m: m["datasets"][1]["coordinateTransformations"].pop(0),
        "expected a scale",
    ),
    "zero": (
        lambda m: m["datasets"][0]["coordinateTransformations"][0].update(scale=[1, 0, 1]),
        "expected positive",
    ),
    "length": (
        lambda m: m["datasets"][0]["coordinateTransformations"][0].update(scale=[1, 1]),
        "expected 3 numbers",
    ),
    "none": (lambda m: m.pop("datasets"), "without datasets"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_metadata_are_found(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path / "v.zarr", noise(np.uint8))
    build_levels(path, 2)
    root = zarr.open_group(path, mode="r+")
    content = copy.deepcopy(dict(root.attrs)["ome"])
    change, message = BREAKS[kind]
    change(content if kind == "version" else content["multiscales"][0])
    root.attrs["ome"] = content
    with pytest.raises(InputError, match=message) as caught:
        validate_ome_zarr(path)
    assert "\n" not in str(caught.value)


def test_zarr_2_with_flat_chunk_names_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "v.zarr", noise(np.uint8), zarr_format=2)
    root = zarr.open_group(path, mode="r+")
    root.create_array("0", shape=SHAPE, dtype=np.uint8, overwrite=True)
    with pytest.raises(InputError, match="separates chunk numbers"):
        validate_ome_zarr(path)
