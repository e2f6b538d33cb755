"""One run at a time in a folder, whatever ends it."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ignite.engine import Engine, Events

from pipeline.data import atomic
from pipeline.errors import ConfigurationError, ResourceError
from pipeline.training.run_folder import RunFolder
from pipeline.training.run_lock import RunLock

# A run whose loader worker, a forked child, outlives it.
RUN = """
import os, sys, time
from pipeline.training.run_lock import RunLock
lock = RunLock(sys.argv[1])
lock.acquire()
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""


def engine(folder: Path) -> Engine:
    trainer = Engine(lambda *_: None)
    RunFolder(str(folder), {"name": "first"}, "cpu").attach(trainer)
    return trainer


def test_second_run_is_refused_and_told_who_has_the_folder(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    whose = rf"process {os.getpid()} on {socket.gethostname()} since .*another output_dir"
    with pytest.raises(ConfigurationError, match=whose) as caught:
        second.acquire()
    assert caught.value.exit_code == 2
    first.release()
    second.acquire()
    second.release()


def test_owner_that_has_only_just_begun_is_refused_without_a_name(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    for text in ("", "{}", "[]"):
        (tmp_path / ".lock.json").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigurationError, match="its process is not known"):
            RunLock(tmp_path).acquire()
    first.release()


def test_release_is_complete_and_may_be_repeated(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.release()
    lock.acquire()
    lock.release()
    lock.release()
    assert not (tmp_path / ".lock.json").exists()


def test_refused_run_leaves_the_first_one_alone(tmp_path: Path) -> None:
    def second(trainer: Engine) -> None:
        before = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
        other = Engine(lambda *_: None)
        RunFolder(str(tmp_path), {"name": "second"}, "cpu", ["second"]).attach(other)
        with pytest.raises(ConfigurationError, match="another run is at work"):
            other.run([0])
        assert {path: path.read_bytes() for path in sorted(tmp_path.iterdir())} == before

    first = engine(tmp_path)
    first.add_event_handler(Events.ITERATION_COMPLETED, second)
    first.run([0])


def test_the_end_of_a_run_gives_the_folder_free(tmp_path: Path) -> None:
    engine(tmp_path).run([0])
    engine(tmp_path).run([0])


def test_what_other_handlers_do_at_the_end_is_locked_and_logged(tmp_path: Path) -> None:
    def at_the_end() -> None:
        logging.getLogger("pipeline.somewhere").info("average saved")
        with pytest.raises(ConfigurationError):
            RunLock(tmp_path).acquire()

    run = engine(tmp_path)
    run.add_event_handler(Events.COMPLETED, at_the_end)
    run.run([0])
    assert "average saved" in (tmp_path / "run.log").read_text("utf-8")


@pytest.mark.parametrize("event", [Events.STARTED, Events.ITERATION_COMPLETED, Events.COMPLETED])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_gives_the_folder_free(
    tmp_path: Path, event: Events, error: type[BaseException]
) -> None:
    def fail() -> None:
        raise error

    run = engine(tmp_path)
    run.add_event_handler(event, fail)
    with pytest.raises(error):
        run.run([0])
    engine(tmp_path).run([0])


def test_sigkill_gives_the_folder_free_though_a_worker_lives_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        worker = int(run.stdout.readline())
        try:
            with pytest.raises(ConfigurationError, match=f"process {run.pid} on"):
                RunLock(tmp_path).acquire()
            run.kill()
            run.wait()
            os.kill(worker, 0)  # it is still there
            lock = RunLock(tmp_path)
            lock.acquire()
            owner = json.loads((tmp_path / ".lock.json").read_text("utf-8"))
            assert owner["pid"] == os.getpid()
            lock.release()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_unfinished_files_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale = tmp_path / "checkpoints" / f".last.{gone.pid}.tmp.pt"
    alive = tmp_path / f".picture.{os.getppid()}.tmp.png"
    stale.parent.mkdir()
    for path in (stale, alive):
        path.write_bytes(b"half")
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert not stale.exists()
    assert alive.exists()


def test_folder_that_cannot_name_its_owner_is_not_kept_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: object) -> None:
        raise ResourceError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr("pipeline.training.run_lock.write_json", full)
    with pytest.raises(ResourceError):
        RunLock(tmp_path).acquire()
    monkeypatch.setattr("pipeline.training.run_lock.write_json", atomic.write_json)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
