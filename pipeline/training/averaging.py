"""Averaged weights, kept beside the network that is trained: exponential (EMA) and equal (SWA).

`EMAHandler` averages from the first step on. `SWAHandler` waits for a start epoch, averages every
so many epochs or steps, holds the learning rate and renews batch norm's statistics at the end;
with `start_epoch` 1, `unit` step and no learning rate of its own it is an `EMAHandler`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from pipeline.errors import ConfigurationError
from pipeline.training.batch_norm import renew_batch_norm
from pipeline.training.ordering import OrderedBatches
from pipeline.training.processes import Validation, share_statistics
from pipeline.training.schedules import LOWERED

__all__ = ["AveragedNetwork", "EMAHandler", "SWAHandler"]

logger = logging.getLogger(__name__)

# Where the optimizer's groups, and so every checkpoint, keep the rate that averaging began at.
_RATE_BEFORE = "rate_before_averaging"


class AveragedNetwork(AveragedModel):
    """The average of a network's parameters and buffers; `.module` is the averaged network.

    Until its first update it is what the network was when it was built.

    Args:
        network: the network that is trained.
        decay: share of the old average kept at an update; None is the equal mean of all updates.
        warm_up: begin with a smaller share, `min(decay, (1 + n) / (10 + n))` after `n` updates, so
            that the first steps of training do not linger. Without it the share is `decay`.
    """

    def __init__(
        self, network: nn.Module, decay: float | None = 0.99, warm_up: bool = True
    ) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ConfigurationError(
                f"the decay of averaged weights must be in [0, 1), got {decay!r}; "
                "null is the equal mean"
            )
        self.decay = decay
        self.warm_up = warm_up
        super().__init__(network, multi_avg_fn=self._average, use_buffers=True)

    def follow(self, network: nn.Module) -> None:
        """Become what `network` is; averaging begins with the next update."""
        self.n_averaged.zero_()
        self.update_parameters(network)
        self.n_averaged.zero_()

    def _average(
        self,
        averages: tuple[Tensor, ...] | list[Tensor],
        currents: tuple[Tensor, ...] | list[Tensor],
        updates: Tensor | int,
    ) -> None:
        """Move `averages`, which are of one type, towards `currents`."""
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, 1 - self._share(float(updates)))
        else:  # batch norm's step counter
            torch._foreach_copy_(averages, currents)

    def _share(self, updates: float) -> float:
        if self.decay is None:
            return updates / (updates + 1)
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warm_up else self.decay


class EMAHandler:
    """Update an `AveragedNetwork` after every optimizer step of a trainer.

    Args:
        average: the average to update.
        network: the network that the trainer optimises.
        accumulation_steps: iterations per optimizer step; the last, incomplete group of an epoch
            counts as a step, as in MONAI's SupervisedTrainer.
    """

    def __init__(
        self, average: AveragedNetwork, network: nn.Module, accumulation_steps: int = 1
    ) -> None:
        self.average = average
        self.network = network
        self.accumulation_steps = accumulation_steps

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._look)

    def _look(self, engine: Engine) -> None:
        length = engine.state.epoch_length
        within = (engine.state.iteration - 1) % length + 1 if length else engine.state.iteration
        if within % self.accumulation_steps == 0 or within == length:
            share_statistics(self.network)  # so that all processes average the same
            self._update(engine, within)

    def _update(self, engine: Engine, within: int) -> None:
        """Take the weights of a step that ended with the epoch's iteration `within`."""
        self.average.update_parameters(self.network)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        return dict(self.average.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.average.load_state_dict(state)


class SWAHandler(EMAHandler):
    """Stochastic weight averaging: average the end of training, at a learning rate of its own.

    List it among `train::handlers` after the ScheduleHandler and before the ValidationHandler.
    Until the first update the average is the plain network, after every step, so that validating
    it means something from the first epoch on; all that a resumed run needs is in the states of
    `average` and `optimizer`.

    With a learning rate, the schedule is overruled from the start epoch on: the rate moves from
    where it stood to `learning_rate` within `anneal_epochs` epochs, along the half cosine of
    torch's SWALR, and stays. It is computed from the epoch instead of stepped along, so that any
    checkpoint continues it, in the middle of an epoch too.

    Args:
        average: the average to update; its decay says whether it is equal or exponential.
        network: the network that the trainer optimises.
        optimizer: whose learning rate is held.
        accumulation_steps: iterations per optimizer step.
        start_epoch: first epoch that is averaged.
        every: update the average every so many units, first at the first of the start epoch.
        unit: `epoch`, its end, or `step`, of the optimizer.
        learning_rate: rate while averaging; None goes on with the schedule.
        anneal_epochs: epochs until that rate is reached; 0 and 1 reach it in the start epoch.
        loader: the training loader; where given and the network has batch norm, its statistics are
            computed anew when training ends, for the averaged weights.
        norm_batches: batches to compute them from; None takes an epoch.
        validator: the evaluator of the averaged network; where given, it runs once more when
            training ends, so that `swa.pt` has figures and a threshold of its own.
    """

    def __init__(
        self,
        average: AveragedNetwork,
        network: nn.Module,
        optimizer: Optimizer,
        accumulation_steps: int = 1,
        start_epoch: int = 40,
        every: int = 1,
        unit: Literal["epoch", "step"] = "epoch",
        learning_rate: float | None = 5e-5,
        anneal_epochs: int = 10,
        loader: Iterable[Any] | None = None,
        norm_batches: int | None = None,
        validator: Any = None,
    ) -> None:
        super().__init__(average, network, accumulation_steps)
        if unit not in ("epoch", "step"):
            raise ConfigurationError(f"averaging's unit must be epoch or step, got {unit!r}")
        least = {"start_epoch": 1, "every": 1, "anneal_epochs": 0, "norm_batches": 1}
        found = (start_epoch, every, anneal_epochs, 1 if norm_batches is None else norm_batches)
        for (name, smallest), value in zip(least.items(), found, strict=True):
            if value < smallest:
                raise ConfigurationError(
                    f"averaging's {name} must be at least {smallest}, got {value!r}"
                )
        if learning_rate is not None and learning_rate <= 0:
            raise ConfigurationError(
                f"averaging's learning_rate must be above 0, got {learning_rate!r}; "
                "null goes on with the schedule"
            )
        self.optimizer = optimizer
        self.start_epoch = start_epoch
        self.every = every
        self.unit = unit
        self.learning_rate = learning_rate
        self.anneal_epochs = anneal_epochs
        self.loader = loader
        self.norm_batches = norm_batches
        self.validator = validator

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, a MONAI SupervisedTrainer."""
        super().attach(engine)
        engine.add_event_handler(Events.STARTED, self._announce)
        if self.learning_rate is not None:
            # Before a step, whatever the schedule has set; after it, for what is logged and saved.
            engine.add_event_handler(Events.ITERATION_STARTED, self._hold_rate)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._hold_rate)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._hold_rate)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _announce(self, engine: Engine) -> None:
        if self.start_epoch > (engine.state.max_epochs or math.inf):
            logger.warning(
                "weights are averaged from epoch %d on and the run ends with epoch %d: "
                "set averaging's start_epoch lower, or train longer",
                self.start_epoch, engine.state.max_epochs,
            )  # fmt: skip

    def _update(self, engine: Engine, within: int) -> None:
        if self._is_due(engine, within):
            self.average.update_parameters(self.network)
        elif engine.state.epoch < self.start_epoch or not self.average.n_averaged:
            self.average.follow(self.network)

    def _is_due(self, engine: Engine, within: int) -> bool:
        epochs, length = engine.state.epoch - self.start_epoch, engine.state.epoch_length or 0
        if epochs < 0:
            return False
        if self.unit == "epoch":
            return within == length and epochs % self.every == 0
        group = self.accumulation_steps
        steps = epochs * math.ceil(length / group) + math.ceil(within / group) - 1
        return steps % self.every == 0

    def _hold_rate(self, engine: Engine) -> None:
        epochs = engine.state.epoch - self.start_epoch + 1
        if self.learning_rate is None or epochs < 1:
            return
        moved = min(1.0, epochs / max(1, self.anneal_epochs))
        share = (1 - math.cos(math.pi * moved)) / 2
        for group in self.optimizer.param_groups:
            # As a step begins, that is the first time, `lr` is still the schedule's.
            lowered = group.get(LOWERED, 1.0)  # by going back to the best weights
            before = group.setdefault(_RATE_BEFORE, float(group["lr"]) / lowered)
            group["lr"] = (self.learning_rate * share + before * (1 - share)) * lowered

    def _finish(self, engine: Any) -> None:
        updates = int(self.average.n_averaged)
        if not updates:
            logger.warning(
                "training ended in epoch %d, before weights were averaged (from epoch %d on)",
                engine.state.epoch, self.start_epoch,
            )  # fmt: skip
            return
        layers = 0
        if self.loader is not None:
            averaged = self.average.module
            layers = renew_batch_norm(
                averaged, self._batches(engine), lambda inputs: engine.inferer(inputs, averaged)
            )
        logger.info(
            "averaged %d sets of weights; statistics of %d batch norm layers computed anew",
            updates, layers,
        )  # fmt: skip
        if self.validator is not None:
            Validation(1, self.validator)(engine)
            figures = self.validator.state.metrics.items()
            logger.info("averaged: %s", " ".join(f"{k} {float(v):.4f}" for k, v in figures))

    def _batches(self, engine: Any) -> Iterator[tuple[Tensor, bool]]:
        """Yield the inputs of the epoch that ended, and whether they are this process's own."""
        batches = getattr(self.loader, "batch_sampler", None)
        if not isinstance(batches, OrderedBatches):
            batches = None
        place = (batches.epoch, batches.skip) if batches else (0, 0)
        if batches:  # whole, and the same in a run that was resumed within its last epoch
            batches.begin(engine.state.epoch)
        try:
            for number, batch in enumerate(itertools.islice(self.loader or (), self.norm_batches)):
                inputs = engine.prepare_batch(
                    batch, engine.state.device, engine.non_blocking, **engine.to_kwargs
                )[0]
                yield inputs, batches is None or _has_items(batches, number)
        finally:
            if batches:
                batches.begin(*place)


def _has_items(batches: OrderedBatches, number: int) -> bool:
    """Return whether a process has items of its own in an epoch's batch, or only fills a place."""
    return batches.items - number * batches.batch_size * batches.processes > batches.rank
