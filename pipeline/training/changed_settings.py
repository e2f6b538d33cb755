"""What a run that goes on in its folder is told to do differently from before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.atomic import to_plain

__all__ = ["changed_settings"]

_ABSENT = object()
_LONGEST = 120  # characters of a value in a line of the log


def changed_settings(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Return a line per setting of `config` that is another one in the file at `path`.

    Args:
        path: the `config.yaml` of the run before; where there is none, nothing has changed. One
            that cannot be read is taken for none: it is about to be written anew.
        config: the resolved configuration of this run, as plain data.
    """
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    if not isinstance(before, Mapping):
        return []
    return _changes(before, to_plain(config), ())


def _changes(before: Any, after: Any, name: tuple[str, ...]) -> list[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = dict.fromkeys([*after, *before])
        pairs = ((key, before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in keys)
        return [line for key, b, a in pairs for line in _changes(b, a, (*name, str(key)))]
    if before is after or before == after:
        return []
    return [f"{'::'.join(name)}: {_shown(before)} before, now {_shown(after)}"]


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
