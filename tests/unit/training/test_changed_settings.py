from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.atomic import write_yaml
from pipeline.training.changed_settings import changed_settings

BEFORE = {"learning_rate": 3e-3, "averaging": {"decay": 0.98, "every": 1}, "size": (64, 64), "a": 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "config.yaml", BEFORE)


def test_the_same_settings_have_not_changed(path: Path) -> None:
    assert changed_settings(path, BEFORE) == []
    assert changed_settings(path, {**BEFORE, "size": [64, 64]}) == []


def test_every_change_is_named_by_its_id(path: Path) -> None:
    after = {"learning_rate": 1e-3, "averaging": {"decay": 0.98, "every": 2}, "size": [96], "b": 2}
    assert changed_settings(path, after) == [
        "learning_rate: 0.003 before, now 0.001",
        "averaging::every: 1 before, now 2",
        "size: [64, 64] before, now [96]",
        "b: absent before, now 2",
        "a: 1 before, now absent",
    ]


def test_a_part_may_become_a_value(path: Path) -> None:
    (line,) = changed_settings(path, {**BEFORE, "averaging": None})
    assert line == "averaging: {'decay': 0.98, 'every': 1} before, now None"


def test_long_values_are_cut(path: Path) -> None:
    (line,) = changed_settings(path, {**BEFORE, "a": "x" * 1000})
    assert len(line) < 200


@pytest.mark.parametrize("content", [None, b"", b"- 1\n", b"{a: [", b"\xff\xfe", b"a: !x 1\n"])
def test_a_file_that_is_none_hides_nothing_and_stops_nothing(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    assert changed_settings(path, BEFORE) == []


names = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1)
plain: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names,
    lambda inner: st.lists(inner) | st.dictionaries(names, inner),
)


@given(st.dictionaries(names, plain))
def test_a_configuration_is_equal_to_itself_after_the_file(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]
) -> None:
    path = write_yaml(tmp_path_factory.mktemp("c") / "config.yaml", config)
    assert changed_settings(path, config) == []
