"""Text files and tables that list the images of a dataset, with their classes and splits."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError, InputErrors, Problem

__all__ = ["ImageList", "ListedImage", "read_lists"]

SPLITS = ("train", "val", "test")

_LARGEST_BYTES = 2**28


@dataclass(frozen=True)
class ImageList:
    """A file that lists images, one in each line.

    Args:
        file: its path below `dataset_dir`.
        image: template of an image's path below `dataset_dir`.
        columns: of a table with a header line, field -> column; of plain lines, the fields that
            stand in them with blanks between. The first field of a plain line may hold blanks.
        split: of every line; None: that in the field `split`, or `train` where there is none.
        optional: fields that may be missing or empty; they take the value of the image.
        rows: how many lines the owner's file has, or None.
        required: whether the dataset needs the file.
    """

    file: str
    image: str
    columns: Mapping[str, str] | Sequence[str]
    split: str | None = None
    optional: Sequence[str] = ()
    rows: int | None = None
    required: bool = True

    @property
    def fields(self) -> list[str]:
        """Return the fields that a line gives."""
        return list(self.columns)

    @property
    def layout(self) -> str:
        """Return file and line in a few words, for messages."""
        if isinstance(self.columns, Mapping):
            names = ", ".join(self.columns[field] for field in self._needed())
            return f"{self.file} (a table with {names})"
        return f"{self.file} (lines of {' '.join(self.columns)})"

    def _needed(self) -> list[str]:
        return [field for field in self.columns if field not in self.optional]


@dataclass(frozen=True)
class ListedImage:
    """An image as a list names it.

    Args:
        image: its path below `dataset_dir`.
        split: `train`, `val` or `test`.
        values: the fields of its line.
        where: the line, as `train.txt:17`.
    """

    image: str
    split: str
    values: Mapping[str, str]
    where: str


def read_lists(
    lists: Sequence[ImageList], root: Path, fields: Mapping[str, str] | None = None
) -> list[ListedImage]:
    """Return the lines of the lists below `root`; no image is looked for.

    Args:
        lists: in the order they are read.
        root: the dataset folder.
        fields: field -> regular expression that its values must match.

    Raises:
        InputError: a list is missing, no text or of another length than its owner's.
        InputErrors: every line that is not as it should be, and every image that stands twice.
    """
    expressions = {name: re.compile(text) for name, text in (fields or {}).items()}
    listed: list[ListedImage] = []
    problems: list[Problem] = []
    for one in lists:
        path = root / one.file
        if not path.is_file() and not one.required:
            continue
        lines = _table(one, path) if isinstance(one.columns, Mapping) else _plain(one, path)
        count = 0
        for number, values in lines:
            count += 1
            found = _listed(one, number, values, expressions)
            if isinstance(found, Problem):
                problems.append(found)
            else:
                listed.append(found)
        if one.rows not in (None, count):
            raise InputError(
                f"{path}: {count} lines, but the owner's list has {one.rows}; download it again"
            )
    problems += _repeated(listed)
    if problems:
        raise InputErrors(problems, f"bad lines in the lists of {root}")
    return listed


def _plain(one: ImageList, path: Path) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yield number and fields of each line that is not empty; None where it has too few."""
    for number, line in enumerate(_text(path, one).splitlines(), start=1):
        words = line.strip().rsplit(maxsplit=len(one.columns) - 1)
        if words:
            fits = len(words) == len(one.columns)
            yield number, dict(zip(one.columns, words, strict=True)) if fits else None


def _table(one: ImageList, path: Path) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yield line number and fields of each row; None where a field is missing."""
    columns = dict(one.columns) if isinstance(one.columns, Mapping) else {}
    reader = csv.DictReader(_text(path, one).splitlines())
    try:
        header = list(reader.fieldnames or ())
        needed = {column for field, column in columns.items() if field not in one.optional}
        if missing := needed - set(header):
            raise InputError(
                f"{path}: no column {', '.join(sorted(missing))}; found "
                f"{', '.join(header) or 'an empty file'}"
            )
        for row in reader:
            values = {field: (row.get(column) or "").strip() for field, column in columns.items()}
            whole = all(values[field] or field in one.optional for field in values)
            yield reader.line_num, values if whole else None
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: no CSV: {error}; save it again") from error


def _text(path: Path, one: ImageList) -> str:
    if not path.is_file():
        raise InputError(f"{path}: not found, expected {one.layout}")
    if path.stat().st_size > _LARGEST_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes, expected a list of 256 MiB at most")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: no text in UTF-8: {error}; save it again") from error


def _listed(
    one: ImageList,
    number: int,
    values: dict[str, str] | None,
    expressions: Mapping[str, re.Pattern[str]],
) -> ListedImage | Problem:
    """Return the image of a line, or what is wrong with the line."""
    where = f"{one.file}:{number}"
    if values is None:
        return Problem(where, "find", f"incomplete line; expected {' '.join(one.fields)}")
    for field, value in values.items():
        expected = expressions.get(field)
        if value and expected is not None and not expected.fullmatch(value):
            message = f"{field} is {value!r}, expected what matches {expected.pattern}"
            return Problem(where, "find", message)
    split = one.split or values.get("split") or "train"
    if split not in SPLITS:
        return Problem(where, "find", f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    image = one.image.format_map(values)
    filled = {field: value or image for field, value in values.items()}
    return ListedImage(image, split, {**filled, "split": split}, where)


def _repeated(listed: Sequence[ListedImage]) -> list[Problem]:
    """Return a problem for every line whose image an earlier line names."""
    first: dict[str, ListedImage] = {}
    problems = []
    for one in listed:
        other = first.setdefault(one.image, one)
        if other is not one:
            message = f"{one.image} stands in {other.where} ({other.split}) already; keep one line"
            problems.append(Problem(one.where, "find", message))
    return problems
