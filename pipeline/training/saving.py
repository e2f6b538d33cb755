"""Writes the checkpoints of a run while it trains, and resumes from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ignite.engine import Engine, Events
from torch import nn

from pipeline.errors import CheckpointError, ConfigurationError
from pipeline.training.checkpoints import (
    check_definition,
    load_weights,
    read_checkpoint,
    write_checkpoint,
)
from pipeline.training.monitor import Monitor

__all__ = ["CheckpointHandler"]

logger = logging.getLogger(__name__)


class CheckpointHandler:
    """Save a run's checkpoints at the end of its epochs and continue from the last one.

    List it among `train::handlers` after the History, which brings the monitor. Files under
    `folder`:

    - `last.pt`, after every epoch, with the full training state; the one before is `previous.pt`;
    - `best.pt`, at each new best of the monitored metric: the evaluated weights;
    - `swa.pt`, when training ends: the averaged weights, where there is an average.

    Args:
        folder: where the files go.
        network: the network that is optimised.
        state: further objects with `state_dict`, such as optimizer and lr_scheduler, by name.
        definition: plain data that makes the checkpoint usable by itself: `bundle`, `network_def`,
            `architecture`, `preprocessing`, `plan`, ...
        monitor: tells a new best; its state is saved too.
        averaged: network with averaged weights; where given, it is what validation evaluates and
            what `best.pt` holds.
        resume: `auto` continues where `last.pt` exists, True demands it, False starts anew.
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

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the trainer."""
        engine.add_event_handler(Events.STARTED, self.restore)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.save_average)

    def restore(self, engine: Engine) -> None:
        """Continue from `last.pt` as `resume` says."""
        path = self.folder / "last.pt"
        if self.resume is False or (self.resume == "auto" and not path.exists()):
            return
        content = read_checkpoint(path)
        check_definition(
            content,
            source=path,
            settings={k: self.definition.get(k) for k in ("network_def", "preprocessing")},
        )
        load_weights(self.network, content, path)
        saved = content["training_state"]
        if missing := self.state.keys() - saved.keys():
            raise CheckpointError(
                f"{path}: has no state of {', '.join(sorted(missing))}; set resume to false"
            )
        for name, item in self.state.items():
            item.load_state_dict(saved[name])
        engine.state.epoch = content["epoch"]
        engine.state.iteration = content["iteration"]
        logger.info("resuming %s after epoch %d", path, content["epoch"])

    def save(self, engine: Engine) -> None:
        """Write `last.pt`, and `best.pt` at a new best."""
        training_state = {name: item.state_dict() for name, item in self.state.items()}
        content = self._content(engine, self.network) | {"training_state": training_state}
        write_checkpoint(self.folder / "last.pt", content, keep_as="previous.pt")
        if getattr(engine.state, "new_best", False):
            evaluated = self.averaged if self.averaged is not None else self.network
            write_checkpoint(self.folder / "best.pt", self._content(engine, evaluated))

    def save_average(self, engine: Engine) -> None:
        """Write `swa.pt`."""
        if self.averaged is not None and engine.state.epoch:
            write_checkpoint(self.folder / "swa.pt", self._content(engine, self.averaged))

    def _content(self, engine: Engine, network: nn.Module) -> dict[str, Any]:
        metrics: dict[str, float] = {}
        if self.monitor.validated(engine):
            metrics = {k: float(v) for k, v in self.monitor.validator.state.metrics.items()}
        return {
            **self.definition,
            "epoch": int(engine.state.epoch),
            "iteration": int(engine.state.iteration),
            "model": {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()},
            "metrics": metrics,
            "threshold": metrics.get("threshold", 0.5),
        }
