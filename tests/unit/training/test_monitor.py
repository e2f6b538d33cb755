from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import pytest
from ignite.engine import Engine, Events

from pipeline.errors import ConfigurationError
from pipeline.training.monitor import Monitor

NAN = math.nan


def follow(
    values: Sequence[float | None], *, monitor: Monitor | None = None, **settings: object
) -> tuple[Monitor, list[bool]]:
    """Run an epoch per value, validated where it is not None; return the verdict of each."""
    validator = Engine(lambda _engine, _batch: None)
    trainer = Engine(lambda _engine, _batch: None)
    monitor = monitor or Monitor(validator, "val_dice", **settings)  # type: ignore[arg-type]
    monitor.validator = validator
    verdicts: list[bool] = []

    def validate(engine: Engine) -> None:
        value = values[engine.state.epoch - 1]
        if value is not None:
            validator.run([0])
            validator.state.epoch = engine.state.epoch  # as MONAI's evaluators count
            validator.state.metrics["val_dice"] = value

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    monitor.attach(trainer)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: verdicts.append(engine.state.new_best)
    )
    trainer.run([0], max_epochs=len(values))
    return monitor, verdicts


@pytest.mark.parametrize(
    ("mode", "values", "best", "expected"),
    [
        ("max", [0.1, 0.3, 0.2, 0.3, 0.4], 0.4, [True, True, False, False, True]),
        ("min", [0.4, 0.3, 0.5, 0.3, -0.1], -0.1, [True, True, False, False, True]),
        ("max", [0.0, NAN, math.inf, 0.1], 0.1, [True, False, False, True]),
        ("min", [NAN, -math.inf, 2.0], 2.0, [False, False, True]),
    ],
)
def test_a_new_best_is_strictly_better_and_finite(
    mode: str, values: list[float], best: float, expected: list[bool]
) -> None:
    monitor, verdicts = follow(values, mode=mode)
    assert verdicts == expected
    assert monitor.best == best
    assert monitor.best_epoch == len(expected) - expected[::-1].index(True)


def test_verdict_of_a_validated_epoch_does_not_reach_the_next_one() -> None:
    assert follow([0.5, None, None, 0.6, None])[1] == [True, False, False, True, False]


def test_patience_counts_validations_and_not_epochs() -> None:
    values = [0.5, None, None, 0.4, None, None, 0.4, 0.4, 0.4]
    assert len(follow(values, patience=2)[1]) == 7


def test_a_new_best_starts_the_count_again() -> None:
    assert len(follow([0.5, 0.4, 0.6, 0.4, 0.4, 0.9], patience=2)[1]) == 5


def test_metric_that_is_never_finite_stops_the_run_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monitor, verdicts = follow([NAN] * 6, patience=3)
    assert verdicts == [False] * 3
    assert monitor.best is None


def test_best_of_zero_is_told_as_zero(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    follow([0.0, 0.0], patience=1)
    assert "val_dice has not improved on 0.0000 (epoch 1) in 1 validations" in caplog.text


def test_early_stopping_can_be_off() -> None:
    monitor, verdicts = follow([0.5] + [0.1] * 8, patience=2, early_stopping=False)
    assert len(verdicts) == 9
    assert monitor.countdown() == "early stopping off"
    assert not monitor.exhausted


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5], "early stopping in 3 validations without a new best"),
        ([0.5, 0.4, 0.4], "early stopping in 1 validation without a new best"),
        ([0.5, 0.4, 0.4, 0.4], "early stopping now"),
    ],
)
def test_countdown(values: list[float], expected: str) -> None:
    assert follow(values, patience=3)[0].countdown() == expected


def test_state_goes_on_where_it_was() -> None:
    first, _ = follow([0.5, 0.4], patience=3)
    second = Monitor(Engine(lambda *_: None), "val_dice", patience=3)
    second.load_state_dict(first.state_dict())
    assert follow([0.45, 0.5, 0.9], monitor=second)[1] == [False, False]
    assert second.best == 0.5
    assert second.exhausted


def test_another_metric_starts_afresh_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    first, _ = follow([0.5, 0.4])
    second = Monitor(Engine(lambda *_: None), "val_loss", mode="min")
    second.load_state_dict(first.state_dict())
    assert second.best is None
    assert "changed from val_dice to val_loss" in caplog.text


def test_unknown_metric_is_answered_with_those_there_are() -> None:
    monitor = Monitor(Engine(lambda *_: None), "val_dise")
    with pytest.raises(
        ConfigurationError, match=r"monitor is 'val_dise'; expected one of val_dice$"
    ):
        follow([0.5], monitor=monitor)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"mode": "up"}, "mode must be max or min, got 'up'"), ({"patience": 0}, "at least 1")],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Monitor(Engine(lambda *_: None), "val_dice", **settings)  # type: ignore[arg-type]
