"""Write a training run as TensorBoard events: curves, pictures, activations, graph, settings.

The run's folder holds the series whose step is the epoch. Three more runs lie below it:
`iterations` holds the loss of every iteration; `train` and `val` hold `comparison/...`, since
TensorBoard draws two curves in one chart where two runs have the same tag. (`add_scalars` would
open a run and a writer for every metric and side.) `iterations` is apart because a resumed run
hides what its predecessor wrote from a step on, and one step cannot count epochs and iterations.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import Tensor

from pipeline.errors import ConfigurationError, ResourceError
from pipeline.training.activations import ActivationRecorder, select_layers, write_graph
from pipeline.training.panels import PanelCollector
from pipeline.training.throughput import SPEED_PREFIX

__all__ = ["TensorBoardHandler", "write_test_scalars"]

logger = logging.getLogger(__name__)

_AT_ONCE = 50  # iterations written together


class TensorBoardHandler:
    """Record training and validation; list it in `train::handlers` after the ValidationHandler.

    It reads `trainer.state.metrics`, `validator.state.metrics` and `trainer.state.new_best`, writes
    from rank 0 only, and leaves nothing open or hooked when training completes or fails. Training
    computes the same with and without it. Epoch series have the epoch as step, `iterations` the
    iteration; a resumed run goes on from its own and hides what was written beyond.

    Args:
        log_dir: folder of the events, such as `@output_dir + '/tensorboard'`.
        validator: the evaluator that the ValidationHandler runs.
        enabled: False writes no events and does not import TensorBoard.
        log_images: write `val/predictions`.
        image_log_frequency: epochs between two of them; a new best is always drawn.
        log_activations: write `activations/<layer>` of the first validation batch.
        activation_log_frequency: epochs between two of them.
        activation_layers: `auto`, a list of module names, or None for none.
        log_graph: write the network's graph when a run begins.
        hyperparameters: settings to show beside the final metrics; nested names are joined by dots.
        compare: metrics that `comparison/<name>` shows for training and validation.
        panels: draws one case, see `PanelCollector`; None is `SideBySide()`.
        pictures_dir: where each new best leaves its panels as PNG, also with `enabled` False.
    """

    def __init__(
        self,
        log_dir: str | Path,
        validator: Any,
        *,
        enabled: bool = True,
        log_images: bool = True,
        image_log_frequency: int = 5,
        log_activations: bool = False,
        activation_log_frequency: int = 5,
        activation_layers: str | Sequence[str] | None = "auto",
        log_graph: bool = True,
        hyperparameters: Mapping[str, Any] | None = None,
        compare: Sequence[str] = ("dice", "iou"),
        panels: Callable[[Mapping[str, Any]], Tensor] | None = None,
        pictures_dir: str | Path | None = None,
    ) -> None:
        if enabled and importlib.util.find_spec("tensorboard") is None:
            raise ConfigurationError(
                "tensorboard: the package is not installed; install it or set tensorboard: false"
            )
        self.log_dir = Path(log_dir)
        self.validator = validator
        self.enabled = enabled
        self.images = _Schedule("image_log_frequency", image_log_frequency)
        self.activations = _Schedule("activation_log_frequency", activation_log_frequency)
        self.log_graph = log_graph
        self.hyperparameters = hyperparameters
        self.compare = tuple(compare)
        self.pictures_dir = None if pictures_dir is None else Path(pictures_dir)
        self.log_images = enabled and log_images
        layers = activation_layers if enabled and log_activations else None
        self.recorder = ActivationRecorder(
            select_layers(validator.network, layers) if layers is not None else {}
        )
        self.collector = PanelCollector(to_rgb=panels)
        self._runs: _Runs | None = None
        self._release: Callable[[], object] = bool  # nothing to release yet
        self._epoch = 0
        self._validated = False
        self._losses: list[float] = []
        self._unwritten: list[tuple[int, float]] = []
        self._rates: list[float] = []
        self._final: dict[str, float] = {}

    def attach(self, trainer: Engine) -> None:
        """Follow `trainer` and the validator."""
        draws = self.log_images or self.pictures_dir is not None
        if draws:
            self.collector.attach(self.validator)
        if draws or self.enabled:
            self.validator.add_event_handler(Events.EPOCH_STARTED, self._validation_started)
            self.validator.add_event_handler(Events.ITERATION_COMPLETED, self.recorder.disarm)
            self.validator.add_event_handler(Events.EPOCH_COMPLETED, self._validation_completed)
            trainer.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
            trainer.add_event_handler(Events.ITERATION_STARTED, self._iteration_started)
            trainer.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
            trainer.add_event_handler(Events.TERMINATE | Events.COMPLETED, self._completed)

    def _epoch_started(self, trainer: Any) -> None:
        if self._validated and self._epoch:
            logger.warning("TensorBoardHandler: list it after the ValidationHandler, not before")
        self._epoch, self._validated, self._losses = trainer.state.epoch, False, []
        if self.enabled and self._runs is None and idist.get_rank() == 0:
            self._begin(trainer)

    def _begin(self, trainer: Any) -> None:
        """Prepare the event files; only now is it known from where a resumed run goes on."""
        self._runs = _Runs(self.log_dir, trainer.state.epoch, trainer.state.iteration)
        self.images.last_epoch = self.activations.last_epoch = trainer.state.epoch - 1
        # For the case that a listener before ours raises and cuts `_failed` off: released when the
        # trainer is collected, or at exit.
        self._release = weakref.finalize(trainer, _release, self._runs, self.recorder)
        # Added now, behind all others, because it has to raise: ignite takes an exception as dealt
        # with once anyone listens, and who raises cuts off the listeners behind.
        if not trainer.has_event_handler(self._failed, Events.EXCEPTION_RAISED):
            trainer.add_event_handler(Events.EXCEPTION_RAISED, self._failed)

    def _iteration_started(self, trainer: Any) -> None:
        if self._runs is None:
            return
        # Read before the step: a scheduler listed earlier has the next epoch's rate at the end.
        self._rates = [float(group["lr"]) for group in trainer.optimizer.param_groups]
        state = trainer.state
        if self.log_graph and state.iteration == 1:
            inputs = trainer.prepare_batch(
                state.batch, state.device, trainer.non_blocking, **trainer.to_kwargs
            )[0]
            write_graph(self._runs(), trainer.network, inputs)

    def _iteration_completed(self, trainer: Any) -> None:
        if self._runs is None:
            return
        output = trainer.state.output
        first = output[0] if isinstance(output, list) else output
        loss = float(torch.as_tensor(first["loss"]).detach())
        self._losses.append(loss)
        self._unwritten.append((trainer.state.iteration, loss))
        if len(self._unwritten) == _AT_ONCE:
            self._write_iterations(self._runs)

    def _write_iterations(self, runs: _Runs) -> None:
        """Write the losses of the latest iterations; each alone would wake the writer's thread."""
        for iteration, loss in self._unwritten:
            runs("iterations").add_scalar("train/loss_iteration", loss, iteration)
        self._unwritten = []

    def _validation_started(self) -> None:
        if self._runs is not None and self.activations.due(self._epoch):
            self.recorder.arm()

    def _validation_completed(self) -> None:
        self._validated = True

    def _epoch_completed(self, trainer: Any) -> None:
        validated, self._validated = self._validated, False
        new_best = validated and bool(getattr(trainer.state, "new_best", False))
        if new_best and self.pictures_dir is not None and idist.get_rank() == 0:
            self.collector.write_pictures(self.pictures_dir)
        if self._runs is None:
            return
        self._write_iterations(self._runs)
        self._write_curves(self._runs, trainer.state.metrics, validated)
        if validated and self.log_images and (new_best or self.images.due(self._epoch)):
            self._runs().add_image("val/predictions", self.collector.sheet(), self._epoch)
            self.images.last_epoch = self._epoch
        if validated and self.recorder.records:
            self._write_activations(self._runs())
        self._runs.flush()

    def _write_curves(self, runs: _Runs, trained: Mapping[str, Any], validated: bool) -> None:
        """Write what this epoch measured; an epoch without validation has no validation values."""
        train = _scalars(trained, "train")
        for name in [name for name in train if name.startswith(SPEED_PREFIX)]:
            tag = f"speed/{name.removeprefix(SPEED_PREFIX)}"
            runs().add_scalar(tag, train.pop(name), self._epoch)
        if self._losses:
            train.setdefault("loss", fmean(self._losses))
        sides = {"train": train}
        if validated:
            sides["val"] = _scalars(self.validator.state.metrics, "val")
        for side, values in sides.items():
            for name, value in values.items():
                runs().add_scalar(f"{side}/{name}", value, self._epoch)
                self._final[f"final/{side}_{name}"] = value
                if name in self.compare:
                    runs(side).add_scalar(f"comparison/{name}", value, self._epoch)
        for place, rate in enumerate(self._rates):
            tag = f"learning_rate/group_{place}" if place else "learning_rate"
            runs().add_scalar(tag, rate, self._epoch)

    def _write_activations(self, writer: Any) -> None:
        for layer, activation in self.recorder.records.items():
            for name, value in activation.statistics.items():
                writer.add_scalar(f"activations/{layer}/{name}", value, self._epoch)
            if activation.values.size:
                writer.add_histogram(f"activations/{layer}", activation.values, self._epoch)
        self.recorder.records = {}
        self.activations.last_epoch = self._epoch

    def _completed(self) -> None:
        if self._runs is not None and self.hyperparameters is not None and self._final:
            _write_hyperparameters(self._runs(), self.hyperparameters, self._final, self._epoch)
        self._close()

    def _failed(self, _trainer: Engine, error: BaseException) -> None:
        with contextlib.suppress(OSError):  # a full disk may be the very error that is on its way
            self._close()
        raise error

    def _close(self) -> None:
        if self._runs is not None:
            self._write_iterations(self._runs)
        self.collector.rows.clear()
        self._release()
        self._runs = None


class _Schedule:
    """Whether an event that is wanted every so many epochs is due.

    It is due once a multiple of `every` has been passed since the last one, so that it also comes
    where validation skips the very epoch.
    """

    def __init__(self, setting: str, every: int) -> None:
        self.every = _at_least_one(setting, every)
        self.last_epoch = 0

    def due(self, epoch: int) -> bool:
        return epoch // self.every > self.last_epoch // self.every


class _Runs:
    """The event files of one training run, each opened when its first event comes."""

    def __init__(self, log_dir: Path, epoch: int, iteration: int) -> None:
        self.log_dir = log_dir
        self.epoch = epoch
        self.iteration = iteration
        self.writers: dict[str, Any] = {}

    def __call__(self, name: str = "") -> Any:
        """Return the writer of the run `name` below the folder, or of the folder itself."""
        if name not in self.writers:
            first_step = self.iteration + 1 if name == "iterations" else self.epoch
            self.writers[name] = _open_writer(self.log_dir / name, first_step)
        return self.writers[name]

    def flush(self) -> None:
        for writer in self.writers.values():
            writer.flush()

    def close(self) -> None:
        while self.writers:
            self.writers.popitem()[1].close()


def _release(runs: _Runs, recorder: ActivationRecorder) -> None:
    """Take hooks off and close files; apart from the handler, which the trainer keeps alive."""
    recorder.disarm()
    runs.close()


def _open_writer(folder: Path, first_step: int | None = None) -> Any:
    """Return a `SummaryWriter`; earlier events in `folder` from `first_step` on are hidden."""
    from torch.utils.tensorboard import SummaryWriter  # heavy, and not needed when disabled

    try:
        folder.mkdir(parents=True, exist_ok=True)
        return SummaryWriter(str(folder), purge_step=first_step)
    except OSError as error:
        raise ResourceError(
            f"{folder}: TensorBoard events cannot be written ({error.strerror}); choose another"
            " output_dir or set tensorboard: false"
        ) from error


def _scalars(metrics: Mapping[str, Any], side: str) -> dict[str, float]:
    """Return the single numbers in `metrics` without the prefix of their side."""
    other = "val_" if side == "train" else "train_"
    found = {}
    for name, value in metrics.items():
        if getattr(value, "shape", ()) in ((), (1,)) and hasattr(value, "item"):
            value = value.item()
        if isinstance(value, int | float) and not name.startswith(other):
            found[name.removeprefix(f"{side}_")] = float(value)
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | float | str]:
    """Return nested `settings` as one level of plain values; None is left out."""
    found: dict[str, bool | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{prefix}{name}."))
        elif value is not None:
            plain = isinstance(value, bool | int | float | str)
            found[f"{prefix}{name}"] = value if plain else str(value)
    return found


def _write_hyperparameters(
    writer: Any, settings: Mapping[str, Any], final: Mapping[str, float], epoch: int
) -> None:
    """Write settings and final metrics into the writer's own run.

    `SummaryWriter.add_hparams` would open a second run, named by the time, below it.
    """
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(_flat(settings), dict(final)):
        writer.file_writer.add_summary(summary)
    for name, value in final.items():
        writer.add_scalar(name, value, epoch)


def _at_least_one(setting: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{setting}: expected a whole number of at least 1, got {value!r}")
    return value


def write_test_scalars(
    log_dir: str | Path, metrics: Mapping[str, Any], step: int, run_name: str = "test"
) -> None:
    """Write the figures of a test as `test/<name>` into the run `test` below a training run.

    Args:
        log_dir: the `tensorboard` folder of the training run.
        metrics: figures by name; what is not a single number is left out.
        step: epoch of the evaluated checkpoint.
        run_name: another name keeps the figures of another checkpoint beside these.
    """
    if idist.get_rank() != 0:
        return
    writer = _open_writer(Path(log_dir) / run_name)
    for name, value in _scalars(metrics, "test").items():
        writer.add_scalar(f"test/{name}", value, step)
    writer.close()
