"""Exports: the tree, the way back, what is left after an error."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError, InputError, ResourceError
from pipeline.oct.coordinates import Layers
from pipeline.oct.hdf5_files import read_hdf5
from pipeline.oct.prediction_files import read_predictions, write_predictions
from pipeline.oct.prediction_rows import StoredRows
from pipeline.oct.prediction_writer import PredictionWriter
from pipeline.oct.volume import OctVolume

COUNT, HEIGHT, WIDTH = 5, 24, 10
MASK_FRAME = (16, 12)


def volume(**changes: Any) -> OctVolume:
    generator = np.random.default_rng(0)
    ilm = generator.uniform(4, 9, (COUNT, WIDTH)).astype(np.float32)
    ilm[0, :2] = np.nan
    known = {
        "path": Path("eye.vol"),
        "source_format": "vol",
        "bscans": generator.integers(0, 256, (COUNT, HEIGHT, WIDTH), dtype=np.uint8),
        "layers": {"ILM": ilm, "BM": (ilm + 8).astype(np.float64)},
        "names": [f"eye_{index}" for index in range(COUNT)],
        "subjects": ["", "a", "a", "b", "ü"],
        "white": 255.0,
        "scale_y_um": 3.87,
        "laterality": "OS",
        "notes": ("gaps stay NaN",),
    }
    return OctVolume(**{**known, **changes})


def rows(count: int = COUNT, width: int = WIDTH, dtype: Any = np.float32) -> StoredRows:
    generator = np.random.default_rng(1)
    ilm, sigma = generator.uniform(0, 9, (2, count, width)).astype(dtype)
    valid = generator.random((2, count, width)) < 0.7
    return StoredRows(ilm, ilm + dtype(7.5), sigma, sigma * dtype(2), valid[0], valid[1])


def maps(count: int = COUNT) -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(2)
    return {
        "masks": generator.integers(0, 3, (count, *MASK_FRAME)),
        "confidence": generator.random((count, *MASK_FRAME), dtype=np.float32),
    }


def assert_same_bits(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


def assert_same_volume(found: OctVolume, expected: OctVolume) -> None:
    assert_same_bits(found.bscans[:], expected.bscans[:])
    assert set(found.layers) == set(expected.layers)
    for name, values in expected.layers.items():
        assert_same_bits(found.layers[name], values)
    for field in dataclasses.fields(OctVolume):
        if field.name in ("names", "subjects", "notes"):
            assert list(getattr(found, field.name)) == list(getattr(expected, field.name))
        elif field.name not in ("path", "bscans", "layers"):
            assert getattr(found, field.name) == getattr(expected, field.name), field.name


def assert_same_rows(found: StoredRows, expected: StoredRows) -> None:
    for field in dataclasses.fields(StoredRows):
        assert_same_bits(getattr(found, field.name), getattr(expected, field.name))


def bits(dtype: str, shape: tuple[int, ...]) -> st.SearchStrategy[NDArray[Any]]:
    """Give floats of every bit pattern: each NaN, the signalling ones too, infinities, -0."""
    whole = np.dtype(dtype).str.replace("f", "u")
    return arrays.arrays(whole, shape).map(lambda array: array.view(dtype))


TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8
)  # fmt: skip
SIZES = st.none() | st.floats(1e-3, 1e6)


@st.composite
def handed_in(draw: st.DrawFn) -> tuple[OctVolume, StoredRows, dict[str, NDArray[Any]]]:
    count, height, width = (draw(st.integers(1, n)) for n in (11, 4, 5))
    floats = st.sampled_from(["<f2", "<f4", "<f8", ">f4", ">f8"])
    shape = (count, width)
    kinds = st.sampled_from(["|u1", "<u2", ">u2", "<i2"])
    images = st.one_of(
        kinds.flatmap(lambda kind: arrays.arrays(kind, (count, height, width))),
        floats.flatmap(lambda kind: bits(kind, (count, height, width))),
    )
    names = st.sampled_from(["ILM", "BM", "ELM", "PR1", "RPE", "ONL"])
    texts = st.lists(TEXT, min_size=count, max_size=count)
    given_volume = OctVolume(
        path=Path("source.h5"),
        source_format=draw(st.sampled_from(["vol", "hdf5", "duke_mat"])),
        bscans=draw(images),
        layers=draw(st.dictionaries(names, floats.flatmap(lambda kind: bits(kind, shape)))),
        names=draw(texts),
        subjects=draw(texts),
        white=draw(st.sampled_from([1.0, 255.0, 65535.0])),
        scale_x_um=draw(SIZES),
        scale_y_um=draw(SIZES),
        spacing_um=draw(SIZES),
        laterality=draw(st.sampled_from([None, "OD", "OS"])),
        scan_pattern=draw(st.sampled_from([None, "line", "circle", "volume"])),
        notes=draw(st.lists(TEXT, max_size=3)),
    )
    kind = draw(st.sampled_from(["<f4", "<f8"]))
    valid = arrays.arrays(bool, shape)
    predicted = StoredRows(*(draw(bits(kind, shape)) for _ in range(4)), draw(valid), draw(valid))
    given_maps = {}
    if draw(st.booleans()):
        given_maps["masks"] = draw(
            arrays.arrays(np.uint8, (count, 3, 2), elements=st.integers(0, 2))
        )
    if draw(st.booleans()):
        given_maps["confidence"] = draw(bits("<f4", (count, 3, 2)))
    return given_volume, predicted, given_maps


class TestTheWayBack:
    @given(handed_in())
    def test_importing_an_export_gives_back_every_bit(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        case: tuple[OctVolume, StoredRows, dict[str, NDArray[Any]]],
    ) -> None:
        given_volume, predicted, given_maps = case
        path = tmp_path_factory.getbasetemp() / "law" / "export.h5"
        write_predictions(path, given_volume, predicted, **given_maps)
        found = read_predictions(path)
        assert_same_volume(found.volume, given_volume)
        assert_same_rows(found.rows, predicted)
        assert (found.masks is not None) == ("masks" in given_maps)
        assert (found.confidence is not None) == ("confidence" in given_maps)
        for name, array in given_maps.items():
            assert_same_bits(getattr(found, name)[:], array)

    def test_an_export_of_an_import_is_the_same_file(self, tmp_path: Path) -> None:
        first = write_predictions(tmp_path / "1.h5", volume(), rows(), timestamp="now", **maps())
        stored = read_predictions(first)
        second = write_predictions(
            tmp_path / "2.h5",
            stored.volume,
            stored.rows,
            masks=stored.masks,
            confidence=stored.confidence,
            timestamp="now",
        )
        assert second.read_bytes() == first.read_bytes()

    def test_an_export_is_read_like_any_hdf5(self, tmp_path: Path) -> None:
        # All rows below 1.5: fractions of the height in a foreign file, rows in our own.
        layers = {"BM": np.full((COUNT, WIDTH), 1.25)}
        path = write_predictions(tmp_path / "1.h5", volume(layers=layers), rows())
        assert_same_volume(read_hdf5(path), volume(layers=layers))

    def test_names_of_files_that_are_not_utf8_come_back(self, tmp_path: Path) -> None:
        names = [os.fsdecode(b"\xe9ye")] * COUNT
        path = write_predictions(tmp_path / "1.h5", volume(names=names), rows())
        assert list(read_predictions(path).volume.names) == names

    def test_what_extraction_gives_is_taken_as_it_is(self, tmp_path: Path) -> None:
        layers = Layers(**vars(rows()))
        found = read_predictions(write_predictions(tmp_path / "1.h5", volume(), layers)).rows
        assert_same_bits(found.bm_px, layers.bm_px)
        assert_same_bits(found.ilm_valid, layers.ilm_valid)

    def test_metadata_come_back_in_pythons_types(self, tmp_path: Path) -> None:
        metadata = {"seed": 3, "fold": None, "mean": 0.5, "flip": True, "size": [480, 768]}
        path = write_predictions(
            tmp_path / "1.h5", volume(), rows(), metadata=metadata, split="test", timestamp="now"
        )
        found = dict(read_predictions(path).metadata)
        assert found == {
            "seed": 3,
            "fold": "None",
            "mean": 0.5,
            "flip": True,
            "size": "[480, 768]",
            "split": "test",
            "dataset_size": COUNT,
            "model_architecture": "",
            "inference_timestamp": "now",
        }

    def test_a_file_of_another_program_is_no_export(self, tmp_path: Path) -> None:
        with h5py.File(tmp_path / "1.h5", "w") as file:
            file["images"] = volume().bscans
            file["predicted_layers/ILM"] = np.zeros((COUNT, WIDTH))
        with pytest.raises(InputError, match=r"1\.h5: no attribute row_convention"):
            read_predictions(tmp_path / "1.h5")

    @pytest.mark.parametrize("name", ["predicted_layers_raw/BM", "column_valid", "metadata"])
    def test_an_export_with_a_part_missing_is_refused(self, tmp_path: Path, name: str) -> None:
        path = write_predictions(tmp_path / "1.h5", volume(), rows())
        with h5py.File(path, "a") as file:
            del file[name]
        with pytest.raises(InputError, match=rf"1\.h5: no /{name.split('/')[0]}"):
            read_predictions(path)


class TestTheTree:
    def test_every_dataset_is_where_the_original_has_it(self, tmp_path: Path) -> None:
        path = write_predictions(tmp_path / "1.h5", volume(), rows(), **maps())
        curve, frame = (COUNT, WIDTH), (COUNT, *MASK_FRAME)
        expected = {
            "images": ((COUNT, HEIGHT, WIDTH), "uint8"),
            "layers/ILM": (curve, "float32"),
            "layers/BM": (curve, "float64"),
            "names": ((COUNT,), "object"),
            "subjects": ((COUNT,), "object"),
            "prediction_masks": (frame, "uint8"),
            "confidence_maps": (frame, "float32"),
        }
        for name in ("ILM", "BM"):
            expected |= {
                f"predicted_layers/{name}": (curve, "float32"),
                f"predicted_layers_raw/{name}": (curve, "float32"),
                f"column_sigma/{name}": (curve, "float32"),
                f"column_valid/{name}": (curve, "uint8"),
            }
        found = {}

        def visit(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset):
                found[name] = (node.shape, str(node.dtype))
                assert node.compression == "gzip", name
            else:
                groups.append(name)

        groups: list[str] = []
        with h5py.File(path) as file:
            file.visititems(visit)
            attributes = dict(file.attrs)
            info = dict(file["dataset_info"].attrs)
        assert found == expected
        assert {"metadata", "dataset_info", "layers"} < set(groups)
        assert attributes["frame"] == "original"
        assert attributes["row_convention"] == "first row of lower class"
        assert attributes["scale_y_um"] == 3.87
        assert attributes["mask_frame"] == "16x12"
        assert info["num_samples"] == COUNT
        assert (info["image_height"], info["image_width"]) == (HEIGHT, WIDTH)
        assert info["prediction_classes"] == 3
        assert {"creation_date", "model_path"} < set(info)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_predicted_rows_are_nan_where_they_are_not_valid(
        self, tmp_path: Path, dtype: Any
    ) -> None:
        predicted = rows(dtype=dtype)
        path = write_predictions(tmp_path / "1.h5", volume(), predicted)
        with h5py.File(path) as file:
            found, raw = file["predicted_layers/BM"][:], file["predicted_layers_raw/BM"][:]
        assert_same_bits(raw, predicted.bm_px)
        assert_same_bits(found[predicted.bm_valid], predicted.bm_px[predicted.bm_valid])
        assert np.isnan(found[~predicted.bm_valid]).all()
        assert 0 < np.isnan(found).sum() < found.size

    def test_without_maps_there_is_no_mask_frame(self, tmp_path: Path) -> None:
        path = write_predictions(tmp_path / "1.h5", volume(scale_y_um=None, layers={}), rows())
        with h5py.File(path) as file:
            assert not {"prediction_masks", "confidence_maps"} & set(file)
            assert not {"mask_frame", "scale_y_um", "scan_pattern"} & set(file.attrs)
            assert list(file["layers"]) == []

    def test_the_summary_says_what_came_out(self, tmp_path: Path) -> None:
        predicted = rows()
        write_predictions(
            tmp_path / "eye.h5",
            volume(),
            predicted,
            model_path="models/model.pt",
            model_architecture="UNet",
            split="test",
            timestamp="2026-01-01T00:00:00+00:00",
        )
        found = json.loads((tmp_path / "inference_summary_eye.json").read_text("utf-8"))
        valid = predicted.ilm_valid
        ilm = found["layers"]["ILM"]
        assert found["predictions"] == "eye.h5"
        assert found["dataset_size"] == COUNT
        assert found["model_path"] == "models/model.pt"
        assert found["inference_timestamp"] == "2026-01-01T00:00:00+00:00"
        assert (ilm["columns"], ilm["valid_columns"]) == (valid.size, valid.sum())
        assert ilm["coverage_percent"] == pytest.approx(100 * valid.mean())
        assert ilm["mean_row_px"] == pytest.approx(predicted.ilm_px[valid].mean())
        assert ilm["min_row_px"] == predicted.ilm_px[valid].min()
        assert ilm["max_row_px"] == predicted.ilm_px[valid].max()
        assert ilm["mean_sigma_px"] == pytest.approx(predicted.ilm_sigma_px[valid].mean())
        assert found["mean_thickness_px"] == pytest.approx(7.5)
        assert found["mean_thickness_um"] == pytest.approx(7.5 * 3.87)

    def test_the_summary_goes_where_it_is_wanted(self, tmp_path: Path) -> None:
        where = tmp_path / "others" / "eye.json"
        write_predictions(tmp_path / "eye.h5", volume(), rows(), summary_path=where)
        assert json.loads(where.read_text("utf-8"))["predictions"] == "eye.h5"
        assert {path.name for path in tmp_path.iterdir()} == {"eye.h5", "others"}

    def test_a_summary_without_a_valid_column_has_no_mean(self, tmp_path: Path) -> None:
        nowhere = np.zeros((COUNT, WIDTH), bool)
        predicted = dataclasses.replace(rows(), ilm_valid=nowhere, bm_valid=nowhere)
        write_predictions(tmp_path / "eye.h5", volume(), predicted)
        found = json.loads((tmp_path / "inference_summary_eye.json").read_text("utf-8"))
        assert found["layers"]["BM"]["mean_row_px"] is None
        assert found["layers"]["BM"]["coverage_percent"] == 0
        assert found["mean_thickness_um"] is None


def part(block: slice) -> StoredRows:
    values = (getattr(rows(), field.name)[block] for field in dataclasses.fields(StoredRows))
    return StoredRows(*values)


def write_in_parts(path: Path, *blocks: slice, **last: Any) -> None:
    """Append what belongs to each block, with further arguments for the last one."""
    with PredictionWriter(path, volume()) as writer:
        for block in blocks:
            more = last if block == blocks[-1] else {}
            writer.append(part(block), **more)


class TestWritingByChunk:
    @pytest.mark.parametrize("size", [1, 2, COUNT])
    @pytest.mark.parametrize("images_given", [False, True])
    def test_the_size_of_a_chunk_does_not_matter(
        self, tmp_path: Path, size: int, images_given: bool
    ) -> None:
        whole = write_predictions(tmp_path / "1.h5", volume(), rows(), timestamp="now", **maps())
        with PredictionWriter(tmp_path / "2.h5", volume(), timestamp="now") as writer:
            for start in range(0, COUNT, size):
                block = slice(start, min(start + size, COUNT))
                writer.append(
                    part(block),
                    images=volume().bscans[block] if images_given else None,
                    **{name: array[block] for name, array in maps().items()},
                )
        found, expected = read_predictions(tmp_path / "2.h5"), read_predictions(whole)
        assert_same_volume(found.volume, expected.volume)
        assert_same_rows(found.rows, expected.rows)
        assert_same_bits(found.masks[:], expected.masks[:])
        figures = [
            json.loads((tmp_path / f"inference_summary_{n}.json").read_text("utf-8"))["layers"]
            for n in (1, 2)
        ]
        for name in ("ILM", "BM"):
            assert figures[0][name] == pytest.approx(figures[1][name])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"images": np.zeros((2, HEIGHT, WIDTH), np.float32)}, "images is .* of float32"),
            ({"images": np.zeros((2, HEIGHT, 3), np.uint8)}, r"images is \(2, 24, 3\)"),
            ({"masks": np.full((2, 3, 3), 3)}, "classes 0, 1 and 2"),
            ({"masks": np.full((2, 3, 3), -1)}, "classes 0, 1 and 2"),
            ({"masks": np.zeros((2, 3, 3))}, "masks are float64"),
            ({"masks": np.zeros((2, 3, 3), int)}, "prediction_masks given for some B-scans only"),
            ({"confidence": np.zeros((2, 3))}, "confidence_maps given for some B-scans only"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            write_in_parts(tmp_path / "1.h5", slice(0, 2), slice(2, 4), **changes)
        assert list(tmp_path.iterdir()) == []

    def test_rows_of_another_width_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"ilm_px is \(5, 9\) of float32, expected \(5, 10\)"):
            write_predictions(tmp_path / "1.h5", volume(), rows(width=WIDTH - 1))

    def test_too_many_bscans_are_refused(self, tmp_path: Path) -> None:
        images = volume().bscans[:2]
        with pytest.raises(ValueError, match="2 B-scans to append, 1 of 5 are left"):
            write_in_parts(tmp_path / "1.h5", slice(0, 4), slice(0, 2), images=images)

    def test_too_few_bscans_leave_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="4 of 5 B-scans were written"):
            write_in_parts(tmp_path / "1.h5", slice(0, 4))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_error_leaves_the_old_file(
        self, tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_predictions(tmp_path / "1.h5", volume(), rows())
        before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}

        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(PredictionWriter, "_count", fail)
        with pytest.raises(error):
            write_predictions(path, volume(names=["other"] * COUNT), rows())
        assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before

    def test_appending_outside_of_with_is_refused(self, tmp_path: Path) -> None:
        writer = PredictionWriter(tmp_path / "1.h5", volume())
        with pytest.raises(ValueError, match="append inside"):
            writer.append(rows())

    def test_the_source_is_never_replaced(self, tmp_path: Path) -> None:
        path = write_predictions(tmp_path / "1.h5", volume(), rows())
        stored = read_predictions(path)
        with pytest.raises(ConfigurationError, match="would replace the file they are made from"):
            write_predictions(tmp_path / "x" / ".." / "1.h5", stored.volume, stored.rows)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"names": ["a"]}, "1 names for 5 B-scans"),
            ({"subjects": []}, "0 subjects for 5 B-scans"),
            ({"names": ["a\0b"] * COUNT}, "names hold a NUL"),
            ({"layers": {"ILM": np.zeros((COUNT - 1, WIDTH))}}, r"layer ILM is \(4, 10\)"),
        ],
    )
    def test_a_volume_that_does_not_fit_itself_is_refused(
        self, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            PredictionWriter(tmp_path / "1.h5", volume(**changes))

    def test_metadata_too_long_for_hdf5_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="config as an attribute"):
            write_predictions(
                tmp_path / "1.h5", volume(), rows(), metadata={"config": ["x"] * 20_000}
            )
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(ResourceError, match="a file stands where a folder is needed"):
            write_predictions(tmp_path / "file" / "1.h5", volume(), rows())

    def test_a_disk_that_fills_up_is_named_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(ResourceError, match="0 MB free, 1 MB needed"):
            write_predictions(tmp_path / "1.h5", volume(), rows())
        assert list(tmp_path.iterdir()) == []

    def test_a_write_that_fails_is_not_dropped(self, tmp_path: Path) -> None:
        """h5py drops errors of writes that its cache puts off, and goes on."""
        images = np.random.default_rng(3).integers(0, 256, (COUNT, 300, WIDTH), dtype=np.uint8)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                write_predictions(tmp_path / "1.h5", volume(bscans=images), rows())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []

    def test_what_the_system_refuses_is_named_however_h5py_raises_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("Unable to flush file (file write failed: errno = 28, error ...)")

        monkeypatch.setattr(PredictionWriter, "_count", fail)
        with pytest.raises(ResourceError, match="No space left on device; free space"):
            write_predictions(tmp_path / "1.h5", volume(), rows())
        assert list(tmp_path.iterdir()) == []

    def test_writing_by_bscan_never_holds_them_all(self, tmp_path: Path) -> None:
        class Drawn:
            shape = (400, 62, 96)
            dtype = np.dtype(np.uint8)

            def __getitem__(self, index: slice) -> NDArray[np.uint8]:
                held = range(400)[index]
                return np.full((len(held), *self.shape[1:]), held.start % 256, np.uint8)

        class DrawnMaps:
            def __getitem__(self, index: slice) -> NDArray[np.float32]:
                return np.full((len(range(400)[index]), 62, 96), 0.5, np.float32)

        large = volume(bscans=Drawn(), layers={}, names=["n"] * 400, subjects=["s"] * 400, notes=())
        predicted = rows(400, 96)
        tracemalloc.start()
        try:
            write_predictions(tmp_path / "1.h5", large, predicted, confidence=DrawnMaps())
            stored = read_predictions(tmp_path / "1.h5")
            assert stored.volume.bscans[399][0, 0] == 399 // 8 * 8 % 256
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # The maps alone are 9.5 MB, the images 2.4 MB; the rows are held, 1 MB on the way back.
        assert peak < 2.2e6
