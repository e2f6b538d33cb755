"""What one voxel does to the topology of a mask, read from its 26 neighbours.

Foreground is 6-connected, background 26-connected. A voxel is simple if it can be added or removed
without a change of any component, tunnel or cavity (Bertrand and Malandain 1994): the foreground in
its 18-neighbourhood has one 6-connected piece that touches it through a face, and the background in
its 26-neighbourhood is one 26-connected piece.

The volumes of this module carry a rim of one voxel of background, so that every voxel worked on has
all its neighbours. Places are indices into the raveled volume.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from pipeline.hardware.compilation import compiled

__all__ = [
    "ADDED",
    "BACKGROUND",
    "CANDIDATE",
    "FOREGROUND",
    "euler_changes",
    "is_simple",
    "peel",
    "thicken",
    "thin",
]

BACKGROUND, FOREGROUND, CANDIDATE, ADDED = 0, 1, 2, 3
"""States of a voxel while a mask is changed."""

_STEPS = np.array(list(product((-1, 0, 1), repeat=3)), np.int64)
_OFFSETS = np.abs(_STEPS[:, None] - _STEPS[None]).astype(np.int64)
_REACH = np.abs(_STEPS).sum(1)


def _bits(chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return each row of `chosen` as the bits of one number."""
    return np.asarray((chosen.astype(np.int64) << np.arange(27)).sum(-1))


_FACE_LINKS = _bits((_OFFSETS.sum(-1) == 1) & (_REACH > 0) & (_REACH < 3))
_ALL_LINKS = _bits((_OFFSETS.max(-1) == 1) & (_REACH > 0))
_FACES = int(_bits(_REACH == 1))
_WITHIN_18 = int(_bits((_REACH > 0) & (_REACH < 3)))
_AROUND = int(_bits(_REACH > 0))


def _cells_at_centre() -> NDArray[np.int64]:
    """Return the edges, squares and cubes at the centre: the bits of their others, the sign."""
    cells = []
    for span in product((-1, 0, 1), repeat=3):
        if any(span):
            inside = [all(s in (0, a) for s, a in zip(step, span, strict=True)) for step in _STEPS]
            others = int(_bits(np.array(inside) & (_REACH > 0)))
            cells.append((others, (-1) ** sum(map(abs, span))))
    return np.array(cells, np.int64)


_CELLS = _cells_at_centre()


@compiled
def _neighbours(state: NDArray[np.uint8], place: int, row: int, plane: int) -> int:
    """Return the foreground among the 27 voxels around `place` as bits."""
    bits = 0
    bit = 1
    for z in (-plane, 0, plane):
        for y in (-row, 0, row):
            start = place + z + y - 1
            for x in range(3):
                if state[start + x] != 0:
                    bits |= bit
                bit <<= 1
    return bits


@compiled
def _piece(seed: int, among: int, links: NDArray[np.int64]) -> int:
    """Return what is connected to the voxels `seed` among the voxels `among`."""
    found = seed
    front = seed
    while front != 0:
        reached = 0
        for voxel in range(27):
            if front >> voxel & 1:
                reached |= links[voxel]
        front = reached & among & ~found
        found |= front
    return found


@compiled
def is_simple(bits: int) -> bool:
    """Return whether the centre of the 27 voxels given as `bits` is simple."""
    near = bits & _WITHIN_18
    touching = near & _FACES
    if touching == 0:
        return False
    if _piece(touching & -touching, near, _FACE_LINKS) & touching != touching:
        return False
    empty = ~bits & _AROUND
    if empty == 0:
        return False
    return _piece(empty & -empty, empty, _ALL_LINKS) == empty


@compiled
def thin(state: NDArray[np.uint8], order: NDArray[np.int64]) -> None:
    """Remove simple candidates until none is left: a hole keeps a sheet of them, a bump none.

    Args:
        state: `(D + 2, H + 2, W + 2)`, changed in place.
        order: places of the candidates, the first to go first.
    """
    row, plane = state.shape[2], state.shape[1] * state.shape[2]
    flat = state.ravel()
    left = order.copy()
    count, before = left.size, -1
    while count != before:
        before, count = count, 0
        for entry in range(before):
            place = left[entry]
            if is_simple(_neighbours(flat, place, row, plane)):
                flat[place] = BACKGROUND
            else:
                left[count] = place
                count += 1


@compiled
def thicken(state: NDArray[np.uint8], labels: NDArray[np.int32], order: NDArray[np.int64]) -> None:
    """Add simple voxels beside those that are `ADDED`, where they touch no second component.

    Args:
        state: `(D + 2, H + 2, W + 2)`, changed in place; new voxels become `FOREGROUND`.
        labels: components with a rim of 0, changed along with the state.
        order: places that may be added.
    """
    row, plane = state.shape[2], state.shape[1] * state.shape[2]
    flat, owners = state.ravel(), labels.ravel()
    for entry in range(order.size):
        place = order[entry]
        if flat[place] != BACKGROUND:
            continue
        beside = 0
        for step in (-plane, -row, -1, 1, row, plane):
            if flat[place + step] == ADDED:
                beside = owners[place + step]
        if beside == 0:
            continue
        alone = True
        for z in (-plane, 0, plane):
            for y in (-row, 0, row):
                for x in (-1, 0, 1):
                    owner = owners[place + z + y + x]
                    alone &= owner == 0 or owner == beside
        if alone and is_simple(_neighbours(flat, place, row, plane)):
            flat[place] = FOREGROUND
            owners[place] = beside


@compiled
def peel(state: NDArray[np.uint8], order: NDArray[np.int64]) -> None:
    """Remove the voxels of `order` one by one where they are simple and have simple company.

    The last voxel of a thin sheet's rim is simple as well, so that a sheet could be eaten from its
    rim: a voxel only goes if its neighbours through faces leave the sheet standing on one side, and
    nothing on the other.

    Args:
        state: `(D + 2, H + 2, W + 2)`, changed in place.
        order: places, the first to go first.
    """
    row, plane = state.shape[2], state.shape[1] * state.shape[2]
    flat = state.ravel()
    for entry in range(order.size):
        place = order[entry]
        against = False
        for step in (1, row, plane):
            low, high = flat[place - step] != 0, flat[place + step] != 0
            against |= low != high
        if against and is_simple(_neighbours(flat, place, row, plane)):
            flat[place] = BACKGROUND


@compiled
def euler_changes(
    state: NDArray[np.uint8],
    labels: NDArray[np.int32],
    patches: NDArray[np.int32],
    places: NDArray[np.int64],
    count: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Measure patches that might be added to a mask.

    Args:
        state: `(D + 2, H + 2, W + 2)`; the mask is `FOREGROUND`. The patches are added to it.
        labels: components of the mask with a rim of 0.
        patches: number of the patch of each entry of `places`, 1 to `count`. No two patches touch.
        places: voxels of the patches.
        count: number of patches.

    Returns:
        By patch, and for 0: the change of the Euler characteristic, the voxels, and the component
        that the patch touches through a face, edge or corner: 0 for none, -1 for several or where a
        voxel of the patch has no neighbour through a face.
    """
    row, plane = state.shape[2], state.shape[1] * state.shape[2]
    flat, owners = state.ravel(), labels.ravel()
    changes = np.zeros(count + 1, np.int64)
    sizes = np.zeros(count + 1, np.int64)
    touched = np.zeros(count + 1, np.int32)
    for entry in range(places.size):
        flat[places[entry]] = BACKGROUND
    for entry in range(places.size):
        place, patch = places[entry], patches[entry]
        bits = _neighbours(flat, place, row, plane)
        change = 1
        for cell in range(_CELLS.shape[0]):
            if bits & _CELLS[cell, 0] == _CELLS[cell, 0]:
                change += _CELLS[cell, 1]
        changes[patch] += change
        sizes[patch] += 1
        flat[place] = CANDIDATE
        for z in (-plane, 0, plane):
            for y in (-row, 0, row):
                for x in (-1, 0, 1):
                    owner = owners[place + z + y + x]
                    if owner != 0 and touched[patch] != owner:
                        touched[patch] = owner if touched[patch] == 0 else -1
    for entry in range(places.size):
        if _neighbours(flat, places[entry], row, plane) & _FACES == 0:
            touched[patches[entry]] = -1
    return changes, sizes, touched
