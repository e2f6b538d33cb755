from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from pipeline.data import atomic
from pipeline.errors import ResourceError


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_bytes_written_are_bytes_read(tmp_path: Path) -> None:
    path = atomic.write_bytes(tmp_path / "new" / "folder" / "a.bin", b"\0\r\n\xff")
    assert path.read_bytes() == b"\0\r\n\xff"
    assert files_below(tmp_path / "new" / "folder") == ["a.bin"]


@pytest.mark.parametrize(
    "name", ["a.png", "scan.nii.gz", "im_1.5.tif", "no_suffix", "späte Ähre.png"]
)
def test_temporary_name_lies_beside_the_final_one_and_keeps_its_suffixes(
    tmp_path: Path, name: str
) -> None:
    final = tmp_path / name
    with atomic.atomic_path(final) as temporary:
        assert temporary.parent == final.parent
        assert temporary.name.endswith(".tmp" + "".join(final.suffixes))
        assert temporary.name.startswith(".")
        temporary.write_bytes(b"x")
        assert not final.exists()
    assert files_below(tmp_path) == [name]


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_old_file_survives_a_failure_at_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, code: int
) -> None:
    final = atomic.write_bytes(tmp_path / "a.bin", b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    if stage == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if stage == "replace":
        monkeypatch.setattr(Path, "replace", fail)

    def write_new() -> None:
        with atomic.atomic_path(final) as temporary:
            temporary.write_bytes(b"half of the new")
            if stage == "write":
                fail()

    with pytest.raises(ResourceError, match=r"a\.bin: cannot be written: .+; .+") as caught:
        write_new()
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    assert final.read_bytes() == b"old"
    assert files_below(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ZeroDivisionError])
def test_any_exception_leaves_neither_temporary_nor_final_file(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def interrupted() -> None:
        with atomic.atomic_path(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert files_below(tmp_path) == []


def test_failure_to_read_an_input_is_not_called_a_failure_to_write(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic.atomic_path(tmp_path / "a.bin"):
        raise PermissionError(errno.EACCES, "Permission denied", "/some/input.png")


def test_file_where_a_folder_is_needed_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError, match="a file stands where a folder is needed"):
        atomic.write_bytes(tmp_path / "file" / "a.bin", b"x")


def test_failure_of_a_body_that_wrote_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic.atomic_path(tmp_path / "a.bin"):
        pass


def test_threads_that_write_one_name_leave_the_whole_file_of_one(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=30)

    def write(content: bytes) -> None:
        with atomic.atomic_path(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(content[:5])
            both.wait()
            with temporary.open("ab") as stream:
                stream.write(content[5:])
            both.wait()

    contents = (b"0" * 10, b"1" * 10)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, contents))
    assert (tmp_path / "a.bin").read_bytes() in contents
    assert files_below(tmp_path) == ["a.bin"]


def test_only_temporary_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = 2**22 + 12345  # above the largest process id Linux gives out
    stale = [f".best.{dead}-7.tmp.pt", f".best.{dead}.tmp.pt"]  # the second by an earlier version
    mine = [f".best.{os.getpid()}-7.tmp.pt", f".best.{os.getpid()}.tmp.pt"]
    for name in [*stale, *mine, ".best.pt", "best.pt", f".best.{dead}-x.tmp.pt"]:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in atomic.remove_stale(tmp_path)] == stale
    assert len(files_below(tmp_path)) == 5


def test_what_was_being_written_when_the_process_was_killed_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pipeline.data.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path: path.touch(); print(path.name, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.nii.gz")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        name = running.stdout.readline().decode().strip()
        try:
            assert atomic.remove_stale(tmp_path) == []
        finally:
            running.kill()
    assert atomic.remove_stale(tmp_path) == [tmp_path / name]
    assert files_below(tmp_path) == []


def test_process_that_began_after_a_file_was_written_has_not_written_it(tmp_path: Path) -> None:
    """A restart gives its number to another process; clocks may differ by less than a minute."""
    began_s = psutil.Process().create_time()
    for name, seconds in (("before", -100), ("at_the_time", -20), ("after", 100)):
        path = tmp_path / f".{name}.{os.getpid()}-7.tmp"
        path.touch()
        os.utime(path, (began_s + seconds,) * 2)
    (removed,) = atomic.remove_stale(tmp_path)
    assert removed.name.startswith(".before")


@pytest.mark.parametrize(
    ("error", "stays"), [(psutil.AccessDenied, True), (psutil.NoSuchProcess, False)]
)
def test_file_of_a_process_that_cannot_be_asked_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[psutil.Error], stays: bool
) -> None:
    def refuse(number: int) -> None:
        raise error(number)

    monkeypatch.setattr(psutil, "Process", refuse)
    (tmp_path / ".a.123-7.tmp").touch()
    atomic.remove_stale(tmp_path)
    assert (tmp_path / ".a.123-7.tmp").exists() == stays


def test_space_is_checked_with_a_reserve_of_a_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: Usage)
    atomic.check_free_bytes(tmp_path / "not" / "yet", 900_000)
    with pytest.raises(ResourceError, match="1 MB free, 1 MB needed"):
        atomic.check_free_bytes(tmp_path, 1_000_000)


def test_check_writable_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    folder = atomic.check_writable(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert files_below(folder) == []


def test_check_writable_names_the_folder_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(ResourceError, match="runs: cannot be written: Read-only file system"):
        atomic.check_writable(tmp_path / "runs")


@pytest.fixture
def mixed() -> dict[str, Any]:
    shared = [1, 2]
    return {
        "path": Path("a/b"),
        "scalar": np.float32(0.5),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "array": np.arange(3, dtype=np.uint8),
        "nan": float("nan"),
        "shared": [shared, shared],
        "none": None,
        "text": "später",
    }


def test_json_is_valid_and_has_null_for_nan(tmp_path: Path, mixed: dict[str, Any]) -> None:
    text = atomic.write_json(tmp_path / "a.json", mixed).read_text("utf-8")
    read = json.loads(text, parse_constant=pytest.fail)
    assert read["nan"] is None
    assert read["array"] == [0, 1, 2]
    assert (read["scalar"], read["count"], read["flag"]) == (0.5, 3, True)
    assert read["path"] == "a/b"


def test_yaml_has_no_tags_no_aliases_and_keeps_its_order(
    tmp_path: Path, mixed: dict[str, Any]
) -> None:
    text = atomic.write_yaml(tmp_path / "a.yaml", mixed).read_text("utf-8")
    assert "!!" not in text
    assert "&" not in text
    read = yaml.safe_load(text)
    assert list(read) == list(mixed)
    assert read["text"] == "später"


def test_csv_has_all_columns_in_order_of_appearance(tmp_path: Path) -> None:
    rows = [{"image": "a, b.png", "dice": np.float64(0.5)}, {"image": "c", "auc": None}]
    path = atomic.write_csv(tmp_path / "a.csv", rows)
    with path.open(newline="", encoding="utf-8") as stream:
        assert list(csv.reader(stream)) == [
            ["image", "dice", "auc"],
            ["a, b.png", "0.5", ""],
            ["c", "", ""],
        ]


def test_empty_csv_has_the_header_asked_for(tmp_path: Path) -> None:
    assert atomic.write_csv(tmp_path / "a.csv", [], ["path", "code"]).read_text() == "path,code\n"


def test_a_folder_replaces_the_one_before(tmp_path: Path) -> None:
    final = tmp_path / "sub" / "meshes"
    for name in ("old", "new"):
        with atomic.whole_folder(final) as folder:
            (folder / name).write_text(name)
    assert [path.name for path in final.iterdir()] == ["new"]
    assert [path.name for path in final.parent.iterdir()] == ["meshes"]


def test_a_failure_leaves_the_folder_that_was_there(tmp_path: Path) -> None:
    final = tmp_path / "meshes"
    with atomic.whole_folder(final) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(FileNotFoundError), atomic.whole_folder(final) as folder:
        (folder / "half" / "no such folder").write_text("")
    assert [path.name for path in final.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["meshes"]


def test_a_folder_that_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".meshes.partial").mkdir()
    (tmp_path / ".meshes.partial" / "half").write_text("")
    with atomic.whole_folder(tmp_path / "meshes") as folder:
        assert list(folder.iterdir()) == []
