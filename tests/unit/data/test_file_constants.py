from __future__ import annotations

import json
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.file_constants import FileConstants, file_identity
from pipeline.errors import InputError, ResourceError

Compute = Callable[..., Mapping[str, Any]]


class Counted:
    """A computation that knows how often it ran."""

    def __init__(self, *, arrays: bool) -> None:
        self.calls = 0
        self.arrays = arrays

    def __call__(self, path: Path, scale: int = 1) -> Mapping[str, Any]:
        self.calls += 1
        total = scale * sum(Path(path).read_bytes())
        found: dict[str, Any] = {"total": total, "share": 0.1 + 0.2, "undefined": math.nan}
        return {**found, "places": np.arange(total)} if self.arrays else found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "case.npy"
    path.write_bytes(bytes(range(20)))
    return path


def touch_later(path: Path) -> None:
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def entry_of(folder: Path) -> Path:
    (entry,) = folder.iterdir()
    return entry


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(value, expected[key])


@pytest.mark.parametrize("arrays", [False, True], ids=["json", "npz"])
def test_values_are_computed_once_and_read_as_they_were(
    tmp_path: Path, source: Path, arrays: bool
) -> None:
    compute = Counted(arrays=arrays)
    first = FileConstants(tmp_path / "c", "sums", compute)
    expected = first(source)
    assert expected["total"] == 190
    assert expected["share"] == 0.1 + 0.2
    assert expected["undefined"] is None
    assert_same(first(source), expected)
    assert_same(FileConstants(tmp_path / "c", "sums", compute)(source), expected)
    assert compute.calls == 1
    assert entry_of(tmp_path / "c").suffix == (".npz" if arrays else ".json")


def test_an_edited_file_is_computed_anew_and_leaves_one_entry(tmp_path: Path, source: Path) -> None:
    compute = Counted(arrays=False)
    constants = FileConstants(tmp_path / "c", "sums", compute)
    constants(source)
    source.write_bytes(bytes(20))
    touch_later(source)
    assert constants(source)["total"] == 0
    assert FileConstants(tmp_path / "c", "sums", compute)(source)["total"] == 0
    assert compute.calls == 2
    entry_of(tmp_path / "c")


def test_other_settings_and_versions_have_entries_of_their_own(
    tmp_path: Path, source: Path
) -> None:
    compute = Counted(arrays=False)
    for _ in range(2):
        assert FileConstants(tmp_path, "sums", compute)(source)["total"] == 190
        assert FileConstants(tmp_path, "sums", compute, {"scale": 2})(source)["total"] == 380
        assert FileConstants(tmp_path, "sums", compute, version=2)(source)["total"] == 190
    assert compute.calls == 3


def test_a_recorded_checksum_stands_for_place_and_time(tmp_path: Path, source: Path) -> None:
    compute = Counted(arrays=False)
    FileConstants(tmp_path / "c", "sums", compute)(source, sha256="ab" * 32)
    moved = source.rename(tmp_path / "moved.npy")
    touch_later(moved)
    constants = FileConstants(tmp_path / "c", "sums", compute)
    assert constants(moved, sha256="ab" * 32)["total"] == 190
    assert compute.calls == 1
    constants(moved, sha256="cd" * 32)
    assert compute.calls == 2


def damage(entry: Path, how: str) -> None:
    data = bytearray(entry.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data.clear()
    elif how == "flipped":
        data[data.rindex(b"190") + 2] ^= 0x01  # 191
    elif how == "foreign":
        data = bytearray(json.dumps({"format": "other"}).encode())
    elif how == "pickle":
        data = bytearray(pickle.dumps({"total": 190}))
    entry.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "foreign", "pickle"])
@pytest.mark.parametrize("arrays", [False, True], ids=["json", "npz"])
def test_a_damaged_entry_is_computed_anew_with_one_line(
    tmp_path: Path, source: Path, arrays: bool, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    compute = Counted(arrays=arrays)
    expected = FileConstants(tmp_path / "c", "sums", compute)(source)
    good = entry_of(tmp_path / "c").read_bytes()
    damage(entry_of(tmp_path / "c"), how)
    with caplog.at_level(logging.WARNING):
        assert_same(FileConstants(tmp_path / "c", "sums", compute)(source), expected)
    assert compute.calls == 2
    assert len(caplog.records) == 1
    assert "computed anew" in caplog.text
    if not arrays:
        assert entry_of(tmp_path / "c").read_bytes() == good


def test_an_entry_of_another_computation_under_this_name_is_not_believed(
    tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = FileConstants(tmp_path / "c", "sums", Counted(arrays=False), {"scale": 3})
    other(source)
    entry = entry_of(tmp_path / "c")
    FileConstants(tmp_path / "d", "sums", Counted(arrays=False))(source)
    entry.replace(entry_of(tmp_path / "d"))
    constants = FileConstants(tmp_path / "d", "sums", Counted(arrays=False))
    assert constants(source)["total"] == 190
    assert "foreign" in caplog.text


def test_kept_arrays_cannot_be_changed(tmp_path: Path, source: Path) -> None:
    constants = FileConstants(tmp_path, "sums", Counted(arrays=True))
    with pytest.raises(ValueError, match="read-only"):
        constants(source)["places"][0] = 1


def test_threads_that_ask_at_once_get_the_same(tmp_path: Path, source: Path) -> None:
    constants = FileConstants(tmp_path / "c", "sums", Counted(arrays=True))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(constants, [source] * 32))
    for values in found:
        assert_same(values, found[0])
    entry_of(tmp_path / "c")


def test_processes_that_ask_at_once_get_the_same(tmp_path: Path, source: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from pipeline.data.file_constants import FileConstants\n"
        "def size(path): time.sleep(0.2); return {'bytes': Path(path).stat().st_size}\n"
        "print(FileConstants(sys.argv[1], 'size', size)(sys.argv[2])['bytes'])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c"), str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in running] == ["20\n"] * 3
    entry_of(tmp_path / "c")


def test_a_kill_before_the_rename_leaves_no_entry(tmp_path: Path, source: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pipeline.data.file_constants import FileConstants\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "FileConstants(sys.argv[1], 'size', lambda path: {'bytes': 1})(sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c"), str(source)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "c").iterdir()
    assert left.name.startswith(".")  # which `remove_stale` deletes at the next start
    left.unlink()
    constants = FileConstants(tmp_path / "c", "size", lambda _: {"bytes": 2})
    assert constants(source) == {"bytes": 2}
    entry_of(tmp_path / "c")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, source: Path) -> None:
    (tmp_path / "c").write_text("a file")
    with pytest.raises(ResourceError, match="a file stands where a folder is needed"):
        FileConstants(tmp_path / "c", "sums", Counted(arrays=False))(source)


def test_preparing_tells_how_much_there_was_to_do(
    tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compute = Counted(arrays=False)
    other = tmp_path / "other.npy"
    other.write_bytes(b"abc")
    FileConstants(tmp_path / "c", "sums", compute)(source)
    with caplog.at_level(logging.INFO):
        FileConstants(tmp_path / "c", "sums", compute).prepare([source, other])
    assert "sums: 2 files, 1 computed" in caplog.text
    assert compute.calls == 2


def test_a_chunk_that_changes_changes_the_identity_of_its_folder(tmp_path: Path) -> None:
    chunk = tmp_path / "v.zarr" / "c" / "0"
    chunk.parent.mkdir(parents=True)
    chunk.write_bytes(b"one")
    before = file_identity(tmp_path / "v.zarr")
    assert file_identity(tmp_path / "v.zarr") == before
    touch_later(chunk)
    assert file_identity(tmp_path / "v.zarr") != before


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.npy: cannot be read"):
        FileConstants(tmp_path, "sums", Counted(arrays=False))(tmp_path / "absent.npy")
