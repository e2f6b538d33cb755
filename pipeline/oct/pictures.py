"""Pictures of boundaries over B-scans, and of thickness over the retina."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.writers import write_png
from pipeline.oct.prediction_rows import PredictedRows
from pipeline.oct.tables import ETDRS_RADII_MM, etdrs_grid, thickness_um
from pipeline.oct.volume import OctVolume

__all__ = [
    "LEGEND",
    "bscan_picture",
    "thickness_picture",
    "write_overlay",
    "write_thickness_picture",
]

LEGEND = "Cyan ILM, orange BM, with two sigma; magenta: the file's; red bars: columns not valid."
_ENLARGED = 2  # so that a line covers less than a pixel of the B-scan
_COLOURS = {"ILM": (0, 230, 255), "BM": (255, 190, 0)}
_TRUTH = (235, 90, 235)
_INVALID = (255, 60, 60)
_LINE_PX, _BAR_PX, _LEGEND_PX = 2.0, 6, 18
_BAND_SIGMAS = 2.0
_THICKNESS_UM = (100.0, 500.0)  # the colours' ends: what a retina can be
_SIDE_PX = 600


def bscan_picture(
    bscan: NDArray[np.generic],
    white: float,
    rows: PredictedRows,
    index: int = 0,
    truth: dict[str, NDArray[np.floating]] | None = None,
) -> NDArray[np.uint8]:
    """Return a B-scan, enlarged twice, with its boundaries drawn over it.

    A boundary lies where its row begins: between that row and the one above. The band around it is
    two sigma wide to either side. Columns that are not valid have no line but a red bar, at the top
    for ILM, at the bottom for BM; annotated rows are magenta.

    Args:
        bscan: grey values `(H, W)`.
        white: which of them is white.
        rows: predicted rows `(N, W)`.
        index: which of the N.
        truth: annotated rows `(W,)` per boundary, if any.

    Returns:
        `(2 * H + 18, 2 * W, 3)`, the legend at the bottom.
    """
    grey = np.clip(np.nan_to_num(np.asarray(bscan, np.float32)) / white, 0, 1) * 255
    drawn = np.repeat(grey.repeat(_ENLARGED, 0).repeat(_ENLARGED, 1)[..., None], 3, axis=-1)
    found = {
        "ILM": (rows.ilm_px[index], rows.ilm_sigma_px[index], rows.ilm_valid[index]),
        "BM": (rows.bm_px[index], rows.bm_sigma_px[index], rows.bm_valid[index]),
    }
    for name, (row, sigma, valid) in found.items():
        shown = np.where(valid, row, np.nan)
        _draw(
            drawn,
            shown,
            _BAND_SIGMAS * np.nan_to_num(sigma, posinf=1e6),
            _COLOURS[name],
            opacity=0.25,
        )
    for row in (truth or {}).values():
        _draw(drawn, row, np.zeros_like(row), _TRUTH)
    for name, (row, _, valid) in found.items():
        _draw(drawn, np.where(valid, row, np.nan), np.zeros(len(row)), _COLOURS[name])
        bar = slice(None, _BAR_PX) if name == "ILM" else slice(-_BAR_PX, None)
        drawn[bar, ~np.repeat(valid, _ENLARGED)] = _INVALID
    picture: NDArray[np.uint8] = drawn.round().astype(np.uint8)
    return np.concatenate([picture, _legend(picture.shape[1], bool(truth))])


def write_overlay(path: Path | str, volume: OctVolume, rows: PredictedRows, index: int = 0) -> Path:
    """Write the picture of one B-scan of a volume as PNG, with its annotated ILM and BM if any."""
    truth = {n: np.asarray(volume.layers[n][index]) for n in _COLOURS if n in volume.layers}
    bscan = volume.bscans[index]
    return write_png(path, bscan_picture(bscan, volume.white, rows, index, truth))


def thickness_picture(volume: OctVolume, thickness: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return a thickness map in colour, to scale where the scale is known.

    From 100 um (dark) to 500 um (bright); columns that are not valid are grey. The first B-scan is
    on top. Over a raster the circles of the ETDRS grid are drawn, around the centre of the scan.

    Args:
        volume: whose distances count.
        thickness: `(N, W)` in micrometres, NaN where not valid.
    """
    from matplotlib import colormaps

    low, high = _THICKNESS_UM
    coloured = colormaps["viridis"](np.clip((np.nan_to_num(thickness) - low) / (high - low), 0, 1))
    shown = (coloured[..., :3] * 255).round().astype(np.uint8)
    shown[~np.isfinite(thickness)] = 110
    count, width = thickness.shape
    size_um = (count * (volume.spacing_um or 1.0), width * (volume.scale_x_um or 1.0))
    if volume.spacing_um is None or volume.scale_x_um is None:
        size_um = (count, width)
    factor = _SIDE_PX / max(size_um)
    height_px, width_px = (max(1, round(length * factor)) for length in size_um)
    picture = Image.fromarray(shown).resize((width_px, height_px), Image.Resampling.NEAREST)
    if etdrs_grid(volume) is not None:
        _draw_circles(picture, factor * 1000)
    text = f"retinal thickness, {low:.0f} um dark to {high:.0f} um bright, grey: not valid"
    return np.concatenate([np.asarray(picture), _text_strip(width_px, [(text, (230, 230, 230))])])


def write_thickness_picture(
    path: Path | str, volume: OctVolume, rows: PredictedRows
) -> Path | None:
    """Write the thickness map of a volume as PNG; None, and no file, where there is no scale."""
    thickness = thickness_um(volume, rows)
    if thickness is None or len(thickness) < 2:
        return None
    return write_png(path, thickness_picture(volume, thickness))


def _draw(
    picture: NDArray[np.float32],
    row: NDArray[np.floating],
    half_width: NDArray[np.floating],
    colour: tuple[int, int, int],
    opacity: float = 1.0,
) -> None:
    """Blend a line, or with `half_width` (both in rows of the B-scan) a band, into the picture."""
    height = len(picture)
    centre = np.repeat(np.asarray(row, np.float64), _ENLARGED) * _ENLARGED  # the row's upper edge
    # Wider bands only look alike; the bound keeps the work small and infinity out.
    half = np.repeat(np.clip(half_width, 0, height), _ENLARGED) * _ENLARGED
    half = np.maximum(half, _LINE_PX / 2) if opacity == 1.0 else half
    upper, lower = centre - half, centre + half
    if not np.isfinite(upper).any():
        return
    first = int(np.clip(np.nanmin(upper), 0, height))
    last = int(np.clip(np.nanmax(lower) + 1, first, height))
    edges = np.arange(first, last)[:, None]
    overlap = np.minimum(edges + 1, lower) - np.maximum(edges, upper)
    cover = opacity * np.nan_to_num(np.clip(overlap, 0, 1))[..., None]
    part = picture[first:last]
    part += cover * (np.array(colour, np.float32) - part)


def _draw_circles(picture: Image.Image, px_per_mm: float) -> None:
    draw = ImageDraw.Draw(picture)
    x, y = (picture.width - 1) / 2, (picture.height - 1) / 2
    for radius_mm in ETDRS_RADII_MM:
        radius = radius_mm * px_per_mm
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=(255, 255, 255))
    inner, outer = (r * px_per_mm / math.sqrt(2) for r in ETDRS_RADII_MM[::2])
    for right, down in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        ends = (x + right * inner, y + down * inner, x + right * outer, y + down * outer)
        draw.line(ends, fill=(255, 255, 255))


def _legend(width: int, has_truth: bool) -> NDArray[np.uint8]:
    parts = list(_COLOURS.items())
    parts += [(f"band: {_BAND_SIGMAS:.0f} sigma", (200, 200, 200))]
    parts += [("rows of the file", _TRUTH)] if has_truth else []
    return _text_strip(width, [*parts, ("not valid (top ILM, bottom BM)", _INVALID)])


def _text_strip(width: int, parts: list[tuple[str, tuple[int, int, int]]]) -> NDArray[np.uint8]:
    strip = Image.new("RGB", (width, _LEGEND_PX), (24, 24, 24))
    draw, font, x = ImageDraw.Draw(strip), ImageFont.load_default(), 6.0
    for text, colour in parts:
        draw.text((x, 3), text, fill=colour, font=font)
        x += draw.textlength(text, font=font) + 14
    return np.asarray(strip)
