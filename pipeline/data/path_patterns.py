"""Paths below a folder, and the patterns of a manifest that they match."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Mapping

from pipeline.errors import ConfigurationError

__all__ = ["Matches", "fill", "match_paths", "partner"]

Key = tuple[tuple[str, str], ...]
Matches = dict[Key, tuple[str, dict[str, str]]]
"""A path and all its fields, by those of its fields that pair it with others."""


def match_paths(pattern: str, fields: Mapping[str, str], paths: Iterable[str]) -> Matches:
    """Return the paths that match a pattern.

    Args:
        pattern: such as `image/{name}.png`; a field whose name begins with `_` does not pair.
        fields: a regular expression for each field.
        paths: POSIX paths below one folder.

    Raises:
        ConfigurationError: two paths claim one place.
    """
    expression = _expression(pattern, fields)
    found: Matches = {}
    for path in paths:
        # One name has two spellings in Unicode, and file systems differ in which they keep.
        match = expression.fullmatch(unicodedata.normalize("NFC", path))
        if match is None:
            continue
        captured = match.groupdict()
        key = tuple(sorted((k, v) for k, v in captured.items() if not k.startswith("_")))
        if key in found:
            raise ConfigurationError(
                f"{found[key][0]} and {path} claim the same place ({pattern}); "
                "rename or remove one of them"
            )
        found[key] = (path, captured)
    return found


def partner(key: Key, candidates: Matches) -> str | None:
    """Return the candidate whose fields agree with those of the image."""
    names = {name for name, _ in next(iter(candidates), ())}
    wanted = tuple((name, value) for name, value in key if name in names)
    return candidates[wanted][0] if wanted in candidates else None


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return `template` with known fields filled in and unknown ones as they stand."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def _expression(pattern: str, fields: Mapping[str, str]) -> re.Pattern[str]:
    seen: set[str] = set()
    parts = []
    for literal, name, _, _ in string.Formatter().parse(pattern):
        parts.append(re.escape(unicodedata.normalize("NFC", literal)))
        if name is not None:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{fields[name]})")
            seen.add(name)
    return re.compile("".join(parts))
