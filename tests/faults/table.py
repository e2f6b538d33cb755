"""Writes the table of docs/reliability.md from the tests beside it.

python tests/faults/table.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- rows: written by tests/faults/table.py -->", "<!-- end of rows -->"
COUNT = 39


@dataclass(frozen=True)
class Row:
    """A fault, what happens, and the test that says so.

    Args:
        number: as in the matrix.
        fault, outcome, code: for a person.
        test: where it is tested.
        otherwise: where the outcome is not what the matrix asked for, and why.
        missing: why the test fails, where it is known to.
    """

    number: int
    fault: str
    outcome: str
    code: str
    test: str
    otherwise: str = ""
    missing: str = ""

    def __str__(self) -> str:
        told = self.outcome
        if self.otherwise:
            told += f". *Otherwise than asked: {self.otherwise}*"
        if self.missing:
            told += f". **Does not hold yet: {self.missing}**"
        return f"| {self.number} | {self.fault} | {told} | {self.code} | `{self.test}` |"


def rows() -> list[Row]:
    """Return the rows in the order of their numbers, read from the text of the tests."""
    found = [row for path in sorted(HERE.glob("test_*.py")) for row in _rows_of(path)]
    return sorted(found, key=lambda row: row.number)


def _rows_of(path: Path) -> Iterator[Row]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = {_name(mark): mark for mark in node.decorator_list if isinstance(mark, ast.Call)}
        if "row" not in marks:
            continue
        given = _keywords(marks["row"])
        number, fault, outcome = (ast.literal_eval(word) for word in marks["row"].args)
        missing = str(_keywords(marks["xfail"])["reason"]) if "xfail" in marks else ""
        test = f"{path.name}::{node.name}"
        code = str(given.pop("code"))
        yield Row(number, fault, outcome, code, test, missing=missing, **given)


def _name(mark: ast.Call) -> str:
    return ast.unparse(mark.func).rsplit(".", 1)[-1]


def _keywords(mark: ast.Call) -> dict[str, Any]:
    return {
        str(word.arg): ast.literal_eval(word.value)
        for word in mark.keywords
        if word.arg != "raises"
    }


def page() -> str:
    """Return the page with its table written anew."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    found = rows()
    asked = sum(not (row.otherwise or row.missing) for row in found)
    missing = sum(bool(row.missing) for row in found)
    score = (
        f"{asked} of {COUNT} hold as asked, {sum(bool(row.otherwise) for row in found)} are "
        f"answered otherwise, {missing} do not hold yet. The tests are in `tests/faults`."
    )
    head = "| row | fault | what happens | exit code | test |\n|--:|---|---|---|---|"
    return "\n".join([f"{before}{BEGIN}", "", score, "", head, *map(str, found), "", END]) + after


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
