from __future__ import annotations

import logging

import pytest

from pipeline.vesuvius.result_facts import foreground_facts, log_facts


@pytest.mark.parametrize("foreground", [0, 9, 4001, 9988, 10_000])
def test_an_implausible_share_of_surface_is_told(
    foreground: int, caplog: pytest.LogCaptureFixture
) -> None:
    facts = foreground_facts(foreground, 10_000, "a/b.tif")
    assert facts["foreground"] + facts["background"] == 10_000
    (warning,) = facts["warnings"]
    assert f"{foreground / 100:.2f}%" in warning
    assert [record.getMessage() for record in caplog.records] == [f"a/b.tif: {warning}"]


@pytest.mark.parametrize("foreground", [10, 500, 4000])
def test_a_plausible_share_is_not(foreground: int, caplog: pytest.LogCaptureFixture) -> None:
    facts = foreground_facts(foreground, 10_000, "a.tif", member_difference=0.1)
    assert facts["warnings"] == []
    assert facts["member_difference"] == 0.1
    assert not caplog.records


def test_members_that_say_the_same_are_told() -> None:
    (warning,) = foreground_facts(500, 10_000, "a.tif", member_difference=1e-9)["warnings"]
    assert "members of the ensemble differ by 1e-09" in warning


def test_the_log_has_what_the_sidecar_has(caplog: pytest.LogCaptureFixture) -> None:
    details = {
        "shape": [4, 5, 6],
        "source_dtype": "uint16",
        "checkpoint": {"epoch": 7, "metrics": {"val_loss": 1.0, "val_surface": 0.75}},
        "sheets": 3,
        "largest_sheet_voxels": 9,
        "area_mm2": 0.25,
        "seconds": {"read": 0.5},
        **foreground_facts(12, 120, "a.tif"),
    }
    with caplog.at_level(logging.INFO):
        log_facts("a.tif", details)
    (line,) = [record.getMessage() for record in caplog.records]
    for part in (
        "(4, 5, 6) of uint16", "epoch 7 (val_surface 0.75)", "foreground 12, background 108",
        "3 sheets, 0.25 mm2, the largest of 9 voxels", "read 0.5 s",
    ):  # fmt: skip
        assert part in line
