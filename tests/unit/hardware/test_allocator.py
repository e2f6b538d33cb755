from __future__ import annotations

import ctypes
import logging
import platform
import subprocess
import sys

import pytest

from pipeline.hardware.allocator import tune_allocator

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # as <malloc.h> numbers them


class FakeLibrary:
    """Records the calls of `mallopt` and takes values up to a limit."""

    def __init__(self, limits: dict[int, int]) -> None:
        self.limits = limits
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return int(value <= self.limits.get(parameter, 2**31 - 1))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """Stands for glibc, so that no test changes the allocator of this process."""
    fake = FakeLibrary({})
    monkeypatch.delenv("LAMINA_TUNE_ALLOCATOR", raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.41"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: fake)
    return fake


def test_both_thresholds_are_raised_and_the_log_says_so(
    library: FakeLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert tune_allocator() is True
    assert library.calls == [(MMAP_THRESHOLD, 2**31 - 1), (TRIM_THRESHOLD, 2**31 - 1)]
    assert "allocator: glibc thresholds raised" in caplog.text


def test_older_glibc_gets_the_largest_threshold_that_it_takes(library: FakeLibrary) -> None:
    library.limits[MMAP_THRESHOLD] = 32 * 2**20
    assert tune_allocator() is True
    assert (MMAP_THRESHOLD, 32 * 2**20) in library.calls


@pytest.mark.parametrize("refused", [MMAP_THRESHOLD, TRIM_THRESHOLD])
def test_refusal_is_told_and_is_no_error(
    library: FakeLibrary, refused: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    library.limits[refused] = 0
    assert tune_allocator() is False
    assert "allocator: glibc thresholds refused" in caplog.text


@pytest.mark.parametrize("switch", ["argument", "environment", "another libc"])
def test_allocator_is_left_alone(
    library: FakeLibrary,
    switch: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    if switch == "environment":
        monkeypatch.setenv("LAMINA_TUNE_ALLOCATOR", "0")
    if switch == "another libc":
        monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert tune_allocator(enabled=switch != "argument") is False
    assert library.calls == []
    assert "allocator: left as it is" in caplog.text


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_glibc_keeps_a_large_block() -> None:
    """In a process of its own: what is freed is handed out again, not mapped anew."""
    code = """
import ctypes, resource
from pipeline.hardware.allocator import tune_allocator
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytes(bytearray(8 * 2**20))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
ctypes.CDLL("libc.so.6").mallopt(-3, 128 * 1024)  # else glibc adapts by itself at this size
plain = faults()
taken = tune_allocator()
faults()
print(taken, plain > 10 * faults())
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.split() == ["True", "True"]
