"""What a training step computes of a batch: prediction, loss and gradient.

`TrainingStep` decides what belongs to an update and what to do where memory runs out; what is
computed of each part is an objective, by default `plain_objective`: forward, loss, backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor

__all__ = ["Objective", "Part", "plain_objective", "tell_loss", "tell_prediction"]


@dataclass(frozen=True)
class Part:
    """A batch, or as much of it as is computed at once.

    Attributes:
        inputs: what the network gets, one sample per row.
        targets: what it should give.
        epoch: of the training, from 1.
        update: of the weights in that epoch, from 0; all batches of a group share it.
        autocast: returns a new context for one forward pass in the run's precision.
        weighted: turns the mean loss over the part into what the gradient is taken of, with the
            part's share of the update and loss scaling. It is linear: the parts of a sum may be
            turned one by one.
    """

    inputs: Tensor
    targets: Tensor
    epoch: int
    update: int
    autocast: Callable[[], AbstractContextManager[Any]]
    weighted: Callable[[Tensor], Tensor]


class Objective(Protocol):
    """What `TrainingStep` calls for every part of a batch."""

    def __call__(self, engine: Any, part: Part) -> tuple[Tensor, Tensor]:
        """Add the gradient of a part to the parameters.

        Each of `tell_prediction` and `tell_loss` is called once. Where memory runs out the same
        part comes again, in pieces and with the same `epoch` and `update`.

        Args:
            engine: MONAI's SupervisedTrainer.
            part: what to compute.

        Returns:
            Prediction, one row per sample, and mean loss, both detached.
        """
        ...


def plain_objective(engine: Any, part: Part) -> tuple[Tensor, Tensor]:
    """Compute the trainer's loss of the network's output; an `Objective`."""
    with part.autocast():
        pred = engine.inferer(part.inputs, engine.network)
        tell_prediction(engine, pred)
        loss = engine.loss_function(pred, part.targets).mean()
        tell_loss(engine, loss)
        if isinstance(pred, list | tuple):  # deep supervision: the full size stands first
            pred = pred[0]
    part.weighted(loss).backward()
    return pred.detach(), loss.detach()


def tell_prediction(engine: Any, pred: Any) -> None:
    """Let the engine's handlers see the network's output."""
    engine.state.output[CommonKeys.PRED] = pred
    engine.fire_event(IterationEvents.FORWARD_COMPLETED)


def tell_loss(engine: Any, loss: Tensor) -> None:
    """Let the engine's handlers see the loss."""
    engine.state.output[CommonKeys.LOSS] = loss
    engine.fire_event(IterationEvents.LOSS_COMPLETED)
