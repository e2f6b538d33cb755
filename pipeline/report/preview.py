"""What training makes of data: image, label and augmented variants for a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import read_image
from pipeline.data.preview import label_overlay
from pipeline.data.samples import Sample

__all__ = ["preview_rows"]

TILE_PX = 256  # a smaller crop is enlarged to about this


def preview_rows(
    samples: Iterable[Sample], transform: Callable[[Any], Any] | None = None, variants: int = 3
) -> list[dict[str, NDArray[Any]]]:
    """Return one row per sample: `image`, `label` over it, and `variant 1` and so on.

    Args:
        samples: whose files are read.
        transform: a bundle's training transform, from paths to `image` `(C, H, W)` and `label`; it
            is called anew for every variant.
        variants: how many.
    """
    rows = []
    for sample in samples:
        image = read_image(sample.image)
        row: dict[str, NDArray[Any]] = {"image": image}
        if sample.label is not None:
            row["label"] = _labelled(image, read_image(sample.label))
        if transform is not None:
            paths = {role: str(path) for role, path in sample.roles.items()}
            paths["name"] = sample.relative.as_posix()
            for index in range(variants):
                row[f"variant {index + 1}"] = _variant(transform(dict(paths)))
        rows.append(row)
    return rows


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
