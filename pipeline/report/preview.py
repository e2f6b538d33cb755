"""What training makes of data: image, label and augmented variants for a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import read_image
from pipeline.data.preview import label_overlay
from pipeline.data.samples import Sample
from pipeline.errors import InputError, Problem

__all__ = ["preview_rows"]

Row = dict[str, NDArray[Any]]

TILE_PX = 256  # a smaller crop is enlarged to about this


def preview_rows(
    samples: Iterable[Sample],
    transform: Callable[[Any], Any] | None = None,
    variants: int = 3,
    problems: list[Problem] | None = None,
) -> list[Row]:
    """Return one row per sample: `image`, `label` over it, and `variant 1` and so on.

    Args:
        samples: whose files are read.
        transform: a bundle's training transform, from paths to `image` `(C, H, W)` and `label`; it
            is called anew for every variant.
        variants: how many.
        problems: gets what is wrong with a sample that cannot be read, which then has no row.

    Raises:
        InputError: a sample cannot be read and `problems` is not given.
    """
    rows = []
    for sample in samples:
        try:
            rows.append(_row(sample, transform, variants))
        except InputError as error:
            if problems is None:
                raise
            problems.append(Problem(sample.relative.as_posix(), "read", str(error)))
    return rows


def _row(sample: Sample, transform: Callable[[Any], Any] | None, variants: int) -> Row:
    image = read_image(sample.image)
    row: Row = {"image": image}
    if sample.label is not None:
        row["label"] = _labelled(image, read_image(sample.label))
    if transform is not None:
        paths = {role: str(path) for role, path in sample.roles.items()}
        paths["name"] = sample.relative.as_posix()
        for index in range(variants):
            row[f"variant {index + 1}"] = _variant(transform(dict(paths)))
    return row


def _labelled(image: NDArray[Any], label: NDArray[Any]) -> NDArray[Any]:
    """Return the label in colour over its image; alone where the sizes differ."""
    flat = label.max(axis=-1) if label.ndim == 3 else label
    return label_overlay(image, flat) if flat.shape == image.shape[:2] else label


def _variant(case: Any) -> NDArray[Any]:
    """Return a transformed case as a picture; of several crops the first."""
    first = case[0] if isinstance(case, list) else case
    picture: NDArray[Any] = np.moveaxis(np.asarray(first["image"]), 0, -1)
    if first.get("label") is not None:  # values other than 1 may mean: ignore
        picture = label_overlay(picture, np.asarray(first["label"])[0] == 1)
    times = max(1, TILE_PX // max(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)
