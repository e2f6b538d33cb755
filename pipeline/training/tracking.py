"""Tell MLflow of a training run: with what it trains, how every epoch went and how it ended.

`--tracking mlflow` of `monai.bundle` brings handlers of MONAI's own. They want the losses of
decollated batches, know no hyperparameters, and leave a run that was stopped as running for ever.
So they rest, by `is_not_rank0`, and the `RunFolder`, which sees every end, keeps this record.

Neither torch nor MLflow is imported before a run needs them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pipeline.data.atomic import write_json
from pipeline.errors import ConfigurationError, Interrupted, LaminaError, Preempted, first_line

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["MLflowRecord", "asks_for_record", "check_mlflow", "record_report"]

logger = logging.getLogger(__name__)

_RUN_FILE = "mlflow.json"
_HISTORY = "metrics_history.yaml"
_ARTIFACTS = ("config.yaml", "environment.json", _HISTORY, "run.log")
_DEFINITIONS = ("network_def", "loss", "optimizer", "lr_scheduler")
_NO_SETTINGS = frozenset(
    {"bundle_root", "ckpt_path", "definition", "imports", "output_dir", "train", "validate"}
    | {"experiment_name", "is_not_rank0", "run_name", "save_execute_config", "tracking_uri"}
    | {"reasons"}  # of a plan, in words
)
_NOBODYS_CHOICE = "monai_experiment"  # what MONAI calls an experiment that nobody named
_AT_ONCE = 100  # parameters in a call
_LONGEST = 500  # characters of a parameter that every store takes
_NO_NAME = re.compile(r"[^\w\-. :/]")  # what MLflow does not take in the name of a parameter


def asks_for_record(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration was given `--tracking mlflow` and MONAI's handlers rest."""
    at_rest = str(config.get("is_not_rank0")).lower() == "true"  # a text from a command line too
    return at_rest and bool(config.get("tracking_uri"))


def check_mlflow() -> None:
    """Check that MLflow is installed, without importing it.

    Raises:
        ConfigurationError: it is not; the message names the extra.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigurationError(
            "--tracking mlflow: mlflow is not installed: pip install 'lamina[mlflow]', or leave "
            "--tracking out"
        )


class MLflowRecord:
    """The record that MLflow keeps of a training run.

    It has the settings and the plan as parameters, the figures of every epoch with the epoch as
    step, those of the best epoch as `best_...`, and the small files of the run. A run that is
    resumed goes on in its record, which `mlflow.json` in the run's folder names. It ends as
    FINISHED, as KILLED where a signal stopped the run, and otherwise as FAILED.

    What MLflow refuses after the record was opened is a warning: it costs no training, and the next
    epoch brings what is missing. A process that is killed at once leaves its record as RUNNING,
    until the run is resumed.

    Args:
        output_dir: the run's folder.
        config: the resolved configuration; `tracking_uri`, `experiment_name` and `run_name` in it
            come from MONAI, and the environment's MLFLOW_TRACKING_URI stands over the first.
        plan: what was planned for this machine; it stands over the configuration's `auto`.

    Raises:
        ConfigurationError: MLflow is not installed.
    """

    def __init__(
        self, output_dir: str | Path, config: Mapping[str, Any], plan: Mapping[str, Any]
    ) -> None:
        check_mlflow()
        self.output_dir = Path(output_dir)
        self.config = config
        self.plan = plan
        self._client: Any = None
        self._experiment = ""
        self._run_id: str | None = None
        self._told = 0  # the last epoch that the record has
        self._begun_anew = False  # until an epoch ends, the history is that of an older run

    def attach(self, engine: Engine) -> None:
        """Find the store, and follow `engine`, the trainer, after whoever follows it already.

        Raises:
            ConfigurationError: MLflow cannot use the store.
        """
        with _refused("cannot use the store"):
            self._client = _client(self.config["tracking_uri"])
            # A new database takes seconds, which are not to count as the first epoch's.
            self._experiment = _experiment(self._client, self.config)
        from ignite.engine import Events

        steps = {
            Events.EPOCH_STARTED: self.begin,
            Events.EPOCH_COMPLETED: self.tell,
            Events.COMPLETED: self.end,
        }
        for event, step in steps.items():
            if not engine.has_event_handler(step, event):
                engine.add_event_handler(event, step)

    def begin(self, engine: Engine) -> None:
        """Open the record: the run's own where it is resumed, otherwise a new one.

        Raises:
            ConfigurationError: MLflow does not take it.
        """
        if self._run_id is not None:
            return
        with _refused("cannot open a record"):
            known = _known_run(self._client, self.output_dir) if engine.state.iteration else None
            if known is not None:
                self._client.update_run(known, status="RUNNING")
            self._begun_anew = not engine.state.iteration
            self._run_id = known or self._create()
            self._told = _last_step(self._client, self._run_id)

    def tell(self, engine: Engine | None = None) -> None:
        """Bring the record up to the last epoch of the run's history."""
        from mlflow.entities import Metric

        from pipeline.training.history import read_history

        self._begun_anew = False
        epochs = read_history(self.output_dir / _HISTORY)
        for entry in (entry for entry in epochs if entry["epoch"] > self._told):
            now_ms = int(time.time() * 1000)
            metrics = [
                Metric(name, value, now_ms, entry["epoch"]) for name, value in _figures(entry)
            ]
            if not self._try("log_batch", metrics=metrics):
                return
            self._told = entry["epoch"]

    def end(self, engine: Engine | None = None, error: BaseException | None = None) -> None:
        """Close the record; without effect where none is open.

        Args:
            engine: the trainer.
            error: what stopped the run, None where it came to its end.
        """
        if self._run_id is None:
            return
        if not self._begun_anew:
            self.tell()
        for name in _ARTIFACTS:
            stale = self._begun_anew and name == _HISTORY
            if not stale and (self.output_dir / name).is_file():
                self._try("log_artifact", str(self.output_dir / name))
        stopped = "KILLED" if isinstance(error, Interrupted | Preempted) else "FAILED"
        self._try("set_terminated", "FINISHED" if error is None else stopped)
        self._run_id = None

    def _create(self) -> str:
        from mlflow.entities import Param

        name = str(self.config.get("run_name") or _name(self.config))
        run = self._client.create_run(self._experiment, run_name=name)
        run_id = str(run.info.run_id)
        write_json(self.output_dir / _RUN_FILE, {"run_id": run_id})
        settings = {**dict(_settings(self.config)), **dict(_settings(self.plan))}
        parameters = [
            Param(_NO_NAME.sub("_", name), str(value)[:_LONGEST])
            for name, value in settings.items()
        ]
        for first in range(0, len(parameters), _AT_ONCE):
            self._client.log_batch(run_id, params=parameters[first : first + _AT_ONCE])
        return run_id

    def _try(self, action: str, *args: Any, **kwargs: Any) -> bool:
        try:
            getattr(self._client, action)(self._run_id, *args, **kwargs)
        except Exception as error:  # of MLflow, its database or its store: never the training's
            logger.warning("tracking: MLflow refused %s: %s", action, first_line(error))
            return False
        return True


def record_report(output_dir: str | Path, tracking_uri: str) -> None:
    """Add `report.html`, which is written after a run has ended, to the record of the run.

    Of several processes the first one does.
    """
    if os.environ.get("RANK", "0") != "0":  # the processes have parted by now
        return
    report = Path(output_dir) / "report.html"
    try:
        client = _client(tracking_uri)
        run_id = _known_run(client, Path(output_dir))
        if run_id is not None and report.is_file():
            client.log_artifact(run_id, str(report))
    except Exception as error:  # as above
        logger.warning("tracking: MLflow refused %s: %s", report.name, first_line(error))


def _client(tracking_uri: str) -> Any:
    import mlflow

    # As MONAI has it. None: MLflow reads the variable itself.
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return mlflow.MlflowClient(tracking_uri=None if given else tracking_uri)


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turn what MLflow, its database or its store refuses into an error of ours."""
    try:
        yield
    except LaminaError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"--tracking mlflow: MLflow {what}: {first_line(error)}; name another store by "
            "MLFLOW_TRACKING_URI, or leave --tracking out"
        ) from error


def _experiment(client: Any, config: Mapping[str, Any]) -> str:
    """Return the id of the experiment of a configuration, made where there is none.

    It has the name of the bundle, unless somebody gave it one.
    """
    name = config.get("experiment_name")
    if name in (None, _NOBODYS_CHOICE):
        name = str(config.get("definition", {}).get("bundle", _NOBODYS_CHOICE))
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    store = os.environ.get("MLFLOW_TRACKING_URI") or str(config["tracking_uri"])
    # Files go beside a database: MLflow's default is the working directory.
    beside = Path(store.removeprefix("sqlite:///")).absolute().parent / "mlruns"
    location = beside.as_uri() if store.startswith("sqlite:///") else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except Exception:
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return str(found.experiment_id)  # another run has just made it


def _known_run(client: Any, output_dir: Path) -> str | None:
    """Return the run that `mlflow.json` names, None where the store does not have it."""
    from mlflow.exceptions import MlflowException

    file = output_dir / _RUN_FILE
    if not file.is_file():
        return None
    run_id = str(json.loads(file.read_text(encoding="utf-8"))["run_id"])
    try:
        run = client.get_run(run_id)
    except MlflowException as error:  # another store, or another machine
        logger.info("tracking: no record %s any more: %s", run_id, first_line(error))
        return None
    return run_id if run.info.lifecycle_stage == "active" else None


def _last_step(client: Any, run_id: str) -> int:
    steps = (metric.step for metric in client.get_metric_history(run_id, "train_loss"))
    return max(steps, default=0)


def _name(config: Mapping[str, Any]) -> str:
    fold = config.get("fold")
    name = str(config.get("name", "default"))
    return name if fold is None else f"{name} fold {fold}"


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is set in a configuration, nested ids joined by dots; of a path its last part.

    Of definitions only what is built, and no list of other things than numbers: all is in the file.
    """
    for id, value in config.items():
        if id in _NO_SETTINGS:
            continue
        name = f"{prefix}{id}"
        if isinstance(value, Mapping):
            if "_target_" not in value:
                yield from _settings(value, f"{name}.")
            elif not prefix and id in _DEFINITIONS:
                yield name, value["_target_"]
        elif isinstance(value, str) and value.startswith(("$", "@", "%")):
            continue
        elif isinstance(value, str) and PurePath(value).is_absolute():
            yield name, PurePath(value).name
        elif not isinstance(value, list) or all(isinstance(item, int | float) for item in value):
            yield name, value


def _figures(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the figures of an epoch by name."""
    validated = entry.get("val", {})
    yield from ((f"train_{name}", value) for name, value in entry["train"].items())
    yield from validated.items()
    yield from ((f"speed_{name}", value) for name, value in entry.get("speed", {}).items())
    yield "learning_rate", entry["learning_rate"]
    yield "epoch_seconds", entry["seconds"]
    if entry["new_best"]:
        yield "best_epoch", entry["epoch"]
        yield from ((f"best_{name}", value) for name, value in validated.items())
