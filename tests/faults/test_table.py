"""The table of the fault matrix is that of the tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def table() -> ModuleType:
    path = Path(__file__).with_name("table.py")
    spec = importlib.util.spec_from_file_location("fault_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_row_has_one_test(table):
    assert [row.number for row in table.rows()] == list(range(1, table.COUNT + 1))


def test_a_test_is_named_like_its_row(table):
    assert all(f"test_row_{row.number:02d}_" in row.test for row in table.rows())


def test_the_page_is_up_to_date(table):
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), "python tests/faults/table.py"
