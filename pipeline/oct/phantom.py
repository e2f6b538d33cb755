"""OCT B-scans drawn from a seed, with exact rows.

They stand in for real data where there is none: in the demonstration, the tests and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.atomic import atomic_path
from pipeline.data.phantom_folders import draw_folder
from pipeline.errors import ConfigurationError
from pipeline.oct.phantom_anatomy import cut_section, draw_eye
from pipeline.oct.phantom_render import bscan

__all__ = ["OctPhantom", "oct_phantom", "write_phantom_dataset"]

SMALLEST_SIDE_PX = 64
DEFAULT_COUNTS: Mapping[str, int] = {"train": 6, "val": 2, "test": 2}
SPACING_MM = 0.24  # between neighbouring B-scans of an eye

_VERSION = 1  # of the drawings; a new one makes write_phantom_dataset draw again
_EYES: tuple[Literal["OD", "OS"], ...] = ("OD", "OS")
_FIRST_SUBJECT = {"train": 1, "val": 501, "test": 801}


@dataclass(frozen=True)
class OctPhantom:
    """A drawn B-scan and its truth.

    A row counts from 0 and is that of the first pixel of the layer below, with fractions.

    Args:
        image: `(H, W)`.
        ilm, bm: rows `(W,)` of the two boundaries, everywhere.
        annotated_ilm, annotated_bm: the same as an annotator would leave them: NaN in gaps and
            where the B-scan is black.
    """

    image: NDArray[np.uint8]
    ilm: NDArray[np.float64]
    bm: NDArray[np.float64]
    annotated_ilm: NDArray[np.float64]
    annotated_bm: NDArray[np.float64]


def oct_phantom(
    seed: int,
    size_px: tuple[int, int] = (496, 768),
    eye_seed: int | None = None,
    laterality: Literal["OD", "OS"] = "OD",
    offset_mm: float | None = None,
) -> OctPhantom:
    """Draw one B-scan; the same arguments give the same one everywhere.

    Another height shows the same retina at another scale, 80 rows thick of 496.

    Args:
        seed: of the B-scan: its place, tilt, speckle and gaps; not negative.
        size_px: rows and columns, 64 or more.
        eye_seed: of the eye: thickness, curvature, vessels, drusen; None takes `seed`.
        laterality: right eye or left.
        offset_mm: distance of the B-scan from the fovea; None lets the seed choose.

    Raises:
        ConfigurationError: a seed is negative, or a side too short.
    """
    height, width = _checked_size(size_px)
    eye_seed = seed if eye_seed is None else eye_seed
    if seed < 0 or eye_seed < 0:
        raise ConfigurationError(
            f"seeds of the OCT phantom are {seed} and {eye_seed}; expected 0 or more"
        )
    eye = draw_eye(np.random.Generator(np.random.PCG64([eye_seed, 1])), laterality)
    shape, look, gaps = (
        np.random.Generator(np.random.PCG64(stream))
        for stream in np.random.SeedSequence(seed).spawn(3)
    )
    offset = shape.normal(0, 0.6) if offset_mm is None else offset_mm
    section = cut_section(shape, eye, offset, height, width)
    image = bscan(look, eye, section, height)
    annotated = np.stack([section.ilm, section.bm])
    _blacken(gaps, image, annotated)
    _leave_gaps(gaps, annotated)
    return OctPhantom(
        image=np.rint(image).astype(np.uint8),
        ilm=section.ilm,
        bm=section.bm,
        annotated_ilm=annotated[0],
        annotated_bm=annotated[1],
    )


def write_phantom_dataset(
    directory: Path | str,
    counts: Mapping[str, int] = DEFAULT_COUNTS,
    bscans: int = 4,
    size_px: tuple[int, int] = (496, 768),
    seed: int = 0,
) -> Path:
    """Write phantoms as a data folder: one HDF5 file for each split.

    A file `{split}.h5` has `/images`, `/layers/ILM`, `/layers/BM` and `/names`, where a name is
    `<subject>_<eye>_<n>_<n>`. Every subject has two eyes with `bscans` B-scans each, and is in one
    split only. A folder that was completed with the same settings is used as it is, one with other
    settings or an unfinished one is written again. A subject stays the same when counts change.

    Args:
        directory: the data folder; made where it is missing.
        counts: subjects of `train`, `val` and `test`.
        bscans: of each eye.
        size_px: rows and columns.
        seed: of the whole data set; not negative.

    Returns:
        The data folder.

    Raises:
        ConfigurationError: a setting is out of range, or the folder holds something else.
        ResourceError: the folder cannot be written.
    """
    size = _checked_size(size_px)
    if (
        seed < 0
        or bscans < 1
        or set(counts) - set(_FIRST_SUBJECT)
        or not all(0 <= number < 200 for number in counts.values())
    ):
        raise ConfigurationError(
            f"phantom data set has seed {seed}, {bscans} B-scans per eye and counts "
            f"{dict(counts)}; expected a seed of 0 or more, 1 or more B-scans, and 0 to 199 "
            f"subjects of {', '.join(_FIRST_SUBJECT)}"
        )
    settings = {
        "version": _VERSION,
        "counts": {split: int(number) for split, number in counts.items()},
        "bscans": int(bscans),
        "size_px": list(size),
        "seed": int(seed),
    }

    def draw(root: Path) -> Iterator[Path]:
        for split in sorted(split for split in counts if counts[split]):
            first = _FIRST_SUBJECT[split]
            subjects = range(first, first + counts[split])
            yield _write_subjects(root / f"{split}.h5", subjects, bscans, size, seed)

    return draw_folder(directory, settings, draw, [f"{split}.h5" for split in _FIRST_SUBJECT])


def _checked_size(size_px: tuple[int, int]) -> tuple[int, int]:
    size = tuple(int(side) for side in size_px)
    if len(size) != 2 or min(size) < SMALLEST_SIDE_PX:
        raise ConfigurationError(
            f"size_px is {' x '.join(map(str, size))}; an OCT phantom needs rows and columns, "
            f"{SMALLEST_SIDE_PX} or more"
        )
    return size[0], size[1]


def _blacken(
    rng: np.random.Generator, image: NDArray[np.float64], annotated: NDArray[np.float64]
) -> None:
    """Leave out what a registered scan did not cover: a wedge at the top, a strip at a side."""
    height, width = image.shape
    if rng.random() < 0.4:
        left, right = (float(share) for share in rng.uniform(-0.03, 0.09, 2))
        edge = np.linspace(left, right, width) * height
        edge = np.minimum(edge, np.nanmin(annotated) - 0.02 * height)
        image[np.arange(height)[:, None] < edge] = 0
    if rng.random() < 0.3:
        strip = int(rng.integers(3, max(width // 50, 4)))
        columns = slice(width - strip, width) if rng.random() < 0.5 else slice(0, strip)
        image[:, columns] = 0
        annotated[:, columns] = np.nan


def _leave_gaps(rng: np.random.Generator, annotated: NDArray[np.float64]) -> None:
    """Take away the rows of up to three groups of columns, of BM alone or of both boundaries."""
    width = annotated.shape[1]
    for _ in range(int(rng.choice(4, p=(0.5, 0.25, 0.15, 0.1)))):
        gap = int(rng.integers(width // 100 + 2, width // 12 + 3))
        start = int(rng.integers(0, width - gap))
        annotated[int(rng.random() < 0.5) :, start : start + gap] = np.nan


def _write_subjects(
    path: Path, subjects: range, bscans: int, size: tuple[int, int], seed: int
) -> Path:
    """Write the B-scans of some subjects, one after the other, as one file; return its path."""
    import h5py  # not needed to draw

    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        total, (height, width) = len(subjects) * len(_EYES) * bscans, size
        images = file.create_dataset(
            "images",
            (total, height, width),
            "u1",
            maxshape=(None, height, width),
            chunks=(1, height, width),
            compression="gzip",
        )
        layers = {
            name: file.create_dataset(f"layers/{name}", (total, width), "f4", fillvalue=np.nan)
            for name in ("ILM", "BM")
        }
        names = file.create_dataset("names", (total,), h5py.string_dtype())
        places = [(subject, eye, k) for subject in subjects for eye in _EYES for k in range(bscans)]
        for index, (subject, eye, k) in enumerate(places):
            phantom = oct_phantom(
                _derived_seed(seed, subject, eye, k),
                size,
                _derived_seed(seed, subject, eye),
                eye,
                (k - (bscans - 1) / 2) * SPACING_MM,
            )
            images[index] = phantom.image
            layers["ILM"][index] = phantom.annotated_ilm
            layers["BM"][index] = phantom.annotated_bm
            names[index] = f"phantom{subject:03d}_{eye}_{k + 1}_{bscans}"
    return path


def _derived_seed(seed: int, subject: int, eye: str, *bscan_number: int) -> int:
    """Return the seed of an eye, or of one of its B-scans."""
    entropy = [seed, subject, _EYES.index(eye), *(k + 1 for k in bscan_number)]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
