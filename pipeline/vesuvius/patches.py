"""Voxels that might be added to the sheets of a mask, judged patch by patch.

A patch is a 26-connected set of added voxels. It is taken whole or not at all, and never if it
touches two sheets, so that no addition merges two 26-connected components.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.hardware.compilation import compiled
from pipeline.vesuvius.betti_numbers import enclosed, label_components
from pipeline.vesuvius.local_topology import (
    ADDED,
    BACKGROUND,
    CANDIDATE,
    euler_changes,
    thicken,
    thin,
)

__all__ = ["PatchLimits", "add_patches", "fill_tunnels_with"]

Mask = NDArray[np.bool_]
_AROUND = 2  # voxels around a patch in which its sheet is looked at


class PatchLimits(NamedTuple):
    """What a patch that closes a tunnel may be.

    Args:
        max_patch: the most voxels of the membrane, one voxel thick, that closes the tunnel.
        max_bend: the largest ratio of the least to the middle variance of the voxels of patch and
            sheet around it; 0 is a plane, 1 a ball. A wall between two layers has a large one.
    """

    max_patch: int = 64
    max_bend: float = 0.9


def add_patches(labels: NDArray[np.int32], added: Mask) -> Mask:
    """Return the patches of `added` that touch exactly one component of `labels` `(D, H, W)`."""
    patches, count = label_components(added, 26)
    touched = _touched(np.pad(labels, 1), patches, count)
    return np.asarray((touched > 0)[patches])


def fill_tunnels_with(
    labels: NDArray[np.int32],
    candidates: Mask,
    groups: NDArray[np.int32],
    group_of: NDArray[np.int32],
    probability: NDArray[np.float32] | None,
    limits: PatchLimits,
    body: Mask | None = None,
) -> int:
    """Close tunnels of sheets within the candidates, and leave everything else as it is.

    The candidates are thinned to what cannot be taken away without opening a tunnel again or
    parting what they join: a membrane across each hole. A membrane is taken if it lowers the number
    of tunnels, touches one component only, encloses no background, lies in the sheet and is not too
    large; then it is made as thick as the candidates and one more voxel on both sides allow.

    Args:
        labels: components `(D + 2, H + 2, W + 2)` with a rim of 0; changed in place.
        candidates: `(D, H, W)`, background of the labels.
        groups: the group each voxel of `candidates` belongs to, in raster order.
        group_of: the group of each label. Candidates that touch another group are not used.
        probability: `(D, H, W)`; the membrane runs where it is highest. None goes by the
            neighbourhood alone.
        limits: what a membrane may be.
        body: `(D, H, W)`, candidates in which a membrane runs rather than beside them, and which
            alone thicken it; None is all of them.

    Returns:
        The number of voxels added.
    """
    places = np.flatnonzero(np.pad(candidates, 1))
    places = places[_undisputed(labels, places, groups, group_of)]
    if not places.size:
        return 0
    state = (labels != 0).view(np.uint8)
    weight = _density(state, places)
    if probability is not None:
        weight += probability.ravel()[_unpadded(places, state.shape)]
    if body is not None:
        weight += body.ravel()[_unpadded(places, state.shape)]
    state.ravel()[places] = CANDIDATE
    places = places[np.argsort(weight, kind="stable")]
    thin(state, places)
    core = places[state.ravel()[places] == CANDIDATE]
    core, patch = _accepted(state, labels, core, limits)
    if not core.size:
        return 0
    state.ravel()[core] = ADDED
    closed = _closing_a_cavity(state, labels, core, patch)
    state.ravel()[core[closed]] = BACKGROUND
    core = core[~closed]
    patch = patch[~closed]
    labels.ravel()[core] = _owners(labels, core, patch, int(patch.max(initial=0)))[patch]
    before = np.count_nonzero(state)
    if body is not None:
        places = places[body.ravel()[_unpadded(places, state.shape)]]
    thicken(state, labels, places[::-1].copy())
    return int(core.size + np.count_nonzero(state) - before)


def _accepted(
    state: NDArray[np.uint8],
    labels: NDArray[np.int32],
    core: NDArray[np.int64],
    limits: PatchLimits,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the voxels of the patches that may stay, and the patch of each; clear the others."""
    members = np.zeros(state.size, np.bool_)
    members[core] = True
    numbers, count = label_components(members.reshape(state.shape), 26)
    patch = numbers.ravel()[core]
    changes, sizes, touched = euler_changes(state, labels, patch, core, count)
    good = (touched > 0) & (changes > 0) & (sizes <= limits.max_patch)
    good[0] = False
    if good.any():
        good[good] = _bend(labels, core, patch, np.flatnonzero(good)) <= limits.max_bend
    stay = good[patch]
    state.ravel()[core[~stay]] = BACKGROUND
    return core[stay], patch[stay].astype(np.int64)


def _bend(
    labels: NDArray[np.int32],
    core: NDArray[np.int64],
    patch: NDArray[np.int32],
    chosen: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return the least over the middle variance of patch and sheet around each chosen patch."""
    order = np.argsort(patch, kind="stable")
    starts = np.searchsorted(patch[order], [chosen, chosen + 1])
    moments = _moments(labels, core[order], starts[0], starts[1])
    variance = np.linalg.eigvalsh(moments)
    return np.asarray(variance[:, 0] / np.maximum(variance[:, 1], 1e-9))


def _closing_a_cavity(
    state: NDArray[np.uint8],
    labels: NDArray[np.int32],
    core: NDArray[np.int64],
    patch: NDArray[np.int64],
) -> Mask:
    """Return which voxels belong to patches that shut a new cavity or part an old one."""
    inner = np.s_[1:-1, 1:-1, 1:-1]  # a piece of background that reaches a face is no cavity
    after, count = label_components(state[inner] == 0, 26)
    cavity = enclosed(after, count)
    if not cavity.any():
        return np.zeros(core.size, np.bool_)
    before, earlier = label_components(labels[inner] == 0, 26)
    first = _first_voxels(after, count)
    origin = np.where(cavity, before.ravel()[first], 0)
    new = cavity & ~enclosed(before, earlier)[origin]
    new |= cavity & (np.bincount(origin, minlength=earlier + 1)[origin] > 1)
    return np.asarray(_patches_beside(np.pad(after, 1), new, core, patch)[patch])


def _unpadded(places: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    z, y, x = np.unravel_index(places, shape)
    return np.ravel_multi_index((z - 1, y - 1, x - 1), tuple(side - 2 for side in shape))


@compiled
def _touched(
    labels: NDArray[np.int32], patches: NDArray[np.int32], count: int
) -> NDArray[np.int32]:
    """Return the component of the padded `labels` by patch: 0 for none, -1 for several."""
    touched = np.zeros(count + 1, np.int32)
    depth, height, width = patches.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                patch = patches[z, y, x]
                if patch == 0:
                    continue
                for near in np.ndindex((3, 3, 3)):
                    label = labels[z + near[0], y + near[1], x + near[2]]
                    if label != 0 and touched[patch] != label:
                        touched[patch] = label if touched[patch] == 0 else -1
    return touched


@compiled
def _undisputed(
    labels: NDArray[np.int32],
    places: NDArray[np.int64],
    groups: NDArray[np.int32],
    group_of: NDArray[np.int32],
) -> NDArray[np.bool_]:
    """Return which places touch components of their own group alone."""
    row, plane = labels.shape[2], labels.shape[1] * labels.shape[2]
    flat = labels.ravel()
    free = np.ones(places.size, np.bool_)
    for entry in range(places.size):
        for z in (-plane, 0, plane):
            for y in (-row, 0, row):
                for x in (-1, 0, 1):
                    label = flat[places[entry] + z + y + x]
                    if label != 0 and group_of[label] != groups[entry]:
                        free[entry] = False
    return free


@compiled
def _density(state: NDArray[np.uint8], places: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return how much foreground is around each place: most where a hole meets its sheet."""
    depth, height, width = state.shape
    density = np.zeros(places.size, np.float32)
    for entry in range(places.size):
        z, rest = divmod(places[entry], height * width)
        y, x = divmod(rest, width)
        near, total = 0, 0
        for other_z in range(max(z - 2, 0), min(z + 3, depth)):
            for other_y in range(max(y - 2, 0), min(y + 3, height)):
                for other_x in range(max(x - 2, 0), min(x + 3, width)):
                    if state[other_z, other_y, other_x] != 0:
                        total += 1
                        if max(abs(other_z - z), abs(other_y - y), abs(other_x - x)) < 2:
                            near += 1
        density[entry] = near / 27 + total / 125
    return density


@compiled
def _moments(
    labels: NDArray[np.int32],
    places: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return the covariance `(patches, 3, 3)` of the voxels of each patch and its surroundings."""
    shape = labels.shape
    row, plane = shape[2], shape[1] * shape[2]
    result = np.zeros((starts.size, 3, 3), np.float64)
    for patch in range(starts.size):
        low = np.array(shape, np.int64)
        high = np.zeros(3, np.int64)
        for entry in range(starts[patch], ends[patch]):
            place = places[entry]
            at = (place // plane, place % plane // row, place % row)
            for axis in range(3):
                low[axis] = min(low[axis], at[axis])
                high[axis] = max(high[axis], at[axis])
        total = 0
        sums = np.zeros(3)
        for axis in range(3):
            low[axis] = max(low[axis] - _AROUND, 0)
            high[axis] = min(high[axis] + _AROUND + 1, shape[axis])
        for z in range(low[0], high[0]):
            for y in range(low[1], high[1]):
                for x in range(low[2], high[2]):
                    if labels[z, y, x] != 0:
                        total += 1
                        at_voxel = (z - low[0], y - low[1], x - low[2])
                        for axis in range(3):
                            sums[axis] += at_voxel[axis]
                            for other in range(3):
                                result[patch, axis, other] += at_voxel[axis] * at_voxel[other]
        for axis in range(3):
            for other in range(3):
                result[patch, axis, other] /= total
                result[patch, axis, other] -= sums[axis] / total * sums[other] / total
    return result


@compiled
def _first_voxels(labels: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    first = np.full(count + 1, -1, np.int64)
    flat = labels.ravel()
    for place in range(flat.size):
        if first[flat[place]] < 0:
            first[flat[place]] = place
    return first


@compiled
def _patches_beside(
    background: NDArray[np.int32],
    chosen: NDArray[np.bool_],
    places: NDArray[np.int64],
    patch: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return by patch whether it touches a chosen piece of background."""
    row, plane = background.shape[2], background.shape[1] * background.shape[2]
    flat = background.ravel()
    beside = np.zeros(patch.max() + 1, np.bool_)
    for entry in range(places.size):
        for z in (-plane, 0, plane):
            for y in (-row, 0, row):
                for x in (-1, 0, 1):
                    beside[patch[entry]] |= chosen[flat[places[entry] + z + y + x]]
    return beside


@compiled
def _owners(
    labels: NDArray[np.int32],
    places: NDArray[np.int64],
    patch: NDArray[np.int64],
    count: int,
) -> NDArray[np.int32]:
    """Return by patch the component that it touches."""
    row, plane = labels.shape[2], labels.shape[1] * labels.shape[2]
    flat = labels.ravel()
    owner = np.zeros(count + 1, np.int32)
    for entry in range(places.size):
        for z in (-plane, 0, plane):
            for y in (-row, 0, row):
                for x in (-1, 0, 1):
                    label = flat[places[entry] + z + y + x]
                    if label != 0:
                        owner[patch[entry]] = label
    return owner
