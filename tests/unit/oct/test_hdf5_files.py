"""HDF5 files of B-scans: both spellings, what is refused, what is read when."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.oct.hdf5_bscans import Hdf5BScans
from pipeline.oct.hdf5_files import read_hdf5

COUNT, HEIGHT, WIDTH = 5, 40, 12
Edit = Callable[[h5py.File], None]


def grey(dtype: Any = np.uint8, white: float = 255) -> NDArray[Any]:
    values = np.random.default_rng(0).random((COUNT, HEIGHT, WIDTH))
    values.flat[:2] = 0, 1
    return (values * white).astype(dtype)


def curves(dtype: Any = np.float32) -> dict[str, NDArray[Any]]:
    ilm = np.random.default_rng(1).uniform(5, 15, (COUNT, WIDTH)).astype(dtype)
    ilm[1, 3:5] = np.nan
    return {"ILM": ilm, "BM": (ilm + 12).astype(dtype)}


def spelling_a(
    path: Path,
    images: NDArray[Any] | None = None,
    layers: dict[str, NDArray[Any]] | None = None,
    names: list[str] | None = None,
    **storage: Any,
) -> Path:
    storage = storage or {"maxshape": (None, HEIGHT, WIDTH), "compression": "gzip"}
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=grey() if images is None else images, **storage)
        for name, rows in (curves() if layers is None else layers).items():
            file[f"layers/{name}"] = rows
        if names is not None:
            file.create_dataset("names", data=names, dtype=h5py.string_dtype())
    return path


def spelling_b(path: Path, scale: float = 1.0, **more: Any) -> Path:
    rows = curves(np.float64)
    maps = np.stack([rows["ILM"], rows["BM"] - 3, rows["BM"]], axis=-1) * scale
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=grey(np.float32, 1), chunks=(1, HEIGHT, WIDTH))
        file["layer_maps"] = maps
        file["layer_names"] = np.array([b"ILM", b"RPEDC", b"BM"])
        file["patient_indices"] = np.array([7, 7, 7, 9, 9])
        file["splits/train"] = np.arange(3)
        for name, values in more.items():
            del file[name]
            file[name] = values
    return path


def edited(path: Path, edit: Edit) -> Path:
    with h5py.File(path, "a") as file:
        edit(file)
    return path


def refusal(path: Path) -> str:
    """Return the one line with which the file is refused, its path cut off."""
    with pytest.raises(InputError) as caught:
        read_hdf5(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text[len(f"{path}: ") :]


class TestWhatIsRead:
    def test_spelling_a_gives_bscans_rows_names_and_subjects(self, tmp_path: Path) -> None:
        names = [f"S{index // 2}_x_OD_{index}_1" for index in range(COUNT)]
        volume = read_hdf5(spelling_a(tmp_path / "a.h5", names=names))
        assert volume.source_format == "hdf5"
        assert volume.bscans.shape == (COUNT, HEIGHT, WIDTH)
        np.testing.assert_array_equal(volume.bscans[:], grey())
        assert list(volume.layers) == ["BM", "ILM"]
        for name, rows in curves().items():
            assert volume.layers[name].dtype == np.float32
            np.testing.assert_array_equal(volume.layers[name], rows)
        assert list(volume.names) == names
        assert list(volume.subjects) == ["S0_x", "S0_x", "S1_x", "S1_x", "S2_x"]
        assert (volume.white, volume.laterality, volume.notes) == (255, "OD", ())

    def test_spelling_b_gives_the_same_form(self, tmp_path: Path) -> None:
        volume = read_hdf5(spelling_b(tmp_path / "b.h5"))
        assert volume.source_format == "hdf5_layer_maps"
        assert list(volume.layers) == ["ILM", "RPEDC", "BM"]
        np.testing.assert_array_equal(volume.layers["BM"], curves(np.float64)["BM"])
        assert list(volume.subjects) == ["7", "7", "7", "9", "9"]
        assert list(volume.names) == [f"b_{index:04d}" for index in range(COUNT)]
        assert volume.white == 1
        assert volume.notes == ("splits stored in the file are not used",)

    def test_a_file_without_annotation_has_no_rows_and_says_so(self, tmp_path: Path) -> None:
        volume = read_hdf5(spelling_a(tmp_path / "a.h5", layers={}))
        assert volume.layers == {}
        assert volume.notes == ("no annotated rows in the file",)

    def test_names_of_another_pattern_give_no_subject(self, tmp_path: Path) -> None:
        names = ["P1_OD_1_1", "P1_OS_1_1", "scan", "P1_1_1_1", "a_b_OD_1"]
        volume = read_hdf5(spelling_a(tmp_path / "a.h5", names=names))
        assert list(volume.subjects) == ["P1", "P1", "", "", ""]
        assert volume.laterality is None

    def test_rows_as_fractions_of_the_height_are_multiplied_by_it(self, tmp_path: Path) -> None:
        volume = read_hdf5(spelling_b(tmp_path / "b.h5", scale=1 / HEIGHT))
        np.testing.assert_allclose(volume.layers["ILM"], curves(np.float64)["ILM"], atol=1e-9)
        assert f"rows were fractions of the height: multiplied by {HEIGHT}" in volume.notes

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_fractions_keep_their_type_where_it_has_room(self, tmp_path: Path, dtype: Any) -> None:
        layers = {name: rows / HEIGHT for name, rows in curves(dtype).items()}
        volume = read_hdf5(spelling_a(tmp_path / "a.h5", layers=layers))
        assert volume.layers["ILM"].dtype == np.result_type(dtype, np.float32)

    def test_whole_rows_become_float(self, tmp_path: Path) -> None:
        layers = {"ILM": np.full((COUNT, WIDTH), 7), "BM": np.full((COUNT, WIDTH), 30)}
        volume = read_hdf5(spelling_a(tmp_path / "a.h5", layers=layers))
        assert volume.layers["ILM"].dtype == np.float64

    def test_crossing_rows_are_counted_and_left(self, tmp_path: Path) -> None:
        layers = curves()
        layers["BM"][0, :3] = 1
        volume = read_hdf5(spelling_a(tmp_path / "a.h5", layers=layers))
        np.testing.assert_array_equal(volume.layers["BM"], layers["BM"])
        assert volume.notes == (f"ILM lies below BM in 3 of {COUNT * WIDTH - 2} columns",)

    def test_rows_a_little_outside_the_image_are_counted_and_left(self, tmp_path: Path) -> None:
        layers = curves()
        layers["BM"][2, :4] = HEIGHT + 1.5
        layers["ILM"][2, 0] = -0.5
        volume = read_hdf5(spelling_a(tmp_path / "a.h5", layers=layers))
        assert volume.notes == (
            "4 rows of BM outside the image, by up to 1.5",
            "1 rows of ILM outside the image, by up to 0.5",
        )

    def test_sizes_come_from_the_attributes(self, tmp_path: Path) -> None:
        def tell(file: h5py.File) -> None:
            file.attrs.update({"scale_y_um": 3.87, "scale_x_um": -1.0, "spacing_um": "wide"})
            file.attrs["source_format"] = "vol"  # it is HDF5, whoever says otherwise

        volume = read_hdf5(edited(spelling_a(tmp_path / "a.h5"), tell))
        assert (volume.scale_y_um, volume.scale_x_um, volume.spacing_um) == (3.87, None, None)
        assert volume.source_format == "hdf5"

    def test_no_name_reaches_a_log_or_an_error(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        names = ["Miller_OD_1_1"] * COUNT
        layers = curves()
        layers["BM"][0, :3] = 1
        with caplog.at_level(logging.DEBUG):
            volume = read_hdf5(spelling_a(tmp_path / "a.h5", names=names, layers=layers))
            layers["BM"][0, 0] = 900
            assert "Miller" not in refusal(
                spelling_a(tmp_path / "b.h5", names=names, layers=layers)
            )
        assert "Miller" not in caplog.text + " ".join(volume.notes)


class TestWhichValueIsWhite:
    @pytest.mark.parametrize(
        ("dtype", "high", "white", "note"),
        [
            (np.uint8, 255, 255, None),
            (np.uint8, 1, 255, None),
            (np.uint16, 65535, 65535, None),
            (np.uint16, 255, 65535, "uint16 images reach 255 of 65535"),
            (np.float16, 1, 1, None),
            (np.float32, 1, 1, None),
            (np.float64, 0.1, 1, None),
            (np.float32, 1.25, 1, None),
            (np.float32, 255, 255, "float32 images reach 255: 255 taken for white"),
            (np.float64, 65535, 65535, "float64 images reach 65535: 65535 taken for white"),
            (np.int64, 255, 255, "int64 images reach 255: 255 taken for white"),
        ],
    )
    def test_type_and_values_say_it(
        self, tmp_path: Path, dtype: Any, high: float, white: float, note: str | None
    ) -> None:
        volume = read_hdf5(spelling_a(tmp_path / "a.h5", grey(dtype, high)))
        assert volume.white == white
        assert len(volume.notes) == (note is not None)
        assert note is None or volume.notes[0].startswith(note)
        # Never cast: a float image from 0 to 1 as uint8 is black.
        assert volume.bscans.dtype == dtype
        np.testing.assert_array_equal(volume.bscans[:], grey(dtype, high))

    @pytest.mark.parametrize(
        "values",
        [(-1.0, 3.0), (0.0, 3.0), (-20.0, 255.0), (0.0, 1e6), (np.nan, 1.0), (0.0, np.inf)],
    )
    def test_other_scales_are_refused(self, tmp_path: Path, values: tuple[float, float]) -> None:
        images = grey(np.float32, 1)
        images[0, 0, :2] = values
        assert re.match(
            r"float32 images from .* to .*, expected 0\.\.1, 0\.\.255",
            refusal(spelling_a(tmp_path / "a.h5", images)),
        )

    @pytest.mark.parametrize("value", [200, np.nan])
    def test_a_bscan_of_another_scale_is_refused_when_it_is_read(
        self, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.oct.hdf5_files._SAMPLED", 2)
        images = grey(np.float32, 1)
        images[2, 3, 3] = value
        bscans = read_hdf5(spelling_a(tmp_path / "a.h5", images)).bscans
        np.testing.assert_array_equal(bscans[0:2], images[0:2])
        with pytest.raises(InputError, match="B-scans 2 to 2, where 1 is white"):
            bscans[2]


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        "shape", [(COUNT - 1, WIDTH), (COUNT + 1, WIDTH), (COUNT, WIDTH - 1), (COUNT,)]
    )
    def test_rows_that_do_not_fit_the_bscans(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        layers = curves() | {"ILM": np.full(shape, 7.0)}
        line = refusal(spelling_a(tmp_path / "a.h5", layers=layers))
        assert line.startswith(
            f"/layers/ILM has shape {shape} of float64, expected {(COUNT, WIDTH)} of numbers"
        )

    @pytest.mark.parametrize(
        ("name", "values", "line"),
        [
            ("layer_maps", np.ones((COUNT - 1, WIDTH, 3)), r"/layer_maps has shape \(4, 12, 3\)"),
            ("layer_maps", np.ones((COUNT, 3, WIDTH)), r"/layer_maps has shape \(5, 3, 12\)"),
            ("layer_maps", np.ones((COUNT, WIDTH)), r"/layer_maps has shape \(5, 12\)"),
            ("layer_names", np.array([b"ILM"]), r"/layer_names has shape \(1,\)"),
            ("layer_names", np.arange(3), r"/layer_names has .* expected \(3,\) of text"),
            ("patient_indices", np.arange(4), r"/patient_indices has shape \(4,\)"),
            ("images", np.ones((COUNT, HEIGHT)), r"/images has shape \(5, 40\) of float64"),
            ("images", np.array([[[b"a"]]]), r"/images has shape \(1, 1, 1\) of \|S1"),
        ],
    )
    def test_arrays_of_spelling_b_that_do_not_fit(
        self, tmp_path: Path, name: str, values: NDArray[Any], line: str
    ) -> None:
        assert re.match(line, refusal(spelling_b(tmp_path / "b.h5", **{name: values})))

    def test_boundaries_without_names(self, tmp_path: Path) -> None:
        path = spelling_b(tmp_path / "b.h5", layer_maps=np.full((COUNT, WIDTH, 2), 9.0))
        line = refusal(edited(path, lambda file: file.pop("layer_names")))
        assert line.startswith("/layer_maps holds 2 boundaries without /layer_names")

    def test_fewer_names_than_bscans(self, tmp_path: Path) -> None:
        line = refusal(spelling_a(tmp_path / "a.h5", names=["a"]))
        assert line.startswith("/names has shape (1,)")

    def test_other_keys(self, tmp_path: Path) -> None:
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            file["data"], file["label"] = grey(), np.zeros(3)
        assert refusal(path) == (
            "no /images; found data, label, expected /images (N, H, W) with /layers/<NAME> (N, W) "
            "or /layer_maps (N, W, K)"
        )

    def test_rows_in_another_frame(self, tmp_path: Path) -> None:
        layers = {name: rows * 2 for name, rows in curves().items()}
        line = refusal(spelling_a(tmp_path / "a.h5", layers=layers))
        assert re.match(r"layer BM has \d+ rows outside the image, the furthest by .*0 to 40", line)

    @pytest.mark.parametrize("value", [np.inf, -np.inf, -999, 65535])
    def test_rows_that_mark_something(self, tmp_path: Path, value: float) -> None:
        layers = curves()
        layers["ILM"][1, 1] = value
        assert "outside the image" in refusal(spelling_a(tmp_path / "a.h5", layers=layers))

    def test_minus_one_for_not_annotated(self, tmp_path: Path) -> None:
        layers = curves()
        layers["ILM"][1, 1:4] = -1
        line = refusal(spelling_a(tmp_path / "a.h5", layers=layers))
        assert line.startswith("layer ILM is -1 in 3 columns")
        assert line.endswith("store NaN there")

    def test_zero_for_not_annotated(self, tmp_path: Path) -> None:
        layers = curves()
        for rows in layers.values():
            rows[1, 1:4] = 0
        line = refusal(spelling_a(tmp_path / "a.h5", layers=layers))
        assert line.startswith("ILM and BM are both 0 in 3 columns")

    def test_exchanged_names(self, tmp_path: Path) -> None:
        rows = curves()
        path = spelling_a(tmp_path / "a.h5", layers={"ILM": rows["BM"], "BM": rows["ILM"]})
        assert refusal(path).endswith("are their names exchanged?")

    @pytest.mark.parametrize("name", ["images", "layers", "layers/ILM", "names"])
    @pytest.mark.parametrize("kind", ["soft", "external", "dangling"])
    def test_links_are_not_followed(self, tmp_path: Path, name: str, kind: str) -> None:
        names = ["a"] * COUNT
        other = spelling_a(tmp_path / "other.h5", names=names)

        def link(file: h5py.File) -> None:
            file.move(name, "elsewhere")
            file[name] = {
                "soft": h5py.SoftLink("/elsewhere"),
                "external": h5py.ExternalLink(str(other), f"/{name}"),
                "dangling": h5py.ExternalLink("nowhere.h5", "/x"),
            }[kind]

        line = refusal(edited(spelling_a(tmp_path / "a.h5", names=names), link))
        assert "is a link to elsewhere; copy the data into the file" in line

    def test_external_storage_is_not_read(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(bytes(COUNT * HEIGHT * WIDTH))

        def store(file: h5py.File) -> None:
            del file["images"]
            shape = (COUNT, HEIGHT, WIDTH)
            where = [(str(secret), 0, COUNT * HEIGHT * WIDTH)]
            file.create_dataset("images", shape, np.uint8, external=where)

        line = refusal(edited(spelling_a(tmp_path / "a.h5"), store))
        assert line == "/images has its data in other files; copy them into this one"

    def test_a_virtual_dataset_is_not_read(self, tmp_path: Path) -> None:
        other = spelling_a(tmp_path / "other.h5")

        def store(file: h5py.File) -> None:
            layout = h5py.VirtualLayout((COUNT, WIDTH), np.float32)
            layout[:] = h5py.VirtualSource(str(other), "layers/ILM", (COUNT, WIDTH))
            del file["layers/ILM"]
            file.create_virtual_dataset("layers/ILM", layout)

        line = refusal(edited(spelling_a(tmp_path / "a.h5"), store))
        assert line == "/layers/ILM has its data in other files; copy them into this one"

    @pytest.mark.parametrize("kept", [0, 7, 100, 2000])
    def test_a_file_cut_short(self, tmp_path: Path, kept: int) -> None:
        path = spelling_a(tmp_path / "a.h5")
        path.write_bytes(path.read_bytes()[:kept])
        assert refusal(path).startswith("damaged, cut short or not supported: ")

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "a.h5") == "not found"

    def test_a_damaged_bscan_is_refused_when_it_is_read(self, tmp_path: Path) -> None:
        path = spelling_a(tmp_path / "a.h5", chunks=(1, HEIGHT, WIDTH), compression="gzip")
        bscans = read_hdf5(path).bscans
        with h5py.File(path) as file:
            chunk = file["images"].id.get_chunk_info(3)
        data = bytearray(path.read_bytes())
        data[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
        path.write_bytes(data)
        np.testing.assert_array_equal(bscans[2], grey()[2])
        with pytest.raises(InputError, match="damaged, cut short"):
            bscans[3]

    def test_announced_sizes_are_compared_with_the_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", "100000")
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("images", (3, 100_000, 100_000), np.uint8, chunks=(1, 100, 100))
        assert refusal(path).startswith("a B-scan: shape (100000, 100000) needs 10,000 MB")


class TestBScansOnDemand:
    @pytest.mark.parametrize("chunks", [None, (1, HEIGHT, WIDTH), (3, 7, 5)])
    @pytest.mark.parametrize(
        "index",
        [0, -1, np.int64(2), *(slice(*one) for one in (
            (None,), (1, 3), (3, 1), (None, None, 2), (None, None, -1), (4, 0, -3), (-2, 99),
        ))],
    )  # fmt: skip
    def test_indexing_is_that_of_an_array(self, tmp_path: Path, chunks: Any, index: Any) -> None:
        path = spelling_a(tmp_path / "a.h5", chunks=chunks)
        found = Hdf5BScans(path, "images")[index]
        expected = grey()[index]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(found, expected)

    def test_iteration_ends(self, tmp_path: Path) -> None:
        bscans = Hdf5BScans(spelling_a(tmp_path / "a.h5"), "images")
        np.testing.assert_array_equal(np.stack(list(bscans)), grey())
        with pytest.raises(IndexError):
            bscans[COUNT]

    def test_a_pickled_volume_opens_the_file_anew(self, tmp_path: Path) -> None:
        volume = read_hdf5(spelling_a(tmp_path / "a.h5"))
        assert volume.bscans[0].any()  # open now
        again = pickle.loads(pickle.dumps(volume))
        np.testing.assert_array_equal(again.bscans[:], grey())

    def test_a_forked_worker_does_not_use_its_parents_handle(self, tmp_path: Path) -> None:
        bscans = read_hdf5(spelling_a(tmp_path / "a.h5")).bscans
        before = bscans[1]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            read = pool.map(bscans.__getitem__, range(COUNT))
        np.testing.assert_array_equal(np.stack(read), grey())
        np.testing.assert_array_equal(bscans[1], before)

    def test_a_file_exchanged_in_between_is_noticed(self, tmp_path: Path) -> None:
        path = spelling_a(tmp_path / "a.h5")
        bscans = pickle.loads(pickle.dumps(read_hdf5(path).bscans))
        spelling_a(path, grey(np.uint16, 65535))
        with pytest.raises(InputError, match="the file was changed while in use"):
            bscans[0]

    def test_reading_by_bscan_never_holds_them_all(self, tmp_path: Path) -> None:
        path, shape = tmp_path / "a.h5", (400, 124, 192)
        with h5py.File(path, "w") as file:  # in the chunks that h5py chooses: of 25 B-scans
            images = file.create_dataset("images", shape, np.uint8, compression="gzip")
            assert images.chunks[0] > 10
            images[::50] = 200
            file["layers/ILM"] = np.full((400, 192), 20.0, np.float32)
        tracemalloc.start()
        try:
            volume = read_hdf5(path)
            read = sum(int(volume.bscans[index].any()) for index in range(shape[0]))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert read == 8
        assert peak < int(np.prod(shape)) // 5

    def test_a_file_keeps_the_chunks_that_neighbours_share(self, tmp_path: Path) -> None:
        shape, chunks = (16, 1000, 1000), (16, 300, 500)
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("images", shape, np.uint8, chunks=chunks)
        bscans = Hdf5BScans(tmp_path / "a.h5", "images")
        _, cache_bytes, _ = bscans._dataset().id.get_access_plist().get_chunk_cache()
        assert cache_bytes == 16 * 1200 * 1000
