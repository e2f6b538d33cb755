"""Running a command to its end in a process of its own, which gets our signals to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.errors import Interrupted, LaminaError, Preempted, ResourceError

__all__ = ["Commands", "exit_code_of_signal", "signals_passed_on"]


class Commands:
    """Runs commands one after another and passes signals on to the one that runs.

    Made by `signals_passed_on`.

    Attributes:
        received: the signals that have come, in their order.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._passed_on = 0

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a command to its end and return its exit code, negative for a signal's number.

        It shares the terminal but not the input.
        """
        # A group of its own: Ctrl-C in a terminal reaches every process of the group, and the
        # command would get it twice, the second time meaning "at once, without saving".
        group: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=environment, **group
        ) as process:
            try:
                self._process = process
                self._pass_on()  # what came while the process was being made
                return process.wait()
            except BaseException:  # no command goes on with nobody to account for it
                process.terminate()
                process.wait()
                raise
            finally:
                self._process = None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Take a signal, as a handler does."""
        hangup = getattr(signal, "SIGHUP", None)  # a run saves on SIGTERM, and would die of this
        self.received.append(signal.SIGTERM if number == hangup else number)
        self._pass_on()

    def _pass_on(self) -> None:
        while self._process is not None and self._passed_on < len(self.received):
            self._passed_on += 1  # first: the next signal may come within this loop
            self._process.send_signal(self.received[self._passed_on - 1])


@contextmanager
def signals_passed_on() -> Iterator[Commands]:
    """Give the commands that SIGTERM, SIGINT and SIGHUP are passed on to in this context.

    Python lets only the main thread take signals; in another one none is passed on. A signal that
    is ignored, as SIGHUP under `nohup`, stays so.
    """
    commands = Commands()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, commands.receive)
    try:
        yield commands
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code_of_signal(number: int) -> int:
    """Return the exit code of the design page for a process that signal `number` has ended.

    Example:
        >>> [exit_code_of_signal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        [130, 75]
    """
    if number == signal.SIGINT:
        return Interrupted.exit_code
    if number == signal.SIGTERM:
        return Preempted.exit_code
    killed = number == getattr(signal, "SIGKILL", None)  # by the system, when memory is short
    return ResourceError.exit_code if killed else LaminaError.exit_code
