from __future__ import annotations

from itertools import product
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import euler_number

from pipeline.vesuvius.betti_numbers import (
    betti_numbers,
    euler_characteristic,
    label_components,
)

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(*[st.integers(1, 12)] * 3)
densities = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])


@given(seeds, shapes, densities)
def test_euler_characteristic_equals_that_of_skimage(
    seed: int, shape: tuple[int, int, int], density: float
) -> None:
    mask = np.random.default_rng(seed).random(shape) < density
    assert euler_characteristic(mask) == euler_number(mask, connectivity=1)


@pytest.mark.parametrize(("connectivity", "order"), [(6, 1), (26, 3)])
@given(seed=seeds, shape=shapes, density=densities)
def test_labels_equal_those_of_scipy(
    connectivity: Literal[6, 26],
    order: int,
    seed: int,
    shape: tuple[int, int, int],
    density: float,
) -> None:
    mask = np.random.default_rng(seed).random(shape) < density
    labels, count = label_components(mask, connectivity)
    expected, number = ndimage.label(mask, ndimage.generate_binary_structure(3, order))
    assert count == number
    assert len(np.unique(np.stack([labels, expected]).reshape(2, -1), axis=1).T) == len(
        np.unique(expected)
    )


def test_labels_do_not_run_out_where_they_are_densest() -> None:
    """The case in which cc3d fails in flat volumes: as many components as there can be."""
    for shape in product(range(1, 10), repeat=3):
        mask = np.zeros(shape, np.bool_)
        mask[::2, ::2, ::2] = True
        assert label_components(mask, 6)[1] == mask.sum()
        assert label_components(mask, 26)[1] == mask.sum()


def test_a_ring_a_shell_and_two_cubes_have_their_betti_numbers() -> None:
    mask = np.zeros((12, 12, 24), np.bool_)
    mask[2, 2:7, 2:7] = True
    mask[2, 4, 4] = False  # a ring
    mask[5:10, 5:10, 8:13] = True
    mask[7, 7, 10] = False  # a shell
    mask[1:3, 1:3, 15:17] = mask[3:5, 3:5, 15:17] = True  # cubes that share an edge
    assert betti_numbers(mask) == (4, 1, 1)


def test_a_cavity_open_through_a_corner_is_none() -> None:
    mask = np.ones((5, 5, 5), np.bool_)
    mask[2, 2, 2] = False
    assert betti_numbers(mask).cavities == 1
    mask[1, 1, 1] = mask[0, 0, 0] = False
    assert betti_numbers(mask).cavities == 0
