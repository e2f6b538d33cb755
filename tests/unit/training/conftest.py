"""Two processes side by side, for what they do together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# What each of them runs: the function `act` of the test's own file.
_SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("scenarios", sys.argv[1])
scenarios = importlib.util.module_from_spec(spec)
sys.modules["scenarios"] = scenarios
spec.loader.exec_module(scenarios)
scenarios.act(*sys.argv[2:])
"""


@pytest.fixture(scope="session")
def run_in_two() -> Callable[..., list[tuple[int, str]]]:
    """Call `act(*words)` of a file in two processes; return exit code and errors of each."""
    return _run_in_two


def _run_in_two(file: str, *words: str | Path, timeout_s: float = 180) -> list[tuple[int, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SCRIPT, file, *map(str, words)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=timeout_s)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, error) for process, error in zip(running, errors, strict=True)]
