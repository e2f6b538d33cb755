"""One training step: accumulation that is exact, clipping, mixed precision, guards.

MONAI's SupervisedTrainer divides every loss by `accumulation_steps`, also in the shorter group at
the end of an epoch and for the smaller last batch, and it neither notices a loss that is not
finite nor survives running out of memory. `TrainingStep` is given to it as `iteration_update`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor

from pipeline.errors import ConfigurationError, DivergedError, ResourceError

__all__ = ["TrainingStep"]

logger = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class _Batch:
    """One step of the loader: what the network gets, what it should give, and whose it is."""

    inputs: Tensor
    targets: Tensor
    names: Sequence[str]


class _NotFinite(Exception):  # noqa: N818 - never leaves this module
    """A loss or gradient is not finite; the text says which."""


class TrainingStep:
    """Accumulate gradients over a group of batches and update the weights at its end.

    A group's gradient is that of the mean loss over its samples, whatever the number of batches and
    their sizes: for a loss that is a mean over samples it equals the gradient of one large batch.

    Where memory runs out, the group is computed again in smaller pieces, with the same result, and
    so are all later ones. Networks with batch norm, and losses pooled over a batch, see smaller
    batches then: it is logged.

    Args:
        accumulation_steps: loader steps per update; the last group of an epoch may be shorter.
        batch_size: samples per loader step, but for an epoch's last.
        samples: samples in an epoch.
        clip_norm: largest norm of the gradient; None does not clip.
        precision: of forward and loss: `float32`, `bfloat16`, or `float16` with loss scaling.
        skip_not_finite: updates left out because of a value that is not finite before the run
            stops.
    """

    def __init__(
        self,
        accumulation_steps: int,
        batch_size: int,
        samples: int,
        clip_norm: float | None = None,
        precision: Precision = "float32",
        skip_not_finite: int = 0,
    ) -> None:
        if accumulation_steps < 1:
            raise ConfigurationError(
                f"accumulation_steps must be at least 1, got {accumulation_steps!r}"
            )
        if precision not in ("float32", *_DTYPES):
            known = ", ".join(("float32", *_DTYPES))
            raise ConfigurationError(f"precision must be one of {known}, got {precision!r}")
        self.accumulation_steps = accumulation_steps
        self.batch_size = batch_size
        self.samples = samples
        self.clip_norm = clip_norm
        self.precision = precision
        self.skip_not_finite = skip_not_finite
        self.scaler = torch.amp.GradScaler(enabled=precision == "float16")
        self.pieces = 1  # a batch is computed in so many pieces, more after memory ran out
        self.skipped = 0
        self._group: list[_Batch] = []

    def __call__(self, engine: Any, batchdata: Any) -> dict[str, Any]:
        """Compute a batch and, at the end of its group, update the weights.

        Args:
            engine: MONAI's SupervisedTrainer.
            batchdata: what its loader gave; `name`, where present, names the samples in errors.

        Returns:
            `image`, `label`, `pred` and `loss`, the mean over the batch.

        Raises:
            DivergedError: loss or gradient is not finite, more often than allowed.
            ResourceError: a single sample does not fit into memory.
        """
        inputs, targets = engine.prepare_batch(
            batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs
        )
        names = batchdata.get("name", ()) if isinstance(batchdata, dict) else ()
        first, last, samples = self._place(engine)
        if first:
            self._group = []
            engine.optimizer.zero_grad(set_to_none=True)
        engine.network.train()
        self._group.append(_Batch(inputs, targets, names))
        output: dict[str, Any] = {CommonKeys.IMAGE: inputs, CommonKeys.LABEL: targets}
        engine.state.output = output
        try:
            output[CommonKeys.PRED], output[CommonKeys.LOSS] = self._with_enough_memory(
                engine, samples
            )
            engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
            if last:
                self._update(engine)
        except _NotFinite as error:
            self._leave_out(engine, str(error))
            zero = torch.zeros((), device=inputs.device)
            output.update({CommonKeys.PRED: torch.zeros_like(targets), CommonKeys.LOSS: zero})
        if last:
            self._group = []
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return output

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale, the number of pieces and the count of updates left out."""
        return {
            "scaler": self.scaler.state_dict(),
            "pieces": self.pieces,
            "skipped": self.skipped,
            "plan": [self.batch_size, self.accumulation_steps, self.samples],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ConfigurationError: batch size, accumulation or the number of samples has changed: the
                run would not be the one that was interrupted.
        """
        plan = [self.batch_size, self.accumulation_steps, self.samples]
        if list(state["plan"]) != plan:
            raise ConfigurationError(
                "batch_size, accumulation_steps and samples per epoch are "
                f"{plan} and were {state['plan']} when the run was interrupted; "
                "set them back, or begin anew with resume: false"
            )
        self.scaler.load_state_dict(state["scaler"])
        self.pieces = state["pieces"]
        self.skipped = state["skipped"]

    def _place(self, engine: Any) -> tuple[bool, bool, int]:
        """Return whether this batch is its group's first, its last, and the group's samples."""
        length = engine.state.epoch_length
        here = (engine.state.iteration - 1) % length
        start = here - here % self.accumulation_steps
        end = min(start + self.accumulation_steps, length)
        samples = min(end * self.batch_size, self.samples) - start * self.batch_size
        return here == start, here == end - 1, samples

    def _with_enough_memory(self, engine: Any, samples: int) -> tuple[Tensor, Tensor]:
        """Compute the newest batch; where memory runs out, the whole group again in more pieces."""
        todo = self._group[-1:]
        while True:
            try:
                for batch in todo:
                    pred, loss = self._compute(engine, batch, samples)
                return pred, loss
            except torch.OutOfMemoryError as error:
                self._split_further(engine, error)
                todo = self._group

    def _split_further(self, engine: Any, error: torch.OutOfMemoryError) -> None:
        """Halve the pieces and forget the group's gradient, which may be half-added."""
        if self.pieces >= self.batch_size:
            raise ResourceError(
                f"out of memory with one sample at a time ({str(error).splitlines()[0]}); "
                "use a smaller patch_size or network, or a device with more memory"
            ) from error
        self.pieces = min(self.pieces * 2, self.batch_size)
        engine.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory: batches are now computed in %d pieces, with the same effective batch "
            "(batch norm and batch-pooled losses see smaller batches)",
            self.pieces,
        )

    def _compute(self, engine: Any, batch: _Batch, samples: int) -> tuple[Tensor, Tensor]:
        """Add the gradient of one batch and return its prediction and mean loss."""
        pieces = min(self.pieces, len(batch.inputs))
        preds: list[Tensor] = []
        total = 0.0
        for inputs, targets in zip(
            batch.inputs.tensor_split(pieces), batch.targets.tensor_split(pieces), strict=True
        ):
            with self._autocast(inputs.device):
                pred = engine.inferer(inputs, engine.network)
                engine.fire_event(IterationEvents.FORWARD_COMPLETED)
                loss = engine.loss_function(pred, targets).mean()
                engine.fire_event(IterationEvents.LOSS_COMPLETED)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise _NotFinite(f"the loss is {value}{_whose(batch.names)}")
            self.scaler.scale(loss * (len(inputs) / samples)).backward()
            preds.append(pred.detach())
            total += value * len(inputs)
        mean = torch.tensor(total / len(batch.inputs), device=batch.inputs.device)
        return torch.cat(preds), mean

    def _update(self, engine: Any) -> None:
        self.scaler.unscale_(engine.optimizer)
        parameters = [p for p in engine.network.parameters() if p.grad is not None]
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        # With loss scaling an infinite gradient is routine: the scaler leaves the step out itself.
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            names = [name for batch in self._group for name in batch.names]
            raise _NotFinite(f"the gradient's norm is {norm}{_whose(names)}")
        self.scaler.step(engine.optimizer)
        self.scaler.update()

    def _leave_out(self, engine: Any, what: str) -> None:
        """Drop the group's gradient so far, or stop the run."""
        engine.optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        where = f"iteration {engine.state.iteration}: {what}"
        if self.skipped > self.skip_not_finite:
            raise DivergedError(
                f"{where}; training stopped and the last checkpoint is good: look at these files, "
                "lower learning_rate, or allow a few such steps with skip_not_finite"
            )
        logger.warning("%s: left out (%d of %d)", where, self.skipped, self.skip_not_finite)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, dtype=_DTYPES[self.precision])


def _whose(names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(dict.fromkeys(str(name) for name in names))
    return f" in a batch of {shown}"
