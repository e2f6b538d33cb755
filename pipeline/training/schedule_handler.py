"""Steps a learning-rate schedule when the weights are updated."""

from __future__ import annotations

import math
from typing import Any, Literal

from ignite.engine import Engine, Events
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pipeline.errors import ConfigurationError
from pipeline.training.schedules import ValidatedPlateau

__all__ = ["ScheduleHandler", "updates_per_epoch"]


def updates_per_epoch(iterations: int, accumulation_steps: int = 1) -> int:
    """Return how often the weights are updated in an epoch, its last and shorter group included.

    Args:
        iterations: length of the loader.
        accumulation_steps: iterations per update.

    Example:
        >>> updates_per_epoch(7, 2)
        4
    """
    return math.ceil(iterations / _checked(accumulation_steps))


class ScheduleHandler:
    """Step a schedule after every update of the weights, or at the end of every epoch.

    MONAI's LrScheduleHandler counts iterations, of which an update takes several where gradients
    are accumulated. Here an epoch has `updates_per_epoch` steps, also where updates were left out
    because a value was not finite: a schedule then ends with the run, and a resumed run finds its
    place.

    List it among `train::handlers` before the SWAHandler. One that counts epochs and steps a
    ValidatedPlateau stands after the Validation, or the plateau is an epoch late.

    Args:
        lr_scheduler: a schedule of torch, or a ValidatedPlateau.
        unit: `update` or `epoch`.
        accumulation_steps: iterations per update.

    Raises:
        ConfigurationError: a setting is out of range, or nobody tells a plateau its metric.
    """

    def __init__(
        self,
        lr_scheduler: LRScheduler | ValidatedPlateau,
        unit: Literal["update", "epoch"] = "update",
        accumulation_steps: int = 1,
    ) -> None:
        if unit not in ("update", "epoch"):
            raise ConfigurationError(f"the schedule's unit must be update or epoch, got {unit!r}")
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            raise ConfigurationError(
                "lr_scheduler is a ReduceLROnPlateau, which needs a metric; put it inside a "
                "ValidatedPlateau, which knows when validation ran"
            )
        self.lr_scheduler = lr_scheduler
        self.unit = unit
        self.accumulation_steps = _checked(accumulation_steps)

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the trainer."""
        if self.unit == "epoch":
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.step)
        else:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._look)

    def _look(self, engine: Engine) -> None:
        length = engine.state.epoch_length
        within = (engine.state.iteration - 1) % length + 1 if length else engine.state.iteration
        if within % self.accumulation_steps == 0 or within == length:
            self.step()

    def step(self) -> None:
        """Step the schedule once."""
        # torch warns of a schedule whose optimizer has never stepped, by this attribute. The order
        # is right here: the very first update had its turn and may have been left out.
        optimizer: Any = self.lr_scheduler.optimizer
        optimizer._opt_called = True
        self.lr_scheduler.step()


def _checked(accumulation_steps: int) -> int:
    if accumulation_steps < 1:
        raise ConfigurationError(
            f"accumulation_steps must be at least 1, got {accumulation_steps!r}"
        )
    return accumulation_steps
