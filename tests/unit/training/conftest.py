"""Two processes side by side, for what they do together; and a disk that nobody waits for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

Ended = list[tuple[int, str]]


@pytest.fixture(autouse=True, scope="module")
def no_power_cut() -> Iterator[None]:
    """Let nothing wait until the disk has it: on a busy machine that was half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which takes nothing but open files either
        yield


@pytest.fixture(scope="session")
def run_in_two() -> Callable[..., list[Ended]]:
    """Call `act(*words)` of a file in two processes, for each list of words in turn.

    Returns:
        For each of them exit code and output of both processes.
    """
    return _run_in_two


def _run_in_two(file: str, *rounds: list[str | Path], timeout_s: float = 180) -> list[Ended]:
    words = json.dumps([list(map(str, each)) for each in rounds])
    script = Path(__file__).with_name("in_two.py")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", script, file, words],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as running:
        try:
            found = json.loads(running.communicate(timeout=timeout_s)[0])
        finally:
            with suppress(ProcessLookupError):  # those it has started end with it
                os.killpg(running.pid, signal.SIGKILL)
    return [[(code, told) for code, told in each] for each in found]
