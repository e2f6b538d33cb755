"""Photographs of insects drawn from a seed, with their classes.

They stand in for real data where there is none: in the demonstration, the tests and the benchmarks.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.classification.phantom_render import photograph
from pipeline.classification.phantom_traits import MOST_CLASSES, traits_of
from pipeline.data.atomic import write_bytes, write_text
from pipeline.data.phantom_folders import draw_folder
from pipeline.errors import ConfigurationError

__all__ = ["InsectPhantom", "class_sizes", "insect_phantom", "write_phantom_dataset"]

Layout = Literal["ip102", "folders"]

SMALLEST_SIDE_PX = 32
SPLITS = ("train", "val", "test")
DEFAULT_COUNTS: Mapping[str, int] = {"train": 480, "val": 120, "test": 120}

_VERSION = 1  # of the drawings; a new one makes write_phantom_dataset draw again
_MOST_IMAGES = 100_000  # five digits, as IP102 names them
_QUALITY = 92
_PATTERNS = [
    f"images/{'[0-9]' * 5}.jpg",
    "classes.txt",
    *(f"{split}.txt" for split in SPLITS),
    *(f"{split}/*/phantom_[0-9]*.jpg" for split in SPLITS),
]


@dataclass(frozen=True)
class InsectPhantom:
    """A drawn insect.

    Args:
        image: `(H, W, 3)`, red, green, blue.
        label: its class.
        name: of the class, such as `blue banded moth`.
    """

    image: NDArray[np.uint8]
    label: int
    name: str


def insect_phantom(seed: int, label: int, size_px: int = 128) -> InsectPhantom:
    """Draw one insect; the same arguments give the same picture everywhere.

    Its class is in build, pattern, colour and length of legs. Pose, size, light, what it sits on,
    what covers it, sharpness and grain come from the seed.

    Args:
        seed: not negative.
        label: 0 or more; there are 640 classes.
        size_px: height and width, 32 or more.

    Raises:
        ConfigurationError: an argument is out of range.
    """
    if size_px < SMALLEST_SIDE_PX or seed < 0:
        raise ConfigurationError(
            f"insect phantom of {size_px} pixels and seed {seed}; expected {SMALLEST_SIDE_PX} "
            "pixels or more and a seed of 0 or more"
        )
    traits = traits_of(label)
    rng = np.random.Generator(np.random.PCG64([seed, label]))
    return InsectPhantom(photograph(rng, traits, size_px), label, traits.name)


def class_sizes(total: int, classes: int, imbalance: float, seed: int = 0) -> list[int]:
    """Return how many of `total` images each class gets.

    Sizes fall from class to class by one factor, from the largest to the smallest by `imbalance`,
    in an order that follows from the seed. Every class gets one image at least, so that few images
    are less unequal than asked for.

    Raises:
        ConfigurationError: fewer images than classes, or an imbalance below 1.

    Example:
        >>> sorted(class_sizes(70, 3, 4.0))
        [10, 20, 40]
    """
    if not 2 <= classes <= min(total, MOST_CLASSES) or imbalance < 1:
        raise ConfigurationError(
            f"phantom of {classes} classes, {total} images and imbalance {imbalance}; expected "
            f"2 to {MOST_CLASSES} classes, an image for each, and an imbalance of 1 or more"
        )
    falling = imbalance ** -np.linspace(0, 1, classes)
    wanted = total * falling / falling.sum()
    sizes = np.maximum(np.floor(wanted).astype(int), 1)
    left = total - int(sizes.sum())
    sizes[np.argsort(sizes - wanted, kind="stable")[: max(left, 0)]] += 1
    for _ in range(-left):  # what one image at least costs is taken from the largest
        sizes[int(np.argmax(sizes))] -= 1
    order = np.random.Generator(np.random.PCG64([seed, classes])).permutation(classes)
    return [int(size) for size in sizes[order]]


def write_phantom_dataset(
    directory: Path | str,
    counts: Mapping[str, int] = DEFAULT_COUNTS,
    classes: int = 8,
    imbalance: float = 6.0,
    size_px: int = 128,
    seed: int = 0,
    layout: Layout = "ip102",
) -> Path:
    """Write drawn insects as a data folder.

    A folder that was completed with the same settings is used as it is, one with other settings or
    an unfinished one is written again. Image `i` of a class and split is the same picture whatever
    the counts.

    Args:
        directory: the data folder; made where it is missing.
        counts: images of `train`, `val` and `test`; 0 leaves a split out.
        classes: how many; IP102 has 102.
        imbalance: images of the largest class over those of the smallest; IP102 has 80.
        size_px: height and width.
        seed: of the whole data set; not negative.
        layout: `ip102`: `images/00000.jpg`, `train.txt`, `val.txt`, `test.txt` and `classes.txt`,
            for the manifest `split_lists`; `folders`: `train/<class>/phantom_000.jpg`, for
            `image_folders`.

    Returns:
        The data folder.

    Raises:
        ConfigurationError: a setting is out of range, or the folder holds something else.
        ResourceError: the folder cannot be written.
    """
    total = sum(counts.values())
    fits = set(counts) <= set(SPLITS) and min(counts.values(), default=-1) >= 0
    if not fits or seed < 0 or not 0 < total <= _MOST_IMAGES or layout not in get_args(Layout):
        raise ConfigurationError(
            f"phantom data set of layout {layout!r}, seed {seed} and counts {dict(counts)}; "
            f"expected {' or '.join(get_args(Layout))}, a seed of 0 or more, and up to "
            f"{_MOST_IMAGES} images of {', '.join(SPLITS)}"
        )
    sizes = {
        split: class_sizes(counts[split], classes, imbalance, seed)
        for split in SPLITS
        if counts.get(split)
    }
    settings = {
        "version": _VERSION,
        "counts": {split: int(number) for split, number in counts.items()},
        "classes": int(classes),
        "imbalance": float(imbalance),
        "size_px": int(size_px),
        "seed": int(seed),
        "layout": layout,
    }

    def draw(root: Path) -> Iterator[Path]:
        lists: dict[str, list[str]] = {split: [] for split in sizes}
        planned = [(k, s, i) for k in range(classes) for s in sizes for i in range(sizes[s][k])]
        for number, (label, split, index) in enumerate(planned):
            phantom = insect_phantom(_image_seed(seed, split, index), label, size_px)
            if layout == "ip102":
                lists[split].append(f"{number:05d}.jpg {label}\n")
                path = root / "images" / f"{number:05d}.jpg"
            else:
                path = root / split / phantom.name.replace(" ", "_") / f"phantom_{index:03d}.jpg"
            yield _write_jpeg(path, phantom.image)
        if layout == "ip102":
            names = [f"{k + 1}  {traits_of(k).name}\n" for k in range(classes)]
            yield write_text(root / "classes.txt", "".join(names))
            for split, lines in lists.items():
                yield write_text(root / f"{split}.txt", "".join(lines))

    return draw_folder(directory, settings, draw, _PATTERNS)


def _image_seed(seed: int, split: str, index: int) -> int:
    """Return the seed of one image; splits never share one, whatever their sizes."""
    entropy = [seed, SPLITS.index(split), index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _write_jpeg(path: Path, image: NDArray[np.uint8]) -> Path:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=_QUALITY)
    return write_bytes(path, stream.getvalue())
