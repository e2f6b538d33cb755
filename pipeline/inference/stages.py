"""Where the time of an input goes: reading, network, what follows it, writing."""

from __future__ import annotations

import time
from collections.abc import Mapping

__all__ = ["StageClock"]


class StageClock:
    """Wall and CPU seconds of stages that follow each other.

    Attributes:
        seconds: wall seconds per stage.
        cpu_seconds: CPU seconds per stage, of all threads of this process.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """Begin a stage here; what has passed since the last one belongs to none."""
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def lap(self, stage: str) -> None:
        """End a stage here, and begin the next one; a stage met again is added up."""
        wall_s, cpu_s = self._wall_s, self._cpu_s
        self.start()
        _add(self.seconds, stage, self._wall_s - wall_s)
        _add(self.cpu_seconds, stage, self._cpu_s - cpu_s)

    def add(self, other: StageClock) -> None:
        """Add the stages of another clock, which may be of the same names; begin a stage here."""
        for stage, spent_s in other.seconds.items():
            _add(self.seconds, stage, spent_s)
            _add(self.cpu_seconds, stage, other.cpu_seconds[stage])
        self.start()

    def record(self, before: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, object]:
        """Return `seconds` and `cpu_seconds` per stage, in milliseconds' precision.

        Args:
            before: what another clock's `record` gave for stages before these.
        """
        found = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        return {
            key: {
                stage: round(float(s), 3)
                for stage, s in {**(before or {}).get(key, {}), **own}.items()
            }
            for key, own in found.items()
        }


def _add(seconds: dict[str, float], stage: str, spent_s: float) -> None:
    seconds[stage] = seconds.get(stage, 0.0) + spent_s
