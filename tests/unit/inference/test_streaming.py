from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data.ome_zarr import create_ome_zarr
from pipeline.data.volumes import open_volume
from pipeline.errors import ConfigurationError, InputError, ResourceError, exit_code
from pipeline.inference import plane_writer
from pipeline.inference.blending import WEIGHTS
from pipeline.inference.finishing import Finish
from pipeline.inference.sliding_window import SlidingWindow
from pipeline.inference.streaming import VolumeStream, stream_volume

ROI = (12, 12, 12)
SEPARABLE = SlidingWindow(ROI, 0.5, "separable", tune_allocator=False)


def convolutions(channels_in: int = 1, channels_out: int = 2) -> nn.Module:
    """Return two real convolutions, whose borders depend on the window."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv3d(channels_in, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(3, channels_out, 3, padding=1),
    )
    return layers.eval().requires_grad_(False)


def noise(shape: Sequence[int], dtype: str = "uint8") -> NDArray[Any]:
    generator = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 250, shape).astype(dtype)


def saved(folder: Path, array: NDArray[Any], name: str = "volume") -> Path:
    path = folder / f"{name}.npy"
    np.save(path, array)
    return path


def in_memory(
    inferer: SlidingWindow, array: NDArray[Any], network: Callable[[Tensor], Any]
) -> NDArray[Any]:
    image = torch.from_numpy(array)
    image = image[None] if image.ndim == 4 else image[None, None]
    return np.asarray(inferer(image, network)[0])


def written(target: Path) -> NDArray[Any]:
    array = open_volume(target)[:]
    return array if array.ndim == 4 else array[None]


class Counted:
    """A network that counts the windows it is run on."""

    def __init__(self, network: Callable[[Tensor], Any] | None = None) -> None:
        self.network = network or convolutions()
        self.windows = 0

    def __call__(self, windows: Tensor) -> Any:
        self.windows += len(windows)
        return self.network(windows)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", [(40, 30, 33), (25, 12, 13), (9, 40, 7), (5, 6, 7), (12, 12, 12)])
def test_streaming_gives_what_the_engine_gives_in_memory(
    tmp_path: Path, shape: tuple[int, ...], weights: Any
) -> None:
    inferer = SlidingWindow(ROI, 0.5, weights, tune_allocator=False)
    array, network = noise(shape), convolutions()
    result = stream_volume(
        saved(tmp_path, array), tmp_path / "r.zarr", network, inferer=inferer, chunks=(6, 8, 9)
    )
    assert result.complete
    np.testing.assert_array_equal(written(result.path), in_memory(inferer, array, network))


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(5, 45), st.integers(5, 32), st.integers(5, 32)),
    roi=st.tuples(st.integers(5, 17), st.integers(5, 17), st.integers(5, 17)),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.6]),
    weights=st.sampled_from(WEIGHTS),
    even=st.booleans(),
    small=st.sampled_from(["pad", "shrink"]),
    chunks=st.tuples(st.integers(3, 12), st.integers(6, 20), st.integers(6, 20)),
    cut=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)
def test_however_it_is_cut_the_result_is_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    roi: tuple[int, ...],
    overlap: float,
    weights: Any,
    even: bool,
    small: Any,
    chunks: tuple[int, ...],
    cut: tuple[int, ...],
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    inferer = SlidingWindow(roi, overlap, weights, even=even, small=small, tune_allocator=False)
    array, network, finish = noise(shape), convolutions(), Finish("softmax")
    slabs, *tiles = (min(n, -(-a // b)) for n, a, b in zip(cut, shape, chunks, strict=True))
    stream_volume(
        saved(folder, array), folder / "r.zarr", network, inferer=inferer, chunks=chunks,
        blocks=slabs * tiles[0] * tiles[1], tiles=tiles, finish=finish,
    )  # fmt: skip
    expected = finish(torch.from_numpy(in_memory(inferer, array, network)))
    np.testing.assert_array_equal(written(folder / "r.zarr"), expected)


def test_a_block_with_a_window_of_its_own_is_rounded_as_the_volume_is(tmp_path: Path) -> None:
    inferer = SlidingWindow(ROI, 0.0, "separable", tune_allocator=False)
    array, network = noise((36, 12, 12), "float32"), convolutions()
    stream_volume(
        saved(tmp_path, array), tmp_path / "r.zarr", network, inferer=inferer,
        chunks=(12, 12, 12), blocks=3,
    )  # fmt: skip
    np.testing.assert_array_equal(written(tmp_path / "r.zarr"), in_memory(inferer, array, network))


def write_ome(path: Path, array: NDArray[Any], version: Any) -> Path:
    channels = len(array) if array.ndim == 4 else None
    made = create_ome_zarr(
        path, array.shape[-3:], array.dtype, (16, 16, 16), zarr_format=version, channels=channels,
        spacing=(3.0, 2.0, 1.5), unit="nanometer",
    )  # fmt: skip
    made[:] = array
    return path


def write_hdf5(path: Path, array: NDArray[Any]) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("volume", data=array, chunks=(8, 8, 8))
    return path


def write_zarr(path: Path, array: NDArray[Any]) -> Path:
    zarr.create_array(path, shape=array.shape, dtype=array.dtype, chunks=(16, 16, 16))[:] = array
    return path


def write_tiff(path: Path, array: NDArray[Any]) -> Path:
    tifffile.imwrite(path, array, photometric="minisblack")
    return path


SOURCES: dict[str, Callable[[Path, NDArray[Any]], Path]] = {
    "OME-Zarr 0.4": lambda folder, array: write_ome(folder / "v.zarr", array, 2),
    "OME-Zarr 0.5": lambda folder, array: write_ome(folder / "v.zarr", array, 3),
    "Zarr": lambda folder, array: write_zarr(folder / "v.zarr", array),
    "HDF5": lambda folder, array: write_hdf5(folder / "v.h5", array),
    "TIFF": lambda folder, array: write_tiff(folder / "v.tif", array),
    "npy": saved,
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_source_gives_the_same(tmp_path: Path, source: str) -> None:
    array, network = noise((30, 20, 17)), convolutions()
    path = SOURCES[source](tmp_path, array)
    stream_volume(path, tmp_path / "r.zarr", network, inferer=SEPARABLE)
    np.testing.assert_array_equal(
        written(tmp_path / "r.zarr"), in_memory(SEPARABLE, array, network)
    )


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float16", "float32", "float64"])
def test_every_type_of_voxel_gives_what_it_gives_in_memory(tmp_path: Path, dtype: str) -> None:
    array, network = noise((30, 14, 17), dtype), convolutions()
    stream_volume(saved(tmp_path, array), tmp_path / "r.zarr", network, inferer=SEPARABLE)
    np.testing.assert_array_equal(
        written(tmp_path / "r.zarr"), in_memory(SEPARABLE, array, network)
    )


@pytest.mark.parametrize("version", [2, 3])
def test_channels_go_in_and_out(tmp_path: Path, version: Any) -> None:
    array, network = noise((3, 30, 14, 17), "float32"), convolutions(3, 4)
    path = write_ome(tmp_path / "v.zarr", array, version)
    stream_volume(
        path, tmp_path / "r.zarr", network, inferer=SEPARABLE, zarr_format=version, blocks=2,
        chunks=(6, 16, 16),
    )  # fmt: skip
    found = open_volume(tmp_path / "r.zarr")
    assert found.channels == 4
    np.testing.assert_array_equal(found[:], in_memory(SEPARABLE, array, network))


def test_a_float64_network_is_summed_in_float64(tmp_path: Path) -> None:
    array, network = noise((30, 14, 17), "float64"), convolutions().double()
    for channels in (None, 2):
        target = tmp_path / f"{channels}.zarr"
        stream_volume(saved(tmp_path, array), target, network, inferer=SEPARABLE, channels=channels)
        expected = in_memory(SEPARABLE, array, network)
        assert expected.dtype == np.float64
        np.testing.assert_array_equal(written(target), expected.astype(np.float32))


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_a_small_volume_is_padded_as_in_memory(tmp_path: Path, padding_mode: str) -> None:
    inferer = SlidingWindow(ROI, 0.5, padding_mode=padding_mode, tune_allocator=False)
    array, network = noise((9, 30, 10), "float32"), convolutions()
    stream_volume(saved(tmp_path, array), tmp_path / "r.zarr", network, inferer=inferer)
    np.testing.assert_array_equal(written(tmp_path / "r.zarr"), in_memory(inferer, array, network))


def test_what_the_result_says_of_itself(tmp_path: Path) -> None:
    source = write_ome(tmp_path / "v.zarr", noise((30, 20, 17)), 2)
    stream_volume(
        source, tmp_path / "far" / "away" / "r.zarr", convolutions(), inferer=SEPARABLE,
        finish=Finish("sigmoid", dtype="uint8"), identity={"checkpoint": "abc"}, levels=2,
    )  # fmt: skip
    result = open_volume(tmp_path / "far" / "away" / "r.zarr")
    assert result.spacing == (3.0, 2.0, 1.5)
    assert result.unit == "nanometer"
    assert result.dtype == np.uint8
    assert open_volume(result.path, "1").shape == (15, 10, 9)
    made: Any = zarr.open_group(result.path, mode="r").attrs["lamina"]
    assert made["source"]["name"] == "v.zarr"
    assert made["identity"] == {"checkpoint": "abc"}
    assert made["finish"]["scale"] == 1 / 255
    assert made["inferer"]["backend"]["name"] == "torch"
    assert made["record"]["started"] <= made["record"]["ended"]
    assert made["record"]["made_with"][0]["torch"] == torch.__version__
    assert not list(tmp_path.glob("far/away/*.partial"))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_probabilities_are_written_in_the_type_asked_for(tmp_path: Path, dtype: str) -> None:
    array, finish = noise((30, 20, 17)), Finish("sigmoid", dtype=dtype)
    stream_volume(
        saved(tmp_path, array), tmp_path / "r.zarr", convolutions(), inferer=SEPARABLE,
        finish=finish, levels=2,
    )  # fmt: skip
    logits = torch.from_numpy(in_memory(SEPARABLE, array, convolutions()))
    assert open_volume(tmp_path / "r.zarr", "1").dtype == dtype
    np.testing.assert_allclose(written(tmp_path / "r.zarr"), finish(logits), rtol=1e-6)


def test_an_unknown_spacing_stays_unknown(tmp_path: Path) -> None:
    source = saved(tmp_path, noise((30, 20, 17)))
    stream_volume(source, tmp_path / "r.zarr", convolutions(), inferer=SEPARABLE)
    assert open_volume(tmp_path / "r.zarr").unit is None


def test_shards_give_the_same_in_fewer_files(tmp_path: Path) -> None:
    source, network = saved(tmp_path, noise((30, 20, 17))), convolutions(channels_out=1)
    for name, shards in (("chunks", None), ("shards", (12, 20, 20))):
        stream_volume(
            source, tmp_path / f"{name}.zarr", network, inferer=SEPARABLE, chunks=(6, 10, 10),
            shards=shards, blocks=3,
        )  # fmt: skip
    np.testing.assert_array_equal(
        written(tmp_path / "shards.zarr"), written(tmp_path / "chunks.zarr")
    )
    assert len(list(tmp_path.glob("shards.zarr/0/c/*/*/*"))) == 3


def test_a_mask_and_empty_windows_do_as_in_memory(tmp_path: Path) -> None:
    array, network = noise((40, 24, 24)), Counted()
    array[:20] = 0
    mask = np.zeros(array.shape, np.uint8)
    mask[:, :6] = 1
    inferer = SlidingWindow(ROI, 0.5, skip_below=0.0, empty_value=-3.0, tune_allocator=False)
    result = stream_volume(
        saved(tmp_path, array), tmp_path / "r.zarr", network, inferer=inferer, channels=2,
        mask=saved(tmp_path, mask, "mask"),
    )  # fmt: skip
    image, where = torch.from_numpy(array)[None, None], torch.from_numpy(mask)[None, None]
    expected = inferer(image, convolutions(), mask=where)[0]
    np.testing.assert_array_equal(written(tmp_path / "r.zarr"), expected)
    assert 0 < result.windows < result.plan.windows
    assert network.windows == result.windows + 1  # one asked for the channels


def test_a_volume_without_a_window_to_run_is_the_empty_value(tmp_path: Path) -> None:
    inferer = SlidingWindow(ROI, 0.5, skip_below=300.0, empty_value=-3.0, tune_allocator=False)
    for shape in ((30, 20, 17), (9, 9, 9)):
        source = saved(tmp_path, noise(shape))
        stream_volume(source, tmp_path / f"{shape[0]}.zarr", convolutions(), inferer=inferer)
        np.testing.assert_allclose(written(tmp_path / f"{shape[0]}.zarr"), -3, rtol=1e-6)


def test_what_prepares_a_window_may_write_into_it(tmp_path: Path) -> None:
    array, network = noise((30, 14, 17), "float32"), convolutions()
    stream_volume(
        saved(tmp_path, array), tmp_path / "r.zarr", network, inferer=SEPARABLE,
        prepare=lambda window: window.mul_(0.5).add_(1),
    )  # fmt: skip
    expected = in_memory(SEPARABLE, array, lambda windows: network(windows * 0.5 + 1))
    np.testing.assert_array_equal(written(tmp_path / "r.zarr"), expected)


def test_gradients_are_not_kept(tmp_path: Path) -> None:
    network = convolutions().requires_grad_(True)
    source = saved(tmp_path, noise((30, 14, 17)))
    assert stream_volume(source, tmp_path / "r.zarr", network, inferer=SEPARABLE).complete


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_blocks_in_any_order_are_the_whole(tmp_path: Path, order: Sequence[int]) -> None:
    array, network = noise((40, 24, 24)), convolutions()
    source = saved(tmp_path, array)
    for index in order:
        assert not (tmp_path / "r.zarr").exists()
        result = stream_volume(
            source, tmp_path / "r.zarr", network, inferer=SEPARABLE, chunks=(6, 12, 12),
            block=(index, 4), tiles=(1, 2),
        )  # fmt: skip
    assert result.complete
    np.testing.assert_array_equal(
        written(tmp_path / "r.zarr"), in_memory(SEPARABLE, array, network)
    )


def test_a_block_that_is_done_is_not_computed_again(tmp_path: Path) -> None:
    source, network = saved(tmp_path, noise((40, 24, 24))), Counted()
    for expected in (0, 1, 0, 0, 1, 0):
        result = stream_volume(
            source, tmp_path / "r.zarr", network, inferer=SEPARABLE, chunks=(6, 12, 12),
            block=(expected, 2), channels=2,
        )  # fmt: skip
    assert result.complete
    assert network.windows == result.plan.windows + 2  # of which two asked for the channels


def test_a_whole_result_stays_whole_however_it_is_asked_for(tmp_path: Path) -> None:
    source, network = saved(tmp_path, noise((40, 24, 24))), Counted()
    stream_volume(
        source, tmp_path / "r.zarr", network, inferer=SEPARABLE, chunks=(6, 12, 12), blocks=3
    )
    again = stream_volume(
        source, tmp_path / "r.zarr", network, inferer=SEPARABLE, chunks=(6, 12, 12)
    )
    assert again.complete
    assert again.windows == 0
    assert not (tmp_path / "r.zarr.partial").exists()


forked = multiprocessing.get_context("fork")


def start(target: Path, **options: Any) -> Any:
    """Return a process that streams `volume.npy` beside `target`, slowly, and counts windows."""
    log, network = target.with_suffix(".windows"), convolutions()

    def slow(windows: Tensor) -> Tensor:
        with log.open("ab") as stream:
            stream.write(b"." * len(windows))
        time.sleep(options.get("seconds", 0.002))
        outputs: Tensor = network(windows)
        return outputs

    def work() -> None:
        stream_volume(
            target.parent / "volume.npy", target, slow, inferer=SEPARABLE, channels=2,
            chunks=(6, 12, 12), **{k: v for k, v in options.items() if k != "seconds"},
        )  # fmt: skip

    process = forked.Process(target=work)
    process.start()
    return process


def test_a_run_killed_at_any_moment_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    array = noise((60, 24, 24))
    saved(tmp_path, array)
    generator, kills, target = random.Random(0), 0, tmp_path / "r.zarr"
    windows = (60 // 6 - 1) * 9
    for attempt in itertools.count():
        process = start(target)
        # more time each attempt, so that there is an end on any machine
        process.join(generator.uniform(0.02, 0.15 + 0.05 * attempt))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if target.exists():
            break
        assert process.exitcode == -signal.SIGKILL
    assert kills >= 3
    # Those under way when it was killed, those of the row of chunks it was in and the one before,
    # and one that asks for the channels.
    repeated = len(target.with_suffix(".windows").read_bytes()) - windows
    assert repeated <= kills * (3 * 9 + 1) + 1
    np.testing.assert_array_equal(written(target), in_memory(SEPARABLE, array, convolutions()))
    stream_volume(tmp_path / "volume.npy", target, Counted(), inferer=SEPARABLE, chunks=(6, 12, 12))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.windows", "r.zarr", "volume.npy"]


def test_processes_at_once_give_what_one_gives(tmp_path: Path) -> None:
    array = noise((60, 24, 24))
    saved(tmp_path, array)
    processes = [start(tmp_path / "r.zarr", block=(index, 5)) for index in range(5)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    np.testing.assert_array_equal(
        written(tmp_path / "r.zarr"), in_memory(SEPARABLE, array, convolutions())
    )
    assert not (tmp_path / "r.zarr.partial").exists()


def test_a_process_with_the_same_block_waits_and_computes_nothing(tmp_path: Path) -> None:
    saved(tmp_path, noise((60, 24, 24)))
    processes = [start(tmp_path / "r.zarr", block=(0, 1)) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    # All windows once, and one per process that may ask for the channels.
    windows = len((tmp_path / "r.windows").read_bytes())
    assert 81 < windows <= 81 + 3


def test_a_full_disk_is_a_resource_error_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, network, target = saved(tmp_path, noise((40, 24, 24))), Counted(), tmp_path / "r.zarr"
    arguments: dict[str, Any] = {"inferer": SEPARABLE, "chunks": (6, 12, 12), "channels": 2}
    chunks = itertools.count()
    replace = Path.replace

    def full(self: Path, other: Path) -> Path:
        if "0/c" in str(other) and next(chunks) >= 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(other))
        return replace(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(ResourceError, match="No space left on device; free space") as caught:
            stream_volume(source, target, network, **arguments)
    assert exit_code(caught.value) == 5
    assert not target.exists()
    before = network.windows
    result = stream_volume(source, target, network, **arguments)
    assert result.complete
    assert network.windows - before - 1 == result.windows < result.plan.windows
    np.testing.assert_array_equal(
        written(target), in_memory(SEPARABLE, noise((40, 24, 24)), convolutions())
    )


def test_chunks_reach_the_disk_before_they_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(plane_writer, "sync_file", synced.append)
    stream_volume(
        saved(tmp_path, noise((40, 24, 24))), tmp_path / "r.zarr", convolutions(),
        inferer=SEPARABLE, chunks=(6, 12, 12),
    )  # fmt: skip
    assert len(set(synced)) == len(synced) == 7 * 2 * 2 * 2
    names = {path.relative_to(tmp_path / "r.zarr.partial" / "r.zarr") for path in synced}
    assert names == {
        path.relative_to(tmp_path / "r.zarr")
        for path in (tmp_path / "r.zarr" / "0" / "c").rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"identity": {"sha256": "b"}}, "identity.sha256"),
        ({"inferer": SlidingWindow(ROI, 0.25, "separable")}, "inferer.overlap"),
        ({"finish": Finish("sigmoid")}, "finish.activation"),
        ({"blocks": 3}, "blocks.count, blocks.sha256"),
        ({"chunks": (12, 12, 12)}, "blocks.sha256, chunks"),
        ({"levels": 1, "zarr_format": 2}, "zarr_format, levels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_runs_part_is_refused_by_name(
    tmp_path: Path, changed: dict[str, Any], names: str
) -> None:
    source = saved(tmp_path, noise((40, 24, 24)))
    options: dict[str, Any] = {
        "inferer": SEPARABLE, "chunks": (6, 12, 12), "blocks": 2, "identity": {"sha256": "a"},
    }  # fmt: skip
    VolumeStream(source, tmp_path / "r.zarr", convolutions(), **options).run([0])
    with pytest.raises(ConfigurationError, match=rf"run with another {names};") as caught:
        VolumeStream(source, tmp_path / "r.zarr", convolutions(), **{**options, **changed}).run()
    assert "r.zarr.partial" in str(caught.value)
    anew = {**options, **changed, "overwrite": True}
    assert VolumeStream(source, tmp_path / "r.zarr", convolutions(), **anew).run().complete


def test_a_changed_source_is_another_run(tmp_path: Path) -> None:
    source = saved(tmp_path, noise((40, 24, 24)))
    stream_volume(source, tmp_path / "r.zarr", convolutions(), inferer=SEPARABLE)
    os.utime(source, (1, 1))
    with pytest.raises(ConfigurationError, match=r"made with another source\.modified"):
        stream_volume(source, tmp_path / "r.zarr", convolutions(), inferer=SEPARABLE)


def test_looking_at_a_plan_writes_and_removes_nothing(tmp_path: Path) -> None:
    source, target = saved(tmp_path, noise((40, 24, 24))), tmp_path / "r.zarr"
    stream_volume(source, target, convolutions(), inferer=SEPARABLE)
    before = sorted(tmp_path.rglob("*"))
    stream = VolumeStream(source, target, convolutions(), inferer=SEPARABLE, overwrite=True)
    assert "26,000 x 20,000 x 20,000" in stream.table()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"block": (4, 4)}, r"i from 0 to n - 1"),
        ({"block": (-1, 4)}, r"block is \(-1, 4\)"),
        ({"block": (0, 4), "blocks": 2}, "leave one"),
        ({"block": (0, 2), "overwrite": True}, "each job would remove"),
        ({"block": (0, 8)}, "cannot be cut into 8 parts"),
        ({"bounds": [0, 20, 40]}, r"begin at \[20\] along axis 0, inside a chunk"),
        ({"shards": (12, 12, 12), "bounds": [0, 18, 40]}, r"\[18\] along axis 0, inside a chunk"),
        ({"target": "result"}, "call it NAME.zarr"),
        ({"target": "volume.npy"}, "volume.npy lies there"),
        ({"target": "small.npy", "mask": "small.npy"}, "small.npy lies there"),
        ({"mask": "small.npy"}, r"small.npy: the mask has shape \(4, 4, 4\)"),
        ({"channels": 3}, "channels is 3, the network gives 2"),
        ({"prepare": lambda window: window[:, 1:]}, r"prepare gives \[1, 11, 12, 12\]"),
        ({"predictor": lambda windows: (windows, windows)}, "one tensor, got 2"),
        ({"predictor": convolutions().train()}, r"call network.eval\(\)"),
        ({"finish": Finish("sigmoid", select=2)}, "select is 2"),
        ({"chunks": (6, 0, 12)}, "chunks or shards"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    source = saved(tmp_path, noise((40, 24, 24)))
    saved(tmp_path, noise((4, 4, 4)), "small")
    options = {
        "predictor": convolutions(), "target": "r.zarr", "inferer": SEPARABLE, "chunks": (6, 12, 12)
    }  # fmt: skip
    options |= changed
    for name in ("target", "mask"):
        if name in options:
            options[name] = tmp_path / str(options[name])
    with pytest.raises(ConfigurationError, match=reason):
        stream_volume(source, **options)  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_source_that_is_none_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.npy: not found"):
        stream_volume(tmp_path / "nothing.npy", tmp_path / "r.zarr", len, inferer=SEPARABLE)


def test_a_target_that_holds_the_source_is_refused_even_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "r.zarr").mkdir()
    source = write_ome(tmp_path / "r.zarr" / "inner.zarr", noise((30, 20, 17)), 3)
    with pytest.raises(ConfigurationError, match=r"inner\.zarr lies there"):
        stream_volume(
            source, tmp_path / "r.zarr", convolutions(), inferer=SEPARABLE, overwrite=True
        )
    assert open_volume(source).shape == (30, 20, 17)


def test_blocks_begin_on_windows_by_default(tmp_path: Path) -> None:
    inferer = SlidingWindow((96, 16, 16), 0.5, tune_allocator=False)
    for depth, expected in ((97, 48), (400, 48), (40, 40)):
        source = saved(tmp_path, np.zeros((depth, 16, 16), np.uint8))
        stream = VolumeStream(source, tmp_path / "r.zarr", convolutions(), inferer=inferer)
        assert stream.plan.unit == (expected, 16, 16)
    thin = SlidingWindow((16, 16, 16), 0.75, tune_allocator=False)
    source = saved(tmp_path, np.zeros((400, 16, 16), np.uint8))
    stream = VolumeStream(source, tmp_path / "r.zarr", convolutions(), inferer=thin)
    assert stream.plan.unit[0] == 32  # eight strides: not a file for every four planes
