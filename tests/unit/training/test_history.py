from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ignite.engine import Engine, Events

from pipeline.training.history import History, read_history
from pipeline.training.monitor import Monitor


def train(
    path: Path, dice: dict[int, float], *, epochs: int, done: int = 0, patience: int = 9
) -> History:
    """Run an engine that is validated in the epochs of `dice`, beginning after `done` epochs."""
    validator = Engine(lambda *_: None)
    trainer = Engine(lambda *_: None)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.25)

    def resume(engine: Engine) -> None:
        engine.state.epoch = done

    def validate(engine: Engine) -> None:
        epoch = engine.state.epoch
        engine.state.metrics.update(train_loss=1 / 3, train_dice=torch.tensor(0.5), train_iou=0.25)
        if epoch in dice:
            validator.run([0])
            validator.state.epoch = epoch
            validator.state.metrics.update(
                val_loss=0.7, val_dice=dice[epoch], val_auc=math.nan, threshold=0.4
            )

    trainer.add_event_handler(Events.STARTED, resume)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    history = History(str(path), Monitor(validator, "val_dice", patience=patience), optimizer)
    history.attach(trainer)
    trainer.run([0], max_epochs=epochs)
    return history


def test_file_has_the_keys_that_reports_read(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics_history.yaml"
    train(path, {2: 0.6}, epochs=3)
    first, second, third = yaml.safe_load(path.read_text("utf-8"))
    assert first.pop("seconds") >= 0
    assert first == {
        "epoch": 1,
        "train": {"loss": 0.333333, "dice": 0.5, "iou": 0.25},
        "learning_rate": 0.25,
        "new_best": False,
    }
    assert second["new_best"] is True
    assert math.isnan(second["val"].pop("val_auc"))
    assert second["val"] == {"val_loss": 0.7, "val_dice": 0.6, "threshold": 0.4}
    assert "val" not in third
    assert third["new_best"] is False


def test_file_is_whole_after_every_epoch(tmp_path: Path) -> None:
    path = tmp_path / "metrics_history.yaml"
    seen: list[list[int]] = []
    original = History.record

    class Watched(History):
        def record(self, engine: Engine) -> None:
            original(self, engine)
            seen.append([entry["epoch"] for entry in read_history(path)])

    trainer = Engine(lambda *_: None)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    Watched(str(path), Monitor(Engine(lambda *_: None), "val_dice"), optimizer).attach(trainer)
    trainer.run([0], max_epochs=3)
    assert seen == [[1], [1, 2], [1, 2, 3]]


def told(path: Path) -> list[tuple[Any, ...]]:
    return [(e["epoch"], e.get("val", {}).get("val_dice")) for e in read_history(path)]


@pytest.mark.parametrize(("done", "kept"), [(2, [(1, None), (2, 0.6)]), (1, [(1, None)]), (0, [])])
def test_resumed_run_keeps_the_epochs_before_it_and_replaces_the_others(
    tmp_path: Path, done: int, kept: list[tuple[Any, ...]]
) -> None:
    path = tmp_path / "metrics_history.yaml"
    train(path, {2: 0.6}, epochs=3)
    train(path, {4: 0.9}, epochs=4, done=done)
    fresh = [(epoch, 0.9 if epoch == 4 else None) for epoch in range(done + 1, 5)]
    assert told(path) == kept + fresh


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics_history.yaml"
    train(path, {2: 0.6}, epochs=2)
    before = path.read_bytes()
    train(path, {}, epochs=2, done=2)
    assert path.read_bytes() == before


def test_absent_file_is_an_empty_history(tmp_path: Path) -> None:
    assert read_history(tmp_path / "metrics_history.yaml") == []


def test_summary_tells_new_best_and_countdown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipeline.training.history")
    train(tmp_path / "h.yaml", {1: 0.5, 3: 0.4}, epochs=3, patience=2)
    first, second, third = caplog.messages
    assert first.startswith(
        "epoch 1/3 | train loss 0.3333 dice 0.5000 iou 0.2500 | val loss 0.7000 dice 0.5000 "
        "auc nan threshold 0.4000 | new best | early stopping in 2 validations"
    )
    assert "val" not in second
    assert "| best 0.5000 in epoch 1 | early stopping in 1 validation without" in third
    assert "| lr 2.50e-01 | " in third


def test_last_entry_of_a_run_that_stopped_early_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "h.yaml"
    train(path, {1: 0.5, 2: 0.4, 3: 0.4}, epochs=9, patience=2)
    assert told(path) == [(1, 0.5), (2, 0.4), (3, 0.4)]
