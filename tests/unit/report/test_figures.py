from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.report.figures import HEIGHT, WIDTH, _ticks, curves, line_chart

FLOATS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3))


def drawn(svg):
    ET.fromstring(svg)
    pattern = r'<circle cx="([\d.-]+)" cy="([\d.-]+)"'
    return [(float(x), float(y)) for x, y in re.findall(pattern, svg)]


@given(st.lists(FLOATS, min_size=1, max_size=30))
def test_a_higher_value_is_drawn_higher_and_all_lie_inside(values):
    points = drawn(line_chart({"v": list(enumerate(values))}))
    assert len(points) == len(values)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    order = sorted(range(len(values)), key=values.__getitem__)
    heights = [-points[index][1] for index in order]
    assert all(a <= b + 0.1 for a, b in pairwise(heights))


@given(FLOATS, FLOATS)
def test_ticks_enclose_the_values_and_are_few(low, high):
    assume(low < high)
    ticks = _ticks(low, high)
    assert ticks[0] <= low + 1e-6 * abs(low)
    assert ticks[-1] >= high - 1e-6 * abs(high)
    assert 2 <= len(ticks) <= 8


def test_epochs_without_a_value_and_values_that_are_not_finite_are_left_out():
    history = [
        {"epoch": 1, "train": {"loss": 1.0}},
        {"epoch": 2, "train": {"loss": 0.5}, "val": {"val_loss": float("nan")}},
        {"epoch": 3, "train": {"loss": 0.25}, "val": {"val_loss": 0.5}},
    ]
    svg = curves(history, ["train.loss", "val.val_loss"], "loss", mark=3)
    assert len(drawn(svg)) == 4
    assert "best: 3" in svg
    assert ">train</text>" in svg
    assert ">val</text>" in svg


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1, None), (2, float("inf"))]}])
def test_a_chart_without_values_says_so(series):
    assert "no values" in line_chart(series, title="loss")


def test_names_are_escaped():
    svg = line_chart({"<b>": [(1, 1.0)], "c": [(1, 2.0)]}, title="<script>", x_label="&")
    ET.fromstring(svg)
    assert "<script>" not in svg
