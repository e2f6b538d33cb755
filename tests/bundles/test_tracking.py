"""`--tracking mlflow`: what MLflow is told of a training, however it ends, and what without MLflow.

A stand-in takes the calls, so that MLflow need not be installed; the last test runs the real one.
"""

from __future__ import annotations

import importlib.machinery
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler  # binds its MLflow, if any, before ours stands in for it

from pipeline import cli
from pipeline.bundles import find_bundle_root, prepare_run
from pipeline.errors import ConfigurationError, DivergedError, Preempted
from pipeline.training.run_folder import RunFolder

ABSENT = r"--tracking mlflow: mlflow is not installed: pip install 'lamina\[mlflow\]'"


class RefusedError(Exception):
    """Stands in for MLflow's MlflowException."""


@dataclass
class Record:
    """What a store knows of one run."""

    info: SimpleNamespace
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    artifacts: dict[str, bytes] = field(default_factory=dict)


class Store:
    """Stands in for `mlflow.MlflowClient` and for what is behind it."""

    def __init__(self) -> None:
        self.experiments: dict[str, str | None] = {}
        self.runs: dict[str, Record] = {}
        self.uri: str | None = None
        self.refuses = False

    @property
    def record(self) -> Record:
        """The only record."""
        (record,) = self.runs.values()
        return record

    def connect(self, tracking_uri: str | None) -> Store:
        self.uri = tracking_uri
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name) if name in self.experiments else None

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        self.experiments[name] = artifact_location
        return name

    def create_run(self, experiment_id: str, run_name: str) -> Record:
        run_id = f"run{len(self.runs)}"
        info = SimpleNamespace(
            run_id=run_id,
            experiment_id=experiment_id,
            run_name=run_name,
            status="RUNNING",
            lifecycle_stage="active",
        )
        self.runs[run_id] = Record(info)
        return self.runs[run_id]

    def get_run(self, run_id: str) -> Record:
        if run_id not in self.runs:
            raise RefusedError(f"no run {run_id}")
        return self.runs[run_id]

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id].info.status = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self.runs[run_id].info.status = status

    def get_metric_history(self, run_id: str, key: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(step=step) for step in self.runs[run_id].metrics.get(key, {})]

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        if self.refuses and metrics:
            raise RefusedError("the store is gone\nand this is its trace")
        assert len(params) <= 100  # as MLflow's own limit is
        record = self.runs[run_id]
        record.params |= {param.key: param.value for param in params}
        for metric in metrics:
            steps = record.metrics.setdefault(metric.key, {})
            assert metric.step not in steps, f"{metric.key} is told twice"
            steps[metric.step] = metric.value

    def log_artifact(self, run_id: str, local_path: str) -> None:
        path = Path(local_path)
        self.runs[run_id].artifacts[path.name] = path.read_bytes()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store behind a stand-in for MLflow."""
    made = Store()
    modules = {
        name: ModuleType(name) for name in ("mlflow", "mlflow.entities", "mlflow.exceptions")
    }
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    modules["mlflow"].MlflowClient = made.connect  # type: ignore[attr-defined]
    modules["mlflow.exceptions"].MlflowException = RefusedError  # type: ignore[attr-defined]
    modules["mlflow.entities"].Param = (  # type: ignore[attr-defined]
        lambda key, value: SimpleNamespace(key=key, value=value)
    )
    modules["mlflow.entities"].Metric = (  # type: ignore[attr-defined]
        lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return made


@pytest.fixture
def _no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)


def history(folder: Path) -> list[dict[str, Any]]:
    return yaml.safe_load((folder / "metrics_history.yaml").read_text(encoding="utf-8"))


def test_a_tracked_training_is_on_record(bundle, dataset, store, trained, tmp_path):
    folder = tmp_path / "run"
    bundle.run("train", dataset_dir=dataset, output_dir=folder, tracking="mlflow")
    record = store.record
    assert (record.info.experiment_id, record.info.run_name) == (bundle.name, "default")
    assert record.info.status == "FINISHED"
    # under the run's folder, whatever the working directory is
    assert store.uri == f"sqlite:///{folder}/mlruns.db"
    assert store.experiments == {bundle.name: (folder / "mlruns").as_uri()}
    # what it trained with, the plan's numbers instead of `auto`, and nothing of this machine
    assert record.params["effective_batch_size"] == "2"
    assert record.params["batch_size"] == "2"
    assert float(record.params["learning_rate"]) > 0
    assert {"max_epochs", "manifest", "seed", "architecture", "precision"} <= record.params.keys()
    assert all("." in record.params[id] for id in ("network_def", "loss", "optimizer"))
    assert [text for text in record.params.values() if str(tmp_path.parent) in text] == []
    # every figure of every epoch
    for entry in history(folder):
        told = {name: steps.get(entry["epoch"]) for name, steps in record.metrics.items()}
        assert told["learning_rate"] == entry["learning_rate"]
        assert all(told[f"train_{name}"] == value for name, value in entry["train"].items())
        assert all(told[name] == value for name, value in entry["val"].items())
        assert told["best_epoch"] == (entry["epoch"] if entry["new_best"] else None)
    files = {"config.yaml", "environment.json", "metrics_history.yaml", "run.log", "report.html"}
    assert record.artifacts.keys() == files
    assert record.artifacts["report.html"] == (folder / "report.html").read_bytes()
    # and training is what it is without
    kept = [weights(run) for run in (folder, trained.folder)]
    assert kept[0].keys() == kept[1].keys()
    assert [name for name in kept[0] if not torch.equal(kept[0][name], kept[1][name])] == []


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"]


def test_the_switch_of_monai_leaves_the_record_to_the_run_folder(bundle, dataset, store, tmp_path):
    """As `monai.bundle run --tracking mlflow` takes it; there MONAI's handlers would be beside."""
    _, settings = prepare_run(bundle.root, "train", (), {"tracking": "mlflow"})
    settings |= {"dataset_dir": dataset, "output_dir": tmp_path / "run"}
    workflow = bundle.workflow("train", **settings)
    workflow.initialize()
    assert workflow.check_properties() == []
    assert "MLFlowHandler" in str(workflow.parser["train"]["handlers"])
    for id in ("train::handlers", "validate::handlers"):
        handlers = workflow.parser.get_parsed_content(id)
        assert [handler for handler in handlers if isinstance(handler, MLFlowHandler)] == []
    assert list((tmp_path / "run").glob("config_*.json")) == []


class Training:
    """A run of which nothing but its history exists, an epoch of one iteration long."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.config = {
            "tracking_uri": f"sqlite:///{folder}/mlruns.db",
            "is_not_rank0": True,
            "definition": {"bundle": "leaves"},
            **settings,
        }

    def run(self, epochs: int, done: int = 0, error: Exception | None = None) -> None:
        """Train up to `epochs`, or to an error in the last of them."""

        def step(engine: Engine, _: Any) -> None:
            if error is not None and engine.state.epoch == epochs:
                raise error

        engine = Engine(step)
        RunFolder(str(self.folder), self.config, "cpu").attach(engine)
        engine.add_event_handler(Events.STARTED, lambda: self._restore(engine, done))
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self._write(engine.state.epoch))
        engine.run([0], max_epochs=epochs)

    @staticmethod
    def _restore(engine: Engine, done: int) -> None:
        engine.state.epoch = engine.state.iteration = done

    def _write(self, epoch: int) -> None:
        entries = [
            {
                "epoch": number,
                "train": {"loss": 1 / number},
                "learning_rate": 0.1,
                "seconds": 1.0,
                "new_best": False,
            }
            for number in range(1, epoch + 1)
        ]
        path = self.folder / "metrics_history.yaml"
        path.write_text(yaml.safe_dump(entries), encoding="utf-8")


def test_a_run_that_begins_anew_does_not_tell_of_the_one_before(store, tmp_path):
    Training(tmp_path).run(5)
    with pytest.raises(DivergedError):
        Training(tmp_path).run(1, error=DivergedError("the loss is nan"))
    first, second = store.runs.values()
    assert sorted(first.metrics["train_loss"]) == [1, 2, 3, 4, 5]
    assert second.info.status == "FAILED"
    assert second.metrics == {}
    assert "metrics_history.yaml" not in second.artifacts


def test_what_a_store_raises_at_the_end_hides_no_error_and_holds_no_lock(
    store, tmp_path, monkeypatch
):
    def refuse(run_id: str, path: str) -> None:
        raise RuntimeError("AccessDenied")

    monkeypatch.setattr(store, "log_artifact", refuse)
    with pytest.raises(DivergedError, match="the loss is nan"):
        Training(tmp_path).run(2, error=DivergedError("the loss is nan"))
    assert store.record.info.status == "FAILED"
    Training(tmp_path).run(1)  # the folder is free


def test_a_name_that_mlflow_does_not_take_is_told_with_another_sign(store, tmp_path):
    Training(tmp_path, weights={"Aphid (green)": 2.0}).run(1)
    assert store.record.params["weights.Aphid _green_"] == "2.0"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Preempted("stopped by SIGTERM"), "KILLED"),
        (DivergedError("the loss is nan"), "FAILED"),
        (RuntimeError("a bug"), "FAILED"),
    ],
)
def test_a_record_tells_how_a_run_that_was_stopped_ended(store, tmp_path, error, status):
    with pytest.raises(type(error)):
        Training(tmp_path).run(3, error=error)
    assert store.record.info.status == status
    assert list(store.record.metrics["train_loss"]) == [1, 2]
    assert b"stopped: " in store.record.artifacts["run.log"]


def test_a_resumed_run_goes_on_in_its_record(store, tmp_path):
    with pytest.raises(Preempted):
        Training(tmp_path).run(3, error=Preempted("stopped by SIGTERM"))
    Training(tmp_path).run(5, done=2)
    assert store.record.info.status == "FINISHED"
    assert list(store.record.metrics["train_loss"]) == [1, 2, 3, 4, 5]


def test_a_run_that_begins_anew_has_a_new_record(store, tmp_path):
    Training(tmp_path).run(2)
    Training(tmp_path).run(1)
    assert [list(record.metrics["train_loss"]) for record in store.runs.values()] == [[1, 2], [1]]


def test_a_run_resumed_beside_another_store_is_told_from_its_first_epoch(store, tmp_path):
    Training(tmp_path).run(2)
    store.runs.clear()
    Training(tmp_path).run(4, done=2)
    assert list(store.record.metrics["train_loss"]) == [1, 2, 3, 4]


def test_a_store_that_fails_costs_no_training_and_is_caught_up_with(store, tmp_path, caplog):
    training = Training(tmp_path)
    write = training._write

    def interrupted(epoch: int) -> None:
        store.refuses = epoch == 2
        write(epoch)

    training._write = interrupted
    training.run(3)
    assert list(store.record.metrics["train_loss"]) == [1, 2, 3]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == "tracking: MLflow refused log_batch: the store is gone"


def test_a_store_that_cannot_be_opened_stops_the_run_before_it_trains(store, tmp_path, monkeypatch):
    def refuse(name: str) -> None:
        raise RefusedError("no such database\nand this is its trace")

    monkeypatch.setattr(store, "get_experiment_by_name", refuse)
    with pytest.raises(ConfigurationError, match="cannot use the store: no such database; name"):
        Training(tmp_path).run(1)
    assert not (tmp_path / "metrics_history.yaml").exists()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ("leaves", "default")),
        ({"name": "quick", "fold": 2}, ("leaves", "quick fold 2")),
        ({"experiment_name": "monai_experiment", "run_name": None}, ("leaves", "default")),
        ({"experiment_name": "oaks", "run_name": "first"}, ("oaks", "first")),
    ],
)
def test_a_record_has_the_names_of_the_bundle_and_the_run(store, tmp_path, settings, names):
    Training(tmp_path, **settings).run(1)
    assert (store.record.info.experiment_id, store.record.info.run_name) == names


def test_the_environment_names_another_store(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example")
    Training(tmp_path).run(1)
    assert (store.uri, store.experiments) == (None, {"leaves": None})


@pytest.mark.parametrize("switch", [{}, {"is_not_rank0": False}, {"tracking_uri": None}])
def test_a_run_without_the_switch_has_no_record(store, tmp_path, switch):
    settings = switch or {"tracking_uri": None, "is_not_rank0": None}
    Training(tmp_path, **settings).run(1)
    assert store.runs == {}
    assert not (tmp_path / "mlflow.json").exists()


@pytest.mark.usefixtures("_no_mlflow")
def test_without_mlflow_the_command_says_what_to_install(capsys):
    assert cli.main(["train", "fundus_vessels", "quick", "--tracking", "mlflow"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'lamina[mlflow]'" in line


@pytest.mark.usefixtures("_no_mlflow")
def test_without_mlflow_a_plain_bundle_run_says_so_too(tmp_path):
    with pytest.raises(ConfigurationError, match=ABSENT):
        Training(tmp_path).run(1)


def test_tracking_is_refused_where_it_would_do_nothing(store):
    for workflow, tracking in (("train", "wandb"), ("evaluate", "mlflow"), ("inference", "mlflow")):
        with pytest.raises(ConfigurationError, match="--tracking: expected mlflow, and a training"):
            prepare_run(find_bundle_root("fundus_vessels"), workflow, (), {"tracking": tracking})


@pytest.mark.filterwarnings("default")  # of what MLflow and SQLAlchemy say of each other
def test_mlflow_itself_takes_the_record(tmp_path, monkeypatch):
    """In a database and files below the run's folder, read back by its own client."""
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    training = Training(tmp_path, max_epochs=3, clip_norm=None, fold=0)
    with pytest.raises(Preempted):
        training.run(2, error=Preempted("stopped by SIGTERM"))
    client = mlflow.MlflowClient(tracking_uri=training.config["tracking_uri"])
    experiment = client.get_experiment_by_name("leaves").experiment_id
    (stopped,) = client.search_runs([experiment])
    assert stopped.info.status == "KILLED"
    training.run(3, done=1)
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "default fold 0")
    assert run.data.params == {"max_epochs": "3", "clip_norm": "None", "fold": "0"}
    told = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(metric.step, metric.value) for metric in told] == [(1, 1), (2, 1 / 2), (3, 1 / 3)]
    assert {"config.yaml", "run.log"} <= {
        artifact.path for artifact in client.list_artifacts(run.info.run_id)
    }
    assert list((tmp_path / "mlruns").rglob("config.yaml"))
