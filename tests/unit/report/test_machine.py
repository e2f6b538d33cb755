from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.machine import add_environment, plan_rows
from pipeline.report.page import Page

PLAN = {
    "device": "cuda:0",
    "tier": "gpu",
    "batch_size": 8,
    "accumulation_steps": 4,
    "processes": 2,
    "effective_batch_size": 64,
    "learning_rate": 2e-3,
    "threads": None,
    "num_workers": 4,
    "pin_memory": True,
    "tf32": True,
    "cudnn_benchmark": False,
    "estimated_bytes": 2_000_000_000,
    "limit_bytes": 8e9,
    "reasons": {"batch": "estimated 2.00 GB of 8.00 GB"},
}


def test_every_decision_stands_with_its_reason():
    found = {row["item"]: (row["planned"], row["reason"]) for row in plan_rows(PLAN)}
    assert found["device"] == ("cuda:0, tier gpu", "")
    assert found["batch"] == (
        "64 = 8 images x 4 steps x 2 processes", "estimated 2.00 GB of 8.00 GB",
    )  # fmt: skip
    assert found["memory"][0] == "2.00 GB estimated, 8.00 GB allowed"
    assert found["loader"][0] == "worker processes 4, pinned memory on"
    assert found["threads"][0] == "torch's choice"
    assert found["kernels"][0] == "TF32 on, cuDNN benchmark off"


def test_the_keys_are_those_that_a_plan_has():
    planning = pytest.importorskip("pipeline.hardware.planning")
    from dataclasses import fields

    assert set(PLAN) <= {item.name for item in fields(planning.Plan)}


@given(st.dictionaries(st.sampled_from(sorted(PLAN)), st.sampled_from([None, 1, "x", True, {}])))
def test_any_part_of_a_plan_gives_rows(part):
    for row in plan_rows(part):
        assert row["planned"]


def test_an_old_environment_gives_a_page_and_none_gives_nothing():
    page = Page("A")
    add_environment(page, {})
    assert "Environment" not in page.html()
    add_environment(page, {"device": "cpu", "versions": {"torch": "2.13"}, "started": "soon"})
    assert "2.13" in page.html()
