"""From classes as a dataset names them to labels that count from 0, and back to names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.manifests import Manifest
from pipeline.errors import ConfigurationError, InputError, InputErrors, Problem

__all__ = ["Classes", "classes_of", "read_class_list", "sorted_names"]

_NUMBERED = re.compile(r"(\d+)\s+(\S.*)")


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset.

    Args:
        names: in the order of their labels.
        labels: class as the dataset names it -> label, from 0.
    """

    names: tuple[str, ...]
    labels: Mapping[str, int]


def classes_of(
    manifest: Manifest, root: Path, found: Iterable[str], class_list: Path | str | None = None
) -> Classes:
    """Return the classes of a dataset.

    Their names are those of `class_list`, else of the manifest, else of the manifest's file below
    `root` where it is there, else what was found, sorted.

    Args:
        manifest: with `classes`.
        root: the dataset folder.
        found: the class of every image, as the dataset names it.
        class_list: a text file of the class names in the order of their labels.

    Raises:
        InputError: fewer than two classes, another number than the manifest's, or a bad file.
        InputErrors: every class found that is none of them.
        ConfigurationError: numbers that cannot be told to be labels.
    """
    rule = manifest.classes
    tokens = sorted_names(set(found))
    named = rule.get("names")
    beside = root / rule["file"] if "file" in rule else None
    if class_list is not None:
        names, known = read_class_list(class_list), None
    elif isinstance(named, Mapping):
        names, known = tuple(named.values()), {token: k for k, token in enumerate(named)}
    elif named is not None:
        names, known = tuple(named), None
    elif beside is not None and beside.is_file():
        names, known = read_class_list(beside), None
    else:
        names, known = _unnamed(rule, tokens), None
    where = str(class_list or manifest.name)
    _check_count(where, names, rule.get("count"))
    return Classes(names, known or _labels(where, tokens, names, rule.get("first")))


def read_class_list(path: Path | str) -> tuple[str, ...]:
    """Return the class names of a text file, one in each line.

    Lines may be numbered from 0 or from 1, as `1  rice leaf roller`; the numbers are no part of the
    names, and the first line is label 0 in either case.

    Raises:
        InputError: it is missing, no text, or has a number out of its order or a name twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no list of classes: {error}") from error
    lines = [(k, line.strip()) for k, line in enumerate(text.splitlines(), 1) if line.strip()]
    numbered = [_NUMBERED.fullmatch(line) for _, line in lines]
    if lines and all(numbered):
        first = int(numbered[0][1]) if numbered[0] else 0
        for place, ((line, content), match) in enumerate(zip(lines, numbered, strict=True)):
            if first > 1 or match is None or int(match[1]) != first + place:
                raise InputError(
                    f"{path}:{line}: {content!r}, expected number {min(first, 1) + place} and a "
                    "name; number the lines from 0 or 1 on, or not at all"
                )
        lines = [(k, str(m[2])) for (k, _), m in zip(lines, numbered, strict=True) if m]
    seen: dict[str, int] = {}
    for line, name in lines:
        if seen.setdefault(name, line) != line:
            raise InputError(f"{path}:{line}: {name!r} stands in line {seen[name]} already")
    return tuple(name for _, name in lines)


def sorted_names(names: Iterable[str]) -> list[str]:
    """Return names in the order of their labels: numbers as numbers, else as text.

    Example:
        >>> sorted_names(["10", "9", "0"]), sorted_names(["wasp", "ant"])
        (['0', '9', '10'], ['ant', 'wasp'])
    """
    names = list(names)
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _unnamed(rule: Mapping[str, object], tokens: Sequence[str]) -> tuple[str, ...]:
    """Return what stands for names where there are none."""
    first, count = rule.get("first"), rule.get("count")
    if not isinstance(first, int):
        return tuple(tokens)
    numbers = [int(token) for token in tokens if token.isdecimal()]
    end = first + count if isinstance(count, int) else max(numbers, default=first) + 1
    return tuple(str(number) for number in range(first, end))


def _check_count(where: str, names: Sequence[str], count: int | None) -> None:
    if count is not None and len(names) != count:
        raise InputError(f"{where}: {len(names)} class names, expected {count}; complete the list")
    if len(names) < 2:
        raise InputError(
            f"{where}: {len(names)} classes ({', '.join(names) or 'none'}), expected two or more; "
            "is dataset_dir the folder above them?"
        )


def _labels(
    where: str, tokens: Sequence[str], names: Sequence[str], first: int | None
) -> dict[str, int]:
    """Return the label of every class found."""
    known = {name: label for label, name in enumerate(names)}
    numbers = bool(tokens) and all(token.isdecimal() for token in tokens)
    if first is not None and numbers:
        known = {token: int(token) - first for token in tokens}
    elif numbers and not set(tokens) & known.keys():
        if len({int(token) for token in tokens}) != len(names):
            raise ConfigurationError(
                f"{where}: {len(names)} class names for {len(tokens)} numbered classes; "
                "set `classes.first` in the manifest to the number of the first"
            )
        known = {token: label for label, token in enumerate(tokens)}
    problems = [
        Problem(f"class {token}", "label", f"not one of the {len(names)} classes of {where}")
        for token in tokens
        if not 0 <= known.get(token, -1) < len(names)
    ]
    if problems:
        raise InputErrors(problems, "unknown classes")
    return {token: known[token] for token in tokens}
