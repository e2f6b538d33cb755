from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from filelock import FileLock

from pipeline.data.atomic import resource_errors
from pipeline.data.volumes import open_volume
from pipeline.errors import ConfigurationError, ResourceError
from pipeline.inference.stream_agreement import differences
from pipeline.inference.stream_plan import plan_stream
from pipeline.inference.stream_store import StreamStore
from pipeline.inference.windows import make_grid

SHAPE, UNIT = (12, 10, 10), (4, 10, 10)
VALUES = np.arange(1, 1 + np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)


def make_store(folder: Path, name: str = "r.zarr", **changed: Any) -> StreamStore:
    plan = plan_stream(
        SHAPE, make_grid(SHAPE, (4, 4, 4)), UNIT, blocks=changed.pop("blocks", 3), out_bytes=2
    )
    agreement = {"format": "a", "inferer": {"roi": [4, 4, 4]}, "blocks": plan.count, **changed}
    return StreamStore(
        folder / name, plan, agreement, {"dtype": "uint16", "chunks": UNIT}, levels=2
    )


def work(store: StreamStore, computed: list[int] | None = None) -> bool:
    """Write what is missing as a run does; `computed` gets the planes that were written."""
    array = store.open()
    if array is not None:
        for index, block in enumerate(store.plan.blocks):
            with store.claim(index) as written:
                for first in range(block.low[0] + written, block.high[0], UNIT[0]):
                    planes = slice(first, min(first + UNIT[0], block.high[0]))
                    with resource_errors(store.partial):
                        array[planes] = VALUES[planes]
                    store.note(index, planes.stop - block.low[0], {"torch": "1"})
                    if computed is not None:
                        computed.append(first)
    return store.finish()


def assert_whole(target: Path) -> None:
    np.testing.assert_array_equal(open_volume(target)[:], VALUES)
    assert open_volume(target, "1").shape == (6, 5, 5)
    made: Any = zarr.open_group(target, mode="r").attrs["lamina"]
    assert made["format"] == "a"
    assert made["record"]["made_with"] == [{"torch": "1"}]


def test_what_is_written_gets_its_name_when_all_blocks_are(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert not store.is_complete()
    assert work(store)
    assert store.is_complete()
    assert_whole(tmp_path / "r.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["r.zarr"]


def test_with_a_block_missing_there_is_no_result(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.open()
    store.note(0, 4)
    store.note(2, 3)
    assert list(store.missing()) == [1, 2]
    assert not store.finish()
    assert not (tmp_path / "r.zarr").exists()


forked = multiprocessing.get_context("fork")


def in_process(target: Callable[[], Any]) -> Any:
    process = forked.Process(target=target)
    process.start()
    process.join()
    return process.exitcode


class Steps:
    """Counts what a process changes in the file system, and ends it before one of them."""

    def __init__(self, folder: Path, fatal: int | None = None) -> None:
        self.count = 0
        self._folder = str(folder)
        self._fatal = fatal
        sys.addaudithook(self._note)  # there is no way to remove one: in a forked process only

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._writes(event, arguments):
            if self.count == self._fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1

    def _writes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            flags = arguments[2] or 0
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return False
        elif event in ("os.remove", "os.rmdir") and arguments[1] != -1:
            return True  # rmtree, relative to an open folder
        elif event not in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            return False
        return self._folder in str(arguments[0])


def steps_of_a_run(folder: Path) -> int:
    folder.mkdir()

    def count() -> None:
        steps = Steps(folder)
        work(make_store(folder))
        (folder / "steps").write_text(str(steps.count))

    assert in_process(count) == 0
    return int((folder / "steps").read_text())


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_step_leaves_nothing_half_and_is_survived(tmp_path: Path, every: int) -> None:
    steps = steps_of_a_run(tmp_path / "counted")
    assert steps > 60
    for fatal in range(0, steps, every):
        folder = tmp_path / f"{fatal}"
        folder.mkdir()

        def die(folder: Path = folder, fatal: int = fatal) -> None:
            Steps(folder, fatal)
            work(make_store(folder))

        assert in_process(die) == -signal.SIGKILL
        store = make_store(folder)
        if store.target.exists():
            assert_whole(store.target)
        done = [i for i in range(3) if store.target.exists() or store.written(i) == 4]
        computed: list[int] = []
        assert work(store, computed)
        assert computed == [4 * i for i in range(3) if i not in done]
        assert_whole(store.target)
        assert [path.name for path in folder.iterdir()] == ["r.zarr"]


def test_a_kill_at_any_step_of_removing_leaves_nothing_half(tmp_path: Path) -> None:
    fatal, survived = 0, False
    while not survived:
        folder = tmp_path / f"{fatal}"
        folder.mkdir()
        work(make_store(folder))

        def die(folder: Path = folder, fatal: int = fatal) -> None:
            Steps(folder, fatal)
            make_store(folder).remove()

        survived = in_process(die) == 0
        if (folder / "r.zarr").exists():
            assert_whole(folder / "r.zarr")
        make_store(folder).remove()
        assert not list(folder.iterdir())
        fatal += 3
    assert fatal > 9


def test_a_full_disk_at_any_step_is_a_resource_error_and_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, failed = Path.replace, 0
    for fatal in itertools.count():
        calls = itertools.count()

        def full(self: Path, other: Path, calls: Any = calls, fatal: int = fatal) -> Path:
            if next(calls) == fatal:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(other))
            return replace(self, other)

        store = make_store(tmp_path / f"{fatal}")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full)
            with contextlib.suppress(ResourceError):
                assert work(store)
                break
        failed += 1
        assert not store.target.exists()
        assert work(store)
        assert_whole(store.target)
    assert failed > 12


def test_another_runs_part_is_refused_with_what_differs(tmp_path: Path) -> None:
    make_store(tmp_path).open()
    with pytest.raises(ConfigurationError, match=r"run with another format, inferer\.roi;"):
        make_store(tmp_path, format="b", inferer={"roi": [8, 8, 8]}).open()
    with pytest.raises(ConfigurationError, match="run with another blocks;"):
        make_store(tmp_path, blocks=1).open()


def test_another_runs_result_is_refused_with_what_differs(tmp_path: Path) -> None:
    work(make_store(tmp_path))
    with pytest.raises(ConfigurationError, match=r"made with another format; .* overwrite"):
        make_store(tmp_path, format="b").is_complete()


def test_a_whole_result_is_the_same_however_it_was_cut(tmp_path: Path) -> None:
    work(make_store(tmp_path))
    assert make_store(tmp_path, blocks=1).is_complete()
    assert make_store(tmp_path, blocks=1).open() is None


@pytest.mark.parametrize("kind", ["file", "folder", "array", "group"])
def test_what_is_no_result_is_refused_and_not_removed_unless_it_is_zarr(
    tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "r.zarr"
    if kind == "file":
        target.write_text("precious")
    elif kind == "folder":
        target.mkdir()
        (target / "precious.txt").write_text("precious")
    elif kind == "array":
        zarr.create_array(target, shape=(2,), dtype="uint8")
    else:
        zarr.create_group(target)
    store = make_store(tmp_path)
    with pytest.raises(ConfigurationError, match="not the result of such a run"):
        store.open()
    assert target.exists()
    if kind in ("file", "folder"):
        with pytest.raises(ConfigurationError, match="is no Zarr folder and is not overwritten"):
            store.remove()
        assert target.exists()
    else:
        store.remove()
        assert not list(tmp_path.iterdir())


def test_what_another_process_is_writing_is_not_removed(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.open()
    with store.claim(1), pytest.raises(ConfigurationError, match=r"by another process \(block_000"):
        make_store(tmp_path).remove()
    make_store(tmp_path).remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["result", "r.zip", ".zarr", "r.zarr.d"])
def test_a_target_is_called_zarr(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"call it NAME\.zarr"):
        make_store(tmp_path, name)


def test_missing_folders_are_made(tmp_path: Path) -> None:
    assert work(make_store(tmp_path / "one" / "two"))


def test_a_folder_that_cannot_be_made_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="a file stands where a folder is needed"):
        make_store(tmp_path / "file").open()


def test_a_block_that_is_held_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, order = make_store(tmp_path), []
    store.open()

    def second() -> None:
        with make_store(tmp_path).claim(0) as written:
            order.append(("second", written))

    with caplog.at_level(logging.INFO), store.claim(0) as written:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append(("first", written))
        store.note(0, 4)
    thread.join()
    assert order == [("first", 0), ("second", 4)]
    assert "block_00000.lock: held by another process; waiting" in caplog.text


def test_who_waited_while_the_result_became_whole_has_nothing_to_do(tmp_path: Path) -> None:
    store, late = make_store(tmp_path), make_store(tmp_path)
    assert late.open() is not None
    assert work(store)
    with late.claim(0) as written:
        assert written == 4
    assert late.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["r.zarr"]


def test_a_lock_in_a_folder_that_is_being_removed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    store.open()
    acquire, removals = FileLock.acquire, iter([True, True])

    def vanishing(self: FileLock, *args: Any, **kwargs: Any) -> Any:
        if next(removals, False):
            shutil.rmtree(store.partial / "locks")
        return acquire(self, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", vanishing)
    with store.claim(0) as written:
        assert written == 0


def test_processes_that_finish_at_once_finish_once(tmp_path: Path) -> None:
    def run() -> None:
        store = make_store(tmp_path)
        assert work(store)

    processes = [forked.Process(target=run) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert_whole(tmp_path / "r.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["r.zarr"]


def test_differences_are_named_down_to_the_setting() -> None:
    wanted = {"a": 1, "b": {"c": [1], "d": 2}, "blocks": 3}
    assert differences({"a": 1, "b": {"c": [1], "d": 2}, "blocks": 3, "record": 1}, wanted) == []
    assert differences({"a": 2, "b": {"c": [2], "d": 2}, "blocks": 4}, wanted) == [
        "a",
        "b.c",
        "blocks",
    ]
    assert differences({**wanted, "blocks": 4}, wanted, whole=True) == []
    assert differences({**wanted, "new": 4}, wanted) == ["new"]
    assert differences(None, wanted) == ["format"]


def test_the_plan_of_a_run_can_be_read(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.open()
    plan = json.loads((store.partial / "plan.json").read_text("utf-8"))
    assert plan["agreement"]["inferer"] == {"roi": [4, 4, 4]}
    assert plan["started"].endswith("+00:00")
