"""Learning-rate schedules: what configurations need beside those of torch.

torch's own schedules resume exactly under MONAI's LrScheduleHandler once optimizer and schedule
are in the checkpoint. What they lack: a warm-up that any of them takes, a plateau that knows when
validation ran, and a length that a longer run may change.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
)

from pipeline.errors import ConfigurationError

__all__ = ["ValidatedPlateau", "warm_up", "with_own_length"]

logger = logging.getLogger(__name__)

# How long a schedule is, in the attributes of OneCycleLR, CosineAnnealingLR and PolynomialLR.
_LENGTHS = ("total_steps", "_schedule_phases", "T_max", "total_iters")


class ValidatedPlateau:
    """Lower the learning rate when a validation metric stops improving.

    A step takes the metric of the last validation if no step has taken it before, so that the
    LrScheduleHandler may count iterations, and epochs without validation do not count. One that
    counts epochs stands after the ValidationHandler in the list, or is an epoch late.

    Args:
        scheduler: torch's ReduceLROnPlateau; its patience counts validations.
        validator: the evaluator whose `state.metrics` holds the metric, once an epoch at most.
        metric: its name, such as `val_dice`.
    """

    def __init__(self, scheduler: ReduceLROnPlateau, validator: Engine, metric: str) -> None:
        self.scheduler = scheduler
        self.optimizer = scheduler.optimizer
        self.validator = validator
        self.metric = metric
        self._noted_epoch = 0
        self._value: float | None = None  # of a validation that no step has taken yet

    def step(self) -> None:
        """Compare the metric of the last validation with the best one, if it is new."""
        self._note()
        if self._value is None:
            return
        before = self.get_last_lr()
        self.scheduler.step(self._value)
        self._value = None
        if before != self.get_last_lr():
            logger.info("%s is on a plateau: learning rate %.3g", self.metric, self._last_lr[0])

    def _note(self) -> None:
        metrics, epoch = self.validator.state.metrics, self.validator.state.epoch
        if not metrics or epoch == self._noted_epoch:
            return
        if self.metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise ConfigurationError(
                f"the plateau's metric is {self.metric!r}; expected one of {known}"
            )
        self._noted_epoch, self._value = epoch, float(metrics[self.metric])

    @property
    def _last_lr(self) -> list[Any]:
        """The present rates, under the name that the LrScheduleHandler prints."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[Any]:
        """Return the present learning rate of each group."""
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """Return the state of torch's schedule, and a metric that no step has taken yet."""
        self._note()
        return {
            "scheduler": self.scheduler.state_dict(),
            "noted_epoch": int(self._noted_epoch),
            "value": self._value,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.scheduler.load_state_dict(state["scheduler"])
        self._noted_epoch, self._value = state["noted_epoch"], state["value"]


def warm_up(
    scheduler: LRScheduler | ValidatedPlateau, steps: int, start_factor: float = 0.01
) -> LRScheduler | ValidatedPlateau:
    """Raise the learning rate linearly before a schedule begins.

    The schedule stands still meanwhile: one that is to end with the run gets `steps` less. A
    plateau, which has no course of its own, watches validation from the start.

    Args:
        scheduler: what follows.
        steps: length of the warm-up, in iterations or epochs as the LrScheduleHandler counts; 0
            is none.
        start_factor: share of the schedule's first rate to begin with.

    Returns:
        One schedule for the LrScheduleHandler and the checkpoint.
    """
    if steps < 0:
        raise ConfigurationError(f"steps of the warm-up must be at least 0, got {steps!r}")
    if not 0 < start_factor <= 1:
        raise ConfigurationError(
            f"start_factor of the warm-up must be in (0, 1], got {start_factor!r}"
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigurationError(
            "a warm-up takes ReduceLROnPlateau inside a ValidatedPlateau, which knows when "
            "validation ran"
        )
    if steps == 0:
        return scheduler
    rising = LinearLR(scheduler.optimizer, start_factor, total_iters=steps)
    if isinstance(scheduler, ValidatedPlateau):
        parts: list[Any] = [rising, scheduler]
        return ChainedScheduler(parts)
    return SequentialLR(scheduler.optimizer, [rising, scheduler], [steps])


def with_own_length(scheduler: Any, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schedule's saved state with the length that the schedule is configured with.

    A run may go on with more epochs than it began with: the rate then follows the longer schedule
    from there on.

    Args:
        scheduler: the schedule that will load the state; what is no torch schedule loads `saved`.
        saved: what its `state_dict` returned before.
    """
    if not isinstance(scheduler, LRScheduler):
        return saved
    own = vars(scheduler)
    state = {**saved, **{key: own[key] for key in _LENGTHS if key in own}}
    if "_schedulers" in own:
        pairs = zip(own["_schedulers"], saved["_schedulers"], strict=True)
        state["_schedulers"] = [with_own_length(part, its) for part, its in pairs]
    return state
