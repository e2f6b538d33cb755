from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from pipeline.data.strict_yaml import read_yaml
from pipeline.errors import ConfigurationError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_plain_values_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a: 1\nb: [x, 2.5, null]\nc: {d: true}\n")
    assert read_yaml(path) == {"a": 1, "b": ["x", 2.5, None], "c": {"d": True}}


def test_a_few_aliases_are_an_abbreviation(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, "a: &x [1, 2]\nb: *x\n"))["b"] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' stands twice"),
        ("a: {b: 1, b: 2}\n", "key 'b' stands twice"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("a: !own 1\n", "could not determine a constructor"),
        ("a: [1, 2\n", "expected"),
        ("a: *nowhere\n", "alias"),
        ("&a [*a]\n", "inside or before its own anchor"),
        ("[" * 5000, "nested more than 64 deep"),
    ],
    ids=["twice", "twice below", "python tag", "tag", "broken", "dangling", "recursive", "deep"],
)
def test_what_is_not_plain_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)) as caught:
        read_yaml(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "a.yaml" in str(caught.value)


def test_alias_bomb_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    start = time.perf_counter()
    with pytest.raises(ConfigurationError, match="unfold to millions"):
        read_yaml(write(tmp_path, "\n".join(lines)))
    assert time.perf_counter() - start < 1


def test_large_file_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="11 bytes of YAML, at most 10 are read"):
        read_yaml(write(tmp_path, "a: 12345678"), max_bytes=10)


def test_missing_file_and_other_encodings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not found"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: ä".encode("latin-1"))
    with pytest.raises(ConfigurationError, match="UTF-8"):
        read_yaml(tmp_path / "latin.yaml")
