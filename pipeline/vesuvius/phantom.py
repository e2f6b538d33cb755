"""Pieces of wound papyrus scrolls drawn from a seed, with exact truth.

They stand in for real data where there is none: in the demonstration, the tests and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.data.atomic import write_csv
from pipeline.data.phantom_folders import draw_folder
from pipeline.data.writers import write_tiff
from pipeline.errors import ConfigurationError
from pipeline.vesuvius.phantom_difficulty import difficulty_named
from pipeline.vesuvius.phantom_sheets import coil, place, spiral_chart, stack, truth
from pipeline.vesuvius.phantom_surface import read_surface, surface_box, surface_chart
from pipeline.vesuvius.phantom_texture import tomogram

__all__ = [
    "FRAME_VX",
    "IGNORED",
    "ScrollPhantom",
    "scroll_phantom",
    "write_phantom_dataset",
]

FRAME_VX = 3  # not labelled on each face, as in the competition
IGNORED = 2
SMALLEST_SIDE_VX = 32
SMALLEST_PIECE_VX = 30  # less than that of a torn or cut off sheet is debris, not surface
VOLUMES_PER_SCROLL = 2
DEFAULT_COUNTS: Mapping[str, int] = {"train": 9, "val": 3, "test": 3}
MIXED = "mixed"

_MIXTURE = ("medium", "hard", "easy")  # of volumes 0, 1 and 2 of a split, and so on
_VERSION = 1  # of the drawings; a new one makes write_phantom_dataset draw again
_FOLDERS = {"train": "train", "val": "train", "test": "test"}
_SCROLLS = {"train": 1000, "val": 2000, "test": 3000}


@dataclass(frozen=True)
class ScrollPhantom:
    """A drawn piece of a scroll and its truth.

    Args:
        image: `(D, H, W)`, grey values of a tomogram.
        label: `(D, H, W)`, 1 on the recto surface, 2 where nothing is labelled, 0 elsewhere.
        sheets: `(D, H, W)`, the recto surface everywhere, also where it is not labelled; its
            26-connected components, numbered from 1, so that none touches another.
        origin_zyx: where voxel (0, 0, 0) lies in the coordinates of the traced surface, zeros
            without one.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    sheets: NDArray[np.int16]
    origin_zyx: tuple[float, float, float]


def scroll_phantom(
    seed: int,
    size_vx: tuple[int, int, int] = (96, 96, 96),
    difficulty: str = "easy",
    surface: Path | str | NDArray[np.float64] | None = None,
    origin_zyx: tuple[float, float, float] | None = None,
) -> ScrollPhantom:
    """Draw one piece of a scroll; the same arguments give the same one everywhere.

    Neighbouring windings come as near as 5 voxels and never touch in the truth: at least one voxel
    that is not surface lies between them.

    Args:
        seed: not negative.
        size_vx: depth, height and width, 32 or more.
        difficulty: `easy`, `medium` or `hard`.
        surface: a traced sheet to draw instead of a spiral, with neighbours laid along it: a
            tifxyz folder, or points `(3, rows, columns)` as z, y, x with NaN where invalid.
        origin_zyx: where the box begins in the coordinates of the surface; None lets the seed
            choose a place on it.

    Returns:
        The tomogram with its label and the numbered sheets.

    Raises:
        ConfigurationError: a size, the seed or the difficulty is out of range, or `origin_zyx` is
            given without a surface or away from it.
        InputError: the surface cannot be read or is no grid of points.
    """
    size = _checked_size(size_vx)
    if seed < 0:
        raise ConfigurationError(f"seed of the scroll phantom is {seed}; expected 0 or more")
    if surface is None and origin_zyx is not None:
        raise ConfigurationError("origin_zyx is given without a surface; give both or neither")
    chosen = difficulty_named(difficulty)
    shape, sheet, look, labelled = (
        np.random.Generator(np.random.PCG64(stream))
        for stream in np.random.SeedSequence(seed).spawn(4)
    )
    origin = (0.0, 0.0, 0.0)
    if surface is None:
        chart = spiral_chart(shape, size)
        windings = coil(sheet, chart, chosen)
    else:
        points = read_surface(surface)
        origin = surface_box(shape, points, size) if origin_zyx is None else origin_zyx
        chart = surface_chart(points, origin, size)
        windings = stack(sheet, chart, chosen)
    turn = place(chart, windings)
    sheets = _pieces(truth(chart, windings, turn))
    return ScrollPhantom(
        image=tomogram(look, chart, windings, turn, chosen),
        label=_label(labelled, sheets > 0),
        sheets=sheets,
        origin_zyx=origin,
    )


def write_phantom_dataset(
    directory: Path | str,
    counts: Mapping[str, int] = DEFAULT_COUNTS,
    size_vx: int | tuple[int, int, int] = 96,
    difficulty: str = MIXED,
    seed: int = 0,
) -> Path:
    """Write phantoms as a data folder in the layout of the competition.

    The files are `train_images/<id>.tif` and `train_labels/<id>.tif` (LZW, one page per z), the
    same for `test`, and `train.csv` and `test.csv` with `id` and `scroll_id`; two volumes share a
    scroll. The competition has no folder for validation: the volumes of `val` stand beside those of
    `train` and are told by their names and scrolls. A folder that was completed with the same
    settings is used as it is, one with other settings or an unfinished one is written again. Volume
    `i` of a split stays the same when counts change.

    Args:
        directory: the data folder; made where it is missing.
        counts: volumes of `train`, `val` and `test`.
        size_vx: side, or depth, height and width.
        difficulty: `easy`, `medium`, `hard`, or `mixed`: each of them in turn.
        seed: of the whole data set; not negative.

    Returns:
        The data folder.

    Raises:
        ConfigurationError: a setting is out of range, or the folder holds something else.
        ResourceError: the folder cannot be written.
    """
    size = _checked_size((size_vx,) * 3 if isinstance(size_vx, int) else size_vx)
    if difficulty != MIXED:
        difficulty_named(difficulty)
    if seed < 0 or set(counts) - set(_FOLDERS) or not all(0 <= n < 2000 for n in counts.values()):
        raise ConfigurationError(
            f"phantom data set has seed {seed} and counts {dict(counts)}; expected a seed of 0 or "
            f"more, and 0 to 1999 volumes of {', '.join(_FOLDERS)}"
        )
    settings = {
        "version": _VERSION,
        "counts": {split: int(number) for split, number in counts.items()},
        "size_vx": list(size),
        "difficulty": difficulty,
        "seed": int(seed),
    }

    def draw(root: Path) -> Iterator[Path]:
        for split, index in [(name, i) for name in sorted(counts) for i in range(counts[name])]:
            level = _MIXTURE[index % len(_MIXTURE)] if difficulty == MIXED else difficulty
            phantom = scroll_phantom(_volume_seed(seed, split, index), size, level)
            name = f"{_volume_id(split, index)}.tif"
            yield write_tiff(root / f"{_FOLDERS[split]}_images" / name, phantom.image)
            yield write_tiff(root / f"{_FOLDERS[split]}_labels" / name, phantom.label)
        yield from _write_tables(root, counts)

    return draw_folder(
        directory, settings, draw, ("*/phantom_*_[0-9]*.tif", "train.csv", "test.csv")
    )


def _checked_size(size_vx: tuple[int, ...]) -> tuple[int, int, int]:
    size = tuple(int(side) for side in size_vx)
    if len(size) != 3 or min(size) < SMALLEST_SIDE_VX:
        raise ConfigurationError(
            f"size_vx is {' x '.join(map(str, size))}; a scroll phantom needs three sides of at "
            f"least {SMALLEST_SIDE_VX} voxels"
        )
    return size[0], size[1], size[2]


def _pieces(recto: NDArray[np.bool_]) -> NDArray[np.int16]:
    """Number the pieces of surface that touch nowhere, without the debris."""
    labels, _ = ndimage.label(recto, np.ones((3, 3, 3), np.bool_))
    large = np.bincount(labels.ravel()) >= SMALLEST_PIECE_VX
    large[0] = False
    return np.asarray(np.where(large, np.cumsum(large), 0)[labels], np.int16)


def _label(rng: np.random.Generator, recto: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Leave a frame and one to three blocks without a label."""
    label = recto.astype(np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        sides = [
            int(n * share) for n, share in zip(label.shape, rng.uniform(0.1, 0.28, 3), strict=True)
        ]
        starts = [
            int(rng.integers(FRAME_VX, n - FRAME_VX - side))
            for n, side in zip(label.shape, sides, strict=True)
        ]
        block = tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
        label[block] = IGNORED
    inside = (slice(FRAME_VX, -FRAME_VX),) * 3
    framed = np.full_like(label, IGNORED)
    framed[inside] = label[inside]
    return framed


def _volume_id(split: str, index: int) -> str:
    return f"phantom_{split}_{index:03d}"


def _volume_seed(seed: int, split: str, index: int) -> int:
    """Return the seed of one volume; splits never share one, whatever their sizes."""
    entropy = [seed, *split.encode("utf-8"), 256, index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _write_tables(root: Path, counts: Mapping[str, int]) -> list[Path]:
    """Write which scroll each volume comes from; no scroll is in two splits."""
    paths = []
    for folder in dict.fromkeys(_FOLDERS[split] for split in sorted(counts)):
        rows = [
            {
                "id": _volume_id(split, index),
                "scroll_id": _SCROLLS[split] + index // VOLUMES_PER_SCROLL,
            }
            for split in sorted(counts)
            if _FOLDERS[split] == folder
            for index in range(counts[split])
        ]
        paths.append(write_csv(root / f"{folder}.csv", rows, ("id", "scroll_id")))
    return paths
