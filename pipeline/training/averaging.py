"""Averaged weights: an exponential moving average of the network, kept beside it."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipeline.errors import ConfigurationError

__all__ = ["AveragedNetwork", "EMAHandler"]


class AveragedNetwork(AveragedModel):
    """An exponential moving average of a network's parameters and buffers.

    The share of the old average grows as `min(decay, (1 + n) / (10 + n))` with the number of
    updates `n`, so that the first steps of training do not linger. `.module` is the averaged
    network.

    Args:
        network: the network that is trained.
        decay: largest share of the old average kept at an update.
    """

    def __init__(self, network: nn.Module, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ConfigurationError(f"ema_decay must be in [0, 1), got {decay!r}")
        self.decay = decay
        super().__init__(network, avg_fn=self._average, use_buffers=True)

    def _average(self, average: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        if not average.is_floating_point():  # batch norm's step counter
            return current
        n = float(updates)
        share = min(self.decay, (1 + n) / (10 + n))
        return torch.lerp(current, average, share)


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
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)

    def _update(self, engine: Engine) -> None:
        length = engine.state.epoch_length
        within = (engine.state.iteration - 1) % length + 1 if length else engine.state.iteration
        if within % self.accumulation_steps == 0 or within == length:
            self.average.update_parameters(self.network)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        return dict(self.average.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.average.load_state_dict(state)
