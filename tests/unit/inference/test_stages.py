from __future__ import annotations

import time

import pytest

from pipeline.inference.stages import StageClock


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


def test_an_added_clock_counts_with_its_own_and_with_shared_stages() -> None:
    clock, other = StageClock(), StageClock()
    clock.seconds, clock.cpu_seconds = {"read": 1.0}, {"read": 0.5}
    other.seconds, other.cpu_seconds = {"read": 2.0, "network": 3.0}, {"read": 0.25, "network": 4.0}
    time.sleep(0.02)
    clock.add(other)
    clock.lap("write")
    assert clock.seconds.pop("write") < 0.01
    assert clock.seconds == {"read": 3.0, "network": 3.0}
    assert (clock.cpu_seconds["read"], clock.cpu_seconds["network"]) == (0.75, 4.0)
