"""What a command tells a person or a program: answers on stdout, one line of error on stderr."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from pipeline.arguments import ERROR_FILE

__all__ = ["answers_only", "complain", "say", "say_json"]


def say(text: str) -> None:
    """Write a line to stdout."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that its encoding lacks is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()  # before what another process writes to the same terminal or file


def say_json(content: object) -> None:
    """Write plain data to stdout for a program; what JSON has no word for, such as NaN, is null."""
    from pipeline.data.atomic import to_plain

    say(json.dumps(to_plain(content, finite=True), indent=2))


def complain(text: str) -> None:
    """Write a line of error to stderr, and where a parent process asked for it."""
    sys.stderr.write(f"error: {text}\n")
    if ERROR_FILE in os.environ:
        with suppress(OSError):
            Path(os.environ[ERROR_FILE]).write_text(text, encoding="utf-8")


@contextmanager
def answers_only(wanted: bool) -> Iterator[None]:
    """Send what a run itself writes to stdout, such as its log, to stderr where `wanted`.

    So that stdout holds the one JSON document that a program reads.
    """
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield
