"""Goes back to the best weights when the validation loss has become much worse."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch import nn
from torch.optim import Optimizer

from pipeline.errors import ConfigurationError, DivergedError
from pipeline.training.averaging import AveragedNetwork
from pipeline.training.checkpoints import load_weights, read_checkpoint
from pipeline.training.monitor import Monitor
from pipeline.training.processes import from_writer
from pipeline.training.schedules import scale_rates

__all__ = ["RollBack"]

logger = logging.getLogger(__name__)


class RollBack:
    """Go back to `best.pt`, at a lower learning rate, after a validation that is much worse.

    After a validation whose loss exceeds that of the best epoch by more than a share, or is not
    finite, the network takes the weights of `best.pt` and the average follows it anew; the
    optimizer forgets its momenta, which belong to the path that was left; and all learning rates,
    those to come included, are multiplied by a factor. Data order and schedule go on where they
    stand. The best epoch is that of the monitor, so that the loss is compared with that of the very
    weights to go back to; an epoch with a new best is never undone.

    `History` attaches it, after the monitor; elsewhere it stands after the History and before the
    CheckpointHandler, so that `last.pt` is written afterwards: a resumed run goes on as the
    uninterrupted one. For whatever describes the epoch, `trainer.state.rolled_back` is `{epoch,
    metrics, threshold}` of the weights that were gone back to, and None in other epochs.

    Every process of several comes to the same verdict, and gets the weights from the first one.

    Args:
        checkpoints: folder of the CheckpointHandler.
        network: the network that is optimised.
        optimizer: its state is dropped and its rates are lowered.
        monitor: tells the best epoch and the validator.
        lr_scheduler: lowered with the optimizer; None where there is none.
        average: the averaged network, where there is one.
        metric: name of the loss among the validator's metrics; smaller is better.
        share: what the loss may exceed that of the best epoch by, such as 0.5 for half of it; None
            never goes back.
        factor: for the learning rates, in (0, 1).
        limit: how often a run may go back.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    def __init__(
        self,
        checkpoints: str,
        network: nn.Module,
        optimizer: Optimizer,
        monitor: Monitor,
        lr_scheduler: Any = None,
        average: AveragedNetwork | None = None,
        metric: str = "val_loss",
        share: float | None = None,
        factor: float = 0.5,
        limit: int = 5,
    ) -> None:
        if share is not None and not 0 <= share < math.inf:
            raise ConfigurationError(f"roll_back::share must be null or at least 0, got {share!r}")
        if not 0 < factor < 1:
            raise ConfigurationError(f"roll_back::factor must be in (0, 1), got {factor!r}")
        if limit < 1:
            raise ConfigurationError(f"roll_back::limit must be at least 1, got {limit!r}")
        self.path = Path(checkpoints) / "best.pt"
        self.network = network
        self.optimizer = optimizer
        self.monitor = monitor
        self.lr_scheduler = lr_scheduler
        self.average = average
        self.metric = metric
        self.share = share
        self.factor = factor
        self.limit = limit
        self.best_loss: float | None = None  # of the best epoch, whose weights are in best.pt
        self.count = 0

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._forget)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.update)

    @staticmethod
    def _forget(engine: Engine) -> None:
        state: Any = engine.state  # ignite's State takes any attribute
        state.rolled_back = None

    def update(self, engine: Engine) -> None:
        """Judge the present epoch's validation, and go back if it is much worse.

        Raises:
            DivergedError: there is no best epoch to go back to, or the limit is reached.
            CheckpointError: `best.pt` is missing, damaged or of another network.
            ConfigurationError: the validator has no such metric.
        """
        self._forget(engine)
        if not self.monitor.validated(engine):
            return
        metrics = self.monitor.validator.state.metrics
        if self.metric not in metrics:
            if self.share is None:
                return
            known = ", ".join(sorted(metrics))
            raise ConfigurationError(
                f"roll_back::metric is {self.metric!r}; expected one of {known}"
            )
        loss = float(metrics[self.metric])
        if getattr(engine.state, "new_best", False):
            self.best_loss = loss if math.isfinite(loss) else None
        elif self.share is not None and self._worse(loss, self.share):
            self._go_back(engine, self._finding(engine, loss, self.share))

    @property
    def _reference(self) -> float | None:
        """The loss of the weights in `best.pt`, where this run has written them."""
        return None if self.monitor.best is None else self.best_loss

    def _worse(self, loss: float, share: float) -> bool:
        best = self._reference
        return not math.isfinite(loss) or (best is not None and loss > best + share * abs(best))

    def _finding(self, engine: Engine, loss: float, share: float) -> str:
        """Return what is wrong with the present epoch."""
        found = f"{self.metric} is {loss:.4g} in epoch {engine.state.epoch}"
        if self._reference is None:
            return found
        best = f"{self._reference:.4g} in the best epoch {self.monitor.best_epoch}"
        return f"{found}, {best}, and may exceed it by {100 * share:.3g}%"

    def _go_back(self, engine: Engine, finding: str) -> None:
        if self.monitor.best is None:
            raise DivergedError(
                f"{finding}, and there is no best epoch to go back to: lower learning_rate, or set "
                "roll_back::share to null"
            )
        if self.count >= self.limit:
            raise DivergedError(
                f"{finding}; the run went back {self.count} times before and stops: use best.pt, "
                "lower learning_rate, or raise roll_back::limit and start again with resume: auto"
            )
        best = from_writer(lambda: read_checkpoint(self.path))
        load_weights(self.network, best, self.path)
        if self.average is not None:
            self.average.follow(self.network)
        self.optimizer.state.clear()
        scale_rates(self.optimizer, self.lr_scheduler, self.factor)
        self.count += 1
        state: Any = engine.state
        state.rolled_back = {key: best[key] for key in ("epoch", "metrics", "threshold")}
        logger.warning(
            "%s: back to the weights of epoch %d at learning rate %.3g (%d of %d)",
            finding, best["epoch"], float(self.optimizer.param_groups[0]["lr"]),
            self.count, self.limit,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the loss of the best epoch and how often the run went back.

        What going back has changed is in the states of network, average, optimizer and schedule.
        """
        return {"metric": self.metric, "best_loss": self.best_loss, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; of another metric the next best epoch is awaited."""
        self.best_loss = state["best_loss"] if state["metric"] == self.metric else None
        self.count = state["count"]
