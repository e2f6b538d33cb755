"""Writes the checkpoints of a run while it trains, and resumes from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ignite.engine import Engine, Events
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from pipeline.errors import CheckpointError, ConfigurationError
from pipeline.training.checkpoints import (
    check_definition,
    load_weights,
    read_checkpoint,
    write_checkpoint,
)
from pipeline.training.monitor import Monitor

__all__ = ["CheckpointHandler"]

# How long a schedule is, in the attributes of OneCycleLR, CosineAnnealingLR and PolynomialLR.
_SCHEDULE_LENGTHS = ("total_steps", "_schedule_phases", "T_max", "total_iters")

logger = logging.getLogger(__name__)


class CheckpointHandler:
    """Save a run's checkpoints at the end of its epochs and continue from the last one.

    List it among `train::handlers` after the History, which brings the monitor. Files under
    `folder`:

    - `last.pt`, after every epoch and every few iterations, with the full training state; the one
    before is `previous.pt`;
    - `best.pt`, at each new best of the monitored metric: the evaluated weights;
    - `swa.pt`, when training ends: the averaged weights, where there is an average.

    The threshold in each of them is the one that the latest validation chose.

    Args:
        folder: where the files go.
        network: the network that is optimised.
        state: further objects with `state_dict`, such as optimizer and lr_scheduler, by name.
        definition: plain data that makes the checkpoint usable by itself: `bundle`, `network_def`,
            `architecture`, `preprocessing`, `plan`, ...
        monitor: tells a new best; its state is saved too.
        averaged: network with averaged weights; where given, it is what validation evaluates and
            what `best.pt` holds.
        resume: `auto` continues where `last.pt` exists, True demands it, False starts anew. Where
            `last.pt` is damaged, `previous.pt` serves, with a warning. A run may go on with more
            epochs than before: the learning rate then follows the longer schedule from there on.
        every: iterations between two savings of `last.pt` inside an epoch; None saves at its end.
        accumulation_steps: iterations per update of the weights; only whole groups are saved.
    """

    def __init__(
        self,
        folder: str,
        network: nn.Module,
        state: Mapping[str, Any],
        definition: Mapping[str, Any],
        monitor: Monitor,
        averaged: nn.Module | None = None,
        resume: bool | Literal["auto"] = "auto",
        every: int | None = None,
        accumulation_steps: int = 1,
    ) -> None:
        if resume not in (True, False, "auto"):
            raise ConfigurationError(f"resume is {resume!r}; expected true, false or auto")
        self.folder = Path(folder)
        self.network = network
        self.averaged = averaged
        self.state = {**state, "monitor": monitor}
        self.definition = dict(definition)
        self.monitor = monitor
        self.resume = resume
        self.every = every
        self.accumulation_steps = accumulation_steps
        self._threshold = 0.5

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the trainer."""
        engine.add_event_handler(Events.STARTED, self.restore)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._save_within_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.save_average)

    def restore(self, engine: Engine) -> None:
        """Continue from `last.pt` as `resume` says."""
        path = self.folder / "last.pt"
        if self.resume is False or (self.resume == "auto" and not path.exists()):
            return
        path, content = self._latest(path)
        compared = ("architecture", "network_def", "preprocessing")
        settings = {key: self.definition[key] for key in compared if key in self.definition}
        try:
            check_definition(content, source=path, settings=settings)
            load_weights(self.network, content, path)
            self._load_state(content, path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; to start anew, set resume to false") from error
        engine.state.epoch = content["epoch"]
        engine.state.iteration = content["iteration"]
        logger.info(
            "resuming %s after epoch %d of %s, iteration %d",
            path, content["epoch"], engine.state.max_epochs, content["iteration"],
        )  # fmt: skip
        if self.monitor.exhausted:
            logger.info("early stopping ended this run; raise early_stopping::patience to go on")
            engine.terminate()

    def _latest(self, path: Path) -> tuple[Path, dict[str, Any]]:
        """Return `path` and its content, or those of `previous.pt` where `path` is damaged."""
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            previous = path.with_name("previous.pt")
            if not (path.exists() and previous.exists()):
                raise
            logger.warning("%s; going on from %s instead", error, previous)
            return previous, read_checkpoint(previous)

    def _load_state(self, content: Mapping[str, Any], path: Path) -> None:
        saved = content.get("training_state", {})
        if missing := self.state.keys() - saved.keys():
            raise CheckpointError(f"{path}: has no state of {', '.join(sorted(missing))}")
        for name, item in self.state.items():
            try:
                item.load_state_dict(_with_own_length(item, saved[name]))
            except (LookupError, RuntimeError, TypeError, ValueError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise CheckpointError(
                    f"{path}: its state of {name} does not fit: {reason}"
                ) from error
        self._threshold = float(content.get("threshold", self._threshold))

    def _save_within_epoch(self, engine: Engine) -> None:
        length = engine.state.epoch_length or 0
        within = engine.state.iteration - (engine.state.epoch - 1) * length
        # An epoch's last iteration is saved with its end; a group of accumulated gradients is whole
        # or not begun, since gradients are not part of a checkpoint.
        if not self.every or within == length or within % self.accumulation_steps:
            return
        if within // self.every > (within - self.accumulation_steps) // self.every:
            self._save_last(engine, epochs=engine.state.epoch - 1)

    def save(self, engine: Engine) -> None:
        """Write `best.pt` at a new best, and `last.pt`."""
        # The best one first: a run that is killed between the two repeats the epoch. The other way
        # round, `last.pt` would know of a best epoch that was never saved.
        if getattr(engine.state, "new_best", False):
            evaluated = self.averaged if self.averaged is not None else self.network
            write_checkpoint(self.folder / "best.pt", self._content(engine, evaluated))
        self._save_last(engine, epochs=engine.state.epoch)

    def _save_last(self, engine: Engine, epochs: int) -> None:
        """Write `last.pt`, of a run that has completed `epochs` epochs."""
        training_state = {name: item.state_dict() for name, item in self.state.items()}
        content = self._content(engine, self.network)
        content |= {"epoch": int(epochs), "training_state": training_state}
        write_checkpoint(self.folder / "last.pt", content, keep_as="previous.pt")

    def save_average(self, engine: Engine) -> None:
        """Write `swa.pt`."""
        if self.averaged is not None and engine.state.epoch:
            write_checkpoint(self.folder / "swa.pt", self._content(engine, self.averaged))

    def _content(self, engine: Engine, network: nn.Module) -> dict[str, Any]:
        metrics: dict[str, float] = {}
        if self.monitor.validated(engine):
            metrics = {k: float(v) for k, v in self.monitor.validator.state.metrics.items()}
            self._threshold = metrics.get("threshold", self._threshold)
        return {
            **self.definition,
            "epoch": int(engine.state.epoch),
            "iteration": int(engine.state.iteration),
            "model": {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()},
            "metrics": metrics,
            "threshold": self._threshold,
        }


def _with_own_length(item: Any, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the saved state, where `item` is a schedule with the length it was configured with."""
    if not isinstance(item, LRScheduler):
        return saved
    own = vars(item)
    return {**saved, **{key: own[key] for key in _SCHEDULE_LENGTHS if key in own}}
