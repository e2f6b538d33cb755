from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.ome_zarr import build_levels, create_ome_zarr
from pipeline.data.volumes import Volume, open_volume
from pipeline.errors import InputError

Opened = tuple[Volume, NDArray[Any]]
SHAPE = (11, 13, 17)
VOLUME = np.random.default_rng(0).integers(0, 65536, SHAPE, dtype=np.uint16)
FLOATS = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
CHANNELS = np.random.default_rng(2).integers(0, 256, (2, *SHAPE), dtype=np.uint8)


def ome(path: Path, array: NDArray[Any], zarr_format: int, **kw: Any) -> Path:
    channels = array.shape[0] if array.ndim == 4 else None
    settings = {"channels": channels, "zarr_format": zarr_format, **kw}
    target = create_ome_zarr(path, array.shape[-3:], array.dtype, (4, 8, 8), **settings)
    target[...] = array
    return path


def plain_zarr(path: Path, array: NDArray[Any], **kw: Any) -> Path:
    stored = zarr.create_array(path, shape=array.shape, dtype=array.dtype, **kw)
    stored[...] = array
    return path


def zarr_group(path: Path, array: NDArray[Any]) -> Path:
    plain_zarr(path, array, name="volume", chunks=(5, 5, 5))
    return path


def hdf5(path: Path, array: NDArray[Any], **kw: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("scan/volume", data=array, **kw)
        file.create_dataset("mean", data=np.zeros(3))
    return path


def tiff(path: Path, array: NDArray[Any], **kw: Any) -> Path:
    tifffile.imwrite(path, array, photometric="minisblack", **kw)
    return path


def pillow_tiff(path: Path, array: NDArray[Any], **kw: Any) -> Path:
    first, *others = [Image.fromarray(plane) for plane in array]
    first.save(path, save_all=True, append_images=others, **kw)
    return path


def slices(path: Path, array: NDArray[Any], first: int = 8, **kw: Any) -> Path:
    path.mkdir()
    for number, plane in enumerate(array, first):
        tiff(path / f"layer1_{number}.tif", plane, **kw)
    (path / "meta.json").write_text("{}")
    return path


def npy(path: Path, array: NDArray[Any]) -> Path:
    np.save(path, array)
    return path


def nifti(path: Path, array: NDArray[Any], zooms: tuple[float, ...] = (1, 1, 1)) -> Path:
    image = nibabel.Nifti1Image(array.T, np.diag([*zooms, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, path)
    return path


SOURCES: dict[str, tuple[Callable[[Path], Path], NDArray[Any]]] = {
    "ome_0.5.zarr": (lambda path: ome(path, VOLUME, 3), VOLUME),
    "ome_0.4.zarr": (lambda path: ome(path, VOLUME, 2), VOLUME),
    "sharded.zarr": (lambda path: ome(path, FLOATS, 3, shards=(8, 16, 8)), FLOATS),
    "channels.zarr": (lambda path: ome(path, CHANNELS, 3), CHANNELS),
    "one_channel.zarr": (lambda path: ome(path, CHANNELS[:1], 2), CHANNELS[:1]),
    "plain3.zarr": (lambda path: plain_zarr(path, VOLUME, chunks=(5, 5, 5)), VOLUME),
    "plain2.zarr": (lambda path: plain_zarr(path, VOLUME, zarr_format=2, order="F"), VOLUME),
    "five_axes.zarr": (lambda path: plain_zarr(path, CHANNELS[None], chunks="auto"), CHANNELS),
    "big_endian.zarr": (lambda path: plain_zarr(path, VOLUME.astype(">u2")), VOLUME),
    "group.zarr": (lambda path: zarr_group(path, VOLUME), VOLUME),
    "volume.h5": (lambda path: hdf5(path, VOLUME), VOLUME),
    "chunked.h5": (lambda path: hdf5(path, FLOATS, chunks=(4, 4, 4), compression="lzf"), FLOATS),
    "channels.h5": (lambda path: hdf5(path, CHANNELS), CHANNELS),
    "mapped.tif": (lambda path: tiff(path, VOLUME), VOLUME),
    "big_endian.tif": (lambda path: tiff(path, VOLUME, byteorder=">"), VOLUME),
    "imagej.tif": (lambda path: tiff(path, VOLUME, imagej=True), VOLUME),
    "deflate.tif": (lambda path: tiff(path, VOLUME, compression="zlib", predictor=True), VOLUME),
    "lzw.tif": (lambda path: tiff(path, FLOATS, compression="lzw", rowsperstrip=4), FLOATS),
    "tiled.tif": (lambda path: tiff(path, VOLUME, tile=(16, 16), bigtiff=True), VOLUME),
    "big_zlib.tif": (lambda path: tiff(path, VOLUME, compression="zlib", byteorder=">"), VOLUME),
    "pillow.tif": (lambda path: pillow_tiff(path, CHANNELS[0]), CHANNELS[0]),
    "pillow_lzw.tif": (
        lambda path: pillow_tiff(path, CHANNELS[0], compression="tiff_lzw"),
        CHANNELS[0],
    ),
    "slices": (lambda path: slices(path, VOLUME), VOLUME),
    "lzw_slices": (lambda path: slices(path, VOLUME, compression="lzw"), VOLUME),
    "volume.npy": (lambda path: npy(path, VOLUME), VOLUME),
    "fortran.npy": (lambda path: npy(path, np.asfortranarray(FLOATS)), FLOATS),
    "big_endian.npy": (lambda path: npy(path, CHANNELS.astype(">i4")), CHANNELS.astype(np.int32)),
    "volume.nii": (lambda path: nifti(path, VOLUME), VOLUME),
    "volume.nii.gz": (lambda path: nifti(path, FLOATS), FLOATS),
}
starts = st.one_of(st.none(), st.integers(-20, 20))
slice_triples = st.tuples(*[st.builds(slice, starts, starts)] * 3)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    """Every source once, with the array it must equal."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        name: (open_volume(write(folder / name)), array) for name, (write, array) in SOURCES.items()
    }


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=30)
@given(index=slice_triples)
def test_a_part_equals_the_same_part_of_the_array(
    opened: dict[str, Opened], name: str, index: tuple[slice, slice, slice]
) -> None:
    volume, array = opened[name]
    part = volume[index]
    np.testing.assert_array_equal(part, array[(..., *index)], strict=True)


@pytest.mark.parametrize("name", SOURCES)
def test_the_header_says_what_reading_gives(opened: dict[str, Opened], name: str) -> None:
    volume, array = opened[name]
    assert volume.shape == array.shape[-3:]
    assert volume.channels == (array.shape[0] if array.ndim == 4 else None)
    assert volume.dtype == array.dtype
    assert volume.dtype.isnative


@pytest.mark.parametrize("name", SOURCES)
def test_a_part_is_the_callers_to_change(opened: dict[str, Opened], name: str) -> None:
    volume, array = opened[name]
    for index in (np.s_[2:5, 3:7, 1:9], np.s_[:, :, :]):
        volume[index][...] = 0
        np.testing.assert_array_equal(volume[index], array[(..., *index)])


@pytest.mark.parametrize("name", SOURCES)
def test_a_forked_process_reads_for_itself(opened: dict[str, Opened], name: str) -> None:
    volume, array = opened[name]
    volume[0:1]  # opened before the fork
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: sender.send(volume[3:6, 2:9]))
    child.start()
    assert receiver.poll(30)
    np.testing.assert_array_equal(receiver.recv(), array[..., 3:6, 2:9, :])
    child.join()
    np.testing.assert_array_equal(volume[4:6], array[..., 4:6, :, :])


@pytest.mark.parametrize("name", ["deflate.tif", "chunked.h5", "sharded.zarr"])
def test_processes_read_at_the_same_time(opened: dict[str, Opened], name: str) -> None:
    volume, array = opened[name]
    volume[0:1]

    def read() -> None:
        for turn in range(60):
            z = turn % 10
            np.testing.assert_array_equal(volume[z : z + 1], array[z : z + 1])

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=read) for _ in range(2)]
    for child in children:
        child.start()
    read()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]


@pytest.mark.parametrize("name", ["deflate.tif", "chunked.h5", "sharded.zarr", "volume.nii"])
def test_threads_read_at_the_same_time(opened: dict[str, Opened], name: str) -> None:
    volume, array = opened[name]

    def read(turn: int) -> bool:
        z = turn % 10
        return np.array_equal(volume[z : z + 1], array[z : z + 1])

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns within a read
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(60)))
    finally:
        sys.setswitchinterval(before)


def test_another_process_reads_pickled_volumes(opened: dict[str, Opened], tmp_path: Path) -> None:
    volumes = {name: volume for name, (volume, _) in opened.items()}
    (tmp_path / "volumes").write_bytes(pickle.dumps(volumes))
    code = (
        "import pickle, sys; folder = sys.argv[1]\n"
        "volumes = pickle.load(open(folder + '/volumes', 'rb'))\n"
        "parts = {name: volume[2:5, 3:9, 1:12] for name, volume in volumes.items()}\n"
        "pickle.dump(parts, open(folder + '/parts', 'wb'))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    parts = pickle.loads((tmp_path / "parts").read_bytes())
    for name, (_, array) in opened.items():
        np.testing.assert_array_equal(parts[name], array[..., 2:5, 3:9, 1:12])


@pytest.mark.parametrize("name", SOURCES)
def test_a_closed_volume_opens_again(opened: dict[str, Opened], name: str) -> None:
    volume, array = opened[name]
    with volume:
        pass
    np.testing.assert_array_equal(volume[1:2, 3:4], array[..., 1:2, 3:4, :])


@pytest.mark.parametrize("index", [3, np.s_[::2], np.s_[:, :, :, :], np.s_[..., 1], np.s_[::-1]])
def test_only_plain_slices_are_an_index(opened: dict[str, Opened], index: Any) -> None:
    with pytest.raises(IndexError, match="slices of step 1"):
        opened["volume.npy"][0][index]


def test_the_module_is_cheap_to_import() -> None:
    code = "import sys, pipeline.data.volumes; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"zarr", "h5py", "tifffile", "nibabel", "torch"} & set(run.stdout.split())


# Spacing and levels


def test_spacing_and_unit_of_every_level_are_read(tmp_path: Path) -> None:
    for zarr_format in (2, 3):
        path = tmp_path / f"{zarr_format}.zarr"
        ome(path, VOLUME, zarr_format, spacing=(2.5, 1.0, 0.5), unit="millimeter")
        build_levels(path, 2)
        for key, factor in ((None, 1), ("0", 1), ("1", 2)):
            volume = open_volume(path, key)
            assert volume.spacing == (2.5 * factor, 1.0 * factor, 0.5 * factor)
            assert volume.unit == "millimeter"
        assert open_volume(path, "1").shape == (6, 7, 9)


def test_a_nifti_gives_its_spacing_from_the_last_axis_to_the_first(tmp_path: Path) -> None:
    volume = open_volume(nifti(tmp_path / "v.nii.gz", FLOATS, zooms=(0.5, 1.0, 2.5)))
    assert (volume.spacing, volume.unit) == ((2.5, 1.0, 0.5), "micrometer")


def test_a_scaled_nifti_is_scaled(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VOLUME.T, np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, tmp_path / "v.nii")
    volume = open_volume(tmp_path / "v.nii")
    assert volume.dtype.kind == "f"
    with np.errstate(all="ignore"):
        expected = np.asarray(nibabel.load(tmp_path / "v.nii").dataobj).T
    np.testing.assert_array_equal(volume[2:5], expected[2:5], strict=True)


def test_hdf5_spacing_is_read(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "v.h5", VOLUME)
    with h5py.File(path, "a") as file:
        file["scan/volume"].attrs["element_size_um"] = [8.0, 4.0, 2.0]
    volume = open_volume(path)
    assert (volume.spacing, volume.unit) == ((8.0, 4.0, 2.0), "micrometer")


def test_a_global_scale_multiplies_that_of_the_level(tmp_path: Path) -> None:
    path = ome(tmp_path / "v.zarr", VOLUME, 3, spacing=(2, 2, 2))
    root = zarr.open_group(path, mode="r+")
    content = dict(root.attrs)["ome"]
    scale = {"type": "scale", "scale": [1.0, 3.0, 5.0]}
    content["multiscales"][0]["coordinateTransformations"] = [scale]
    root.attrs["ome"] = content
    assert open_volume(path).spacing == (2, 6, 10)


def test_moments_are_no_channels(tmp_path: Path) -> None:
    path = ome(tmp_path / "v.zarr", CHANNELS, 3)
    root = zarr.open_group(path, mode="r+")
    content = dict(root.attrs)["ome"]
    content["multiscales"][0]["axes"][0] = {"name": "t", "type": "time"}
    root.attrs["ome"] = content
    with pytest.raises(InputError, match="nothing but channels before them"):
        open_volume(path)


# No more than is needed


def test_a_crop_of_a_compressed_stack_decodes_only_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.random.default_rng(0).integers(0, 256, (160, 160, 160), dtype=np.uint8)
    volume = open_volume(tiff(tmp_path / "v.tif", array, compression="zlib"))
    decoded: list[int] = []
    for kind in (tifffile.TiffPage, tifffile.TiffFrame):
        original = kind.asarray

        def counted(page: Any, *args: Any, original: Any = original, **kw: Any) -> Any:
            decoded.append(page.index)
            return original(page, *args, **kw)

        monkeypatch.setattr(kind, "asarray", counted)
    part = volume[72:88, 40:56, 100:116]
    np.testing.assert_array_equal(part, array[72:88, 40:56, 100:116])
    assert list(dict.fromkeys(decoded)) == list(range(72, 88))


def test_a_crop_of_a_folder_opens_only_its_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = open_volume(slices(tmp_path / "v", VOLUME, compression="zlib"))
    opened: list[str] = []
    original = Path.open

    def counted(path: Path, *args: Any, **kw: Any) -> Any:
        if path.suffix == ".tif":
            opened.append(path.name)
        return original(path, *args, **kw)

    monkeypatch.setattr(Path, "open", counted)
    volume[3:6, 2:4, 1:2]
    assert opened == ["layer1_11.tif", "layer1_12.tif", "layer1_13.tif"]


def test_a_crop_of_a_zarr_reads_only_its_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = zarr.storage.LocalStore.get

    async def counted(store: Any, key: str, *args: Any, **kw: Any) -> Any:
        read.append(key)
        return await original(store, key, *args, **kw)

    volume = open_volume(ome(tmp_path / "v.zarr", VOLUME, 3))
    monkeypatch.setattr(zarr.storage.LocalStore, "get", counted)
    volume[4:8, 0:9, 8:16]
    assert sorted(read) == ["0/c/1/0/1", "0/c/1/1/1"]


def test_a_part_over_the_budget_is_refused(
    opened: dict[str, Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, array = opened["mapped.tif"]
    monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", str(13 * 17 * 2 * 3))
    np.testing.assert_array_equal(volume[2:5], array[2:5])
    with pytest.raises(InputError, match=r"shape \(4, 13, 17\) needs"):
        volume[2:6]


def test_a_volume_larger_than_the_budget_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "v.zarr"
    create_ome_zarr(path, (100_000, 100_000, 100_000), np.uint8, (64, 64, 64))
    monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", str(10**6))
    volume = open_volume(path)
    assert not volume[50_000:50_004, :4, :4].any()


@pytest.mark.parametrize("channels", [None, 2])
def test_a_chunk_over_the_budget_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int | None
) -> None:
    lead = () if channels is None else (channels,)
    plain_zarr(tmp_path / "v.zarr", np.zeros((*lead, 60, 60, 60)), chunks=(*lead, 60, 60, 60))
    monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", str(60**3 * 8 * (channels or 1) - 1))
    with pytest.raises(InputError, match=r"a chunk: shape .* needs"):
        open_volume(tmp_path / "v.zarr")


# What is refused, in one line


def refused(path: Path, key: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_volume(path, key)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    assert "not found" in refused(tmp_path / "none.tif")
    assert "not found" in refused(tmp_path / "none.zarr")
    assert "not found" in refused(tmp_path / "none.nii")


def test_what_is_no_volume_is_named(tmp_path: Path) -> None:
    assert "axes YX" in refused(tiff(tmp_path / "flat.tif", VOLUME[0]))
    colours = np.zeros((4, 5, 6, 3), np.uint8)
    tifffile.imwrite(tmp_path / "rgb.tif", colours, photometric="rgb")
    assert "expected gray ones" in refused(tmp_path / "rgb.tif")
    assert "expected gray ones" in refused(tiff(tmp_path / "bits.tif", VOLUME > 9))
    assert "shape (13, 17)" in refused(npy(tmp_path / "flat.npy", VOLUME[0]))
    assert "complex" in refused(npy(tmp_path / "complex.npy", VOLUME.astype(complex)))
    assert "shape (0, 13, 17)" in refused(npy(tmp_path / "empty.npy", VOLUME[:0]))
    assert "shape (13, 17)" in refused(plain_zarr(tmp_path / "flat.zarr", VOLUME[0]))
    assert "nothing" in refused(hdf5(tmp_path / "flat.h5", VOLUME[0]))
    assert "shape (17, 13)" in refused(nifti(tmp_path / "flat.nii", VOLUME[0]))
    assert "shape (17, 13, 11, 2)" in refused(nifti(tmp_path / "time.nii", CHANNELS))
    (tmp_path / "notes.txt").write_text("no image")
    assert "it begins with b'no image'" in refused(tmp_path / "notes.txt")
    (tmp_path / "v.zarr.zip").write_bytes(b"PK\3\4" + bytes(40))
    assert "unpack it" in refused(tmp_path / "v.zarr.zip")
    (tmp_path / "empty").mkdir()
    assert "neither Zarr nor TIFF" in refused(tmp_path / "empty")


def test_a_compressed_block_without_pages_is_refused(tmp_path: Path) -> None:
    path = tiff(tmp_path / "v.tif", VOLUME, compression="zlib", volumetric=True)
    assert "compressed as one block" in refused(path)


def test_arrays_without_a_key_are_listed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plain_zarr(tmp_path / "v.zarr", VOLUME, name=name)
    assert "a (11, 13, 17), b (11, 13, 17); name one" in refused(tmp_path / "v.zarr")
    np.testing.assert_array_equal(open_volume(tmp_path / "v.zarr", "b")[:2], VOLUME[:2])
    path = hdf5(tmp_path / "v.h5", VOLUME)
    with h5py.File(path, "a") as file:
        file["second"] = CHANNELS[0]
    assert "scan/volume (11, 13, 17), second (11, 13, 17)" in refused(path)
    np.testing.assert_array_equal(open_volume(path, "second")[:2], CHANNELS[0, :2])


def test_a_key_that_names_nothing_is_refused(tmp_path: Path) -> None:
    assert "found 0 (11, 13, 17)" in refused(ome(tmp_path / "v.zarr", VOLUME, 3), "7")
    assert "found" in refused(tmp_path / "v.zarr", "0/0")
    assert "scan/volume (11, 13, 17)" in refused(hdf5(tmp_path / "v.h5", VOLUME), "none")
    assert "no dataset" in refused(tmp_path / "v.h5", "scan/volume/deeper")
    assert "no dataset with values" in refused(tmp_path / "v.h5", "scan")
    assert "leave it" in refused(npy(tmp_path / "v.npy", VOLUME), "0")
    assert "leave it" in refused(plain_zarr(tmp_path / "plain.zarr", VOLUME), "0")


def test_a_key_stays_inside_the_store(tmp_path: Path) -> None:
    ome(tmp_path / "secret.zarr", VOLUME, 3)
    ome(tmp_path / "v.zarr", VOLUME, 3)
    refused(tmp_path / "v.zarr", "../secret.zarr/0")
    root = zarr.open_group(tmp_path / "v.zarr", mode="r+")
    content = dict(root.attrs)["ome"]
    content["multiscales"][0]["datasets"][0]["path"] = "../secret.zarr/0"
    root.attrs["ome"] = content
    refused(tmp_path / "v.zarr")


def test_hdf5_does_not_lead_elsewhere(tmp_path: Path) -> None:
    secret = hdf5(tmp_path / "secret.h5", VOLUME)
    path = tmp_path / "v.h5"
    layout = h5py.VirtualLayout(shape=SHAPE, dtype=np.uint16)
    layout[...] = h5py.VirtualSource(secret, "scan/volume", shape=SHAPE)
    (tmp_path / "raw").write_bytes(VOLUME.tobytes())
    with h5py.File(path, "w") as file:
        file["soft"] = h5py.SoftLink("/external/volume")
        file["external"] = h5py.ExternalLink(str(secret), "/scan")
        file.create_virtual_dataset("virtual", layout)
        outside = [(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("outside", SHAPE, np.uint16, external=outside)
    assert "link to elsewhere" in refused(path, "soft")
    assert "link to elsewhere" in refused(path, "external/volume")
    assert "data in other files" in refused(path, "virtual")
    assert "data in other files" in refused(path, "outside")


class Evil:
    def __reduce__(self) -> Any:
        return (warnings.warn, ("code from a file was run",))


@pytest.mark.parametrize("place", ["compressor", "filters"])
def test_a_codec_that_runs_code_is_refused(tmp_path: Path, place: str) -> None:
    path = plain_zarr(tmp_path / "v.zarr", VOLUME, zarr_format=2, compressors=None)
    metadata = json.loads((path / ".zarray").read_text())
    codec = {"id": "pickle"}
    metadata[place] = codec if place == "compressor" else [codec]
    (path / ".zarray").write_text(json.dumps(metadata))
    (path / "0.0.0").write_bytes(pickle.dumps(Evil()))
    assert "pickle" in refused(path)


def test_objects_in_an_npy_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([[[{}]]], dtype=object), allow_pickle=True)
    refused(tmp_path / "v.npy")


@pytest.mark.parametrize("name", ["mapped.tif", "deflate.tif", "volume.npy", "volume.nii"])
def test_a_file_cut_short_is_refused_at_once(name: str, tmp_path: Path) -> None:
    path = SOURCES[name][0](tmp_path / name)
    path.write_bytes(path.read_bytes()[:-200])
    refused(path)


@pytest.mark.parametrize(
    "name", ["deflate.tif", "lzw_slices", "volume.nii.gz", "ome_0.5.zarr", "chunked.h5"]
)
def test_damaged_pixels_are_an_input_error(name: str, tmp_path: Path) -> None:
    path = SOURCES[name][0](tmp_path / name)
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    volume = open_volume(path)
    volume.close()
    for file in files:
        if file.suffix != ".json":
            content = bytearray(file.read_bytes())
            begin, end = len(content) // 3, len(content) * 2 // 3
            if file.suffix == ".tif":
                with tifffile.TiffFile(file) as opened:
                    begin = opened.pages.first.dataoffsets[0]
                    end = begin + opened.pages.first.databytecounts[0]
            content[begin:end] = b"\xa5" * (end - begin)
            file.write_bytes(content[: end if name == "volume.nii.gz" else None])
    with pytest.raises(InputError, match="damaged, cut short or not supported"):
        volume[:]


def test_a_file_that_changed_is_not_read_as_if_it_had_not(tmp_path: Path) -> None:
    volume = open_volume(npy(tmp_path / "v.npy", VOLUME))
    volume.close()
    npy(tmp_path / "v.npy", VOLUME[:5])
    with pytest.raises(InputError, match="changed since it was opened"):
        volume[:3]


# Folders of slices


def test_slices_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    volume = open_volume(slices(tmp_path / "v", VOLUME, first=8))  # 8, 9, 10, ... 18
    np.testing.assert_array_equal(volume[:], VOLUME)


def test_a_missing_slice_is_named(tmp_path: Path) -> None:
    path = slices(tmp_path / "v", VOLUME)
    (path / "layer1_12.tif").unlink()
    assert "slice 12 is missing among 8 to 18" in refused(path)


def test_a_number_in_two_spellings_is_refused(tmp_path: Path) -> None:
    path = slices(tmp_path / "v", VOLUME)
    tiff(path / "layer1_012.tif", VOLUME[0])
    assert "slice 12 is there twice" in refused(path)


def test_other_images_among_slices_are_refused(tmp_path: Path) -> None:
    path = slices(tmp_path / "v", VOLUME)
    tiff(path / "mask.tif", VOLUME[0])
    assert "not one series" in refused(path)


@pytest.mark.parametrize("other", [VOLUME[0, 1:], CHANNELS[0, 0], VOLUME])
def test_a_slice_unlike_the_first_is_named(tmp_path: Path, other: NDArray[Any]) -> None:
    path = slices(tmp_path / "v", VOLUME)
    tiff(path / "layer1_12.tif", other)
    with pytest.raises(InputError, match=r"layer1_12\.tif"):
        open_volume(path)


def test_a_slice_cut_short_is_named(tmp_path: Path) -> None:
    path = slices(tmp_path / "v", VOLUME)
    file = path / "layer1_12.tif"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"layer1_12\.tif: cut short"):
        open_volume(path)


def test_level_of_a_damaged_group_is_named(tmp_path: Path) -> None:
    path = ome(tmp_path / "v.zarr", VOLUME, 3)
    root = zarr.open_group(path, mode="r+")
    for broken in ([], [{}], "x", [{"datasets": [{}]}], [{"datasets": "0"}]):
        root.attrs["ome"] = {"version": "0.5", "multiscales": broken}
        if broken:
            assert "multiscales without datasets" in refused(path)
    root.attrs["ome"] = {"multiscales": [{"datasets": [{"path": "9"}]}]}
    assert "level '9', not found" in refused(path)
