"""Pictures of a classifier's work: the confusion matrix, and single images with what was said."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.atomic import write_bytes

__all__ = ["captioned_image", "write_confusion_picture"]

_SIDE_PX = 256
_LINE_PX = 18
_GREEN, _RED, _GREY = (120, 220, 130), (255, 110, 100), (210, 210, 210)
_LONGEST_NAME = 32
_MOST_NUMBERED = 20  # classes up to which each cell says its number


def captioned_image(
    image: NDArray[Any], truth: str, predicted: str, correct: bool
) -> NDArray[np.uint8]:
    """Return an image with two lines below it.

    Args:
        image: `(C, H, W)` as the network saw it; its lowest value becomes black, its highest white.
        truth: what it shows.
        predicted: what was said; green where `correct`, red elsewhere.
        correct: whether they agree.

    Returns:
        `(H', W', 3)`: the longer side of the image 256 px, the lines in a strip of 36 px.
    """
    grey = np.asarray(image, np.float32)
    grey = grey[:3] if len(grey) >= 3 else np.repeat(grey[:1], 3, axis=0)
    low, high = float(grey.min()), float(grey.max())
    levels = ((grey - low) / (high - low or 1.0) * 255).round().astype(np.uint8)
    shown = Image.fromarray(np.ascontiguousarray(np.moveaxis(levels, 0, -1)))
    factor = _SIDE_PX / max(shown.size)
    size = (max(1, round(shown.width * factor)), max(1, round(shown.height * factor)))
    shown = shown.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX)
    picture = Image.new("RGB", (_SIDE_PX, size[1] + 2 * _LINE_PX), (24, 24, 24))
    picture.paste(shown, ((_SIDE_PX - size[0]) // 2, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default()
    lines = ((truth, _GREY), (predicted, _GREEN if correct else _RED))
    for number, (text, colour) in enumerate(lines):
        while len(text) > 1 and draw.textlength(text, font=font) > _SIDE_PX - 8:
            text = text.removesuffix("...")[:-1] + "..."
        draw.text((4, size[1] + number * _LINE_PX + 3), text, fill=colour, font=font)
    return np.asarray(picture)


def write_confusion_picture(
    path: Path | str, confusion: NDArray[Any], class_names: Sequence[str]
) -> Path:
    """Write a confusion matrix as PNG.

    The colour is the share of the truth's images, so that rare classes are seen; classes without an
    image are grey. Up to 20 classes each cell says its number of images. The picture grows with the
    number of classes, so that every name can be read.

    Args:
        path: the file.
        confusion: `(K, K)`, truth along the rows.
        class_names: of all K.

    Returns:
        The path.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    matrix = np.asarray(confusion, np.float64)
    support = matrix.sum(axis=1, keepdims=True)
    shares = np.full_like(matrix, np.nan)
    np.divide(matrix, support, out=shares, where=support > 0)
    classes = len(matrix)
    numbered = classes <= _MOST_NUMBERED
    side_in = max(3.0, (0.6 if numbered else 0.14) * classes)
    figure = Figure(figsize=(side_in + 2.5, side_in + 2.0), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["viridis"].with_extremes(bad="0.85")
    shown = axes.imshow(shares, cmap=colours, vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, shrink=0.7, label="share of the truth's images")
    # A dollar sign would begin a formula.
    names = [_short(name).replace("$", r"\$") for name in class_names]
    size_pt = 9 if numbered else 6
    axes.set_xticks(range(classes), names, rotation=90, fontsize=size_pt)
    axes.set_yticks(range(classes), names, fontsize=size_pt)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    if numbered:
        for (row, column), count in np.ndenumerate(matrix):
            dark = not shares[row, column] > 0.6
            colour = "white" if dark and support[row, 0] > 0 else "black"
            axes.text(column, row, f"{count:g}", ha="center", va="center", color=colour, fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return write_bytes(path, stream.getvalue())


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."
