"""Learning-rate schedules: what configurations need beside those of torch.

torch's own schedules resume exactly under the ScheduleHandler once optimizer and schedule are in
the checkpoint. What they lack: a warm-up that any of them takes, a plateau that knows when
validation ran, a one-cycle schedule for short runs, a length that a longer run may change, and a
way to lower them for good.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ignite.engine import Engine
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from pipeline.errors import ConfigurationError

__all__ = [
    "LOWERED",
    "ValidatedPlateau",
    "one_cycle",
    "scale_rates",
    "warm_up",
    "with_own_length",
]

logger = logging.getLogger(__name__)

# How long a schedule is, in the attributes of OneCycleLR, CosineAnnealingLR and PolynomialLR.
_LENGTHS = ("total_steps", "_schedule_phases", "T_max", "total_iters")

# The learning rates in an optimizer's groups and in the attributes of torch's schedules.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_SCHEDULE_RATES = ("base_lrs", "max_lrs", "min_lrs", "default_min_lr", "eta_min")

# Where the optimizer's groups, and so every checkpoint, keep the product of the factors that
# `scale_rates` was called with, for whoever holds a rate of its own against the schedule.
LOWERED = "lowered"


class ValidatedPlateau:
    """Lower the learning rate when a validation metric stops improving.

    A step takes the metric of the last validation if no step has taken it before, so that the
    ScheduleHandler may count updates, and epochs without validation do not count. One that counts
    epochs stands after the ValidationHandler in the list, or is an epoch late.

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
        """The present rates, under the name that MONAI's LrScheduleHandler prints."""
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
        steps: length of the warm-up, in updates or epochs as the ScheduleHandler counts; 0 is
            none.
        start_factor: share of the schedule's first rate to begin with.

    Returns:
        One schedule for the ScheduleHandler and the checkpoint.
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


def one_cycle(
    optimizer: Optimizer,
    max_lr: float | list[float],
    total_steps: int,
    pct_start: float = 0.3,
    **settings: Any,
) -> OneCycleLR:
    """Return torch's OneCycleLR, also where its warm-up would be a single step.

    torch divides by zero there, as with 20 steps and `pct_start` 0.05: the warm-up then gets two
    steps. Any other schedule is torch's own.

    Args:
        optimizer: whose learning rate is scheduled.
        max_lr: largest learning rate, of all groups or of each.
        total_steps: updates in the whole run.
        pct_start: share of them in which the rate rises.
        settings: further arguments of OneCycleLR, such as `cycle_momentum`.

    Raises:
        ConfigurationError: a part of the schedule has no step, as the descent with `pct_start` 1.
    """
    given = pct_start
    if pct_start * total_steps == 1:
        pct_start = min(1.0, 2 / total_steps)
    try:
        schedule = OneCycleLR(
            optimizer, max_lr, total_steps=total_steps, pct_start=pct_start, **settings
        )
        ends = [0.0, *(phase["end_step"] for phase in schedule._schedule_phases)]
    except ZeroDivisionError:
        ends = [0.0, 0.0]
    if any(end == start for start, end in pairwise(ends)):
        raise ConfigurationError(
            f"the one-cycle schedule of {total_steps} steps with pct_start {given!r} has a part "
            "without a step; set pct_start lower, or train longer"
        )
    if pct_start != given:
        logger.info(
            "pct_start %g of %d steps would be a warm-up of one step: it takes two",
            given, total_steps,
        )  # fmt: skip
    return schedule


def scale_rates(optimizer: Optimizer, scheduler: Any, factor: float) -> None:
    """Multiply all learning rates of a run, the present one and those to come.

    The schedule goes on where it stands: every later rate is `factor` times what it would have
    been. All of it is in the states of optimizer and schedule.

    Args:
        optimizer: whose groups hold the present rates.
        scheduler: its schedule, of torch or a ValidatedPlateau; None where there is none.
        factor: above 0.
    """
    groups = optimizer.param_groups
    scaled = [{k: group[k] * factor for k in _GROUP_RATES if k in group} for group in groups]
    for group, rates in zip(groups, scaled, strict=True):
        for key, rate in rates.items():
            if isinstance(group[key], Tensor):  # a compiled optimizer holds this very tensor
                group[key].fill_(rate)
            else:
                group[key] = rate
        group[LOWERED] = group.get(LOWERED, 1.0) * factor
    if scheduler is not None:
        _scale_schedule(scheduler, factor)


def _scale_schedule(scheduler: Any, factor: float) -> None:
    """Multiply the rates that a schedule keeps itself, and those of its parts."""
    own = vars(scheduler)
    for key in own.keys() & set(_SCHEDULE_RATES):
        value = own[key]
        if isinstance(value, list):
            own[key] = [rate * factor for rate in value]
        elif value is not None:
            own[key] = value * factor
    if "_last_lr" in own:
        own["_last_lr"] = [group["lr"] for group in scheduler.optimizer.param_groups]
    parts = [scheduler.scheduler] if isinstance(scheduler, ValidatedPlateau) else []
    for part in (*parts, *own.get("_schedulers", ())):
        _scale_schedule(part, factor)


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
