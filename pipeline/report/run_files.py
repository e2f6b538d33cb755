"""Reading the files of a run for its report; an absent file is None, a malformed one an error."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from pipeline.data import strict_yaml
from pipeline.errors import InputError

__all__ = [
    "mapping_in",
    "pictures",
    "read_csv",
    "read_json",
    "read_text",
    "read_yaml",
    "rows_in",
]

_WHOLE = re.compile(r"-?(0|[1-9]\d*)")
_REAL = re.compile(r"-?(0|[1-9]\d*)(\.\d*)?([eE][-+]?\d+)?|nan|-?inf")


def read_text(path: Path) -> str:
    """Return the text of a file, empty where it is absent."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read this file for the report: {error}") from error


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file, None where it is absent."""
    return strict_yaml.read_yaml(path) if path.exists() else None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, None where it is absent."""
    text = read_text(path)
    try:
        return json.loads(text) if text else None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON: {error}: run again, or restore it") from error


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file with numbers as numbers; no rows where it is absent."""
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
    return [{key: _number(value) for key, value in row.items() if key is not None} for row in rows]


def pictures(folder: Path) -> list[Path]:
    """Return the image files under `pictures/`, sorted by their path."""
    found = (folder / "pictures").rglob("*")
    return sorted(path for path in found if path.suffix.lower() in {".png", ".jpg", ".jpeg"})


def mapping_in(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping, empty where it is absent.

    Raises:
        InputError: it holds something else.
    """
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping, as the run writes it")
    return content


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Return a YAML file's list of mappings, empty where it is absent.

    Raises:
        InputError: it holds something else.
    """
    content = read_yaml(path) or []
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise InputError(f"{path}: expected a list of mappings, as the run writes it")
    return content


def _number(text: Any) -> Any:
    """Return a number where the text is one; a name such as 007 or 1_000 stays a name."""
    if text in ("", None):
        return None
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _REAL.fullmatch(text) else text
