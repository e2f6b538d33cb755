"""The zip file that a competition takes: a mask per volume, named by its id."""

from __future__ import annotations

import io
import logging
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tifffile

from pipeline.data.atomic import atomic_path
from pipeline.data.images import image_stem
from pipeline.data.volume_source import named_errors
from pipeline.errors import ConfigurationError, InputError
from pipeline.inference.batch import BatchRun
from pipeline.inference.sidecars import read_sidecar

__all__ = ["check_submission", "check_submission_ids", "write_submission"]

logger = logging.getLogger(__name__)

_NAME = "submission.zip"
_STORED = zipfile.ZIP_STORED  # the masks are compressed already


def check_submission_ids(cases: Iterable[Mapping[str, Any]], enabled: bool = True) -> None:
    """Refuse volumes whose masks would have one name in a submission, before any work is done.

    Args:
        cases: with the `name` of each input.
        enabled: False does nothing.

    Raises:
        ConfigurationError: listing every clash.
    """
    if enabled:
        _by_id(str(case["name"]) for case in cases)


def write_submission(batch: BatchRun, enabled: bool = True) -> Path | None:
    """Write `submission.zip` of the masks of a run that has ended: `<id>.tif`, uint8, 0 and 1.

    Volumes that were rejected, or streamed and so have no TIFF, are left out with a warning. The
    file is read back before it gets its name; the same masks make the same bytes.

    Args:
        batch: the run, done.
        enabled: False does nothing.

    Returns:
        The file; None where there is none.

    Raises:
        ConfigurationError: two volumes have one id.
        InputError: a mask is not what its sidecar says.
        ResourceError: the disk is full.
    """
    if not enabled:
        return None
    masks, shapes = {}, {}
    for name, of in _by_id(str(row["image"]) for row in batch.rows).items():
        path, sidecar = batch.path(of, ".tif"), read_sidecar(batch.path(of, ".json"))
        if sidecar is None or path.name not in {Path(r).name for r in sidecar["results"]}:
            logger.warning("submission: %s has no TIFF and is left out", of)
            continue
        masks[name], shapes[name] = path, tuple(sidecar["shape"])
    if batch.problems:
        logger.warning("submission: %d rejected inputs are missing", len(batch.problems))
    if not masks:
        logger.warning("submission: no sound volume, nothing written")
        return None
    final = batch.output_dir / _NAME
    with atomic_path(final) as temporary:
        with zipfile.ZipFile(temporary, "w", _STORED) as archive:
            for name, path in sorted(masks.items()):
                archive.writestr(zipfile.ZipInfo(f"{name}.tif"), path.read_bytes(), _STORED)
        check_submission(temporary, shapes)
    logger.info("submission: %s, %d volumes", final, len(masks))
    return final


def check_submission(path: Path | str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Read a submission back and compare it with what was asked for.

    Args:
        path: the zip file.
        shapes: of the volumes `(D, H, W)` by id.

    Raises:
        InputError: a volume is missing, too many, damaged, or not uint8 of 0 and 1 in its shape.
    """
    with zipfile.ZipFile(path) as archive:
        expected = {f"{name}.tif" for name in shapes}
        if different := expected ^ set(archive.namelist()):
            raise InputError(f"{path}: missing or unasked for: {', '.join(sorted(different))}")
        for name, shape in shapes.items():
            with named_errors(f"{path}: {name}.tif"):
                mask = tifffile.imread(io.BytesIO(archive.read(f"{name}.tif")))
            if mask.shape != tuple(shape) or mask.dtype != np.uint8 or mask.max(initial=0) > 1:
                raise InputError(
                    f"{path}: {name}.tif is {mask.shape} of {mask.dtype} up to "
                    f"{mask.max(initial=0)}, expected {tuple(shape)} of uint8, 0 and 1; "
                    "compute it again with overwrite"
                )


def _by_id(names: Iterable[str]) -> dict[str, str]:
    """Return the inputs by their id: the name of the file without folders and suffix."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[image_stem(Path(PurePosixPath(name).name))].append(name)
    if twice := {key: of for key, of in found.items() if len(of) > 1}:
        shown = "; ".join(f"{key}: {' and '.join(of)}" for key, of in sorted(twice.items()))
        raise ConfigurationError(
            f"submission: volumes of one id would overwrite each other: {shown}; rename them, or "
            "predict one folder at a time"
        )
    return {key: of for key, (of,) in found.items()}
