"""CSV tables of a dataset that say of each sample what its path does not, such as whose it is."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError

__all__ = ["Table", "read_tables"]

_LARGEST_BYTES = 2**26


@dataclass(frozen=True)
class Table:
    """A CSV file below the dataset folder.

    Args:
        file: its path below `dataset_dir`.
        field: the manifest's field by which samples find their row.
        key: the column with that field's values.
        columns: further field -> column.
        required: whether the dataset needs the file; without it the further fields take the value
            of `field`, so that each sample stands for itself.
    """

    file: str
    field: str
    key: str
    columns: Mapping[str, str]
    required: bool = True


def read_tables(tables: Sequence[Table], root: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Return, by table file and key, the further fields of each row.

    A table that is absent and not required is left out.

    Raises:
        InputError: a table is missing, is too large, lacks a column or has a key twice.
    """
    return {
        table.file: _read(table, root / table.file)
        for table in tables
        if table.required or (root / table.file).is_file()
    }


def _read(table: Table, path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        raise InputError(f"{path}: not found, expected a table of {table.key} and "
                         f"{', '.join(table.columns.values())}")  # fmt: skip
    if path.stat().st_size > _LARGEST_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes, expected a table of 64 MiB at most")
    rows: dict[str, dict[str, str]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            missing = {table.key, *table.columns.values()} - set(reader.fieldnames or ())
            if missing:
                raise InputError(
                    f"{path}: no column {', '.join(sorted(missing))}; found "
                    f"{', '.join(reader.fieldnames or ()) or 'an empty file'}"
                )
            for row in reader:
                key = row[table.key]
                values = {field: row[column] or "" for field, column in table.columns.items()}
                if rows.setdefault(key, values) != values:
                    raise InputError(f"{path}: {table.key} {key!r} stands twice; keep one row")
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: no CSV table in UTF-8: {error}; save it again") from error
    return rows
