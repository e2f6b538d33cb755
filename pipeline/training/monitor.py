"""Which epoch was best, and when to stop waiting for a better one."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

from ignite.engine import Engine, Events

from pipeline.errors import ConfigurationError

__all__ = ["Monitor"]

logger = logging.getLogger(__name__)


class Monitor:
    """Follow one validation metric: new best, epochs without one, early stopping.

    `History` attaches it to the trainer, after validation; whatever needs its verdict reads
    `trainer.state.new_best`. A metric that is not finite is never the best.

    Args:
        validator: the evaluator whose `state.metrics` holds the metric.
        metric: its name, such as `val_dice`.
        mode: `max` where larger is better.
        patience: validations without a new best before training stops.
        early_stopping: False only follows the metric.
    """

    def __init__(
        self,
        validator: Engine,
        metric: str,
        mode: Literal["max", "min"] = "max",
        patience: int = 10,
        early_stopping: bool = True,
    ) -> None:
        if mode not in ("max", "min"):
            raise ConfigurationError(f"early_stopping::mode must be max or min, got {mode!r}")
        if patience < 1:
            raise ConfigurationError(
                f"early_stopping::patience must be at least 1 validation, got {patience!r}"
            )
        self.validator = validator
        self.metric = metric
        self.sign = 1.0 if mode == "max" else -1.0
        self.patience = patience
        self.early_stopping = early_stopping
        self.best: float | None = None
        self.best_epoch = 0
        self.validations_without_best = 0

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._forget_verdict)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.update)

    @staticmethod
    def _forget_verdict(engine: Engine) -> None:
        _set_verdict(engine, new_best=False)

    def validated(self, trainer: Engine) -> bool:
        """Return whether the validator ran in the trainer's present epoch."""
        return (
            bool(self.validator.state.metrics) and self.validator.state.epoch == trainer.state.epoch
        )

    def update(self, engine: Engine) -> None:
        """Compare the present epoch's metric with the best one; stop when patience has run out."""
        _set_verdict(engine, new_best=False)
        if not self.validated(engine):
            return
        if self.metric not in self.validator.state.metrics:
            known = ", ".join(sorted(self.validator.state.metrics))
            raise ConfigurationError(
                f"early_stopping::monitor is {self.metric!r}; expected one of {known}"
            )
        value = float(self.validator.state.metrics[self.metric])
        if math.isfinite(value) and (self.best is None or self.sign * (value - self.best) > 0):
            self.best, self.best_epoch = value, engine.state.epoch
            self.validations_without_best = 0
            _set_verdict(engine, new_best=True)
            return
        self.validations_without_best += 1
        if self.exhausted:
            logger.info(
                "early stopping: %s has not improved on %.4f (epoch %d) in %d validations",
                self.metric, math.nan if self.best is None else self.best, self.best_epoch,
                self.validations_without_best,
            )  # fmt: skip
            engine.terminate()

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.early_stopping and self.validations_without_best >= self.patience

    def countdown(self) -> str:
        """Return the state of early stopping in a few words, for the epoch summary."""
        if not self.early_stopping:
            return "early stopping off"
        if self.exhausted:
            return "early stopping now"
        left = self.patience - self.validations_without_best
        return f"early stopping in {left} validation{'s' if left != 1 else ''} without a new best"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {
            "metric": self.metric,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "validations_without_best": self.validations_without_best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; another metric than before starts afresh and says so."""
        if state["metric"] != self.metric:
            logger.warning(
                "the monitored metric changed from %s to %s", state["metric"], self.metric
            )
            return
        self.best = state["best"]
        self.best_epoch = state["best_epoch"]
        self.validations_without_best = state["validations_without_best"]


def _set_verdict(engine: Engine, *, new_best: bool) -> None:
    state: Any = engine.state  # ignite's State takes any attribute
    state.new_best = new_best
