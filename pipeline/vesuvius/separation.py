"""Part sheets that touch, and keep those apart that nearly do."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.errors import ConfigurationError
from pipeline.hardware.compilation import compiled
from pipeline.vesuvius.betti_numbers import label_components
from pipeline.vesuvius.binary_morphology import dilate, erode
from pipeline.vesuvius.components import component_sizes
from pipeline.vesuvius.local_topology import peel
from pipeline.vesuvius.sheet_colours import colour_components, of_colour

__all__ = ["keep_apart", "label_sheets", "separate_sheets"]

Mask = NDArray[np.bool_]
_WINDOW = 12  # voxels around a contact in which two parts are looked at


class _Limits(NamedTuple):
    min_part: int
    max_contact: float
    min_overlap: float


def label_sheets(mask: Mask) -> tuple[NDArray[np.int32], int]:
    """Number the sheets of `mask` `(D, H, W)`: labels, 0 outside, and how many there are."""
    return label_components(mask, 26)


def separate_sheets(
    mask: Mask,
    probability: NDArray[np.float32] | None = None,
    thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9),
    erosion: float = 0,
    min_part: int = 500,
    max_contact: float = 0.1,
    min_overlap: float = 0.5,
) -> Mask:
    """Cut 26-connected components of `mask` `(D, H, W)` that are several sheets.

    Where a component falls into parts at a higher threshold, the parts grow back over it, the most
    probable voxels first. Two parts are two sheets if they lie one over the other where they meet
    and meet in a small part of each only; a cut one voxel wide then separates them. Pieces side by
    side are one torn sheet and stay together. Only removes voxels.

    Args:
        mask: the mask.
        probability: `(D, H, W)`; None needs `erosion`.
        thresholds: at which to look for parts, ascending.
        erosion: radius of a ball, in voxels, by which to look for parts after that; 0 does not.
        min_part: voxels of the smallest part.
        max_contact: the most voxels of a contact, as a share of the smaller part.
        min_overlap: the least overlap of the parts around their contact, seen from the axis that
            shows most of them, as a share of the smaller.

    Raises:
        ConfigurationError: there is nothing to look for parts by.
    """
    if probability is None and not erosion:
        raise ConfigurationError("separate_sheets needs a probability or an erosion radius above 0")
    limits = _Limits(min_part, max_contact, min_overlap)
    weight = np.zeros(mask.shape, np.float32) if probability is None else probability
    result = mask.copy()
    for threshold in sorted(thresholds) if probability is not None else ():
        _cut(result, result & (weight >= threshold), weight, limits)
    if erosion:
        _cut(result, erode(result, erosion), weight, limits)
    return result


def keep_apart(mask: Mask, gap: int = 2) -> Mask:
    """Wear sheets off where fewer than `gap` voxels are between them, without a hole or a tear.

    A voxel goes only if no component, tunnel or cavity changes by it, so that a sheet never gets
    thinner than one voxel; where neighbours are too close for that the gap stays smaller.

    Args:
        mask: `(D, H, W)`.
        gap: voxels of background wanted between two 26-connected components.

    Raises:
        ConfigurationError: `gap` is not positive.
    """
    if gap < 1:
        raise ConfigurationError(f"gap must be 1 or more voxels, got {gap!r}")
    labels, count = label_components(mask, 26)
    colours = colour_components(labels, count, ceil(2 * gap))
    close = np.zeros_like(mask)
    for colour in range(1, int(colours.max(initial=0)) + 1):
        sheets = of_colour(labels, colours, colour)
        close |= sheets & dilate(mask & ~sheets, gap)
    state = np.pad(mask, 1).astype(np.uint8)
    peel(state, np.flatnonzero(np.pad(close, 1)))
    return np.asarray(state[1:-1, 1:-1, 1:-1] != 0)


def _cut(mask: Mask, core: Mask, weight: NDArray[np.float32], limits: _Limits) -> None:
    """Cut `mask` in place between the sheets that the parts of `core` show."""
    labels, count = label_components(mask, 26)
    parts, part_count = label_components(core, 26)
    large = component_sizes(parts, part_count) >= limits.min_part
    large[0] = False
    owner = _owner_of_parts(labels, parts, part_count)
    several = np.bincount(owner[large], minlength=count + 1) > 1
    large &= several[owner]
    if not large.any():
        return
    grown, rest = _seeds(labels, parts, large, several)
    _grow(grown, rest[np.argsort(-weight.ravel()[_inner(rest, mask.shape)], kind="stable")])
    pairs, voxels = np.unique(_contacts(grown), axis=0, return_counts=True)
    if not pairs.size:
        return
    size = component_sizes(grown, part_count)
    boxes = _contact_boxes(grown, part_count, pairs)
    apart = [
        number <= limits.max_contact * min(size[a], size[b])
        and _overlap(grown, int(a), int(b), box) >= limits.min_overlap
        for (a, b), number, box in zip(pairs, voxels, boxes, strict=True)
    ]
    if not any(apart):
        return
    group = _united(pairs[~np.array(apart)], part_count)
    places = np.flatnonzero(grown)
    places = places[np.argsort(weight.ravel()[_inner(places, mask.shape)], kind="stable")]
    removed = _part_groups(grown, group, places)
    mask.ravel()[_inner(removed, mask.shape)] = False


def _inner(places: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the places of a padded volume as places in the volume of `shape`."""
    z, y, x = np.unravel_index(places, tuple(side + 2 for side in shape))
    return np.ravel_multi_index((z - 1, y - 1, x - 1), shape)


def _united(pairs: NDArray[np.int64], count: int) -> NDArray[np.int32]:
    """Return the group of each of `count` parts, and of 0, when the pairs stay together."""
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (count + 1, count + 1))
    return np.asarray(connected_components(links, directed=False)[1], np.int32)


def _overlap(grown: NDArray[np.int32], first: int, second: int, box: NDArray[np.int64]) -> float:
    """Return how much of the smaller of two parts lies over the other, around their contact."""
    window = grown[tuple(slice(max(low - _WINDOW, 0), high + _WINDOW) for low, high in box)]
    views = []
    for axis in range(3):
        one, other = (window == first).any(axis), (window == second).any(axis)
        views.append((int(one.sum() + other.sum()), one, other))
    _, one, other = max(views, key=lambda view: view[0])
    return float((one & other).sum() / min(one.sum(), other.sum()))


def _contact_boxes(
    grown: NDArray[np.int32], count: int, pairs: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the bounding boxes of the contacts `(pairs, 3, 2)`."""
    keys = pairs[:, 0] * (count + 1) + pairs[:, 1]  # ascending, as np.unique leaves them
    return _boxes(grown, keys, count)


@compiled
def _owner_of_parts(
    labels: NDArray[np.int32], parts: NDArray[np.int32], count: int
) -> NDArray[np.int32]:
    owner = np.zeros(count + 1, np.int32)
    flat, flat_parts = labels.ravel(), parts.ravel()
    for place in range(flat.size):
        if flat_parts[place] != 0:
            owner[flat_parts[place]] = flat[place]
    return owner


@compiled
def _seeds(
    labels: NDArray[np.int32],
    parts: NDArray[np.int32],
    large: NDArray[np.bool_],
    several: NDArray[np.bool_],
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the large parts with a rim of 0, and the places that they have to grow over."""
    depth, height, width = labels.shape
    grown = np.zeros((depth + 2, height + 2, width + 2), np.int32)
    number = 0
    for fill in range(2):
        if fill == 0:
            rest = np.zeros(0, np.int64)
        else:
            rest = np.zeros(number, np.int64)
            number = 0
        for z in range(depth):
            for y in range(height):
                for x in range(width):
                    part = parts[z, y, x]
                    if part != 0 and large[part]:
                        grown[z + 1, y + 1, x + 1] = part
                    elif several[labels[z, y, x]]:
                        if fill == 1:
                            rest[number] = ((z + 1) * (height + 2) + y + 1) * (width + 2) + x + 1
                        number += 1
    return grown, rest


@compiled
def _grow(grown: NDArray[np.int32], order: NDArray[np.int64]) -> None:
    """Give the places of `order` to the parts beside them, again and again until all are given."""
    row, plane = grown.shape[2], grown.shape[1] * grown.shape[2]
    flat = grown.ravel()
    left = order.copy()
    count, before = left.size, -1
    while count != before:
        before, count = count, 0
        for entry in range(before):
            place = left[entry]
            found = 0
            for z in (-plane, 0, plane):
                for y in (-row, 0, row):
                    for x in (-1, 0, 1):
                        if found == 0:
                            found = flat[place + z + y + x]
            if found != 0:
                flat[place] = found
            else:
                left[count] = place
                count += 1


@compiled
def _contacts(grown: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return for each voxel that touches another part the pair `(voxels, 2)`, the smaller first."""
    row, plane = grown.shape[2], grown.shape[1] * grown.shape[2]
    flat = grown.ravel()
    pairs = np.zeros((1024, 2), np.int64)
    found = 0
    for place in range(plane + row + 1, flat.size - plane - row - 1):
        part = flat[place]
        if part == 0:
            continue
        touched = 0
        for z in (-plane, 0, plane):
            for y in (-row, 0, row):
                for x in (-1, 0, 1):
                    other = flat[place + z + y + x]
                    if other != 0 and other != part:
                        touched = other
        if touched:
            if found == pairs.shape[0]:
                longer = np.zeros((2 * found, 2), np.int64)
                longer[:found] = pairs
                pairs = longer
            pairs[found, 0], pairs[found, 1] = min(part, touched), max(part, touched)
            found += 1
    return pairs[:found]


@compiled
def _boxes(grown: NDArray[np.int32], keys: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    depth, height, width = grown.shape
    boxes = np.zeros((keys.size, 3, 2), np.int64)
    boxes[:, :, 0] = max(grown.shape)
    for z in range(1, depth - 1):
        for y in range(1, height - 1):
            for x in range(1, width - 1):
                part = grown[z, y, x]
                if part == 0:
                    continue
                for near in np.ndindex((3, 3, 3)):
                    other = grown[z + near[0] - 1, y + near[1] - 1, x + near[2] - 1]
                    if other <= part:
                        continue
                    key = np.int64(part) * (count + 1) + other
                    pair = np.searchsorted(keys, key)
                    if pair < keys.size and keys[pair] == key:
                        at = (z, y, x)
                        for axis in range(3):
                            boxes[pair, axis, 0] = min(boxes[pair, axis, 0], at[axis])
                            boxes[pair, axis, 1] = max(boxes[pair, axis, 1], at[axis] + 1)
    return boxes


@compiled
def _part_groups(
    grown: NDArray[np.int32], group: NDArray[np.int32], order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Remove the places of `order` that touch another group of parts, and return them."""
    row, plane = grown.shape[2], grown.shape[1] * grown.shape[2]
    flat = grown.ravel()
    removed = np.zeros(order.size, np.int64)
    number = 0
    for place in order:
        touching = False
        for z in (-plane, 0, plane):
            for y in (-row, 0, row):
                for x in (-1, 0, 1):
                    other = flat[place + z + y + x]
                    touching |= other != 0 and group[other] != group[flat[place]]
        if touching:
            flat[place] = 0
            removed[number] = place
            number += 1
    return removed[:number]
