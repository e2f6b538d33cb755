"""A contact sheet: what training will see, one row per case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.writers import write_png

__all__ = ["contact_sheet", "label_overlay"]

_GAP_PX = 6
_TITLE_PX = 18
_BACKGROUND = (24, 24, 24)
_INK = (230, 230, 230)
_COLOUR = (0, 200, 255)  # seen on orange retina and on gray alike


def contact_sheet(
    rows: Sequence[Mapping[str, NDArray[Any]]], path: Path | str, *, tile_px: int = 256
) -> Path:
    """Write a PNG with one row per case and one titled tile per picture.

    Args:
        rows: title -> picture; `(H, W)`, `(H, W, 3 or 4)` or `(3 or 1, H, W)`, integers or floats.
            The titles of the first row stand on top, so rows should share them.
        path: the PNG.
        tile_px: longest side of a tile.

    Returns:
        The path.

    Raises:
        ValueError: there is no picture, or one of another shape.
    """
    if not any(rows):
        raise ValueError("rows must hold at least one picture, got none")
    columns = max(len(row) for row in rows)
    step = tile_px + _GAP_PX
    sheet = Image.new(
        "RGB", (columns * step + _GAP_PX, len(rows) * step + _GAP_PX + _TITLE_PX), _BACKGROUND
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for column, title in enumerate(next(row for row in rows if row)):
        draw.text((_GAP_PX + column * step, 3), title, fill=_INK, font=font)
    for row_number, row in enumerate(rows):
        for column, picture in enumerate(row.values()):
            tile = Image.fromarray(_shown(picture))
            tile.thumbnail((tile_px, tile_px), Image.Resampling.BILINEAR)
            sheet.paste(tile, (_GAP_PX + column * step, _TITLE_PX + _GAP_PX + row_number * step))
    return write_png(path, np.asarray(sheet))


def label_overlay(
    image: NDArray[Any], label: NDArray[Any], *, opacity: float = 0.6
) -> NDArray[np.uint8]:
    """Return `image` as `(H, W, 3)` with the foreground of `label` `(H, W)` in colour.

    Raises:
        ValueError: the sizes differ.
    """
    shown = _shown(image).astype(np.float32)
    if label.shape != shown.shape[:2]:
        raise ValueError(f"label is {label.shape}, its image {shown.shape[:2]}")
    mask = label > 0
    colour = np.asarray(_COLOUR, dtype=np.float32)
    shown[mask] = (1 - opacity) * shown[mask] + opacity * colour
    return shown.round().astype(np.uint8)


def _shown(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """Return any picture as RGB of 8 bits; other types are stretched to their own range."""
    array = np.asarray(picture)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise ValueError(f"a picture must be (H, W) or have 1, 3 or 4 channels, got {array.shape}")
    array = array[..., :3]
    if array.dtype != np.uint8:
        array = _stretched(array)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _stretched(array: NDArray[Any]) -> NDArray[np.uint8]:
    values = np.nan_to_num(array.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    scale = 255.0 / (high - low) if high > low else 0.0
    return np.asarray(((values - low) * scale).round(), dtype=np.uint8)
