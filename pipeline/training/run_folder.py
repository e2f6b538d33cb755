"""What a run leaves about itself under `output_dir`: resolved config, environment, log."""

from __future__ import annotations

import datetime
import logging
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from pipeline.data.atomic import write_json, write_yaml
from pipeline.errors import Interrupted, LaminaError, Preempted
from pipeline.hardware.environment import package_versions
from pipeline.training.changed_settings import changed_settings
from pipeline.training.interruption import explained
from pipeline.training.processes import is_writer
from pipeline.training.run_lock import RunLock
from pipeline.training.tracking import MLflowRecord, asks_for_record

__all__ = ["RunFolder", "describe_environment", "run_directory"]

logger = logging.getLogger(__name__)


def describe_environment(device: torch.device | str) -> dict[str, Any]:
    """Return versions, machine and command of this process, as plain data."""
    program = Path(sys.argv[0])
    started_as = f"python -m {program.parent.name}" if program.stem == "__main__" else program.name
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"{started_as} {shlex.join(sys.argv[1:])}",
        "device": str(device),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": package_versions(),
    }


class RunFolder:
    """Write `config.yaml`, `environment.json` and `run.log` and open the log with what was found.

    List it first among `train::handlers`: until the run ends, a second one in this folder is
    refused. The log is flushed line by line, so that it is whole up to the moment a run was killed,
    and appended to when a run is resumed, with the settings that are not as before. It has the
    package's messages from INFO on, whatever the logging configuration shows on the screen. Of
    several processes the first alone writes. With `--tracking mlflow` it keeps MLflow's record of
    the run too.

    Args:
        output_dir: the run's folder, made where absent.
        config: the resolved configuration, as plain data.
        device: where the run computes.
        facts: lines for the head of the log, such as the cases found and the number of parameters.
        plan: what was planned for this machine, for `environment.json`.

    Raises:
        ConfigurationError: MLflow is asked for and not installed.
    """

    def __init__(
        self,
        output_dir: str,
        config: Mapping[str, Any],
        device: torch.device | str,
        facts: Sequence[str] = (),
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.config = dict(config)
        self.device = device
        self.facts = tuple(facts)
        self.plan = {} if plan is None else {"plan": dict(plan)}
        self._record: MLflowRecord | None = None
        if asks_for_record(self.config):
            self._record = MLflowRecord(self.output_dir, self.config, plan or {})
        self._lock = RunLock(self.output_dir)
        self._log: logging.FileHandler | None = None
        self._level = logging.NOTSET

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the trainer or an evaluator."""
        engine.add_event_handler(Events.STARTED, self.open)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._close_after_error)

    def open(self, engine: Engine) -> None:
        """Lock the folder, write the two files and start the log.

        Raises:
            ConfigurationError: another run is at work in the folder.
            ResourceError: the folder cannot be written.
        """
        # Added now, behind all others: what they do when the run ends is part of it.
        if self._record is not None and is_writer():
            self._record.attach(engine)
        if not engine.has_event_handler(self.close, Events.COMPLETED):
            engine.add_event_handler(Events.COMPLETED, self.close)
        self.close()
        if not is_writer():
            return
        self._lock.acquire()
        package = logging.getLogger("pipeline")
        self._log = logging.FileHandler(self.output_dir / "run.log", encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._level = package.level
        if not package.isEnabledFor(logging.INFO):
            package.setLevel(logging.INFO)
        package.addHandler(self._log)
        for fact in self.facts:
            logger.info(fact)
        config = self.output_dir / "config.yaml"
        for change in changed_settings(config, self.config):
            logger.info("config.yaml changes: %s", change)
        write_yaml(config, self.config)
        environment = describe_environment(self.device) | self.plan
        write_json(self.output_dir / "environment.json", environment)

    def close(self) -> None:
        """End the log and give the folder free."""
        if self._log is not None:
            package = logging.getLogger("pipeline")
            package.removeHandler(self._log)
            package.setLevel(self._level)
            self._log.close()
            self._log = None
        self._lock.release()

    def _close_after_error(self, engine: Engine, error: BaseException) -> None:
        # Whoever raises cuts off the listeners behind, and somebody has to: ignite takes an error
        # for dealt with once anyone listens. So this is the place for what must not be left out.
        interruption = getattr(engine.state, "interruption", None)
        told = explained(error, interruption)
        if interruption is not None:
            interruption.end()
        if self._log is not None:  # ignite tells of an error in an iteration twice
            asked = isinstance(told, Interrupted | Preempted)
            level = logging.WARNING if asked else logging.ERROR
            logger.log(level, "stopped: %s", str(told) or type(told).__name__)
        if self._record is not None:
            try:
                self._record.end(error=told)
            except (LaminaError, OSError, ValueError):  # not in the way of what stopped the run
                logger.exception("tracking: the end is not on record")
        self.close()
        if told is error:
            raise error
        raise told from error


def run_directory(bundle: str, name: str, fold: int | None = None) -> str:
    """Return `runs/<bundle>/<name>`, with `fold_<k>` below it where a fold is set."""
    folder = Path("runs") / bundle / name
    return str(folder if fold is None else folder / f"fold_{fold}")
