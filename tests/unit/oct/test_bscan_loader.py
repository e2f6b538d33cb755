from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from monai.transforms import Compose
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError, InputError
from pipeline.inference.batch import BatchRun
from pipeline.oct.bscan_loader import BScanLoader
from pipeline.oct.formats import read_oct
from pipeline.oct.transforms import FitToFramed, LoadBScand

COUNTS = {"a.h5": 5, "b/c.h5": 1, "d.h5": 4}


def write_file(path: Path, count: int, bad: int | None = None) -> None:
    """Write B-scans whose grey is their number, as shares of white; `bad` cannot be read."""
    images = np.zeros((count, 12, 10), np.float32) + np.arange(count)[:, None, None] / 10
    if bad is not None:
        images[bad] = np.nan
    rows = np.full((count, 10), 4.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images, chunks=(1, 12, 10))
        file["layers/ILM"], file["layers/BM"] = rows, rows + 3
        file["names"] = [f"p01_OD_1_{k}" for k in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in COUNTS.items():
        write_file(tmp_path / "in" / name, count)
    return tmp_path


def run_over(folder: Path, **changes: Any) -> BatchRun:
    paths = sorted((folder / "in").rglob("*.h5"))
    cases = [{"image": str(p), "name": p.relative_to(folder / "in").as_posix()} for p in paths]
    return BatchRun(cases, str(folder / "out"), {}, None, "oct_layers", **changes)


def loader_of(batch: BatchRun, **settings: Any) -> BScanLoader:
    frame = Compose([LoadBScand(), FitToFramed(frame=(16, 20))])
    return BScanLoader(batch, settings.pop("transform", frame), **settings)


def given(loader: BScanLoader, batch: BatchRun) -> Iterator[tuple[str, list[int], Any]]:
    """Yield name, indices and batch of each step, and record what is complete."""
    for step in loader:
        (name,) = set(step["name"])
        yield name, step["index"].tolist(), step
        if step["index"][-1] + 1 == step["bscans"][-1] and batch.is_open(name):
            batch.record(name, [], {}, {})


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_every_bscan_comes_once_in_order_and_no_batch_is_of_two_files(
    folder: Path, batch_size: int, num_workers: int
) -> None:
    batch = run_over(folder)
    loader = loader_of(batch, batch_size=batch_size, num_workers=num_workers)
    seen: dict[str, list[int]] = {}
    for name, indices, step in given(loader, batch):
        assert len(indices) <= batch_size
        assert step["image"].shape == (len(indices), 1, 16, 20)
        assert step["bscans"].tolist() == [COUNTS[name]] * len(indices)
        assert step["source_shape"].tolist() == [[12, 10]] * len(indices)
        assert step["image_path"] == [str(folder / "in" / name)] * len(indices)
        greys = step["image"].mean(dim=(1, 2, 3)).tolist()
        assert greys == pytest.approx([k / 10 for k in indices], abs=1e-6)
        assert loader.volume is not None
        assert loader.volume.path == folder / "in" / name
        seen.setdefault(name, []).extend(indices)
    assert seen == {name: list(range(count)) for name, count in COUNTS.items()}
    assert list(seen) == list(COUNTS)
    assert len(batch.rows) == len(COUNTS)
    assert loader.volume is None


def test_a_file_is_begun_with_its_hash_at_its_first_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = run_over(folder)
    begun: list[Mapping[str, Any]] = []
    begin = batch.begin

    def notes(origins: Mapping[str, Any]) -> None:
        begun.append(origins)
        begin(origins)

    monkeypatch.setattr(batch, "begin", notes)
    assert len(list(given(loader_of(batch, batch_size=2), batch))) == 3 + 1 + 2
    assert [list(one) for one in begun] == [[name] for name in COUNTS]
    assert all(one[name]["input_sha256"] for one, name in zip(begun, COUNTS, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("bad", [0, 1, 4])
def test_a_file_with_a_damaged_bscan_is_rejected_and_the_next_one_is_read(
    folder: Path, bad: int, num_workers: int
) -> None:
    write_file(folder / "in" / "a.h5", 5, bad=bad)
    batch = run_over(folder)
    steps = list(given(loader_of(batch, batch_size=2, num_workers=num_workers), batch))
    assert [(p.path, p.stage) for p in batch.problems] == [("a.h5", "read")]
    assert [indices for name, indices, _ in steps if name == "a.h5"] == [[0, 1], [2, 3]][: bad // 2]
    assert [row["image"] for row in batch.rows] == ["b/c.h5", "d.h5"]
    assert not batch.is_open("a.h5")


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n cut short"])
def test_a_file_that_cannot_be_opened_is_rejected(folder: Path, content: bytes) -> None:
    (folder / "in" / "b" / "c.h5").write_bytes(content)
    batch = run_over(folder)
    names = {name for name, _, _ in given(loader_of(batch), batch)}
    assert names == {"a.h5", "d.h5"}
    assert [problem.path for problem in batch.problems] == ["b/c.h5"]


def test_an_input_error_of_the_transform_rejects_the_file(folder: Path) -> None:
    def refuses(item: Mapping[Hashable, Any]) -> Any:
        if item["name"] == "a.h5" and item["index"] == 3:
            raise InputError("too dark")
        return LoadBScand()(item)

    batch = run_over(folder)
    list(given(loader_of(batch, batch_size=1, transform=Compose([refuses])), batch))
    assert [problem.message for problem in batch.problems] == ["too dark"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bug_in_the_transform_is_not_taken_for_a_bad_file(folder: Path, num_workers: int) -> None:
    def fails(_: Any) -> Any:
        raise ZeroDivisionError("a bug")

    batch = run_over(folder)
    with pytest.raises(ZeroDivisionError), batch.closing:
        next(loader_of(batch, transform=fails, num_workers=num_workers))
    assert not batch.problems


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_rest_of_an_input_rejected_meanwhile_is_left(folder: Path, num_workers: int) -> None:
    batch = run_over(folder)
    loader = loader_of(batch, batch_size=1, num_workers=num_workers)
    seen = []
    for name, indices, _ in given(loader, batch):
        seen.append((name, *indices))
        if (name, indices) == ("a.h5", [1]):
            batch.reject(name, "predict", "the network refused")
    assert seen[:3] == [("a.h5", 0), ("a.h5", 1), ("b/c.h5", 0)]
    assert len(seen) == 2 + 1 + 4


def test_iterating_again_goes_on_with_the_next_batch(folder: Path) -> None:
    batch = run_over(folder)
    loader = loader_of(batch, batch_size=3)
    first = next(iter(loader))
    second = next(iter(loader))
    assert (first["index"].tolist(), second["index"].tolist()) == ([0, 1, 2], [3, 4])


@pytest.mark.parametrize(("num_workers", "ahead"), [(0, 0), (1, 1), (3, 1)])
def test_no_more_than_one_batch_is_read_ahead(
    folder: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, ahead: int
) -> None:
    read: list[int] = []

    class Counted:
        def __init__(self, bscans: Any) -> None:
            self.bscans, self.shape, self.dtype = bscans, bscans.shape, bscans.dtype

        def __getitem__(self, part: slice) -> NDArray[Any]:
            read.append(part.start)
            return np.asarray(self.bscans[part])

    def counted(path: Any) -> Any:
        volume = read_oct(path)
        object.__setattr__(volume, "bscans", Counted(volume.bscans))
        return volume

    monkeypatch.setattr("pipeline.oct.bscan_loader.read_oct", counted)
    batch = run_over(folder)
    loader = loader_of(batch, batch_size=1, num_workers=num_workers)
    for handed_out, _ in enumerate(given(loader, batch), start=1):
        assert len(read) <= handed_out + ahead
    assert len(read) == sum(COUNTS.values())


def test_threads_prepare_the_next_batch_meanwhile_and_end_with_the_run(folder: Path) -> None:
    before = set(threading.enumerate())
    prepared = threading.Event()
    ours = []

    def notes(item: Mapping[Hashable, Any]) -> Any:
        if item["index"] == 1:
            ours.append(threading.current_thread())
            prepared.set()
        return LoadBScand()(item)

    batch = run_over(folder)
    with batch.closing:
        loader = loader_of(batch, batch_size=1, num_workers=1, transform=notes)
        assert next(loader)["index"].tolist() == [0]
        assert prepared.wait(10)
        assert not before & set(ours)
    (thread,) = ours
    thread.join(10)
    assert not thread.is_alive()
    assert list(loader) == []


def test_inputs_done_before_are_not_read_again(folder: Path) -> None:
    batch = run_over(folder)
    list(given(loader_of(batch), batch))
    assert list(loader_of(run_over(folder))) == []
    assert len(list(loader_of(run_over(folder, overwrite=True)))) == 2 + 1 + 1


def test_rows_of_the_file_are_not_handed_on(folder: Path) -> None:
    step = next(loader_of(run_over(folder)))
    assert not {"ilm", "bm", "crossed_columns"} & set(step)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"num_workers": -1}])
def test_settings_out_of_range_are_refused(folder: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="expected at least 1 and 0"):
        loader_of(run_over(folder), **wrong)


def test_real_files_of_one_bscan_come_one_by_one(tmp_path: Path, lamina_data: Path) -> None:
    source = lamina_data / "oct" / "heyex_vol"
    if not source.is_dir():
        pytest.skip("no oct/heyex_vol in LAMINA_DATA")
    paths = sorted(source.glob("*.vol"))
    cases = [{"image": str(path), "name": path.name} for path in paths]
    batch = BatchRun(cases, str(tmp_path / "out"), {}, None, "oct_layers")
    frame = Compose([LoadBScand(), FitToFramed(frame=(480, 768))])
    steps = list(given(BScanLoader(batch, frame, num_workers=1), batch))
    assert [name for name, _, _ in steps] == [path.name for path in paths]
    for _, _, step in steps:
        assert step["image"].shape == (1, 1, 480, 768)
        assert step["scale_y_um"].item() == pytest.approx(3.87, abs=0.01)
