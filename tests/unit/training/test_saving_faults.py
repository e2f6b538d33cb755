"""No space and no permission, at every stage of writing a checkpoint."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from pipeline.errors import ResourceError, exit_code
from pipeline.training import saving
from pipeline.training.checkpoints import read_checkpoint
from pipeline.training.monitor import Monitor
from pipeline.training.run_folder import RunFolder
from pipeline.training.saving import CheckpointHandler

ERRORS = pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=["full", "forbidden"])


class Run:
    """Four epochs of a network of `size_bytes`; `before` is called before an epoch is saved."""

    def __init__(
        self,
        folder: Path,
        size_bytes: int = 4000,
        before: dict[int, Callable[[], None]] | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.network = nn.Linear(size_bytes // 4, 1, bias=False)
        self.average = nn.Linear(size_bytes // 4, 1, bias=False)
        validator = Engine(lambda *_: None)
        self.monitor = Monitor(validator, "val_dice")
        self.trainer = Engine(self.step)
        RunFolder(str(folder), {}, "cpu").attach(self.trainer)

        def validate(trainer: Engine) -> None:
            validator.state.epoch = trainer.state.epoch
            validator.state.metrics = {"val_dice": trainer.state.epoch / 10}
            (before or {}).get(trainer.state.epoch, lambda: None)()

        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
        self.monitor.attach(self.trainer)
        CheckpointHandler(
            str(folder / "checkpoints"),
            self.network,
            {"average": self.average},
            {"bundle": "phantom"},
            self.monitor,
            averaged=self.average,
        ).attach(self.trainer)

    def step(self, trainer: Engine, _: Any) -> None:
        with torch.no_grad():
            self.network.weight += 1
            self.average.weight += 1

    def start(self) -> Run:
        self.trainer.run([0, 1], max_epochs=4)
        return self

    def read(self, name: str) -> dict[str, Any]:
        return read_checkpoint(self.folder / "checkpoints" / f"{name}.pt")


class Disk:
    """Fails at one stage of writing one checkpoint, from `fail` on.

    Args:
        temporary: the file that is written before it gets its name.
        stage: `write` (in the middle), `fsync` or `rename`.
        number: the error's.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, temporary: Path, stage: str, number: int
    ) -> None:
        self.temporary = temporary
        self.number = number
        self.failing = False
        place: Any = {"write": Path, "fsync": os, "rename": Path}[stage]
        name = {"write": "open", "fsync": "fsync", "rename": "replace"}[stage]
        real = getattr(place, name)

        def broken(*arguments: Any, **keywords: Any) -> Any:
            about_it = self.temporary.exists() if stage == "fsync" else arguments[0] == temporary
            if not (self.failing and about_it):
                return real(*arguments, **keywords)
            if stage == "write":
                return _Half(temporary, self.error())
            raise self.error()

        monkeypatch.setattr(place, name, broken)

    def fail(self) -> None:
        self.failing = True

    def error(self) -> OSError:
        return OSError(self.number, os.strerror(self.number))


class _Half(io.FileIO):
    """A file that takes half of what is written."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(path, "wb")
        self.error = error

    def write(self, data: Any) -> int:
        super().write(data[: len(data) // 2])
        raise self.error


def unfinished(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.tmp*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run whose disk worked."""
    return Run(tmp_path_factory.mktemp("whole")).start()


@pytest.mark.parametrize("stage", ["write", "fsync", "rename"])
@pytest.mark.parametrize("name", ["last", "best"])
@ERRORS
def test_the_old_checkpoint_stays_and_the_run_goes_on_later(
    whole: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stage: str,
    number: int,
) -> None:
    folder = tmp_path
    temporary = folder / "checkpoints" / f".{name}.{os.getpid()}-{threading.get_native_id()}.tmp.pt"
    with monkeypatch.context() as patch:
        disk = Disk(patch, temporary, stage, number)
        run = Run(folder, before={3: disk.fail})
        expected = rf"{name}\.pt: cannot be written: {os.strerror(number)}; .* output folder"
        with pytest.raises(ResourceError, match=expected) as caught:
            run.start()
    assert exit_code(caught.value) == 5
    assert run.trainer.state.epoch == 3
    for checkpoint in ("last", "best", "previous"):
        epoch = {"best": 3 if name == "last" else 2, "last": 2}.get(checkpoint)
        assert epoch is None or run.read(checkpoint)["epoch"] == epoch
    assert unfinished(folder) == []
    log = (folder / "run.log").read_text("utf-8").splitlines()
    assert "cannot be written" in log[-1]
    later = Run(folder).start()
    for checkpoint in ("last", "best", "previous", "swa"):
        found, wanted = later.read(checkpoint), whole.read(checkpoint)
        assert torch.equal(found["model"]["weight"], wanted["model"]["weight"])
        assert found["epoch"] == wanted["epoch"]


def test_training_does_not_start_where_its_checkpoints_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=9_000_000))
    Run(tmp_path / "small", size_bytes=100_000).start()
    large = Run(tmp_path / "large", size_bytes=1_000_000)
    with pytest.raises(ResourceError, match=r"checkpoints: 9 MB free, \d+ MB needed; free space"):
        large.start()
    assert large.trainer.state.iteration == 0
    assert not (tmp_path / "large" / "checkpoints").exists()


def test_a_resumed_run_needs_no_room_for_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(tmp_path, size_bytes=1_000_000).start()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=9_000_000))
    Run(tmp_path, size_bytes=1_000_000).start()


def test_free_space_is_asked_before_each_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = Usage(free=100_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    run = Run(tmp_path, 1_000_000, {3: lambda: setattr(free, "free", 1_000_000)})
    with pytest.raises(ResourceError, match="checkpoints: 1 MB free, 1 MB needed; free space"):
        run.start()
    assert run.read("last")["epoch"] == 2
    free.free = 100_000_000
    assert Run(tmp_path, 1_000_000).start().read("last")["epoch"] == 4


@dataclass
class Usage:
    """What `shutil.disk_usage` returns, as far as it is read."""

    free: int


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    command = [mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small disk is not permitted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("announced", [True, False], ids=["asked first", "found while writing"])
def test_a_disk_that_fills_up_keeps_the_old_checkpoint(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    def fill() -> None:
        free = shutil.disk_usage(small_disk).free
        (small_disk / "ballast").write_bytes(bytes(free - 200_000))

    if not announced:  # somebody else takes the space between the question and the writing
        monkeypatch.setattr(saving, "check_free_bytes", lambda *_: None)
    run = Run(small_disk, size_bytes=300_000, before={3: fill})
    expected = "0 MB free" if announced else "cannot be written: No space left on device"
    with pytest.raises(ResourceError, match=expected):
        run.start()
    assert run.read("last")["epoch"] == 2
    assert unfinished(small_disk) == []
    (small_disk / "ballast").unlink()
    assert Run(small_disk, size_bytes=300_000).start().read("last")["epoch"] == 4
