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
from functools import partial
from typing import Any, Literal

import torch
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pipeline.errors import ConfigurationError, DivergedError, ResourceError, first_line
from pipeline.hardware.out_of_memory import is_out_of_memory
from pipeline.training.equality import equality_notes
from pipeline.training.groups import Place, place_in_group
from pipeline.training.objective import Objective, Part, plain_objective
from pipeline.training.processes import (
    share_weights,
    sum_gradients,
    sum_over_processes,
    texts_of_processes,
)

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
    counted: int  # its samples, or 0 where it only fills a place


class TrainingStep:
    """Accumulate gradients over a group of batches and update the weights at its end.

    A group's gradient is that of the mean loss over its samples, whatever the number of batches and
    their sizes: for a loss that is a mean over samples it equals the gradient of one large batch.
    Several processes share each batch, and the gradient is that of all their samples.

    Where memory runs out, the group is computed again in smaller pieces, with the same result, and
    so are all later ones. Networks with batch norm, and losses pooled over a batch, see smaller
    batches then: it is logged, as it is for accumulation and for several processes.

    A group with a loss or gradient that is not finite changes nothing.

    Args:
        accumulation_steps: loader steps per update; the last group of an epoch may be shorter.
        batch_size: items per loader step and process, but for an epoch's last.
        samples: items in an epoch, in all processes.
        clip_norm: largest norm of the gradient; None does not clip.
        precision: of forward and loss: `float32`, `bfloat16`, or `float16` with loss scaling.
        skip_not_finite: updates left out because of a value that is not finite before the run
            stops.
        rank, processes: number of this process, and how many there are.
        objective: what is computed of a batch or a piece of one; by default forward, loss,
            backward.
    """

    def __init__(
        self,
        accumulation_steps: int,
        batch_size: int,
        samples: int,
        clip_norm: float | None = None,
        precision: Precision = "float32",
        skip_not_finite: int = 0,
        rank: int = 0,
        processes: int = 1,
        objective: Objective = plain_objective,
    ) -> None:
        if accumulation_steps < 1:
            raise ConfigurationError(
                f"accumulation_steps must be at least 1, got {accumulation_steps!r}"
            )
        if precision not in ("float32", *_DTYPES):
            known = ", ".join(("float32", *_DTYPES))
            raise ConfigurationError(f"precision must be one of {known}, got {precision!r}")
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigurationError(f"clip_norm must be null or above 0, got {clip_norm!r}")
        self.accumulation_steps = accumulation_steps
        self.batch_size = batch_size
        self.samples = samples
        self.clip_norm = clip_norm
        self.precision = precision
        self.skip_not_finite = skip_not_finite
        self.rank = rank
        self.processes = processes
        self.objective = objective
        where = "cuda" if torch.cuda.is_available() else "cpu"
        self.scaler = torch.amp.GradScaler(where, enabled=precision == "float16")
        self.pieces = 1  # a batch is computed in so many pieces, more after memory ran out
        self.skipped = 0
        self._group: list[_Batch] = []
        self._not_finite = ""  # what was found in the present group
        self._parameters: list[torch.nn.Parameter] = []
        self._buffers: list[Tensor] = []  # before the group, where one may be left out
        self._begun = False
        self._noted = False

    def __call__(self, engine: Any, batchdata: Any) -> dict[str, Any]:
        """Compute a batch and, at the end of its group, update the weights.

        Args:
            engine: MONAI's SupervisedTrainer.
            batchdata: what its loader gave; `name`, where present, names the samples in errors.

        Returns:
            `image`, `label`, `pred` and `loss`, the mean over the batch, 0 where it is not finite.

        Raises:
            DivergedError: loss or gradient is not finite, more often than allowed.
            ResourceError: a single sample does not fit into memory.
        """
        inputs, targets = engine.prepare_batch(
            batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs
        )
        names = batchdata.get("name", ()) if isinstance(batchdata, dict) else ()
        place = self._place(engine)
        if not self._begun:
            self._begin(engine)
        if place.first:
            self._group, self._not_finite = [], ""
            engine.optimizer.zero_grad(set_to_none=True)
            if self.skip_not_finite:
                self._buffers = [buffer.clone() for buffer in engine.network.buffers()]
        if not engine.network.training:  # it walks the whole network
            engine.network.train()
        self._group.append(_Batch(inputs, targets, names, 0 if place.filler else len(inputs)))
        output: dict[str, Any] = {CommonKeys.IMAGE: inputs, CommonKeys.LABEL: targets}
        engine.state.output = output
        pred, loss = self._with_enough_memory(engine, place)
        if not math.isfinite(value := float(loss)):
            self._not_finite = self._not_finite or f"the loss is {value}{_whose(names)}"
            loss = torch.zeros_like(loss)
        output.update({CommonKeys.PRED: pred, CommonKeys.LOSS: loss})
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if place.last:
            self._end_group(engine, place.samples)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return output

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale, the number of pieces and the count of updates left out."""
        return {
            "scaler": self.scaler.state_dict(),
            "pieces": self.pieces,
            "skipped": self.skipped,
            "plan": self._plan(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ConfigurationError: batch size, accumulation or the number of samples has changed: the
                run would not be the one that was interrupted.
        """
        if list(state["plan"]) != self._plan():
            raise ConfigurationError(
                "batch_size (of all processes), accumulation_steps and samples per epoch are "
                f"{self._plan()} and were {list(state['plan'])} when the run was interrupted; "
                "set them back, or begin anew with resume: false"
            )
        self.scaler.load_state_dict(state["scaler"])
        self.pieces = state["pieces"]
        self.skipped = state["skipped"]

    def _plan(self) -> list[int]:
        """Return what fixes the samples of every update; how many processes share them does not."""
        return [self.batch_size * self.processes, self.accumulation_steps, self.samples]

    def _place(self, engine: Any) -> Place:
        return place_in_group(
            engine.state.iteration,
            engine.state.epoch_length,
            self.accumulation_steps,
            self.batch_size * self.processes,
            self.samples,
            self.rank,
        )

    def _begin(self, engine: Any) -> None:
        """Before the first step, which may be that of a resumed run."""
        self._begun = True
        self._parameters = list(engine.network.parameters())  # walking a network takes its time
        if self.processes > 1:
            share_weights(engine.network, engine.state.iteration)
        if self.accumulation_steps * self.processes * self.pieces > 1:
            self._note_inequality(engine)

    def _note_inequality(self, engine: Any) -> None:
        """Say once why dividing a batch changes the result, where it does."""
        notes = () if self._noted else equality_notes(engine.network, engine.loss_function)
        self._noted = True
        for note in notes:
            logger.info("gradients are not exactly those of one undivided batch: %s", note)

    def _with_enough_memory(self, engine: Any, place: Place) -> tuple[Tensor, Tensor]:
        """Compute the newest batch; where memory runs out, the whole group again in more pieces."""
        todo = self._group[-1:]
        while True:
            try:
                for batch in todo:
                    pred, loss = self._compute(engine, batch, place)
                return pred, loss
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.pieces >= max(len(batch.inputs) for batch in self._group):
                    raise ResourceError(
                        f"out of memory with one sample at a time ({first_line(error)}); "
                        "use a smaller patch_size or network, or a device with more memory"
                    ) from error
            # Not inside the handler: the exception would keep what had been computed in memory.
            self._split_further(engine)
            todo = self._group

    def _split_further(self, engine: Any) -> None:
        """Double the pieces and forget the group's gradient, which may be half-added."""
        self.pieces = min(self.pieces * 2, max(len(batch.inputs) for batch in self._group))
        engine.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory: batches are now computed in %d pieces, with the same effective batch",
            self.pieces,
        )
        self._note_inequality(engine)

    def _compute(self, engine: Any, batch: _Batch, place: Place) -> tuple[Tensor, Tensor]:
        """Add the gradient of one batch and return its prediction and mean loss."""
        autocast = partial(self._autocast, batch.inputs.device)
        preds: list[Tensor] = []
        mean: Tensor | float = 0.0
        for inputs, targets in self._divided(batch):
            share = len(inputs) / len(batch.inputs)
            weighted = partial(self._weighted, share * batch.counted / place.samples)
            part = Part(inputs, targets, place.epoch, place.update, autocast, weighted)
            pred, loss = self.objective(engine, part)
            preds.append(pred)
            mean = mean + loss * share
        return torch.cat(preds) if len(preds) > 1 else preds[0], torch.as_tensor(mean)

    def _weighted(self, weight: float, loss: Tensor) -> Tensor:
        """Return a part's mean loss as it enters the update's gradient."""
        scaled: Tensor = self.scaler.scale(loss * weight)
        return scaled

    def _divided(self, batch: _Batch) -> list[tuple[Tensor, Tensor]]:
        pieces = min(self.pieces, len(batch.inputs))
        if pieces == 1:
            return [(batch.inputs, batch.targets)]
        parts = batch.inputs.tensor_split(pieces), batch.targets.tensor_split(pieces)
        return list(zip(*parts, strict=True))

    def _end_group(self, engine: Any, planned: int) -> None:
        """Update the weights, or leave the group out."""
        parameters = [p for p in self._parameters if p.requires_grad]
        counted: float = sum(batch.counted for batch in self._group)
        spoilt = bool(self._not_finite)
        if self.processes > 1:
            has = [parameter.grad is not None for parameter in parameters]
            counted, bad, *used = sum_over_processes([counted, spoilt, *has])
            spoilt = bad > 0
            if not spoilt:
                sum_gradients(parameters, [number > 0 for number in used])
        if not spoilt:
            gradients = [p.grad for p in parameters if p.grad is not None]
            if counted != planned:  # an item of the dataset may be several samples
                torch._foreach_mul_(gradients, planned / counted)
            spoilt = not self._update(engine, parameters, gradients)
        if spoilt:
            self._leave_out(engine)
        self._group, self._not_finite = [], ""

    def _update(self, engine: Any, parameters: Sequence[Any], gradients: Sequence[Tensor]) -> bool:
        """Clip and update; return False, with the weights unchanged, where it cannot be done."""
        self.scaler.unscale_(engine.optimizer)
        norm = get_total_norm(gradients)
        if not math.isfinite(value := float(norm)):
            # With loss scaling an infinite gradient is routine, as long as the scale can go down.
            routine = self.scaler.is_enabled() and self.scaler.get_scale() > 1
            self.scaler.update()
            if routine:
                return True
            names = [name for batch in self._group for name in batch.names]
            self._not_finite = f"the gradient's norm is {value}{_whose(names)}"
            return False
        if self.clip_norm is not None:
            clip_grads_with_norm_(parameters, self.clip_norm, norm)
        self.scaler.step(engine.optimizer)
        self.scaler.update()
        return True

    def _leave_out(self, engine: Any) -> None:
        """Drop the group's gradient and what its forward passes left behind, or stop the run."""
        engine.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(engine.network.buffers(), self._buffers, strict=False):
            buffer.copy_(before)  # running statistics of batch norm
        self.skipped += 1
        found = self._not_finite
        if self.processes > 1:
            found = "; ".join(dict.fromkeys(texts_of_processes(found)))
        where = f"iteration {engine.state.iteration}: {found}"
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
