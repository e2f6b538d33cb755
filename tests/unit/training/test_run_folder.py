from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from ignite.engine import Engine, Events

from pipeline.errors import ResourceError
from pipeline.training.run_folder import RunFolder, describe_environment, run_directory

CONFIG = {"max_epochs": 2, "network_def": {"_target_": "UNet", "depths": (8, 16)}}
messages = logging.getLogger("pipeline.somewhere")


@pytest.fixture(autouse=True)
def _package_logger() -> Iterator[None]:
    """Check that no test leaves a log file open or another level behind."""
    package = logging.getLogger("pipeline")
    handlers, level = list(package.handlers), package.level
    yield
    assert package.handlers == handlers
    assert package.level == level


def log_lines(folder: Path) -> list[str]:
    return (folder / "run.log").read_text("utf-8").splitlines()


def run(folder: Path, step: object = None, facts: tuple[str, ...] = ()) -> Engine:
    engine = Engine(lambda *_: step() if callable(step) else None)
    RunFolder(str(folder), CONFIG, torch.device("cpu"), facts).attach(engine)
    engine.run([0, 1])
    return engine


def test_folder_has_config_environment_and_log(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    run(folder, facts=("phantom: 12 images", "7,763,041 parameters, 100 % trained"))
    assert yaml.safe_load((folder / "config.yaml").read_text("utf-8")) == {
        "max_epochs": 2,
        "network_def": {"_target_": "UNet", "depths": [8, 16]},
    }
    environment = json.loads((folder / "environment.json").read_text("utf-8"))
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["device"] == "cpu"
    assert {"started", "command", "machine", "torch_threads"} <= set(environment)
    first, second = log_lines(folder)
    assert first.endswith("INFO pipeline.training.run_folder: phantom: 12 images")
    assert second.endswith("7,763,041 parameters, 100 % trained")


def test_log_is_on_disk_line_by_line(tmp_path: Path) -> None:
    seen: list[int] = []

    def step() -> None:
        messages.info("step")
        seen.append(len(log_lines(tmp_path)))

    run(tmp_path, step)
    assert seen == [1, 2]


@pytest.mark.parametrize("level", [logging.NOTSET, logging.WARNING, logging.DEBUG])
def test_log_has_what_the_screen_may_not_show(tmp_path: Path, level: int) -> None:
    package = logging.getLogger("pipeline")
    before = package.level
    package.setLevel(level)
    run(tmp_path, lambda: messages.info("told"))
    assert package.level == level
    package.setLevel(before)
    assert len(log_lines(tmp_path)) == 2


def test_nothing_is_logged_before_and_after_the_run(tmp_path: Path) -> None:
    messages.warning("before")
    run(tmp_path, facts=("inside",))
    messages.warning("after")
    assert len(log_lines(tmp_path)) == 1


def test_resumed_run_appends(tmp_path: Path) -> None:
    run(tmp_path, facts=("first",))
    run(tmp_path, facts=("second",))
    assert [line.rsplit(" ", 1)[-1] for line in log_lines(tmp_path)] == ["first", "second"]


def test_resumed_run_says_which_settings_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    monkeypatch.setitem(CONFIG, "max_epochs", 3)
    run(tmp_path)
    (line,) = log_lines(tmp_path)
    assert line.endswith("config.yaml changes: max_epochs: 2 before, now 3")


@pytest.mark.parametrize("error", [ZeroDivisionError("as planned"), KeyboardInterrupt()])
def test_error_ends_the_log_and_goes_on_up(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run(tmp_path, fail)
    assert caught.value is error
    (line,) = log_lines(tmp_path)
    assert line.endswith(f"ERROR pipeline.training.run_folder: stopped: {error or ''}") or (
        line.endswith("stopped: KeyboardInterrupt")
    )


def test_error_of_a_handler_ends_the_log_too(tmp_path: Path) -> None:
    engine = Engine(lambda *_: None)
    RunFolder(str(tmp_path), CONFIG, "cpu").attach(engine)

    def fail() -> None:
        raise ResourceError("last.pt: cannot be written: No space left on device")

    engine.add_event_handler(Events.EPOCH_COMPLETED, fail)
    with pytest.raises(ResourceError):
        engine.run([0])
    assert [line.endswith("No space left on device") for line in log_lines(tmp_path)] == [True]


def test_early_stop_ends_the_log(tmp_path: Path) -> None:
    engine = Engine(lambda engine, _: engine.terminate())
    RunFolder(str(tmp_path), CONFIG, "cpu", ["told"]).attach(engine)
    engine.run([0], max_epochs=3)
    assert len(log_lines(tmp_path)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="make the folder writable"):
        run(tmp_path / "run")
    tmp_path.chmod(0o700)


def test_file_in_the_way_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"")
    with pytest.raises(ResourceError, match="a file stands where a folder is needed") as caught:
        run(tmp_path / "run")
    assert caught.value.exit_code == 5


def test_environment_is_plain_data() -> None:
    found = describe_environment("cpu")
    assert json.loads(json.dumps(found)) == found


def test_folds_have_folders_of_their_own() -> None:
    assert run_directory("fundus_vessels", "a") == str(Path("runs/fundus_vessels/a"))
    assert run_directory("fundus_vessels", "a", 0) == str(Path("runs/fundus_vessels/a/fold_0"))
