from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data import budget
from pipeline.errors import ConfigurationError, InputError


def test_limit_is_a_quarter_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available_bytes", lambda: 4000)
    assert budget.decoded_limit_bytes() == 1000


def test_variable_sets_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", "123")
    assert budget.decoded_limit_bytes() == 123


@pytest.mark.parametrize("text", ["2GB", "-1", "0", "1e9", "²"])
def test_variable_that_is_no_number_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", text)
    with pytest.raises(ConfigurationError, match="LAMINA_MAX_DECODED_BYTES is"):
        budget.decoded_limit_bytes()


def test_size_is_exact_where_fixed_width_integers_would_overflow() -> None:
    with pytest.raises(InputError, match=r"big\.nii: shape"):
        budget.check_decoded_bytes("big.nii", (2**31, 2**31, 4), 8, limit=10**12)


def test_size_at_the_limit_passes_and_one_byte_more_does_not() -> None:
    assert budget.check_decoded_bytes("a", (10, 10), 2, limit=200) == 200
    with pytest.raises(InputError, match="LAMINA_MAX_DECODED_BYTES to 200"):
        budget.check_decoded_bytes("a", (10, 10), 2, limit=199)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "max", "memory.current": "5"}, None),
        ({}, None),
        ({"memory.max": "1000", "memory.current": "400"}, 600),
        (
            {
                "memory.max": "1000",
                "memory.current": "400",
                "memory.stat": "anon 1\ninactive_file 300",
            },
            900,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "400",
                "memory/memory.stat": "total_inactive_file 100",
            },
            700,
        ),
        ({"memory.max": "10", "memory.current": "400"}, 0),
    ],
    ids=["no limit", "no container", "v2", "v2 with cache", "v1 with cache", "over the limit"],
)
def test_container_limit_counts_without_its_page_cache(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert budget._container_available_bytes(tmp_path) == expected
