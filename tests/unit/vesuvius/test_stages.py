from __future__ import annotations

import time

import pytest

from pipeline.vesuvius.stages import StageClock


def test_laps_add_up_to_the_time_that_passed() -> None:
    began = time.perf_counter()
    clock = StageClock()
    for stage in ("read", "scale", "read"):
        time.sleep(0.01)
        clock.lap(stage)
    passed = time.perf_counter() - began
    assert clock.seconds["read"] >= 0.02
    assert sum(clock.seconds.values()) == pytest.approx(passed, abs=2e-3)


def test_what_passes_before_a_start_belongs_to_no_stage() -> None:
    clock = StageClock()
    time.sleep(0.02)
    clock.start()
    clock.lap("network")
    assert clock.seconds["network"] < 0.01


def test_waiting_takes_no_cpu() -> None:
    clock = StageClock()
    time.sleep(0.05)
    clock.lap("read")
    assert clock.cpu_seconds["read"] < 0.04 < clock.seconds["read"]


def test_a_record_begins_with_the_stages_of_the_clock_before() -> None:
    clock = StageClock()
    clock.lap("network")
    found = clock.record({"seconds": {"read": 1.23456}, "cpu_seconds": {"read": 1.0}})
    assert list(found["seconds"]) == list(found["cpu_seconds"]) == ["read", "network"]
    assert found["seconds"]["read"] == 1.235
