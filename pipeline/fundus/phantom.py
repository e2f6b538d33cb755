"""Fundus photographs drawn from a seed, with exact truth.

They stand in for real data where there is none: in the demonstration, the tests and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.phantom_folders import draw_folder
from pipeline.data.writers import write_png
from pipeline.errors import ConfigurationError
from pipeline.fundus.phantom_render import Frame, photograph, rasterise
from pipeline.fundus.phantom_tree import Vessel, grow_vessels, place_anatomy

__all__ = ["FundusPhantom", "fundus_phantom", "write_phantom_dataset"]

SMALLEST_SIDE_PX = 64
DEFAULT_COUNT: Mapping[str, int] = {"train": 8, "val": 2, "test": 2}

_VERSION = 1  # of the drawings; a new one makes write_phantom_dataset draw again
_FOV_SHARE = 0.475  # radius of the field of view over the shorter side


@dataclass(frozen=True)
class FundusPhantom:
    """A drawn fundus photograph and its truth.

    Args:
        image: `(H, W, 3)`, red, green, blue.
        label: `(H, W)`, 1 where a pixel's centre lies in a vessel and in the field of view.
        fov: `(H, W)`, the circular field of view.
        observer2: `(H, W)`, what a second observer could have drawn: some thin vessels missed, the
            others drawn beside and wider; Dice with `label` around 0.79.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    fov: NDArray[np.bool_]
    observer2: NDArray[np.uint8]


def fundus_phantom(
    seed: int, size_px: tuple[int, int] = (512, 512), mirrored: bool | None = None
) -> FundusPhantom:
    """Draw one photograph; the same seed and size give the same one everywhere.

    Another size shows the same eye: vessels are 1 to 8 pixels wide at 512 pixels and scale with the
    shorter side, but never below one pixel.

    Args:
        seed: not negative.
        size_px: height and width, 64 or more.
        mirrored: whether the optic disc lies on the right; None lets the seed decide.

    Returns:
        The photograph with label, field of view and second observer.

    Raises:
        ConfigurationError: a size or the seed is out of range.
    """
    height, width = (int(side) for side in size_px)
    if min(height, width) < SMALLEST_SIDE_PX:
        raise ConfigurationError(
            f"size_px is {height} x {width}; a fundus phantom needs at least {SMALLEST_SIDE_PX} "
            "pixels on each side"
        )
    if seed < 0:
        raise ConfigurationError(f"seed of the fundus phantom is {seed}; expected 0 or more")
    eye, look, observer = (
        np.random.Generator(np.random.PCG64(stream))
        for stream in np.random.SeedSequence(seed).spawn(3)
    )
    anatomy = place_anatomy(eye)
    vessels = grow_vessels(eye, anatomy)
    frame = _place_frame(eye, height, width, mirrored)
    fov = frame.fov()
    veins = rasterise([vessel for vessel in vessels if vessel.kind == "vein"], frame)
    arteries = rasterise([vessel for vessel in vessels if vessel.kind == "artery"], frame)
    inside = (np.minimum(veins.distance, arteries.distance) <= 0) & fov
    return FundusPhantom(
        image=photograph(look, frame, anatomy, veins, arteries),
        label=inside.astype(np.uint8),
        fov=fov,
        observer2=_second_observer(observer, vessels, frame, inside, fov),
    )


def write_phantom_dataset(
    directory: Path | str,
    count: Mapping[str, int] = DEFAULT_COUNT,
    size_px: int | tuple[int, int] = 256,
    seed: int = 0,
) -> Path:
    """Write phantoms as a data folder in the layout of the `vessel_pairs` manifest.

    The files are `{split}/{image,label,fov,observer2}/phantom_000.png`, masks 0 and 255. A folder
    that was completed with the same settings is used as it is; a phantom folder with other settings
    or an unfinished one is written again. Image `i` of a split stays the same when counts change.

    Args:
        directory: the data folder; made where it is missing.
        count: images in each split.
        size_px: side, or height and width.
        seed: of the whole data set; not negative.

    Returns:
        The data folder.

    Raises:
        ConfigurationError: a setting is out of range, or the folder holds something else.
        ResourceError: the folder cannot be written.
    """
    size = (size_px, size_px) if isinstance(size_px, int) else (int(size_px[0]), int(size_px[1]))
    if seed < 0 or any(number < 0 for number in count.values()):
        raise ConfigurationError(
            f"phantom data set has seed {seed} and count {dict(count)}; expected none below 0"
        )
    settings = {
        "version": _VERSION,
        "count": {split: int(number) for split, number in count.items()},
        "size_px": list(size),
        "seed": int(seed),
    }

    def draw(root: Path) -> Iterator[Path]:
        for split, index in [(name, i) for name in sorted(count) for i in range(count[name])]:
            phantom = fundus_phantom(_image_seed(seed, split, index), size)
            yield from _write(phantom, root / split, f"phantom_{index:03d}.png")

    return draw_folder(directory, settings, draw, ["*/*/phantom_[0-9]*.png"])


def _place_frame(rng: np.random.Generator, height: int, width: int, mirrored: bool | None) -> Frame:
    """Put the field of view near the middle of the picture; draw the side of the eye."""
    off_x, off_y = (float(offset) for offset in rng.uniform(-0.01, 0.01, 2))
    drawn = bool(rng.random() < 0.5)
    shorter = min(height, width)
    centre = ((width - 1) / 2 + off_x * shorter, (height - 1) / 2 + off_y * shorter)
    return Frame(
        height, width, centre, _FOV_SHARE * shorter, drawn if mirrored is None else mirrored
    )


def _second_observer(
    rng: np.random.Generator,
    vessels: list[Vessel],
    frame: Frame,
    label: NDArray[np.bool_],
    fov: NDArray[np.bool_],
) -> NDArray[np.uint8]:
    """Draw the vessels as another person would, agreeing as well as people do.

    Thin branches are dropped, the rest is moved by a fraction of a pixel, and the walls are set
    where the Dice with `label` comes nearest to a value drawn between 0.77 and 0.81.
    """
    kept = [vessel for vessel in vessels if vessel.order == 0 or not _missed(rng, vessel)]
    shift_px = float(rng.uniform(0.15, 0.35)) * frame.scale
    distance = rasterise(kept, frame, shift_px).distance
    target = float(rng.uniform(0.77, 0.81))
    best, best_error = label, float("inf")
    for wall in np.linspace(0, frame.margin_px, 40, endpoint=False):
        drawn = (distance <= wall) & fov
        dice = 2 * float((drawn & label).sum()) / max(float(drawn.sum() + label.sum()), 1.0)
        if abs(dice - target) < best_error:
            best, best_error = drawn, abs(dice - target)
    return best.astype(np.uint8)


def _missed(rng: np.random.Generator, vessel: Vessel) -> bool:
    """Decide whether an observer overlooks a vessel: the thinner, the likelier."""
    return bool(rng.random() < np.clip(0.75 - 110 * float(vessel.radius.mean()), 0, 0.5))


def _image_seed(seed: int, split: str, index: int) -> int:
    """Return the seed of one image; splits never share one, whatever their sizes."""
    entropy = [seed, *split.encode("utf-8"), 256, index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _write(phantom: FundusPhantom, folder: Path, name: str) -> list[Path]:
    arrays: dict[str, NDArray[Any]] = {
        "image": phantom.image,
        "label": phantom.label * np.uint8(255),
        "fov": phantom.fov.astype(np.uint8) * np.uint8(255),
        "observer2": phantom.observer2 * np.uint8(255),
    }
    paths = [folder / kind / name for kind in arrays]
    for path, array in zip(paths, arrays.values(), strict=True):
        write_png(path, array)
    return paths
