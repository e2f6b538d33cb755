"""Values as a person reads them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["finite", "format_duration", "format_time", "format_value"]


def format_value(value: Any) -> str:
    """Return `value` as a person reads it: four significant digits, a dash where there is none.

    Example:
        >>> [format_value(value) for value in (0.81234567, 1e-5, 12, None, float("nan"), True)]
        ['0.8123', '1e-05', '12', '-', '-', 'yes']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(format_value(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items())
    return str(value)


def format_duration(seconds: float) -> str:
    """Return a time span in the units that a person would use.

    Example:
        >>> [format_duration(value) for value in (0.346, 13.5, 119.7, 3725)]
        ['0.35 s', '14 s', '2 min', '1 h 2 min']
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def format_time(text: Any) -> str | None:
    """Return a moment in ISO 8601 as date and time, another text as it is, None where empty.

    Example:
        >>> format_time("2026-11-21T11:21:02+00:00")
        '2026-11-21 11:21 UTC'
    """
    try:
        moment = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return str(text) if text else None
    zone = moment.strftime("%Z")
    return f"{moment:%Y-%m-%d %H:%M} {zone}".rstrip()


def finite(value: Any) -> float | None:
    """Return a finite number as float, None for anything else; yes and no are no numbers.

    Example:
        >>> [finite(value) for value in (2, float("inf"), True, "3")]
        [2.0, None, None, None]
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None
