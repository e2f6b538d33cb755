from __future__ import annotations

import logging
from typing import Any

import numba
import pytest

from pipeline.hardware.compilation import compiled


def doubled(value: int) -> int:
    return 2 * value


def test_a_function_gives_the_same_compiled() -> None:
    assert compiled(doubled)(21) == 42


def test_where_no_cache_can_be_kept_a_function_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    njit = numba.njit

    def without_folder(*function: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function 'doubled': no locator available")
        return njit(*function, **options)  # numba's own modules call it too, as they are loaded

    monkeypatch.setattr(numba, "njit", without_folder)
    with caplog.at_level(logging.DEBUG, logger="pipeline.hardware.compilation"):
        assert compiled(doubled)(4) == 8
    assert "no folder for numba's cache" in caplog.text
