from __future__ import annotations

import errno

import pytest

from pipeline import errors
from pipeline.errors import (
    CheckpointError,
    ConfigurationError,
    DivergedError,
    InputError,
    InputErrors,
    Interrupted,
    LaminaError,
    Preempted,
    Problem,
    ResourceError,
    exit_code,
    lamina_cause,
)

CODES = {
    LaminaError: 1,
    ConfigurationError: 2,
    InputError: 3,
    CheckpointError: 4,
    ResourceError: 5,
    DivergedError: 6,
    Preempted: 75,
    Interrupted: 130,
}


@pytest.mark.parametrize("error", CODES, ids=lambda error: error.__name__)
def test_each_error_has_the_exit_code_of_the_design(error: type[LaminaError]) -> None:
    assert exit_code(error("text")) == CODES[error]


@pytest.mark.parametrize("error", CODES, ids=lambda error: error.__name__)
def test_an_error_prints_as_its_message_alone(error: type[LaminaError]) -> None:
    assert str(error("a.png: found 2 channels")) == "a.png: found 2 channels"


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ConfigurationError, ValueError),
        (InputError, ValueError),
        (CheckpointError, RuntimeError),
        (ResourceError, OSError),
        (DivergedError, ArithmeticError),
    ],
    ids=lambda kind: kind.__name__,
)
def test_an_error_is_also_the_builtin_a_caller_would_catch(
    error: type[LaminaError], builtin: type[Exception]
) -> None:
    assert issubclass(error, builtin)


def test_every_public_name_exists() -> None:
    assert [name for name in errors.__all__ if not hasattr(errors, name)] == []


def test_several_problems_are_listed_in_one_message() -> None:
    problems = [Problem("a.png", "read", "truncated"), Problem("b.png", "label", "unknown ids")]

    error = InputErrors(problems)

    assert error.problems == tuple(problems)
    assert str(error) == "2 unusable inputs: a.png: truncated; b.png: unknown ids"
    assert exit_code(error) == InputError.exit_code


def test_a_long_list_of_problems_is_counted_and_kept_whole() -> None:
    error = InputErrors(Problem(f"{number}.png", "read", "truncated") for number in range(25))

    assert str(error).startswith("25 ")
    assert str(error).endswith("; and 5 more")
    assert len(error.problems) == 25


@pytest.mark.parametrize("error", [ConfigurationError("x"), InputErrors([Problem("a", "b", "c")])])
def test_a_message_is_one_line(error: LaminaError) -> None:
    assert "\n" not in str(error)


def test_our_error_is_found_behind_the_exceptions_that_wrap_it() -> None:
    ours = ConfigurationError("depths must have five entries")
    try:
        try:
            raise ours
        except ConfigurationError as error:
            raise RuntimeError("Failed to instantiate component") from error
    except RuntimeError as error:
        wrapped = error

    assert lamina_cause(wrapped) is ours
    assert exit_code(wrapped) == ConfigurationError.exit_code


def test_our_error_is_found_behind_one_raised_while_handling_it() -> None:
    try:
        try:
            raise CheckpointError("last.pt is damaged")
        except CheckpointError:
            raise KeyError("epoch")  # noqa: B904 - the implicit context is what is tested
    except KeyError as error:
        wrapped = error

    assert isinstance(lamina_cause(wrapped), CheckpointError)


def test_a_circle_of_causes_ends() -> None:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first

    assert lamina_cause(first) is None
    assert exit_code(first) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (MemoryError(), 5),
        (OSError(errno.ENOSPC, "No space left on device"), 5),
        (PermissionError(errno.EACCES, "Permission denied"), 5),
        (FileNotFoundError(errno.ENOENT, "No such file"), 1),
        (ZeroDivisionError(), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_a_builtin_error_has_the_code_of_what_it_means(error: BaseException, code: int) -> None:
    assert exit_code(error) == code
