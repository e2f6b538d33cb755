"""Calls `act` of a file in two processes at once: `python in_two.py FILE ROUNDS`.

The two are forked from this one, which has imported what they need: that alone takes seconds, and
more than most of what they are asked to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def _act_in_two(act: Callable[..., None], words: list[str]) -> list[tuple[int, str]]:
    """Return exit code and output of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        outputs = (one, other)
        started = [_fork(act, words, rank, output) for rank, output in enumerate(outputs)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]
        for output in outputs:
            output.seek(0)
        told = [output.read().decode(errors="replace") for output in outputs]
    return list(zip(codes, told, strict=True))


def _fork(act: Callable[..., None], words: list[str], rank: int, output: IO[bytes]) -> int:
    if child := os.fork():
        return child
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    act(*words)
    sys.exit()  # an error has ended it before, with 1 and its message


def _load(file: str) -> Any:
    spec = importlib.util.spec_from_file_location("scenarios", Path(file))
    if spec is None or spec.loader is None:
        raise ImportError(file)
    scenarios = importlib.util.module_from_spec(spec)
    sys.modules["scenarios"] = scenarios
    spec.loader.exec_module(scenarios)
    return scenarios


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")  # as each would with an optimizer's first step
    os.fsync = os.fstat  # as in the tests of one process
    scenarios = _load(sys.argv[1])
    ended = [_act_in_two(scenarios.act, words) for words in json.loads(sys.argv[2])]
    json.dump(ended, sys.stdout)
