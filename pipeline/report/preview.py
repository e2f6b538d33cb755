"""What training makes of data: image, label and augmented variants for a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import read_image
from pipeline.data.samples import Sample

__all__ = ["overlay", "preview_rows"]

COLOUR = np.array(
    [0, 255, 140], dtype=np.float32
)  # not found in tissue, and seen by colour-blind eyes too
STRENGTH = 0.6


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
        image = displayed(read_image(sample.image))
        row: dict[str, NDArray[Any]] = {"image": image}
        if sample.label is not None:
            row["label"] = overlay(image, read_image(sample.label) > 0)
        if transform is not None:
            paths = {role: str(path) for role, path in sample.roles.items()}
            for index in range(variants):
                row[f"variant {index + 1}"] = _variant(transform(dict(paths)))
        rows.append(row)
    return rows


def displayed(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Return `(H, W)` or `(H, W, C)` values of any range as RGB `(H, W, 3)`."""
    planes = image if image.ndim == 3 else image[..., None]
    planes = planes[..., :3] if planes.shape[-1] >= 3 else np.repeat(planes[..., :1], 3, axis=-1)
    if planes.dtype == np.uint8:
        return np.ascontiguousarray(planes)
    low, high = float(planes.min()), float(planes.max())
    scaled = (planes.astype(np.float32) - low) / (high - low or 1.0)
    return (scaled * 255).astype(np.uint8)


def overlay(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return RGB `image` with `mask` tinted; a mask of another size is left out."""
    inside = mask.any(axis=-1) if mask.ndim == 3 else mask
    if inside.shape != image.shape[:2]:
        return image
    tinted = image.astype(np.float32)
    tinted[inside] = (1 - STRENGTH) * tinted[inside] + STRENGTH * COLOUR
    return tinted.astype(np.uint8)


def _variant(case: Any) -> NDArray[np.uint8]:
    """Return a transformed case as a picture; of several crops the first."""
    first = case[0] if isinstance(case, list) else case
    image = displayed(np.moveaxis(np.asarray(first["image"]), 0, -1))
    if first.get("label") is None:
        return image
    return overlay(image, np.asarray(first["label"])[0] == 1)  # other values may mean: ignore
