"""The `multiscales` metadata of OME-Zarr 0.4 (Zarr 2) and 0.5 (Zarr 3), for space and channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.volume_source import Spacing
from pipeline.errors import InputError

__all__ = [
    "SPACE_UNITS",
    "VERSIONS",
    "first_level",
    "level_geometry",
    "level_paths",
    "level_transforms",
    "multiscale_of",
    "root_attributes",
    "with_level",
]

VERSIONS = {2: "0.4", 3: "0.5"}  # by the version of Zarr
SPACE_UNITS = frozenset({
    "angstrom", "attometer", "centimeter", "decimeter", "exameter", "femtometer", "foot",
    "gigameter", "hectometer", "inch", "kilometer", "megameter", "meter", "micrometer",
    "mile", "millimeter", "nanometer", "parsec", "petameter", "picometer", "terameter",
    "yard", "yoctometer", "yottameter", "zeptometer", "zettameter"
})  # fmt: skip
_TYPES = {"z": "space", "y": "space", "x": "space", "c": "channel"}


def first_level(name: str, axes: str, spacing: Spacing | None, unit: str | None) -> dict[str, Any]:
    """Return a multiscale with level `0` alone.

    Args:
        name: of the image.
        axes: `zyx` or `czyx`.
        spacing: `(z, y, x)`; None where it is unknown: scales of 1 without a unit.
        unit: of the spacing.
    """
    described: list[dict[str, str]] = []
    for axis in axes:
        known = {"unit": unit} if unit and spacing and _TYPES[axis] == "space" else {}
        described.append({"name": axis, "type": _TYPES[axis], **known})
    scale = [1.0] * (len(axes) - 3) + [float(one) for one in spacing or (1, 1, 1)]
    return {"name": name, "axes": described, "datasets": [_dataset("0", scale, None)]}


def with_level(
    multiscale: Mapping[str, Any], name: str, factors: Sequence[int], method: str
) -> dict[str, Any]:
    """Return `multiscale` with a level more, coarser than its last one.

    A coarse voxel stands in the middle of those it was made of, which is why it is moved by half
    of what it grew.

    Args:
        multiscale: the levels so far.
        name: of the new array.
        factors: by which each axis became coarser.
        method: how, for the reader of the metadata.
    """
    scale, translation = level_transforms(multiscale["datasets"][-1], len(factors))
    moved = [
        t + s * (factor - 1) / 2 for t, s, factor in zip(translation, scale, factors, strict=True)
    ]
    coarser = [s * factor for s, factor in zip(scale, factors, strict=True)]
    levels = [*multiscale["datasets"], _dataset(name, coarser, moved)]
    return {**multiscale, "type": method, "datasets": levels}


def root_attributes(multiscale: Mapping[str, Any], zarr_format: int) -> dict[str, Any]:
    """Return the attributes of the group that say what is in it."""
    version = VERSIONS[zarr_format]
    if zarr_format == 2:
        return {"multiscales": [{**multiscale, "version": version}]}
    return {"ome": {"version": version, "multiscales": [dict(multiscale)]}}


def multiscale_of(path: Path, attributes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the first multiscale in the attributes of a group, None where there is none.

    Raises:
        InputError: it is not what 0.4 and 0.5 describe.
    """
    ome = attributes.get("ome")
    found = (ome if isinstance(ome, dict) else attributes).get("multiscales")
    if not found:
        return None
    first = found[0] if isinstance(found, list) else None
    datasets = first.get("datasets") if isinstance(first, dict) else None
    if not isinstance(datasets, list) or not datasets or not all(map(_is_dataset, datasets)):
        raise InputError(f"{path}: multiscales without datasets that have paths; see OME-Zarr 0.5")
    return dict(first) if isinstance(first, dict) else None


def level_paths(multiscale: Mapping[str, Any]) -> list[str]:
    """Return the names of the levels, the finest one first."""
    return [str(dataset["path"]) for dataset in multiscale["datasets"]]


def level_geometry(
    path: Path, multiscale: Mapping[str, Any], name: str, shape: Sequence[int]
) -> tuple[Spacing | None, str | None]:
    """Return spacing and unit of the level `name` with `shape`; None where they are not stored.

    Raises:
        InputError: the axes are not z, y, x at the end, or there are moments before them.
    """
    axes = multiscale.get("axes")
    if not isinstance(axes, list) or not all(isinstance(axis, dict) for axis in axes):
        return None, None  # versions before 0.4
    names = [axis.get("name") for axis in axes]
    times = [
        length
        for axis, length in zip(axes, shape, strict=False)
        if axis.get("type") == "time" and length > 1
    ]
    if len(axes) != len(shape) or names[-3:] != ["z", "y", "x"] or times:
        raise InputError(
            f"{path}: axes {names} with shape {tuple(shape)}, "
            "expected z, y, x, with nothing but channels before them"
        )
    dataset = multiscale["datasets"][level_paths(multiscale).index(name)]
    scale, _ = level_transforms(dataset, len(axes))
    whole, _ = level_transforms(multiscale, len(axes))
    z, y, x = (a * b for a, b in zip(scale[-3:], whole[-3:], strict=True))
    units = {axis.get("unit") for axis in axes[-3:]}
    unit = units.pop() if len(units) == 1 else None
    return (z, y, x), unit if isinstance(unit, str) else None


def level_transforms(owner: Mapping[str, Any], count: int) -> tuple[list[float], list[float]]:
    """Return scale and translation of `count` axes; 1 and 0 where they are not given."""
    scale, translation = [1.0] * count, [0.0] * count
    for transform in owner.get("coordinateTransformations") or []:
        if "scale" in transform:
            scale = [float(one) for one in transform["scale"]]
        if "translation" in transform:
            translation = [float(one) for one in transform["translation"]]
    return scale, translation


def _is_dataset(dataset: object) -> bool:
    return isinstance(dataset, dict) and isinstance(dataset.get("path"), str)


def _dataset(name: str, scale: list[float], translation: list[float] | None) -> dict[str, Any]:
    transforms: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
    if translation is not None:
        transforms.append({"type": "translation", "translation": translation})
    return {"path": name, "coordinateTransformations": transforms}
