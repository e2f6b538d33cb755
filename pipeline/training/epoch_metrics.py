"""Figures that need no second pass: loss, Dice and IoU of the batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import Tensor

__all__ = ["BatchMetrics", "ValidationLoss"]


class BatchMetrics:
    """Put `train_loss`, `train_dice` and `train_iou` of an epoch into the trainer's metrics.

    Dice and IoU are pooled over the epoch's patches at probability 0.5, as they were augmented:
    they show whether training moves, and are not comparable with validation.

    Args:
        ignore_label: label value of pixels that do not count.
    """

    def __init__(self, ignore_label: int = 255) -> None:
        self.ignore_label = ignore_label
        self._reset()

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, a MONAI SupervisedTrainer of one logit per pixel."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _reset(self) -> None:
        self.loss_sum, self.batches = 0.0, 0
        self.counts: Tensor = torch.zeros(3, dtype=torch.float64)

    def _update(self, engine: Engine) -> None:
        outputs: Any = engine.state.output
        items = outputs if isinstance(outputs, list) else [outputs]
        share = self.share(items)
        self.loss_sum += (
            float(torch.as_tensor(items[0]["loss"]).detach()) * share
        )  # decollated: a number
        self.batches += share
        for item in items:
            self.counts += self.count(item["pred"], item["label"])

    def share(self, items: Sequence[Mapping[str, Any]]) -> int:
        """Return what a batch counts in the mean loss; a subclass may count its samples.

        Args:
            items: the trainer's output, one dictionary of the batch or, decollated, of each sample.
        """
        return 1

    def count(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return three sums over a batch, `(3,)` on the CPU, that `figures` takes in total.

        Args:
            logits: the network's output.
            label: the truth.
        """
        predicted, truth = self.masks(logits, label)
        counts = torch.stack([(predicted & truth).sum(), predicted.sum(), truth.sum()])
        return counts.double().cpu()

    def masks(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return where foreground is predicted and where it is; a subclass may say what that is.

        Args:
            logits: the network's output, above 0 on foreground.
            label: of the same shape, above 0 on foreground.
        """
        counted = label != self.ignore_label
        return (logits > 0) & counted, (label > 0) & counted

    def figures(self, counts: Sequence[float]) -> dict[str, float]:
        """Return the figures by name, of the sums over the epoch."""
        both, predicted, truth = counts
        return {
            "train_dice": 2 * both / max(predicted + truth, 1),
            "train_iou": both / max(predicted + truth - both, 1),
        }

    def _report(self, engine: Engine) -> None:
        engine.state.metrics["train_loss"] = self.loss_sum / max(self.batches, 1)
        engine.state.metrics.update(self.figures(self.counts.tolist()))
        self._reset()  # not when an epoch starts: a resumed run may start in its middle

    def state_dict(self) -> dict[str, Any]:
        """Return the sums over the present epoch's batches so far."""
        sums = self.counts.tolist()
        return {"loss_sum": self.loss_sum, "batches": self.batches, "counts": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.loss_sum, self.batches = state["loss_sum"], state["batches"]
        self.counts = torch.tensor(state["counts"], dtype=torch.float64)


class ValidationLoss:
    """Put `val_loss`, the mean loss over the validation cases, into an evaluator's metrics.

    It reads the raw network output, before post-processing replaces it.

    Args:
        loss: called with logits and label; a mean over the batch.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loss = loss
        self._reset()

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, a MONAI SupervisedEvaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._update)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _reset(self) -> None:
        self.total, self.cases = 0.0, 0

    def _update(self, engine: Engine) -> None:
        output: Any = engine.state.output
        with torch.no_grad():
            loss = float(self.loss(output["pred"], output["label"]))
        cases = len(output["label"])
        self.total += loss * cases
        self.cases += cases

    def _report(self, engine: Engine) -> None:
        engine.state.metrics["val_loss"] = self.total / max(self.cases, 1)
