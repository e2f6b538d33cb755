"""OME-Zarr images against the rules of their version, 0.4 or 0.5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.ome_metadata import SPACE_UNITS, VERSIONS, level_paths, multiscale_of
from pipeline.data.volume_source import named_errors
from pipeline.errors import InputError

__all__ = ["validate_ome_zarr"]


def validate_ome_zarr(path: Path | str) -> None:
    """Check an OME-Zarr image against the rules of its version, 0.4 or 0.5.

    Raises:
        InputError: naming everything that breaks them.
    """
    import zarr
    from zarr.storage import LocalStore

    path = Path(path)
    with named_errors(path):
        root = zarr.open_group(LocalStore(path, read_only=True), mode="r")
        multiscale = multiscale_of(path, dict(root.attrs))
        if multiscale is None:
            raise InputError(f"{path}: no OME-Zarr image: its group has no multiscales")
        zarr_format = root.metadata.zarr_format
        problems = _metadata_problems(dict(root.attrs), zarr_format)
        axes = [axis.get("name") for axis in multiscale.get("axes", [])]
        before: tuple[int, ...] | None = None
        for name in level_paths(multiscale):
            array: Any = root.get(name)
            if not hasattr(array, "shape"):
                problems.append(f"level {name!r} is not there")
                continue
            problems += _array_problems(name, array, axes, zarr_format)
            if before is not None and any(
                new > old for new, old in zip(array.shape, before, strict=True)
            ):
                problems.append(f"level {name!r} {array.shape} is finer than the one before it")
            before = array.shape
    if problems:
        raise InputError(f"{path}: not valid OME-Zarr: {'; '.join(problems)}")


def _array_problems(name: str, array: Any, axes: list[Any], zarr_format: int) -> list[str]:
    problems = []
    if len(array.shape) != len(axes):
        problems.append(f"level {name!r} has {len(array.shape)} axes, its metadata {len(axes)}")
    if array.metadata.zarr_format != zarr_format:
        problems.append(f"level {name!r} is Zarr {array.metadata.zarr_format}, not {zarr_format}")
    elif zarr_format == 3 and list(array.metadata.dimension_names or []) != axes:
        named = array.metadata.dimension_names
        problems.append(f"level {name!r} has dimension_names {named}, expected {axes}")
    elif zarr_format == 2 and array.metadata.dimension_separator != "/":
        problems.append(f"level {name!r} separates chunk numbers by '.', expected '/'")
    return problems


def _metadata_problems(attributes: Mapping[str, Any], zarr_format: int) -> list[str]:
    """Return what in the attributes of a group breaks the rules of 0.4 or 0.5, arrays aside."""
    version = VERSIONS[zarr_format]
    holder = attributes.get("ome", {}) if zarr_format == 3 else attributes
    multiscale = holder["multiscales"][0] if holder.get("multiscales") else None
    if multiscale is None:
        return ["no multiscales"]
    problems = []
    found = (holder if zarr_format == 3 else multiscale).get("version")
    if found != version:
        problems.append(f"version {found!r}, expected {version!r} for Zarr {zarr_format}")
    axes = multiscale.get("axes", [])
    types = [axis.get("type") for axis in axes]
    order = sorted(types, key=lambda kind: {"time": 0, "space": 2}.get(kind, 1))
    if not 2 <= types.count("space") <= 3 or types != order:
        problems.append(f"axes of types {types}, expected time, channel, then 2 or 3 of space")
    if len({axis["name"] for axis in axes}) != len(axes):
        problems.append("two axes of one name")
    wrong = {axis["unit"] for axis in axes if "unit" in axis} - SPACE_UNITS
    problems += [f"unit {unit!r} is not one of OME's" for unit in sorted(wrong)]
    for dataset in multiscale.get("datasets", []):
        problems += _transform_problems(dataset, len(axes))
    return problems


def _transform_problems(dataset: Mapping[str, Any], axes: int) -> list[str]:
    """Return what is wrong with one level's transforms: a scale, then perhaps a translation."""
    transforms = dataset.get("coordinateTransformations", [])
    kinds = [transform.get("type") for transform in transforms]
    where = f"level {dataset.get('path')!r}"
    if kinds not in (["scale"], ["scale", "translation"]):
        return [f"{where}: transforms {kinds}, expected a scale, then perhaps a translation"]
    problems = []
    for kind, transform in zip(kinds, transforms, strict=True):
        values = transform.get(kind, [])
        if len(values) != axes or not all(map(math.isfinite, values)):
            problems.append(f"{where}: {kind} {values}, expected {axes} numbers")
        elif kind == "scale" and min(values) <= 0:
            problems.append(f"{where}: scale {values}, expected positive numbers")
    return problems
