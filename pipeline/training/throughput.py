"""How fast a run is, what it waits for, and how much memory it takes."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from ignite.engine import Engine, Events

__all__ = ["SPEED_PREFIX", "Throughput"]

SPEED_PREFIX = "speed_"


class Throughput:
    """Put the speed of each epoch into the trainer's metrics, validation not counted.

    List it among `train::handlers` before the History, which records it as `speed`:

    - `iterations_per_second`;
    - `loader_share`: of the time, how much the trainer waited for data, between 0 and 1;
    - `peak_memory_mb`: on a GPU what torch's tensors took in the epoch; else the largest resident
      memory of this process since it began, loader workers not counted.

    Args:
        device: where the run computes.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._started_s = self._waiting_since_s = self._ended_s = 0.0
        self._waited_s = 0.0
        self._iterations = 0

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._wait)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._go_on)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._started_s = self._ended_s = time.perf_counter()
        self._waited_s, self._iterations = 0.0, 0

    def _wait(self) -> None:
        self._waiting_since_s = time.perf_counter()

    def _go_on(self) -> None:
        self._waited_s += time.perf_counter() - self._waiting_since_s

    def _count(self) -> None:
        self._iterations += 1
        self._ended_s = time.perf_counter()

    def _report(self, engine: Engine) -> None:
        seconds = self._ended_s - self._started_s
        figures: dict[str, Any] = {"peak_memory_mb": self._peak_bytes() / 1e6}
        if seconds > 0:
            figures["iterations_per_second"] = self._iterations / seconds
            figures["loader_share"] = min(self._waited_s / seconds, 1.0)
        engine.state.metrics.update({SPEED_PREFIX + key: value for key, value in figures.items()})

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kibibytes
