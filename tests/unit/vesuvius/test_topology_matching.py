"""Matched features: official anchors, a slow reference, and laws."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.vesuvius.topology_matching import blocks_of, count_features

Mask = NDArray[np.bool_]
Counts = list[tuple[int | None, int, int]]


def counts_of(first: Mask, second: Mask) -> Counts:
    return [(m, p, g) for m, p, g in count_features(first, second)]


def line(letters: str) -> tuple[Mask, Mask]:
    """Return a column of voxels: F in the first mask only, G in the second only, B in both."""
    first, second = ([letter in held for letter in letters] for held in ("FB", "GB"))
    return np.reshape(first, (-1, 1, 1)), np.reshape(second, (-1, 1, 1))


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("F.G.B.B", (2, 2, 2)),
        ("B.B.F.G", (1, 2, 2)),
        ("B.F.G.B", (1, 2, 2)),
        ("F.B.G.B", (1, 2, 2)),
        ("F.G.F.G", (0, 1, 1)),
        ("F.F.G.G", (0, 1, 1)),
        ("F.B.G", (0, 1, 1)),
        ("B.F.B", (1, 2, 1)),
        ("F.G", (0, 0, 0)),
    ],
)
def test_components_of_a_line_match_in_the_official_order(
    letters: str, expected: tuple[int, int, int]
) -> None:
    assert counts_of(*line(letters)) == [expected, (0, 0, 0), (0, 0, 0)]


HOLES = [
    ((2, 5, 8), (2, 5, 8), (3, 3, 3)),
    ((2, 3, 4, 5, 8), (2, 5, 8), (2, 2, 3)),
    ((2, 3, 4, 5, 8), (2, 5, 6, 7, 8), (1, 2, 2)),
    ((2, 3, 4), (4, 5, 6), (1, 1, 1)),
    ((2, 3), (5, 6), (0, 1, 1)),
]


@pytest.mark.parametrize(("first", "second", "expected"), HOLES)
def test_cavities_of_a_box_match_by_their_last_common_voxel(
    first: tuple[int, ...], second: tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    masks = np.ones((2, 5, 5, 14), np.bool_)
    masks[0, 2, 2, list(first)] = masks[1, 2, 2, list(second)] = False
    assert counts_of(*masks) == [(0, 0, 0), (0, 0, 0), expected]


@pytest.mark.parametrize(("first", "second", "expected"), HOLES)
def test_tunnels_through_a_plane_match_where_they_overlap(
    first: tuple[int, ...], second: tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    masks = np.zeros((2, 3, 14, 5), np.bool_)
    masks[:, 1] = True
    masks[0, 1, list(first), 2] = masks[1, 1, list(second), 2] = False
    assert counts_of(*masks) == [(0, 0, 0), expected, (0, 0, 0)]


@pytest.fixture(scope="module")
def noise() -> tuple[Mask, Mask]:
    rng = np.random.default_rng(5)
    first = rng.random((16, 16, 16)) < 0.5
    return first, first ^ (rng.random((16, 16, 16)) < 0.1)


def test_noise_has_the_official_counts(noise: tuple[Mask, Mask]) -> None:
    assert counts_of(*noise) == [(19, 40, 42), (157, 246, 234), (0, 0, 0)]


def test_dense_noise_has_the_official_counts() -> None:
    rng = np.random.default_rng(6)
    first = rng.random((16, 16, 16)) < 0.9
    second = first ^ (rng.random((16, 16, 16)) < 0.02)
    assert counts_of(first, second) == [(0, 0, 0), (33, 36, 59), (23, 43, 27)]


@pytest.mark.parametrize(
    ("axes", "flipped", "tunnels"),
    [
        ((0, 1, 2), (0,), 156),
        ((0, 1, 2), (1,), 154),
        ((0, 1, 2), (2,), 157),
        ((0, 1, 2), (0, 1, 2), 153),
        ((1, 2, 0), (), 151),
        ((2, 1, 0), (), 151),
    ],
)
def test_tunnels_depend_on_the_axes_as_officially(
    noise: tuple[Mask, Mask], axes: tuple[int, ...], flipped: tuple[int, ...], tunnels: int
) -> None:
    turned = [np.flip(mask.transpose(axes), flipped) for mask in noise]
    assert [count[0] for count in counts_of(*turned)] == [19, tunnels, 0]


def block(*boxes: tuple[slice, ...]) -> Mask:
    mask = np.zeros((16, 16, 16), np.bool_)
    for box in boxes:
        mask[box] = True
    return mask


CUBE, FAR_CUBE = np.s_[2:5, 2:5, 2:5], np.s_[10:13, 10:13, 10:13]
EDGE_CUBE = np.s_[5:8, 5:8, 2:5]  # shares an edge with CUBE
PLANE = np.s_[7:8, :, :]


def ring(shift: int = 0) -> Mask:
    mask = block(np.s_[7:8, 2 + shift : 9 + shift, 2:9])
    mask[7, 4 + shift : 7 + shift, 4:7] = False
    return mask


def shell(wall: int = 2, clipped: bool = False) -> Mask:
    mask = block(np.s_[3:12, 3:12, 3:12])
    mask[3 + wall : 12 - wall, 3 + wall : 12 - wall, 3 + wall : 12 - wall] = False
    mask[3, 3, 3] = not clipped
    return mask


def holed_plane() -> Mask:
    mask = block(PLANE)
    mask[7, 5, 5] = False
    return mask


NONE = (0, 0, 0)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (block(CUBE), block(CUBE), [NONE, NONE, NONE]),
        (block(CUBE), block(), [NONE, NONE, NONE]),
        (block(CUBE), block(FAR_CUBE), [NONE, NONE, NONE]),
        (block(CUBE, FAR_CUBE), block(CUBE, FAR_CUBE), [(1, 1, 1), NONE, NONE]),
        (block(CUBE, FAR_CUBE), block(CUBE), [(0, 1, 0), NONE, NONE]),
        (block(CUBE), block(CUBE, FAR_CUBE), [(0, 0, 1), NONE, NONE]),
        (block(CUBE, EDGE_CUBE), block(CUBE, EDGE_CUBE), [(1, 1, 1), NONE, NONE]),
        (holed_plane(), block(PLANE), [NONE, (0, 1, 0), NONE]),
        (ring(), ring(), [NONE, (1, 1, 1), NONE]),
        (ring(), ring(4), [NONE, (0, 1, 1), NONE]),
        (shell(), shell(), [NONE, NONE, (1, 1, 1)]),
        (shell(), block(np.s_[3:12, 3:12, 3:12]), [NONE, NONE, (0, 1, 0)]),
        (shell(clipped=True), shell(), [NONE, NONE, (1, 1, 1)]),
        (block(np.s_[:, :, :]), block(np.s_[:, :, :]), [NONE, NONE, NONE]),
    ],
    ids=[
        "cube-itself",
        "cube-nothing",
        "cube-far-cube",
        "two-two",
        "two-one",
        "one-two",
        "edge-touching",
        "hole-in-plane",
        "ring-itself",
        "ring-shifted",
        "shell-itself",
        "shell-filled",
        "shell-clipped",
        "full-full",
    ],
)
def test_simple_shapes_have_the_official_counts(
    prediction: Mask, truth: Mask, expected: Counts
) -> None:
    assert counts_of(prediction, truth) == expected


def test_a_thin_wall_opens_through_its_corner() -> None:
    assert counts_of(shell(1, clipped=True), shell(1))[2] == (0, 0, 1)


# A slow reference. Cells of dimension k + 1, foreground of the union first, are added in raster
# order; each column is reduced over rows that are ordered by one of the masks. A background cell
# whose last remaining face is foreground in both orders is a match.


def cells(shape: tuple[int, ...], dimension: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the cells (lowest voxel, axes) in raster order; squares go by their normal."""
    spans = sorted(
        combinations(range(3), dimension),
        key=lambda axes: axes if dimension == 1 else tuple(set(range(3)) - set(axes)),
    )
    return [
        (voxel, axes)
        for voxel in product(*map(range, shape))
        for axes in spans
        if all(voxel[axis] + 1 < shape[axis] for axis in axes)
    ]


def in_mask(mask: Mask, cell: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    voxel, axes = cell
    return bool(mask[tuple(slice(v, v + 1 + (a in axes)) for a, v in enumerate(voxel))].all())


def born_inside(mask: Mask, union: Mask, dimension: int) -> set[int]:
    """Return the cells of the union that end a feature of `mask`, by number."""
    rows = cells(mask.shape, dimension)
    order = sorted(range(len(rows)), key=lambda row: (not in_mask(mask, rows[row]), row))
    rank = {rows[row]: place for place, row in enumerate(order)}
    inside = sum(in_mask(mask, row) for row in rows)
    columns = cells(mask.shape, dimension + 1)
    stored: dict[int, int] = {}
    found = set()
    for number in sorted(range(len(columns)), key=lambda n: (not in_mask(union, columns[n]), n)):
        voxel, axes = columns[number]
        column = 0
        for axis in axes:
            rest = tuple(other for other in axes if other != axis)
            upper = tuple(v + (a == axis) for a, v in enumerate(voxel))
            column ^= 1 << rank[voxel, rest] | 1 << rank[upper, rest]
        while column and column.bit_length() - 1 in stored:
            column ^= stored[column.bit_length() - 1]
        if column:
            stored[column.bit_length() - 1] = column
            if column.bit_length() <= inside and not in_mask(union, columns[number]):
                found.add(number)
    return found


def reference_counts(first: Mask, second: Mask) -> Counts:
    return [
        (
            len(born_inside(first, first | second, k) & born_inside(second, first | second, k)),
            len(born_inside(first, first, k)),
            len(born_inside(second, second, k)),
        )
        for k in range(3)
    ]


@st.composite
def mask_pairs(draw: st.DrawFn, longest: int) -> tuple[Mask, Mask]:
    shape = tuple(draw(st.integers(1, longest)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.2, 0.4, 0.5, 0.6, 0.75, 0.9]))
    field = rng.random(shape)
    first = field < density
    kind = draw(st.sampled_from(["independent", "altered", "nested", "shifted"]))
    if kind == "independent":
        return first, rng.random(shape) < density
    if kind == "altered":
        return first, first ^ (rng.random(shape) < 0.15)
    if kind == "nested":
        return first, field < density * 0.8
    return first, np.roll(first, 1, axis=draw(st.integers(0, 2)))


@given(mask_pairs(longest=5))
def test_counts_equal_the_slow_reference(masks: tuple[Mask, Mask]) -> None:
    assert counts_of(*masks) == reference_counts(*masks)


@given(mask_pairs(longest=16))
def test_a_mask_matches_itself_and_the_order_of_two_is_no_matter(
    masks: tuple[Mask, Mask],
) -> None:
    first, second = masks
    counts = counts_of(first, second)
    assert counts_of(second, first) == [(m, g, p) for m, p, g in counts]
    assert counts_of(first, first) == [(p, p, p) for _, p, _ in counts]
    assert all(m is not None and m <= min(p, g) for m, p, g in counts)


@pytest.mark.parametrize("seed", range(4))
def test_half_empty_and_thick_volumes_agree_with_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((7, 6, 8)), 0.8)
    other = field + 0.1 * rng.standard_normal(field.shape)
    masks = field > 0.05 * seed, other > 0.05 * seed
    assert counts_of(*masks) == reference_counts(*masks)


def test_matching_gives_up_where_the_effort_is_too_great(noise: tuple[Mask, Mask]) -> None:
    components, tunnels, cavities = count_features(*noise, max_flips=100)
    assert components == (19, 40, 42)
    assert tunnels == (None, 246, 234)
    assert cavities == (0, 0, 0)


def test_without_matching_only_the_features_of_each_mask_are_counted(
    noise: tuple[Mask, Mask],
) -> None:
    assert [tuple(c) for c in count_features(*noise, matching=False)] == [
        (None, 40, 42),
        (None, 246, 234),
        (0, 0, 0),
    ]


@pytest.mark.parametrize("shape", [(5, 4, 1), (1, 1, 1), (2, 3, 7)])
def test_blocks_cover_the_volume_once_and_differ_by_one_voxel(shape: tuple[int, int, int]) -> None:
    covered = np.zeros(shape, np.int64)
    sizes = []
    for cut in blocks_of(shape):
        covered[cut] += 1
        sizes.append(covered[cut].shape)
    assert (covered == 1).all()
    assert sizes[0] == tuple((side + 1) // 2 for side in shape)
    assert len(sizes) == np.prod([min(side, 2) for side in shape])
