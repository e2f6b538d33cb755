"""Writes the checkpoints of a run while it trains, and resumes from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ignite.engine import Engine, Events
from torch import Tensor, nn

from pipeline.data.atomic import check_free_bytes
from pipeline.errors import CheckpointError, ConfigurationError
from pipeline.training.checkpoints import (
    check_definition,
    load_weights,
    read_checkpoint,
    write_checkpoint,
)
from pipeline.training.interruption import Interruption
from pipeline.training.monitor import Monitor
from pipeline.training.processes import is_writer
from pipeline.training.schedules import with_own_length

__all__ = ["CheckpointHandler"]

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

    SIGTERM and Ctrl-C are held back: the state is saved at the end of the step, or of the group of
    steps whose gradients are accumulated, and the run stops with `Preempted` or `Interrupted`. One
    that comes while an epoch is validated is honoured after that.

    Whether the files fit on the disk is asked before training starts and before each is written. Of
    several processes the first alone writes.

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
        self._interruption = Interruption()
        self._stop_at: int | None = None  # the iteration whose state was saved in order to stop

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the trainer."""
        engine.add_event_handler(Events.STARTED, self._check_space)
        engine.add_event_handler(Events.STARTED, self.restore)
        engine.add_event_handler(Events.STARTED, self._listen)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._save_within_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.save_average)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._end_after_error)

    def _check_space(self) -> None:
        """Refuse to start where the checkpoints would not fit beside each other."""
        if not is_writer():
            return
        model = _tensor_bytes(self.network.state_dict())
        states = _tensor_bytes([item.state_dict() for item in self.state.values()])
        last = model + states + 2 * model  # two moments, which an optimizer has from its first step
        # last.pt, previous.pt and the one being written; best.pt and swa.pt
        wanted = 3 * last + 2 * model
        there = sum(path.stat().st_size for path in self.folder.glob("*.pt"))
        check_free_bytes(self.folder, max(wanted - there, last))

    def _listen(self, engine: Engine) -> None:
        """Hold signals back from now on, and stop after whatever else a step or epoch does."""
        state: Any = engine.state  # for a listener before ours that ends a failed run
        state.interruption = self._interruption
        # Added now, behind all others.
        for event in (Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
            if not engine.has_event_handler(self._stop_where_saved, event):
                engine.add_event_handler(event, self._stop_where_saved)
        if not engine.has_event_handler(self._interruption.end, Events.COMPLETED):
            engine.add_event_handler(Events.COMPLETED, self._interruption.end)
        self._stop_at = None
        self._interruption.begin()

    def _stop_where_saved(self, engine: Engine) -> None:
        if self._stop_at == engine.state.iteration:
            raise self._interruption.error(
                f"the state after iteration {self._stop_at} is in {self.folder / 'last.pt'}"
            )

    def _end_after_error(self, engine: Engine, error: BaseException) -> None:
        self._interruption.end()
        raise error  # ignite takes an error for dealt with once anyone listens

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
                item.load_state_dict(with_own_length(item, saved[name]))
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
        if within == length or within % self.accumulation_steps:
            return
        every, before = self.every, within - self.accumulation_steps
        due = every is not None and within // every > before // every
        asked = self._interruption.asked()
        if due or asked:
            self._save_last(engine, epochs=engine.state.epoch - 1)
        if asked:
            self._stop_at = engine.state.iteration

    def save(self, engine: Engine) -> None:
        """Write `best.pt` at a new best, and `last.pt`."""
        # The best one first: a run that is killed between the two repeats the epoch. The other way
        # round, `last.pt` would know of a best epoch that was never saved.
        if getattr(engine.state, "new_best", False):
            evaluated = self.averaged if self.averaged is not None else self.network
            self._write("best.pt", self._content(engine, evaluated))
        self._save_last(engine, epochs=engine.state.epoch)
        if self._interruption.asked():
            self._stop_at = engine.state.iteration

    def _save_last(self, engine: Engine, epochs: int) -> None:
        """Write `last.pt`, of a run that has completed `epochs` epochs."""
        training_state = {name: item.state_dict() for name, item in self.state.items()}
        content = self._content(engine, self.network)
        content |= {"epoch": int(epochs), "training_state": training_state}
        self._write("last.pt", content, keep_as="previous.pt")

    def save_average(self, engine: Engine) -> None:
        """Write `swa.pt`."""
        if self.averaged is not None and engine.state.epoch:
            self._write("swa.pt", self._content(engine, self.averaged))

    def _write(self, name: str, content: Mapping[str, Any], keep_as: str = "") -> None:
        if is_writer():
            check_free_bytes(self.folder, _tensor_bytes(content))
            write_checkpoint(self.folder / name, content, keep_as=keep_as)

    def _content(self, engine: Engine, network: nn.Module) -> dict[str, Any]:
        metrics: dict[str, float] = {}
        # The weights are those of another epoch then, and so is what is known of them.
        if rolled_back := getattr(engine.state, "rolled_back", None):
            metrics = dict(rolled_back["metrics"])
            self._threshold = float(rolled_back["threshold"])
        elif self.monitor.validated(engine):
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


def _tensor_bytes(content: Any) -> int:
    """Return the size of all tensors in nested plain data; the rest of a checkpoint is small."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, Mapping):
        return sum(map(_tensor_bytes, content.values()))
    if isinstance(content, list | tuple):
        return sum(map(_tensor_bytes, content))
    return 0
