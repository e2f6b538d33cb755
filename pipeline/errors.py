"""The errors Lamina raises, and the exit code each one means.

Every message is one line that reads alone: the file or setting, what was found, what was expected,
what to do. MONAI wraps exceptions raised while it builds a configuration; `lamina_cause` digs ours
out again.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DivergedError",
    "InputError",
    "InputErrors",
    "Interrupted",
    "LaminaError",
    "Preempted",
    "Problem",
    "ResourceError",
    "exit_code",
    "first_line",
    "lamina_cause",
]


class LaminaError(Exception):
    """An error with a message for a person and an exit code for a program."""

    exit_code: ClassVar[int] = 1


class ConfigurationError(LaminaError, ValueError):
    """A setting, an override or a manifest is wrong (exit 2)."""

    exit_code = 2


class InputError(LaminaError, ValueError):
    """An input file is missing, unreadable or not what it should be (exit 3)."""

    exit_code = 3


class CheckpointError(LaminaError, RuntimeError):
    """A checkpoint is damaged, foreign or disagrees with the configuration (exit 4)."""

    exit_code = 4


class ResourceError(LaminaError, OSError):
    """Memory or disk ran out, or a folder cannot be written (exit 5)."""

    exit_code = 5

    def __str__(self) -> str:  # OSError with one argument prints it as it is; keep that explicit
        return str(self.args[0]) if self.args else ""


class DivergedError(LaminaError, ArithmeticError):
    """Training produced a value that is not finite (exit 6)."""

    exit_code = 6


class Preempted(LaminaError):  # noqa: N818 - not an error: the run was asked to stop and has saved
    """SIGTERM arrived, the state is saved, run again to go on (exit 75)."""

    exit_code = 75


class Interrupted(LaminaError):  # noqa: N818 - as above
    """Ctrl-C arrived, the state is saved, run again to go on (exit 130)."""

    exit_code = 130


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one input.

    Args:
        path: the file, relative to the data folder where there is one.
        stage: where it was noticed, such as `find`, `read`, `label`, `predict`, `write`.
        message: what was found, what was expected, what to do.
        code: exit code that this problem alone would mean.
    """

    path: str
    stage: str
    message: str
    code: int = InputError.exit_code

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class InputErrors(InputError):  # noqa: N818 - the plural of InputError
    """Several inputs are unusable; all of them are listed at once."""

    def __init__(self, problems: Iterable[Problem], context: str = "unusable inputs") -> None:
        self.problems = tuple(problems)
        shown = "; ".join(str(problem) for problem in self.problems[:20])
        more = f"; and {len(self.problems) - 20} more" if len(self.problems) > 20 else ""
        super().__init__(f"{len(self.problems)} {context}: {shown}{more}")


def first_line(error: BaseException) -> str:
    """Return what `error` says first, to be part of a line of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def lamina_cause(error: BaseException) -> LaminaError | None:
    """Return the Lamina error behind `error`, following `__cause__` and `__context__`."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, LaminaError):
            return current
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None


def exit_code(error: BaseException) -> int:
    """Return the exit code of the design page for `error`: 1 where nothing better is known."""
    known = lamina_cause(error)
    if known is not None:
        return known.exit_code
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    if isinstance(error, MemoryError):
        return ResourceError.exit_code
    full_or_forbidden = {errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT}
    if isinstance(error, OSError) and error.errno in full_or_forbidden:
        return ResourceError.exit_code
    return LaminaError.exit_code
