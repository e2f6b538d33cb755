"""What one voxel changes, against counts over the whole volume."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.vesuvius.betti_numbers import (
    betti_numbers,
    euler_characteristic,
    label_components,
)
from pipeline.vesuvius.local_topology import (
    CANDIDATE,
    euler_changes,
    is_simple,
    peel,
    thin,
)

Mask = NDArray[np.bool_]
neighbourhoods = st.integers(0, 2**27 - 1)


def voxels(bits: int) -> Mask:
    return np.array([bits >> bit & 1 for bit in range(27)], np.bool_).reshape(3, 3, 3)


def simple_by_definition(mask: Mask) -> bool:
    """The two topological numbers of the centre are one, counted with scipy."""
    near = ndimage.generate_binary_structure(3, 2)
    near[1, 1, 1] = False
    faces = ndimage.generate_binary_structure(3, 1)
    faces[1, 1, 1] = False
    pieces, _ = ndimage.label(mask & near)
    empty = ~mask
    empty[1, 1, 1] = False
    _, background = ndimage.label(empty, np.ones((3, 3, 3)))
    return len(set(pieces[faces & mask])) == 1 and background == 1


@given(neighbourhoods)
def test_a_simple_voxel_is_one_by_definition(bits: int) -> None:
    assert is_simple(bits) == simple_by_definition(voxels(bits))


@given(neighbourhoods)
def test_a_simple_voxel_changes_no_betti_number(bits: int) -> None:
    with_it, without = np.pad(voxels(bits), 2), np.pad(voxels(bits), 2)
    with_it[3, 3, 3], without[3, 3, 3] = True, False
    if is_simple(bits):
        assert betti_numbers(with_it) == betti_numbers(without)


@given(st.integers(0, 2**32 - 1))
def test_thinning_keeps_every_betti_number(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask, more = rng.random((2, 8, 8, 8)) < np.array([0.2, 0.4]).reshape(2, 1, 1, 1)
    state = np.pad(np.where(mask, 1, np.where(more, CANDIDATE, 0)), 1).astype(np.uint8)
    before = betti_numbers(state != 0)
    thin(state, rng.permutation(np.flatnonzero(state == CANDIDATE)))
    assert betti_numbers(state != 0) == before
    assert (state[1:-1, 1:-1, 1:-1][mask] == 1).all()


@given(st.integers(0, 2**32 - 1))
def test_peeling_keeps_every_betti_number(seed: int) -> None:
    state = np.pad(np.random.default_rng(seed).random((8, 8, 8)) < 0.6, 1).astype(np.uint8)
    before = betti_numbers(state != 0)
    peel(state, np.flatnonzero(state))
    assert betti_numbers(state != 0) == before


@given(st.integers(0, 2**32 - 1))
def test_changes_of_patches_add_up_to_that_of_the_volume(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask, more = rng.random((2, 8, 8, 8)) < np.array([0.4, 0.1]).reshape(2, 1, 1, 1)
    patches, count = label_components(np.pad(more & ~mask, 1), 26)
    labels = label_components(np.pad(mask, 1), 26)[0]
    state = (labels != 0).astype(np.uint8)
    state[patches != 0] = CANDIDATE
    places = np.flatnonzero(patches)
    changes, sizes, touched = euler_changes(state, labels, patches.ravel()[places], places, count)
    assert changes.sum() == euler_characteristic(mask | more) - euler_characteristic(mask)
    assert sizes.sum() == places.size
    for patch in range(1, count + 1):
        around = ndimage.binary_dilation(patches == patch, np.ones((3, 3, 3)))
        beside = set(labels[around]) - {0}
        if touched[patch] > 0:
            assert beside == {touched[patch]}
        elif touched[patch] == 0:
            assert not beside
