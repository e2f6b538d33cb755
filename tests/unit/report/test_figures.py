from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.report.axes import HEIGHT, WIDTH, ticks
from pipeline.report.calibration import calibration_of
from pipeline.report.diagrams import count_chart, interval_chart, reliability_diagram
from pipeline.report.figures import curves, line_chart

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
    found = ticks(low, high)
    assert found[0] <= low + 1e-6 * abs(low)
    assert found[-1] >= high - 1e-6 * abs(high)
    assert 2 <= len(found) <= 8


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


def test_no_two_lines_of_a_chart_share_a_colour_while_there_are_enough():
    names = ["val", "128 px", "96 px", "64 px", "train", "48 px"]
    svg = line_chart({name: [(1, 1.0), (2, 2.0)] for name in names})
    assert len(set(re.findall(r'stroke="(var\(--s\d\))" stroke-width="2"', svg))) == len(names)


def test_a_chart_may_name_its_lines():
    svg = curves([{"epoch": 1, "val": {"val_loss_96": 1.0}}], {"96 px": "val.val_loss_96"})
    assert ">96 px</text>" not in svg  # one line needs no legend
    assert len(drawn(svg)) == 1


def test_a_dot_of_the_reliability_diagram_stands_where_it_should():
    rows = [{"predicted_probability": 0.5, "correct": right} for right in (True, False, True, True)]
    (point,) = drawn(reliability_diagram(calibration_of(rows)))
    whole = drawn(line_chart({"v": [(0, 0.0), (1, 1.0)]}))
    (left, bottom), (right, top) = whole
    assert point[0] == pytest.approx((left + right) / 2, abs=0.1)
    assert point[1] == pytest.approx(bottom + 0.75 * (top - bottom), abs=0.1)


@given(st.lists(FLOATS, min_size=1, max_size=6))
def test_an_interval_chart_keeps_everything_inside_and_in_order(means):
    rows = [{"run": f"r{n}", "mean": mean, "low": mean - 1, "high": mean + 1}
            for n, mean in enumerate(means)]  # fmt: skip
    points = drawn(interval_chart(rows, "m"))
    assert len(points) == len(means)
    assert all(0 <= x <= WIDTH for x, _ in points)
    order = sorted(range(len(means)), key=means.__getitem__)
    assert all(points[a][0] <= points[b][0] + 0.1 for a, b in pairwise(order))
    assert [y for _, y in points] == sorted(y for _, y in points)


def test_folds_are_dots_beside_their_mean():
    row = {"run": "cv", "mean": 0.5, "low": None, "high": None, "values": {"0": 0.4, "1": 0.6}}
    assert len(drawn(interval_chart([row], "m"))) == 3


@pytest.mark.parametrize("counts", [[], [0, 0], [1, 0, 5]])
def test_bars_are_drawn_for_what_there_is(counts):
    svg = count_chart(counts, "How sure", "probability")
    ET.fromstring(svg)
    assert svg.count("<rect") == sum(count > 0 for count in counts)
