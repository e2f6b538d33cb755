from __future__ import annotations

import numpy as np

from pipeline.vesuvius.betti_numbers import label_components
from pipeline.vesuvius.sheet_colours import colour_components, of_colour


def test_near_sheets_differ_and_two_colours_serve_a_stack() -> None:
    mask = np.zeros((40, 12, 12), np.bool_)
    mask[::4] = True
    labels, count = label_components(mask, 26)
    assert count == 10
    for axis in range(3):
        turned = np.ascontiguousarray(np.moveaxis(labels, 0, axis))
        colours = colour_components(turned, count, 3)
        assert sorted(set(colours[1:])) == [1, 2]
        in_order = colours[np.unique(labels[::4, 0, 0])]
        assert (in_order[1:] != in_order[:-1]).all()


def test_far_sheets_share_a_colour() -> None:
    mask = np.zeros((40, 12, 12), np.bool_)
    mask[::4] = True
    labels, count = label_components(mask, 26)
    assert set(colour_components(labels, count, 2)[1:]) == {1}


def test_colours_part_the_mask() -> None:
    mask = np.random.default_rng(0).random((20, 20, 20)) < 0.05
    labels, count = label_components(mask, 26)
    colours = colour_components(labels, count, 4)
    parts = [of_colour(labels, colours, colour) for colour in range(1, colours.max() + 1)]
    np.testing.assert_array_equal(np.sum(parts, axis=0), mask)
    assert len(parts) > 2


def test_an_empty_volume_has_no_colour() -> None:
    assert colour_components(np.zeros((4, 4, 4), np.int32), 0, 2).tolist() == [0]
