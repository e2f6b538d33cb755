"""YAML from other hands: plain values only, no key twice, no file that unfolds into millions."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigurationError

__all__ = ["read_yaml"]

_MAX_BYTES = 64 << 20  # a frozen manifest of 100,000 files
_MAX_DEPTH = 64
_MAX_UNFOLDED = 10  # times the values that stand in the file; more is a bomb and no abbreviation


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, refusing a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping of `node`."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def read_yaml(path: Path | str, *, max_bytes: int = _MAX_BYTES) -> Any:
    """Return the content of a YAML file.

    Args:
        path: the file.
        max_bytes: a larger file is refused unread.

    Raises:
        ConfigurationError: it is missing, too large, not YAML, or uses a tag, a key twice, or
            aliases that unfold to far more than the file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ConfigurationError(f"{path}: {size} bytes of YAML, at most {max_bytes} are read")
        text = path.read_text(encoding="utf-8")
        _check_unfolded_size(path, text)
        return yaml.load(text, Loader=_StrictLoader)
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path}: not found") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: {_one_line(error)}") from error


def _check_unfolded_size(path: Path, text: str) -> None:
    """Refuse deep nesting and aliases that multiply, from the events, before anything is built."""
    sizes: dict[str, int] = {}  # values below each finished anchor
    open_nodes: list[tuple[str | None, int]] = []
    written = unfolded = 0
    for event in yaml.parse(text, Loader=_StrictLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, unfolded))
            written, unfolded = written + 1, unfolded + 1
            if len(open_nodes) > _MAX_DEPTH:
                raise ConfigurationError(f"{path}: nested more than {_MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = unfolded - before
        elif isinstance(event, yaml.ScalarEvent):
            written, unfolded = written + 1, unfolded + 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigurationError(
                    f"{path}: alias *{event.anchor} stands inside or before its own anchor"
                )
            unfolded += sizes[event.anchor]
        if unfolded > _MAX_UNFOLDED * (written + 100):
            raise ConfigurationError(f"{path}: its aliases unfold to millions of values; refused")


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark is not None else ""
        return f"{where}{error.problem or error.context}; expected plain YAML"
    return " ".join(str(error).split())
