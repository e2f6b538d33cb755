"""The distance between the voxels of a TIFF stack, as OME, ImageJ and this package write it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import tifffile

from pipeline.data.ome_tiff import OME_UNITS
from pipeline.data.volume_source import Spacing

__all__ = ["tiff_spacing"]

_UNITS = {
    **{name: name for name in OME_UNITS},
    **{short: name for name, short in OME_UNITS.items()},
    **dict.fromkeys(("um", "micron", "microns"), "micrometer"),
}
_DAMAGED = (
    ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


def tiff_spacing(tiff: tifffile.TiffFile) -> tuple[Spacing | None, str | None]:
    """Return the distances along `(D, H, W)` and their unit, each None where the file says none.

    A resolution alone is none: it tells nothing of the depth, and cameras write 72 dpi.

    Args:
        tiff: an open stack of gray pages.
    """
    for read in (_ome, _imagej, _ours):
        try:
            sides, unit = read(tiff)
            spacing = _spacing(sides)
        except _DAMAGED:  # metadata that nobody can read are no reason to refuse a volume
            continue
        if spacing is not None:
            return spacing, _unit(unit)
    return None, None


def _ome(tiff: tifffile.TiffFile) -> tuple[list[Any], str | None]:
    if not tiff.is_ome or tiff.ome_metadata is None:
        return [], None
    images = tifffile.xml2dict(tiff.ome_metadata).get("OME", {}).get("Image", {})
    first = images[0] if isinstance(images, list) else images
    pixels: Mapping[str, Any] = first.get("Pixels", {})
    # The schema's unit where none is written. Sides in different units are no spacing.
    units = {pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "ZYX"}
    sides = [pixels.get(f"PhysicalSize{axis}") for axis in "ZYX"]
    return (sides, str(units.pop())) if len(units) == 1 else ([], None)


def _imagej(tiff: tifffile.TiffFile) -> tuple[list[Any], str | None]:
    said = tiff.imagej_metadata or {}
    tags = tiff.pages.first.tags
    resolutions = [tags.valueof(name) for name in ("YResolution", "XResolution")]
    if "spacing" not in said or not all(resolutions):
        return [], None
    sides = [per / pixels if pixels else math.nan for pixels, per in resolutions]
    return [said["spacing"], *sides], str(said.get("unit", ""))


def _ours(tiff: tifffile.TiffFile) -> tuple[list[Any], str | None]:
    said = (tiff.shaped_metadata or ({},))[0]
    sides = said.get("spacing_zyx")
    return (sides, said.get("unit")) if isinstance(sides, list) else ([], None)


def _unit(text: Any) -> str | None:
    """Return the unit by its name in OME-Zarr, None where it is not known.

    ImageJ escapes what is not ASCII in its header, and the Greek mu looks like the sign for micro.
    """
    if not isinstance(text, str):
        return None
    plain = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    return _UNITS.get(plain.replace("\N{GREEK SMALL LETTER MU}", "\N{MICRO SIGN}"))


def _spacing(sides: Iterable[Any]) -> Spacing | None:
    """Return three positive lengths, None where they are not that."""
    numbers = [float(side) for side in sides if isinstance(side, int | float)]
    if len(numbers) != 3 or not all(math.isfinite(side) and side > 0 for side in numbers):
        return None
    return numbers[0], numbers[1], numbers[2]
