"""OME-Zarr made by zarr alone: 0.5 on Zarr 3, 0.4 on Zarr 2.

A coarser level is named in the metadata only once it is whole: who reads these never meets half a
level, and after a kill `build_levels` begins that level again.
"""

from __future__ import annotations

import logging
import math
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from pipeline.data.ome_levels import Reduction, check_reduction, fill_level, halved
from pipeline.data.ome_metadata import (
    SPACE_UNITS,
    first_level,
    level_paths,
    multiscale_of,
    root_attributes,
    with_level,
)
from pipeline.data.volume_source import Spacing, is_volume, named_errors
from pipeline.errors import ConfigurationError, InputError, ResourceError

if TYPE_CHECKING:
    import zarr

__all__ = ["build_levels", "create_ome_zarr", "level_count", "write_unit"]

logger = logging.getLogger(__name__)

_LARGEST = 256  # voxels along the longest axis of the coarsest level: seen at a glance
_CLEVEL = 3
_BLOSC_LIMIT_BYTES = 2**31 - 1


def create_ome_zarr(
    path: Path | str,
    shape: Sequence[int],
    dtype: DTypeLike,
    chunks: Sequence[int],
    *,
    shards: Sequence[int] | None = None,
    spacing: Spacing | None = None,
    unit: str | None = "micrometer",
    channels: int | None = None,
    zarr_format: Literal[2, 3] = 3,
    fill_value: float = 0,
    attributes: Mapping[str, Any] | None = None,
    compressor: str | None = "zstd",
    overwrite: bool = False,
) -> zarr.Array[Any]:
    """Create an OME-Zarr image with an empty level `0` and return that array, to be written to.

    The folder appears with all its metadata at once. The array is `(D, H, W)`, with channels
    `(C, D, H, W)` in chunks of one channel each.

    Args:
        path: the folder to make.
        shape: `(D, H, W)`.
        dtype: of the voxels.
        chunks: `(d, h, w)`, what is compressed as a whole.
        shards: `(d, h, w)` of a file with several chunks, multiples of `chunks`; Zarr 3 alone.
        spacing: distance between voxels along `(D, H, W)`; None where it is unknown.
        unit: of the spacing.
        channels: `C`; None for an array without that axis.
        zarr_format: 3 for OME-Zarr 0.5, 2 for 0.4.
        fill_value: of what is never written; chunks of nothing else take no space.
        attributes: further attributes of the group.
        compressor: `zstd` or `lz4`, by blosc with bytes shuffled, or None.
        overwrite: remove what is there.

    Raises:
        ConfigurationError: a setting is wrong, or `path` exists.
        ResourceError: the folder cannot be written.
    """
    path = Path(path)
    dtype = np.dtype(dtype)
    _check_layout(path, shape, dtype, chunks, shards, zarr_format)
    _check_spacing(path, spacing, unit)
    if path.exists() and not overwrite:
        raise ConfigurationError(f"{path}: exists; choose another name or set overwrite")
    axes = "zyx" if channels is None else "czyx"
    multiscale = first_level(path.name.split(".")[0], axes, spacing, unit)
    lead: tuple[int, ...] = () if channels is None else (1,)
    layout = {
        "shape": (*(() if channels is None else (channels,)), *map(int, shape)),
        "dtype": dtype,
        "chunks": (*lead, *map(int, chunks)),
        "shards": None if shards is None else (*lead, *map(int, shards)),
        "fill_value": fill_value,
        "compressors": _compressor(path, compressor, zarr_format),
        **_naming(axes, zarr_format),
    }
    content = {**(attributes or {}), **root_attributes(multiscale, zarr_format)}
    with _named_writing(path):
        _create_at_once(path, content, layout, zarr_format)
    array = _open_group(path, "r+")["0"]
    logger.info("%s: created %s of %s in chunks %s", path, array.shape, dtype, array.chunks)
    return array  # type: ignore[no-any-return]


def write_unit(array: zarr.Array[Any]) -> tuple[int, ...]:
    """Return the piece that is stored as one file: the shard, or the chunk where there is none.

    Two processes that write into one such piece undo each other's work.
    """
    return tuple(array.shards or array.chunks)


def level_count(shape: Sequence[int]) -> int:
    """Return how many levels lead from `(D, H, W)` down to at most 256 voxels an axis.

    Example:
        >>> level_count((65, 8000, 7000)), level_count((10, 256, 256))
        (6, 1)
    """
    return 1 + max(0, math.ceil(math.log2(max(shape) / _LARGEST)))


def build_levels(
    path: Path | str,
    levels: int | None = None,
    *,
    reduce: Reduction | str = "mean",
    rebuild: bool = False,
) -> int:
    """Make the coarser levels of an OME-Zarr image, each half as fine as the one before.

    Each level is made of the one before it, a piece at a time: memory holds one `write_unit` and
    the voxels of eight chunks. Levels that are whole are kept, so it may be called again after a
    kill. One process at a time.

    Args:
        path: the OME-Zarr folder; level 0 must be written.
        levels: their number with level 0; by default `level_count` of its shape.
        reduce: `mean` (rounded to even where the type is whole numbers), or for labels `nearest`
            (the first of each eight voxels) or `max`.
        rebuild: make all levels anew, because level 0 has changed.

    Returns:
        The number of levels there are then.

    Raises:
        ConfigurationError: the settings do not fit the array.
        InputError: no OME-Zarr image.
        ResourceError: the folder cannot be written.
    """
    path = Path(path)
    root, multiscale = _opened(path)
    base = root[level_paths(multiscale)[0]]
    method = check_reduction(path, reduce, base.dtype)
    wanted = level_count(base.shape[-3:]) if levels is None else levels
    if wanted < 1:
        raise ConfigurationError(f"levels must be at least 1, got {wanted}")
    with named_errors(path), _named_writing(path):
        if rebuild and len(multiscale["datasets"]) > 1:
            multiscale = {**multiscale, "datasets": multiscale["datasets"][:1]}
            _update(root, multiscale)
        while (done := len(multiscale["datasets"])) < wanted:
            finer = root[level_paths(multiscale)[-1]]
            shape, factors = halved(finer.shape)
            shutil.rmtree(path / str(done), ignore_errors=True)  # of a writer that was killed
            fill_level(_create_like(root, str(done), finer, shape), finer, factors, method)
            multiscale = with_level(multiscale, str(done), factors, method)
            _update(root, multiscale)
            logger.info("%s: level %d of %d, shape %s", path, done, wanted - 1, shape)
    return len(multiscale["datasets"])


def _check_layout(
    path: Path,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    chunks: Sequence[int],
    shards: Sequence[int] | None,
    zarr_format: int,
) -> None:
    if len(shape) != 3 or not is_volume(shape, dtype):
        raise ConfigurationError(f"{path}: shape {tuple(shape)} of {dtype}, expected (D, H, W)")
    for name, piece in (("chunks", chunks), ("shards", shards)):
        if piece is not None and (len(piece) != 3 or min(piece) < 1):
            raise ConfigurationError(f"{path}: {name} {piece}, expected three positive lengths")
    if zarr_format not in (2, 3):
        raise ConfigurationError(f"{path}: zarr_format must be 2 or 3, got {zarr_format!r}")
    if shards is not None and zarr_format == 2:
        raise ConfigurationError(f"{path}: Zarr 2 has no shards; leave them out or use Zarr 3")
    if shards is not None and any(s % c for s, c in zip(shards, chunks, strict=True)):
        raise ConfigurationError(
            f"{path}: shards {tuple(shards)} must be multiples of chunks {tuple(chunks)}"
        )
    if math.prod(chunks) * dtype.itemsize > _BLOSC_LIMIT_BYTES:
        raise ConfigurationError(f"{path}: chunks {tuple(chunks)} of 2 GB or more; make them less")


def _check_spacing(path: Path, spacing: Spacing | None, unit: str | None) -> None:
    if spacing is not None and (
        len(spacing) != 3 or not all(math.isfinite(one) and one > 0 for one in spacing)
    ):
        raise ConfigurationError(f"{path}: spacing {spacing}, expected three positive numbers")
    if unit is not None and unit not in SPACE_UNITS:
        raise ConfigurationError(
            f"{path}: unit {unit!r} is none of OME-Zarr's; expected micrometer, millimeter, ..."
        )


def _compressor(path: Path, name: str | None, zarr_format: int) -> Any:
    if name is None:
        return None
    if name not in ("zstd", "lz4"):
        raise ConfigurationError(f"{path}: compressor must be zstd, lz4 or null, got {name!r}")
    if zarr_format == 2:
        return {"id": "blosc", "cname": name, "clevel": _CLEVEL, "shuffle": 1}
    settings = {"cname": name, "clevel": _CLEVEL, "shuffle": "shuffle"}
    return {"name": "blosc", "configuration": settings}


def _naming(axes: str, zarr_format: int) -> dict[str, Any]:
    """Return what each version asks of the arrays: nested chunk names, or named dimensions."""
    if zarr_format == 2:
        return {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    return {"dimension_names": tuple(axes)}


def _create_at_once(
    path: Path, content: Mapping[str, Any], layout: Mapping[str, Any], zarr_format: Literal[2, 3]
) -> None:
    """Make the group beside its final name and move it there."""
    import zarr
    from zarr.storage import LocalStore

    # Jobs on several machines may share a process id: the name is drawn.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        root = zarr.create_group(
            LocalStore(temporary), zarr_format=zarr_format, attributes=dict(content)
        )
        root.create_array("0", **layout)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _create_like(root: Any, name: str, model: Any, shape: tuple[int, ...]) -> Any:
    zarr_format = model.metadata.zarr_format
    axes = "czyx"[-len(shape) :]
    return root.create_array(
        name,
        shape=shape,
        dtype=model.dtype,
        chunks=model.chunks,
        shards=model.shards,
        fill_value=model.fill_value,
        compressors=model.compressors or None,
        **_naming(axes, zarr_format),
    )


def _update(root: Any, multiscale: Mapping[str, Any]) -> None:
    """Write the metadata in one go: zarr moves the new file over the old one."""
    root.update_attributes(root_attributes(multiscale, root.metadata.zarr_format))


def _open_group(path: Path, mode: Any) -> Any:
    import zarr
    from zarr.storage import LocalStore

    return zarr.open_group(LocalStore(path), mode=mode)


def _opened(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return the group and its multiscale."""
    with named_errors(path):
        root = _open_group(path, "r+")
        multiscale = multiscale_of(path, dict(root.attrs))
    if multiscale is None:
        raise InputError(f"{path}: no OME-Zarr image: its group has no multiscales")
    return root, multiscale


@contextmanager
def _named_writing(path: Path) -> Iterator[None]:
    """Turn what writing to a full or forbidden disk raises into a ResourceError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ResourceError) or error.errno is None:
            raise
        raise ResourceError(
            f"{path}: cannot be written: {error.strerror}; choose another folder"
        ) from error
