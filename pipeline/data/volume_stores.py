"""Volumes in chunked stores: Zarr with or without OME metadata, HDF5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.budget import check_decoded_bytes
from pipeline.data.ome_metadata import level_geometry, level_paths, multiscale_of
from pipeline.data.volume_source import Source, Spacing, array_source, header_of, is_volume
from pipeline.errors import InputError

__all__ = ["open_hdf5", "open_zarr"]

_SHOWN = 8
_SPACING_ATTRIBUTE = "element_size_um"  # as ilastik and Fiji write it, z, y, x


def open_zarr(path: Path, key: str | None = None) -> Source:
    """Open an array of the Zarr folder `path`, version 2 or 3.

    Args:
        path: an array, or a group.
        key: an array in the group, or a group in it; by default the finest level of an OME group,
            else the only volume in the group.

    Raises:
        InputError: no such array, several, or one that is no volume.
    """
    import zarr
    from zarr.storage import LocalStore

    # A store and not a string, which zarr would also take for an address.
    node = zarr.open(LocalStore(path, read_only=True), mode="r")
    spacing: Spacing | None = None
    unit: str | None = None
    if isinstance(node, zarr.Array):
        if key is not None:
            raise InputError(f"{path}: is an array, so key {key!r} names nothing; leave it out")
        array = node
    else:
        array, group, name = _zarr_array(path, node, key)
        multiscale = multiscale_of(path, dict(group.attrs))
        if multiscale is not None and name in level_paths(multiscale):
            spacing, unit = level_geometry(path, multiscale, name, array.shape)
    header = header_of(
        path, array.shape, array.dtype, chunks=array.chunks, spacing=spacing, unit=unit
    )
    # With the axes before the spatial ones, and whatever the array's own shape.
    check_decoded_bytes(f"{path}: a chunk", array.chunks, header.dtype.itemsize)
    return array_source(array, header)


def _zarr_array(path: Path, root: Any, key: str | None) -> tuple[Any, Any, str]:
    """Return the array that is meant, its group, and its name there."""
    import zarr

    group, name = root, ""
    if key is not None:
        outer, _, name = key.strip("/").rpartition("/")
        group = root.get(outer) if outer else root
        node = group.get(name) if isinstance(group, zarr.Group) else None
        if node is None:
            raise InputError(f"{path}: no array {key!r}; {_zarr_listing(root)}")
        if isinstance(node, zarr.Array):
            return node, group, name
        group = node
    multiscale = multiscale_of(path, dict(group.attrs))
    if multiscale is not None:
        name = level_paths(multiscale)[0]
        try:
            return group[name], group, name
        except KeyError as error:
            raise InputError(f"{path}: its metadata name level {name!r}, not found") from error
    volumes = [one for one, array in group.arrays() if is_volume(array.shape, array.dtype)]
    if len(volumes) != 1:
        raise InputError(f"{path}: a group without one volume; {_zarr_listing(group)}")
    return group[volumes[0]], group, volumes[0]


def _zarr_listing(group: Any) -> str:
    members = {name: getattr(member, "shape", None) for name, member in group.members()}
    return _listing(dict(sorted(members.items())))


def _listing(shapes: Mapping[str, tuple[int, ...] | None]) -> str:
    """Return what there is to choose from: arrays with their shape, groups with a slash."""
    names = [f"{name}/" if shape is None else f"{name} {shape}" for name, shape in shapes.items()]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    found = ", ".join(names[:_SHOWN]) + more if names else "nothing"
    return f"found {found}; name one with key"


def open_hdf5(path: Path, key: str | None = None) -> Source:
    """Open a dataset of the HDF5 file `path`.

    Args:
        path: the file.
        key: the dataset; by default the only 3-D one, else the only 4-D one.

    Raises:
        InputError: no such dataset, several, one that is no volume, or one whose data would come
            from elsewhere: soft and external links, external and virtual storage.
    """
    import h5py

    file = h5py.File(path, "r")
    try:
        dataset = file[_only_dataset(path, file)] if key is None else _dataset(path, file, key)
        if dataset.external or dataset.is_virtual:
            raise InputError(f"{path}: {dataset.name} has its data in other files; copy them in")
        spacing = _hdf5_spacing(dataset)
        header = header_of(
            path,
            dataset.shape,
            dataset.dtype,
            chunks=dataset.chunks,
            spacing=spacing,
            unit=None if spacing is None else "micrometer",
        )
        if dataset.chunks is not None:
            check_decoded_bytes(f"{path}: a chunk", dataset.chunks, header.dtype.itemsize)
        return array_source(dataset, header, file.close)
    except BaseException:
        file.close()
        raise


def _only_dataset(path: Path, file: Any) -> str:
    """Return the name of the volume in a file that holds one; links are not followed."""
    found = _hdf5_volumes(file)
    for axes in (3, 4):
        names = [name for name, shape in found.items() if len(shape) == axes]
        if len(names) == 1:
            return names[0]
        if names:
            break
    raise InputError(f"{path}: HDF5 without one volume; {_listing(found)}")


def _hdf5_volumes(file: Any) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}

    def visit(name: str, node: Any) -> None:
        shape = getattr(node, "shape", None)  # None for groups and for empty datasets
        if shape is not None and is_volume(shape, node.dtype):
            found[name] = shape

    file.visititems(visit)
    return found


def _dataset(path: Path, file: Any, key: str) -> Any:
    """Return the dataset `key`, reached by hard links alone."""
    import h5py

    node = file
    for part in filter(None, key.split("/")):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            raise InputError(f"{path}: no dataset {key!r}; {_listing(_hdf5_volumes(file))}")
        if not isinstance(link, h5py.HardLink):
            raise InputError(
                f"{path}: {part!r} in {key!r} is a link to elsewhere; name the dataset itself"
            )
        node = node[part]
    if not isinstance(node, h5py.Dataset) or node.shape is None:
        raise InputError(f"{path}: {key!r} is no dataset with values")
    return node


def _hdf5_spacing(dataset: Any) -> Spacing | None:
    values = dataset.attrs.get(_SPACING_ATTRIBUTE)
    if getattr(values, "shape", None) != (3,) or values.dtype.kind not in "iuf":
        return None
    z, y, x = (float(value) for value in values)
    return (z, y, x) if all(math.isfinite(one) and one > 0 for one in (z, y, x)) else None
