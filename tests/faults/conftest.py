"""The fault matrix: one test per row, each through `python -m pipeline` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.data.images import IMAGE_SUFFIXES, read_image
from pipeline.data.writers import write_png
from pipeline.fundus.phantom import fundus_phantom, write_phantom_dataset
from pipeline.training.checkpoints import read_checkpoint

HERE = Path(__file__).resolve().parent
SIZE_PX = 96
PREDICTION = {"device": "cpu", "tune_allocator": "false"}
TRAINING = {  # two epochs, three steps each, in a second
    **PREDICTION,
    "threads": 1,
    "fov_size_px": SIZE_PX,
    "tensorboard": "false",
    "max_epochs": 2,
    "val_interval": 1,
    "patches_per_image": 2,
    "batch_size": 2,
    "effective_batch_size": 2,
    "patch_size": "[48,48]",
    "margin_size": "[64,64]",
    "depths": "[4,8]",
    "num_workers": 0,
}
VOLUMES = {**PREDICTION, "patch_size": "[32,32,32]"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "row(number, fault, outcome, code, otherwise=): a row of the table in docs/reliability.md; "
        "`otherwise` says where it is not what the matrix asked for",
    )


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        code: its exit code, negative for a signal.
        out, err: what it wrote.
    """

    code: int
    out: str
    err: str

    def complained(self, code: int, *texts: str) -> None:
        """Assert the exit code and that standard error is one line with all of `texts`."""
        assert self.code == code, (self.err, self.out[-2000:])
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n")
        for text in texts:
            assert str(text) in self.err

    def complained_of(self, code: int, *texts: str) -> None:
        """Assert the exit code and that standard error has one line for each of `texts`."""
        lines = self.err.splitlines()
        assert self.code == code, (self.err, self.out[-2000:])
        assert len(lines) == len(texts), self.err
        for line, text in zip(sorted(lines), sorted(texts), strict=True):
            assert line.startswith("error: ")
            assert text in line

    def went_well(self) -> None:
        assert self.code == 0, (self.err, self.out[-2000:])
        assert self.err == ""


class Command:
    """A command that has begun."""

    def __init__(self, door: Door, pid: int, out: Path, err: Path) -> None:
        self._door = door
        self.pid = pid
        self._out, self._err = out, err

    def assert_running(self) -> None:
        """Wait a moment, and fail where the command has ended."""
        time.sleep(0.01)
        status = psutil.Process(self.pid).status()
        assert status != psutil.STATUS_ZOMBIE, self._err.read_text("utf-8")

    def send(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)

    def end(self) -> Ended:
        code = self._door.ask({"wait": self.pid})["code"]
        return Ended(code, self._out.read_text("utf-8"), self._err.read_text("utf-8"))


class Door:
    """The command line, asked for in `door.py`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._count = 0

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None
        assert answers is not None
        questions.write(json.dumps(request) + "\n")
        questions.flush()
        return dict(json.loads(answers.readline()))

    def start(
        self, *words: object, environment: Mapping[str, str] | None = None, **inject: Any
    ) -> Command:
        """Begin a command; `inject` names faults of `injected.py` with their arguments."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        for path in (out, err):
            path.touch(mode=0o666)
        request = {
            "words": [str(word) for word in words],
            "out": str(out),
            "err": str(err),
            "folder": str(self._folder),
            "environment": dict(environment or {}),
            "inject": {name: list(given) for name, given in inject.items()},
        }
        return Command(self, self.ask(request)["pid"], out, err)

    def __call__(self, *words: object, **more: Any) -> Ended:
        return self.start(*words, **more).end()

    def train(self, data: Path, run: Path, *words: object, **more: Any) -> Ended:
        return self.start_training(data, run, *words, **more).end()

    def start_training(self, data: Path, run: Path, *words: object, **more: Any) -> Command:
        """Begin a small training; settings among `words`, as `name=value`, stand over it."""
        given = dict(str(word).split("=", 1) for word in words if "=" in str(word))
        overlays = [word for word in words if "=" not in str(word)]
        settings = {**TRAINING, "dataset_dir": data, "output_dir": run, **given}
        return self.start("train", "fundus_vessels", *overlays, *_spelt(settings), **more)

    def predict(
        self,
        source: Path,
        results: Path,
        *words: object,
        bundle: str = "fundus_vessels",
        **more: Any,
    ) -> Ended:
        """Predict with small settings; further ones as `name=value` among `words`."""
        given = dict(str(word).split("=", 1) for word in words)
        small = VOLUMES if bundle == "vesuvius_surface" else PREDICTION
        command = ("predict", bundle, "-i", source, "-o", results)
        return self(*command, *_spelt({**small, **given}), **more)

    def frozen(self, data: Path, path: Path) -> Path:
        """Write every file of a data folder with its checksum into a manifest."""
        self("data", "freeze", "vessel_pairs", data, "-o", path, "--folds", 2).went_well()
        return path

    @staticmethod
    def manifest(name: str) -> Path:
        """Return the file of a shipped manifest."""
        return HERE.parents[1] / "data_manifests" / f"{name}.yaml"


def _spelt(settings: Mapping[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="session")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """The command line."""
    folder = tmp_path_factory.mktemp("door")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "door.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Door(process, folder)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=20)
        finally:
            process.kill()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small labelled data folder. Tests only read it."""
    folder = tmp_path_factory.mktemp("faults") / "data"
    return Path(write_phantom_dataset(folder, {"train": 3, "val": 1, "test": 1}, size_px=SIZE_PX))


@pytest.fixture(scope="session")
def trained(door: Door, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed. Tests only read it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    door.train(shared_data, run, "checkpoint_every=2").went_well()
    return run


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder with two sound photographs."""
    folder = tmp_path / "photographs"
    for seed, name in enumerate(("a.png", "b.png")):
        write_png(folder / name, fundus_phantom(seed, (SIZE_PX, SIZE_PX)).image)
    return folder


@pytest.fixture
def assert_whole() -> Callable[[Path], None]:
    """Assert that nothing partial stands below a folder."""
    return _assert_whole


def _assert_whole(folder: Path) -> None:
    """Assert that every file below `folder` is what its name says, and none is a temporary one."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert ".tmp" not in path.name, path
        assert ".partial" not in str(path), path
        if path.suffix == ".pt":
            read_checkpoint(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.name.lower().endswith(IMAGE_SUFFIXES):
            assert read_image(path).size
