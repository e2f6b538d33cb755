"""Bundle configuration files as mappings, and overrides that must name something in them.

MONAI accepts a misspelt override without a word and trains with the default. Here every id is
looked up in the merged files first. Nothing in this module needs torch or MONAI, so that a typo is
answered at once.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.strict_yaml import read_yaml
from pipeline.errors import ConfigurationError

__all__ = ["check_overrides", "parse_value", "read_config"]

SEPARATOR = "::"
_REFERENCE_SIGNS = ("@", "%", "$")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None, "none": None, "~": None}


def read_config(files: str | PathLike[str] | Sequence[str | PathLike[str]]) -> dict[str, Any]:
    """Return the merged content of configuration files; a later file wins per key.

    A key such as `train::trainer::max_epochs` sets a nested value, `+train::handlers` extends a
    list or mapping, as in MONAI. Macros, references and expressions stay text.

    Args:
        files: one YAML or JSON file, or several in order.

    Raises:
        ConfigurationError: a file is missing or malformed, holds a key twice, or names a parent
            that the files before it do not have.
    """
    paths = [files] if isinstance(files, (str, PathLike)) else list(files)
    config: dict[str, Any] = {}
    for path in map(Path, paths):
        for key, value in _read_file(path).items():
            _merge(config, str(key), value, source=str(path))
    return config


def check_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `overrides` ready for MONAI, each id found in `config`.

    Args:
        config: the merged configuration.
        overrides: value per id; `::` or `#` goes one level down, a number picks a list item. An id
            with a leading `+` extends the list or mapping there, or adds a new key to a mapping.

    Raises:
        ConfigurationError: an id is not in the configuration, or a number got something that
            cannot be one. The message names the closest id.
    """
    merged = deepcopy(dict(config))
    checked: dict[str, Any] = {}
    for key, value in overrides.items():
        id = key.removeprefix("+").replace("#", SEPARATOR)
        plain = _as_it_is(value)
        if key.startswith("+"):
            _merge(merged, f"+{id}", plain, source=f"--{key}", add=True)
            checked[id] = _find(merged, id, f"--{key}")
        else:
            current = _find(merged, id, f"--{key}")
            _check_kind(key, current, plain)
            _merge(merged, id, plain, source=f"--{key}")
            checked[id] = plain
    return checked


def parse_value(text: str) -> Any:
    """Return what `text` from a command line means.

    Numbers as Python writes them (`1e-3` too, which YAML takes for a string), `true`, `false`,
    `null`, and lists and mappings in brackets as YAML; anything else, such as a path or an
    expression, is the text itself.

    Raises:
        ConfigurationError: brackets that do not close.

    Example:
        >>> [parse_value(text) for text in ("1e-3", "8", "true", "[64, 1e-4]", "runs/a: b", "007")]
        [0.001, 8, True, [64, 0.0001], 'runs/a: b', '007']
    """
    stripped = text.strip()
    if stripped[:1] in {"[", "{", '"', "'"}:
        try:
            return _numbers(yaml.safe_load(stripped))
        except yaml.YAMLError as error:
            reason = str(error).replace("\n", " ")
            raise ConfigurationError(f"cannot read the value {text!r}: {reason}") from error
    return _scalar(stripped) if _scalar(stripped) != stripped else text


def _as_it_is(value: Any) -> Any:
    """Return `value` so that MONAI takes texts and paths in it as they are.

    It reads every # as ::, and a $, @ or % at the beginning as more than a letter, which it is not
    in a path. As an expression of one string, whose signs are escaped, a text stays what it is.
    """
    if isinstance(value, list):
        return [_as_it_is(item) for item in value]
    path = isinstance(value, PathLike)
    text = str(value) if path else value
    if not isinstance(text, str):
        return text
    signed = text.startswith(_REFERENCE_SIGNS)
    meant = signed and not path  # a reference, macro or expression
    if meant or not (signed or "#" in text):
        return text
    escaped = ascii(text)
    for sign in "#@%$":
        escaped = escaped.replace(sign, f"\\x{ord(sign):02x}")
    return f"${escaped}"


def _scalar(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    # "007" and "1_000" are names; a float has a dot or an exponent
    if _FLOAT.fullmatch(text) and not text.lstrip("+-").isdigit():
        return float(text)
    return text


def _numbers(value: Any) -> Any:
    """Return `value` with the strings that are numbers in exponent notation as floats."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and _FLOAT.fullmatch(value) and "e" in value.lower():
        return float(value)
    return value


def _read_file(path: Path) -> dict[str, Any]:
    content = _read_json(path) if path.suffix == ".json" else read_yaml(path)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigurationError(f"{path}: expected a mapping of ids to values, found {kind}")
    return content


def _read_json(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigurationError(f"{path}: key {twice!r} stands twice: remove one of them")
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{path}: cannot be read as JSON: {error}") from error


def _merge(config: dict[str, Any], key: str, value: Any, *, source: str, add: bool = False) -> None:
    """Set or, with a leading `+`, extend `key` in `config`; `add` lets `+` make a new key."""
    id = key.removeprefix("+").replace("#", SEPARATOR)
    *parents, leaf = id.split(SEPARATOR)
    holder = _find(config, SEPARATOR.join(parents), source) if parents else config
    if not isinstance(holder, (dict, list)):
        raise ConfigurationError(_not_a_container(source, SEPARATOR.join(parents), holder))
    if not key.startswith("+"):
        slot: Any = leaf if isinstance(holder, dict) else _index(holder, leaf, id, source)
        holder[slot] = value
        return
    if add and parents and isinstance(holder, dict) and leaf not in holder:
        holder[leaf] = value
        return
    target = _find(config, id, source)
    if isinstance(target, dict) and isinstance(value, dict):
        target.update(value)
    elif isinstance(target, list) and isinstance(value, list):
        target.extend(value)
    else:
        raise ConfigurationError(
            f"{source}: + joins two lists or two mappings, but {id} is a {type(target).__name__} "
            f"and the value a {type(value).__name__}: write {id} without the +"
        )


def _find(config: Mapping[str, Any], id: str, label: str) -> Any:
    """Return what stands at `id`, or raise the error that names the closest id."""
    segments = id.split(SEPARATOR)
    here: Any = config
    for position, segment in enumerate(segments):
        where = SEPARATOR.join(segments[:position])
        if isinstance(here, list):
            here = here[_index(here, segment, id, label)]
        elif isinstance(here, Mapping):
            if segment not in here:
                raise ConfigurationError(_unknown(label, id, position, here, config))
            here = here[segment]
        else:
            raise ConfigurationError(_not_a_container(label, where, here))
    return here


def _index(items: list[Any], segment: str, id: str, label: str) -> int:
    try:
        return range(len(items))[int(segment)]
    except (ValueError, IndexError):
        raise ConfigurationError(
            f"{label}: {segment!r} in {id} is no item of a list of {len(items)}: "
            f"give a number from 0 to {len(items) - 1}"
        ) from None


def _not_a_container(label: str, where: str, value: Any) -> str:
    if isinstance(value, str) and value.startswith(_REFERENCE_SIGNS):
        return (
            f"{label}: {where} is {value!r}, so nothing below it can be set: set what it refers to"
        )
    return f"{label}: {where} is {value!r}, a plain value with nothing below it: set {where} itself"


def _unknown(
    label: str, id: str, position: int, here: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    segments = id.split(SEPARATOR)
    where = SEPARATOR.join(segments[:position])
    message = f"{label}: no id {segments[position]!r}"
    if where:
        message += f" in {where} (position {position + 1} of {len(segments)})"
    close = difflib.get_close_matches(segments[position], [str(key) for key in here], n=1)
    elsewhere = _elsewhere(id.replace(".", SEPARATOR), config)
    if close and "." not in id:
        hint = SEPARATOR.join([*segments[:position], close[0], *segments[position + 1 :]])
        message += f"; did you mean {hint}?"
    elif elsewhere is not None:
        message += f"; did you mean {elsewhere}?"
    else:
        settings = [str(key) for key, value in here.items() if not _is_wiring(str(key), value)]
        message += f"; settings here: {', '.join(sorted(settings)) or 'none'}"
    if where and position == len(segments) - 1:
        message += f" To add a new key write +{id}"
    return message


def _is_wiring(key: str, value: Any) -> bool:
    """Say whether an id connects parts rather than being a setting that a person would change."""
    if key.startswith("_"):
        return True
    if isinstance(value, (dict, list)):
        if "_target_" in value:
            return True
        nested = value.values() if isinstance(value, dict) else value
        return any(isinstance(item, (dict, list)) or _is_wiring("", item) for item in nested)
    return isinstance(value, str) and value.startswith(_REFERENCE_SIGNS)


def _elsewhere(id: str, config: Mapping[str, Any]) -> str | None:
    """Return a nested id that ends as `id` does: a setting rather than wiring, and the shortest."""
    leaf = id.rsplit(SEPARATOR, 1)[-1]
    matches = {
        found: value
        for found, value in _nested(config)
        if found == id or found.rsplit(SEPARATOR, 1)[-1] == leaf
    }
    ranked = sorted(matches, key=lambda f: (f != id, _is_wiring(leaf, matches[f]), len(f)))
    return ranked[0] if ranked else None


def _nested(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(config, Mapping):
        items = config.items()
    elif isinstance(config, list):
        items = enumerate(config)
    for key, value in items:
        id = f"{prefix}{SEPARATOR}{key}" if prefix else str(key)
        yield id, value
        yield from _nested(value, id)


def _check_kind(key: str, current: Any, value: Any) -> None:
    """Refuse a flag without value, and words where a number stands."""
    number = isinstance(current, (int, float)) and not isinstance(current, bool)
    if number and isinstance(value, bool):
        found = "none" if value else "false"
        raise ConfigurationError(f"--{key} needs a number such as {current!r}, got {found}")
    if number and isinstance(value, str) and not value.startswith(("$", "@", "%")):
        raise ConfigurationError(f"--{key} needs a number such as {current!r}, got {value!r}")
    if isinstance(current, bool) and not isinstance(value, (bool, str)):
        raise ConfigurationError(f"--{key} is a switch: give true or false, got {value!r}")
