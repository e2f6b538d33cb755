"""Stored label values to classes, refusing what the manifest does not expect."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import read_image
from pipeline.errors import ConfigurationError, InputError

__all__ = ["label_classes", "label_plane", "read_label", "read_mask"]

_COMPARISONS = {">=": operator.ge, "==": operator.eq, ">": operator.gt}
_LARGEST_CODE = 15  # class ids stay below, gray levels of a compressed mask do not
_NEARLY = 32  # how far compression moves 0 and 255
_MOSTLY = 0.99
AUTO: Mapping[str, Any] = {"foreground": "auto", "allowed": None}


def read_label(path: Path | str, labels: Mapping[str, Any] = AUTO) -> NDArray[np.uint8]:
    """Return the classes `(H, W)` stored in the label file `path`.

    Args:
        path: an image file.
        labels: `foreground` rule and `allowed` values of a manifest.

    Raises:
        InputError: it cannot be read or holds values that are not allowed.
    """
    return label_classes(read_image(path), labels, path)


def read_mask(path: Path | str) -> NDArray[np.bool_]:
    """Return a mask such as a field of view `(H, W)`; 0/1, 0/255, gray or RGB by its values."""
    return read_label(path).astype(bool)


def label_plane(array: NDArray[Any], path: Path | str) -> NDArray[Any]:
    """Return the one plane of a label: alpha is dropped, of colours the brightest counts.

    Raises:
        InputError: `array` is not `(H, W)` or `(H, W, 1..4)`.
    """
    if array.ndim == 3 and array.shape[-1] <= 4:
        channels = array.shape[-1]
        return np.asarray(array[..., : channels - 1 if channels in (2, 4) else channels].max(-1))
    if array.ndim != 2:
        raise InputError(f"{path}: label of shape {array.shape}, expected (H, W)")
    return array


def label_classes(
    array: NDArray[Any], labels: Mapping[str, Any], path: Path | str
) -> NDArray[np.uint8]:
    """Return `array` as class ids by the rule of a manifest.

    Args:
        array: stored values `(H, W)` or with channels.
        labels: `foreground`: `> 127` and the like give 0 and 1, `auto` chooses by the values,
            a mapping gives stored value -> class; `allowed`: values that may occur, or None.
        path: for messages.

    Raises:
        InputError: a value is not allowed or has no class.
        ConfigurationError: the rule cannot be read.
    """
    plane = label_plane(array, path)
    found = np.unique(plane)
    rule, allowed = labels["foreground"], labels.get("allowed")
    _check_allowed(found, allowed, path)
    if isinstance(rule, Mapping):
        return _mapped(plane, found, rule, path)
    if rule == "auto":
        rule = _guess_rule(plane, found, path)
    compare, threshold = _parse(rule)
    if compare is operator.gt and threshold >= 1 and 0 < found[-1] <= threshold:
        raise InputError(
            f"{path}: labels {_listed(found)} are all background by the rule {rule!r}; "
            "if everything above 0 is foreground, write labels.foreground: '> 0'"
        )
    return np.asarray(compare(plane, threshold), dtype=np.uint8)


def _check_allowed(found: NDArray[Any], allowed: list[int] | None, path: Path | str) -> None:
    unknown = [value for value in found.tolist() if allowed is not None and value not in allowed]
    if not unknown:
        return
    values = set(found.tolist())
    hint = "correct the labels or the manifest"
    if values <= {0, 1}:
        hint = "a mask of 0/1: write labels.foreground: '> 0' and labels.allowed: [0, 1]"
    elif values <= {0, 255}:
        hint = "a mask of 0/255: write labels.foreground: '> 127' and labels.allowed: [0, 255]"
    elif len(found) > 16:
        hint = "many grays, as JPEG or resizing leave them: save the mask as PNG, unscaled"
    raise InputError(
        f"{path}: label values {_listed(np.asarray(unknown))} found, {allowed} allowed; {hint}"
    )


def _mapped(
    plane: NDArray[Any], found: NDArray[Any], rule: Mapping[Any, int], path: Path | str
) -> NDArray[np.uint8]:
    classes = {int(value): int(number) for value, number in rule.items()}
    unknown = [value for value in found.tolist() if value not in classes]
    if unknown:
        raise InputError(
            f"{path}: label values {_listed(np.asarray(unknown))} have no class, "
            f"{sorted(classes)} have; correct the labels or labels.foreground"
        )
    result = np.zeros(plane.shape, dtype=np.uint8)
    for value, number in classes.items():
        result[plane == value] = number
    return result


def _guess_rule(plane: NDArray[Any], found: NDArray[Any], path: Path | str) -> str:
    """Return the rule that the values speak for: codes, a plain mask or a compressed one."""
    if found[-1] <= _LARGEST_CODE:
        return "> 0"
    largest = 65535 if found[-1] > 255 else 255
    near = (plane <= _NEARLY) | (plane >= largest - _NEARLY)
    if float(near.mean()) >= _MOSTLY:
        return f"> {largest // 2}"
    raise InputError(
        f"{path}: values {_listed(found)} are no mask and no class ids; "
        "expected 0/1, 0/255 or small codes (is this the image itself?)"
    )


def _parse(rule: object) -> tuple[Any, int]:
    text = str(rule).strip()
    for sign, compare in _COMPARISONS.items():
        number = text.removeprefix(sign).strip()
        if text.startswith(sign) and number.isdigit():
            return compare, int(number)
    raise ConfigurationError(
        f"labels.foreground: {rule!r} is no rule, expected such as '> 127', '> 0', 'auto' "
        "or a mapping from stored value to class"
    )


def _listed(values: NDArray[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:8].tolist())
    return f"{{{shown}{', ...' if len(values) > 8 else ''}}}"
