"""The numbers of a run, epoch by epoch: in `metrics_history.yaml`, in the log and on the screen."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ignite.engine import Engine, Events
from torch.optim import Optimizer

from pipeline.data.atomic import write_yaml
from pipeline.training.epoch_metrics import BatchMetrics
from pipeline.training.monitor import Monitor
from pipeline.training.processes import from_writer, is_writer
from pipeline.training.roll_back import RollBack
from pipeline.training.throughput import SPEED_PREFIX

__all__ = ["History", "read_history"]

logger = logging.getLogger(__name__)


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Return the epochs of a `metrics_history.yaml`; an absent file is an empty history."""
    path = Path(path)
    if not path.exists():
        return []
    return list(yaml.safe_load(path.read_text(encoding="utf-8")) or [])


class History:
    """Record each epoch's training and validation metrics and log a summary of the epoch.

    List it among `train::handlers` after the ValidationHandler and before whatever reads
    `trainer.state.new_best`: it brings the monitor with it. An epoch's entry has `epoch`, `train`
    (`loss`, ...), `learning_rate`, `seconds`, `new_best`, `speed` where a `Throughput` is listed
    before, `rolled_back_to` where the epoch was undone, and `val` where it was validated:
    `val_loss`, `val_dice`, ... A resumed run keeps the entries of the epochs before it. Of several
    processes the first one writes, and the others get its metrics, which are those of its share.

    Args:
        path: the YAML file, written whole after every epoch.
        monitor: tells the new best and the validator; attached here, since MONAI's property check
            takes no reference as an item of a handler list.
        optimizer: whose first group's learning rate is recorded.
        batch_metrics: puts the epoch's training figures into the trainer's metrics; attached here
            like the monitor. None where something else does.
        roll_back: undoes an epoch that is much worse; attached here, between the monitor and the
            record. None where there is none.
    """

    def __init__(
        self,
        path: str,
        monitor: Monitor,
        optimizer: Optimizer,
        batch_metrics: BatchMetrics | None = None,
        roll_back: RollBack | None = None,
    ) -> None:
        self.path = Path(path)
        self.monitor = monitor
        self.optimizer = optimizer
        self.batch_metrics = batch_metrics
        self.roll_back = roll_back
        self.epochs: list[dict[str, Any]] = []
        self._epoch_started_s = 0.0

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the trainer."""
        if self.batch_metrics is not None:
            self.batch_metrics.attach(engine)
        self.monitor.attach(engine)
        if self.roll_back is not None:
            self.roll_back.attach(engine)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.record)

    def _start_epoch(self, engine: Engine) -> None:
        if not self.epochs:  # a resumed run keeps what came before it
            self.epochs = [e for e in read_history(self.path) if e["epoch"] < engine.state.epoch]
        self._epoch_started_s = time.monotonic()

    def record(self, engine: Engine) -> None:
        """Append the present epoch, write the file and log the summary."""
        engine.state.metrics.update(from_writer(lambda: _numbers(engine.state.metrics)))
        if not is_writer():
            return
        entry: dict[str, Any] = {
            "epoch": int(engine.state.epoch),
            "train": {
                key.removeprefix("train_"): _rounded(value)
                for key, value in engine.state.metrics.items()
                if not key.startswith(SPEED_PREFIX)
            },
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "seconds": round(time.monotonic() - self._epoch_started_s, 3),
            "new_best": bool(getattr(engine.state, "new_best", False)),
        }
        if speed := {
            key.removeprefix(SPEED_PREFIX): _rounded(value)
            for key, value in engine.state.metrics.items()
            if key.startswith(SPEED_PREFIX)
        }:
            entry["speed"] = speed
        if rolled_back := getattr(engine.state, "rolled_back", None):
            entry["rolled_back_to"] = int(rolled_back["epoch"])
        if self.monitor.validated(engine):
            metrics = self.monitor.validator.state.metrics
            entry["val"] = {key: _rounded(value) for key, value in metrics.items()}
        self.epochs.append(entry)
        write_yaml(self.path, self.epochs)
        logger.info(self._summary(engine, entry))

    def _summary(self, engine: Engine, entry: dict[str, Any]) -> str:
        parts = [
            f"epoch {entry['epoch']}/{engine.state.max_epochs}",
            _figures("train", entry["train"]),
        ]
        if "val" in entry:
            validated = {k.removeprefix("val_"): v for k, v in entry["val"].items()}
            parts += [_figures("val", validated)]
            parts += ["new best" if entry["new_best"] else self._best()]
            parts += [self.monitor.countdown()]
        if "rolled_back_to" in entry:
            parts += [f"back to epoch {entry['rolled_back_to']}"]
        parts += [f"lr {entry['learning_rate']:.2e}", f"{entry['seconds']:.1f} s"]
        if "speed" in entry:
            parts += [_speed(entry["speed"])]
        return " | ".join(parts)

    def _best(self) -> str:
        if self.monitor.best is None:
            return "no best yet"
        return f"best {self.monitor.best:.4f} in epoch {self.monitor.best_epoch}"


def _figures(title: str, metrics: dict[str, float]) -> str:
    return f"{title} " + " ".join(f"{key} {value:.4f}" for key, value in metrics.items())


def _speed(figures: Mapping[str, float]) -> str:
    texts = {
        "iterations_per_second": "{:.1f} it/s",
        "loader_share": "loader {:.0%}",
        "peak_memory_mb": "peak {:.0f} MB",
    }
    return " ".join(text.format(figures[key]) for key, text in texts.items() if key in figures)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}


def _rounded(value: Any) -> float:
    number = float(value)
    return round(number, 6) if math.isfinite(number) else number
